"""Pictures of what a model does: reconstructions of masked images, predictions from noise."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from umd import ops
from umd.conditions import make_conditions
from umd.device import autocast
from umd.diffmae import DiffMAE, fill, pixel_mask
from umd.images import grid, to_uint8
from umd.masking import random_ids_keep
from umd.methods import AnyModel, AnyObjective
from umd.model import UMD
from umd.objective import DiffMAEObjective, Objective
from umd.report import masked_view
from umd.sampler import ddim_sample, model_times
from umd.train.data import DataConfig, center_view, open_dataset
from umd.train.latents import tokenizer_of
from umd.train.run import RunConfig

PREVIEW_IMAGES = 8

Triplet = tuple[np.ndarray, np.ndarray, np.ndarray]  # masked input, reconstruction, original: uint8 [H, W, 3]


@torch.no_grad()
def reconstructions(
    model: UMD, objective: Objective, x_start: Tensor, timestep: int, seed: int = 0, dtype: torch.dtype = torch.float32,
    show: Callable[[Tensor], np.ndarray] | None = None,
) -> list[Triplet]:  # fmt: skip
    """Hide patches of images [B, C, H, W], at model time `timestep` (0: noise-free), and let the model predict x̂0.

    Where patches are visible the model predicts no pixels: noise-free ones are shown as they are, of noised ones the
    predicted noise is taken out. show: see `picture_maker`; default `rgb`.
    """
    show = show or rgb
    B, P = len(x_start), model.config.patch_size
    noised = timestep > 0
    keep = (objective.keep_noised if noised else objective.keep_clean,) * B
    generator = torch.Generator(x_start.device).manual_seed(seed)
    c = objective.corruption(
        timesteps=torch.full((B if noised else 0,), timestep, device=x_start.device),
        ids_keep=random_ids_keep(keep, model.config.num_patches, generator),
        noise=torch.randint(2**62, (B if noised else 0,), generator=generator, device=x_start.device),
        clean=0 if noised else B,
    )
    with autocast(x_start.device, dtype):
        prediction = model(objective.visible_patches(x_start, c), c.ids_keep, c.layout, c.timesteps)
    predicted, predicted_eps = model.to_images(prediction.float())
    mask = torch.ones(B * model.config.num_patches, device=x_start.device).index_fill(0, c.ids_keep, 0)
    mask = mask.view(B, -1)  # 0 keep, 1 remove
    pixels = mask.view(B, 1, *model.config.grid_size).repeat_interleave(P, 2).repeat_interleave(P, 3).bool()
    seen = visible = x_start
    if noised:
        alpha, sigma = objective.schedule.coefficients(c.timesteps, dtype=x_start.dtype)
        eps = ops.philox_randn_samples(c.noise, x_start.shape[1:], x_start.dtype)
        seen = alpha.view(-1, 1, 1, 1) * x_start + sigma.view(-1, 1, 1, 1) * eps
        visible = objective.schedule.xstart_from_eps(seen, c.timesteps, predicted_eps)
    predicted = torch.where(pixels, predicted, visible)
    shown, hidden = show(seen), mask.view(B, *model.config.grid_size).bool().cpu().numpy()
    side = P * shown.shape[1] // x_start.shape[2]  # of a patch in the picture
    return [
        (masked_view(s, m, side), p, o)
        for s, m, p, o in zip(shown, hidden, show(predicted), show(x_start), strict=True)
    ]


def filled_sheets(
    model: DiffMAE, objective: DiffMAEObjective, x: Tensor, dtype: torch.dtype, show: Callable[[Tensor], np.ndarray],
    clip: bool,
) -> dict[str, np.ndarray]:  # fmt: skip
    """A sheet of held-out pictures in four rows: masked, the first call's x̂0 (an MAE's answer), a sample, original.

    Of clips the middle frame is shown. Empty where the model predicts other things than pixels.
    """
    if objective.config.target != "pixels":
        return {}
    config, first = model.config, []
    ids = objective.corrupt(len(x), 0, x.device).ids_masked
    mask = torch.zeros(len(x) * config.num_patches, device=x.device).index_fill(0, ids, 1).view(len(x), -1)
    hole = pixel_mask(mask, config)
    filled = fill(
        model, x, hole, objective.schedule, num_steps=25, clip=clip, dtype=dtype, capture="off",
        callback=lambda i, n, x_t, x_start: first.append(x_start.view(x.shape)) if i == 0 else None,
    )  # fmt: skip
    rows = (torch.where(hole.bool(), torch.zeros_like(x), x), first[0], filled[:, 0], x)
    pictures = [show(row if row.ndim == 4 else row[:, :, row.shape[2] // 2]) for row in rows]
    return {"filling": grid(np.concatenate(pictures), columns=len(x))}


def picture_maker(config: DataConfig, device: torch.device) -> Callable[[Tensor], np.ndarray]:
    """What makes pictures uint8 [B, H', W', 3] of a run's tensors [B, C, H, W]: `rgb`, or its VAE's decoder.

    Raises UserError if the run is on latents and its VAE is not to be had, or is another.
    """
    tokenizer = tokenizer_of(config, device)
    return rgb if tokenizer is None else lambda z: to_uint8(tokenizer.decode(z))


def rgb(x: Tensor) -> np.ndarray:
    """[B, C, H, W] in [-1, 1] to uint8 [B, H, W, 3]; of other than 3 channels the first is shown as grey."""
    x = x if x.shape[1] == 3 else x[:, :1].expand(-1, 3, -1, -1)
    return to_uint8(x)


def preview_images(config: RunConfig, device: torch.device) -> Tensor:
    """A few held-out images (of the training split where nothing is held out): [n, C, H, W]."""
    dataset = open_dataset(config.data, "test")
    if len(dataset) == 0:
        dataset = open_dataset(config.data, "train")
    chosen = np.linspace(0, len(dataset) - 1, min(PREVIEW_IMAGES, len(dataset))).astype(int)
    return center_view(dataset, chosen, config.data).to(device)


def previews(
    model: AnyModel, objective: AnyObjective, x: Tensor, dtype: torch.dtype, show: Callable[[Tensor], np.ndarray],
    clip: bool,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Sheets by name: masked input, reconstruction and original in three rows; with labels, a sample of each class."""
    if isinstance(model, DiffMAE) and isinstance(objective, DiffMAEObjective):
        return filled_sheets(model, objective, x, dtype, show, clip)
    assert isinstance(model, UMD) and isinstance(objective, Objective), "a classifier shows scores instead"
    sheets = {}
    T, r0 = objective.schedule.num_steps, objective.config.no_noise_prob
    trained = ({"reconstruction": 0} if r0 > 0 else {}) | ({"denoising": T // 4} if r0 < 1 else {})
    for label, timestep in trained.items():
        triplets = reconstructions(model, objective, x, timestep, dtype=dtype, show=show)
        sheets[label] = grid(
            np.stack([picture for row in zip(*triplets, strict=True) for picture in row]), len(triplets)
        )
    if classes := model.config.num_classes:
        labels = torch.arange(min(classes, 16), device=x.device)
        conditions = make_conditions(model, model_times(25, T), labels)

        def denoise(x_t: Tensor, t: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
            with autocast(x_t.device, dtype):
                return model.denoise(x_t, t, y, conditions)

        with torch.no_grad():
            samples = ddim_sample(
                denoise, (len(labels), *x.shape[1:]), objective.schedule, num_steps=25, labels=labels,
                null_label=classes, cfg_scale=2.0, clip=clip, device=x.device,
                capture="off",  # a picture is not worth a recording that might fail and end the run
            )  # fmt: skip
        sheets["samples"] = grid(show(samples), columns=8)
    return sheets
