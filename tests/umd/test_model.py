"""The network: packing changes nothing, initial values, sizes, settings that must not change results."""

import math

import pytest
import torch
import torch.nn.functional as F

from umd import ops
from umd.config import SIZES, ModelConfig, model_config
from umd.embedders import timestep_features
from umd.errors import UserError
from umd.layers import Linear
from umd.masking import layout
from umd.model import UMD
from umd.ops import patchify

CPU = torch.device("cpu")
TINY = dict(image_size=(8, 8), patch_size=2, hidden_size=16, depth=2, decoder_depth=2, num_heads=2)
CONFIGS = {
    "adaLN": dict(),
    "adaLN, plain norms": dict(norm_affine=False),
    "no adaLN": dict(adaLN=False),
    "4 CLS": dict(num_cls=4),
    "no adaLN, 3 CLS, labels": dict(adaLN=False, num_cls=3, num_classes=5),
    "released, labels": dict(embedding="released", num_classes=5),
    "cross decoder": dict(decoder="cross"),
    "cross decoder, no adaLN, 3 CLS, labels": dict(decoder="cross", adaLN=False, num_cls=3, num_classes=5),
    "not square": dict(image_size=(4, 10), channels=1),
    "no adaLN, not square, 5 channels": dict(adaLN=False, image_size=(6, 4), channels=5, patch_size=1),
}
every_config = pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())


def randomised(changes, dtype=torch.float64):
    """All parameters random: what starts at zero (gates, CLS, biases) hides mistakes."""
    model = UMD(ModelConfig(**{**TINY, **changes})).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model


