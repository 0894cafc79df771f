"""Samplers against diffusers' own, and on data whose exact denoiser is a formula."""

import pytest
import torch
from torch import Tensor

from umd.errors import UserError
from umd.guidance import Guidance
from umd.noise import Noise
from umd.sampler import ddpm_times
from umd.schedule import NoiseSchedule
from umd.schedulers import open_sampler, sampler_times

diffusers = pytest.importorskip("diffusers")

SCHEDULES = {name: NoiseSchedule(name) for name in ("cosine", "linear", "edm")}
SHAPE = (4, 3, 8, 8)
SOLVERS = ("dpm++", "heun", "unipc")
SAMPLERS = ("ddim", "ddpm", *SOLVERS)
MEAN, STD = 0.3, 0.5


def gaussian(schedule: NoiseSchedule, variance: float | None = None):
    """The exact denoiser of pixels from N(0.3, 0.5²), whose third output, where it has one, is v = `variance`·x_t."""

    def denoise(x_t, timesteps, labels):
        a, b = (table[0] for table in schedule.coefficients(timesteps, torch.float64))
        x_start = MEAN + a * STD**2 / (a**2 * STD**2 + b**2) * (x_t.double() - a * MEAN)
        found = x_start.to(x_t), ((x_t.double() - a * x_start) / b).to(x_t)
        return found if variance is None else (*found, (variance * x_t).clamp(-1, 1))

    return denoise


def sampler(name: str, denoise, schedule: NoiseSchedule, shape=SHAPE, **changes):
    arguments = dict(
        num_steps=20, eta=1.0, clip=False, labelled=False, null_label=None, cfg_scale=1.0, seed=3, device="cpu",
        capture="auto",
    )  # fmt: skip
    return open_sampler(name, denoise, shape, schedule, **(arguments | changes))


def error(actual: Tensor, expected: Tensor) -> float:
    """Of a share of the largest value, or of 1."""
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


# Against diffusers


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_our_ddim_is_that_of_diffusers(name, eta, clip):
    """With the same noise at the same times, 999, 949, …, 49; ours then goes on to 0."""
    schedule, seen = SCHEDULES[name], []
    denoise, noise = gaussian(schedule), Noise(3, 0, SHAPE, "cpu")
    sampler("ddim", denoise, schedule, eta=eta, clip=clip)(callback=lambda i, n, *pair: seen.append(pair))
    theirs = diffusers.DDIMScheduler(
        trained_betas=schedule.betas.numpy(), clip_sample=clip, timestep_spacing="trailing"
    )  # fmt: skip
    theirs.set_timesteps(20)
    assert theirs.timesteps.tolist() == [time - 1 for time in sampler_times("ddim", 20, schedule)[:-1]]
    x = noise.draw(0)
    for i, timestep in enumerate(theirs.timesteps):
        _, eps = denoise(x, torch.full((4,), int(timestep) + 1), None)
        step = theirs.step(
            eps, int(timestep), x, eta, use_clipped_model_output=True, variance_noise=noise.draw(1 + i)
        )  # fmt: skip
        assert error(seen[i][0], x) < 1e-4 and error(seen[i][1], step.pred_original_sample) < 1e-4, i
        x = step.prev_sample


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_our_ddpm_is_that_of_diffusers(monkeypatch, name, learned):
    """With the same noise, with variances of its own and with those of a denoiser that has learned them."""
    schedule, noise, drawn = SCHEDULES[name], Noise(3, 0, SHAPE, "cpu"), []
    denoise = gaussian(schedule, 0.7 if learned else None)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor",
        lambda *_, **__: drawn.append(None) or noise.draw(len(drawn)),
    )  # fmt: skip
    theirs = diffusers.DDPMScheduler(
        trained_betas=schedule.betas.numpy(), clip_sample=False, timestep_spacing="linspace",
        variance_type="learned_range" if learned else "fixed_small",
    )  # fmt: skip
    theirs.set_timesteps(23)
    assert theirs.timesteps.tolist() == [time - 1 for time in sampler_times("ddpm", 23, schedule)]
    x = noise.draw(0)
    for timestep in theirs.timesteps:
        _, *outputs = denoise(x, torch.full((4,), int(timestep) + 1), None)
        x = theirs.step(torch.cat(outputs, 1), timestep, x).prev_sample
    assert error(sampler("ddpm", denoise, schedule, num_steps=23)(), x) < 1e-4


def test_ddpm_is_ddim_with_all_the_noise_where_their_times_are_the_same():
    schedule = NoiseSchedule("linear", 50)
    ddim, ddpm = (sampler(name, gaussian(schedule), schedule, num_steps=50)() for name in ("ddim", "ddpm"))
    assert torch.equal(ddim, ddpm)


def test_learned_variances_lie_between_ddpms_two():
    """v = -1 is DDPM with the least variance, which is DDIM's, up to rounding; v = 1 has more."""
    schedule, plain = SCHEDULES["linear"], sampler("ddpm", gaussian(SCHEDULES["linear"]), SCHEDULES["linear"])()

    def with_v(v: float) -> Tensor:
        denoise = gaussian(schedule)
        return sampler("ddpm", lambda x, t, y: (*denoise(x, t, y), torch.full_like(x, v)), schedule)()

    assert error(with_v(-1), plain) < 1e-5 and error(with_v(1), plain) > 0.01


@pytest.mark.parametrize("steps", [1, 7, 250, 1000])
def test_ddpms_times_are_dits(steps):
    """DiT's `space_timesteps`: a running sum of (T - 1) / (n - 1), rounded."""
    expected = [round(i * 999 / (steps - 1)) for i in range(steps)] if steps > 1 else [999]
    assert ddpm_times(steps) == [index + 1 for index in reversed(expected)]


