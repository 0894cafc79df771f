"""The linear layer with its own bf16 backward: against torch's, in value, gradients and their types."""

import pytest
import torch
import torch.nn.functional as F

from umd.kernels.linear import few_rows_linear, gelu_linear, linear

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


def plain_gelu_linear(x, weight, bias):
    return F.linear(F.gelu(x, approximate="tanh"), weight, bias)


@pytest.mark.parametrize("shape", [*SHAPES, (300, 1024, 32)], ids=str)  # the last: several slices of GELU
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gelu_linear(compare, shape, dtype):
    compare(gelu_linear, plain_gelu_linear, draw(*shape, dtype, dtype))


def test_gelu_linear_far_out():
    """Large arguments: the cube neither overflows nor leaves NaN in the gradient."""
    x = torch.tensor([[-1e4, -50.0, 0.0, 50.0, 1e4]], dtype=torch.bfloat16, requires_grad=True)
    y = gelu_linear(x, torch.eye(5), torch.zeros(5))
    y.sum().backward()
    assert y.tolist() == [x.relu().flatten().tolist()]
    assert x.grad.tolist() == [[0.0, 0.0, 0.5, 1.0, 1.0]]


@pytest.mark.parametrize("shape", [(9, 24, 10_000), (1, 3, 4096), (2, 5, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_few_rows(compare, shape, dtype):
    compare(few_rows_linear, F.linear, draw(*shape, dtype, dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op, plain", [(linear, F.linear), (gelu_linear, plain_gelu_linear)], ids=["linear", "gelu"])
def test_fp32_parameters_under_autocast(shape, x_dtype, op, plain):
    """As accurate as autocast's own, in the same types; against fp64 of the inputs as bf16 rounds them."""
    args = draw(*shape, x_dtype, torch.float32)
    exact, theirs, ours = (run(op, args, dtype) for op, dtype in ((plain, torch.float64), (plain, None), (op, None)))
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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", [linear, gelu_linear], ids=["linear", "gelu"])
def test_narrow_gradients_are_the_same_numbers(shape, op):
    """Of a weight that is told to have its gradient in bf16: what autocast widens, before it does."""
    wide, narrow = (draw(*shape, torch.bfloat16, torch.float32) for _ in range(2))
    narrow["weight"].grad_dtype = torch.bfloat16
    gradients = []
    for args in (wide, narrow):
        leaves = {name: x.requires_grad_() for name, x in args.items()}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            op(**leaves).float().square().sum().backward()
        gradients.append({name: leaf.grad for name, leaf in leaves.items()})
    assert gradients[1]["weight"].dtype == torch.bfloat16 and gradients[1]["weight"].is_contiguous()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name].to(gradient.dtype), gradient), name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", [linear, gelu_linear], ids=["linear", "gelu"])
def test_weights_in_bf16_stay_what_they_are(shape, op):
    """There is no copy of them to put a gradient in."""
    args = {name: x.requires_grad_() for name, x in draw(*shape, torch.bfloat16, torch.bfloat16).items()}
    before = {name: x.detach().clone() for name, x in args.items()}
    op(**args).float().square().sum().backward()
    assert all(torch.equal(args[name], x) for name, x in before.items())


def test_a_narrow_gradient_is_not_copied():
    """It is made where the bf16 weight lay, and autograd takes it as it is."""
    x, weight = torch.randn(8, 16).bfloat16(), torch.randn(16, 16, requires_grad=True)
    weight.grad_dtype = torch.bfloat16
    out = linear(x, weight, torch.zeros(16).bfloat16())
    copy = next(t for t in out.grad_fn.saved_tensors if t.shape == weight.shape).data_ptr()
    out.sum().backward()
    assert weight.grad.data_ptr() == copy


@pytest.mark.parametrize("op", [linear, gelu_linear], ids=["linear", "gelu"])
def test_a_narrow_gradient_of_a_weight_that_lies_turned(op):
    x, bias = torch.randn(40, 16).bfloat16(), torch.zeros(24)
    turned = torch.randn(16, 24).t().requires_grad_()
    plain = turned.detach().contiguous().requires_grad_()
    for weight in (turned, plain):
        weight.grad_dtype = torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            op(x, weight, bias).float().square().sum().backward()
    assert torch.equal(turned.grad, plain.grad)


def test_few_rows_narrow():
    args = draw(9, 24, 5000, torch.float32, torch.float32)
    args["weight"].requires_grad_().grad_dtype = torch.bfloat16
    dy = torch.randn(9, 5000)
    few_rows_linear(**args).backward(dy)
    torch.testing.assert_close(args["weight"].grad, (dy.t() @ args["x"]).bfloat16(), rtol=2**-7, atol=1e-6)
