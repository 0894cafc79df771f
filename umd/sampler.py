"""Drawing images: DDIM and DDPM with classifier-free guidance, and inpainting.

`umd.guidance` defines what a denoiser is. Noise is a function of (seed, index of the sample, step): sample i of a seed
gets the same noise in any batch.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from umd.config import Capture, Prediction
from umd.errors import UserError
from umd.guidance import Denoise, Estimator, Guidance, check_labels
from umd.machine.device import Captured, side_stream
from umd.noise import Noise
from umd.ops import ddim_step
from umd.schedule import NoiseSchedule

Callback = Callable[[int, int, Tensor, Tensor], None]
WARM_UP = 3  # steps run before one is captured, as in PyTorch's CUDA graph recipe


def ddim_timesteps(num_steps: int, T: int = 1000) -> list[int]:
    """Diffusion indices (model time - 1) of DDIM's calls: T-1, T-1-s, T-1-2s, … and 0, with s = ⌈T / steps⌉.

    The released UMD code uses the same indices. If the steps divide T and are fewer, there is one index more than
    steps: 999, 991, …, 7, 0 for 125. Otherwise there may be fewer: 60 for 62 steps. In that case the released code
    repeats the call at 0, to no effect, until it has made 63 calls; this function does not.

    Raises UserError if the steps are outside 1..T.
    """
    if not 1 <= num_steps <= T:
        raise UserError(f"cannot sample in {num_steps} steps; the noise schedule allows 1 to {T}")
    return [*range(T - 1, 0, -math.ceil(T / num_steps)), 0]


def model_times(num_steps: int, T: int = 1000) -> list[int]:
    """Model times at which `ddim_sample` and `inpaint` call the denoiser, the noisiest first."""
    return [index + 1 for index in ddim_timesteps(num_steps, T)]


def ddpm_times(num_steps: int, T: int = 1000) -> list[int]:
    """Model times of DDPM's calls, evenly spaced from T to 1 (Nichol and Dhariwal 2021), as diffusers' "linspace".

    DiT has the same times for 10, 25, 50, 100, 125, 250, 500 and 1000 steps. For 283 other numbers its accumulated
    rounding errors decide a half the other way, e.g. index 499 for our 500 in 21 steps.
    Raises UserError if the steps are outside 1..T.
    """
    if not 1 <= num_steps <= T:
        raise UserError(f"cannot sample in {num_steps} steps; the noise schedule allows 1 to {T}")
    return [int(index) + 1 for index in np.linspace(T - 1, 0, num_steps).round()]


@torch.no_grad()
def ddim_sample(
    denoise: Denoise,
    shape: tuple[int, int, int, int],
    schedule: NoiseSchedule,
    *,
    num_steps: int = 125,
    eta: float = 1.0,
    clip: bool = True,
    predict: Prediction = "eps",
    labels: Tensor | None = None,
    null_label: int | None = None,
    cfg_scale: float = 1.0,
    guidance: Guidance | None = None,
    head_weights: Tensor | None = None,
    seed: int = 0,
    first_sample: int = 0,
    x_T: Tensor | None = None,
    callback: Callback | None = None,
    device: torch.device | str | None = None,
    capture: Capture = "auto",
) -> Tensor:
    """Draw images [B, C, H, W] with DDIM (Song et al. 2021), in the value range that the denoiser was trained on.

    The result is the image that the last call predicts. Raises UserError for steps, eta, labels or guidance out of
    range, and for a step that cannot be captured.

    num_steps: see `ddim_timesteps`.
    eta: 0 adds no noise after the first, 1 adds as much as DDPM.
    clip: clamp each predicted image to [-1, 1]. For pixels, not for latents.
    predict: the denoiser's output to use: "eps", "x_start", or "both", combined by head_weights.
    labels: int64 [B] in 0..null_label, or None.
    cfg_scale: s in uncond + s·(cond - uncond), computed by one call on 2B images. 1: no guidance, calls on B images.
    guidance: model times and channels in which guidance acts; default: all.
    head_weights: float [T + 1], the weight of x_start at each model time for predict "both" (see `umd.heads`).
    first_sample: index of the batch's first image among the images of the seed, for drawing them in several batches.
    x_T: the starting noise, float32 or float64 [B, C, H, W]; default: drawn in float32. All steps compute in its type.
    callback: called as (i, n, x_t, predicted image) for i = 0..n-1, with the x_t that the denoiser got.
    device: default: that of x_T, else that of labels, else the CPU.
    capture: replay a step as a CUDA graph, with the same bits: on, off, or auto (on CUDA, with more than a few steps).
        The denoiser must not wait for the device, and numbers that change must reach it in tensors.
    """
    if device is None:
        device = next((given.device for given in (x_T, labels) if given is not None), "cpu")
    sampler = DDIM(
        denoise, shape, schedule, num_steps=num_steps, eta=eta, clip=clip, predict=predict, labelled=labels is not None,
        null_label=null_label, cfg_scale=cfg_scale, guidance=guidance, head_weights=head_weights, seed=seed,
        device=device, capture=capture,
    )  # fmt: skip
    return sampler(labels, first_sample=first_sample, x_T=x_T, callback=callback)


class DDIM:
    """`ddim_sample` for many batches of one shape. On a GPU all batches replay the same recorded step."""

    def __init__(
        self, denoise: Denoise, shape: tuple[int, int, int, int], schedule: NoiseSchedule, *, num_steps: int,
        eta: float, clip: bool, predict: Prediction = "eps", labelled: bool, null_label: int | None, cfg_scale: float,
        seed: int, device: torch.device | str, capture: Capture = "auto", guidance: Guidance | None = None,
        head_weights: Tensor | None = None, ancestral: bool = False,
    ):  # fmt: skip
        """Arguments as in `ddim_sample`, and two more.

        labelled: whether each call passes labels. ancestral: sample with DDPM, i.e. with eta = 1, the times of
        `ddpm_times`, and the denoiser's learned variances if it predicts them.
        """
        _check_eta(eta)
        self.shape, self.null_label = shape, null_label
        self.labels = torch.zeros(shape[0], dtype=torch.int64, device=device) if labelled else None
        self.noise = Noise(seed, 0, shape, device)
        T = schedule.num_steps
        times, eta = (ddpm_times(num_steps, T), 1.0) if ancestral else (model_times(num_steps, T), eta)
        estimate = Estimator(
            denoise, times, schedule, predict=predict, labels=self.labels, null_label=null_label, cfg_scale=cfg_scale,
            channels=shape[1], guidance=guidance, head_weights=head_weights,
        )  # fmt: skip
        coefficients = _step_coefficients(schedule, [*times, 0], eta)
        draws = 1 + torch.arange(len(times))  # noise 0 is x_T

        def move(
            guided: bool, x_t: Tensor, time: Tensor, numbers: Tensor, coefficients: Tensor, drawn: Tensor,
            log_variances: Tensor | None = None,
        ) -> tuple[Tensor, Tensor]:  # fmt: skip
            found = estimate(guided, x_t, time, numbers)
            learned = None if log_variances is None else found.variance
            x_next, x_start = ddim_step(
                x_t, found.cond, found.uncond, cfg_scale, coefficients.to(x_t), from_xstart=found.from_xstart,
                clip=clip, seed=self.noise.seed if eta > 0 and learned is None else None,
                offsets=self.noise.offsets(drawn),
            )  # fmt: skip
            if learned is not None and log_variances is not None:  # Nichol and Dhariwal 2021, equation 15
                least, largest = log_variances.to(x_t)
                share = (learned.to(x_t) + 1) / 2
                deviation = (0.5 * (share * largest + (1 - share) * least)).exp()
                x_next = x_next + deviation * self.noise.draw(drawn)
            return x_next, x_start

        tables = [*estimate.tables, coefficients, draws]
        if ancestral:
            tables.append(_log_variances(schedule, [*times, 0]))
        self.step = _Step(move, estimate.guided, tables, device, capture)

    @torch.no_grad()
    def __call__(
        self, labels: Tensor | None = None, *, first_sample: int = 0, x_T: Tensor | None = None,
        callback: Callback | None = None,
    ) -> Tensor:  # fmt: skip
        """Draw a batch [B, C, H, W]: images first_sample .. first_sample + B - 1 of the seed."""
        check_labels(labels, self.shape[0], self.null_label)
        if (labels is None) != (self.labels is None):
            raise ValueError(f"labels: expected {'None' if self.labels is None else 'int64 [B]'}, as `labelled` said")
        if self.labels is not None and labels is not None:
            self.labels.copy_(labels)
        self.noise.start_at(first_sample)
        return self.step.loop(first_noise(self.noise, x_T, self.shape), callback)


def first_noise(noise: Noise, x_T: Tensor | None, shape: Sequence[int]) -> Tensor:
    """The noise to start from: x_T if given (checked against `shape`), else noise 0."""
    if x_T is None:
        return noise.draw(0)
    _check_images("x_T", x_T, shape)
    return x_T


@torch.no_grad()
def inpaint(
    denoise: Denoise,
    x_known: Tensor,
    mask: Tensor,
    schedule: NoiseSchedule,
    *,
    num_steps: int = 125,
    resample: int = 1,
    eta: float = 1.0,
    clip: bool = True,
    predict: Prediction = "eps",
    labels: Tensor | None = None,
    null_label: int | None = None,
    cfg_scale: float = 1.0,
    seed: int = 0,
    first_sample: int = 0,
    callback: Callback | None = None,
    capture: Capture = "auto",
) -> Tensor:
    """Fill the removed pixels of images [B, C, H, W] with DDIM; the kept pixels come back bit for bit.

    After each step the kept pixels are put back, with fresh noise of that noise level. The filling then matches them
    only loosely. RePaint (Lugmayr et al. 2022) improves this at `resample` times the cost: it takes every step
    `resample` times and returns to the noise level before the step in between.

    x_known: float32 or float64 [B, C, H, W]; removed pixels may hold anything.
    mask: [B, 1, H, W] of any real type, 0 keep, 1 remove.
    Other arguments as in `ddim_sample`.

    Raises UserError for a mask of another size or with other values, and if an image is kept or removed as a whole.
    """
    B = len(x_known)
    _check_images("x_known", x_known, x_known.shape)
    _check_eta(eta)
    check_labels(labels, B, null_label)
    if resample < 1:
        raise UserError(f"resample is {resample}; each step is taken at least once")
    removed = _check_mask(mask, x_known).to(x_known.device)  # [B, 1, H, W]
    labels = None if labels is None else labels.to(x_known.device)
    noise = Noise(seed, first_sample, x_known.shape, x_known.device)
    times = [*model_times(num_steps, schedule.num_steps), 0]
    alphas = schedule.alphas_cumprod
    rows, scales, draws = [], [], 2  # two noises are drawn before the first call
    for i, (start, end) in enumerate(pairwise(times)):
        repeats = resample if end > 0 else 1
        for repeat in range(repeats):
            returns = repeat + 1 < repeats  # whether to go back from end to start afterwards
            alpha = float(alphas[start] / alphas[end]) if returns else 1.0
            rows.append((start, end, i, draws))
            scales.append((math.sqrt(alpha), math.sqrt(1 - alpha)))
            draws += 1 + (end > 0) + returns  # noises of the step, the kept pixels, the way back
    numbers = torch.tensor(rows)  # [n, 4]
    coefficients = _step_coefficients(schedule, times, eta)[numbers[:, 2]]
    estimate = Estimator(
        denoise, numbers[:, 0].tolist(), schedule, predict=predict, labels=labels, null_label=null_label,
        cfg_scale=cfg_scale, channels=x_known.shape[1],
    )  # fmt: skip
    returns_by = torch.tensor(scales, dtype=torch.float64)
    tables = *estimate.tables, numbers[:, 1], coefficients, numbers[:, 3], returns_by

    def known_at(time: Tensor, drawn: int | Tensor) -> Tensor:
        return schedule.q_sample(x_known, time.expand(B), noise.draw(drawn))

    def move(
        guided: bool, x_t: Tensor, time: Tensor, of_time: Tensor, time_next: Tensor, coefficients: Tensor,
        drawn: Tensor, scales: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        found = estimate(guided, x_t, time, of_time)
        x_next, x_start = ddim_step(
            x_t, found.cond, found.uncond, cfg_scale, coefficients.to(x_t), from_xstart=found.from_xstart, clip=clip,
            seed=noise.seed if eta > 0 else None, offsets=noise.offsets(drawn),
        )  # fmt: skip
        x_next = torch.where(removed, x_next, known_at(time_next, drawn + 1))
        if resample > 1:  # without a way back a is 1 and b is 0
            a, b = scales.to(x_t)
            x_next = a * x_next + b * noise.draw(drawn + 2)
        return x_next, x_start

    x_T = torch.where(removed, noise.draw(0).to(x_known.dtype), known_at(tables[0][:1].to(x_known.device), 1))
    step = _Step(move, estimate.guided, tables, x_known.device, capture)
    return torch.where(removed, step.loop(x_T, callback), x_known)


@torch.no_grad()
def denoising_sequence(
    denoise: Denoise,
    x_start: Tensor,
    schedule: NoiseSchedule,
    timesteps: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Noise images [B, C, H, W] to each of n model times with the same ε, and denoise each x_t in one call, by ε̂.

    Returns (x_t, predicted x_start, clamped to [-1, 1]), each [n, B, C, H, W]. Raises UserError for a time outside
    0..T.
    """
    _check_images("x_start", x_start, x_start.shape)
    outside = [time for time in timesteps if not 0 <= time <= schedule.num_steps]
    if outside:
        raise UserError(f"time {outside[0]} is outside the noise schedule; expected 0 to {schedule.num_steps}")
    eps = Noise(0, 0, x_start.shape, x_start.device).draw(0)
    noised, predicted = [], []
    for time in timesteps:
        t = torch.full((len(x_start),), time, device=x_start.device)
        x_t = schedule.q_sample(x_start, t, eps)
        _, eps_hat, *_ = denoise(x_t, t, None)
        noised.append(x_t)
        predicted.append(schedule.xstart_from_eps(x_t, t, eps_hat).clamp(-1, 1))
    return torch.stack(noised), torch.stack(predicted)


