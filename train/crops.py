"""Crops of a picture: choose a random or center box, and resample it to the model's image size."""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from umd.train.clips import take_frames
from umd.train.decoding import Picture, flatten, pixels

if TYPE_CHECKING:
    from umd.train.settings import DataConfig

ASPECT_MIN, ASPECT_MAX = 3 / 4, 4 / 3  # aspect ratio of the crop, as in the Inception papers
LOG_ASPECT = math.log(ASPECT_MIN), math.log(ASPECT_MAX)
CROP_TRIES = 10
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


def crop_box(rng: np.random.Generator, height: int, width: int, config: "DataConfig") -> Box:
    """Draw the Inception crop: a random fraction of the area, with a random aspect ratio around that of `image_size`.

    If `CROP_TRIES` draws do not fit into the picture, take the largest centered box with an allowed aspect ratio.
    """
    target = config.image_size[1] / config.image_size[0]
    uniform = iter(rng.random(2 * CROP_TRIES + 2).tolist())  # drawn at once, as a call costs more than a crop
    for _ in range(CROP_TRIES):
        area = height * width * (config.area_min + (config.area_max - config.area_min) * next(uniform))
        aspect = target * math.exp(LOG_ASPECT[0] + (LOG_ASPECT[1] - LOG_ASPECT[0]) * next(uniform))
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            left, top = (width - w) * next(uniform), (height - h) * next(uniform)
            return left, top, min(left + w, width), min(top + h, height)
    return centered_box(height, width, min(max(width / height, target * ASPECT_MIN), target * ASPECT_MAX))


def centered_box(height: int, width: int, aspect: float, zoom: float = 1.0) -> Box:
    """The largest centered box with aspect ratio `aspect` (width / height), its sides divided by `zoom`."""
    w, h = min(width, height * aspect) / zoom, min(height, width / aspect) / zoom
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def resized(picture: Picture, box: Box, config: "DataConfig") -> np.ndarray:
    """Resample `box` of a picture, or of each frame of a clip, without aliasing: uint8 [H, W, C] or [F, H, W, C]."""
    if picture.pixels.ndim == 4:
        return np.stack([resized(picture._replace(pixels=frame), box, config) for frame in picture.pixels])
    array, (down, across) = picture.pixels, picture.scale
    image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    image = flatten(image)
    if image.mode != (mode := "L" if config.channels == 1 else "RGB"):
        image = image.convert(mode)
    height, width = config.image_size
    left, top, right, bottom = box
    box = (left * across, top * down, min(right * across, image.width), min(bottom * down, image.height))
    return pixels(image.resize((width, height), Image.Resampling.BICUBIC, box=box))


def shrink_for(box: Box, config: "DataConfig") -> int:
    """Largest factor (1, 2, 4, 8) by which a JPEG may be decoded smaller so that `box` keeps the model's resolution."""
    left, top, right, bottom = box
    most = min((bottom - top) / config.image_size[0], (right - left) / config.image_size[1])
    return max(factor for factor in (1, 2, 4, 8) if factor <= max(1, most))


def draw_view(rng: np.random.Generator, height: int, width: int, config: "DataConfig") -> tuple[Box, bool]:
    """Draw the crop box of a picture, and whether to mirror it."""
    mirrored = config.hflip and rng.random() < 0.5
    return crop_box(rng, height, width, config), mirrored


def train_view(picture: Picture, rng: np.random.Generator, config: "DataConfig") -> np.ndarray:
    """A random crop, mirrored with probability 1/2 if `hflip`: uint8 [H, W, C]. A clip: [F, H, W, C]."""
    if picture.pixels.ndim == 4:
        frames = take_frames(picture.pixels, config.num_frames, config.frame_stride, rng)
        picture = picture._replace(pixels=frames)
    box, mirrored = draw_view(rng, *picture.size, config)
    view = resized(picture, box, config)
    return view[..., ::-1, :] if mirrored else view


def view_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator that draws the crop of one picture in one epoch."""
    return np.random.default_rng((seed, epoch, 1 + index))


def centered(picture: Picture, config: "DataConfig", zoom: float = 1.0) -> np.ndarray:
    """The center crop of a picture, resampled to `image_size`: uint8 [H, W, C]. For a clip, of its middle frames."""
    if picture.pixels.ndim == 4:
        picture = picture._replace(pixels=take_frames(picture.pixels, config.num_frames, config.frame_stride))
    box = centered_box(*picture.size, config.image_size[1] / config.image_size[0], zoom)
    return resized(picture, box, config)


def crop_batch(pictures: Tensor, boxes: Tensor, mirrored: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop each picture and resample it as `resized` does, by two products with matrices of bicubic weights.

    Args:
        pictures: uint8 [B, h, w, C].
        boxes: fp32 [B, 4], left, top, right, bottom in pixels.
        mirrored: bool [B].
        size: H, W.

    Returns fp32 [B, C, H, W] in [-1, 1], rounded to 256 levels, on the device of the pictures. `resized` rounds and
    clips after each direction, so some values differ by a level, or by more where a sharp edge overshoots.
    """
    down = bicubic_weights(boxes[:, 1], boxes[:, 3], size[0], pictures.shape[1])  # [B, H, h]
    across = bicubic_weights(boxes[:, 0], boxes[:, 2], size[1], pictures.shape[2])  # [B, W, w]
    across = torch.where(mirrored[:, None, None], across.flip(1), across)
    x = pictures.movedim(-1, 1).float()  # [B, C, h, w]
    return (down[:, None] @ (x @ across.mT[:, None])).round_().clamp_(0, 255).div_(127.5).sub_(1)


def bicubic_weights(start: Tensor, end: Tensor, size: int, length: int) -> Tensor:
    """Weights of `length` input pixels for each of `size` output pixels over start..end: fp32 [B, size, length].

    Keys' bicubic kernel (a = -1/2), widened for downsampling so that it averages pixels, as in Pillow's BICUBIC.
    """
    scale = ((end - start) / size)[:, None, None]  # [B, 1, 1]
    center = start[:, None, None] + (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    x = ((torch.arange(length, device=start.device) + 0.5 - center) / scale.clamp(min=1)).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return weights / weights.sum(-1, keepdim=True)
