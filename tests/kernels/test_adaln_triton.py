"""The Triton norms: the grid of shapes and types, repeats, registration, compilation, and mutants that must fail."""

import random
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from umd.kernels import backend
from umd.kernels.adaln import gated_residual_layer_norm, modulated_layer_norm
from umd.kernels.packing import pack
from umd.kernels.triton import adaln as kernels

WIDTHS = [192, 768, 1000, 1024, 1152]  # ViT-Ti, B, no multiple of 16, L, XL
TYPES = [torch.bfloat16, torch.float16, torch.float32]
LENGTHS = [1, 5, 68, 164, 257]  # UMD's packed lengths at 256 pixels and patches of 16, a whole sample, and small ones
KERNELS = ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)]
RAGGED = ([3, 0, 1, 5, 4], [2, 1, 0, 2, 1])


MIXED = [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]  # of the residual stream, of branch and norm


def inputs(packing, D, dtype, tables, affine=True, residual=True, mean=0.0, narrow=None):
    """Arguments of gated_residual_layer_norm, or without `residual` of modulated_layer_norm; tables are views.

    narrow: h's type, if it is not x's.
    """
    device, generator = packing.cu_seqlens.device, torch.Generator().manual_seed(0)

    def draw(*shape, dtype):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    N, R = packing.num_tokens, packing.num_rows
    shift, scale, gate = draw(R, 6 * D, dtype=tables).chunk(6, dim=-1)[:3]
    found = {"x": (draw(N, D, dtype=torch.float32) + mean).to(dtype)}
    if residual:
        found |= {"h": draw(N, D, dtype=narrow or dtype), "gate": gate}
    found |= {"shift": shift, "scale": scale}
    found |= {"weight": 1 + draw(D, dtype=tables), "bias": draw(D, dtype=tables)} if affine else {}
    return found | ({"h_bias": draw(D, dtype=tables)} if residual else {})


def plain(packing, rms=False, narrow=None):
    """The op of these arguments as anyone writes it, in the type of its inputs; in fp32 y is rounded to `narrow`."""

    def op(x, h=None, gate=None, shift=None, scale=None, weight=None, bias=None, h_bias=None):
        h = h if h_bias is None else h + (h_bias - h_bias.detach())
        rows = packing.cond_index.repeat_interleave(packing.cu_seqlens.diff())
        r = x if h is None else x + (h if gate is None else h * gate[rows])
        if rms:
            y = F.rms_norm(r, r.shape[-1:], weight, 1e-6)
            y = y if bias is None else y + bias
        else:
            y = F.layer_norm(r, r.shape[-1:], weight, bias, 1e-6)
        y = y if scale is None else y * (1 + scale[rows])
        y = y if shift is None else y + shift[rows]
        y = y.to(narrow) if narrow and y.dtype == torch.float32 else y
        return y if h is None else (r, y)

    return op


def ours(packing, rms=False, narrow=None):
    def op(x, h=None, **tables):
        if h is None:
            return modulated_layer_norm(x, packing, **tables, rms=rms, dtype=narrow)
        return gated_residual_layer_norm(x, h, packing, **tables, rms=rms)

    return op


def only(op, i):
    """The op with one output."""
    return lambda **tensors: op(**tensors)[i]


def run(op, args):
    """Outputs and gradients under fixed random gradients."""
    tensors = {name: t.detach().requires_grad_() for name, t in args.items()}
    outputs = op(**tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    douts = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, list(tensors.values()), douts)]


@pytest.mark.parametrize("device", KERNELS, indirect=True)
@pytest.mark.parametrize("dtype", [TYPES[0], pytest.param(TYPES[1], marks=pytest.mark.slow), TYPES[2]], ids=str)
@pytest.mark.parametrize("D", WIDTHS)
def test_widths_and_types(compare, device, D, dtype):
    """Tables of both types, with LN's affine and without, in turn."""
    case = WIDTHS.index(D) + TYPES.index(dtype)
    packing = pack([5, 68, 0, 1, 9], [1, 0, 2, 1, 1], device)
    args = inputs(packing, D, dtype, dtype if case % 2 else torch.float32, affine=case % 3 > 0, residual=case % 4 > 0)
    compare(ours(packing), plain(packing), args)