class _Step:
    """A denoising step that can be replayed as a CUDA graph.

    Whatever changes from step to step lies in tensors at fixed addresses. Steps with guidance and steps without it are
    two kinds; each kind is recorded separately.
    """

    def __init__(
        self, move: Callable[..., tuple[Tensor, Tensor]], guided: Sequence[bool], tables: Sequence[Tensor],
        device: torch.device | str, capture: Capture,
    ):  # fmt: skip
        """move: maps (guided, x_t, one row of each table) to (x_next, x_start). tables: n rows each, one per step.

        With capture, the first `WARM_UP` steps of a kind run uncaptured.
        """
        self.device = torch.device(device)
        self.move, self.guided, self.tables = move, list(guided), [table.to(device) for table in tables]
        self.index = torch.zeros(1, dtype=torch.int64, device=device)
        self.x_t: Tensor | None = None  # [B, C, H, W], like x_start; allocated by the first loop
        self.x_start: Tensor | None = None
        on_gpu = self.device.type == "cuda"
        if capture == "on" and not on_gpu:
            raise UserError("--capture on needs a CUDA GPU; leave it at auto")
        self.captures = on_gpu and (capture == "on" or (capture == "auto" and len(tables[0]) > 3 * WARM_UP))
        self.captured = [Captured(WARM_UP, "a denoising step", "--capture off samples without") for _ in range(2)]

    def run(self, guided: bool) -> None:
        """Take one step and advance the index."""
        assert self.x_t is not None and self.x_start is not None, "loop comes first"
        x_next, x_start = self.move(guided, self.x_t, *(table.index_select(0, self.index)[0] for table in self.tables))
        self.x_t.copy_(x_next)
        self.x_start.copy_(x_start)
        self.index += 1

    def start(self, x_T: Tensor) -> None:
        """Go to the first step, starting from x_T."""
        if self.x_t is None:
            self.x_t = torch.empty_like(x_T, device=self.device)
            self.x_start = torch.empty_like(self.x_t)
        self.x_t.copy_(x_T)
        self.index.zero_()

    def loop(self, x_T: Tensor, callback: Callback | None) -> Tensor:
        """Take all steps from x_T and return the sample [B, C, H, W]."""
        self.start(x_T)
        assert self.x_t is not None and self.x_start is not None
        n = len(self.tables[0])
        with side_stream(self.device) if self.captures else nullcontext():
            for i, guided in enumerate(self.guided):
                x_t = None if callback is None else self.x_t.clone()
                if self.captures:
                    self.captured[guided](partial(self.run, guided))
                else:
                    self.run(guided)
                if callback is not None and x_t is not None:
                    callback(i, n, x_t, self.x_start.clone())
        return self.x_t.clone()


