"""Modulated LayerNorm, alone and behind a gated residual: the op and its definition against plain torch."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from umd.kernels.adaln import (
    gated_residual_layer_norm,
    gated_residual_layer_norm_ref,
    modulated_layer_norm,
    modulated_layer_norm_ref,
)
from umd.kernels.packing import pack

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Ragged, with an empty sample and one of a single token; rows in any order, shared by samples that are apart.
LENGTHS, ROWS = [3, 0, 1, 5, 2], [2, 1, 0, 2, 1]
RAGGED = pack(LENGTHS, ROWS)


@pytest.fixture
def ragged(device):
    return pack(LENGTHS, ROWS, device)


def inputs(packing, D, dtype=torch.float64, rows=None, residual=False, tables=torch.float32, seed=0, mean=0):
    """Every argument; tables and affine in the type `tables` or wider."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(packing.cu_seqlens.device)

    N, R = packing.num_tokens, packing.num_rows if rows is None else rows
    wide = torch.promote_types(dtype, tables)
    found = {"x": (draw(N, D) + mean).to(dtype)}
    if residual:
        found["h"] = draw(N, D).to(dtype)
        found["gate"] = draw(R, D).to(wide)
    found |= {
        "shift": draw(R, D).to(wide),
        "scale": draw(R, D).to(wide),
        "weight": (1 + draw(D)).to(wide),
        "bias": draw(D).to(wide),
    }
    return found | ({"h_bias": draw(D).to(wide)} if residual else {})


def on(op, packing):
    """The op with its packing bound; arguments by name."""
    return lambda **kwargs: op(packing=packing, **kwargs)


def plain(packing):
    """LN with modulation as anyone writes it, in the type of its inputs, sample by sample."""

    def norm(x, shift=None, scale=None, weight=None, bias=None):
        out = []
        offsets = packing.cu_seqlens.tolist()
        for start, stop, row in zip(offsets, offsets[1:], packing.cond_index.tolist(), strict=False):
            y = F.layer_norm(x[start:stop], x.shape[-1:], weight, bias, 1e-6)
            y = y if scale is None else y * (1 + scale[row])
            out.append(y if shift is None else y + shift[row])
        return torch.cat(out)

    def gated(x, h, gate=None, h_bias=None, **modulation):
        h = h if h_bias is None else h + (h_bias - h_bias.detach())
        rows = packing.cond_index.repeat_interleave(packing.cu_seqlens.diff())
        r = x + (h if gate is None else h * gate[rows])
        return r, norm(r, **modulation)

    return norm, gated


def both(packing):
    norm, gated = plain(packing)
    return [(modulated_layer_norm, norm, False), (gated_residual_layer_norm, gated, True)]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_ragged(compare, ragged, dtype):
    for op, expected, residual in both(ragged):
        compare(on(op, ragged), expected, inputs(ragged, 24, dtype, residual=residual))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_definition(compare, dtype):
    norm, gated = plain(RAGGED)
    compare(on(modulated_layer_norm_ref, RAGGED), norm, inputs(RAGGED, 24, dtype))
    compare(on(gated_residual_layer_norm_ref, RAGGED), gated, inputs(RAGGED, 24, dtype, residual=True))


