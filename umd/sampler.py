"""Drawing images: DDIM with classifier-free guidance, and inpainting.

A denoiser is `denoise(x_t [B, C, H, W], timesteps int64 [B], labels int64 [B] or None) -> (x_start, eps)`,
both shaped as x_t; timesteps are model times (see NoiseSchedule). Noise is a function of the seed, the index
of the sample and the step: sample i of a seed gets the same noise in whatever batch it is drawn.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from umd.errors import UserError
from umd.ops import ddim_step, philox_randn_rows
from umd.schedule import NoiseSchedule

Denoise = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
Callback = Callable[[int, int, Tensor, Tensor], None]
Prediction = Literal["eps", "x_start"]
Capture = Literal["auto", "on", "off"]
WARM_UP = 3  # steps before one is captured, as PyTorch's own recipe takes


def ddim_timesteps(num_sample_steps: int, T: int = 1000) -> list[int]:
    """Diffusion indices (model time - 1) to sample at: T-1, T-1-s, T-1-2s, … and 0, with s = ⌈T / steps⌉.

    They are those of the released UMD code: one more than the steps where these divide T (999, 991, …, 7, 0
    for 125), else fewer (60 for 62). There the released code repeats the call at 0, to no effect, up to 63
    calls; this one does not. Raises UserError unless the steps are in 1..T.
    """
    if not 1 <= num_sample_steps <= T:
        raise UserError(f"cannot sample in {num_sample_steps} steps; the noise schedule allows 1 to {T}")
    return [*range(T - 1, 0, -math.ceil(T / num_sample_steps)), 0]


def model_times(num_sample_steps: int, T: int = 1000) -> list[int]:
    """The model times that `ddim_sample` and `inpaint` ask a denoiser for, from the noisiest on."""
    return [index + 1 for index in ddim_timesteps(num_sample_steps, T)]


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
    seed: int = 0,
    first_sample: int = 0,
    x_T: Tensor | None = None,
    callback: Callback | None = None,
    device: torch.device | str | None = None,
    capture: Capture = "auto",
) -> Tensor:
    """Draw images [B, C, H, W] with DDIM (Song et al. 2021), in the range the denoiser was trained on.

    num_steps: see `ddim_timesteps`. The sample is the image that the last call predicts.
    eta: 0 for no noise but the first, 1 for as much as DDPM adds.
    clip: hold each predicted image in [-1, 1]; for pixels, not for latents.
    predict: which of the denoiser's two outputs leads.
    labels: int64 [B] in 0..null_label, or None.
    cfg_scale: s in uncond + s·(cond - uncond), both halves in one call on 2B images; 1 calls on B.
    first_sample: index of the first image among those of the seed, to draw them in several batches.
    x_T: the noise to start from, float32 or float64 [B, C, H, W]; its type is that of the computation.
    callback: called as (i, n, x_t, predicted image) for i = 0..n-1, where x_t is what the denoiser was given.
    device: by default x_T's, else the labels', else the CPU.
    capture: auto, on or off: replay a step as one CUDA graph, with the same bits; its denoiser waits for nothing and
        reads no number that changes but in tensors. auto: on CUDA, of more than a few steps.

    Raises UserError for steps, eta, labels or guidance that cannot be had, and for a step that cannot be captured.
    """
    if device is None:
        device = next((given.device for given in (x_T, labels) if given is not None), "cpu")
    sampler = DDIM(
        denoise, shape, schedule, num_steps=num_steps, eta=eta, clip=clip, predict=predict, labelled=labels is not None,
        null_label=null_label, cfg_scale=cfg_scale, seed=seed, device=device, capture=capture,
    )  # fmt: skip
    return sampler(labels, first_sample=first_sample, x_T=x_T, callback=callback)


class DDIM:
    """`ddim_sample` for one batch after another of the same shape: on a GPU one recorded step serves them all."""

    def __init__(
        self, denoise: Denoise, shape: tuple[int, int, int, int], schedule: NoiseSchedule, *, num_steps: int,
        eta: float, clip: bool, predict: Prediction = "eps", labelled: bool, null_label: int | None, cfg_scale: float,
        seed: int, device: torch.device | str, capture: Capture = "auto",
    ):  # fmt: skip
        """labelled: whether calls give labels. The rest is as for `ddim_sample`."""
        self.shape, self.null_label = shape, null_label
        self.labels = torch.zeros(shape[0], dtype=torch.int64, device=device) if labelled else None
        _check_request(shape[0], eta, predict, self.labels, null_label, cfg_scale)
        self.noise = _Noise(seed, 0, shape, device)
        times = model_times(num_steps, schedule.num_steps)
        coefficients = _step_coefficients(schedule, [*times, 0], eta)
        draws = 1 + torch.arange(len(times))  # the first was x_T

        def move(x_t: Tensor, time: Tensor, coefficients: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
            cond, uncond = _predict(denoise, x_t, time[None], predict, self.labels, null_label, cfg_scale)
            return ddim_step(
                x_t, cond, uncond, cfg_scale, coefficients.to(x_t), from_xstart=predict == "x_start", clip=clip,
                seed=self.noise.seed if eta > 0 else None, offsets=self.noise.offsets(drawn),
            )  # fmt: skip

        self.step = _Step(move, (torch.tensor(times), coefficients, draws), device, capture)

    @torch.no_grad()
    def __call__(
        self, labels: Tensor | None = None, *, first_sample: int = 0, x_T: Tensor | None = None,
        callback: Callback | None = None,
    ) -> Tensor:  # fmt: skip
        """A batch [B, C, H, W]: images `first_sample` and after of those of the seed."""
        _check_labels(labels, self.shape[0], self.null_label)
        if self.labels is not None and labels is not None:
            self.labels.copy_(labels)
        self.noise.start_at(first_sample)
        if x_T is None:
            x_T = self.noise.draw(0)
        else:
            _check_images("x_T", x_T, self.shape)
        return self.step.loop(x_T, callback)


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
    """Fill the removed pixels of images [B, C, H, W]; the kept ones come back bit for bit.

    DDIM where, at each noise level, the kept pixels are put back with fresh noise of that level. The filling
    then agrees with them only loosely; RePaint (Lugmayr et al. 2022) takes every step `resample` times,
    returning to the noise level before it in between, for `resample` times the calls.

    x_known: float32 or float64; its removed pixels are not used.
    mask: [B, 1, H, W] of any real type, 0 keep, 1 remove.
    The rest is as for `ddim_sample`.

    Raises UserError for a mask of another size, with other values, or that keeps or removes an image whole.
    """
    B = len(x_known)
    _check_images("x_known", x_known, x_known.shape)
    _check_request(B, eta, predict, labels, null_label, cfg_scale)
    if resample < 1:
        raise UserError(f"resample is {resample}; each step is taken at least once")
    removed = _check_mask(mask, x_known).to(x_known.device)  # [B, 1, H, W]
    labels = None if labels is None else labels.to(x_known.device)
    noise = _Noise(seed, first_sample, x_known.shape, x_known.device)
    times = [*model_times(num_steps, schedule.num_steps), 0]
    alphas = schedule.alphas_cumprod
    rows, scales, draws = [], [], 2  # noises before the first call
    for i, (start, end) in enumerate(pairwise(times)):
        repeats = resample if end > 0 else 1
        for repeat in range(repeats):
            returns = repeat + 1 < repeats  # from end back to start
            alpha = float(alphas[start] / alphas[end]) if returns else 1.0
            rows.append((start, end, i, draws))
            scales.append((math.sqrt(alpha), math.sqrt(1 - alpha)))
            draws += 1 + (end > 0) + returns  # of the step, of the kept pixels, of the way back
    numbers = torch.tensor(rows)  # [n, 4]
    coefficients = _step_coefficients(schedule, times, eta)[numbers[:, 2]]
    tables = numbers[:, 0], numbers[:, 1], coefficients, numbers[:, 3], torch.tensor(scales, dtype=torch.float64)

    def known_at(time: Tensor, drawn: int | Tensor) -> Tensor:
        return schedule.q_sample(x_known, time.expand(B), noise.draw(drawn))

    def move(
        x_t: Tensor, time: Tensor, time_next: Tensor, coefficients: Tensor, drawn: Tensor, scales: Tensor
    ) -> tuple[Tensor, Tensor]:
        cond, uncond = _predict(denoise, x_t, time[None], predict, labels, null_label, cfg_scale)
        x_next, x_start = ddim_step(
            x_t, cond, uncond, cfg_scale, coefficients.to(x_t), from_xstart=predict == "x_start", clip=clip,
            seed=noise.seed if eta > 0 else None, offsets=noise.offsets(drawn),
        )  # fmt: skip
        x_next = torch.where(removed, x_next, known_at(time_next, drawn + 1))
        if resample > 1:  # times 1, plus 0, where it goes on
            a, b = scales.to(x_t)
            x_next = a * x_next + b * noise.draw(drawn + 2)
        return x_next, x_start

    x_T = torch.where(removed, noise.draw(0).to(x_known.dtype), known_at(tables[0][:1].to(x_known.device), 1))
    step = _Step(move, tables, x_known.device, capture)
    return torch.where(removed, step.loop(x_T, callback), x_known)


@torch.no_grad()
def denoising_sequence(
    denoise: Denoise,
    x_start: Tensor,
    schedule: NoiseSchedule,
    timesteps: Sequence[int],
    *,
    labels: Tensor | None = None,
    predict: Prediction = "x_start",
    clip: bool = True,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """What the denoiser makes of images [B, C, H, W] at each of n model times, noised by the same ε.

    Returns (x_t, predicted x_start), each [n, B, C, H, W]. Raises UserError for a time outside 0..T.
    """
    _check_images("x_start", x_start, x_start.shape)
    _check_request(len(x_start), 0.0, predict, labels, None, 1.0)
    outside = [time for time in timesteps if not 0 <= time <= schedule.num_steps]
    if outside:
        raise UserError(f"time {outside[0]} is outside the noise schedule; expected 0 to {schedule.num_steps}")
    eps = _Noise(seed, 0, x_start.shape, x_start.device).draw(0)
    noised, predicted = [], []
    for time in timesteps:
        t = torch.full((len(x_start),), time, device=x_start.device)
        x_t = schedule.q_sample(x_start, t, eps)
        prediction, _ = _predict(denoise, x_t, t[:1], predict, labels, None, 1.0)
        x_hat = prediction if predict == "x_start" else schedule.xstart_from_eps(x_t, t, prediction)
        noised.append(x_t)
        predicted.append(x_hat.clamp(-1, 1) if clip else x_hat)
    return torch.stack(noised), torch.stack(predicted)


class _Step:
    """One denoising step that can be replayed: what changes from step to step lies in its tensors, at one place."""

    def __init__(
        self, move: Callable[..., tuple[Tensor, Tensor]], tables: Sequence[Tensor], device: torch.device | str,
        capture: Capture,
    ):  # fmt: skip
        """move: (x_t, a row of each table) to (x_next, x_start). tables: of n rows each, one a step.

        Captured, the first few steps run as they are, for kernels are chosen and caches filled then, on the stream that
        the others are captured and replayed on.
        """
        self.device = torch.device(device)
        self.move, self.tables = move, [table.to(device) for table in tables]
        self.index = torch.zeros(1, dtype=torch.int64, device=device)
        self.x_t: Tensor | None = None  # [B, C, H, W], as the next: made for the first loop
        self.x_start: Tensor | None = None
        self.call = self.run
        on_gpu = self.device.type == "cuda"
        if capture == "on" and not on_gpu:
            raise UserError("--capture on needs a CUDA GPU; leave it at auto")
        self.captures = on_gpu and (capture == "on" or (capture == "auto" and len(tables[0]) > 3 * WARM_UP))

    def run(self) -> None:
        """Take the step, and be at the next."""
        assert self.x_t is not None and self.x_start is not None, "loop comes first"
        x_next, x_start = self.move(self.x_t, *(table.index_select(0, self.index)[0] for table in self.tables))
        self.x_t.copy_(x_next)
        self.x_start.copy_(x_start)
        self.index += 1

    def start(self, x_T: Tensor) -> None:
        """Be at the first step of the way from x_T."""
        if self.x_t is None:
            self.x_t = torch.empty_like(x_T, device=self.device)
            self.x_start = torch.empty_like(self.x_t)
        self.x_t.copy_(x_T)
        self.index.zero_()

    def loop(self, x_T: Tensor, callback: Callback | None) -> Tensor:
        """The sample [B, C, H, W] that all steps make of x_T."""
        self.start(x_T)
        assert self.x_t is not None and self.x_start is not None
        n = len(self.tables[0])
        with _side_stream(self.device) if self.captures else nullcontext():
            for i in range(n):
                if self.captures and i == WARM_UP and self.call == self.run:
                    self.call = _record(self.run)
                x_t = None if callback is None else self.x_t.clone()
                self.call()
                if callback is not None and x_t is not None:
                    callback(i, n, x_t, self.x_start.clone())
        return self.x_t.clone()


def _record(run: Callable[[], None]) -> Callable[[], None]:
    """`run` as a CUDA graph of the current stream."""
    graph = torch.cuda.CUDAGraph()
    try:
        # thread_local: a training run's other threads (loader, saves, NCCL) use CUDA meanwhile.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            run()
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:300]
        raise UserError(
            f"a denoising step could not be recorded as a CUDA graph ({reason}); --capture off samples without"
        ) from error
    return graph.replay


@contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """A CUDA stream of its own, after what was queued before and before what comes behind."""
    with torch.cuda.device(device):
        before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            yield
        before.wait_stream(stream)


class _Noise:
    """The noises of a batch of samples, by number: stretches of every sample's Philox stream that follow each other.

    A counter's upper 32 bits are the index of the sample, its lower 32 the place in that sample's stream.
    """

    def __init__(self, seed: int, first_sample: int, shape: Sequence[int], device: torch.device | str):
        self.seed = torch.tensor(seed, device=device)
        self.shape = tuple(shape[1:])
        self.first = torch.empty(shape[0], dtype=torch.int64, device=device)
        self.start_at(first_sample)
        self.size = math.ceil(math.prod(self.shape) / 4)  # counters of one noise

    def start_at(self, first_sample: int) -> None:
        """The noises are those of samples `first_sample` and after from now on."""
        self.first.copy_(torch.arange(first_sample, first_sample + len(self.first)) << 32)

    def offsets(self, drawn: int | Tensor) -> Tensor:
        """The first counter of each sample's noise after `drawn` others: int64 [B]."""
        return self.first + drawn * self.size

    def draw(self, drawn: int | Tensor) -> Tensor:
        """That noise: float32 [B, C, H, W]."""
        return philox_randn_rows(self.seed, self.offsets(drawn), self.shape)


