"""Sampling against the UMD authors' code, and against data whose exact denoiser is a formula."""

import gc
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from umd import ops
from umd.conditions import denoiser, make_conditions
from umd.config import ModelConfig
from umd.errors import UserError
from umd.guidance import Guidance
from umd.layers import Linear
from umd.masking import layout
from umd.model import UMD
from umd.ops import ddim_step
from umd.sampler import (
    DDIM,
    _Step,
    _step_coefficients,
    ddim_sample,
    ddim_timesteps,
    denoising_sequence,
    inpaint,
    model_times,
)
from umd.schedule import NoiseSchedule

ORACLE = np.load(Path(__file__).parents[1] / "data" / "gaussian_diffusion.npz")
SCHEDULES = {name: NoiseSchedule(name) for name in ("cosine", "linear")}
COSINE = SCHEDULES["cosine"]


def images(name: str) -> Tensor:
    return torch.from_numpy(ORACLE[name]).permute(0, 3, 1, 2).contiguous()  # NHWC to NCHW


X_T = images("ddim_xT")


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the oracle's largest value if above 1 (up to 3e4 without clipping)."""
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def linear_model(name: str, schedule: NoiseSchedule):
    """The oracle's models: eps = 0.3 x, 0.9 x, or 0.8 x √(1-ᾱ)."""

    def denoise(x_t, timesteps, labels):
        if name == "tdep":
            scale = (0.8 * schedule.coefficients(timesteps, torch.float64)[1]).to(x_t.dtype).view(-1, 1, 1, 1)
        else:
            scale = {"lin0p3": 0.3, "lin0p9": 0.9}[name]
        eps = scale * x_t
        return schedule.xstart_from_eps(x_t, timesteps, eps), eps

    return denoise


def gaussian_denoiser(schedule: NoiseSchedule, mean: Tensor, covariance: Tensor):
    """The exact denoiser E[x_start | x_t], and its eps, of images of n pixels from N(mean, covariance)."""
    n = len(mean)

    def denoise(x_t, timesteps, labels):
        a, b = (table[0] for table in schedule.coefficients(timesteps, torch.float64))
        gain = a * covariance @ torch.linalg.inv(a**2 * covariance + b**2 * torch.eye(n))
        x_start = (mean + (x_t.flatten(1).double() - a * mean) @ gain.T).view_as(x_t)
        return x_start.to(x_t.dtype), ((x_t - a * x_start) / b).to(x_t.dtype)

    return denoise


# Timesteps


@pytest.mark.parametrize("steps", [125, 250, 62, 50, 10, 1000])
def test_timesteps_equal_the_oracle(steps):
    assert ddim_timesteps(steps) == ORACLE[f"timesteps_{steps}"].tolist()