@pytest.mark.parametrize("rms", [False, True], ids=["LayerNorm", "RMSNorm"])
def test_an_fp32_stream_with_branches_of_16_bits(device, rms):
    """Values and gradients are those of fp32 arguments, y and dh rounded once."""
    packing = pack(LENGTHS, ROWS, device)
    args = inputs(packing, 24, torch.float32, residual=True)
    args["h"] = args["h"].bfloat16()
    wide = args | {"h": args["h"].float()}
    leaves, wide_leaves = ({n: t.clone().requires_grad_() for n, t in some.items()} for some in (args, wide))
    r, y = gated_residual_layer_norm(packing=packing, **leaves, rms=rms)
    exact = gated_residual_layer_norm_ref(packing=packing, **wide_leaves, rms=rms)
    assert (r.dtype, y.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(r, exact[0])
    torch.testing.assert_close(y, exact[1].bfloat16())
    douts = torch.randn_like(r), torch.randn_like(y)
    ours = torch.autograd.grad((r, y), list(leaves.values()), douts)
    theirs = torch.autograd.grad(exact, list(wide_leaves.values()), (douts[0], douts[1].float()))
    for name, a, b in zip(args, ours, theirs, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), msg=lambda text, name=name: f"d{name}: {text}")
    alone = modulated_layer_norm(r, packing, dtype=torch.bfloat16, rms=rms)
    torch.testing.assert_close(alone, modulated_layer_norm_ref(r, packing, rms=rms).bfloat16())


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_packing(compare, device, data):
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=6))
    rows = data.draw(st.integers(1, 4))
    cond_index = data.draw(st.lists(st.integers(0, rows - 1), min_size=len(lengths), max_size=len(lengths)))
    D = data.draw(st.sampled_from([4, 7, 32]))
    dtype = data.draw(st.sampled_from(TYPES))
    packing = pack(lengths, cond_index, device)
    for op, expected, residual in both(packing):
        args = inputs(packing, D, dtype, rows, residual, seed=data.draw(st.integers(0, 1000)))
        for name in ("gate", "shift", "scale", "weight", "bias")[0 if residual else 1 :]:
            args[name] = args[name] if data.draw(st.booleans()) else None
        compare(on(op, packing), expected, args)


@pytest.mark.parametrize("dtype", [*TYPES[:2], *(pytest.param(t, marks=pytest.mark.slow) for t in TYPES[2:])], ids=str)
def test_every_combination_of_arguments(compare, ragged, dtype):
    for op, expected, residual in both(ragged):
        everything = inputs(ragged, 8, dtype, residual=residual)
        optional = list(everything)[2 if residual else 1 :]
        for present in product([True, False], repeat=len(optional)):
            absent = {name: None for name, keep in zip(optional, present, strict=True) if not keep}
            compare(on(op, ragged), expected, everything | absent)


@pytest.mark.parametrize("cond_index", [None, [0] * 4, [0, 0, 1, 1], [1, 0, 1, 0], [3, 1, 3, 0]])
def test_shared_rows(compare, device, cond_index):
    """Own rows, one row, rows in blocks, alternating, and a table with rows that nobody uses."""
    packing = pack([4, 2, 2, 3], cond_index, device)
    for op, expected, residual in both(packing):
        for dtype in (torch.float64, torch.float32):
            compare(on(op, packing), expected, inputs(packing, 8, dtype, rows=4, residual=residual))


