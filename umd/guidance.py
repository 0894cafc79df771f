"""Classifier-free guidance: from a denoiser's outputs to one prediction per step, for all samplers.

A denoiser is a function

    denoise(x_t [B, C, H, W], timesteps int64 [B], labels int64 [B] or None) -> (x_start, eps)

Both outputs have x_t's shape; timesteps are model times (see `NoiseSchedule`). A denoiser with learned variances
returns a third tensor of this shape, v in [-1, 1]. It places DDPM's log variance at each pixel between its smallest
value (v = -1) and its largest (v = 1) (Nichol and Dhariwal 2021).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from umd.config import GuidanceSchedule, Prediction
from umd.errors import UserError
from umd.schedule import NoiseSchedule

Denoise = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, ...]]

# Guidance strength at t/T, with mean 1 over all times (Wang et al. 2024): weak in noise, strong near the image.
STRENGTH: dict[str, Callable[[float], float]] = {
    "constant": lambda u: 1.0,
    "linear": lambda u: 2 * (1 - u),
    "cosine": lambda u: 1 + math.cos(math.pi * u),
}


@dataclass(frozen=True)
class Guidance:
    """When and where guidance acts: uncond + s(t)·(cond - uncond) with s(t) = 1 + (cfg_scale - 1)·strength(t/T)."""

    interval: tuple[int, int] | None = None
    """First and last model time with guidance, both included; None: all times. At other times the labelled prediction
    is used alone, at half the cost (Kynkäänniemi et al. 2024)."""
    schedule: GuidanceSchedule = "constant"
    """How the strength changes with t/T: see `STRENGTH`."""
    channels: int = 0
    """Guide only so many first channels; 0: all. DiT's code guides 3 of its 4."""

    def check(self, channels: int) -> None:
        """Raise UserError if images have fewer channels than are to be guided."""
        if not 0 <= self.channels <= channels:
            raise UserError(f"cfg_channels is {self.channels}; these images have {channels} channels, 0 is all")

    def scales(self, cfg_scale: float, times: Sequence[int], T: int) -> list[float]:
        """s(t) at each of `times`; 1 means no guidance. Raises UserError for an invalid interval or schedule."""
        if self.schedule not in STRENGTH:
            raise UserError(f"unknown cfg_schedule {self.schedule!r}; expected one of {', '.join(STRENGTH)}")
        low, high = (1, T) if self.interval is None else self.interval
        if not 1 <= low <= high <= T:
            raise UserError(f"cfg_interval is {low} {high}; expected two model times, from and to, of 1 to {T}")
        if self.schedule == "constant":
            return [cfg_scale if low <= t <= high else 1.0 for t in times]
        strength = STRENGTH[self.schedule]
        return [1 + (cfg_scale - 1) * strength(t / T) if low <= t <= high else 1.0 for t in times]


class Estimate(NamedTuple):
    """The predictions for one step, in the shape of x_t [B, C, H, W]: the arguments of `ops.ddim_step`."""

    cond: Tensor  # pred_cond
    uncond: Tensor | None  # pred_uncond; None: cond is the final prediction
    from_xstart: bool  # whether the predictions are x_start; else they are ε
    variance: Tensor | None  # v, if the denoiser predicts it