def _step_coefficients(schedule: NoiseSchedule, times: list[int], eta: float) -> Tensor:
    """`ddim_step`'s coefficients for the moves between n model times: float64 [n - 1, 5]."""
    alpha, alpha_next = schedule.alphas_cumprod[times[:-1]], schedule.alphas_cumprod[times[1:]]
    # Song et al. 2021, equation 16.
    variance = eta**2 * (1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)
    squares = torch.stack([alpha, 1 - alpha, alpha_next, 1 - alpha_next - variance, variance], 1)
    return squares.clamp(min=0).sqrt()


def _log_variances(schedule: NoiseSchedule, times: list[int]) -> Tensor:
    """Logarithms of DDPM's smallest and largest variance for the moves between n model times: float64 [n - 1, 2].

    The move to time 0 adds no noise; its logarithms are -1e4.
    """
    alpha, alpha_next = schedule.alphas_cumprod[times[:-1]], schedule.alphas_cumprod[times[1:]]
    beta = 1 - alpha / alpha_next
    logs = torch.stack([beta * (1 - alpha_next) / (1 - alpha), beta], 1).log()
    logs[torch.tensor(times[1:]) == 0] = -1e4
    return logs


def _check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise UserError(f"eta is {eta}; expected 0 (no noise) to 1 (that of DDPM)")


def _check_images(name: str, x: Tensor, shape: Sequence[int]) -> None:
    if x.ndim != 4 or x.shape != tuple(shape) or x.dtype not in (torch.float32, torch.float64):
        expected = list(shape) if len(shape) == 4 else "[B, C, H, W]"
        raise ValueError(f"{name} is {x.dtype} {list(x.shape)}; expected float32 or float64 {expected}")


def _check_mask(mask: Tensor, x: Tensor) -> Tensor:
    """The mask as bool [B, 1, H, W]."""
    expected = [len(x), 1, *x.shape[2:]]
    if list(mask.shape) != expected:
        raise UserError(f"the mask is {list(mask.shape)}; expected {expected}, one plane for each image, of its size")
    if mask.is_complex() or not ((mask == 0) | (mask == 1)).all():
        raise UserError(f"the mask ({mask.dtype}) has other values than 0 (keep) and 1 (remove)")
    removed = mask.bool()
    for i, plane in enumerate(removed):
        if plane.all():
            raise UserError(f"the mask removes all of image {i}; keep a part of it, or sample instead")
        if not plane.any():
            raise UserError(f"the mask keeps all of image {i}; mark what to fill with 1")
    return removed