def batch(model, keep, cond_index=None, seed=1):
    """Arguments of forward for random visible patches of len(keep) samples."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    L, S = config.num_patches, len(keep)
    rows = S if cond_index is None else 1 + max(cond_index)
    ids = [torch.randperm(L, generator=generator)[:k] + s * L for s, k in enumerate(keep)]
    width = config.channels * config.patch_size**2
    labels = torch.randint(config.num_classes + 1, (rows,), generator=generator)
    return dict(
        patches=torch.randn(sum(keep), width, generator=generator, dtype=torch.float64).to(model.head.weight.dtype),
        ids_keep=torch.cat(ids),
        packings=layout(config, tuple(keep), cond_index, CPU),
        timesteps=torch.randint(1001, (rows,), generator=generator),
        labels=labels if config.num_classes else None,
    )


def sub_batch(model, whole, keep, start, stop):
    """Samples start..stop of a batch whose samples have their own conditions, as a batch of their own."""
    L, first, last = model.config.num_patches, sum(keep[:start]), sum(keep[:stop])
    return dict(
        patches=whole["patches"][first:last],
        ids_keep=whole["ids_keep"][first:last] - start * L,
        packings=layout(model.config, tuple(keep[start:stop]), None, CPU),
        timesteps=whole["timesteps"][start:stop],
        labels=None if whole["labels"] is None else whole["labels"][start:stop],
    )


def run(model, args, dout):
    """(prediction, gradient of each parameter by name)."""
    prediction = model(**args)
    gradients = torch.autograd.grad(prediction, list(model.parameters()), dout.to(prediction.dtype))
    return prediction.detach(), dict(zip(dict(model.named_parameters()), gradients, strict=True))


@pytest.mark.parametrize("changes", [{}, {"gelu": "exact"}, {"decoder": "cross"}], ids=str)
def test_every_layer_runs_its_hooks_where_no_bias_is_split_off(changes):
    """ZeRO 3 fetches the weights of a layer in its forward pre-hook."""
    model, ran = randomised(changes), set()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    for name, layer in layers.items():
        layer.splits = False
        layer.register_forward_pre_hook(lambda *_, name=name: ran.add(name))
    model(**batch(model, [9, 16]))
    assert ran == set(layers)


def douts(model, S):
    config = model.config
    shape = S * config.num_patches, 2 * config.channels * config.patch_size**2
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def assert_close(ours, theirs, tolerance=1e-10):
    for name in theirs:
        scale = theirs[name].abs().max().clamp(min=1)
        assert (ours[name] - theirs[name]).abs().max() <= tolerance * scale, name


@every_config
@pytest.mark.parametrize("split", [[1, 2, 3, 4, 5], [3, 5]], ids=["each sample alone", "two passes"])
def test_packing_changes_nothing(changes, split):
    """One stream of 3 noised and 2 noise-free samples: predictions and every gradient, to 1e-10."""
    model = randomised(changes)
    L = model.config.num_patches
    keep = [L - 3] * 3 + [L // 4] * 2
    whole, dout = batch(model, keep), douts(model, 5)
    prediction, gradients = run(model, whole, dout)

    parts, sums, start = [], {}, 0
    for stop in split:
        args = sub_batch(model, whole, keep, start, stop)
        part, grads = run(model, args, dout[start * L : stop * L])
        parts.append(part)
        sums = {name: sums.get(name, 0) + g for name, g in grads.items()}
        start = stop
    assert_close({"prediction": prediction}, {"prediction": torch.cat(parts)})
    assert_close(gradients, sums)
    for name, gradient in gradients.items():  # nothing was left out on both sides
        assert gradient.abs().max() > 0, name


@every_config
def test_ragged_stream(changes):
    """As many lengths as samples, the shortest a single patch, the longest the whole image."""
    model = randomised(changes)
    L = model.config.num_patches
    keep = [2, L, 1, 5]
    whole = batch(model, keep)
    together = model(**whole).view(4, L, -1)
    for s in range(4):
        alone = model(**sub_batch(model, whole, keep, s, s + 1))
        torch.testing.assert_close(together[s], alone, rtol=1e-10, atol=1e-10)


@every_config
def test_shared_condition(changes):
    """Noise-free samples with one condition row, and the same row once for each."""
    model = randomised(changes)
    keep, dout = [5, 5, 2, 2, 2], douts(model, 5)
    shared = batch(model, keep, cond_index=(0, 1, 2, 2, 2))
    rows = torch.tensor([0, 1, 2, 2, 2])
    own = shared | dict(
        packings=layout(model.config, tuple(keep), None, CPU),
        timesteps=shared["timesteps"][rows],
        labels=None if shared["labels"] is None else shared["labels"][rows],
    )
    found, expected = run(model, shared, dout), run(model, own, dout)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    assert_close(found[1], expected[1])


@pytest.mark.parametrize("changes", [dict(), dict(adaLN=False), dict(num_cls=3)], ids=str)
def test_samples_matter(changes):
    """The comparison is worth something: another patch, time or place of a sample changes that one only."""
    model = randomised(changes)
    L, keep = model.config.num_patches, [6, 6, 3]
    args = batch(model, keep)
    before = model(**args).view(3, L, -1)
    unused = next(i for i in range(L) if i + L not in args["ids_keep"])
    for name, at, value in (("patches", 8, 0.5), ("timesteps", 1, 7), ("ids_keep", 8, L + unused)):
        changed = args[name].clone()
        changed[at] = value
        after = model(**(args | {name: changed})).view(3, L, -1)
        same = [torch.equal(before[s], after[s]) for s in range(3)]
        assert same == [True, False, True], name


@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "autocast"])
def test_checkpointing_is_exact(changes, dtype):
    """Recomputed blocks give the same bits, and the state dict does not know of it."""
    model = randomised(changes, torch.float32)
    args, dout = batch(model, [6, 6, 3]), douts(model, 3)
    names = list(model.state_dict())
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        kept = run(model, args, dout)
        model.set_checkpointing(True)
        assert list(model.state_dict()) == names
        recomputed = run(model, args, dout)
    assert torch.equal(kept[0], recomputed[0])
    for name, gradient in kept[1].items():
        assert torch.equal(gradient, recomputed[1][name]), name


def check_compiled(changes, backend, tolerance):
    torch._dynamo.reset()
    model = randomised(changes, torch.float32)
    args, dout = batch(model, [6, 6, 3], cond_index=(0, 1, 1)), douts(model, 3)
    with ops.cpu_paths(False):  # nor does a trace run what is compiled by hand
        expected = run(model, args, dout)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    prediction = compiled(**args)
    gradients = torch.autograd.grad(prediction, list(model.parameters()), dout.float())
    torch.testing.assert_close(prediction, expected[0], rtol=tolerance, atol=tolerance)
    assert_close(dict(zip(expected[1], gradients, strict=True)), expected[1], tolerance)


@pytest.mark.parametrize("changes", [dict(), dict(adaLN=False, num_classes=3), dict(decoder="cross")], ids=str)
def test_compiles_whole(changes):
    check_compiled(changes | dict(depth=1, decoder_depth=1), "eager", 1e-6)


@pytest.mark.slow
def test_compiles_with_inductor():
    check_compiled(dict(depth=1, decoder_depth=1, num_classes=3), "inductor", 1e-4)


@every_config
def test_bfloat16_autocast(changes):
    model = randomised(changes, torch.float32)
    args = batch(model, [6, 6, 3])
    exact = model(**args)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(**args)
    error = (rounded.float() - exact).square().mean().sqrt() / exact.std()
    assert 0 < error < 0.03


def test_blocks_start_as_the_identity():
    """adaLN-zero: the encoder is its embedding and a norm, so every image has the same representation."""
    model = UMD(ModelConfig(**TINY))
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    args = batch(model, [16] * 3)
    cond, encoder_mod, _ = model.condition(args["timesteps"])
    tokens = model.encode(args["patches"], args["ids_keep"], args["packings"], cond, encoder_mod)
    places = model.pos_embed[args["ids_keep"] % 16]
    embedded = F.layer_norm(model.x_embedder(args["patches"]) + places, (16,), eps=1e-6)
    torch.testing.assert_close(tokens.view(3, 17, 16)[:, 1:], embedded.view(3, 16, 16))
    assert model.represent(x).abs().max() == 0


def test_initial_values():
    """Bounds of uniform tables are exact; spreads to five standard errors."""
    torch.manual_seed(0)
    config = ModelConfig(image_size=(32, 32), patch_size=4, hidden_size=64, depth=1, num_heads=2, num_classes=10)
    model = UMD(config)
    D, L = 64, 64

    def normal(table, std):
        assert abs(table.std().item() / std - 1) < 5 / math.sqrt(2 * table.numel())
        assert abs(table.mean().item()) < 5 * std / math.sqrt(table.numel())

    def xavier(matrix, fan_in, fan_out):
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert matrix.abs().max() <= bound
        normal(matrix, bound / math.sqrt(3))

    normal(model.pos_embed, 1 / math.sqrt(L))
    normal(model.decoder_pos_embed, 1 / math.sqrt(L))
    normal(model.mask_token, 0.02)
    normal(model.head.weight, 0.02)
    normal(model.y_embedder.embedding_table.weight, 0.02)
    normal(model.x_embedder.weight, 1 / math.sqrt(3 * 4 * 4))
    normal(model.t_embedder.mlp[0].weight, 1 / 16)
    for block in (*model.encoder.layers, *model.decoder.layers):
        for matrix in (*block.attn.qkv.weight.chunk(3), block.attn.proj.weight):
            xavier(matrix, D, D)
        xavier(block.mlp.fc1.weight, D, 4 * D)
        xavier(block.mlp.fc2.weight, 4 * D, D)
        normal(block.mlp.fc1.bias, 1e-6)
        assert (block.attn.qkv.bias == 0).all() and (block.norm1.weight == 1).all()
    zeros = (model.cls_token, *model.adaLN_modulation.parameters(), model.head.bias)
    assert all((table == 0).all() for table in zeros)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("adaLN", [True, False])
def test_parameter_counts(size, adaLN):
    with torch.device("meta"):
        model = UMD(model_config(f"UMD-{size}/4", adaLN=adaLN, num_cls=4, num_classes=1000))
    D, depth = SIZES[size]["hidden_size"], SIZES[size]["depth"] + SIZES[size]["decoder_depth"]
    patch, L = 3 * 4 * 4, 256
    block = 12 * D**2 + 13 * D  # qkv 3, proj 1, MLP 4 + 4; their biases 9; two norms with scale and bias
    time, labels = 256 * D + D**2 + 2 * D, 1001 * D
    embeddings = patch * D + D + 2 * L * D + 4 * D + D  # patches, positions, CLS, mask
    head = 2 * patch * D + 2 * 3
    modulation = (6 * depth + 2) * (D**2 + D) if adaLN else 0
    expected = depth * block + 2 * 2 * D + time + labels + embeddings + head + modulation
    assert sum(p.numel() for p in model.parameters()) == expected


def test_named_sizes():
    config = model_config("UMD-L/2", channels=4, image_size=(32, 32))
    assert (config.hidden_size, config.depth, config.decoder_depth, config.num_heads) == (1024, 24, 8, 16)
    assert (config.patch_size, config.num_patches, config.grid_size) == (2, 256, (16, 16))
    for name in ("B/4", "UMD-B", "UMD-H/4", "UMD-B/x", "DiT-B/4", ""):
        with pytest.raises(UserError, match="UMD-SIZE/PATCH"):
            model_config(name)


def test_impossible_networks_are_refused():
    for changes, words in (
        (dict(image_size=(30, 32), patch_size=4), "30x32 is not divisible by patch size 4; use 28x32"),
        (dict(hidden_size=20, num_heads=3), "width 20"),
        (dict(hidden_size=15, num_heads=3), "width 15 must be even"),
        (dict(num_cls=-1), "num_cls -1: must be at least 0"),
        (dict(decoder_depth=0, decoder_hidden_size=16), "decoder_depth 0 is no decoder"),
        (dict(decoder="cross", num_cls=0), "the cross decoder"),
        (dict(embedding="none"), "adaLN off"),
        (dict(decoder_hidden_size=8, adaLN=False), "the decoder must be as wide"),
        (dict(decoder_hidden_size=16, adaLN_projection="single"), "adaLN single"),
        (dict(positions="sincos", hidden_size=18, num_heads=3), "divisible by 4"),
        (dict(decoder_hidden_size=20, decoder_num_heads=3), "width 20"),
        (dict(num_classes=-1), "num_classes"),
    ):
        with pytest.raises(UserError, match=words):
            ModelConfig(**{**TINY, **changes})


def test_time_features():
    """DiT: cosines first, frequencies 10000^(-i/half). Released code: sines first, divided by half - 1."""
    t = torch.tensor([0, 3, 1000])
    for released, rates in (
        (False, [1, 1e-1, 1e-2, 1e-3]),
        (True, [1, 1e4 ** (-1 / 3), 1e4 ** (-2 / 3), 1e-4]),
    ):
        angles = t[:, None] * torch.tensor(rates, dtype=torch.float64)
        first, second = (angles.sin(), angles.cos()) if released else (angles.cos(), angles.sin())
        found = timestep_features(t, 8, "released" if released else "paper", torch.float64)
        torch.testing.assert_close(found, torch.cat([first, second], 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("embedding", ["paper", "released"])
def test_no_label_is_the_null_class(embedding):
    model = randomised(dict(num_classes=5, embedding=embedding))
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 1, 500, 1000])
    without = model.denoise(x, t)
    null = model.denoise(x, t, torch.full((4,), 5))
    other = model.denoise(x, t, torch.tensor([5, 5, 5, 0]))
    for a, b, c in zip(without, null, other, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[:3], c[:3]) and not torch.equal(a[3], c[3])


def test_labels_need_a_label_embedding():
    model = randomised(dict())
    x, t = torch.zeros(1, 3, 8, 8, dtype=torch.float64), torch.ones(1, dtype=torch.int64)
    with pytest.raises(UserError, match="without labels"):
        model.denoise(x, t, torch.zeros(1, dtype=torch.int64))
    for wrong in (x[..., :4], x[:, :1], x[0]):
        with pytest.raises(UserError, match=r"expected \[B, 3, 8, 8\]"):
            model.denoise(wrong, t)
        with pytest.raises(UserError, match=r"expected \[B, 3, 8, 8\]"):
            model.represent(wrong)


@every_config
def test_denoise_and_represent_read_whole_images(changes):
    """Both equal a forward pass with every patch visible, in whatever order."""
    model = randomised(changes)
    config, generator = model.config, torch.Generator().manual_seed(3)
    H, W = config.image_size
    x = torch.randn(2, config.channels, H, W, dtype=torch.float64, generator=generator)
    L, t = config.num_patches, torch.tensor([0, 0])
    order = torch.cat([torch.randperm(L, generator=generator) + s * L for s in range(2)])
    patches = patchify(x, config.patch_size).flatten(0, 1)[order]
    prediction = model(patches, order, layout(config, (L, L), None, CPU), t)
    for found, expected in zip(model.denoise(x, t), model.to_images(prediction), strict=True):
        assert found.shape == x.shape
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)

    cond, encoder_mod, _ = model.condition(t)
    tokens = model.encode(patches, order, layout(config, (L, L), None, CPU), cond, encoder_mod)
    cls = tokens.view(2, config.num_cls + L, -1)[:, : config.num_cls]
    torch.testing.assert_close(model.represent(x), cls.mean(1), rtol=1e-10, atol=1e-10)
    noisy = model.represent(x, torch.tensor([51]))
    assert not torch.allclose(noisy, cls.mean(1))
    assert model.float().represent(x.float()).dtype == torch.float32


def test_no_weight_decay():
    """Biases, CLS and mask token; norm scales and the tables of positions and labels are decayed."""
    model = UMD(ModelConfig(**TINY, num_classes=3))
    undecayed = model.no_weight_decay()
    assert {"cls_token", "mask_token", "head.bias", "encoder.norm.bias"} <= undecayed
    decayed = set(model.state_dict()) - undecayed
    assert {
        "pos_embed",
        "decoder_pos_embed",
        "encoder.norm.weight",
        "y_embedder.embedding_table.weight",
    } <= decayed
    assert all(name.endswith("bias") or name in ("cls_token", "mask_token") for name in undecayed)