class Estimator:
    """Calls a denoiser at given model times: with guidance in one call on 2B images, without it on B images.

    `guided` says for each time whether there is guidance. `tables` hold the numbers that differ from time to time, one
    row per time: the model time, int64 [n], and (guidance scale, head weight), float64 [n, 2].
    """

    def __init__(
        self, denoise: Denoise, times: Sequence[int], schedule: NoiseSchedule, *, predict: Prediction,
        labels: Tensor | None, null_label: int | None, cfg_scale: float, channels: int,
        guidance: Guidance | None = None, head_weights: Tensor | None = None,
    ):  # fmt: skip
        """Check the guidance and make the tables.

        Args:
            denoise: the denoiser.
            times: model times of the calls, in order.
            schedule: noise schedule.
            predict: the output to use: "eps", "x_start" or "both".
            labels: int64 [B] or None; read anew at each call.
            null_label: the class that stands for no label.
            cfg_scale: guidance scale s; 1: no guidance.
            channels: C.
            guidance: times and channels of guidance; default: all.
            head_weights: float [T + 1], for predict "both" (see `umd.heads`).

        Raises:
            UserError: guidance without labels or out of range, an unknown `predict`, or "both" without weights.
        """
        guidance = guidance or Guidance()
        if predict not in ("eps", "x_start", "both"):
            raise UserError(
                f"predict is {predict!r}; expected 'eps' or 'x_start', the network's two outputs, or 'both'"
            )
        if predict == "both" and head_weights is None:
            raise UserError("predict is 'both', and the weights of the two heads are not given; measure them first")
        if cfg_scale != 1 and (labels is None or null_label is None):
            raise UserError(
                f"guidance (cfg_scale={cfg_scale:g}) needs labels and a model trained with them; else use 1"
            )
        guidance.check(channels)
        scales = guidance.scales(cfg_scale, times, schedule.num_steps)
        self.denoise, self.schedule, self.predict = denoise, schedule, predict
        self.labels, self.null_label = labels, null_label
        self.channels = guidance.channels if guidance.channels < channels else 0
        self.guided = [scale != 1 for scale in scales]
        # With one scale for all times and channels, the sampler's step itself applies guidance.
        self.plain = predict != "both" and self.channels == 0 and guidance.schedule == "constant"
        weights = torch.zeros(len(times)) if head_weights is None else head_weights.cpu()[list(times)]
        self.tables = torch.tensor(times), torch.tensor([scales, weights.tolist()], dtype=torch.float64).T

    def __call__(self, guided: bool, x_t: Tensor, time: Tensor, numbers: Tensor) -> Estimate:
        """The estimate for x_t [B, C, H, W] at one time.

        guided: its entry in `guided`. time, numbers: its rows of `tables`, int64 [] and float64 [2].
        """
        B, x, labels = len(x_t), x_t, self.labels
        if guided:
            assert labels is not None and self.null_label is not None, "__init__ asks for both"
            x, labels = x_t.repeat(2, 1, 1, 1), torch.cat([labels, torch.full_like(labels, self.null_label)])
        x_start, eps, *variances = self.denoise(x, time.expand(len(x)), labels)
        variance = variances[0][:B] if variances else None
        if self.plain:
            prediction = x_start if self.predict == "x_start" else eps
            cond, uncond = (prediction[:B], prediction[B:]) if guided else (prediction, None)
            return Estimate(cond, uncond, self.predict == "x_start", variance)
        scale, weight = numbers.to(x_t)
        if self.predict != "both":
            prediction = self._guide(x_start if self.predict == "x_start" else eps, guided, x_t, scale)
            return Estimate(prediction, None, self.predict == "x_start", variance)
        a, b = self.schedule.coefficients(time[None], x_t.dtype)  # [1] each
        from_eps = (x_t - b * self._guide(eps, guided, x_t, scale)) / a
        combined = weight * self._guide(x_start, guided, x_t, scale) + (1 - weight) * from_eps
        return Estimate(combined, None, True, variance)

    def _guide(self, prediction: Tensor, guided: bool, x_t: Tensor, scale: Tensor) -> Tensor:
        """Apply guidance to a prediction, [2B, C, H, W] if `guided`, else [B, C, H, W]: [B, C, H, W]."""
        prediction = prediction.to(x_t)
        if not guided:
            return prediction
        cond, uncond = prediction.chunk(2)
        whole = uncond + scale * (cond - uncond)
        return torch.cat([whole[:, : self.channels], cond[:, self.channels :]], 1) if self.channels else whole


def check_labels(labels: Tensor | None, B: int, null_label: int | None) -> None:
    """Check labels: None, or int64 [B] in 0..null_label (None: no upper limit).

    Raises ValueError for another shape or type, UserError for a label out of range.
    """
    if labels is None:
        return
    if labels.shape != (B,) or labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype} {list(labels.shape)}; expected int64 [{B}], one for each image")
    for label in (int(labels.min()), int(labels.max())):
        if label < 0:
            raise UserError(f"label {label} does not exist; labels count from 0")
        if null_label is not None and label > null_label:
            raise UserError(
                f"label {label} does not exist; expected 0 to {null_label - 1}, or {null_label} for no class"
            )
