"""GELU with its bias's gradient, and column sums: the grid of shapes and types, repeats, registration, mutants."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from umd.kernels import backend, column_sum, gelu
from umd.kernels.triton import column_sum as sums
from umd.kernels.triton import gelu as kernels

ROWS = [0, 1, 5, 257, 1000]
WIDTHS = [192, 768, 1000, 3072, 4096]
TYPES = [torch.bfloat16, torch.float16, torch.float32]
KERNELS = ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)]


def inputs(N, width, dtype, bias=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    found = {"h": (2 * torch.randn(N, width, generator=generator)).to(device, dtype)}
    return found | ({} if bias is None else {"bias": torch.randn(width, generator=generator).to(device, bias)})


def plain(h, bias=None):
    """As anyone writes it; the bias is in h already, and adds nothing but its gradient."""
    h = h if bias is None else h + (bias - bias.detach())
    return F.gelu(h, approximate="tanh")


def run(op, args):
    """Output and gradients under a fixed random gradient."""
    leaves = [x.detach().requires_grad_() for x in args.values()]
    y = op(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def check_sum(op, x, dtype):
    """Against fp64: off by at most twice what torch is in fp32, and half a step of `dtype`."""
    total, exact = op(x, dtype), x.double().sum(0)
    assert total.shape == (x.shape[1],) and total.dtype == dtype
    assert total.isfinite().all(), "the sum is not finite"
    if exact.numel() == 0:
        return
    error, theirs = ((s.double() - exact).abs().max() for s in (total, x.float().sum(0)))
    allowed = 2 * theirs + (torch.finfo(dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps) * exact.abs().max()
    assert error <= allowed, f"sum: off by {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("device", KERNELS, indirect=True)
@pytest.mark.parametrize("width", WIDTHS)
def test_shapes(compare, device, width):
    """Each number of rows at each width, but for the largest of both; types, and biases of both types, in turn."""
    for i, N in enumerate(ROWS):
        if N * width > 300_000:
            continue
        case = i + WIDTHS.index(width)
        dtype = TYPES[case % 3]
        args = inputs(N, width, dtype, dtype if case % 2 else torch.float32, device)
        compare(gelu.gelu, plain, args)
        check_sum(column_sum.column_sum, args["h"], TYPES[(case + 1) % 3])


def grid(compare, device):
    for N, width, dtype in product(ROWS, WIDTHS, TYPES):
        for bias in {dtype, torch.float32}:
            compare(gelu.gelu, plain, inputs(N, width, dtype, bias, device))
            check_sum(column_sum.column_sum, inputs(N, width, dtype, None, device)["h"], bias)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["interpreter"], indirect=True)
def test_grid(compare, device):
    grid(compare, device)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_gpu_that_is_not_the_current_one():
    h = torch.randn(64, 32)
    with backend.kernels("triton"), torch.cuda.device(0):
        there, here = (gelu.gelu(h.to(device)) for device in ("cuda:1", "cuda:0"))
        assert there.device.index == 1 and torch.cuda.current_device() == 0
    assert torch.equal(there.cpu(), here.cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_grid_on_a_gpu(compare, device):
    grid(compare, device)
    for width in (3072, 4096):  # as many rows as a decoder's stream has
        compare(gelu.gelu, plain, inputs(65792, width, torch.bfloat16, torch.float32, device))
        check_sum(column_sum.column_sum, inputs(65792, width, torch.bfloat16, None, device)["h"], torch.float32)


def test_paths_without_kernels(compare, device):
    """fp64 on every device, and all types on the CPU, go to the definition."""
    for dtype in (torch.float64, torch.bfloat16):
        for bias in (dtype, None):
            compare(gelu.gelu, plain, inputs(7, 24, dtype, bias, device))
        check_sum(column_sum.column_sum, inputs(7, 24, dtype, None, device)["h"], dtype)


def test_no_columns(device):
    y, dh, dbias = run(gelu.gelu, inputs(5, 0, torch.float32, device=device))
    assert y.shape == dh.shape == (5, 0) and dbias.shape == (0,)
    assert column_sum.column_sum(dh, torch.float32).shape == (0,)


def test_no_rows_sum_to_zero(device):
    y, dh, dbias = run(gelu.gelu, inputs(0, 24, torch.bfloat16, device=device))
    assert y.shape == dh.shape == (0, 24) and dbias.tolist() == [0.0] * 24
    assert column_sum.column_sum(dh, torch.float32).tolist() == [0.0] * 24


@pytest.mark.parametrize("device", KERNELS, indirect=True)
def test_tails_keep_their_digits(device):
    """Where gelu(h) is next to nothing, and where h³ leaves what fp32 holds."""
    h = torch.tensor([0.0, 1e-30, 1e-8, 0.1, 1.0, 3.0, 5.0, 6.5, 20.0, 100.0, 1e4, 1e15])
    h = torch.cat([h, -h])[None].to(device).requires_grad_()
    exact = h.detach().double()
    u = math.sqrt(2 / math.pi) * (exact + 0.044715 * exact**3)
    s = torch.sigmoid(2 * u)
    du = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * exact**2)
    dh = s * (1 + exact * torch.sigmoid(-2 * u) * 2 * du)
    y = gelu.gelu(h)
    torch.testing.assert_close(y.double(), exact * s, rtol=1e-5, atol=1e-22)
    (found,) = torch.autograd.grad(y.sum(), h)
    torch.testing.assert_close(found.double(), dh, rtol=3e-5, atol=1e-18)


def test_the_gradient_of_the_bias_is_the_column_sum(device):
    """As in an MLP: added by a layer that has it detached, its gradient is made by gelu."""
    x, weight = torch.randn(9, 5, device=device), torch.randn(12, 5, device=device)
    bias = torch.randn(12, device=device).requires_grad_()
    dy = torch.randn(9, 12, device=device)
    (found,) = torch.autograd.grad(gelu.gelu(F.linear(x, weight, bias.detach()), bias), bias, dy)
    (expected,) = torch.autograd.grad(F.gelu(F.linear(x, weight, bias), approximate="tanh"), bias, dy)
    torch.testing.assert_close(found, expected)


def test_sums_are_of_numbers_before_they_are_rounded(device):
    """512 rows, whose roundings to bf16 add up."""
    if not backend.use_triton(torch.empty(0, device=device)):
        pytest.skip("the definition rounds first")
    args = inputs(512, 16, torch.bfloat16, device=device)
    _, dh, dbias = run(gelu.gelu, args)
    dy = torch.randn(512, 16, generator=torch.Generator().manual_seed(1)).bfloat16().double()
    h = args["h"].cpu().double().requires_grad_()
    (exact,) = torch.autograd.grad(F.gelu(h, approximate="tanh"), h, dy)
    torch.testing.assert_close(dbias.cpu().double(), exact.sum(0), rtol=1e-5, atol=1e-4)
    assert (dh.cpu().double().sum(0) - exact.sum(0)).abs().max() > 0.01


@pytest.mark.parametrize("device", KERNELS, indirect=True)
def test_a_frozen_bias_costs_no_sum(device, monkeypatch):
    def refuse(*_):
        raise AssertionError("column sums that nobody asked for")

    monkeypatch.setattr(kernels, "add_partials", refuse)
    for bias in (None, torch.zeros(24, device=device)):
        h = torch.randn(7, 24, device=device).requires_grad_()
        gelu.gelu(h, bias).sum().backward()
        assert h.grad.isfinite().all()


@pytest.mark.parametrize("device", KERNELS, indirect=True)
@pytest.mark.parametrize("zeros", [(0, 0), (768, 1536), (5, 700), (1100, 2304), (0, 2304)])
def test_columns_left_out_are_not_read(device, zeros):
    """Whole blocks of columns and parts of them; what is not left out keeps its bits."""
    x = inputs(100, 2304, torch.bfloat16, device=device)["h"]
    expected = column_sum.column_sum(x, torch.float32)
    x[:, slice(*zeros)] = math.nan
    expected[slice(*zeros)] = 0
    assert torch.equal(column_sum.column_sum(x, torch.float32, zeros), expected)


@pytest.mark.parametrize("device", KERNELS[1:], indirect=True)
def test_repeats_to_the_bit(device):
    args = inputs(257, 1032, torch.bfloat16, device=device)
    first, second = run(gelu.gelu, args), run(gelu.gelu, args)
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(first, second, strict=True))
    first, second = (column_sum.column_sum(args["h"], torch.float32) for _ in range(2))
    assert torch.equal(first, second)


def test_nan_is_not_hidden(device):
    y, dh, dbias = run(
        gelu.gelu, dict(h=torch.full((3, 8), math.nan, device=device), bias=torch.zeros(8, device=device))
    )
    assert all(t.isnan().all() for t in (y, dh, dbias))


@pytest.mark.parametrize("device", KERNELS, indirect=True)
def test_views(device):
    """h and x cut from a wider tensor, a gradient of strides zero."""
    wide = torch.randn(9, 40, device=device)
    h, dense = (x.requires_grad_() for x in (wide[:, 3:27], wide[:, 3:27].clone()))
    bias = torch.zeros(24, device=device).requires_grad_()
    found, expected = (torch.autograd.grad(gelu.gelu(x, bias).sum(), (x, bias)) for x in (h, dense))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for view in (wide[:, 3:27], wide.t()):
        total = column_sum.column_sum(view, torch.float32)
        assert torch.equal(
            total, column_sum.column_sum(view.clone(memory_format=torch.contiguous_format), torch.float32)
        )


@pytest.mark.parametrize("device", KERNELS, indirect=True)
@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16], ids=str)
def test_registration(device, bias):
    """Schema, fake tensors, autograd and tracing, as torch checks them."""
    args = {name: x.requires_grad_() for name, x in inputs(5, 24, torch.bfloat16, bias, device).items()}
    torch.library.opcheck(kernels.gelu_fwd.library, (args["h"], args.get("bias")))
    dy = torch.ones_like(args["h"].detach())
    torch.library.opcheck(kernels.gelu_bwd.library, (dy, args["h"].detach(), bias, bias is not None))
    torch.library.opcheck(sums.column_sum_fwd.library, (dy, torch.float32, 3, 7))


@pytest.mark.parametrize("device", KERNELS, indirect=True)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_is_eager(device, compiler):
    def op(h, bias):
        return gelu.gelu(h, bias) * column_sum.column_sum(h, torch.float32).to(h.dtype)

    for bias in (torch.float32, torch.bfloat16):
        args = inputs(5, 32, torch.bfloat16, bias, device)
        compiled = torch.compile(op, fullgraph=True, backend=compiler)
        for a, b in zip(run(op, args), run(compiled, args), strict=True):
            assert torch.equal(a, b)


def test_programs_follow_the_multiprocessors(monkeypatch):
    """All rows are shared out; no more programs than asked for, none with fewer rows than it is worth."""
    for count, N, least in product((1, 20, 108, 132), (1, 5, 257, 1808, 28928), (16, 48)):
        monkeypatch.setattr(sums, "multiprocessors", lambda device, count=count: count)
        (blocks, shares), rows = sums.share_rows(torch.empty(N, 3072, device="meta"), 4, 1024, 8, least)
        assert blocks == 3 and rows % 4 == 0
        assert shares * rows >= N > (shares - 1) * rows
        assert shares == 1 or (shares * blocks <= 8 * count and rows >= least)
    assert 2 * 132 <= blocks * shares <= 8 * 132
    (_, shares), _ = sums.share_rows(torch.empty(1808, 3072, device="meta"), 4, 1024, 8, 16)
    assert 3 * shares >= 2 * 132


def test_multiprocessors_within_a_graph():
    def op(x):
        return x * backend.multiprocessors(x.device)

    assert torch.compile(op, fullgraph=True, backend="eager")(torch.ones(1)).item() == 132
    if torch.cuda.is_available():
        assert backend.multiprocessors(torch.device("cuda", 0)) > 1


# A text in the kernels, what a careless edit would make of it, and how often it stands there.
MUTANTS = {
    "half of the argument": ("tl.exp2(h * (", "tl.exp2(0.5 * h * (", 1),
    "the other sign": ("-LOG2_E * CUBIC) - LOG2_E * LINEAR", "LOG2_E * CUBIC) + LOG2_E * LINEAR", 1),
    "no cubic term": ("h * h * (-LOG2_E * CUBIC)", "h * h * (-0.0 * CUBIC)", 1),
    "derivative of the cubic term": ("3.0 * CUBIC * h * h", "CUBIC * h * h", 1),
    "overflow in the tail": ("e = tl.minimum(e, 8.5e37)", "e = e", 1),
    "elements beyond the first block": ("start + i < n", "start + i < BLOCK", 1),
    "the gradient forgotten": ("dh = dy * (", "dh = (", 1),
    "sums of dy": ("tl.sum(dh, 0)", "tl.sum(dy, 0)", 1),
    "sums of the last tile": ("total += tl.sum(dh, 0)", "total = tl.sum(dh, 0)", 1),
    "half of the tiles never read": ("tl.range(0, count, BLOCK_M,", "tl.range(0, count, 2 * BLOCK_M,", 1),
    "partial sums on top of each other": ("part_ptr + tl.program_id(1)", "part_ptr + 0 * tl.program_id(1)", 1),
    "rows of the first program": ("first = tl.program_id(1) * rows", "first = 0 * tl.program_id(1) * rows", 1),
    "columns of the first program": ("tl.program_id(0) * BLOCK_F", "0 * tl.program_id(0) * BLOCK_F", 1),
    "a row too many": ("tl.minimum(rows, N - first)", "tl.minimum(rows + 1, N - first)", 1),
}
SUM_MUTANTS = {
    "sums of the last tile": ("total += tl.sum(tl.load(x_ptr", "total = tl.sum(tl.load(x_ptr", 1),
    "half of the tiles never read": ("tl.range(0, count, BLOCK_M,", "tl.range(0, count, 2 * BLOCK_M,", 1),
    "only the first partial sums": ("range(0, P, BLOCK_P)", "range(0, 1, BLOCK_P)", 1),
    "the last partial sums alone": ("total += tl.load(part_ptr", "total = tl.load(part_ptr", 1),
    "every column gets the first's": ("tl.program_id(0) * BLOCK_F", "0 * tl.program_id(0) * BLOCK_F", 2),
    "a row too many": ("tl.minimum(rows, N - first)", "tl.minimum(rows + 1, N - first)", 1),
    "too few programs": ("triton.cdiv(N, rows) if N", "N // rows if N", 1),
}


def fails(what, work):
    try:
        work()
    except AssertionError as error:
        assert "off by" in str(error) or "not finite" in str(error), what
    else:
        pytest.fail(f"not noticed: {what}")


@pytest.mark.parametrize("device", ["interpreter"], indirect=True)
def test_mutants_fail(compare, device, mutant):
    """In fp32: several programs and tiles, a tail of each, more columns than a block, an h in the far tail."""
    args = inputs(37, 1032, torch.float32)
    args["h"][3, 5] = -40.0
    compare(gelu.gelu, plain, args)
    for what, change in MUTANTS.items():
        wrong = mutant(gelu, *change)
        fails(what, lambda wrong=wrong: compare(wrong.gelu, plain, args))


@pytest.mark.parametrize("device", ["interpreter"], indirect=True)
def test_mutants_of_the_sum_fail(device, mutant, monkeypatch):
    """Two tiles a share, and more shares than the second launch takes at once."""
    x = inputs(1117, 40, torch.float32)["h"]
    monkeypatch.setattr(sums, "SUM_ROWS", 12)
    check_sum(column_sum.column_sum, x, torch.float32)
    for what, change in SUM_MUTANTS.items():
        wrong = mutant(sums, *change)
        wrong.SUM_ROWS = 12
        y = x if what != "every column gets the first's" else inputs(5, 1032, torch.float32)["h"]
        fails(
            what,
            lambda wrong=wrong, y=y: check_sum(
                lambda x, dtype, wrong=wrong: wrong.column_sum_fwd(x, dtype, 0, 0), y, torch.float32
            ),
        )


@pytest.mark.parametrize("device", ["interpreter"], indirect=True)
@pytest.mark.parametrize(
    ("module", "change"),
    [
        (gelu, ("start + i < n", "start + i < n + 1", 1)),
        (gelu, ("(row + tile_rows < count)[:, None]", "(row + tile_rows <= count)[:, None]", 1)),
        (gelu, ("& (cols < F)[None, :]", "& (cols <= F)[None, :]", 1)),
        (column_sum, ("(part < P)", "(part <= P)", 1)),
        (column_sum, ("(row + tile_rows < count)[:, None]", "(row + tile_rows <= count)[:, None]", 1)),
    ],
    ids=str,
)
def test_mutants_that_leave_their_tensors_fail(device, mutant, module, change):
    from triton.runtime.errors import InterpreterError

    def work(module):
        if module.__name__.rpartition(".")[2].startswith("gelu"):
            return run(module.gelu, inputs(9, 24, torch.float32))
        return module.column_sum(inputs(9, 24, torch.float32)["h"], torch.float32)

    work(module)
    with pytest.raises(InterpreterError, match="outside of the tensors given"):
        work(mutant(module, *change))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("h", torch.zeros(8)),
        ("h", torch.zeros(2, 4, 8)),
        ("h", torch.zeros(4, 8, dtype=torch.int32)),
        ("bias", torch.zeros(9)),
        ("bias", torch.zeros(1, 8)),
        ("bias", torch.zeros(8, dtype=torch.float16)),
        ("bias", torch.zeros(8, device="meta")),
    ],
    ids=lambda value: str(getattr(value, "shape", value)),
)
def test_refuses_by_name(device, name, value):
    args = dict(h=torch.zeros(4, 8, dtype=torch.bfloat16), bias=torch.zeros(8))
    gelu.gelu(**args)
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got "):
        gelu.gelu(**(args | {name: value}))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("x", (torch.zeros(8), torch.float32)),
        ("x", (torch.zeros(4, 8, dtype=torch.int64), torch.float32)),
        ("dtype", (torch.zeros(4, 8), torch.int64)),
        ("zeros", (torch.zeros(4, 8), torch.float32, (3, 9))),
        ("zeros", (torch.zeros(4, 8), torch.float32, (3, 2))),
    ],
)
def test_column_sum_refuses_by_name(device, name, args):
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got "):
        column_sum.column_sum(*args)
