"""DiffMAE against a plain rewrite, sample by sample; its objective as a formula; filling holes as exact statistics."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from umd.config import DiffMAEConfig, DiffMAEObjectiveConfig
from umd.diffmae import DiffMAE, fill, filling_denoiser, from_images, layout, patch_mask, to_images
from umd.embedders import timestep_features
from umd.errors import UserError
from umd.flops import diffmae_decoder_flops, diffmae_encoder_flops
from umd.kernels import backend
from umd.objective import DiffMAEObjective
from umd.ops import patchify
from umd.schedule import NoiseSchedule

CPU = torch.device("cpu")
IMAGE = DiffMAEConfig(
    image_size=(8, 12), channels=2, patch_size=4, hidden_size=24, depth=3, num_heads=2, num_cls=2,
    decoder_hidden_size=16, decoder_depth=2, decoder_num_heads=4,
)  # fmt: skip
CONFIGS = {
    "cross_self": IMAGE,
    "cross": replace(IMAGE, decoder="cross"),
    "joint": replace(IMAGE, decoder="joint"),
    "no links": replace(IMAGE, links=False),
    "decoder deeper than encoder": replace(IMAGE, decoder_depth=4),
    "video": replace(IMAGE, num_frames=6, tubelet_size=2),
    "video, joint": replace(IMAGE, num_frames=2, decoder="joint", target_size=5, norm_affine=False),
}
SCHEDULE = NoiseSchedule("linear_rho", rho=0.8)


def trained(config: DiffMAEConfig, seed: int = 0) -> DiffMAE:
    """A network in fp64 none of whose parameters is 0 or 1."""
    torch.manual_seed(seed)
    model = DiffMAE(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def draw(config: DiffMAEConfig, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The network, written out for one picture at a time


def plain(model: DiffMAE, visible: Tensor, keep: Tensor, masked: Tensor, removed: Tensor, time: int) -> Tensor:
    """visible [K, ·], masked [M, ·], their places: the prediction [M, ·]."""
    config, p = model.config, dict(model.named_parameters())
    area = math.prod(config.grid_size)

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(x, name):
        weight, bias = p.get(f"{name}.weight"), p.get(f"{name}.bias")
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps=1e-6)

    def attend(q, k, v, heads):
        out = []
        for q_h, k_h, v_h in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True):
            out.append(torch.softmax(q_h @ k_h.T / q_h.shape[1] ** 0.5, 1) @ v_h)
        return torch.cat(out, 1)

    def self_attention(x, name, heads):
        return linear(attend(*linear(x, f"{name}.qkv").chunk(3, 1), heads), f"{name}.proj")

    def cross_attention(x, context, name, heads):
        k, v = linear(norm(context, f"{name}.norm"), f"{name}.kv").chunk(2, 1)
        return linear(attend(linear(x, f"{name}.q"), k, v, heads), f"{name}.proj")

    def mlp(x, name):
        return linear(F.gelu(linear(x, f"{name}.fc1"), approximate="tanh"), f"{name}.fc2")

    def place(ids, name):
        out = p[name][ids % area]
        return out if f"{name}_time" not in p else out + p[f"{name}_time"][ids // area]

    x = torch.cat([p["cls_token"], linear(visible, "x_embedder") + place(keep, "pos_embed")])
    levels = []
    for i in range(config.depth):
        block = f"encoder.layers.{i}"
        x = x + self_attention(norm(x, f"{block}.norm1"), f"{block}.attn", config.num_heads)
        x = x + mlp(norm(x, f"{block}.norm2"), f"{block}.mlp")
        levels.append(x)
    levels[-1] = norm(x, "encoder.norm")

    features = timestep_features(torch.tensor([time]), 256, "paper", torch.float64)
    e_t = linear(F.silu(linear(features, "decoder_t_embedder.mlp.0")), "decoder_t_embedder.mlp.2")
    x = linear(masked, "decoder_embed") + place(removed, "decoder_pos_embed") + e_t
    if config.decoder == "joint":
        x = torch.cat([linear(levels[-1], "decoder_context"), x])
    for i in range(config.decoder_depth):
        block, heads = f"decoder.layers.{i}", config.decoder_num_heads
        level = levels[max(config.depth - 1 - i, 0)] if config.links else levels[-1]
        if config.decoder == "cross_self":
            x = x + cross_attention(norm(x, f"{block}.norm_cross"), level, f"{block}.cross", heads)
        if config.decoder == "cross":
            x = x + cross_attention(norm(x, f"{block}.norm1"), level, f"{block}.attn", heads)
        else:
            x = x + self_attention(norm(x, f"{block}.norm1"), f"{block}.attn", heads)
        x = x + mlp(norm(x, f"{block}.norm2"), f"{block}.mlp")
    return linear(norm(x, "decoder.norm"), "head")[-len(masked) :]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_batch_is_each_picture_alone_and_unfused(name):
    """Pictures with different numbers of visible patches, outputs and every gradient in fp64."""
    config, model = CONFIGS[name], trained(CONFIGS[name])
    L, keep, times = config.num_patches, (2, 2, 1, config.num_patches - 1), [1, 1000, 30, 500]
    order = [torch.randperm(L, generator=torch.Generator().manual_seed(i)) for i in range(len(keep))]
    visible = [draw(config, k, config.patch_dim, seed=i) for i, k in enumerate(keep)]
    masked = [draw(config, L - k, config.patch_dim, seed=10 + i) for i, k in enumerate(keep)]
    ids_keep = torch.cat([ids[:k] + s * L for s, (ids, k) in enumerate(zip(order, keep, strict=True))])
    ids_masked = torch.cat([ids[k:] + s * L for s, (ids, k) in enumerate(zip(order, keep, strict=True))])
    found = model(
        torch.cat(visible), ids_keep, torch.cat(masked), ids_masked, layout(config, keep, CPU), torch.tensor(times)
    )
    expected = torch.cat(
        [
            plain(model, v, ids[:k], m, ids[k:], t)
            for v, m, ids, k, t in zip(visible, masked, order, keep, times, strict=True)
        ]
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)

    dout = draw(config, *found.shape, seed=99)
    parameters = dict(model.named_parameters())
    gradients = [torch.autograd.grad(out, list(parameters.values()), dout) for out in (found, expected)]
    for parameter, ours, theirs in zip(parameters, *gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9, msg=lambda text, n=parameter: f"{n}: {text}")
        assert ours.abs().max() > 0, parameter


def test_checkpointing_changes_no_gradient():
    objective = DiffMAEObjective(IMAGE, DiffMAEObjectiveConfig(mask_ratio=0.5), SCHEDULE)
    x, c = draw(IMAGE, 3, 2, 8, 12), objective.corrupt(3, 0, CPU)
    gradients = []
    for on in (False, True):
        model = trained(IMAGE)
        model.set_checkpointing(on)
        objective(model, x, c)[0].backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def batch_of(config: DiffMAEConfig, keep: tuple[int, ...]) -> dict:
    L = config.num_patches
    ids = [torch.cat([torch.arange(k) + s * L for s, k in enumerate(ks)]) for ks in (keep, [L - k for k in keep])]
    visible, masked = (draw(config, len(i), config.patch_dim, seed=len(i)).float() for i in ids)
    return dict(
        visible=visible, ids_keep=ids[0], masked=masked, ids_masked=ids[1], packings=layout(config, keep, CPU),
        timesteps=torch.arange(1, 1 + len(keep)),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["joint", "video"])
def test_compiles_whole(name):
    torch._dynamo.reset()
    config = replace(CONFIGS[name], depth=1, decoder_depth=1)
    model, arguments = trained(config).float(), batch_of(config, (3, 3, 1))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**arguments), model(**arguments), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_autocast(name):
    model, arguments = trained(CONFIGS[name]).float(), batch_of(CONFIGS[name], (1, 3))
    exact = model(**arguments)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(**arguments)
    error = (rounded.float() - exact).square().mean().sqrt() / exact.std()
    assert 0 < error < 0.03


@pytest.mark.skipif(not backend.HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("name", ["cross_self", "video"])
def test_kernels_give_the_same_loss(name):
    config, shape = CONFIGS[name], (2, 2, *((6,) if name == "video" else ()), 8, 12)
    objective = DiffMAEObjective(config, DiffMAEObjectiveConfig(mask_ratio=0.5), SCHEDULE)
    x, c, losses = draw(config, *shape).float(), objective.corrupt(2, 0, CPU), []
    for choice in ("reference", "triton"):
        with backend.kernels(choice):
            losses.append(objective(trained(config).float(), x, c)[0])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)


def test_the_encoder_carries_over_to_and_from_clips_by_name():
    """Same names and shapes, the clip's tubelets and times apart, so that encoders are exchanged between runs."""
    image = {n: p.shape for n, p in DiffMAE(IMAGE).named_parameters()}
    video = {n: p.shape for n, p in DiffMAE(CONFIGS["video"]).named_parameters()}
    assert set(video) - set(image) == {"pos_embed_time", "decoder_pos_embed_time"}
    differ = {name for name in image if image[name] != video[name]}
    assert differ == {"x_embedder.weight", "decoder_embed.weight", "head.weight", "head.bias"}


