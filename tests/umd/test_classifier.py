"""The classifier on a pre-trained encoder: the same features, pooling, drop path, layer-wise rates; what it refuses."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from umd.classifier import Classifier, encoder_weights
from umd.config import ClassifierConfig, DiffMAEConfig, ModelConfig, classifier_config
from umd.errors import UserError
from umd.flops import classifier_flops
from umd.methods import build_model
from umd.ops import patchify
from umd.train.optim import adamw

UMD_TINY = ModelConfig(
    image_size=(8, 12), patch_size=4, hidden_size=24, depth=3, decoder_depth=1, num_heads=2, num_cls=2
)
SOURCES = {
    "UMD": UMD_TINY,
    "UMD, one adaLN projection": replace(UMD_TINY, adaLN_projection="single"),
    "UMD, plain norms": replace(UMD_TINY, norm_affine=False, embedding="released"),
    "UMD, fine-tuned on labels": replace(UMD_TINY, num_classes=4),
    "MAE": replace(UMD_TINY, adaLN=False),
    "MAE, plain norms": replace(UMD_TINY, adaLN=False, norm_affine=False, num_cls=1),
    "DiffMAE": DiffMAEConfig(
        image_size=(8, 12), patch_size=4, hidden_size=24, depth=3, num_heads=2, num_cls=2, decoder_hidden_size=16,
        decoder_depth=1, decoder_num_heads=2,
    ),
}  # fmt: skip
SOURCES["DiffMAE, video"] = replace(SOURCES["DiffMAE"], num_frames=4, tubelet_size=2)


def shaken(model):
    """In fp64, with no parameter left at 0 or 1."""
    with torch.no_grad():
        for parameter in model.double().parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def pictures(config, count=3):
    frames = (config.num_frames,) if getattr(config, "num_frames", 1) > 1 else ()
    return torch.randn(count, config.channels, *frames, *config.image_size, dtype=torch.float64)


def with_encoder_of(source, **changes) -> Classifier:
    model = Classifier(classifier_config(source.config, num_classes=5, **changes)).double()
    missing, unexpected = model.load_state_dict(encoder_weights(source), strict=False)
    assert not unexpected and {name.split(".")[0] for name in missing} <= {"head", "batch_norm"}
    return model.eval()


@pytest.mark.parametrize("name", SOURCES)
def test_features_are_those_of_the_pretrained_network(name):
    torch.manual_seed(0)
    source = shaken(build_model(SOURCES[name]))
    x = pictures(SOURCES[name])
    expected = source.represent(x)
    assert expected.std() > 0.1 and (expected[0] - expected[1]).abs().max() > 1e-2
    model = with_encoder_of(source)
    torch.testing.assert_close(model.features(x), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.represent(x[1:2]), expected[1:2], rtol=1e-10, atol=1e-10)
    logits = model(x)
    torch.testing.assert_close(logits, F.linear(expected, model.head.weight, model.head.bias), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["UMD", "MAE"])
def test_the_mean_of_patch_tokens(name):
    """Each patch token as if it were the CLS token: the mean over all tokens is made of both poolings."""
    torch.manual_seed(0)
    source = shaken(build_model(SOURCES[name]))
    x = pictures(SOURCES[name])
    cls, mean = (with_encoder_of(source, pool=pool).features(x) for pool in ("cls", "mean"))
    seen = []
    model = with_encoder_of(source)
    model.encoder.norm.register_forward_hook(lambda module, inputs, output: seen.append(output[1]))
    model.features(x)
    tokens = seen[0].view(len(x), -1, 24)[:, -(2 + 6) :]  # without the condition token
    torch.testing.assert_close(tokens.mean(1), (2 * cls + 6 * mean) / 8)
    assert (cls - mean).abs().max() > 1e-2


def test_gates_open_change_nothing_and_closed_ones_leave_the_embedding():
    torch.manual_seed(0)
    model = with_encoder_of(shaken(build_model(SOURCES["UMD"])), pool="mean")
    x = pictures(UMD_TINY)
    ones = torch.ones(6, 3, dtype=torch.float64)
    torch.testing.assert_close(model.features(x, ones), model.features(x))
    embedder, norm = model.x_embedder, model.encoder.norm
    embedded = F.linear(patchify(x, 4), embedder.weight, embedder.bias) + model.pos_embed
    expected = F.layer_norm(embedded, (24,), norm.weight, norm.bias, eps=1e-6).mean(1)
    torch.testing.assert_close(model.features(x, 0 * ones), expected)


def test_drop_path_acts_on_single_pictures():
    torch.manual_seed(0)
    model = with_encoder_of(shaken(build_model(SOURCES["MAE"])))
    x = pictures(UMD_TINY)
    gates = torch.ones(6, 3, dtype=torch.float64)
    gates[2:4, 1] = 0  # both branches of the second block, of the second picture
    whole, dropped = model.features(x), model.features(x, gates)
    torch.testing.assert_close(dropped[[0, 2]], whole[[0, 2]])
    assert (dropped[1] - whole[1]).abs().max() > 1e-3
    del model.encoder.layers[1]
    torch.testing.assert_close(model.features(x)[1], dropped[1])


def test_rates_decay_from_the_head_to_the_embeddings():
    """MAE's lr_decay.py for 3 blocks: 0.5 to the power of 4 (embeddings), 3, 2, 1 (blocks), 0 (norm, head)."""
    model = Classifier(ClassifierConfig((8, 8), hidden_size=16, depth=3, num_heads=2, num_classes=3, cond_token=True))
    multipliers = model.lr_multipliers(0.5)
    for name in ("x_embedder.weight", "x_embedder.bias", "pos_embed", "cls_token", "cond_token"):
        assert multipliers[name] == 1 / 16
    for i, expected in enumerate((1 / 8, 1 / 4, 1 / 2)):
        inside = {value for name, value in multipliers.items() if name.startswith(f"encoder.layers.{i}.")}
        assert inside == {expected}
    for name in ("encoder.norm.weight", "encoder.norm.bias", "head.weight", "head.bias"):
        assert multipliers[name] == 1
    assert set(multipliers) == {name for name, _ in model.named_parameters()}

    names = {p: name for name, p in model.named_parameters()}
    seen = []
    for group in adamw(model, 1e-2, (0.9, 0.999), 0.05, layer_decay=0.5).param_groups:
        for p in group["params"]:
            seen.append(names[p])
            assert group["lr"] == pytest.approx(1e-2 * multipliers[names[p]])
            spared = p.ndim == 1 or names[p] in ("pos_embed", "cls_token")
            assert group["weight_decay"] == (0 if spared else 0.05)
    assert sorted(seen) == sorted(multipliers)


