"""GELU in the products of an MLP: what is asked of Transformer Engine, what is made of its answers, and who refuses.

It is not installed here and needs a GPU. A package of its name, version and signature stands for it, which does by its
documentation and sources (2.20.2) the same in plain torch: operands column-major, a bias gradient of B's columns.
"""

import importlib.util
import re
import sys

import pytest
import torch
import torch.nn.functional as F

from umd import ops
from umd.blocks import Mlp
from umd.kernels import epilogues

GENERAL_GEMM = """
import torch
import torch.nn.functional as F


def general_gemm(
    A, B, out_dtype=None, quantization_params=None, gelu=False, gelu_in=None, alpha=1.0, beta=None, accumulate=False,
    layout="TN", out=None, bias=None, use_split_accumulator=False, grad=False, ub=None, ub_type=None,
    extra_output=None, bulk_overlap=False,
):
    assert all(x is None or (x.is_contiguous() and x.dtype == A.dtype) for x in (A, B, gelu_in))
    assert bias is None or grad or bias.dtype == A.dtype
    dtype = A.dtype if out_dtype is None else out_dtype
    a, b = (x.double().t() if side == "T" else x.double() for x, side in zip((A, B), layout))
    product, bias_grad, pre_gelu_out = b @ a, None, None
    if grad:
        if gelu:
            product = torch.ops.aten.gelu_backward(product, gelu_in.double(), approximate="tanh")
        if bias is not None:
            assert not gelu, "of out's columns, in memory of B's"
            bias_grad = B.double().sum(0).to(dtype)
    else:
        product = product if bias is None else product + bias.double()
        if gelu:
            pre_gelu_out = product.to(dtype)
            product = F.gelu(product, approximate="tanh")
    return product.to(dtype), bias_grad, pre_gelu_out, None
"""
PACKAGE = "transformer_engine/pytorch/cpp_extensions/__init__.py"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install(version, source of general_gemm's module)"""

    def make(version, source):
        info = tmp_path / f"transformer_engine-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformer_engine\nVersion: {version}\n")
        (tmp_path / PACKAGE).parent.mkdir(parents=True)
        for file in ("transformer_engine/__init__.py", "transformer_engine/pytorch/__init__.py"):
            (tmp_path / file).write_text("")
        (tmp_path / PACKAGE).write_text(source)
        epilogues._package_refusal.cache_clear()

    monkeypatch.syspath_prepend(tmp_path)
    for name in list(sys.modules):
        if name.partition(".")[0] == "transformer_engine":
            monkeypatch.delitem(sys.modules, name)
    yield make
    epilogues._package_refusal.cache_clear()
    for name in list(sys.modules):
        if name.partition(".")[0] == "transformer_engine":
            del sys.modules[name]


@pytest.fixture
def stand_in(install, monkeypatch):
    """The package, and a CPU in the place of its GPU."""
    install("2.20.2", GENERAL_GEMM)
    monkeypatch.setattr(epilogues, "_missing", lambda device: "")
    assert epilogues._package_refusal() == ""


def mlp(x, weight1, bias1, weight2, bias2, casts=(None, None)):
    h, a = epilogues.linear_gelu(x, weight1, bias1, casts[0])
    return epilogues.activated_linear(h, a, weight2, bias2, casts[1])


def plain(x, weight1, bias1, weight2, bias2):
    return F.linear(F.gelu(F.linear(x, weight1, bias1), approximate="tanh"), weight2, bias2)