# Clips as images


def test_tubelets_are_cut_along_time_and_space():
    config = CONFIGS["video"]
    x = draw(config, 2, 2, 6, 8, 12)
    images = to_images(x, config)
    assert images.shape == (2 * 3, 2 * 2, 8, 12)
    assert torch.equal(from_images(images, config), x)
    patches = patchify(images, 4).view(2, config.num_patches, config.patch_dim)
    b, f, h, w = 1, 2, 1, 2
    tubelet = x[b, :, 2 * f : 2 * f + 2, 4 * h : 4 * h + 4, 4 * w : 4 * w + 4]
    assert torch.equal(patches[b, f * 6 + h * 3 + w], tubelet.flatten())


def test_images_pass_through():
    x = draw(IMAGE, 2, 2, 8, 12)
    assert torch.equal(to_images(x, IMAGE), x) and torch.equal(from_images(x, IMAGE), x)


@pytest.mark.parametrize("name", ["cross_self", "video"])
def test_pictures_of_another_size_are_refused(name):
    with pytest.raises(UserError, match=r"expected \[B, 2, .*8, 12\] for this model, got \[1, 2, 8, 8\]"):
        to_images(torch.zeros(1, 2, 8, 8), CONFIGS[name])


# The objective


@pytest.mark.parametrize("target", ["pixels", "normalized"])
@pytest.mark.parametrize("name", ["cross_self", "video"])
def test_the_loss_is_the_formula(name, target):
    """‖x0 - D(x_t)‖² over masked patches, x_t of each picture from its own time, the encoder's input clean."""
    config, model = CONFIGS[name], trained(CONFIGS[name])
    objective = DiffMAEObjective(config, DiffMAEObjectiveConfig(mask_ratio=0.5, target=target), SCHEDULE)
    shape = (3, 2, *((6,) if name == "video" else ()), 8, 12)
    x, L = draw(config, *shape), config.num_patches
    c = objective.corrupt(3, 5, CPU)
    eps = draw(config, *to_images(x, config).shape, seed=3)
    loss, parts = objective(model, x, c._replace(noise=eps))

    keep, removed = c.ids_keep.view(3, -1), c.ids_masked.view(3, -1)
    assert keep.shape[1] == L // 2
    errors = []
    for b in range(3):
        assert sorted([*(keep[b] - b * L).tolist(), *(removed[b] - b * L).tolist()]) == list(range(L))
        t = int(c.timesteps[b])
        alpha = SCHEDULE.alphas_cumprod[t]
        clean = patchify(to_images(x[b : b + 1], config), 4).flatten(0, 1)
        noise = patchify(eps.view(3, -1, *eps.shape[1:])[b], 4).flatten(0, 1)
        noised = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        seen, hidden = keep[b] - b * L, removed[b] - b * L
        predicted = plain(model, clean[seen], seen, noised[hidden], hidden, t)
        goal = clean[hidden]
        if target == "normalized":
            goal = (goal - goal.mean(1, keepdim=True)) / (goal.var(1, keepdim=True) + 1e-6).sqrt()
        errors.append((predicted - goal).square().mean())
    torch.testing.assert_close(loss, torch.stack(errors).mean(), rtol=1e-9, atol=0)
    assert parts.shape == (0,)