def test_a_linear_probe_trains_its_layer_alone_behind_a_batch_norm():
    torch.manual_seed(0)
    model = with_encoder_of(shaken(build_model(SOURCES["UMD"])), linear=True)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
    x = pictures(UMD_TINY, count=8)
    features = model.features(x)
    normed = (features - features.mean(0)) / (features.var(0, correction=0) + 1e-6).sqrt()
    head = model.head
    model.train()
    torch.testing.assert_close(model(x), F.linear(normed, head.weight, head.bias))
    for _ in range(300):  # the running moments settle
        model(x)
    model.eval()
    normed = (features - features.mean(0)) / (features.var(0) + 1e-6).sqrt()
    torch.testing.assert_close(model(x), F.linear(normed, head.weight, head.bias))
    assert {"batch_norm.running_mean", "batch_norm.running_var"} <= {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("cond_token", [False, True])
def test_flops_are_those_counted(cond_token):
    config = ClassifierConfig(
        (8, 12), patch_size=4, hidden_size=24, depth=2, num_heads=2, num_classes=3, cond_token=cond_token
    )
    model = Classifier(config).requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(5, 3, 8, 12))
    assert classifier_flops(config, 5) == counter.get_total_flops()


def test_what_it_refuses():
    config = ClassifierConfig((8, 8), hidden_size=16, depth=1, num_heads=2)
    for classes in (0, 1):
        with pytest.raises(UserError, match=f"needs 2 classes or more, got {classes}"):
            Classifier(replace(config, num_classes=classes))
    model = Classifier(replace(config, num_classes=2))
    with pytest.raises(UserError, match=r"expected \[B, 3, 8, 8\] for this model, got \[2, 3, 8, 12\]"):
        model(torch.zeros(2, 3, 8, 12))
    with pytest.raises(UserError, match="num_frames 3 is not divisible by tubelet_size 2"):
        replace(config, num_frames=3, tubelet_size=2)