@pytest.mark.parametrize("device", KERNELS, indirect=True)
@pytest.mark.parametrize("D", WIDTHS)
def test_widths_of_rms_and_mixed_types(compare, device, D):
    """RMSNorm of one type, then an fp32 stream with branches of 16 bits: the other types, tables and norms in turn."""
    case = WIDTHS.index(D)
    packing = pack([5, 9, 0, 1], [1, 0, 2, 1], device)
    args = inputs(packing, D, TYPES[case % 3], torch.float32, affine=case % 4 != 1, residual=case % 3 != 1)
    compare(ours(packing, rms=True), plain(packing, rms=True), args)
    (wide, narrow), rms = MIXED[case % 2], case % 4 < 2
    args = inputs(packing, D, wide, narrow if case == 3 else wide, case != 1, residual=case != 2, narrow=narrow)
    compare(ours(packing, rms, narrow), plain(packing, rms, narrow), args, ("h",))


@pytest.mark.parametrize("device", KERNELS, indirect=True)
@pytest.mark.parametrize("rms", [False, True], ids=["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("D", [3, 17, 64, 1408, 2304])
def test_widths_beyond(compare, device, D, rms):
    """ViT-g's, another above all tiles that lie ready, and some that nobody has.

    Not 1: its dx of 0 is a difference times 1000, of which a fused multiply-add leaves a rounding error.
    """
    packing = pack([3, 9, 2], [1, 0, 1], device)
    compare(ours(packing, rms), plain(packing, rms), inputs(packing, D, torch.float32, torch.float32))


def test_rows_with_gaps(device):
    """A weight and a bias cut from something wider, or one number for all columns."""
    packing, wide = pack([3, 5], device=device), torch.randn(2, 48, device=device)
    x = torch.randn(8, 24, device=device)
    for weight, bias in ((wide[0, ::2], wide[1, 1::2]), (wide[0, :1].expand(24), wide[1, :1].expand(24))):
        found = modulated_layer_norm(x, packing, weight=weight, bias=bias)
        torch.testing.assert_close(found, F.layer_norm(x, (24,), weight, bias, 1e-6))


@pytest.mark.slow
@pytest.mark.parametrize("rms", [False, True], ids=["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("samples", [1, 3, 5])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtypes", [*((dtype, dtype) for dtype in TYPES), *MIXED], ids=str)
@pytest.mark.parametrize("D", WIDTHS)
def test_grid(compare, D, dtypes, residual, samples, rms):
    _grid(compare, "cpu", D, *dtypes, residual, samples, rms)


@pytest.mark.gpu
@pytest.mark.parametrize("rms", [False, True], ids=["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("samples", [1, 3, 5])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtypes", [*((dtype, dtype) for dtype in TYPES), *MIXED], ids=str)
@pytest.mark.parametrize("D", WIDTHS)
def test_grid_on_a_gpu(compare, D, dtypes, residual, samples, rms):
    _grid(compare, "cuda", D, *dtypes, residual, samples, rms)


def _grid(compare, device, D, dtype, narrow, residual, samples, rms):
    lengths = random.Random(samples).sample(LENGTHS, samples)
    packing = pack(lengths, device=device)  # every sample its own modulation
    for tables, affine in product({narrow, torch.float32}, (False, True)):
        args = inputs(packing, D, dtype, tables, affine, residual, narrow=narrow)
        with backend.kernels("triton"):
            compare(ours(packing, rms, narrow), plain(packing, rms, narrow), args, ("h",))


@pytest.mark.parametrize("device", KERNELS, indirect=True)
@pytest.mark.parametrize("rms", [False, True], ids=["LayerNorm", "RMSNorm"])
def test_mixed_types_without_a_gate(compare, device, rms):
    """dh is dx in another type, and r is the sum as fp32 has it. Either output alone may get a gradient."""
    packing = pack(*RAGGED, device)
    args = inputs(packing, 24, torch.float32, torch.float32, narrow=torch.bfloat16)
    args = {name: x for name, x in args.items() if name != "gate"}
    compare(ours(packing, rms), plain(packing, rms, torch.bfloat16), args, ("h",))
    r, y = ours(packing, rms)(**args)
    assert (r.dtype, y.dtype) == (torch.float32, torch.bfloat16) and torch.equal(r, args["x"] + args["h"].float())
    for used in (0, 1):
        both = only(ours(packing, rms), used), only(plain(packing, rms, torch.bfloat16), used)
        compare(*both, args, ("h",))


@pytest.mark.parametrize("device", ["torch", *KERNELS], indirect=True)
def test_rms_is_that_of_the_paper(device):
    """In words of its own: the root mean square of each row, in fp64."""
    packing = pack(*RAGGED, device)
    args = inputs(packing, 40, torch.float32, torch.float32, mean=3.0)
    r, y = gated_residual_layer_norm(packing=packing, **args, eps=1e-2, rms=True)
    rows = packing.cond_index.repeat_interleave(packing.cu_seqlens.diff())
    x, h, gate, shift, scale, weight, bias, _ = (t.double() for t in args.values())
    exact = x + gate[rows] * h
    x_hat = exact / (exact.pow(2).sum(1, keepdim=True) / 40 + 1e-2).sqrt()
    torch.testing.assert_close(y, ((x_hat * weight + bias) * (1 + scale[rows]) + shift[rows]).float())
    assert torch.equal(
        y,
        modulated_layer_norm(
            r,
            packing,
            shift=args["shift"],
            scale=args["scale"],
            eps=1e-2,
            rms=True,
            weight=args["weight"],
            bias=args["bias"],
        ),
    )


@pytest.mark.parametrize("device", KERNELS, indirect=True)
def test_large_mean_at_full_width(compare, device):
    packing = pack([3, 2], device=device)
    compare(ours(packing), plain(packing), inputs(packing, 1024, torch.float32, torch.float32, mean=1000.0))


@pytest.mark.parametrize("device", KERNELS, indirect=True)
def test_a_row_of_many_chunks(compare, device):
    """More chunks for a row than the sum takes at once, and for the affine."""
    packing = pack([1, 2] * 75, [0, 1] * 75, device)
    compare(ours(packing), plain(packing), inputs(packing, 16, torch.float32, torch.float32))


@pytest.mark.parametrize("device", KERNELS, indirect=True)
def test_more_rows_than_a_program_sums(compare, device):
    """Own rows, of a number that no block divides, and two that nobody uses."""
    packing = pack([2, 1, 3, 0, 1, 2, 2, 4, 1], [0, 1, 2, 3, 5, 6, 8, 9, 10], device)
    compare(ours(packing), plain(packing), inputs(packing, 48, torch.float32, torch.float32))


@pytest.mark.parametrize("device", KERNELS[1:], indirect=True)
@pytest.mark.parametrize(
    ("lengths", "dtype", "rms"), [([70, 131, 3, 64], torch.bfloat16, False), ([7, 33, 3, 16], torch.float32, True)]
)
def test_repeats_to_the_bit(device, lengths, dtype, rms):
    packing = pack(lengths, [1, 0, 1, 1], device)
    args = inputs(packing, 192, dtype, torch.float32, narrow=torch.bfloat16)
    first, second = run(ours(packing, rms), args), run(ours(packing, rms), args)
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("device", KERNELS, indirect=True)
def test_order_of_samples_does_not_matter_to_the_stream(device):
    """What a token gets depends on its sample alone: the same bits wherever it lies."""
    there, back = pack([68, 5], [0, 1], device), pack([5, 68], [1, 0], device)
    args = inputs(there, 192, torch.bfloat16, torch.float32)
    flipped = args | {name: torch.cat([args[name][68:], args[name][:68]]) for name in ("x", "h")}
    for a, b in zip(ours(there)(**args), ours(back)(**flipped), strict=True):
        assert torch.equal(a, torch.cat([b[5:], b[:5]]))


@pytest.mark.parametrize("device", KERNELS, indirect=True)
def test_no_tokens(device):
    packing = pack([0, 0], [0, 1], device)
    args = inputs(packing, 8, torch.float32, torch.float32)
    r, y, dx, dh, *tables = run(ours(packing), args)
    assert all(t.shape == (0, 8) for t in (r, y, dx, dh))
    assert all((t == 0).all() for t in tables)


def operands(packing, residual=True, affine=True, gated=True, rms=False, narrow=torch.float32):
    """Positional arguments of `layer_norm_fwd`."""
    args = inputs(packing, 16, torch.float32, torch.float32, affine, residual, narrow=narrow)
    names = ("x", "h", "gate" if gated else "", "shift", "scale", "weight", "bias", "h_bias")
    return [args.get(name) for name in names] + [packing.chunks, packing.row_chunks, 1e-6, rms, narrow]


@pytest.mark.parametrize("device", KERNELS, indirect=True)
@pytest.mark.parametrize(
    "which",
    [
        dict(),
        dict(residual=False, affine=False),
        dict(affine=False, gated=False, rms=True, narrow=torch.bfloat16),
    ],
    ids=["LayerNorm", "alone", "RMSNorm of mixed types"],
)
def test_registration(device, which):
    """Schema, fake tensors, autograd and tracing, as torch checks them."""
    packing = pack(*RAGGED, device)
    args = operands(packing, **which)
    residual, gated, rms = args[1] is not None, args[2] is not None, args[-2]
    leaves = [t.requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args]
    torch.library.opcheck(kernels.layer_norm_fwd.library, leaves)
    with torch.no_grad():
        r, y, mean, rstd = kernels.layer_norm_fwd(*args)
    x, h, *tables = (None if t is None else t.detach() for t in args[:8])
    inner = r if residual else x, h if gated else None
    gradients = torch.ones_like(y), torch.ones_like(r) if residual else None
    backward = [*gradients, *inner, *tables, None if rms else mean, rstd, *args[8:10], residual]
    torch.library.opcheck(kernels.layer_norm_bwd.library, backward)


@pytest.mark.parametrize("device", KERNELS, indirect=True)
@pytest.mark.parametrize("affine", [True, False])
def test_a_gate_without_gradient_keeps_no_h(device, affine):
    """Drop path's gates: the other gradients are the same bits, and h is not kept for dgate."""
    packing = pack(*RAGGED, device)
    args = inputs(packing, 16, torch.bfloat16, torch.float32, affine)
    gate = args.pop("gate")
    found, kept = [], []
    for wanted in (True, False):
        fixed = gate.detach().requires_grad_(wanted)
        leaves = {name: x.detach().requires_grad_() for name, x in args.items()}
        r, y = gated_residual_layer_norm(packing=packing, gate=fixed, **leaves)
        kept.append(sum(x is not None and x.data_ptr() == leaves["h"].data_ptr() for x in r.grad_fn.saved_tensors))
        found.append(torch.autograd.grad(r.float().sum() + y.float().square().sum(), list(leaves.values())))
    assert kept == [1, 0] and all(map(torch.equal, *found))
    with torch.no_grad():
        r, _, mean, rstd = kernels.layer_norm_fwd(*operands(packing)[:-1], torch.float32)
    alone = [torch.ones_like(r), None, r, None, gate[:, :16], None, None, None, None, None, mean, rstd]
    dgate, *rest = kernels.layer_norm_bwd(*alone, packing.chunks, packing.row_chunks, True)[2:]
    assert dgate.numel() == 0 and all(d.numel() == 0 for d in rest)


@pytest.mark.parametrize("device", KERNELS, indirect=True)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_is_eager(device, compiler):
    packing = pack(*RAGGED, device)
    for residual, dtype, rms in ((False, torch.bfloat16, False), (True, torch.bfloat16, False), (True, None, True)):
        args = inputs(packing, 32, dtype or torch.float32, torch.float32, residual=residual, narrow=torch.bfloat16)
        op = ours(packing, rms)
        compiled = torch.compile(op, fullgraph=True, backend=compiler)
        for a, b in zip(run(op, args), run(compiled, args), strict=True):
            assert torch.equal(a, b)


# A text in the kernels, what a careless edit would make of it, and how often it stands there.
MUTANTS = {
    "every sample gets the first row": ("tl.load(chunk + 2).to(tl.int64)", "tl.load(chunk + 2).to(tl.int64) * 0", 2),
    "a sample gets the row of another": ("tl.load(chunk + 2).to(tl.int64)", "2 - tl.load(chunk + 2).to(tl.int64)", 2),
    "mask of columns dropped": ("tl.where(mask, x - mean[:, None], 0.0)", "x - mean[:, None]", 1),
    "mask of rows dropped": ("mask = row_mask[:, None] & (cols < D)[None, :]", "mask = (cols < D + 0 * tile)", 2),
    "1 + dropped in front of the scale": ("tl.full(cols.shape, 1.0", "tl.full(cols.shape, 0.0", 1),
    "1 + dropped in the affine's gradient": ("tl.full([BLOCK_C, BLOCK_D], 1.0", "tl.full([BLOCK_C, BLOCK_D], 0.0", 1),
    "gate and scale swapped": ("gate_ptr + row * stride_gate", "scale_ptr + row * stride_scale", 2),
    "shift and scale swapped": (
        "_affine(\n        shift_ptr, scale_ptr,",
        "_affine(\n        scale_ptr, shift_ptr,",
        1,
    ),
    "mean of the squares not taken off": ("- x_hat * along_x_hat[:, None]", "", 1),
    "gradient of the residual forgotten": ("dx += dr.to(tl.float32)", "pass", 1),
    "gate forgotten in dh": ("dx * gate[None, :]", "dx", 1),
    "a row's later chunks forgotten": ("tl.load(row_chunks_ptr + row + 1, row < num_rows, other=0)", "start + 1", 1),
    "a table's row gets another's sum": ("out = row.to(tl.int64) * D", "out = (2 - row).to(tl.int64) * D", 1),
    "gate forgotten in the bias's gradient": ("dh_bias *= gate", "dh_bias *= 1", 1),
    "h instead of dx in the bias's gradient": ("dh_bias += tl.sum(dx, 0)", "dh_bias += tl.sum(h.to(tl.float32), 0)", 1),
    "bias's gradient without the last chunk": (
        "dh_bias_part_ptr, chunk, C, cols",
        "dh_bias_part_ptr, chunk, C - 1, cols",
        1,
    ),
    "half of the tiles never written": ("stop - start, SPLIT * BLOCK_M,", "stop - start, 2 * SPLIT * BLOCK_M,", 1),
    "half of the tiles without a gradient": (
        "range(0, stop - start, BLOCK_M,",
        "range(0, stop - start, 2 * BLOCK_M,",
        1,
    ),
    "both programs of a chunk make the same tiles": ("tl.program_id(1) * BLOCK_M, stop", "0, stop", 1),
    "rstd never written": ("tl.store(rstd_ptr + start + first + tile_rows, rstd, row_mask)", "pass", 1),
}


RMS_MUTANTS = {
    "mean taken off": ("mean_ptr is not None:\n            mean = tl.sum", "True:\n            mean = tl.sum", 1),
    "mean of the gradient taken off": (
        "mean_ptr is not None:\n            g -= along_one[:, None]",
        "True:\n            g -= (tl.sum(g, 1) / D)[:, None]",
        1,
    ),
    "mean of the squares not taken off": MUTANTS["mean of the squares not taken off"],
    "x̂ not scaled": ("x_hat *= rstd[:, None]", "x_hat *= 1", 1),
}
# Of an fp32 stream whose branch has no gate.
MIXED_MUTANTS = {
    "r rounded as the branch is": ("r = (x + h).to(r_ptr", "r = (x + h).to(y_ptr.dtype.element_ty).to(r_ptr", 1),
    "dx rounded as the branch is": ("dx.to(dx_ptr.dtype", "dx.to(dy_ptr.dtype.element_ty).to(dx_ptr.dtype", 1),
    "dh only behind a gate": ("if dh_ptr is not None:", "if gate_ptr is not None:", 1),
}


def through(kernels, packing, rms=False):
    """The op by another module's kernels."""

    def op(x, h, gate=None, shift=None, scale=None, weight=None, bias=None, h_bias=None):
        tables = gate, shift, scale, weight, bias, h_bias
        return kernels.layer_norm_fwd(x, h, *tables, packing.chunks, packing.row_chunks, 1e-6, rms, h.dtype)[:2]

    return op


@pytest.mark.parametrize("device", ["interpreter"], indirect=True)
def test_mutants_fail(compare, device, mutant):
    """In fp32: tails of tiles, samples that share rows, one that has none, D that is no power of two.

    The last tokens fill whole tiles, so that no mutant leaves the tensors.
    """
    packing = pack([3, 0, 1, 5, 66, 8], [2, 1, 0, 2, 2, 1])
    args = inputs(packing, 24, torch.float32, torch.float32)
    compare(through(kernels, packing), plain(packing), args)
    for what, change in MUTANTS.items():
        notices(compare, what, through(mutant(kernels, *change), packing), plain(packing), args)


@pytest.mark.parametrize("device", ["interpreter"], indirect=True)
def test_mutants_of_rms_and_mixed_types_fail(compare, device, mutant):
    packing = pack(*RAGGED)
    args = inputs(packing, 24, torch.float32, torch.float32, mean=0.5)
    for what, change in RMS_MUTANTS.items():
        notices(compare, what, through(mutant(kernels, *change), packing, rms=True), plain(packing, rms=True), args)
    args = inputs(packing, 24, torch.float32, torch.float32, narrow=torch.bfloat16)
    args = {name: x for name, x in args.items() if name != "gate"}
    for what, change in MIXED_MUTANTS.items():
        wrong = through(mutant(kernels, *change), packing)
        notices(compare, what, wrong, plain(packing, narrow=torch.bfloat16), args, ("h",))


def notices(compare, what, wrong, *arguments):
    try:
        compare(wrong, *arguments)
    except AssertionError as error:
        assert "off by" in str(error) or "not finite" in str(error), what
    else:
        pytest.fail(f"not noticed: {what}")


@pytest.mark.parametrize("device", ["interpreter"], indirect=True)
@pytest.mark.parametrize(
    "change",
    [
        ("(chunk < stop)[:, None]", "(chunk < stop + 1)[:, None]", 1),
        ("mask = row_mask[:, None] & (cols < D)[None, :]", "mask = (cols < D + 0 * tile)", 2),
        (
            "tl.load(mean_ptr + start + first + tile_rows, row_mask, other=0.0)",
            "tl.load(mean_ptr + start + first + tile_rows)",
            1,
        ),
    ],
)
def test_mutants_that_leave_their_tensors_fail(compare, device, mutant, change):
    from triton.runtime.errors import InterpreterError

    packing = pack([3, 5])
    args = inputs(packing, 24, torch.float32, torch.float32)
    compare(through(kernels, packing), plain(packing), args)
    with pytest.raises(InterpreterError, match="outside of the tensors given"):
        compare(through(mutant(kernels, *change), packing), plain(packing), args)
