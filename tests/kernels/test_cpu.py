"""What is compiled for the CPU: against fp64, on every bf16 number or drawn ones; the same bits on any number of
threads; and how the library is built, kept, and done without."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from umd.kernels.adaln import gated_residual_layer_norm, modulated_layer_norm
from umd.kernels.cpu import compiled as cpu
from umd.kernels.packing import pack

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(bool(cpu.compiler_lacks()), reason=f"nothing is compiled: {cpu.compiler_lacks()}")
BF16 = torch.bfloat16


def every_bf16() -> torch.Tensor:
    return torch.arange(2**16).to(torch.uint16).view(BF16)


def test_gelu_of_every_number():
    x = every_bf16()
    ours, exact = cpu.gelu(x), F.gelu(x.double(), approximate="tanh")
    assert torch.equal(ours.isnan(), exact.isnan())  # of NaN, and of -inf: 0·inf
    finite = x.isfinite()
    torch.testing.assert_close(ours[finite].double(), exact[finite], rtol=2**-8, atol=1e-4)
    near = finite & (x.abs() < 5)
    half_ulp = 2.0 ** (exact.abs().clamp(min=2**-126).log2().floor() - 8)
    assert ((ours.double() - exact).abs() <= 1.01 * half_ulp)[near & (exact.abs() > 1e-6)].all()


def test_gelus_derivative_at_every_number():
    x = every_bf16()
    leaf = x.double().requires_grad_()
    F.gelu(leaf, approximate="tanh").sum().backward()
    activation, dx = cpu.gelu_backward(x, torch.ones_like(x))
    assert torch.equal(activation.view(torch.int16), cpu.gelu(x).view(torch.int16))
    assert dx[x.isnan()].isnan().all()
    middle = x.abs() < 1e18  # beyond, torch's own formula overflows
    torch.testing.assert_close(dx[middle].double(), leaf.grad[middle], rtol=2**-8, atol=1e-4)


def test_rounding_is_to_nearest_even():
    """gelu(x) = x where σ is 1: what comes out went through fp32 and back."""
    x = torch.tensor([16.0, 100.5, 2.0**100, float("inf")]).bfloat16()
    assert torch.equal(cpu.gelu(x), x)
    halves = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-16, -1 - 2**-8])
    assert halves.bfloat16().tolist() == [1.0, 1 + 2**-6, 1 + 2**-7, -1.0]  # what torch does
    # r = x + gate·h with x = 0 and h = 1 is the gate, rounded
    packing = pack([1])
    r, *_ = cpu.layer_norm(
        torch.zeros(1, 4).to(BF16), torch.ones(1, 4).to(BF16), halves[None], torch.ones(1, 4), torch.zeros(1, 4),
        packing, 1e-6,
    )  # fmt: skip
    assert torch.equal(r[0], halves.bfloat16())


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 90), min_size=1, max_size=4), st.sampled_from([1, 3, 16, 40, 257]), st.booleans(),
    st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_the_norms_are_as_exact_as_bf16_lets_them(lengths, D, one_row, gated, seed):
    """Against the formula in fp64 on the same numbers: the rounding of the result and, of sums, of fp32."""
    generator = torch.Generator().manual_seed(seed)
    packing = pack(lengths, [0] * len(lengths) if one_row else None)
    N, R = packing.num_tokens, packing.num_rows
    x, h = (torch.randn(N, D, generator=generator).to(BF16) for _ in range(2))
    gate, shift, scale = (torch.randn(R, D, generator=generator) for _ in range(3))
    rows = torch.tensor([row for row, n in zip(packing.cond_index.tolist(), lengths, strict=True) for _ in range(n)])
    rows = rows.long()
    dr, dy = (torch.randn(N, D, generator=generator).to(BF16) for _ in range(2))

    def exact(x, h, gate, shift, scale):
        r = x + gate[rows] * h if gated else x
        r = r + (r.detach().to(BF16).double() - r.detach())  # the norm is of r as it is stored
        return r, F.layer_norm(r, (D,), eps=1e-6) * (1 + scale[rows]) + shift[rows]

    ours, theirs = leaves(x, h, gate, shift, scale), leaves(*(t.double() for t in (x, h, gate, shift, scale)))
    if gated:
        r, y = gated_residual_layer_norm(ours[0], ours[1], packing, *ours[2:])
        torch.autograd.backward((r, y), (dr, dy))
    else:
        y = modulated_layer_norm(ours[0], packing, *ours[3:])
        y.backward(dy)
    exact_r, exact_y = exact(*theirs)
    torch.autograd.backward(
        (exact_r, exact_y) if gated else (exact_y,), (dr.double(), dy.double())[0 if gated else 1 :]
    )
    for name, a, b in [("y", y, exact_y)] + [
        (n, p.grad, q.grad) for n, p, q in zip(("dx", "dh", "dgate", "dshift", "dscale"), ours, theirs, strict=True)
    ]:
        if a is None:
            assert not gated and name in ("dh", "dgate")
        elif a.numel():
            of_sums = 1e-5 * max(1.0, N**0.5) if D > 1 else 1.0  # of one column LN leaves nothing, divided by nothing
            limit = (2**-8 if a.dtype == BF16 else 1e-4) * b.abs().max() + of_sums * 10
            assert (a.double() - b).abs().max() <= limit, name


def test_tables_whose_columns_lie_apart():
    """A table may have any strides, e.g. those of a transposed one."""
    x, packing = torch.randn(6, 40).to(BF16), pack([2, 4])
    gate, shift, scale = (torch.randn(40, 2).t() for _ in range(3))
    turned = gated_residual_layer_norm(x, x, packing, gate, shift, scale)
    plain = gated_residual_layer_norm(x, x, packing, *(t.contiguous() for t in (gate, shift, scale)))
    assert torch.equal(turned[0], plain[0]) and torch.equal(turned[1], plain[1])
    y = modulated_layer_norm(x, packing, shift=shift)
    exact = F.layer_norm(x.double(), (40,), eps=1e-6) + shift.double()[[0, 0, 1, 1, 1, 1]]
    assert (y.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_the_same_bits_on_any_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    packing = pack([130, 70, 5])
    x, h, dr, dy = (torch.randn(205, 96, generator=generator).to(BF16) for _ in range(4))
    gate, alpha, beta = (torch.randn(3, 96, generator=generator) for _ in range(3))
    weight, few = torch.randn(3000, 96, generator=generator), torch.randn(3, 96, generator=generator)
    upstream = torch.randn(3, 3000, generator=generator)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            r, y, mean, rstd = cpu.layer_norm(x, h, gate, alpha, beta, packing, 1e-6)
            backward = cpu.layer_norm_backward(dr, dy, r, h, gate, alpha, mean, rstd, packing)
            rows = cpu.few_rows_linear_backward(few, weight, upstream, torch.float32)
            large = torch.randn(50_000, generator=torch.Generator().manual_seed(1)).to(BF16)
            turned = cpu.transpose(x, x.new_empty(96, 205))
            moved = [weight.clone(), large.float()]
            moments = ([torch.zeros_like(w) for w in moved] for _ in range(2))
            cpu.adamw_(moved, [weight, large], *moments, [1, 7], 0.3, 1e-2, (0.9, 0.95), 0.05, 1e-8)
            found.append([r, y, *backward, *rows, cpu.gelu(large), cpu.square_sum([large, weight]), turned, *moved])
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@settings(max_examples=40)
@given(st.integers(1, 12), st.integers(1, 70), st.integers(1, 2100), st.sampled_from([torch.float32, BF16]))
def test_few_rows_and_their_gradients(R, inputs, outputs, grad_dtype):
    generator = torch.Generator().manual_seed(R + inputs + outputs)
    x, weight, dy = (torch.randn(*s, generator=generator) for s in ((R, inputs), (outputs, inputs), (R, outputs)))
    bias = torch.randn(outputs, generator=generator)
    y = cpu.few_rows_linear(x, weight, bias)
    torch.testing.assert_close(y.double(), F.linear(x.double(), weight.double(), bias.double()), rtol=1e-5, atol=1e-4)
    dx, dweight = cpu.few_rows_linear_backward(x, weight, dy, grad_dtype)
    torch.testing.assert_close(dx.double(), dy.double() @ weight.double(), rtol=1e-5, atol=1e-3)
    assert dweight.dtype == grad_dtype
    tolerance = 2**-8 if grad_dtype == BF16 else 1e-5
    torch.testing.assert_close(dweight.double(), dy.double().t() @ x.double(), rtol=tolerance, atol=1e-5)


def test_adamw_is_torchs():
    """Five steps of torch's in fp64, with a gradient that clipping halves; one of the tensors has made two before."""
    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.float32, BF16, BF16, torch.float32]
    weights = [torch.randn(n, generator=generator) for n in (5001, 5001, 0, 3)]
    theirs = [w.double().requires_grad_() for w in weights]
    options = dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.05, eps=1e-8)
    optimizers = [torch.optim.AdamW([w], **options) for w in theirs]
    averages, squares = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for round_ in range(-2, 5):
        taking = range(4) if round_ >= 0 else [1]
        gradients = [torch.randn(w.shape, generator=generator).to(d) for w, d in zip(weights, dtypes, strict=True)]
        for i in taking:
            theirs[i].grad = gradients[i].double() / 2
            optimizers[i].step()
        steps = [round_ + (3 if i == 1 else 1) for i in taking]
        versions = [w._version for w in weights]
        lists = ([x[i] for i in taking] for x in (weights, gradients, averages, squares))
        cpu.adamw_(*lists, steps, 0.5, **options)
        assert all(weights[i]._version == versions[i] + 1 for i in taking)  # autograd sees that it was changed
    for ours, other in zip(weights, theirs, strict=True):
        torch.testing.assert_close(ours.double(), other.detach(), rtol=0, atol=1e-6)


