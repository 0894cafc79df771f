"""Between model tensors and pictures: nothing is lost, nothing wraps around."""

import numpy as np
import torch
from PIL import Image

from umd.images import from_uint8, grid, save_png, to_uint8


def test_every_value_comes_back():
    pictures = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    x = from_uint8(pictures)
    assert x.shape == (1, 3, 16, 16) and x.dtype == torch.float32
    assert x.min() == -1 and x.max() == 1
    assert np.array_equal(to_uint8(x), pictures)


def test_the_ends_are_clipped_and_the_middle_is_rounded():
    x = torch.tensor([-7.0, -1, 0, 1, 7, 1 - 1.1 / 127.5])
    assert to_uint8(x.view(1, 1, 1, 6)).ravel().tolist() == [0, 0, 128, 255, 255, 254]


def test_channels_and_places_are_kept():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (2, 3, 5, 3), dtype=np.uint8)
    x = from_uint8(pictures[:, ::-1])  # negative strides are no trouble
    assert x.shape == (2, 3, 3, 5)
    torch.testing.assert_close(x[1, 2, 0, 4].item(), int(pictures[1, 2, 4, 2]) / 127.5 - 1, rtol=0, atol=1e-6)
    assert np.array_equal(to_uint8(x), pictures[:, ::-1])


def test_a_grid_goes_row_by_row_on_white():
    pictures = np.stack([np.full((4, 6, 3), value, np.uint8) for value in (10, 20, 30)])
    sheet = grid(pictures, columns=2, pad=1)
    assert sheet.shape == (2 * 5 + 1, 2 * 7 + 1, 3) and sheet.dtype == np.uint8
    assert (sheet[1:5, 1:7] == 10).all() and (sheet[1:5, 8:14] == 20).all() and (sheet[6:10, 1:7] == 30).all()
    assert (sheet[6:10, 8:14] == 255).all()  # the place left empty
    assert (sheet[0] == 255).all() and (sheet[:, 7] == 255).all()


def test_grey_pictures_in_a_grid():
    sheet = grid(np.full((1, 2, 2, 1), 7, np.uint8), columns=1, pad=0)
    assert sheet.shape == (2, 2, 3) and (sheet == 7).all()


def test_a_png_has_each_pixel_so_many_times(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    path = save_png(picture, tmp_path / "new" / "folder" / "a.png", scale=5)
    read = np.asarray(Image.open(path))
    assert read.shape == (15, 20, 3)
    assert np.array_equal(read[::5, ::5], picture) and np.array_equal(read[4::5, 4::5], picture)
