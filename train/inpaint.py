"""Inpainting with a trained network: which pictures, which hole, and the rows of the picture sheet."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from umd.errors import UserError
from umd.model import UMD
from umd.sampler import inpaint
from umd.schedule import NoiseSchedule
from umd.train.data import center_view, centered_view_of_file, open_dataset
from umd.train.evaluate import denoiser, sampling_progress
from umd.train.preview import rgb
from umd.train.run import RunConfig

DEFAULT_IMAGES = 6


@dataclass(frozen=True)
class Inpaint:
    """Fill a hole in images with a run: a PNG grid of masked input, samples and original."""

    image: tuple[Path, ...] = ()
    """Picture files; default: held-out images of the run's data."""
    mask: str = "center"
    """center, left, random (patches), or a PNG: white is filled, black is kept."""
    samples: int = 3
    """Samples an image."""
    steps: int = 50
    """Denoising steps."""
    resample: int = 2
    """Times each step is repeated to harmonise hole and surroundings (RePaint)."""
    seed: int = 0
    """Of noise and random masks."""
    out: Path | None = None
    """Where the PNG goes; default: RUN/inpainting.png."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"samples must be at least 1, got {self.samples}")


def pictures_and_mask(config: RunConfig, images: tuple[Path, ...], mask: str, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures [B, C, H, W] (held-out ones if none are named) and the hole [B, 1, H, W]: 0 keep, 1 remove."""
    if images:
        x = torch.cat([centered_view_of_file(path, config.data) for path in images])
    else:
        dataset = open_dataset(config.data, "test")
        if len(dataset) == 0:
            raise UserError(f"{dataset.name} has no held-out images to inpaint; name pictures with --image")
        x = center_view(dataset, np.linspace(0, len(dataset) - 1, DEFAULT_IMAGES).astype(int), config.data)
    return x, hole_mask(mask, x, config.model.patch_size, seed)


def hole_mask(mask: str, x: Tensor, patch_size: int, seed: int = 0) -> Tensor:
    """The hole [B, 1, H, W], 1 where pixels are removed: `center`, `left`, `random` patches, or a PNG's white part."""
    B, _, H, W = x.shape
    hole = torch.zeros(B, 1, H, W)
    if mask == "center":
        hole[:, :, H // 4 : H - H // 4, W // 4 : W - W // 4] = 1
    elif mask == "left":
        hole[..., : W // 2] = 1
    elif mask == "random":
        noise = torch.rand(B, 1, H // patch_size, W // patch_size, generator=torch.Generator().manual_seed(seed))
        hole = (noise < 0.5).float().repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
    else:
        try:
            drawn = np.asarray(Image.open(mask).convert("L"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"mask {mask!r} cannot be read; expected center, left, random, or a black and white PNG"
            ) from error
        if drawn.shape != (H, W):
            raise UserError(f"mask {mask!r} is {drawn.shape[0]}x{drawn.shape[1]}; this model's pictures are {H}x{W}")
        hole[:] = torch.from_numpy(drawn > 127)
        if hole.min() == hole.max():
            raise UserError(
                f"mask {mask!r} hides {'everything' if hole.max() else 'nothing'}; white is filled, black is kept"
            )
    return hole


def inpainting_rows(
    model: UMD, schedule: NoiseSchedule, x: Tensor, hole: Tensor, *, samples: int, num_steps: int, resample: int,
    seed: int, dtype: torch.dtype, console: Console | None = None, show: Callable[[Tensor], np.ndarray] = rgb,
    clip: bool = True,
) -> list[list[np.ndarray]]:  # fmt: skip
    """For each picture the views masked, `samples` fillings, original; each uint8 [H, W, 3].

    show: makes pictures of tensors; clip: as for `inpaint`, off for latents.
    """
    columns = [show(torch.where(hole.bool(), torch.zeros_like(x), x))]
    for i in range(samples):
        with sampling_progress(console, f"filling {i + 1} of {samples}") as callback, torch.no_grad():
            filled = inpaint(
                denoiser(model, dtype), x, hole, schedule, num_steps=num_steps, resample=resample, seed=seed + i,
                clip=clip, callback=callback,
            )  # fmt: skip
        columns.append(show(filled))
    columns.append(show(x))
    return [list(row) for row in zip(*columns, strict=True)]
