"""UMD's cross decoder and the prediction of a subset: against a plain rewrite, sample by sample, and by enumeration."""

from itertools import combinations, product

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare
from torch import Tensor

from umd.config import OBJECTIVES, ModelConfig, ObjectiveConfig
from umd.convert import to_small_vision
from umd.errors import UserError
from umd.masking import layout
from umd.model import UMD
from umd.objective import Objective
from umd.ops import patchify, philox_randn_samples
from umd.sampler import ddim_sample
from umd.schedule import NoiseSchedule

CPU = torch.device("cpu")
COSINE = NoiseSchedule("cosine")
TINY = dict(
    image_size=(4, 6), channels=2, patch_size=2, hidden_size=16, depth=2, decoder_depth=2, num_heads=2, decoder="cross"
)
CONFIGS = {
    "adaLN": ModelConfig(**TINY),
    "no adaLN, 2 CLS": ModelConfig(**TINY, adaLN=False, num_cls=2),
    "labels, plain norms": ModelConfig(**TINY, num_classes=3, norm_affine=False),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def randomised(config: ModelConfig) -> UMD:
    model, generator = UMD(config).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model


def images(config: ModelConfig, B: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, config.channels, *config.image_size, generator=generator, dtype=torch.float64)


def plain(model: UMD, patches: Tensor, keep: Tensor, asked: Tensor, time: int, label: int | None) -> Tensor:
    """One sample: visible patches [K, ·] at places `keep`, to predict at places `asked`: [Q, 2·C·P·P]."""
    config, p = model.config, dict(model.named_parameters())
    D, heads = config.hidden_size, config.num_heads
    cond, *tables = model.condition(torch.tensor([time]), None if label is None else torch.tensor([label]))
    tables = [table for part in tables for block in part for table in block]

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(x, name):
        return F.layer_norm(x, (D,), p.get(f"{name}.weight"), p.get(f"{name}.bias"), eps=1e-6)

    def attend(q, k, v):
        out = []
        for q_h, k_h, v_h in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True):
            out.append(torch.softmax(q_h @ k_h.T / (D // heads) ** 0.5, 1) @ v_h)
        return torch.cat(out, 1)

    def block(x, name, attention):
        shift1, scale1, gate1, shift2, scale2, gate2 = [tables.pop(0) for _ in range(6)] if config.adaLN else (
            0, 0, 1, 0, 0, 1,
        )  # fmt: skip
        x = x + gate1 * linear(attention(norm(x, f"{name}.norm1") * (1 + scale1) + shift1), f"{name}.attn.proj")
        h = norm(x, f"{name}.norm2") * (1 + scale2) + shift2
        return x + gate2 * linear(F.gelu(linear(h, f"{name}.mlp.fc1"), approximate="tanh"), f"{name}.mlp.fc2")

    x = torch.cat([p["cls_token"], linear(patches, "x_embedder") + p["pos_embed"][keep]])
    for i in range(config.depth):
        name = f"encoder.layers.{i}"
        x = x if config.adaLN else torch.cat([cond, x])  # anew before every block
        x = block(x, name, lambda y: attend(*linear(y, f"{name}.attn.qkv").chunk(3, 1)))  # noqa: B023
        x = x if config.adaLN else x[1:]
    encoded = norm(x, "encoder.norm")

    of_patch = dict(zip(keep.tolist(), encoded[config.num_cls :], strict=True))
    x = torch.stack([of_patch.get(i, p["mask_token"]) + p["decoder_pos_embed"][i] for i in asked.tolist()])
    memory = encoded if config.adaLN else torch.cat([cond, encoded])
    for i in range(config.decoder_depth):
        name = f"decoder.layers.{i}"
        k, v = linear(norm(memory, f"{name}.attn.norm"), f"{name}.attn.kv").chunk(2, 1)
        x = block(x, name, lambda y: attend(linear(y, f"{name}.attn.q"), k, v))  # noqa: B023
    x = norm(x, "decoder.norm")
    if config.adaLN:
        shift, scale = tables
        x = x * (1 + scale) + shift
    return x @ p["head.weight"].T + p["head.bias"].repeat_interleave(config.patch_size**2)


def gradients(model: UMD, value: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(value, parameters, materialize_grads=True), strict=True))


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() <= 1e-10 * gradient.abs().max().clamp(min=1), name


@every_config
def test_a_packed_batch_is_each_sample_alone_and_unfused(config):
    """Samples with other numbers of visible and of predicted patches: the outputs asked for, 0 elsewhere, gradients."""
    model, L = randomised(config), config.num_patches
    generator = torch.Generator().manual_seed(2)
    asked = [[4, 0, 5], [1], [0, 1, 2, 3, 4, 5], [3, 2]]
    keep = [torch.randperm(L, generator=generator)[:k] for k in (2, 5, 6, 1)]
    patches = [torch.randn(len(k), 8, generator=generator, dtype=torch.float64) for k in keep]
    times, labels = [3, 0, 1000, 412], [0, 3, 2, 1] if config.num_classes else None
    ids = torch.cat([torch.tensor(places) + s * L for s, places in enumerate(asked)])
    counts = tuple(len(k) for k in keep), tuple(len(places) for places in asked)
    found = model(
        torch.cat(patches),
        torch.cat([k + s * L for s, k in enumerate(keep)]),
        layout(config, counts[0], None, CPU, counts[1]),
        torch.tensor(times),
        None if labels is None else torch.tensor(labels),
        ids,
    )
    expected = torch.cat(
        [
            plain(model, x, k, torch.tensor(places), t, None if labels is None else labels[s])
            for s, (x, k, places, t) in enumerate(zip(patches, keep, asked, times, strict=True))
        ]
    )
    torch.testing.assert_close(found[ids], expected, rtol=1e-11, atol=1e-11)
    assert (found.index_fill(0, ids, 0) == 0).all()
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    theirs = gradients(model, (expected * upstream).sum())
    assert_same_gradients(gradients(model, (found[ids] * upstream).sum()), theirs)
    for name, gradient in theirs.items():
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("ratio, name", [*product((1.0, 0.5), ("umd", "mae", "maskdit")), (1.0, "dit")])
@every_config
def test_a_step_is_the_formula(config, ratio, name):
    """Loss, parts and gradients at the settings of UMD, MAE, MaskDiT and DiT, each sample by itself."""
    settings = ObjectiveConfig(**{**vars(OBJECTIVES[name]), "predict_ratio": ratio})
    model, objective, B, L = randomised(config), Objective(config, settings, COSINE), 4, config.num_patches
    x = images(config, B)
    c = objective.corrupt(B, 5, CPU, torch.tensor([0, 2, 1, 0]) if config.num_classes else None)
    n = c.num_noised
    eps = philox_randn_samples(c.noise, x.shape[1:], dtype=torch.float64)
    x_t = torch.cat([COSINE.q_sample(x[:n], c.timesteps[:n], eps), x[n:]])
    targets = [patchify(t, 2) for t in (x, eps, x_t)]
    ignored = set() if c.ids_ignored is None else set(c.ids_ignored.tolist())
    errors: dict[str, list[Tensor]] = {"eps": [], "x0": [], "clean": []}
    hidden_count = 0
    for s in range(B):
        keep = c.ids_keep[c.ids_keep // L == s] % L
        hidden = [i for i in range(L) if i not in keep.tolist()]
        scored = [i for i in hidden if s * L + i not in ignored]
        assert len(scored) == int(len(hidden) * ratio)
        hidden_count += len(hidden) - len(scored)
        row = min(s, n)
        both = plain(
            model, targets[2][s, keep], keep, torch.arange(L), c.timesteps[row].item(),
            None if c.labels is None else c.labels[row].item(),
        ).view(L, 2, -1)  # fmt: skip
        if s >= n:
            errors["clean"].append((both[scored, 0] - targets[0][s, scored]) ** 2)
            continue
        errors["eps"].append((both[keep, 1] - targets[1][s, keep]) ** 2)
        scored = scored or list(range(L))
        errors["x0"].append((both[scored, 0] - targets[0][s, scored]) ** 2)
    assert hidden_count == len(ignored)
    parts = torch.stack([torch.cat(e).mean() if e else x.new_zeros(()) for e in errors.values()])
    f = (B - n) / B
    expected = (1 - f) * (parts[0] + parts[1]) / 2 + f * parts[2]
    total, found = objective(model, x, c)
    torch.testing.assert_close(total, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found, parts.detach(), rtol=1e-11, atol=1e-11)
    assert_same_gradients(gradients(model, total), gradients(model, expected))


def test_a_subset_is_an_unbiased_estimate():
    """Mean over all 3·6 pairs of 2 of 3 and 2 of 4 hidden patches: the loss on all of them, and its gradient."""
    config = CONFIGS["adaLN"]
    model, x, L = randomised(config), images(config, 2), 6
    whole = Objective(config, ObjectiveConfig(mask_ratio=0.5, mask_ratio_no_noise=0.66), COSINE)
    assert (whole.keep_noised, whole.keep_clean) == (3, 2)
    c = whole.corrupt(2, 9, CPU)
    seen = c.ids_keep[:3]
    hidden = [[i for i in range(s * L, s * L + L) if i not in c.ids_keep] for s in range(2)]
    losses = []
    for chosen in product(combinations(hidden[0], 2), combinations(hidden[1], 2)):
        asked = torch.tensor([*seen.tolist(), *chosen[0], *chosen[1]])
        rest = torch.tensor([i for s in range(2) for i in hidden[s] if i not in chosen[s]])
        part = c._replace(
            layout=layout(config, (3, 2), (0, 1), CPU, (5, 2)),
            ids_predict=asked,
            ids_ignored=rest,
            num_ignored_noised=1,
        )
        losses.append(whole(model, x, part)[0])
    assert len(losses) == 18 and torch.stack(losses).std() > 1e-3
    exact = whole(model, x, c)[0]
    torch.testing.assert_close(torch.stack(losses).mean(), exact, rtol=1e-12, atol=0)
    assert_same_gradients(gradients(model, torch.stack(losses).mean()), gradients(model, exact))


def test_every_hidden_patch_is_predicted_equally_often():
    """Of 2 of the 4 hidden patches of 6, every pair (visible pair, predicted pair) equally often."""
    settings = ObjectiveConfig(no_noise_prob=1.0, mask_ratio_no_noise=0.66, predict_ratio=0.5)
    objective = Objective(CONFIGS["adaLN"], settings, COSINE)
    counts = torch.zeros(64, 64, dtype=torch.int64)
    for seed in range(300):
        c = objective.corrupt(16, seed, CPU)
        seen, asked, rest = (
            ids.view(16, 2).sub(6 * torch.arange(16)[:, None]) for ids in (c.ids_keep, c.ids_predict, c.ids_ignored)
        )
        assert (torch.cat([seen, asked, rest], 1).sort(1).values == torch.arange(6)).all()
        counts.index_put_(((2**seen).sum(1), (2**asked).sum(1)), torch.tensor(1), accumulate=True)
    assert chisquare(counts[counts > 0]).pvalue > 0.001 and (counts > 0).sum() == 15 * 6


def test_masks_and_noise_are_those_of_the_published_decoder():
    """Whatever is predicted: seed for seed the same visible patches, times and noise."""
    published = Objective(ModelConfig(**{**TINY, "decoder": "self"}), ObjectiveConfig(), COSINE).corrupt(6, 3, CPU)
    assert published.ids_predict is None and published.ids_ignored is None
    for ratio in (1.0, 0.5):
        c = Objective(CONFIGS["adaLN"], ObjectiveConfig(predict_ratio=ratio), COSINE).corrupt(6, 3, CPU)
        assert torch.equal(c.ids_keep, published.ids_keep) and torch.equal(c.timesteps, published.timesteps)
        assert torch.equal(c.noise, published.noise)


def test_shapes_never_change():
    objective = Objective(CONFIGS["adaLN"], ObjectiveConfig(predict_ratio=0.5), COSINE)
    first, *others = (objective.corrupt(8, seed, CPU) for seed in range(10))
    for c in others:
        assert c.layout is first.layout and c.ids_predict.shape == first.ids_predict.shape


def test_samples_with_guidance():
    """All of a noised picture is visible there, and its noise is predicted patch by patch."""
    model = randomised(CONFIGS["labels, plain norms"])

    def denoise(x_t: Tensor, timesteps: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        return model.denoise(x_t.double(), timesteps, labels)

    drawn = [
        ddim_sample(
            denoise, (2, 2, 4, 6), COSINE, num_steps=3, labels=torch.tensor([0, 1]), null_label=3, cfg_scale=scale
        )
        for scale in (1.0, 3.0)
    ]
    assert drawn[0].shape == (2, 2, 4, 6) and all(x.isfinite().all() for x in drawn)
    assert not torch.allclose(*drawn)


def test_what_cannot_be_is_refused():
    cross, published = CONFIGS["adaLN"], ModelConfig(**{**TINY, "decoder": "self"})
    for config, settings, words in (
        (
            published,
            dict(predict_ratio=0.5),
            "the published decoder reads and predicts every patch: use --model.decoder",
        ),
        (
            cross,
            dict(predict_ratio=0.1),
            "predict_ratio 0.1 leaves none of 3 hidden patches to predict; use at least 0.333",
        ),
        (cross, dict(predict_ratio=0.5, no_noise_prob=0.0, mask_ratio=0.0), "none can be left out"),
    ):
        with pytest.raises(UserError, match=words):
            Objective(config, ObjectiveConfig(**settings), COSINE)
    for ratio in (0.0, -1.0, 1.1):
        with pytest.raises(UserError, match="must be above 0 and at most 1"):
            ObjectiveConfig(predict_ratio=ratio)
    with pytest.raises(UserError, match="no counterpart of this network: it would need decoder self"):
        to_small_vision(UMD(ModelConfig(**TINY, embedding="released")))
