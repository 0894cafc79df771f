"""Prediction errors of a network at several timesteps, with the same pictures, noise and masks for every network.

    eps      mean (ε̂ - ε)² over all values, nothing masked
    x_start  mean (x̂0 - x0)², nothing masked; if the network predicts only ε, x̂0 follows from ε̂
    hidden   mean (x̂0 - x0)² over masked patches; mask ratio: mask_ratio_no_noise at t = 0, else mask_ratio

The network gets no labels (null class).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from umd import ops
from umd.machine.device import autocast
from umd.masking import ids_keep_from_noise
from umd.methods import build_objective
from umd.model import UMD
from umd.objective import Objective
from umd.ops import philox_randn_rows
from umd.peers import mae_pixels, mae_target
from umd.schedule import schedule_of
from umd.train.data import evenly, open_held_out_or_train
from umd.train.features import Extract, Features, identity_of, name_of, pictures_of
from umd.train.opened import open_run
from umd.train.options import Evaluate
from umd.train.run import RunConfig
from umd.train.shards import Job
from umd.train.weights import weights_identity

NAMES = {"eps": "ε̂", "x_start": "x̂0", "hidden": "x̂0 of hidden patches"}


def error_times(T: int) -> list[int]:
    """Timesteps of the curves: 0, 1, T/20 and all multiples of T/10."""
    return sorted({0, 1, max(1, T // 20), *(max(1, T * k // 10) for k in range(1, 11))})


class Errors:
    """Errors of a run on up to `options.errors` held-out pictures, or training pictures if none are held out."""

    def __init__(self, config: RunConfig, options: Evaluate):
        self.dataset = open_held_out_or_train(config.data)
        weights = weights_identity(config.out, options.ema, options.step)
        model, self.device, self.dtype = open_run(config, options.ema, weights["step"])
        assert isinstance(model, UMD), "`reasons` leaves the others out"
        self.config, self.model = config, model
        schedule = schedule_of(config.schedule)
        objective = build_objective(model.config, config.objective, schedule)
        assert isinstance(objective, Objective), "a UMD's"
        self.objective, self.times = objective, error_times(schedule.num_steps)
        ids = evenly(len(self.dataset), options.errors)
        recipe = {
            "weights": weights, "errors": 1, "times": self.times, "data": identity_of(self.dataset, ids),
            "mask_ratios": [objective.config.mask_ratio_no_noise, objective.config.mask_ratio],
            "precision": "bf16" if self.dtype == torch.bfloat16 else "fp32", "device": self.device.type,
        }  # fmt: skip
        self.features = Features((options.out or config.out) / "features", recipe, ids)

    def jobs(self) -> list[Job]:
        return self.features.jobs(pictures_of(self.dataset, self.config.data), self.extract())

    def extract(self) -> Extract:
        return lambda x, ids: picture_errors(self.model, self.objective, x.to(self.device), ids, self.times, self.dtype)

    def entry(self) -> dict[str, Any]:
        """{key, settings, times, pictures, curves: {name: {mean, se}}}. None where a curve has no value at a time.

        A curve without any value is left out.
        """
        curves = {}
        for name in NAMES:
            values = self.features.read(name).double().numpy()  # [n, times]; -1 in a file is a missing value
            mean = np.where((values < 0).any(0), np.nan, values.mean(0))
            if np.isfinite(mean).any():
                se = values.std(0, ddof=min(1, len(values) - 1)) / len(values) ** 0.5
                both = {"mean": mean, "se": np.where(np.isfinite(mean), se, np.nan)}
                curves[name] = {what: list(map(number, row)) for what, row in both.items()}
        settings = self.features.settings
        return {
            "key": name_of(settings), "settings": settings, "times": self.times,
            "pictures": len(self.features.ids), "curves": curves,
        }  # fmt: skip


def number(value: float) -> float | None:
    """Round to six digits. None for NaN, which JSON lacks."""
    return float(f"{value:.6g}") if np.isfinite(value) else None


@torch.no_grad()
def picture_errors(
    model: UMD, objective: Objective, x: Tensor, ids: Tensor, times: list[int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Errors of each picture x [B, C, H, W], as {name: [B, times]}. -1: no value.

    ids: int64 [B], indices of the pictures. Noise and masks are functions of them.
    """
    config, schedule = model.config, objective.schedule
    rows = ids.to(x.device) << 32
    seeds = torch.arange(2, device=x.device)
    eps = philox_randn_rows(seeds[0], rows, tuple(x.shape[1:]), x.dtype)
    order = philox_randn_rows(seeds[1], rows, (config.num_patches,), torch.float32)  # [B, L]
    found = {name: x.new_full((len(x), len(times)), -1.0) for name in NAMES}
    two_heads, fills = config.outputs == "x_start_eps", config.outputs in ("x_start_eps", "x_start")
    for i, time in enumerate(times):
        t = torch.full((len(x),), time, device=x.device)
        if time and config.outputs != "x_start":
            x_t = schedule.q_sample(x, t, eps)
            with autocast(x.device, dtype):
                x_start, predicted, *_ = model.denoise(x_t, t)
            x_start = x_start if two_heads else schedule.xstart_from_eps(x_t, t, predicted)
            found["eps"][:, i] = ((predicted - eps) ** 2).flatten(1).mean(1)
            found["x_start"][:, i] = ((x_start - x) ** 2).flatten(1).mean(1)
        keep = objective.keep_noised if time else objective.keep_clean
        trained = objective.config.no_noise_prob < 1 if time else objective.config.no_noise_prob > 0
        if fills and trained and keep < config.num_patches:
            found["hidden"][:, i] = hidden_error(model, objective, x, eps, order, t, keep, dtype)
    return found


def hidden_error(
    model: UMD, objective: Objective, x: Tensor, eps: Tensor, order: Tensor, t: Tensor, keep: int, dtype: torch.dtype
) -> Tensor:
    """Mean (x̂0 - x0)² of each picture over the masked patches, those after the first `keep` of its order: [B]."""
    B, L = order.shape
    noised = bool(t[0] > 0)
    ids_keep = ids_keep_from_noise(order, (keep,) * B)
    c = objective.corruption(t if noised else t[:0], ids_keep, eps if noised else eps[:0], clean=0 if noised else B)
    with autocast(x.device, dtype):
        prediction = model(objective.visible_patches(x, c), c.ids_keep, c.layout, c.timesteps)
    target = ops.patchify(x, model.config.patch_size)  # [B, L, C·P·P]
    predicted = prediction.to(target).view(B, L, -1)[..., : target.shape[-1]]
    if objective.config.norm_pix:
        target = mae_target(target, model.config, objective.config)
    else:
        predicted = mae_pixels(predicted, None, model.config, objective.config)
    hidden = torch.ones(B * L, device=x.device).index_fill(0, c.ids_keep, 0).view(B, L)
    return ((predicted - target) ** 2).mean(-1).mul(hidden).sum(1) / (L - keep)


def draw_errors(entries: list[Mapping[str, Any]], path: Path) -> None:
    """Draw the curves of the entries to a picture file."""
    from umd.report.figures import error_curves  # late: importing matplotlib takes a second

    runs = [(f"step {e['settings']['weights']['step']}", e["times"], e["curves"]) for e in entries]
    error_curves(runs, NAMES, path)
