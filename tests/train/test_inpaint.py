"""An MAE's filling of a hole."""

import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from umd.config import OBJECTIVES, ModelConfig
from umd.errors import UserError
from umd.masking import layout
from umd.model import UMD
from umd.ops import patchify
from umd.train.inpaint import Inpaint, fill_with, reconstruct
from umd.train.run import RunConfig

CONFIG = ModelConfig(
    image_size=(8, 12), channels=2, patch_size=4, hidden_size=24, depth=2, num_heads=2, decoder_depth=1
)


@pytest.mark.parametrize("adaLN", [True, False])
def test_a_reconstruction_is_the_networks_prediction_of_each_picture_alone(adaLN):
    """Holes of different sizes in one batch, their edges inside patches; what they hide is not looked at."""
    torch.manual_seed(0)
    config = replace(CONFIG, adaLN=adaLN)
    model = UMD(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, hole = torch.randn(2, 2, 8, 12).double(), torch.zeros(2, 1, 8, 12)
    hole[0, :, 1:3, 2:7] = 1  # two patches
    hole[1, :, 2:6, 1:11] = 1  # all six but the last column's lower one
    hole[1, :, 4:, 8:] = 0
    out = reconstruct(model, torch.where(hole.bool(), math.nan, x), hole, torch.float64)
    kept = (hole == 0).expand_as(x)
    assert torch.equal(out[kept], x[kept])
    for b, keep in enumerate(([2, 3, 4, 5], [5])):
        seen = torch.tensor(keep)
        visible = patchify(x[b : b + 1], 4)[0, seen]
        batch = layout(config, (len(keep),), None, torch.device("cpu"))
        x_start, _ = model.to_images(model(visible, seen, batch, torch.zeros(1, dtype=torch.int64)))
        torch.testing.assert_close(out[b][~kept[b]], x_start[0][~kept[b]], rtol=0, atol=1e-12)


def test_a_run_that_saw_no_noise_answers_once():
    """Sampling would ask an MAE to denoise."""
    model, hole = UMD(CONFIG), torch.zeros(2, 1, 8, 12)
    hole[..., :5] = 1
    x = torch.randn(2, 2, 8, 12)
    for method, count in (("mae", 1), ("umd", 3)):
        config = RunConfig(model=CONFIG, objective=OBJECTIVES[method])
        filled = fill_with(config, model, x, hole, Inpaint(steps=2), torch.float32, Console(quiet=True))
        assert filled.samples.shape == (2, count, 2, 8, 12) and filled.steps.shape[:2] == (2, count)
        if method == "mae":
            assert torch.equal(filled.samples[:, 0], reconstruct(model, x, hole, torch.float32))


def test_a_hole_that_touches_every_patch_is_refused():
    hole = torch.zeros(1, 1, 8, 12)
    hole[..., ::2] = 1
    with pytest.raises(UserError, match="touches every 4x4 patch of a picture"):
        reconstruct(UMD(CONFIG), torch.zeros(1, 2, 8, 12), hole, torch.float32)