def _step_coefficients(schedule: NoiseSchedule, times: list[int], eta: float) -> Tensor:
    """`ddim_step`'s coefficients for the moves between n model times: float64 [n - 1, 5]."""
    alpha, alpha_next = schedule.alphas_cumprod[times[:-1]], schedule.alphas_cumprod[times[1:]]
    # Song et al. 2021, equation 16.
    variance = eta**2 * (1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)
    squares = torch.stack([alpha, 1 - alpha, alpha_next, 1 - alpha_next - variance, variance], 1)
    return squares.clamp(min=0).sqrt()


def _predict(
    denoise: Denoise,
    x_t: Tensor,
    time: Tensor,
    predict: Prediction,
    labels: Tensor | None,
    null_label: int | None,
    cfg_scale: float,
) -> tuple[Tensor, Tensor | None]:
    """The leading prediction [B, C, H, W] with the labels and, for guidance, without them, from one call at a model
    time, int64 [1]."""
    B = len(x_t)
    guided = cfg_scale != 1
    if guided:
        assert labels is not None and null_label is not None, "_check_request asks for both"
        x_t, labels = x_t.repeat(2, 1, 1, 1), torch.cat([labels, torch.full_like(labels, null_label)])
    x_start, eps = denoise(x_t, time.expand(len(x_t)), labels)
    prediction = x_start if predict == "x_start" else eps
    return (prediction[:B], prediction[B:]) if guided else (prediction, None)


def _check_request(
    B: int, eta: float, predict: str, labels: Tensor | None, null_label: int | None, cfg_scale: float
) -> None:
    if not 0 <= eta <= 1:
        raise UserError(f"eta is {eta}; expected 0 (no noise) to 1 (that of DDPM)")
    if predict not in ("eps", "x_start"):
        raise UserError(f"predict is {predict!r}; expected 'eps' or 'x_start', the network's two outputs")
    if cfg_scale != 1 and (labels is None or null_label is None):
        raise UserError(f"guidance (cfg_scale={cfg_scale:g}) needs labels and a model trained with them; else use 1")
    _check_labels(labels, B, null_label)


def _check_labels(labels: Tensor | None, B: int, null_label: int | None) -> None:
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
