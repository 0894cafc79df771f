"""Guidance over times and channels, and both heads as one: closed forms."""

import math

import pytest
import torch
from torch import Tensor

from umd.errors import UserError
from umd.guidance import Guidance
from umd.heads import between, head_products, head_times, head_weights
from umd.noise import Noise
from umd.sampler import ddim_sample, model_times
from umd.schedule import NoiseSchedule

COSINE = NoiseSchedule("cosine")
LABELS, NULL = torch.tensor([0, 2, 1]), 3


def denoise(x_t: Tensor, timesteps: Tensor, labels: Tensor | None):
    """Two heads that differ, by label."""
    labels = torch.full((len(x_t),), NULL) if labels is None else labels
    slope = 0.1 * (1 + labels).view(-1, 1, 1, 1)
    return slope.sin() * x_t, slope.cos() * x_t


def draw(model=denoise, **changes) -> Tensor:
    arguments = dict(num_steps=10, labels=LABELS, null_label=NULL, cfg_scale=1.5, seed=2, eta=0.0) | changes
    return ddim_sample(model, (3, 4, 4, 4), COSINE, **arguments)


def guided_by(scale, channels: int = 4, predict: str = "eps", weights: Tensor | None = None):
    """A denoiser that is guided already, by a scale of the time, and answers as ε and as the image of it."""

    def call(x_t, timesteps, _):
        time = int(timesteps[0])
        cond = denoise(x_t, timesteps, LABELS)
        uncond = denoise(x_t, timesteps, torch.full_like(LABELS, NULL))
        x_start, eps = (c.clone() for c in cond)
        for whole, c, u in ((x_start, *(p[0] for p in (cond, uncond))), (eps, *(p[1] for p in (cond, uncond)))):
            whole[:, :channels] = (u + scale(time) * (c - u))[:, :channels]
        if weights is not None:
            w = float(weights[time])
            x_start = w * x_start + (1 - w) * COSINE.xstart_from_eps(x_t, timesteps, eps)
        return x_start, eps

    return call


def counted(**changes) -> tuple[list[int], Tensor]:
    calls: list[int] = []

    def counting(x_t, timesteps, labels):
        calls.append(len(x_t))
        return denoise(x_t, timesteps, labels)

    return calls, draw(counting, **changes)


# Over time


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_an_interval_of_all_times_and_one_of_none_are_what_there_was_before(eta):
    guided, plain = draw(eta=eta), draw(cfg_scale=1.0, eta=eta)
    assert torch.equal(draw(guidance=Guidance(interval=(1, 1000)), eta=eta), guided)
    assert torch.equal(draw(guidance=Guidance(interval=(2, 90)), eta=eta), plain), "between two times"
    assert torch.equal(draw(guidance=Guidance(channels=4), eta=eta), guided)
    assert not torch.allclose(guided, plain)


def test_an_interval_saves_the_calls_outside():
    interval = (301, 700)
    calls, out = counted(guidance=Guidance(interval=interval))
    inside = [interval[0] <= time <= interval[1] for time in model_times(10)]
    assert calls == [6 if yes else 3 for yes in inside] and 0 < sum(inside) < len(inside)
    scale = lambda time: 1.5 if interval[0] <= time <= interval[1] else 1.0  # noqa: E731
    torch.testing.assert_close(out, draw(guided_by(scale), cfg_scale=1.0))


@pytest.mark.parametrize(
    ("schedule", "strength"), [("linear", lambda u: 2 - 2 * u), ("cosine", lambda u: 1 + math.cos(math.pi * u))]
)
def test_schedules(schedule, strength):
    scale = lambda time: 1 + 0.5 * strength(time / 1000)  # noqa: E731
    out = draw(guidance=Guidance(schedule=schedule))
    torch.testing.assert_close(out, draw(guided_by(scale), cfg_scale=1.0))
    scales = Guidance(schedule=schedule).scales(3.0, range(1, 1001), 1000)
    assert sum(scales) / 1000 == pytest.approx(3.0, abs=0.01), "as much as a constant one"
    assert scales == sorted(scales, reverse=True) and scales[-1] == pytest.approx(1)


# Over channels and heads


def test_channels_that_are_not_guided_are_the_labelled_ones():
    calls, out = counted(guidance=Guidance(channels=3))
    assert calls == [6] * 11
    torch.testing.assert_close(out, draw(guided_by(lambda time: 1.5, channels=3), cfg_scale=1.0))
    plain = draw(cfg_scale=1.0)  # the denoiser mixes no channels
    torch.testing.assert_close(out[:, 3:], plain[:, 3:])
    assert not torch.allclose(out[:, :3], plain[:, :3])


