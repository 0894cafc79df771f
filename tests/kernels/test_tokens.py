"""Tokens in front of packed samples, and the decoder's input: against loops over samples."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from umd.kernels import backend, tokens
from umd.kernels.packing import pack
from umd.kernels.tokens import prepend_tokens, scatter_tokens, scatter_tokens_ref, split_tokens
from umd.kernels.triton import tokens as kernels

TYPES = [torch.float64, torch.float32, torch.bfloat16]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def prepend_by_loops(front, x, lengths):
    rest = x.split(lengths)
    return torch.cat([part for pair in zip(front, rest, strict=True) for part in pair])


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    n=st.integers(1, 3),
    dtype=st.sampled_from(TYPES),
)
def test_prepend_and_split(compare, lengths, n, dtype):
    packing = pack([n + length for length in lengths])
    args = {
        "front": randn(len(lengths), n, 3, dtype=dtype),
        "x": randn(sum(lengths), 3, seed=1, dtype=dtype),
    }
    compare(
        lambda front, x: prepend_tokens(front, x, packing),
        lambda front, x: prepend_by_loops(front, x, lengths),
        args,
    )
    together = prepend_tokens(**args, packing=packing)
    front, rest = split_tokens(together, n, packing)
    assert torch.equal(front, args["front"]) and torch.equal(rest, args["x"])


def test_split_gradient(compare):
    packing = pack([3, 3, 2, 5])

    def by_loops(x):
        samples = x.split([3, 3, 2, 5])
        return torch.stack([s[:2] for s in samples]), torch.cat([s[2:] for s in samples])

    compare(lambda x: split_tokens(x, 2, packing), by_loops, {"x": randn(13, 4)})


def test_prepend_takes_the_type_of_the_stream():
    """fp32 CLS parameters in front of a bf16 stream."""
    out = prepend_tokens(randn(2, 1, 4), randn(5, 4, dtype=torch.bfloat16), pack([3, 4]))
    assert out.dtype == torch.bfloat16


def scatter_by_loops(tokens, mask_token, pos_embed, lengths, num_cls, ids_keep):
    L, rows, ids = len(pos_embed), [], iter(ids_keep.tolist())
    for s, sample in enumerate(tokens.split([num_cls + length for length in lengths])):
        whole = [mask_token] * L
        for token in sample[num_cls:]:
            index = next(ids)
            assert index // L == s
            whole[index % L] = token
        rows.append(sum(sample[:num_cls]) / num_cls)
        rows += [token + position for token, position in zip(whole, pos_embed, strict=True)]
    return torch.stack(rows)


def case(lengths, L, D, num_cls, dtype, tables=None, device="cpu", seed=0):
    """(packing, ids_keep, differentiable arguments) of samples with `lengths` visible patches."""
    places = [randn(L, seed=seed + s).argsort()[:length] + s * L for s, length in enumerate(lengths)]
    packing = pack([num_cls + length for length in lengths], device=device)
    tables = dtype if tables is None else tables
    args = {
        "tokens": randn(packing.num_tokens, D, seed=seed, dtype=dtype).to(device),
        "mask_token": randn(D, seed=seed + 1, dtype=tables).to(device),
        "pos_embed": randn(L, D, seed=seed + 2, dtype=tables).to(device),
    }
    return packing, torch.cat(places).to(device), args


def on(op, packing, ids_keep, num_cls):
    def call(tokens, mask_token, pos_embed):
        return op(tokens, packing, ids_keep, num_cls, mask_token, pos_embed)

    return call


def check(compare, op, lengths, L, D, num_cls, dtype, tables=None, device="cpu"):
    packing, ids_keep, args = case(lengths, L, D, num_cls, dtype, tables, device)
    plain = partial(scatter_by_loops, lengths=lengths, num_cls=num_cls, ids_keep=ids_keep)
    compare(on(op, packing, ids_keep, num_cls), plain, args)


@pytest.mark.parametrize("dtype", [*TYPES, torch.float16], ids=str)
@pytest.mark.parametrize("num_cls", [1, 4])
@pytest.mark.parametrize("lengths", [[2, 2], [5, 5, 2, 2], [6], [1, 6, 0, 3]], ids=str)
def test_scatter_tokens(compare, device, lengths, num_cls, dtype):
    check(compare, scatter_tokens, lengths, 6, 4, num_cls, dtype, device=device)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_scatter_definition(compare, dtype):
    check(compare, scatter_tokens_ref, [5, 0, 2, 2], 6, 4, 2, dtype)


# B samples of 1, 5, 68, 164 and 257 tokens; widths that are and are not powers of two.
GRID = {1: [163], 3: [4, 67, 163], 5: [0, 4, 67, 163, 256]}
WIDTHS = [192, 768, 1000, 1024, 1152]


@pytest.mark.parametrize(
    ("lengths", "D", "dtype"), [([11], 1152, torch.float16), ([1, 4, 11], 1000, torch.bfloat16)], ids=str
)
def test_scatter_at_full_width(compare, device, lengths, D, dtype):
    check(compare, scatter_tokens, lengths, 12, D, 1, dtype, torch.float32, device)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("B", GRID)
def test_scatter_grid(compare, device, B, D, dtype):
    check(compare, scatter_tokens, GRID[B], 256, D, 1, dtype, torch.float32, device)


@pytest.mark.parametrize("tables", [torch.float32, torch.bfloat16], ids=str)
def test_scatter_with_more_samples_than_one_program_walks(compare, device, tables):
    """Partial sums, of a number of samples that no block divides."""
    lengths = [(3 * s) % 6 for s in range(2 * kernels.SAMPLES + 3)]
    check(compare, scatter_tokens, lengths, 5, 24, 2, torch.bfloat16, tables, device)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=6),
    num_cls=st.integers(1, 3),
    D=st.sampled_from([1, 8, 260]),
    dtype=st.sampled_from(TYPES),
)
def test_scatter_any_packing(compare, device, lengths, num_cls, D, dtype):
    check(compare, scatter_tokens, lengths, 7, D, num_cls, dtype, device=device)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5), seed=st.integers(0, 100))
def test_scatter_gradients_of_ones_are_counts(device, lengths, seed):
    """Each visible token is used once, the mask token at every hidden place, a position by every sample."""
    packing, ids_keep, args = case(lengths, 9, 8, 1, torch.float32, device=device, seed=seed)
    leaves = [x.requires_grad_() for x in args.values()]
    out = on(scatter_tokens, packing, ids_keep, 1)(*leaves)
    dtokens, dmask_token, dpos_embed = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert (dtokens == 1).all()
    assert (dmask_token == sum(9 - length for length in lengths)).all()
    assert (dpos_embed == len(lengths)).all()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_scatter_repeats_to_the_bit(device):
    packing, ids_keep, args = case([3, 5, 1] * 30, 6, 40, 1, torch.bfloat16, torch.float32, device)

    def step():
        leaves = [x.clone().requires_grad_() for x in args.values()]
        out = on(scatter_tokens, packing, ids_keep, 1)(*leaves)
        return out, *torch.autograd.grad(out, leaves, out.detach())

    for first, second in zip(step(), step(), strict=True):
        assert torch.equal(first, second)


def test_scatter_takes_views(compare, device):
    """Tokens cut from a wider stream; a gradient of strides zero."""
    packing, ids_keep, args = case([3, 2], 4, 12, 1, torch.float32, device=device)
    op, dense = on(scatter_tokens, packing, ids_keep, 1), [args[name][..., 2:10] for name in args]
    found, expected = ([x.detach().clone().requires_grad_() for x in dense] for _ in range(2))
    strided = op(*(F.pad(x, (2, 2))[..., 2:-2] for x in found))
    assert torch.equal(strided, op(*expected))
    strided.sum().backward()
    op(*expected).sum().backward()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.grad, b.grad)


def test_scatter_compiles_whole(device):
    packing, ids_keep, args = case([3, 2, 4], 6, 24, 2, torch.bfloat16, torch.float32, device)
    leaves = [x.requires_grad_() for x in args.values()]
    op = on(scatter_tokens, packing, ids_keep, 2)
    compiler = "inductor" if device == "cuda" else "aot_eager"
    out, compiled = op(*leaves), torch.compile(op, fullgraph=True, backend=compiler)(*leaves)
    assert torch.equal(compiled, out)
    for a, b in zip(*(torch.autograd.grad(y, leaves, out.detach()) for y in (compiled, out)), strict=True):
        assert torch.equal(a, b)


def test_scatter_operators(device):
    if not backend.use_triton(torch.empty(0, device=device)):
        pytest.skip("the definition is no operator")
    packing, ids_keep, args = case([3, 2, 4], 6, 24, 2, torch.bfloat16, torch.float32, device)
    x, mask_token, pos_embed = (x.requires_grad_() for x in args.values())
    work = kernels.token_slots(ids_keep, 3, 6, 2), packing.cu_seqlens, mask_token, pos_embed
    torch.library.opcheck(kernels.scatter_tokens_fwd.library, (x, *work, 2))
    dout = randn(3 * 7, 24, dtype=torch.bfloat16).to(device)
    work = tuple(t.detach() for t in work)  # there is no second derivative
    torch.library.opcheck(kernels.scatter_tokens_bwd.library, (dout, *work, len(x), 2))


def test_slots_are_the_inverse_of_ids_keep(device):
    """L = 4, two CLS tokens in front of each sample."""
    if not backend.use_triton(torch.empty(0, device=device)):
        pytest.skip("only kernels use it")
    ids_keep = torch.tensor([2, 0, 7, 4, 5], device=device)
    slots = kernels.token_slots(ids_keep, 2, 4, 2)
    assert slots.T.tolist() == [[3, -1, 2, -1], [7, 8, -1, 6]]


WRONG = {
    "another sample's row": ("slots_ptr + place * S + s", "slots_ptr + place * S + S - 1 - s", 2),
    "a slot off by one": ("(sample + 1) * NUM_CLS", "sample * NUM_CLS", 1),
    "no position": ("filled + position", "filled", 1),
    "mask token everywhere": ("tl.where(slot >= 0, token, mask_token)", "mask_token", 1),
    "CLS tokens not averaged": ("total / NUM_CLS", "total", 1),
    "gradient of CLS not shared": ("to(tl.float32) / NUM_CLS", "to(tl.float32)", 1),
    "visible places in the mask token's gradient": ("tl.where(slot < 0, dout, 0.0)", "dout", 1),
    "samples beyond the last": (
        "dout_ptr + row * D + d, mask=inside[:, None] & (d < D), other=0.0",
        "dout_ptr + row * D + d, mask=inside[:, None] & (d < D), other=1.0",
        1,
    ),
    "CLS rows forgotten": ("tl.store(dtokens_ptr + (cls + token)", "tl.store(dtokens_ptr + cls", 1),
    "one partial sum": ("part = tl.program_id(2)", "part = 0 * tl.program_id(2)", 1),
}


@pytest.mark.parametrize("change", WRONG)
def test_comparison_notices(compare, mutant, change):
    if not backend.INTERPRET:
        pytest.skip("kernels are compiled for the GPU here")
    wrong = mutant(tokens, *WRONG[change])
    with backend.kernels("triton"), pytest.raises(AssertionError, match="off by|not finite"):
        check(compare, wrong.scatter_tokens, ([3, 0, 5, 1] * 17)[:67], 20, 8, 2, torch.float32)


def test_scatter_takes_the_type_of_the_stream(device):
    packing, ids_keep, args = case([2], 3, 4, 1, torch.bfloat16, torch.float32, device)
    assert on(scatter_tokens, packing, ids_keep, 1)(**args).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokens", torch.zeros(8, 4)),
        ("tokens", torch.zeros(7, 4, 1)),
        ("num_cls", 0),
        ("num_cls", 4),
        ("mask_token", torch.zeros(5)),
        ("mask_token", torch.zeros(1, 4)),
        ("pos_embed", torch.zeros(6, 5)),
        ("pos_embed", torch.zeros(2, 4)),
        ("pos_embed", torch.zeros(6, 4, device="meta")),
        ("ids_keep", torch.zeros(4, dtype=torch.int64)),
        ("ids_keep", torch.zeros(5, dtype=torch.int32)),
    ],
    ids=lambda value: str(getattr(value, "shape", value)),
)
def test_scatter_refuses_by_name(name, value):
    args = {
        "tokens": torch.zeros(7, 4),
        "packing": pack([4, 3]),
        "ids_keep": torch.tensor([0, 1, 2, 6, 7]),
        "num_cls": 1,
        "mask_token": torch.zeros(4),
        "pos_embed": torch.zeros(6, 4),
    }
    scatter_tokens(**args)
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got "):
        scatter_tokens(**(args | {name: value}))