def draw(N, D, hidden, dtype=torch.bfloat16, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = dict(x=(N, D), weight1=(hidden, D), bias1=(hidden,), weight2=(D, hidden), bias2=(D,))
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: (x / x.shape[-1] ** 0.5 if "weight" in name else x).to(device, dtype) for name, x in found.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients(compare, stand_in, dtype):
    """Against fp64, no two sizes the same."""
    for shape in ((1, 8, 16), (7, 16, 40), (50, 24, 96)):
        compare(mlp, plain, draw(*shape, dtype))


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_of_wide_weights(stand_in, autocast):
    """The step's casts: gradients come in the parameters' type, as wide as they were added up; and autocast's."""
    args = {name: x if name == "x" else x.float() for name, x in draw(50, 24, 96).items()}
    leaves = [x.requires_grad_() for x in args.values()]
    casts = [tuple(args[f"{kind}{i}"].detach().bfloat16() for kind in ("weight", "bias")) for i in (1, 2)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), ops.cpu_paths(False):
        y = mlp(*leaves, casts=(None, None) if autocast else casts)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    found = torch.autograd.grad(y, leaves, dy)
    exact = [x.detach().bfloat16().double().requires_grad_() for x in leaves]
    expected = torch.autograd.grad(plain(*exact), exact, dy.double())
    for name, a, b in zip(args, found, expected, strict=True):
        assert a.dtype == args[name].dtype, name
        assert (a - b).abs().max() <= 2**-6 * b.abs().max(), name
    rounded = found[1].bfloat16().float()
    assert torch.equal(rounded, found[1]) == autocast


@pytest.mark.parametrize("splits", [True, False])
def test_an_mlp_of_the_network(stand_in, splits):
    """The layer asks for the epilogues where they are chosen, with fc2's bias gradient left to the next op or not."""
    torch.manual_seed(0)
    net, x = Mlp(16, 64), torch.randn(9, 16).bfloat16()
    for layer in (net.fc1, net.fc2):
        layer.cast, layer.splits = (layer.weight.detach().bfloat16(), layer.bias.detach().bfloat16()), splits
    found = []
    for choice in ("ours", "transformer_engine"):
        with ops.cpu_paths(False), ops.kernels("reference" if not splits else "auto"), ops.gelu_by(choice):
            h, bias = net(x)
            h = ops.bias_gradient(h, bias)
        net.zero_grad()
        h.float().square().sum().backward()
        found.append([h.detach(), *(p.grad for p in net.parameters())])
    assert (bias is not None) == splits
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype and (a - b).abs().max() <= 2**-5 * a.abs().max()


def test_compiled_and_registered(stand_in):
    args = draw(5, 16, 24)
    leaves = [x.requires_grad_() for x in args.values()]

    def gradients(op):
        with ops.cpu_paths(False):
            y = op(*leaves)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]

    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(gradients(mlp), gradients(compiled), strict=True))
    x, weight, bias = (args[name].detach() for name in ("x", "weight1", "bias1"))
    h = x.new_ones(5, 24)
    for function, given in (
        (epilogues._linear_gelu, (x, weight, bias, weight, bias)),
        (epilogues._gelu_gradient, (x, args["weight2"].detach(), h)),
        (epilogues._weight_and_bias_gradient, (h, x, bias, torch.float32)),
    ):
        torch.library.opcheck(function.library, given)


@pytest.mark.parametrize(
    ("version", "source", "reason"),
    [
        ("2.9.0", "", "is version 2.9.0; expected 2.10 to 2.20"),
        ("3.0.0", "", "is version 3.0.0; expected 2.10 to 2.20"),
        ("2.12.0", "1 / 0", "2.12.0 does not import (ZeroDivisionError"),
        ("2.12.0", "", "2.12.0 has no general_gemm"),
        ("2.12.0", "def general_gemm(A, B, workspace): ...", "2.12.0: general_gemm takes (A, B, workspace), expected"),
        ("2.20.2", GENERAL_GEMM, "needs a CUDA GPU, not cpu"),
    ],
    ids=["older", "newer", "broken", "empty", "another signature", "no GPU"],
)
def test_another_package_is_not_called(install, version, source, reason):
    install(version, source)
    with pytest.raises(ValueError, match=re.escape(f"gelu: transformer_engine {reason}")):
        mlp(*draw(3, 8, 16).values())


def test_refusals_say_why(stand_in):
    for args, reason in (
        (draw(3, 8, 16, torch.float32), "takes bf16 and fp16, not float32"),
        (draw(3, 8, 12), "takes widths that are multiples of 8, not 12 and 8"),
    ):
        with pytest.raises(ValueError, match=f"^gelu: transformer_engine {reason}; 'ours' runs anywhere"):
            mlp(*args.values())
    with pytest.raises(ValueError, match="^gelu: expected one of ours, transformer_engine, got 'apex'"), \
            ops.gelu_by("apex"):  # fmt: skip
        pass


def test_without_the_package():
    if importlib.util.find_spec("transformer_engine"):
        pytest.skip("Transformer Engine is installed")
    epilogues._package_refusal.cache_clear()
    assert not ops.gelu_in_products()
    with pytest.raises(ValueError, match="gelu: transformer_engine is not installed; 'ours' runs anywhere"):
        mlp(*draw(3, 8, 16).values())


@pytest.mark.gpu
def test_the_real_one(compare):
    device = torch.device("cuda")
    if reason := epilogues.epilogues_refusal(device, torch.bfloat16):
        pytest.skip(f"Transformer Engine {reason}")
    for shape in ((64, 64, 256), (1808, 768, 3072)):
        args = draw(*shape, device=device)
        compare(mlp, plain, args)
        leaves = [x.requires_grad_() for x in args.values()]
        found = [torch.autograd.grad(mlp(*leaves).float().square().sum(), leaves) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), "not the same bits again"