def test_at_the_last_time_alone_it_is_mae_fed_noise():
    """MAE with an embedded noise patch for each mask token, and no time or noise level anywhere."""
    last = SCHEDULE.num_steps
    objective = DiffMAEObjective(IMAGE, DiffMAEObjectiveConfig(mask_ratio=0.5, min_time=last), SCHEDULE)
    model = trained(IMAGE)
    x, c = draw(IMAGE, 4, 2, 8, 12), objective.corrupt(4, 1, CPU)
    assert c.timesteps.tolist() == [last] * 4
    eps = draw(IMAGE, 4, 2, 8, 12, seed=2)
    patches, noise = patchify(x, 4).flatten(0, 1), patchify(eps, 4).flatten(0, 1)
    with torch.no_grad():  # a constant bias in place of the time
        e_t = model.decoder_t_embedder(c.timesteps[:1])[0]
    mae = trained(IMAGE)
    mae.decoder_t_embedder = torch.nn.Module()
    mae.decoder_t_embedder.forward = lambda t: torch.zeros(len(t), IMAGE.decoder_hidden_size, dtype=torch.float64)
    mae.decoder_embed.bias.data += e_t
    out = mae(patches[c.ids_keep], c.ids_keep, noise[c.ids_masked], c.ids_masked, c.layout, torch.zeros(4).long())
    expected = (out - patches[c.ids_masked]).square().mean()
    loss, _ = objective(model, x, c._replace(noise=eps))
    assert SCHEDULE.alphas_cumprod[last] < 1e-10  # what is left of the picture
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_draws_are_uniform_over_their_range_and_a_function_of_the_seed():
    objective = DiffMAEObjective(IMAGE, DiffMAEObjectiveConfig(mask_ratio=0.5, min_time=900), SCHEDULE)
    a, b = objective.corrupt(2000, 3, CPU), objective.corrupt(2000, 3, CPU)
    assert all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("ids_keep", "ids_masked", "timesteps", "noise"))
    counts = torch.bincount(a.timesteps)
    assert counts[:900].sum() == 0 and len(counts) == 1001 and counts[900:].min() > 2
    visible = torch.bincount(a.ids_keep % 6, minlength=6) / 2000
    assert (visible - 0.5).abs().max() < 5 * 0.5 / 2000**0.5


