"""An MAE's filling of a hole."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from umd.config import OBJECTIVES, ModelConfig
from umd.errors import UserError
from umd.masking import layout
from umd.model import UMD
from umd.ops import patchify
from umd.train.inpaint import fill_with, hole_mask, reconstruct
from umd.train.options import Inpaint
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


def test_a_mask_of_the_photo_is_cut_and_resized_with_it(tmp_path):
    """A photo 16 high and 24 wide is seen by its middle 16x16 at half the size: columns 4 to 20."""
    Image.new("RGB", (24, 16)).save(tmp_path / "photo.png")
    drawn = np.zeros((16, 24), np.uint8)
    drawn[:6, :12] = 255
    Image.fromarray(drawn).save(tmp_path / "mask.png")
    x, expected = torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8)
    expected[..., :3, :4] = 1
    assert torch.equal(hole_mask(str(tmp_path / "mask.png"), x, 2, photos=[tmp_path / "photo.png"]), expected)
    with pytest.raises(UserError, match="is 16x24; this model's pictures are 8x8"):
        hole_mask(str(tmp_path / "mask.png"), x, 2)
    turned = Image.new("RGB", (16, 24))
    turned.getexif()[0x0112] = 6  # stored on its side: 16 high and 24 wide as it is shown
    turned.save(tmp_path / "turned.jpg", exif=turned.getexif())
    assert torch.equal(hole_mask(str(tmp_path / "mask.png"), x, 2, photos=[tmp_path / "turned.jpg"]), expected)
    Image.new("RGB", (24, 17)).save(tmp_path / "other.png")
    with pytest.raises(UserError, match="is 16x24; give it the size of .*other.png, 17x24"):
        hole_mask(str(tmp_path / "mask.png"), x, 2, photos=[tmp_path / "photo.png", tmp_path / "other.png"])
