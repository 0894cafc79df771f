"""Features by block: they are the residual stream, told from what later blocks make of it."""

from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from umd.config import ModelConfig, model_config
from umd.model import UMD
from umd.report.figures import layer_curves
from umd.representation import layer_features, layer_names

CONFIG = dict(patch_size=4, hidden_size=16, depth=3, num_heads=2, decoder_depth=2, num_cls=2)


def random_model(**changes) -> UMD:
    torch.manual_seed(0)
    model = UMD(ModelConfig(**{**CONFIG, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def shut(block) -> None:
    """Make a block hand its input on."""
    for layer in (block.attn.proj, block.mlp.fc2):
        layer.weight.zero_()
        layer.bias.zero_()


@torch.no_grad()
@pytest.mark.parametrize("adaLN", [True, False])
@pytest.mark.parametrize("time", [0, 300])
def test_the_stream_behind_a_block_is_what_the_final_norm_sees_if_no_other_follows(adaLN, time):
    """Of images of one patch, whose mean it is."""
    model, x = random_model(adaLN=adaLN, image_size=(4, 4)), torch.randn(5, 3, 4, 4)
    timesteps = torch.tensor([time])
    names, features = layer_names(model.config), layer_features(model, x, timesteps)
    assert names == ["encoder 1", "encoder 2", "encoder 3", "decoder 1", "decoder 2"] and len(features) == 5
    for i, feature in enumerate(features):
        cut = deepcopy(model)
        for block in [*cut.encoder.layers, *cut.decoder.layers][i + 1 :] if i >= 3 else cut.encoder.layers[i + 1 :]:
            shut(block)
        if i < 3:
            norm, seen = cut.encoder.norm, []
            cut.encoder.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
            cut.represent(x, timesteps)
            found = seen[0].view(5, -1, 16)[:, -1]
            expected = F.layer_norm(feature, (16,), norm.weight, norm.bias, 1e-6)
        else:
            norm, seen = cut.decoder.norm, []
            cut.head.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
            cut.denoise(x, timesteps.expand(5))
            found = seen[0].view(5, 16)
            expected = F.layer_norm(feature, (16,), norm.weight, norm.bias, 1e-6)
            if adaLN:
                shift, scale = [*cut.condition(timesteps)[2]][-1]
                expected = expected * (1 + scale) + shift
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("adaLN", [True, False])
def test_it_is_the_mean_over_patches_and_over_nothing_else(adaLN):
    """Of the last block, whose stream the final norm makes and hands on beside its output."""
    model, x = random_model(adaLN=adaLN, image_size=(8, 8), norm_affine=False), torch.randn(3, 3, 8, 8)
    tokens: list[torch.Tensor] = []
    model.decoder.norm.register_forward_hook(lambda module, args, out: tokens.append(out[0]))
    model.denoise(x, torch.full((3,), 40))
    stream = tokens[0].view(3, -1, 16)
    assert stream.shape[1] == (5 if adaLN else 6)  # the representation, a condition without adaLN, four patches
    last = layer_features(model, x, torch.tensor([40]))[-1]
    torch.testing.assert_close(last, stream[:, -4:].mean(1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_image_has_its_features_whatever_is_beside_it():
    model, x = random_model(image_size=(8, 8)), torch.randn(4, 3, 8, 8)
    whole = layer_features(model, x)
    for alone, among in zip(layer_features(model, x[2:3]), whole, strict=True):
        torch.testing.assert_close(alone, among[2:3])
    assert not torch.allclose(whole[0], layer_features(model, x, torch.tensor([500]))[0])


def test_a_cross_decoder_has_no_stream_of_patches():
    model = random_model(image_size=(8, 8), decoder="cross")
    with torch.no_grad():
        assert len(layer_features(model, torch.randn(2, 3, 8, 8))) == len(layer_names(model.config)) == 3


@pytest.mark.parametrize(("runs", "times"), [(1, [0]), (2, [0, 50, 400])])
def test_curves_are_drawn(tmp_path, runs, times):
    names = [*layer_names(model_config("UMD-XL/4")), "representation"]
    row = {name: {"mean": 0.3 + 0.01 * i, "std": 0.01} for i, name in enumerate(names)}
    layer_curves({f"run {i}": dict.fromkeys(times, row) for i in range(runs)}, tmp_path / "layers.png", 100)
    with Image.open(tmp_path / "layers.png") as picture:
        assert picture.size[0] > 700 * runs - 100 and np.asarray(picture.convert("L")).std() > 5