def test_shared_row_is_the_same_as_equal_rows(device):
    shared, own = pack([4, 2, 3], [1, 0, 1], device), pack([4, 2, 3], device=device)
    args = inputs(shared, 8, torch.float32, residual=True)
    spread = {n: t[[1, 0, 1]] if n in ("gate", "shift", "scale") else t for n, t in args.items()}
    for a, b in zip(
        gated_residual_layer_norm(packing=shared, **args),
        gated_residual_layer_norm(packing=own, **spread),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_tables_are_views_of_one_projection(ragged, device, dtype):
    """Chunks of one [R, 6D] matrix, not contiguous: its gradient is theirs side by side."""
    D, generator = 8, torch.Generator().manual_seed(0)
    args = inputs(ragged, D, dtype, residual=True)
    projection = torch.randn(3, 6 * D, generator=generator).to(args["shift"]).requires_grad_()
    views = dict(zip(("shift", "gate", "scale"), projection.split(D, dim=1)[1:4], strict=True))
    copies = {name: view.detach().clone().requires_grad_() for name, view in views.items()}
    assert not views["gate"].is_contiguous()
    dout = [torch.randn(*args["x"].shape, generator=generator).to(args["x"]) for _ in range(2)]
    torch.autograd.backward(gated_residual_layer_norm(packing=ragged, **(args | views)), dout)
    torch.autograd.backward(gated_residual_layer_norm(packing=ragged, **(args | copies)), dout)
    expected = torch.zeros_like(projection)
    for i, copy in enumerate(copies.values()):
        expected[:, (i + 1) * D : (i + 2) * D] = copy.grad
    assert projection.grad.abs().sum() > 0 and torch.equal(projection.grad, expected)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_large_mean(compare, ragged, dtype):
    """E[x²] - E[x]² would lose everything here."""
    for op, expected, residual in both(ragged):
        compare(on(op, ragged), expected, inputs(ragged, 64, dtype, residual=residual, mean=1000))


def test_tables_in_bfloat16(compare, ragged):
    for op, expected, residual in both(ragged):
        args = inputs(ragged, 16, torch.bfloat16, residual=residual, tables=torch.bfloat16)
        compare(on(op, ragged), expected, args)


def test_rounding_of_the_residual(ragged):
    """In bf16 the norm reads r as it is stored, so that the backward pass can make it again."""
    args = inputs(ragged, 16, torch.bfloat16, residual=True)
    r, y = gated_residual_layer_norm(packing=ragged, **args)
    modulation = {name: args[name] for name in ("shift", "scale", "weight", "bias")}
    assert torch.equal(y, modulated_layer_norm(r, ragged, **modulation))


def test_only_one_output_used(ragged):
    """A gradient that does not arrive counts as zero."""
    args = inputs(ragged, 8, torch.float32, residual=True)
    for used in (0, 1):
        found = []
        for op in (gated_residual_layer_norm, gated_residual_layer_norm_ref):
            leaves = {name: t.clone().requires_grad_() for name, t in args.items()}
            op(packing=ragged, **leaves)[used].square().sum().backward()
            found.append([torch.zeros_like(t) if t.grad is None else t.grad for t in leaves.values()])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rms", [False, True], ids=["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("op", [modulated_layer_norm, gated_residual_layer_norm])
def test_gradcheck(op, rms):
    packing = pack([2, 0, 1], [1, 0, 1])
    args = inputs(packing, 4, residual=op is gated_residual_layer_norm)
    args.pop("h_bias", None)  # it changes no value: its gradient is that of the layer before
    names, tensors = zip(*args.items(), strict=True)
    tensors = tuple(t.requires_grad_() for t in tensors)
    assert torch.autograd.gradcheck(
        lambda *ts: op(packing=packing, rms=rms, **dict(zip(names, ts, strict=True))), tensors
    )


@pytest.mark.parametrize("device", ["torch"], indirect=True)
def test_comparison_notices_a_wrong_row(compare, ragged, device):
    """The comparison is worth something: it fails on a swapped sample, and on a row too many or too few."""
    for wrong in ([2, 1, 0, 1, 2], [2, 1, 2, 2, 1], [0, 1, 2, 0, 1]):
        packing = pack(LENGTHS, wrong, device)
        for op, expected, residual in both(ragged):
            for dtype in TYPES:
                with pytest.raises(AssertionError, match="off by"):
                    compare(on(op, packing), expected, inputs(ragged, 24, dtype, residual=residual))
    shifted = pack([3, 0, 2, 4, 2], ROWS, device)
    for op, expected, residual in both(ragged):
        with pytest.raises(AssertionError, match="off by"):
            compare(on(op, shifted), expected, inputs(ragged, 24, torch.float32, residual=residual))


def test_wrong_shapes_are_named():
    args = inputs(RAGGED, 8, residual=True)
    for name, table in list(args.items())[1:]:
        for wrong in (table[..., :-1], table[None]):
            with pytest.raises(ValueError, match=f"^{name}: expected"):
                gated_residual_layer_norm(packing=RAGGED, **(args | {name: wrong}))
    for name in ("gate", "shift", "scale"):
        with pytest.raises(ValueError, match=f"^{name}: expected 3 rows or more"):
            gated_residual_layer_norm(packing=RAGGED, **(args | {name: args[name][:2]}))
    with pytest.raises(ValueError, match=r"^x: expected floating-point \[11, D\], got"):
        modulated_layer_norm(args["x"][:-1], RAGGED)
    with pytest.raises(ValueError, match=r"^x: expected floating-point \[11, D\], got"):
        modulated_layer_norm(args["x"][None], RAGGED)
    with pytest.raises(ValueError, match="^h: expected .*float64"):
        gated_residual_layer_norm(args["x"], args["h"].float(), RAGGED)
    with pytest.raises(ValueError, match="^shift: expected 3 rows like the tables before it, got 4"):
        gated_residual_layer_norm(packing=RAGGED, **(args | {"shift": torch.cat([args["shift"]] * 2)[:4]}))


def test_wrong_types_and_devices_are_named():
    args = inputs(RAGGED, 8, torch.bfloat16, residual=True)
    for name, table in list(args.items())[2:]:
        for dtype in (torch.float64, torch.float16, torch.int64):
            with pytest.raises(ValueError, match=f"^{name}: expected bfloat16 or float32 .*, got"):
                gated_residual_layer_norm(packing=RAGGED, **(args | {name: table.to(dtype)}))
        with pytest.raises(ValueError, match=f"^{name}: expected on cpu like x, got meta"):
            gated_residual_layer_norm(packing=RAGGED, **(args | {name: table.to("meta")}))
    with pytest.raises(ValueError, match="^h: expected on cpu like x, got meta"):
        gated_residual_layer_norm(args["x"], args["h"].to("meta"), RAGGED)
    with pytest.raises(ValueError, match="^h: expected bfloat16 .*, got float32"):
        gated_residual_layer_norm(args["x"], args["h"].float(), RAGGED)
    with pytest.raises(ValueError, match="^h: expected float32 or bfloat16 or float16 .*, got float64"):
        gated_residual_layer_norm(args["x"].float(), args["h"].double(), RAGGED)
    for x, dtype in ((args["x"], torch.float32), (args["x"].double(), torch.float32), (args["x"].float(), torch.int8)):
        with pytest.raises(ValueError, match="^dtype: expected .* for x in .*, got"):
            modulated_layer_norm(x, RAGGED, dtype=dtype)
    with pytest.raises(ValueError, match="^x: expected floating-point .*, got int64"):
        modulated_layer_norm(args["x"].long(), RAGGED)
    with pytest.raises(ValueError, match="^packing: expected on meta like x, got cpu"):
        modulated_layer_norm(args["x"].to("meta"), RAGGED)


def test_packing_itself():
    packing = pack([3, 0, 1, 5, 2], [2, 1, 0, 2, 2])
    assert packing.cu_seqlens.tolist() == [0, 3, 3, 4, 9, 11]
    assert packing.cond_index.tolist() == [2, 1, 0, 2, 2]
    assert (packing.num_samples, packing.num_tokens, packing.num_rows, packing.max_seqlen) == (5, 11, 3, 5)
    assert packing.segments == ((0, 3, 2), (3, 4, 0), (4, 11, 2))
    assert packing.chunks.tolist() == [[3, 4, 0], [0, 3, 2], [4, 11, 2]]
    assert packing.row_chunks.tolist() == [0, 1, 1, 3]
    assert pack([2, 2, 3, 2]).runs == ((2, 2), (1, 3), (1, 2))
    for wrong in ([], [-1], [3, -2]):
        with pytest.raises(ValueError, match="^lengths"):
            pack(wrong)
    for wrong in ([0], [0, 1, 2], [0, -1]):
        with pytest.raises(ValueError, match="^cond_index"):
            pack([1, 2], wrong)
    with pytest.raises(ValueError, match="^chunk: expected 1 token or more, got 0"):
        pack([1, 2], chunk=0)


@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=8),
    rows=st.lists(st.integers(0, 4), min_size=8, max_size=8),
    chunk=st.none() | st.integers(1, 80),
)
def test_chunks_are_the_stream(lengths, rows, chunk):
    """Each token is in one chunk, which has the token's row; a segment's are equally long, a row's side by side."""
    packing = pack(lengths, rows[: len(lengths)], chunk=chunk)
    row_of_token = packing.cond_index.repeat_interleave(packing.cu_seqlens.diff())
    chunks, offsets = packing.chunks.tolist(), packing.row_chunks.tolist()
    assert sorted(token for start, stop, _ in chunks for token in range(start, stop)) == list(range(len(row_of_token)))
    for first, last, row in packing.segments:
        pieces = [stop - start for start, stop, _ in chunks if first <= start and stop <= last]
        assert sum(pieces) == last - first and max(pieces) - min(pieces) <= 1
        assert (row_of_token[first:last] == row).all() and max(pieces) <= (chunk or 256)
    for start, stop, row in chunks:
        assert (row_of_token[start:stop] == row).all() and stop > start
        assert chunk or stop - start >= 6 or (start, stop, row) in packing.segments
    assert offsets[0] == 0 and offsets[-1] == len(chunks) and len(offsets) == packing.num_rows + 1
    assert [row for row, n in enumerate(torch.tensor(offsets).diff()) for _ in range(n)] == [row for *_, row in chunks]