@pytest.mark.parametrize("T", [1, 2, 7, 1000])
def test_timesteps_descend_to_zero_within_the_number_of_calls(T):
    for steps in {1, 2, 3, T // 2, T - 1, T} & set(range(1, T + 1)):
        times = ddim_timesteps(steps, T)
        assert times[0] == T - 1 and times[-1] == 0
        assert all(a > b for a, b in zip(times, times[1:], strict=False))
        assert len(times) <= steps + 1


# The authors' DDIM


@pytest.mark.parametrize("predict", ["eps", "x_start"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("model", ["lin0p3", "lin0p9", "tdep"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_end_points_equal_the_oracle(name, model, clip, predict):
    schedule = SCHEDULES[name]
    for steps in (125, 250, 62, 50, 10):
        expected = images(f"{name}::ddim_{model}_clip{int(clip)}_steps{steps}_eta0")
        out = ddim_sample(
            linear_model(model, schedule), X_T.shape, schedule, num_steps=steps, eta=0.0, clip=clip,
            predict=predict, x_T=X_T,
        )  # fmt: skip
        assert error(out, expected) < 5e-5, steps


@pytest.mark.parametrize("model", ["lin0p3", "lin0p9", "tdep"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_trajectories_equal_the_oracle(name, model):
    seen: list[Tensor] = []
    ddim_sample(
        linear_model(model, SCHEDULES[name]), X_T.shape, SCHEDULES[name], eta=0.0, clip=False, x_T=X_T,
        callback=lambda i, n, x_t, x_start: seen.append(x_t),
    )  # fmt: skip
    assert len(seen) == 126
    for calls in (0, 1, 2, 60, 122, 123, 124):
        assert error(seen[calls + 1], images(f"{name}::ddim_{model}_traj125_after{calls}")) < 5e-5, calls


@pytest.mark.parametrize(("index", "index_next"), [(999, 991), (500, 492), (8, 0), (0, None)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_noisy_steps_equal_the_oracle(name, index, index_next):
    times = [index + 1, 0 if index_next is None else index_next + 1]
    coefficients = _step_coefficients(SCHEDULES[name], times, eta=1.0)[0].float()
    x_next, x_start = ddim_step(
        X_T, 0.3 * X_T, None, 1.0, coefficients, from_xstart=False, clip=False, noise=images("eta1_noise")
    )
    key = f"{name}::eta1_step_{index}_{index_next}"
    assert error(x_next, images(key)) < 5e-5
    assert error(x_start, images(key + "_x0")) < 5e-5


# Data whose exact denoiser is known


@pytest.mark.parametrize(
    ("name", "eta", "predict"),
    [("cosine", 0.0, "eps"), ("cosine", 1.0, "x_start"), ("linear", 0.0, "x_start"), ("linear", 1.0, "eps")],
)
def test_gaussian_data_keep_mean_and_variance(name, eta, predict):
    """Monte Carlo over 2^15 pixels at all 1000 steps: mean to 4 standard errors, variance to 3 %.

    Fewer steps shrink the variance: by 5 % at 125 cosine steps with eta = 1.
    """
    schedule, mean, std = SCHEDULES[name], 0.3, 0.5

    def denoise(x_t, timesteps, labels):
        a, b = (table[0] for table in schedule.coefficients(timesteps, x_t.dtype))
        x_start = mean + a * std**2 / (a**2 * std**2 + b**2) * (x_t - a * mean)
        return x_start, (x_t - a * x_start) / b

    shape = (32, 1, 32, 32)
    out = ddim_sample(denoise, shape, schedule, num_steps=1000, eta=eta, clip=False, predict=predict, seed=1)
    assert abs(out.mean() - mean) < 4 * std / out.numel() ** 0.5
    assert abs(out.var() / std**2 - 1) < 0.03


def test_clipping_holds_the_sample_and_no_clipping_does_not():
    denoise = linear_model("lin0p3", COSINE)
    assert ddim_sample(denoise, (2, 3, 4, 4), COSINE, num_steps=5).abs().max() <= 1
    assert ddim_sample(denoise, (2, 3, 4, 4), COSINE, num_steps=5, clip=False).abs().max() > 1


# Randomness


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_sample_does_not_depend_on_its_batch(eta):
    denoise = linear_model("tdep", COSINE)
    arguments = {"num_steps": 10, "eta": eta, "seed": 5}
    whole = ddim_sample(denoise, (5, 3, 5, 3), COSINE, **arguments)
    parts = [
        ddim_sample(denoise, (n, 3, 5, 3), COSINE, first_sample=first, **arguments) for first, n in ((0, 2), (2, 3))
    ]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole, ddim_sample(denoise, (5, 3, 5, 3), COSINE, **arguments))
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole, ddim_sample(denoise, (5, 3, 5, 3), COSINE, **(arguments | {"seed": 6})))


def test_no_two_noises_of_a_run_are_the_same():
    """With x_start = 0 predicted, what x_t adds at each step is its fresh noise."""
    seen: list[Tensor] = []
    ddim_sample(
        lambda x, t, y: (torch.zeros_like(x), x), (2, 1, 64, 64), COSINE, num_steps=10, predict="x_start",
        callback=lambda i, n, x_t, x_start: seen.append(x_t),
    )  # fmt: skip
    table = _step_coefficients(COSINE, [*(i + 1 for i in ddim_timesteps(10)), 0], 1.0).float()
    noises = [seen[0]]
    for x_t, x_next, (_, sqrt_one_minus_alpha, _, eps_scale, sigma) in zip(seen, seen[1:], table, strict=False):
        noises.append((x_next - eps_scale * x_t / sqrt_one_minus_alpha) / sigma)
    flat = torch.stack(noises).flatten(2).flatten(0, 1)  # [noises and samples, pixels]
    torch.testing.assert_close(flat.std(1), torch.ones(len(flat)), rtol=0.05, atol=0)
    assert (torch.corrcoef(flat) - torch.eye(len(flat))).abs().max() < 5 / 64


def test_callback_sees_every_call():
    calls = []
    out = ddim_sample(
        linear_model("lin0p9", COSINE), (1, 3, 4, 4), COSINE, num_steps=10,
        callback=lambda i, n, x_t, x_start: calls.append((i, n, x_start)),
    )  # fmt: skip
    assert [call[:2] for call in calls] == [(i, 11) for i in range(11)]
    assert torch.equal(calls[-1][2], out)  # the last prediction is the sample


# Guidance


@pytest.mark.parametrize("predict", ["eps", "x_start"])
def test_guidance_is_the_formula_in_one_call(predict):
    labels, null = torch.tensor([0, 2, 1]), 3
    calls = []

    def denoise(x_t, timesteps, labels):
        calls.append((len(x_t), timesteps, labels))
        slope = 0.1 * (1 + labels).view(-1, 1, 1, 1)
        return slope.sin() * x_t, slope.cos() * x_t

    def guided(x_t, timesteps, _):
        cond = denoise(x_t, timesteps, labels)
        uncond = denoise(x_t, timesteps, torch.full_like(labels, null))
        return tuple(u + 1.5 * (c - u) for c, u in zip(cond, uncond, strict=True))

    arguments = {"num_steps": 4, "predict": predict, "seed": 2}
    out = ddim_sample(denoise, (3, 1, 4, 4), COSINE, labels=labels, null_label=null, cfg_scale=1.5, **arguments)
    assert len(calls) == 5 and all(n == 6 for n, *_ in calls)
    for _, timesteps, given in calls:
        assert timesteps.shape == (6,) and (timesteps == timesteps[0]).all()
        assert given.tolist() == [0, 2, 1, 3, 3, 3]
    torch.testing.assert_close(out, ddim_sample(guided, (3, 1, 4, 4), COSINE, **arguments))

    calls.clear()
    plain = ddim_sample(denoise, (3, 1, 4, 4), COSINE, labels=labels, null_label=null, **arguments)
    assert [n for n, *_ in calls] == [3] * 5
    assert not torch.allclose(plain, out)


# A network's step: its conditions made once, replayed

UMD_CONFIG = ModelConfig(image_size=(8, 8), patch_size=2, hidden_size=16, depth=2, decoder_depth=1, num_heads=2)
UMDS = {
    "plain": UMD_CONFIG,
    "labels": replace(UMD_CONFIG, num_classes=5),
    "single": replace(UMD_CONFIG, adaLN_projection="single"),
    "low_rank": replace(UMD_CONFIG, adaLN_projection="low_rank", adaLN_rank=3),
}


def random_umd(config: ModelConfig, dtype=torch.float64) -> UMD:
    """All parameters random: adaLN starts as zero and would tell nothing."""
    torch.manual_seed(0)
    model = UMD(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("kind", UMDS)
def test_conditions_made_once_are_those_of_each_step(kind):
    model = random_umd(UMDS[kind])
    labelled = kind == "labels"
    labels = torch.tensor([4, 1, 4]) if labelled else None
    guidance = {"labels": labels, "null_label": 5, "cfg_scale": 1.5} if labelled else {}
    x_T = torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    conditions = make_conditions(model, model_times(6), labels)
    assert len(conditions.tables) == len(model_times(6)) * (3 if labelled else 1)  # two labels and the null class

    def draw(conditions):
        denoise = partial(model.denoise, conditions=conditions)
        sample = ddim_sample(denoise, x_T.shape, COSINE, num_steps=6, x_T=x_T, **guidance)
        return sample, inpaint(denoise, x_T, hole(3, 8, 8), COSINE, num_steps=6, **guidance)

    for once, each in zip(draw(conditions), draw(None), strict=True):
        torch.testing.assert_close(once, each, rtol=1e-10, atol=1e-10)


def test_conditions_that_are_not_held_are_no_others():
    model = random_umd(UMDS["labels"])
    conditions, x = make_conditions(model, [900, 1], torch.tensor([2])), torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    for time, label in ((2, 2), (901, 2), (900, 3)):
        with torch.no_grad(), pytest.raises(IndexError):
            model.denoise(x, torch.tensor([time]), torch.tensor([label]), conditions)
    assert make_conditions(UMD(replace(UMD_CONFIG, adaLN=False)), [1]) is None
    assert make_conditions(UMD(UMDS["labels"]), range(1, 100_001), torch.arange(5)) is None  # more than half a GiB


class CastsOf(TorchDispatchMode):
    """Counts casts of some tensors."""

    def __init__(self, tensors):
        super().__init__()
        self.places, self.count = {x.data_ptr() for x in tensors}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten._foreach_copy_):
            sources = args[:1] if func.overloadpacket == torch.ops.aten._to_copy else args[1]
            self.count += sum(x.data_ptr() in self.places for x in sources)
        return func(*args, **(kwargs or {}))


def test_weights_are_cast_once_for_all_calls():
    """As the layers of a GPU compute: the bits of autocast, which casts in every call."""
    model, x = random_umd(UMDS["labels"], torch.float32), torch.randn(2, 3, 8, 8)
    weights = [layer.weight for layer in model.modules() if isinstance(layer, Linear)]
    t, labels = torch.tensor([7, 900]), torch.tensor([1, 4])
    with ops.cpu_paths(False), ops.attention("sdpa"), torch.no_grad():
        with CastsOf(weights) as casts:
            denoise = denoiser(model, torch.bfloat16)
            found = [denoise(x, t, labels) for _ in range(3)]
        assert casts.count == len(weights)
        with CastsOf(weights) as casts:
            for ours in found:
                with torch.autocast("cpu", torch.bfloat16):
                    plain = model.denoise(x, t, labels)
                assert all(map(torch.equal, ours, plain))
        assert casts.count == 3 * len(weights)
    assert all(layer.cast is None for layer in model.modules() if isinstance(layer, Linear))


class NothingWaits(TorchDispatchMode):
    """Raises where a device would be waited for, or a number be read from it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
        return func(*args, **(kwargs or {}))


def draw(sampler: str, model: UMD, x: Tensor, **arguments) -> Tensor:
    """A guided sample of each label 4, 1, …; inpaint fills a hole in x."""
    labels = torch.tensor([4, 1, 0], device=x.device)[: len(x)]
    known = make_conditions(model, model_times(arguments["num_steps"]), labels)

    def denoise(x_t: Tensor, timesteps: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            return model.denoise(x_t, timesteps, labels, known)

    guidance = dict(labels=labels, null_label=5, cfg_scale=1.5, seed=3)
    if sampler == "both heads":  # some steps guided, some not, each its own way
        arguments |= dict(guidance=Guidance((300, 800), "linear", 2), predict="both")
        arguments["head_weights"] = torch.linspace(0, 1, 1001)
    if sampler != "inpaint":
        return ddim_sample(denoise, x.shape, COSINE, **guidance, **arguments)
    return inpaint(denoise, x, hole(*x.shape[::2], x.shape[3]), COSINE, resample=2, **guidance, **arguments)


@torch.no_grad()
@pytest.mark.parametrize("sampler", ["ddim_sample", "both heads", "inpaint"])
def test_a_step_can_be_replayed(monkeypatch, sampler):
    """It writes to its own memory alone and waits for nothing; so often run, it is the sampler."""
    model, x = random_umd(UMDS["labels"], torch.float32), torch.rand(2, 3, 8, 8)
    expected, steps = draw(sampler, model, x, num_steps=6), []
    # Nothing runs.
    monkeypatch.setattr(_Step, "loop", lambda step, x_T, _: steps.append(step) or step.start(x_T) or step.x_t)
    draw(sampler, model, x, num_steps=6)
    (step,) = steps

    def fixed() -> dict:
        return {name: x.data_ptr() if isinstance(x, Tensor) else x for name, x in vars(step).items()}

    before = fixed()
    step.run(step.guided[0])  # caches fill
    with NothingWaits():
        for guided in step.guided[1:]:
            step.run(guided)
    assert fixed() == before
    if sampler == "inpaint":
        step.x_t = torch.where(hole(2, 8, 8).bool(), step.x_t, x)
    assert torch.equal(step.x_t, expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_one_sampler_serves_batch_after_batch(device):
    """Each batch is what `ddim_sample` draws of it alone, on a GPU by the first batch's recording."""
    model, shape = random_umd(UMDS["labels"], torch.float32).to(device), (2, 3, 8, 8)
    arguments = dict(num_steps=20, eta=1.0, clip=True, null_label=5, cfg_scale=1.5, seed=3, device=device)
    sampler = DDIM(model.denoise, shape, COSINE, labelled=True, **arguments)
    for first, labels in ((0, [4, 1]), (2, [0, 3]), (7, [4, 4])):
        labels = torch.tensor(labels, device=device)
        alone = ddim_sample(model.denoise, shape, COSINE, labels=labels, first_sample=first, **arguments)
        assert torch.equal(sampler(labels, first_sample=first), alone)


@pytest.mark.gpu
def test_a_recorded_step_keeps_the_layouts_that_it_reads():
    """A replay reads the memory of its packings; caches of them hold the last 64."""
    model, shape = random_umd(UMDS["plain"], torch.float32).cuda(), (2, 3, 8, 8)
    sampler = DDIM(
        model.denoise, shape, COSINE, num_steps=20, eta=0.0, clip=True, labelled=False, null_label=None, cfg_scale=1.0,
        seed=3, device="cuda", capture="on",
    )  # fmt: skip
    first = sampler()
    config, device = model.config, first.device  # with its index, as the network's
    chunks = weakref.ref(layout(config, (config.num_patches,) * 2, None, device).encoder.chunks)
    for samples in range(3, 80):
        layout(config, (config.num_patches,) * samples, None, device)
    gc.collect()
    assert chunks() is not None
    assert torch.equal(sampler(), first)


def test_the_noise_to_start_from_is_left_as_it_is():
    x_T = torch.ones(1, 1, 4, 4)
    ddim_sample(linear_model("lin0p3", COSINE), x_T.shape, COSINE, num_steps=3, x_T=x_T)
    assert (x_T == 1).all()


@pytest.mark.gpu
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("sampler", ["ddim_sample", "both heads", "inpaint"])
def test_a_captured_step_has_the_bits_of_a_plain_one(eta, sampler):
    model, x = random_umd(UMDS["labels"], torch.float32).cuda(), torch.rand(3, 3, 8, 8, device="cuda")

    def seen(capture: str) -> list[Tensor]:
        given: list[Tensor] = []
        out = draw(
            sampler, model, x, num_steps=20, eta=eta, capture=capture,
            callback=lambda i, n, x_t, x_start: given.extend([x_t, x_start]),
        )  # fmt: skip
        return [*given, out]

    for plain, captured in zip(seen("off"), seen("on"), strict=True):
        assert torch.equal(plain, captured)


def test_capture_needs_a_gpu():
    with pytest.raises(UserError, match="--capture on needs a CUDA GPU"):
        ddim_sample(linear_model("lin0p3", COSINE), (1, 1, 4, 4), COSINE, num_steps=3, capture="on")


# Inpainting


def hole(B: int, H: int, W: int) -> Tensor:
    mask = torch.zeros(B, 1, H, W)
    mask[:, :, : H // 2, 1:] = 1
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bool, torch.uint8])
def test_kept_pixels_come_back_exactly(dtype, mask_dtype):
    x = torch.randn(3, 2, 4, 6, dtype=dtype, generator=torch.Generator().manual_seed(0))
    x[0, 0, -1, 0] = -0.0
    mask = hole(3, 4, 6)
    out = inpaint(linear_model("tdep", COSINE), x, mask.to(mask_dtype), COSINE, num_steps=5, resample=2)
    kept = (mask == 0).expand_as(x)
    assert out.dtype == dtype and out[kept].numpy().tobytes() == x[kept].numpy().tobytes()
    assert (out[~kept] != x[~kept]).all()


def test_the_hole_is_not_looked_at():
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    mask = hole(2, 4, 4)
    fillings = [
        inpaint(linear_model("tdep", COSINE), torch.where(mask.bool(), value, x), mask, COSINE, num_steps=5)
        for value in (torch.tensor(0.0), torch.tensor(7.0), torch.tensor(float("nan")))
    ]
    assert torch.equal(fillings[0], fillings[1]) and torch.equal(fillings[0], fillings[2])


def test_number_of_calls_grows_with_resample():
    for resample in (1, 3):
        counts = []
        inpaint(
            linear_model("tdep", COSINE), torch.zeros(1, 1, 4, 4), hole(1, 4, 4), COSINE, num_steps=5,
            resample=resample, callback=lambda i, n, x_t, x_start, counts=counts: counts.append((i, n)),
        )  # fmt: skip
        total = 5 * resample + 1  # the last of the 6 moves ends in the image and is made once
        assert counts == [(i, total) for i in range(total)]


def test_filling_does_not_depend_on_its_batch():
    x = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    denoise, mask = linear_model("tdep", COSINE), hole(4, 4, 4)
    whole = inpaint(denoise, x, mask, COSINE, num_steps=5, resample=2)
    part = inpaint(denoise, x[1:3], mask[1:3], COSINE, num_steps=5, resample=2, first_sample=1)
    assert torch.equal(whole[1:3], part)


@pytest.mark.parametrize(("steps", "resample"), [(500, 1), (250, 2)])
def test_independent_pixels_are_filled_from_their_own_distribution(steps, resample):
    """Kept pixels tell nothing: the filling has the data's mean and deviation (3 % and 4 standard errors)."""
    mean, std = 0.3, 0.5
    x, mask = (
        torch.full((4096, 1, 1, 2), 0.9),
        torch.tensor([0.0, 1.0]).view(1, 1, 1, 2).repeat(4096, 1, 1, 1),
    )
    denoise = gaussian_denoiser(COSINE, torch.full((2,), mean).double(), std**2 * torch.eye(2).double())
    filled = inpaint(denoise, x, mask, COSINE, num_steps=steps, resample=resample, clip=False, seed=3)[..., 1]
    assert abs(filled.mean() - mean) < 4 * std / 64
    assert abs(filled.std() / std - 1) < 0.03 + 4 / 64 / 2**0.5


def test_resampling_approaches_the_conditional_mean():
    """Two pixels of correlation 0.8: E[x1 | x0] = m1 + 0.8 (x0 - m0) for equal variances.

    Replacement alone goes 0.6 of the way from m1 to there, a known fault of it (Ho et al. 2022, "Video
    diffusion models", section 3.1); RePaint's resampling, 10 times a step, 0.95. Monte Carlo error: 0.01.
    """
    mean, std, rho, known, n = torch.tensor([0.2, -0.1]).double(), 0.5, 0.8, 0.9, 4096
    covariance = std**2 * torch.tensor([[1.0, rho], [rho, 1.0]]).double()
    shift = rho * (known - mean[0].item())  # of the mean of pixel 1, by knowing pixel 0
    x, mask = torch.full((n, 1, 1, 2), known), torch.tensor([0.0, 1.0]).view(1, 1, 1, 2).repeat(n, 1, 1, 1)
    denoise = gaussian_denoiser(COSINE, mean, covariance)
    way = {}
    for resample in (1, 3, 10):
        out = inpaint(denoise, x, mask, COSINE, num_steps=50, resample=resample, clip=False, seed=4)
        way[resample] = (out[..., 1].mean().item() - mean[1].item()) / shift
    assert 0.4 < way[1] < way[3] - 0.05 < way[10] - 0.1
    assert abs(way[10] - 1) < 0.1


# The denoising of an image


def test_denoising_sequence():
    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    times = [0, 1, 500, 1000]
    x_t, x_hat = denoising_sequence(linear_model("lin0p9", COSINE), x, COSINE, times)
    assert x_t.shape == x_hat.shape == (4, *x.shape)
    assert torch.equal(x_t[0], x)
    t = torch.tensor(times)
    eps = COSINE.eps_from_xstart(x_t[:, 0], t, x[0].expand(4, -1, -1, -1))
    torch.testing.assert_close(eps[1], eps[2], rtol=0, atol=1e-3)  # one noise for every time
    torch.testing.assert_close(eps[3], eps[2], rtol=0, atol=1e-3)
    for time, noised, predicted in zip(times, x_t, x_hat, strict=True):
        expected = COSINE.xstart_from_eps(noised, torch.full((2,), time), 0.9 * noised)
        torch.testing.assert_close(predicted, expected.clamp(-1, 1))


def test_an_exact_denoiser_errs_less_with_less_noise():
    mean, covariance = torch.zeros(16).double(), torch.eye(16).double() / 16
    x = torch.randn(256, 1, 4, 4, generator=torch.Generator().manual_seed(0)) / 4
    denoise = gaussian_denoiser(COSINE, mean, covariance)
    times = [1, 250, 500, 750, 1000]
    x_hat = denoising_sequence(denoise, x, COSINE, times)[1]
    mse = (x_hat - x).pow(2).mean((1, 2, 3, 4))
    alpha = COSINE.alphas_cumprod[times]
    expected = (1 - alpha) / 16 / (1 - alpha + alpha / 16)  # the variance left by the best estimate
    np.testing.assert_allclose(mse, expected, rtol=0.1)


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "cannot sample in 0 steps; the noise schedule allows 1 to 1000"),
        ({"num_steps": 1001}, "cannot sample in 1001 steps"),
        ({"eta": 1.5}, "eta is 1.5"),
        ({"predict": "v"}, "predict is 'v'"),
        ({"cfg_scale": 2.0}, "guidance .cfg_scale=2. needs labels"),
        ({"cfg_scale": 2.0, "labels": torch.tensor([0, 1])}, "needs labels and a model trained with them"),
        ({"labels": torch.tensor([0, 6]), "null_label": 5}, "label 6 does not exist; expected 0 to 4, or 5"),
        ({"labels": torch.tensor([-1, 2]), "null_label": 5}, "label -1 does not exist"),
    ],
)
def test_what_cannot_be_sampled(arguments, message):
    denoise = linear_model("lin0p3", COSINE)
    with pytest.raises(UserError, match=message):
        ddim_sample(denoise, (2, 3, 4, 4), COSINE, **arguments)
    with pytest.raises(UserError, match=message):
        inpaint(denoise, torch.zeros(2, 3, 4, 4), hole(2, 4, 4), COSINE, **arguments)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (hole(2, 4, 5), r"the mask is \[2, 1, 4, 5\]; expected \[2, 1, 4, 4\]"),
        (hole(2, 4, 4)[:, 0], r"the mask is \[2, 4, 4\]"),
        (hole(2, 4, 4).repeat(1, 3, 1, 1), r"the mask is \[2, 3, 4, 4\]"),
        (hole(2, 4, 4) * 255, "other values than 0 .keep. and 1 .remove."),
        (hole(2, 4, 4) * 0.5, "other values"),
        (torch.cat([hole(1, 4, 4), torch.zeros(1, 1, 4, 4)]), "keeps all of image 1"),
        (torch.cat([torch.ones(1, 1, 4, 4), hole(1, 4, 4)]), "removes all of image 0"),
    ],
)
def test_masks_that_cannot_be(mask, message):
    with pytest.raises(UserError, match=message):
        inpaint(linear_model("lin0p3", COSINE), torch.zeros(2, 3, 4, 4), mask, COSINE)


def test_other_mistakes():
    denoise, x = linear_model("lin0p3", COSINE), torch.zeros(2, 3, 4, 4)
    with pytest.raises(UserError, match="resample is 0"):
        inpaint(denoise, x, hole(2, 4, 4), COSINE, resample=0)
    with pytest.raises(UserError, match="time 1001 is outside"):
        denoising_sequence(denoise, x, COSINE, [0, 1001])
    with pytest.raises(ValueError, match=r"x_known is torch.uint8 \[2, 3, 4, 4\]"):
        inpaint(denoise, x.to(torch.uint8), hole(2, 4, 4), COSINE)
    with pytest.raises(ValueError, match=r"x_T is torch.float32 \[2, 3, 4, 4\]; expected .* \[1, 3, 4, 4\]"):
        ddim_sample(denoise, (1, 3, 4, 4), COSINE, x_T=x)
    with pytest.raises(ValueError, match=r"labels are torch.int64 \[3\]; expected int64 \[2\]"):
        ddim_sample(denoise, x.shape, COSINE, labels=torch.tensor([0, 1, 2]), null_label=9)
