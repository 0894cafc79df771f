"""Noise schedules against the UMD authors' code, and the algebra of their conversions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from umd.errors import UserError
from umd.schedule import NoiseSchedule

ORACLE = np.load(Path(__file__).parents[1] / "data" / "gaussian_diffusion.npz")
NAMES = ("cosine", "linear")
SCHEDULES = {name: NoiseSchedule(name) for name in (*NAMES, "linear_rho")}


def images(name: str) -> torch.Tensor:
    return torch.from_numpy(ORACLE[name]).permute(0, 3, 1, 2)  # NHWC to NCHW


@pytest.mark.parametrize("name", NAMES)
def test_tables_equal_the_oracle(name):
    """The oracle counts from diffusion index s; ours is model time s + 1, and time 0 is noise-free."""
    schedule = SCHEDULES[name]
    assert schedule.betas.dtype == schedule.alphas_cumprod.dtype == torch.float64
    np.testing.assert_allclose(schedule.betas, ORACLE[f"{name}::betas"], rtol=1e-12, atol=0)
    assert schedule.alphas_cumprod.shape == (1001,) and schedule.alphas_cumprod[0] == 1
    np.testing.assert_allclose(schedule.alphas_cumprod[1:], ORACLE[f"{name}::alphas_cumprod"], rtol=1e-12, atol=0)
    np.testing.assert_allclose(schedule.alphas_cumprod[:-1], ORACLE[f"{name}::alphas_cumprod_prev"], rtol=1e-12, atol=0)
    a, b = schedule.coefficients(torch.arange(1, 1001), torch.float64)
    np.testing.assert_allclose(a, ORACLE[f"{name}::sqrt_alphas_cumprod"], rtol=1e-12, atol=0)
    np.testing.assert_allclose(b, ORACLE[f"{name}::sqrt_one_minus_alphas_cumprod"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_conversions_equal_the_oracle(name):
    schedule, x_start, eps = SCHEDULES[name], images("q_x0"), images("q_eps")
    t = torch.from_numpy(ORACLE["q_t"]).long().flatten() + 1

    def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
        # Relative to the image's largest value: dividing by √ᾱ makes it 2e4 at the last times.
        scale = expected.abs().amax((1, 2, 3), keepdim=True).clamp(min=1)
        assert ((actual - expected).abs() / scale).max() < 1e-6

    close(schedule.q_sample(x_start, t, eps), images(f"{name}::q_sample"))
    # The oracle calls both with x_t = q_x0 and the other argument = q_eps.
    close(schedule.xstart_from_eps(x_start, t, eps), images(f"{name}::predict_xstart_from_eps"))
    close(schedule.eps_from_xstart(x_start, t, eps), images(f"{name}::predict_eps_from_xstart"))


def test_linear_rho_is_the_linear_schedule_to_a_power():
    linear = ORACLE["linear::betas"]
    np.testing.assert_allclose(SCHEDULES["linear_rho"].betas, linear**0.8, rtol=1e-12)
    np.testing.assert_allclose(NoiseSchedule("linear_rho", rho=1.0).betas, linear, rtol=1e-12)
    noisier, plain = SCHEDULES["linear_rho"].alphas_cumprod, SCHEDULES["linear"].alphas_cumprod
    assert (noisier[1:] < plain[1:]).all()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_steps", [21, 50, 4000])
def test_other_numbers_of_steps(name, num_steps):
    schedule = NoiseSchedule(name, num_steps)
    assert schedule.betas.shape == (num_steps,) and schedule.alphas_cumprod.shape == (num_steps + 1,)
    assert ((schedule.betas > 0) & (schedule.betas < 1)).all()
    assert (schedule.alphas_cumprod.diff() < 0).all() and schedule.alphas_cumprod[-1] > 0


@given(
    name=st.sampled_from(list(SCHEDULES)),
    time=st.integers(1, 1000),
    x=st.floats(-1, 1),
    e=st.floats(-6, 6),
)
def test_round_trips(name, time, x, e):
    schedule, t = SCHEDULES[name], torch.tensor([time])
    x_start, eps = torch.tensor([[x]], dtype=torch.float64), torch.tensor([[e]], dtype=torch.float64)
    x_t = schedule.q_sample(x_start, t, eps)
    # Rounding of x_t is divided by √ᾱ (2e-5 at the last cosine time) or √(1-ᾱ) (6e-3 at the first).
    torch.testing.assert_close(schedule.xstart_from_eps(x_t, t, eps), x_start, rtol=0, atol=1e-9)
    torch.testing.assert_close(schedule.eps_from_xstart(x_t, t, x_start), eps, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_zero_is_the_image_itself(name):
    schedule, t = SCHEDULES[name], torch.tensor([0, 500])
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    eps = torch.ones_like(x)
    assert torch.equal(schedule.q_sample(x, t, eps)[0], x[0])
    assert torch.equal(schedule.xstart_from_eps(x, t, eps)[0], x[0])
    back = schedule.eps_from_xstart(x, t, 0.5 * x)
    assert (back[0] == 0).all() and (back[1] != 0).all()
    back.sum().backward()
    assert x.grad.isfinite().all()


def test_coefficients_keep_shape_and_dtype():
    schedule, t = SCHEDULES["cosine"], torch.tensor([[0, 1, 2], [3, 500, 1000]])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        a, b = schedule.coefficients(t, dtype)
        assert a.shape == b.shape == t.shape and a.dtype == b.dtype == dtype
        assert torch.equal(a, schedule.alphas_cumprod.sqrt()[t].to(dtype))
    x = torch.ones(6, 1, dtype=torch.bfloat16)
    assert schedule.q_sample(x, t.flatten(), x).dtype == torch.float32
    assert schedule.q_sample(x.double(), t.flatten(), x).dtype == torch.float64
    # Computed in float64 throughout: √ᾱ² + (1-ᾱ) leaves a float32 table only to 1e-7.
    a, b = schedule.coefficients(t, torch.float64)
    torch.testing.assert_close(a**2 + b**2, torch.ones_like(a), rtol=0, atol=1e-15)


def test_compiles_whole():
    schedule, x = NoiseSchedule("cosine"), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1, 900])
    compiled = torch.compile(lambda x, t: schedule.q_sample(x, t, x), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(compiled(x, t), schedule.q_sample(x, t, x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "quadratic"},
            "unknown noise schedule 'quadratic'; expected one of cosine, linear, linear_rho",
        ),
        ({"num_steps": 0}, "at least one step"),
        ({"name": "linear", "num_steps": 20}, "use 21 or more"),
        ({"name": "linear_rho", "rho": 0.0}, "rho is 0.0"),
    ],
)
def test_impossible_schedules(arguments, message):
    with pytest.raises(UserError, match=message):
        NoiseSchedule(**arguments)


def test_one_time_for_each_image():
    with pytest.raises(ValueError, match=r"timesteps are \[3\]; expected \[2\]"):
        SCHEDULES["cosine"].q_sample(torch.zeros(2, 1), torch.tensor([1, 2, 3]), torch.zeros(2, 1))