@pytest.mark.parametrize("samples", [16, 64, 256])
@pytest.mark.parametrize("lengths", [(161, 65), (257, 257)])
def test_chunks_follow_the_machine(samples, lengths):
    """On 132 multiprocessors: one each at least, no more than run at a time; long ones where there are many tokens."""
    half = samples // 2
    noised, clean = ([length] * half for length in lengths)
    packing = pack(noised + clean, [*range(half)] + [half] * half)
    tokens = packing.chunks.diff(dim=1)[:, 0]
    assert 132 <= len(tokens) <= 4 * 132 and tokens.max() <= 2 * tokens.min()
    # A chunk's tables and sums are as many bytes as four tokens of the backward pass.
    assert 4 * len(tokens) < (0.06 if samples == 256 else 0.4) * packing.num_tokens


def test_a_machine_of_other_size(monkeypatch):
    monkeypatch.setattr("umd.kernels.packing.multiprocessors", lambda device: 8)
    packing = pack([161] * 8 + [65] * 8, [*range(8)] + [8] * 8)
    assert 8 <= len(packing.chunks) <= 32


@pytest.mark.parametrize("device", ["interpreter"], indirect=True)
@pytest.mark.parametrize("gated", [True, False])
def test_bias_of_the_layer_before(device, gated):
    """No value changes and no other gradient does; its own is the sum of dh over all tokens, with a gate or without."""
    packing = pack([7, 40, 9], [1, 0, 1], chunk=12)
    args = inputs(packing, 48, torch.float32, residual=True)
    args |= {} if gated else {"gate": None}
    leaves = {n: t.requires_grad_() for n, t in args.items() if t is not None}
    without = {n: t for n, t in args.items() if n != "h_bias"}
    douts = [torch.randn_like(args["x"]) for _ in range(2)]
    outputs = gated_residual_layer_norm(packing=packing, **args)
    gradients = dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), douts), strict=True))
    plain_outputs = gated_residual_layer_norm(packing=packing, **without)
    rest = [n for n in leaves if n != "h_bias"]
    for a, b in zip(outputs, plain_outputs, strict=True):
        assert torch.equal(a, b)
    for name, b in zip(rest, torch.autograd.grad(plain_outputs, [leaves[n] for n in rest], douts), strict=True):
        assert torch.equal(gradients[name], b), name
    torch.testing.assert_close(gradients["h_bias"], gradients["h"].double().sum(0).float(), rtol=1e-5, atol=1e-4)
