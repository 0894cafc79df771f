"""The linear layer with its own bf16 backward: against torch's, in value, gradients and their types."""

import pytest
import torch
import torch.nn.functional as F

from umd.kernels.linear import linear

# Narrower, wider and equal outputs (the backward pass transposes the narrower operand), one token, none.
SHAPES = [(40, 16, 48), (40, 48, 16), (7, 8, 8), (1, 5, 3), (0, 4, 6)]  # N, inputs, outputs


def draw(N, inputs, outputs, x_dtype, weight_dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=generator) for shape in ((N, inputs), (outputs, inputs), (outputs,))
    )
    return {"x": x.to(x_dtype), "weight": weight.to(weight_dtype), "bias": bias.to(weight_dtype)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_one_type(compare, shape, dtype):
    compare(linear, F.linear, draw(*shape, dtype, dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp32_parameters_under_autocast(shape, x_dtype):
    """As accurate as autocast's own, in the same types; against fp64 of the inputs as bf16 rounds them."""
    args = draw(*shape, x_dtype, torch.float32)
    exact, theirs, ours = (
        run(op, args, dtype) for op, dtype in ((F.linear, torch.float64), (F.linear, None), (linear, None))
    )
    for name, truth in exact.items():
        assert ours[name].dtype == theirs[name].dtype and ours[name].shape == truth.shape, name
        if truth.numel():
            error, allowed = ((one[name].double() - truth).abs().max() for one in (ours, theirs))
            assert error <= 2 * allowed, name


def run(op, args, dtype):
    """Output and gradients under autocast, or in `dtype` from the rounded inputs."""
    leaves = [a if dtype is None else a.bfloat16().to(dtype) for a in args.values()]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
        y = op(*leaves)
    dout = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y.dtype)
    gradients = torch.autograd.grad(y, leaves, dout)
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(args, gradients, strict=True)}


def test_input_without_gradient():
    args = draw(6, 4, 8, torch.bfloat16, torch.float32)
    weight = args["weight"].requires_grad_()
    linear(args["x"], weight, args["bias"]).sum().backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.abs().sum() > 0
