"""Pictures of a model's work: reconstructions of masked images, predictions from noise, samples."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from umd import ops
from umd.conditions import denoiser
from umd.diffmae import DiffMAE, fill, pixel_mask
from umd.images import grid, masked_view, to_uint8
from umd.machine.device import autocast
from umd.masking import random_ids_keep
from umd.methods import AnyModel, AnyObjective
from umd.model import UMD
from umd.objective import DiffMAEObjective, Objective
from umd.peers import mae_pixels
from umd.sampler import ddim_sample, model_times
from umd.train.data import center_view, evenly, open_held_out_or_train
from umd.train.latents import tokenizer_of
from umd.train.run import RunConfig
from umd.train.settings import DataConfig

PREVIEW_IMAGES = 8
MOST_CLASSES = 16  # most classes for which samples are shown

Rows = dict[str, list[np.ndarray]]  # name of a sheet -> its rows of pictures, uint8 [n, H, W, 3]
Triplet = tuple[np.ndarray, np.ndarray, np.ndarray]  # masked input, reconstruction, original: uint8 [H, W, 3]


@torch.no_grad()
def reconstructions(
    model: UMD, objective: Objective, x_start: Tensor, timestep: int, seed: int = 0, dtype: torch.dtype = torch.float32,
    show: Callable[[Tensor], np.ndarray] | None = None, share: slice = slice(None),
) -> list[Triplet]:  # fmt: skip
    """Mask patches of images x_start [B, C, H, W] at `timestep` (0: noise-free), and predict x̂0.

    The model predicts no pixels of visible patches. Noise-free visible patches are shown as they are. Of noised ones,
    the predicted noise is removed.

    show: makes pictures, see `picture_maker`; default `rgb`.
    share: images to use; their masks and noise do not depend on it.
    """
    show = show or rgb
    noised, device, P = timestep > 0, x_start.device, model.config.patch_size
    keep, L = objective.keep_noised if noised else objective.keep_clean, model.config.num_patches
    generator = torch.Generator(device).manual_seed(seed)
    ids_keep = random_ids_keep((keep,) * len(x_start), L, generator).view(-1, keep) % L
    noise = torch.randint(2**62, (len(x_start),), generator=generator, device=device)[share]
    x_start, ids_keep = x_start[share], ids_keep[share]
    B = len(x_start)
    c = objective.corruption(
        timesteps=torch.full((B if noised else 0,), timestep, device=device),
        ids_keep=(ids_keep + L * torch.arange(B, device=device)[:, None]).flatten(),
        noise=noise if noised else noise[:0],
        clean=0 if noised else B,
    )
    with autocast(x_start.device, dtype):
        prediction = model(objective.visible_patches(x_start, c), c.ids_keep, c.layout, c.timesteps)
    predicted, *rest = model.to_images(prediction.float())
    if model.config.outputs == "x_start":
        predicted = in_pixels(predicted, x_start, model, objective)
    mask = torch.ones(B * model.config.num_patches, device=x_start.device).index_fill(0, c.ids_keep, 0)
    mask = mask.view(B, -1)  # 0 keep, 1 remove
    pixels = mask.view(B, 1, *model.config.grid_size).repeat_interleave(P, 2).repeat_interleave(P, 3).bool()
    seen = visible = x_start
    if noised:
        alpha, sigma = objective.schedule.coefficients(c.timesteps, dtype=x_start.dtype)
        eps = ops.philox_randn_samples(c.noise, x_start.shape[1:], x_start.dtype)
        seen = alpha.view(-1, 1, 1, 1) * x_start + sigma.view(-1, 1, 1, 1) * eps
        visible = objective.schedule.xstart_from_eps(seen, c.timesteps, rest[0])
    predicted = torch.where(pixels, predicted, visible)
    shown, hidden = show(seen), mask.view(B, *model.config.grid_size).bool().cpu().numpy()
    side = P * shown.shape[1] // x_start.shape[2]  # pixels per patch in the picture
    return [
        (masked_view(s, m, side), p, o)
        for s, m, p, o in zip(shown, hidden, show(predicted), show(x_start), strict=True)
    ]


def in_pixels(predicted: Tensor, x_start: Tensor, model: UMD, objective: Objective) -> Tensor:
    """The prediction of an MAE as images in -1..1, with norm_pix by the moments of the true patches.

    predicted, x_start: [B, C, H, W].
    """
    P = model.config.patch_size
    found = mae_pixels(ops.patchify(predicted, P), ops.patchify(x_start, P), model.config, objective.config)
    return ops.unpatchify(found, model.config.image_size, P)


@torch.no_grad()
def denoisings(
    model: UMD, objective: Objective, x_start: Tensor, timestep: int, seed: int = 0, dtype: torch.dtype = torch.float32,
    show: Callable[[Tensor], np.ndarray] | None = None, share: slice = slice(None),
) -> list[Triplet]:  # fmt: skip
    """As `reconstructions`, but without masking, for a network that only denoises (DiT, MaskDiT)."""
    show, device = show or rgb, x_start.device
    noise = torch.randint(2**62, (len(x_start),), generator=torch.Generator(device).manual_seed(seed), device=device)
    x_start = x_start[share]
    t = torch.full((len(x_start),), timestep, device=device)
    x_t = objective.schedule.q_sample(x_start, t, ops.standard_noise(noise[share], x_start))
    with autocast(device, dtype):
        _, eps, *_ = model.denoise(x_t, t)
    return list(zip(*map(show, (x_t, objective.schedule.xstart_from_eps(x_t, t, eps), x_start)), strict=True))


def filled_rows(
    model: DiffMAE, objective: DiffMAEObjective, x: Tensor, dtype: torch.dtype, show: Callable[[Tensor], np.ndarray],
    clip: bool, share: slice,
) -> Rows:  # fmt: skip
    """A sheet of DiffMAE fillings in four rows: masked, first call's x̂0 (as an MAE would fill), sample, original.

    Of clips, the middle frame is shown. {} if the model does not predict pixels.
    """
    if objective.config.target != "pixels":
        return {}
    config, first = model.config, []
    ids = objective.corrupt(len(x), 0, x.device).ids_masked
    mask = torch.zeros(len(x) * config.num_patches, device=x.device).index_fill(0, ids, 1).view(len(x), -1)
    hole, x = pixel_mask(mask[share], config), x[share]
    filled = fill(
        model, x, hole, objective.schedule, num_steps=25, clip=clip, dtype=dtype, capture="off",
        first_sample=share.start or 0,
        callback=lambda i, n, x_t, x_start: first.append(x_start.view(x.shape)) if i == 0 else None,
    )  # fmt: skip
    rows = (torch.where(hole.bool(), torch.zeros_like(x), x), first[0], filled[:, 0], x)
    return {"filling": [show(row if row.ndim == 4 else row[:, :, row.shape[2] // 2]) for row in rows]}


def picture_maker(config: DataConfig, device: torch.device) -> Callable[[Tensor], np.ndarray]:
    """A function from a run's tensors [B, C, H, W] to pictures, uint8 [B, H', W', 3]: `rgb`, or its VAE's decoder.

    Raises UserError if the run is on latents and its VAE is missing or not the run's.
    """
    tokenizer = tokenizer_of(config, device)
    return rgb if tokenizer is None else lambda z: to_uint8(tokenizer.decode(z))


def rgb(x: Tensor) -> np.ndarray:
    """Convert [B, C, H, W] in [-1, 1] to uint8 [B, H, W, 3]. If C is not 3, show the first channel as grey."""
    x = x if x.shape[1] == 3 else x[:, :1].expand(-1, 3, -1, -1)
    return to_uint8(x)


def preview_images(config: RunConfig, device: torch.device) -> Tensor:
    """Read a few held-out images, or training images if none are held out: [n, C, H, W]."""
    dataset = open_held_out_or_train(config.data)
    return center_view(dataset, evenly(len(dataset), PREVIEW_IMAGES), config.data).to(device)


def preview_rows(
    model: AnyModel, objective: AnyObjective, x: Tensor, dtype: torch.dtype, show: Callable[[Tensor], np.ndarray],
    clip: bool, rank: int = 0, size: int = 1,
) -> Rows:  # fmt: skip
    """One rank's share of the sheets, by name. The rows of all ranks side by side make the sheets of one process.

    - Masked input, reconstruction and original, as three rows of pictures.
    - With labels: a sample of each class.
    """
    rows: Rows = {}
    share = share_of(len(x), rank, size)
    if isinstance(model, DiffMAE) and isinstance(objective, DiffMAEObjective):
        return filled_rows(model, objective, x, dtype, show, clip, share) if share.start < share.stop else rows
    assert isinstance(model, UMD) and isinstance(objective, Objective), "a classifier shows scores instead"
    T, r0 = objective.schedule.num_steps, objective.config.no_noise_prob
    trained = ({"reconstruction": 0} if r0 > 0 else {}) | ({"denoising": T // 4} if r0 < 1 else {})
    draw = reconstructions if model.config.outputs in ("x_start_eps", "x_start") else denoisings
    for label, timestep in trained.items() if share.start < share.stop else ():
        triplets = draw(model, objective, x, timestep, dtype=dtype, show=show, share=share)
        rows[label] = [np.stack(row) for row in zip(*triplets, strict=True)]
    classes = model.config.num_classes
    share = share_of(min(classes, MOST_CLASSES), rank, size)
    if share.start < share.stop:
        labels = torch.arange(share.start, share.stop, device=x.device)
        samples = ddim_sample(
            denoiser(model, dtype, model_times(25, T), labels), (len(labels), *x.shape[1:]), objective.schedule,
            num_steps=25, labels=labels, null_label=classes, cfg_scale=2.0, clip=clip, first_sample=share.start,
            device=x.device, capture="off",  # a failed recording would end the run
        )  # fmt: skip
        rows["samples"] = [show(samples)]
    return rows


def share_of(count: int, rank: int, size: int) -> slice:
    """A rank's contiguous share of `count` items. May be empty if there are more ranks than items."""
    return slice(count * rank // size, count * (rank + 1) // size)


def has_share(rank: int, size: int, pictures: int, classes: int) -> bool:
    """Whether a rank has a share of `pictures` held-out pictures or of one sample for each of `classes`."""
    shares = (share_of(count, rank, size) for count in (pictures, min(classes, MOST_CLASSES)))
    return any(share.start < share.stop for share in shares)


def sheets(of_ranks: Sequence[Rows]) -> dict[str, np.ndarray]:
    """Join the ranks' rows side by side to sheets, uint8 [H', W', 3]."""
    found = {}
    for name in dict.fromkeys(name for rows in of_ranks for name in rows):
        parts = [rows[name] for rows in of_ranks if name in rows]
        whole = [np.concatenate(row) for row in zip(*parts, strict=True)]
        found[name] = grid(np.concatenate(whole), columns=8 if name == "samples" else len(whole[0]))
    return found
