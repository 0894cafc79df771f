"""Errors by model time."""

import pytest
import torch

from umd.config import ModelConfig, ObjectiveConfig
from umd.methods import build_objective
from umd.model import UMD
from umd.ops import patchify
from umd.peers import DIT, MAE
from umd.pixel_stats import normalized
from umd.schedule import NoiseSchedule
from umd.train.errors import error_times, hidden_error, picture_errors

SMALL = dict(image_size=(8, 8), patch_size=2, hidden_size=16, depth=1, decoder_depth=1, num_heads=2)
TIMES = [0, 1, 500, 1000]


def parts(objective=ObjectiveConfig(), schedule="cosine", **changes):  # noqa: B008
    torch.manual_seed(0)
    model = UMD(ModelConfig(**{**SMALL, **changes})).eval()
    return model, build_objective(model.config, objective, NoiseSchedule(schedule))


def pictures(n=6):
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1, torch.arange(n)


def test_a_network_that_says_nothing():
    """Zero predictions: the errors are the mean squares of noise and picture."""
    model, objective = parts()
    torch.nn.init.zeros_(model.head.weight)
    x, ids = pictures()
    found = picture_errors(model, objective, x, ids, TIMES, torch.float32)
    squares = (x**2).flatten(1).mean(1)
    torch.testing.assert_close(found["x_start"][:, 1:], squares[:, None].expand(-1, 3))
    eps = found["eps"][:, 1:]
    assert torch.equal(eps[:, 0], eps[:, 1]) and torch.equal(eps[:, 0], eps[:, 2])  # the same noise at every time
    assert (eps[:, 0] - 1).abs().max() < 5 * (2 / 192) ** 0.5  # of 192 normal values
    assert (found["eps"][:, 0] == -1).all() and (found["x_start"][:, 0] == -1).all()  # no noise at 0
    order = torch.arange(16.0).repeat(6, 1)
    hidden = hidden_error(model, objective, x, torch.zeros_like(x), order, torch.zeros(6).long(), 4, torch.float32)
    torch.testing.assert_close(hidden, (patchify(x, 2)[:, 4:] ** 2).mean((1, 2)))


def test_a_picture_has_its_noise_and_mask_in_any_company():
    model, objective = parts()
    torch.nn.init.normal_(model.head.weight)
    x, ids = pictures()
    whole = picture_errors(model, objective, x, ids, TIMES, torch.float32)
    some = picture_errors(model, objective, x[[4, 1]], ids[[4, 1]], TIMES, torch.float32)
    for name in whole:
        torch.testing.assert_close(some[name], whole[name][[4, 1]], rtol=1e-5, atol=1e-6)
    assert (whole["hidden"] >= 0).all()  # at 0 by the noise-free mask, later by the other


def test_a_dit_and_an_mae():
    dit = ObjectiveConfig(no_noise_prob=0, mask_ratio=0)
    model, objective = parts(dit, "linear", **DIT)
    x, ids = pictures()
    found = picture_errors(model, objective, x, ids, TIMES, torch.float32)
    assert (found["hidden"] == -1).all() and (found["eps"][:, 1:] >= 0).all() and found["x_start"].isfinite().all()
    mae = ObjectiveConfig(no_noise_prob=1, norm_pix=True)
    model, objective = parts(mae, **MAE | dict(decoder_depth=1, decoder_hidden_size=16, decoder_num_heads=2))
    torch.nn.init.zeros_(model.head.weight)
    found = picture_errors(model, objective, x, ids, TIMES, torch.float32)
    assert (found["eps"] == -1).all() and (found["hidden"][:, 1:] == -1).all()
    squares = (normalized(patchify(x, 2)) ** 2).mean((1, 2))  # of 12 values: 11/12
    torch.testing.assert_close(found["hidden"][:, 0], squares, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("T", [1, 10, 1000])
def test_times(T):
    times = error_times(T)
    assert times[0] == 0 and times[1] == 1 and times[-1] == T and times == sorted(set(times))