def test_learns_a_picture_by_heart():
    torch.manual_seed(0)
    config = replace(IMAGE, hidden_size=32, decoder_hidden_size=32)
    model = DiffMAE(config)
    objective = DiffMAEObjective(config, DiffMAEObjectiveConfig(mask_ratio=0.5), SCHEDULE)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    x = draw(config, 1, 2, 8, 12).float().clamp(-1, 1).expand(16, -1, -1, -1)
    losses = []
    for step in range(150):
        loss, _ = objective(model, x, objective.corrupt(16, step, CPU))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.05 * sum(losses[:10])


# Targets from a file


def test_features_are_looked_up_by_picture_and_place(tmp_path):
    config = replace(IMAGE, target_size=5)
    features = draw(config, 7, 6, 5).numpy()
    np.save(tmp_path / "f.npy", features)
    objective = DiffMAEObjective(
        config, DiffMAEObjectiveConfig(mask_ratio=0.5, target=str(tmp_path / "f.npy")), SCHEDULE, num_images=7
    )
    indices = torch.tensor([6, 0, 3])
    c = objective.corrupt(3, 0, CPU, indices=indices)
    target = objective.target(torch.zeros(3, 2, 8, 12), c)
    expected = [features[indices[i // 6], i % 6] for i in c.ids_masked.tolist()]
    np.testing.assert_array_equal(target.numpy(), np.float32(expected))
    loss, _ = objective(trained(config), draw(config, 3, 2, 8, 12), c)
    assert loss.isfinite()


def test_features_that_do_not_fit_are_one_sentence(tmp_path):
    config = replace(IMAGE, target_size=5)

    def build(array, name="f.npy", num_images=7, model=config):
        if array is not None:
            np.save(tmp_path / name, array)
        return DiffMAEObjective(model, DiffMAEObjectiveConfig(target=str(tmp_path / name)), SCHEDULE, num_images)

    for shape in ((6, 6, 5), (7, 5, 5), (7, 6, 4), (7, 30)):
        with pytest.raises(UserError, match=r"expected floats \[7, 6, 5\]: training images, patches, and model.target"):
            build(np.zeros(shape, np.float32))
    with pytest.raises(UserError, match="are int64"):
        build(np.zeros((7, 6, 5), np.int64))
    with pytest.raises(UserError, match="cannot be read"):
        build(None, "none.npy")
    (tmp_path / "text.npy").write_text("not an array")
    with pytest.raises(UserError, match="cannot be read"):
        build(None, "text.npy")
    np.savez(tmp_path / "f.npz", f=np.zeros((7, 6, 5), np.float32))
    with pytest.raises(UserError, match="cannot be read"):
        build(None, "f.npz")
    with pytest.raises(UserError, match="target_size is 5, but the target is pixels"):
        DiffMAEObjective(config, DiffMAEObjectiveConfig(), SCHEDULE)
    with pytest.raises(UserError, match="min_time is 1001, but the noise schedule ends at 1000"):
        DiffMAEObjective(IMAGE, DiffMAEObjectiveConfig(min_time=1001), SCHEDULE)


# FLOPs


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_equal_torchs_count(name):
    config, keep = CONFIGS[name], (1, 3, 2)
    model, batch, L = DiffMAE(config), layout(CONFIGS[name], keep, CPU), config.num_patches
    ids = [torch.cat([torch.arange(k) + s * L for s, k in enumerate(ks)]) for ks in (keep, [L - k for k in keep])]
    patches = [torch.zeros(len(i), config.patch_dim) for i in ids]
    with FlopCounterMode(display=False) as counter:
        memories = model.encode(patches[0], ids[0], batch)
    assert counter.get_total_flops() == diffmae_encoder_flops(config, keep)
    with FlopCounterMode(display=False) as counter:
        model.decode(patches[1], ids[1], batch, torch.ones(3).long(), memories)
    assert counter.get_total_flops() == diffmae_decoder_flops(config, keep)


# Filling holes


def hole_of(config: DiffMAEConfig, B: int) -> Tensor:
    """A different hole in each picture, its edges inside patches."""
    hole = torch.zeros(B, 1, *((config.num_frames,) if config.num_frames > 1 else ()), *config.image_size)
    for b in range(B):
        hole[b, ..., 1 : 3 + b, 2:7] = 1
    return hole


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["cross_self", "cross", "joint", "video"])
def test_kept_pixels_come_back_and_the_hole_is_not_looked_at(name, dtype):
    config, model = CONFIGS[name], trained(CONFIGS[name]).float()
    hole = hole_of(config, 3)
    x = draw(config, 3, 2, *hole.shape[2:]).to(dtype)
    x[0, 0, ..., -1, -1] = -0.0
    kept = (hole == 0).expand_as(x)
    model = model.to(dtype)
    outs = []
    for value in (0.0, math.nan):
        given = torch.where(kept, x, torch.tensor(value, dtype=dtype))
        outs.append(fill(model, given, hole, SCHEDULE, fillings=2, num_steps=4, clip=False))
    assert torch.equal(outs[0], outs[1])
    assert outs[0].dtype == dtype and outs[0].shape == (3, 2, *x.shape[1:])
    for out in outs[0].unbind(1):
        assert out[kept].numpy().tobytes() == x[kept].numpy().tobytes()
        assert (out[~kept] != x[~kept]).all()
    assert (outs[0][:, 0] != outs[0][:, 1])[~kept].all()


@pytest.mark.parametrize("name", ["cross_self", "joint", "video"])
def test_many_fillings_are_each_alone(name):
    """The fillings of a picture share its keys and values; each is what it would be in a batch of its own."""
    config, model = CONFIGS[name], trained(CONFIGS[name])
    hole = hole_of(config, 2)
    x = draw(config, 2, 2, *hole.shape[2:])
    arguments = {"num_steps": 3, "eta": 0.5, "seed": 4}
    together = fill(model, x, hole, SCHEDULE, fillings=3, **arguments)
    for b in range(2):
        for i in range(3):
            alone = fill(model, x[b : b + 1], hole[b : b + 1], SCHEDULE, first_sample=3 * b + i, **arguments)
            torch.testing.assert_close(together[b, i], alone[0, 0], rtol=0, atol=1e-5)


def test_the_denoiser_is_the_network():
    """What the samplers are given, against `plain` on the patches that the hole touches."""
    model, hole, x = trained(IMAGE), hole_of(IMAGE, 2), draw(IMAGE, 2, 2, 8, 12)
    x_t = draw(IMAGE, 2, 2, 8, 12, seed=7)
    x_start, eps = filling_denoiser(model, x, hole, SCHEDULE)(x_t, torch.tensor([250, 250]), None)
    mask, clean, noised = patch_mask(hole, IMAGE), patchify(x, 4), patchify(x_t, 4)
    for b in range(2):
        keep, removed = (~mask[b]).nonzero()[:, 0], mask[b].nonzero()[:, 0]
        expected = clean[b].index_copy(0, removed, plain(model, clean[b, keep], keep, noised[b, removed], removed, 250))
        torch.testing.assert_close(patchify(x_start, 4)[b], expected)
    torch.testing.assert_close(SCHEDULE.q_sample(x_start, torch.tensor([250, 250]), eps), x_t)


def test_the_encoder_runs_once():
    model, calls = trained(IMAGE).float(), {"encoder": 0, "decoder": 0}
    for name in calls:
        getattr(model, name).register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    fill(model, torch.zeros(2, 2, 8, 12), hole_of(IMAGE, 2), SCHEDULE, fillings=3, num_steps=10)
    assert calls == {"encoder": 1, "decoder": 11}


class ExactPosterior(DiffMAE):
    """The decoder replaced by E[x^m | x_t^m, x^v] for pictures from N(mean, covariance)."""

    def __init__(self, config, mean, covariance, schedule):
        super().__init__(config)
        self.mean, self.covariance, self.schedule = mean, covariance, schedule

    def encode(self, visible, ids_keep, batch):
        return [visible, ids_keep]

    def decode(self, masked, ids_masked, batch, timesteps, memories):
        visible, ids_keep = memories
        L, P = self.config.num_patches, self.config.patch_dim
        v = (ids_keep % L)[:, None] * P + torch.arange(P)
        m = (ids_masked[: batch.masked.max_seqlen] % L)[:, None] * P + torch.arange(P)
        v, m = v.flatten(), m.flatten()
        S_vv, S_mv = self.covariance[v][:, v], self.covariance[m][:, v]
        gain = S_mv @ torch.linalg.inv(S_vv)
        mean = self.mean[m] + gain @ (visible.double().flatten() - self.mean[v])
        covariance = self.covariance[m][:, m] - gain @ S_mv.T
        a, b = (float(table) for table in self.schedule.coefficients(timesteps[0], torch.float64))
        update = a * covariance @ torch.linalg.inv(a**2 * covariance + b**2 * torch.eye(len(m)))
        x_t = masked.double().view(-1, len(m))
        return (mean + (x_t - a * mean) @ update.T).view(masked.shape).to(masked.dtype)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_fillings_have_the_conditional_mean_and_covariance(eta):
    """DDIM and DDPM at all steps, 4000 fillings of one picture: mean to 4.5 standard errors, covariance to 6 %."""
    config = DiffMAEConfig(
        image_size=(4, 4), channels=1, patch_size=2, hidden_size=8, depth=1, num_heads=1, decoder_hidden_size=8,
        decoder_depth=1, decoder_num_heads=1,
    )  # fmt: skip
    schedule, n = NoiseSchedule("cosine"), 4000
    factor = draw(config, 16, 16, seed=1) / 4
    covariance = 0.25 * (factor @ factor.T + 0.2 * torch.eye(16))  # between patch values, patch after patch
    mean = 0.3 * draw(config, 16, seed=2)
    model = ExactPosterior(config, mean, covariance, schedule)
    x = 0.5 * draw(config, 1, 1, 4, 4, seed=3).float()
    hole = torch.zeros(1, 1, 4, 4)
    hole[..., :2] = 1  # two of the four patches

    out = fill(model, x, hole, schedule, fillings=n, num_steps=1000, eta=eta, clip=False, seed=5)
    drawn = patchify(out[0], 2)[:, [0, 2]].flatten(1).double()  # [n, 8]
    clean = patchify(x, 2)[0].double().flatten()
    m, v = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
    gain = covariance[m][:, v] @ torch.linalg.inv(covariance[v][:, v])
    expected_mean = mean[m] + gain @ (clean[v] - mean[v])
    expected = covariance[m][:, m] - gain @ covariance[v][:, m]
    standard_error = (expected.diagonal() / n).sqrt()
    assert ((drawn.mean(0) - expected_mean).abs() / standard_error).max() < 4.5
    assert (expected_mean - mean[m]).abs().max() > 20 * standard_error.max()  # the visible patches do tell
    error = torch.linalg.matrix_norm(torch.cov(drawn.T) - expected) / torch.linalg.matrix_norm(expected)
    assert error < 0.06


def test_holes_that_do_not_fit_are_one_sentence():
    model, x = DiffMAE(IMAGE), torch.zeros(1, 2, 8, 12)
    for hole, message in (
        (torch.zeros(1, 1, 8, 12), "hides nothing of picture 0"),
        (torch.ones(1, 1, 8, 12), "touches every 4x4 patch of picture 0"),
        (torch.ones(1, 1, 8, 8), r"expected \[B, 1, 8, 12\] for this model, got \[1, 1, 8, 8\]"),
    ):
        with pytest.raises(UserError, match=message):
            fill(model, x, hole, SCHEDULE)
    features = DiffMAE(replace(IMAGE, target_size=5))
    with pytest.raises(UserError, match="predicts features, not pixels, and cannot fill"):
        fill(features, x, hole_of(IMAGE, 1), SCHEDULE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 3, "tubelet_size": 2}, "num_frames 3 is not divisible by tubelet_size 2"),
        ({"decoder_num_heads": 3}, "decoder width 16 must be even and divisible by 3 heads"),
        ({"decoder_depth": 0}, "decoder_depth 0: must be at least 1"),
        ({"target_size": -1}, "target_size -1: must be at least 0"),
        ({"image_size": (8, 10)}, "image size 8x10 is not divisible by patch size 4"),
    ],
)
def test_configurations_that_cannot_be_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        replace(IMAGE, **changes)