@pytest.mark.parametrize("guidance", [None, Guidance((200, 600), "linear", 2)])
def test_both_heads_are_guided_before_they_are_weighed(guidance):
    weights = torch.linspace(0, 1, 1001)
    scales = (guidance or Guidance()).scales(1.5, range(1, 1001), 1000)
    channels = guidance.channels if guidance else 4
    expected = guided_by(lambda time: scales[time - 1], channels, weights=weights)
    out = draw(predict="both", head_weights=weights, guidance=guidance)
    torch.testing.assert_close(out, draw(expected, cfg_scale=1.0, predict="x_start"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("weight", "head"), [(0.0, "eps"), (1.0, "x_start")])
def test_all_the_weight_on_one_head_is_that_head(weight, head):
    out = draw(predict="both", head_weights=torch.full((1001,), weight))
    torch.testing.assert_close(out, draw(predict=head), rtol=1e-4, atol=1e-5)


# The weights


def test_two_independent_errors_weigh_as_the_inverse_of_their_variances():
    """x̂0 errs by N(0, 0.3²), the image of ε̂ by N(0, s²): w = s² / (0.3² + s²). 2^16 pixels: to 0.01."""
    times, x = head_times(1000), Noise(7, 0, (16, 1, 64, 64), "cpu").draw(0)
    deviations = {time: 0.05 + time / 1000 for time in times}

    def noisy(x_t, timesteps, labels):
        time, errors = int(timesteps[0]), Noise(8, 0, x_t.shape, "cpu")
        a, b = (table[0] for table in COSINE.coefficients(timesteps))
        y = x + deviations[time] * errors.draw(2 * time)
        return x + 0.3 * errors.draw(2 * time + 1), (x_t - a * y) / b

    products = head_products(noisy, x, COSINE, times)
    expected = [s**2 / (0.09 + s**2) for s in deviations.values()]
    assert head_weights(products) == pytest.approx(expected, abs=0.01)
    parts = [
        head_products(lambda x_t, t, y, part=part: tuple(o[part] for o in noisy(wide(x_t, part), t, y)), x[part],
                      COSINE, times, first_sample=part.start)
        for part in (slice(0, 5), slice(5, 16))
    ]  # fmt: skip
    torch.testing.assert_close(sum(parts), products, rtol=1e-5, atol=1e-3)


def wide(x_t: Tensor, part: slice) -> Tensor:
    """A part of 16 pictures at its place among all, zeros elsewhere."""
    whole = x_t.new_zeros(16, *x_t.shape[1:])
    whole[part] = x_t
    return whole


def test_weights_stay_between_nothing_and_all():
    """Two errors of one sign call for more than all of the smaller one."""
    x = torch.zeros(2, 1, 4, 4)

    def both_off(sign: float):
        def call(x_t, timesteps, labels):
            a, b = (table[0] for table in COSINE.coefficients(timesteps))
            return x + (0.2 if sign > 0 else 0.1), (x_t - a * (x + (0.1 if sign > 0 else 0.2))) / b

        return call

    assert head_weights(head_products(both_off(1), x, COSINE, [500])) == [0]
    assert head_weights(head_products(both_off(-1), x, COSINE, [500])) == [1]


def test_weights_between_the_times_lie_on_straight_lines():
    weights = between([1, 100, 200], [0.0, 0.5, 1.0], 300)
    assert len(weights) == 301
    assert [round(float(weights[t]), 3) for t in (0, 1, 100, 150, 200, 300)] == [0, 0, 0.5, 0.75, 1, 1]
    assert head_times(1000) == [1, *range(100, 1001, 100)] and head_times(3) == [1, 2, 3]


def test_a_network_of_one_head_has_no_weights():
    def one_head(x_t, timesteps, labels):
        eps = 0.9 * x_t
        return COSINE.xstart_from_eps(x_t, timesteps, eps), eps

    x = Noise(7, 0, (4, 3, 8, 8), "cpu").draw(0)
    with pytest.raises(UserError, match="this network has one head"):
        head_weights(head_products(one_head, x, COSINE, head_times(1000)))


# Mistakes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"guidance": Guidance(interval=(700, 300))}, "cfg_interval is 700 300; expected two model times, from and to"),
        ({"guidance": Guidance(interval=(0, 300))}, "of 1 to 1000"),
        ({"guidance": Guidance(interval=(1, 1001))}, "cfg_interval is 1 1001"),
        ({"guidance": Guidance(schedule="step")}, "unknown cfg_schedule 'step'; expected one of constant, linear, cos"),
        ({"guidance": Guidance(channels=5)}, "cfg_channels is 5; these images have 4 channels, 0 is all"),
        ({"guidance": Guidance(channels=-1)}, "cfg_channels is -1"),
        ({"predict": "both"}, "predict is 'both', and the weights of the two heads are not given"),
    ],
)
def test_what_cannot_be_guided(changes, said):
    with pytest.raises(UserError, match=said):
        draw(**changes)
