import pytest
import torch
from torch import nn

from umd.ema import EMA, ema_rate, warm_rate


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).to(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.detach().numpy().tobytes() == b.detach().numpy().tobytes()


def test_rate_follows_the_batch():
    # the released code decays by 0.9999 at batch 256 and 0.9996 at 1024; 2.5e-4 is the paper's Table 5
    assert ema_rate(256) == 1e-4
    assert ema_rate(1024) == pytest.approx(4e-4)
    assert ema_rate(512, 2.5e-4) == pytest.approx(5e-4)


def test_closed_form_after_n_steps():
    # with the parameters held at c after a start at a, n steps leave c + (1 - rate)ⁿ (a - c)
    model = small_model(torch.float64)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    ema = EMA(model, rate=0.03)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.5)
    for _ in range(20):
        ema.update(model)
    for name, p in model.named_parameters():
        expected = p + (1 - 0.03) ** 20 * (start[name] - p)
        torch.testing.assert_close(ema.state_dict()[name], expected.detach(), rtol=1e-13, atol=1e-13)


def test_moving_parameters_are_the_weighted_sum():
    # shadow_n = (1-r)ⁿ p_0 + Σ r (1-r)ⁿ⁻ⁱ p_i
    model, rate = nn.Linear(1, 1, bias=False).double(), 0.1
    values = [2.0, -1.0, 0.5, 4.0]
    with torch.no_grad():
        model.weight.fill_(values[0])
        ema = EMA(model, rate)
        for value in values[1:]:
            model.weight.fill_(value)
            ema.update(model)
    expected = (1 - rate) ** 3 * values[0] + sum(rate * (1 - rate) ** (3 - i) * values[i] for i in (1, 2, 3))
    assert ema.state_dict()["weight"].item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_applied_swaps_and_restores_every_bit(dtype):
    model = small_model(dtype)
    ema = EMA(model, 0.25)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
        model[0].bias[0], model[0].bias[1] = float("nan"), -0.0
    ema.load_state_dict({name: torch.randn_like(shadow) for name, shadow in ema.state_dict().items()})
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    identities = [id(p) for p in model.parameters()]
    with ema.applied(model) as swapped:
        assert swapped is model
        for name, p in model.named_parameters():
            assert same_bits(p, ema.state_dict()[name])
    for name, p in model.named_parameters():
        assert same_bits(p, own[name])
    assert [id(p) for p in model.parameters()] == identities


def test_applied_restores_after_an_error():
    model = small_model()
    ema = EMA(model, 1.0)
    with torch.no_grad():
        model[0].weight.add_(1)
    own = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match="sampling failed"), ema.applied(model):
        assert not torch.equal(model[0].weight, own)
        raise RuntimeError("sampling failed")
    assert torch.equal(model[0].weight, own)


def test_bf16_model_keeps_float32_shadows():
    # a step of 1e-4 · (2 - 1) from 1 is far below bf16's spacing of 2⁻⁷ there, and must not be lost
    model = nn.Linear(4, 4).bfloat16()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    ema = EMA(model, 1e-4)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(2.0)
    for _ in range(10):
        ema.update(model)
    for shadow in ema.state_dict().values():
        assert shadow.dtype == torch.float32
        torch.testing.assert_close(shadow, torch.full_like(shadow, 2 - (1 - 1e-4) ** 10), rtol=0, atol=1e-6)
    with ema.applied(model):
        assert model.weight.dtype == torch.bfloat16
        assert (model.weight == 1).all()
    assert (model.weight == 2).all()


def test_saved_state_continues_bit_exactly():
    def run(model: nn.Module, ema: EMA, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn_like(p))
            ema.update(model)

    straight = small_model()
    straight_ema = EMA(straight, 0.01)
    run(straight, straight_ema, range(9))

    first = small_model()
    first_ema = EMA(first, 0.01)
    run(first, first_ema, range(4))
    saved = {name: shadow.clone() for name, shadow in first_ema.state_dict().items()}
    second = small_model()
    second_ema = EMA(second, 0.01)
    second.load_state_dict(first.state_dict())
    second_ema.load_state_dict(saved)
    run(second, second_ema, range(4, 9))
    for name, shadow in straight_ema.state_dict().items():
        assert same_bits(shadow, second_ema.state_dict()[name])


def test_shadows_share_no_memory_and_carry_no_graph():
    model = small_model()
    ema = EMA(model, 0.5)
    model(torch.randn(2, 5)).sum().backward()
    ema.update(model)
    for name, p in model.named_parameters():
        shadow = ema.state_dict()[name]
        assert shadow.data_ptr() != p.data_ptr()
        assert not shadow.requires_grad


def test_new_parameters_are_named():
    model = small_model()
    ema = EMA(model, 0.5)
    model.labels = nn.Embedding(4, 7)
    with pytest.raises(ValueError, match=r"the model has labels.weight, which the EMA does not average: start the EMA"):
        ema.update(model)


def test_mismatches_are_named_and_change_nothing():
    model = small_model()
    ema = EMA(model, 0.5)
    before = {name: shadow.clone() for name, shadow in ema.state_dict().items()}
    state = {name: shadow + 1 for name, shadow in before.items()}
    without = {name: value for name, value in state.items() if name != "2.bias"}
    with pytest.raises(ValueError, match=r"the saved EMA lacks 2\.bias"):
        ema.load_state_dict(without)
    with pytest.raises(ValueError, match=r"the saved EMA has extra"):
        ema.load_state_dict({**state, "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"2\.bias is \[4\] in the saved EMA and \[3\]"):
        ema.load_state_dict({**state, "2.bias": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"the model lacks 0\.bias and 5 more"), ema.applied(nn.Flatten()):
        pass
    assert all(torch.equal(before[name], shadow) for name, shadow in ema.state_dict().items())


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.5, float("nan")])
def test_rates_outside_zero_to_one_are_refused(rate):
    with pytest.raises(ValueError, match="rate"):
        EMA(small_model(), rate)


def test_a_short_run_forgets_its_start():
    """Decay min(1 - rate, (1 + n)/(10 + n)), as TensorFlow documents its ExponentialMovingAverage."""
    for step in (0, 1, 7, 90, 10**6):
        assert warm_rate(1e-4, step) == pytest.approx(1 - min(1 - 1e-4, (1 + step) / (10 + step)), rel=1e-9)
    start_share = 1.0
    for step in range(100):
        start_share *= 1 - warm_rate(1e-4, step)
    assert start_share < 1e-6
