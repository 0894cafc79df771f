"""A second derivative is refused: lost in silence, it would make a gradient penalty wrong."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from umd.kernels.adaln import gated_residual_layer_norm, modulated_layer_norm
from umd.kernels.attention import varlen_attention
from umd.kernels.backend import kernels
from umd.kernels.gelu import gelu
from umd.kernels.linear import gelu_linear, linear
from umd.kernels.packing import pack


class Seen(TorchDispatchMode):
    """With a mode on, ops are called as operators that torch knows by name."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def narrow(op):
    """The op with casts of its weight and bias."""
    weight, bias = torch.randn(16, 16), torch.randn(16)
    return lambda x: op(x, weight, bias, cast=(weight.bfloat16(), bias.bfloat16())).float()


def attended(x):
    return varlen_attention(torch.cat([x, x, x], 1).view(5, 3, 1, 16), pack([5])).float()


def weight_of_linear(x):
    return linear(torch.ones(3, 16), x, torch.zeros(5), cast=(x.detach().bfloat16(), torch.zeros(5).bfloat16()))


@pytest.mark.parametrize("seen", [False, True], ids=["eager", "under a mode"])
@pytest.mark.parametrize(
    "choice, dtype, op",
    [
        ("triton", torch.float32, lambda x: gelu(x, x[0])),
        ("triton", torch.float32, lambda x: modulated_layer_norm(x, pack([2, 3]))),
        ("triton", torch.float32, lambda x: gated_residual_layer_norm(x, x, pack([5]), gate=x[:1])[1]),
        ("triton", torch.bfloat16, attended),
        ("reference", torch.bfloat16, attended),
        ("reference", torch.float32, narrow(linear)),
        ("reference", torch.float32, weight_of_linear),
        ("reference", torch.bfloat16, lambda x: gelu_linear(x, torch.eye(16).bfloat16(), torch.zeros(16).bfloat16())),
        ("reference", torch.bfloat16, lambda x: gated_residual_layer_norm(x, x, pack([5]), gate=x[:1])[1]),
    ],
)  # fmt: skip
def test_a_second_derivative_raises(seen, choice, dtype, op):
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    with kernels(choice), Seen() if seen else torch.enable_grad():
        loss = op(x).float().sum() + x.float().square().sum()  # alone, the square's second derivative would come
        (plain,) = torch.autograd.grad(loss, x, retain_graph=True)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        assert torch.equal(gradient, plain)
        with pytest.raises(RuntimeError, match=r"no second derivative|no autograd formula"):
            gradient.sum().backward()