@given(st.lists(st.tuples(st.integers(0, 5000), st.sampled_from([torch.float32, BF16])), max_size=4))
@settings(max_examples=20)
def test_sum_of_squares(kinds):
    generator = torch.Generator().manual_seed(len(kinds))
    tensors = [torch.randn(n, generator=generator).to(dtype) for n, dtype in kinds]
    expected = sum((x.double().square().sum() for x in tensors), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(cpu.square_sum(tensors), expected, rtol=1e-6, atol=0)


@given(st.integers(1, 300), st.integers(1, 300))
@settings(max_examples=40)
def test_transpose(rows, columns):
    """Every number at its place, and none outside."""
    x = torch.arange(rows * columns, dtype=torch.int32).to(torch.int16).view(BF16).view(rows, columns)
    around = torch.full((columns + 2, rows), -1, dtype=torch.int16).view(BF16)
    assert torch.equal(cpu.transpose(x, around[1:-1]).view(torch.int16), x.view(torch.int16).t())
    assert (around[[0, -1]].view(torch.int16) == -1).all()


def test_only_plain_bf16_on_the_cpu_is_compiled():
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = torch.randn(2, 3).to(BF16)
    assert cpu.use_compiled(x) and not cpu.use_compiled(x.float()) and cpu.use_compiled(x.float(), torch.float32)
    assert not cpu.use_compiled(x.to("meta"))
    with FakeTensorMode() as mode:
        assert not cpu.use_compiled(mode.from_tensor(x))


# The library


def test_it_is_compiled_once(tmp_path):
    built = cpu.build(tmp_path / "new")
    stamp = built.stat().st_mtime_ns
    assert cpu.build(tmp_path / "new") == built and built.stat().st_mtime_ns == stamp
    assert list(built.parent.iterdir()) == [built]  # and nothing else is left


def test_another_compiler_or_processor_makes_another(tmp_path, monkeypatch):
    built = {cpu.build(tmp_path)}
    monkeypatch.setattr(cpu, "_processor", lambda: "another")
    built.add(cpu.build(tmp_path))
    assert len(built) == 2


@pytest.mark.parametrize("compiler, said", [("no-such-compiler", "no no-such-compiler"), ("false", "exit status 1")])
def test_why_it_cannot_be_compiled(compiler, said, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(cpu.CannotCompile, match=said):
        cpu.build(tmp_path)
    assert list(tmp_path.iterdir()) == []


STEP = """
import torch
from umd import ops
torch.manual_seed(0)
x = torch.randn(64, 32).bfloat16().requires_grad_()
weight, bias = torch.randn(32, 32).requires_grad_(), torch.randn(32).requires_grad_()
packing, shift = ops.pack([40, 24]), torch.randn(2, 32).requires_grad_()
with torch.autocast("cpu", dtype=torch.bfloat16):
    y = ops.gelu_linear(ops.modulated_layer_norm(x, packing, shift), weight, bias)
y.float().square().mean().backward()
print(repr(ops.compiler_lacks()))
print([float(t.grad.double().square().sum()) for t in (x, weight, bias, shift)])
"""


def numbers(**changed: str) -> tuple[str, list[float]]:
    """What STEP tells in a process of its own: what is lacking, and gradients' squares."""
    env = os.environ | {"PYTHONPATH": str(ROOT)} | changed
    done = subprocess.run([sys.executable, "-c", STEP], env=env, capture_output=True, text=True, check=True)
    lacks, gradients = map(ast.literal_eval, done.stdout.splitlines())
    return lacks, gradients


def test_without_a_compiler_the_numbers_are_the_same(tmp_path):
    (lacks, compiled), (lacks_one, plain) = numbers(), numbers(CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path))
    assert (lacks, lacks_one) == ("", "no no-such-compiler")
    assert compiled == pytest.approx(plain, rel=0.01)


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("")
    assert numbers(XDG_CACHE_HOME=str(tmp_path / "file"), TMPDIR=str(tmp_path)) == numbers()
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
