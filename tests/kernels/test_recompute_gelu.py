"""gelu_linear that makes GELU's output again in the backward pass: the kept path's bits, and less kept."""

import math

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from umd import ops
from umd.kernels import backend
from umd.kernels.linear import gelu_linear
from umd.kernels.triton import gelu as kernels

# Tests of the kernels alone; the CPU's own path makes GELU again whatever it is told.
KERNELS = ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)]
pytestmark = pytest.mark.parametrize("device", KERNELS, indirect=True)


def draw(N, inputs, outputs, dtype, device, cast=True):
    """As a layer has them in a step with cast weights, or with weights of x's own type."""
    generator = torch.Generator().manual_seed(0)
    shapes = dict(x=(N, inputs), x_bias=(inputs,), weight=(outputs, inputs), bias=(outputs,))
    found = {name: torch.randn(shape, generator=generator).to(device) for name, shape in shapes.items()}
    found["x"] = (2 * found["x"]).to(dtype)
    wide = torch.float32 if cast else dtype
    return {name: (x if name == "x" else x.to(wide)).requires_grad_() for name, x in found.items()}


def run(args, recompute, dtype=None, autocast=False):
    """Output and gradients. dtype: of the weights' casts."""
    with ops.cpu_paths(False), torch.autocast(args["x"].device.type, torch.bfloat16, enabled=autocast):
        cast = None if dtype is None else tuple(args[name].detach().to(dtype) for name in ("weight", "bias"))
        y = gelu_linear(args["x"], args["weight"], args["bias"], cast, args["x_bias"], recompute)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad(y, list(args.values()), dy)]


def same(kept, again):
    for name, a, b in zip(("y", "dx", "dx_bias", "dweight", "dbias"), kept, again, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b) and a.isfinite().all(), name


@pytest.mark.parametrize(
    ("cast", "dtype"),
    [("step", torch.bfloat16), ("step", torch.float16), ("none", torch.bfloat16), ("none", torch.float32),
     ("autocast", torch.bfloat16)],
    ids=str,
)  # fmt: skip
def test_the_same_bits(device, cast, dtype):
    """With the step's casts of fp32 weights, weights in x's type (ZeRO), and autocast's casts."""
    for N, F in [(0, 16), (7, 40), (70, 1032)]:
        args = draw(N, F, 24, dtype, device, cast != "none")
        kept, again = (run(args, on, dtype if cast == "step" else None, cast == "autocast") for on in (False, True))
        same(kept, again)


def test_outputs_made_again_are_the_forwards(device):
    """Every bf16 number, tails and infinities included; NaN where the forward has it."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).to(device)
    for dtype in (torch.bfloat16, torch.float32):
        h = bits.to(dtype).view(64, 1024)
        y = kernels.gelu_fwd(h, None)
        _, _, again = kernels.gelu_bwd(torch.ones_like(h), h, None, True)
        assert torch.equal(y.isnan(), again.isnan())
        assert torch.equal(y.nan_to_num(), again.nan_to_num())


def test_a_bias_of_its_own_and_frozen_weights(device):
    """Without a bias given for its gradient; and what needs no gradient gets none."""
    args = draw(9, 24, 8, torch.bfloat16, device)
    cast = args["weight"].detach().bfloat16(), args["bias"].detach().bfloat16()
    with ops.cpu_paths(False):
        ys = [gelu_linear(args["x"], args["weight"], args["bias"], cast, None, again) for again in (False, True)]
        kept, again = (torch.autograd.grad(y.float().sum(), (args["x"], args["weight"], args["bias"])) for y in ys)
        assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
        y = gelu_linear(args["x"], args["weight"].detach(), args["bias"].detach(), cast, None, True)
        y.float().sum().backward()
    assert torch.equal(args["x"].grad, kept[0])


def kept_bytes(recompute):
    """What a layer in bf16 keeps for its backward pass, each memory once."""
    held = {}

    def pack(x):
        held[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    args = draw(64, 256, 32, torch.bfloat16, "cpu")
    cast = args["weight"].detach().bfloat16(), args["bias"].detach().bfloat16()
    with ops.cpu_paths(False), saved_tensors_hooks(pack, lambda x: x):
        gelu_linear(args["x"], args["weight"], args["bias"], cast, args["x_bias"], recompute)
    return sum(held.values())


def test_keeps_x_alone(device):
    if device != "cpu":
        pytest.skip("counted once")
    assert kept_bytes(False) - kept_bytes(True) == 2 * 64 * 256  # gelu(x)
    assert kept_bytes(True) == 2 * (64 * 256 + 32 * 256)  # x, the weight's cast


def test_holds_no_parameter(device):
    """ZeRO 3 lets go of a parameter's memory behind the layer's forward pass, and fills new before its backward pass:
    what is there then is what counts."""
    args = draw(9, 24, 8, torch.bfloat16, device, cast=False)
    with ops.cpu_paths(False):
        y = gelu_linear(args["x"], args["weight"], args["bias"], None, args["x_bias"], True)
    (before,) = torch.autograd.grad(y.float().sum(), args["x"], retain_graph=True)
    args["weight"].data = 2 * args["weight"].data
    (after,) = torch.autograd.grad(y.float().sum(), args["x"])
    assert torch.equal(after, 2 * before)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_is_eager(device, compiler):
    args = draw(5, 32, 8, torch.bfloat16, device, cast=False)

    def op(x, x_bias, weight, bias):
        return gelu_linear(x, weight, bias, None, x_bias, True)

    def gradients(op):
        with ops.cpu_paths(False):
            y = op(*args.values())
            return [y.detach(), *torch.autograd.grad(y.float().square().sum(), list(args.values()))]

    compiled = torch.compile(op, fullgraph=True, backend=compiler)
    same(gradients(op), gradients(compiled))


def test_mutants_fail(device, mutant):
    """The output made again without its division, from clamped numbers, of the first rows."""
    if not backend.INTERPRET or device != "cpu":
        pytest.skip("mutants run in the interpreter")
    h = torch.linspace(-12, 12, 37 * 40).view(37, 40)
    h[36, 0] = -math.inf
    y = kernels.gelu_fwd(h, None).nan_to_num()
    for old, new in (
        ("(h / (1.0 + e)).to", "(h * (1.0 + e)).to"),
        ("(h / (1.0 + e)).to(y_ptr", "(tl.maximum(h, -5.0) / (1.0 + e)).to(y_ptr"),
        ("tl.store(y_ptr + offset + tile, (", "tl.store(y_ptr + tile, ("),
    ):
        wrong = mutant(kernels, old, new)
        assert not torch.equal(wrong.gelu_bwd(h, h, None, True)[2].nan_to_num(), y), (old, new)
    wrong = mutant(kernels, "tl.maximum(h, -10.0", "tl.maximum(h, -1e38")
    far = torch.full((2, 8), -1e15)
    assert not wrong.gelu_bwd(far, far, None, False)[0].isfinite().all()
    assert kernels.gelu_bwd(far, far, None, False)[0].isfinite().all()