# Data whose exact denoiser is known


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_solvers_follow_the_flow_of_a_gaussian(name, solver):
    """Without noise x_T becomes m + s·(x_T - a·m)/√(a²s² + b²), with a and b of the first time; the error falls with
    the steps."""
    schedule = SCHEDULES[name]
    x_T = Noise(3, 0, SHAPE, "cpu").draw(0)

    def missed(steps: int) -> float:
        drawn = sampler(solver, gaussian(schedule), schedule, num_steps=steps)
        a, b = (table[0] for table in schedule.coefficients(torch.tensor([drawn.times[0]])))
        exact = MEAN + STD * (x_T - a * MEAN) / (a**2 * STD**2 + b**2).sqrt()
        return error(drawn(), exact)

    assert missed(60) < 0.01 and missed(60) < 0.1 * missed(10)


@pytest.mark.parametrize(("solver", "steps"), [("ddpm", 400), ("dpm++", 50), ("heun", 50), ("unipc", 50)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_gaussian_data_keep_mean_and_variance(name, solver, steps):
    """Over 2^15 pixels: mean to 4 standard errors, variance to 5 %; DDPM's few steps shrink it."""
    out = sampler(solver, gaussian(SCHEDULES[name]), SCHEDULES[name], (32, 1, 32, 32), num_steps=steps)()
    assert abs(out.mean() - MEAN) < 4 * STD / out.numel() ** 0.5 + 0.002
    assert abs(out.var() / STD**2 - 1) < 0.05


# What holds for each


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(name):
    schedule = SCHEDULES["cosine"]
    denoise = gaussian(schedule, 0.5)
    whole = sampler(name, denoise, schedule, (5, 3, 5, 3), num_steps=6)()
    for first, n in ((0, 2), (2, 3), (4, 1)):
        part = sampler(name, denoise, schedule, (n, 3, 5, 3), num_steps=6)
        assert torch.equal(part(first_sample=first), whole[first : first + n])
        assert torch.equal(part(first_sample=first), whole[first : first + n]), "again"
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("name", SAMPLERS)
def test_calls_are_at_the_times_that_are_told(name):
    """And the last call's image is the sample; x_t is what the denoiser was given."""
    schedule, asked, seen = SCHEDULES["linear"], [], []

    def denoise(x_t, timesteps, labels):
        asked.append((x_t.clone(), int(timesteps[0])))
        return gaussian(schedule)(x_t, timesteps, labels)

    out = sampler(name, denoise, schedule, num_steps=7)(callback=lambda *call: seen.append(call))
    assert [time for _, time in asked] == sampler_times(name, 7, schedule)
    assert [call[:2] for call in seen] == [(i, len(asked)) for i in range(len(asked))]
    assert all(torch.equal(call[2], x_t) for call, (x_t, _) in zip(seen, asked, strict=True))
    assert torch.equal(out, seen[-1][3])


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_take_guidance_clipping_and_either_head(name):
    schedule = SCHEDULES["linear"]
    labels = torch.tensor([0, 1, 2, 0])

    def denoise(x_t, timesteps, labels):
        x_start, eps = gaussian(schedule)(x_t, timesteps, None)
        return x_start, eps + (0 if labels is None else 0.1 * labels.view(-1, 1, 1, 1))

    def drawn(**changes) -> Tensor:
        arguments = dict(labelled=True, null_label=3, num_steps=8) | changes
        return sampler(name, denoise, schedule, **arguments)(labels)

    plain = drawn()
    assert torch.equal(drawn(guidance=Guidance(interval=(2, 2)), cfg_scale=2.0), plain), "no such time"
    assert not torch.allclose(drawn(cfg_scale=2.0), plain)
    assert drawn(clip=True, cfg_scale=5.0).abs().max() <= 1
    exact = sampler(name, gaussian(schedule), schedule, num_steps=8, predict="x_start")()
    torch.testing.assert_close(drawn(predict="x_start", cfg_scale=2.0), exact)
    both = torch.ones(1001)
    torch.testing.assert_close(drawn(predict="both", head_weights=both, cfg_scale=2.0), exact)


# Mistakes


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("euler", {}, "unknown sampler 'euler'; expected one of ddim, ddpm, dpm"),
        ("ddpm", {"num_steps": 0}, "cannot sample in 0 steps; the noise schedule allows 1 to 1000"),
        (
            "dpm++",
            {"num_steps": 0},
            r"dpm\+\+ cannot sample in 0 steps; with this noise schedule it takes 1 to 99[0-9]",
        ),
        ("heun", {"num_steps": 1000}, "heun cannot sample in 1000 steps"),
        ("unipc", {"eta": 0.5}, "eta is 0.5, and it is DDIM's alone; leave it out with unipc"),
        ("heun", {"capture": "on"}, "--capture on is for ddim and ddpm; a step of heun is decided on the host"),
        ("unipc", {"cfg_scale": 2.0}, "guidance .cfg_scale=2. needs labels"),
        ("heun", {"predict": "both"}, "the weights of the two heads are not given"),
    ],
)
def test_what_cannot_be_sampled(name, changes, said):
    schedule = SCHEDULES["cosine"]
    with pytest.raises(UserError, match=said):
        sampler(name, gaussian(schedule), schedule, **changes)()


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("T", [5, 22, 1000])
def test_the_fewest_and_the_most_steps_go(name, T):
    schedule = NoiseSchedule("cosine", T)
    most = 2
    while True:
        try:
            sampler_times(name, most + 1, schedule)
        except UserError:
            break
        most += 1
    for steps in (1, most) if T < 1000 else (1,):
        drawn = sampler(name, gaussian(schedule), schedule, (1, 1, 2, 2), num_steps=steps)
        assert len(set(drawn.times)) == steps and drawn().isfinite().all()
