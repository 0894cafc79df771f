"""Positions added to packed tokens: against a loop over tokens, and the facts of its gradients."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from umd.kernels import backend, positions
from umd.kernels.positions import add_positions, add_positions_ref
from umd.kernels.triton import positions as kernels
from umd.kernels.triton.tokens import token_slots

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def case(lengths, L, D, dtype, table=None, device="cpu", seed=0):
    """(ids_keep, differentiable arguments) of samples with `lengths` visible patches of L."""
    places = [randn(L, seed=seed + s).argsort()[:length] + s * L for s, length in enumerate(lengths)]
    args = {
        "x": randn(sum(lengths), D, seed=seed, dtype=dtype).to(device),
        "pos_embed": randn(L, D, seed=seed + 1, dtype=table or dtype).to(device),
    }
    return torch.cat(places).to(device), args


def by_loops(x, pos_embed, ids_keep):
    return torch.stack([row + pos_embed[i % len(pos_embed)] for row, i in zip(x, ids_keep.tolist(), strict=True)])


def on(ids_keep, samples, op=add_positions):
    return lambda x, pos_embed: op(x, ids_keep, pos_embed, samples)


def check(compare, lengths, L, D, dtype, table=None, device="cpu", op=add_positions):
    ids_keep, args = case(lengths, L, D, dtype, table, device)
    compare(on(ids_keep, len(lengths), op), partial(by_loops, ids_keep=ids_keep), args)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("lengths", [[2, 2], [5, 5, 2, 2], [6], [1, 6, 0, 3]], ids=str)
def test_against_loops(compare, device, lengths, dtype):
    check(compare, lengths, 6, 4, dtype, device=device)


@pytest.mark.parametrize("table", [torch.float32, torch.float16], ids=str)
def test_types_may_differ(compare, device, table):
    check(compare, [3, 5, 0, 4], 7, 24, torch.bfloat16, table, device)


def test_gradient_of_narrow_positions_is_rounded_once(device):
    ids_keep, args = case([3, 5, 0, 4], 7, 24, torch.float32, torch.bfloat16, device)
    found = []
    for table in (args["pos_embed"], args["pos_embed"].float()):
        table.requires_grad_()
        y = add_positions(args["x"], ids_keep, table, 4)
        found.append(torch.autograd.grad(y, table, args["x"])[0])
    assert found[0].dtype == torch.bfloat16 and torch.equal(found[0], found[1].bfloat16())


@pytest.mark.parametrize(("D", "dtype"), [(1152, torch.float16), (1000, torch.bfloat16)], ids=str)
def test_full_width(compare, device, D, dtype):
    check(compare, [4, 0, 7], 10, D, dtype, torch.float32, device)


def test_more_samples_than_a_program_takes_at_once(compare, device):
    """A number of samples and of places that no block divides."""
    samples = kernels.FORWARD["SAMPLES"] + 2 * kernels.BACKWARD["BLOCK_S"] * kernels.BACKWARD["WARPS"] + 3
    check(compare, [(3 * s) % 6 for s in range(samples)], 5, 24, torch.bfloat16, torch.float32, device)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any),
    D=st.sampled_from([1, 8, 260]),
    dtype=st.sampled_from(TYPES),
)
def test_any_samples(compare, device, lengths, D, dtype):
    check(compare, lengths, 7, D, dtype, device=device)


def test_the_sum_is_rounded_once(device):
    """Above half of bf16's step at 1, by less than bf16 tells from half."""
    x = torch.full((1, 8), 1.0, dtype=torch.bfloat16, device=device)
    pos_embed = torch.full((2, 8), 2.0**-8 + 2.0**-17, device=device)
    y = add_positions(x, torch.tensor([1], device=device), pos_embed, 1)
    assert y.dtype == torch.bfloat16 and (y.float() == 1 + 2.0**-7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_types_are_a_lookup_and_a_sum_to_the_bit(device, dtype):
    ids_keep, args = case([3, 0, 5], 6, 40, dtype, device=device)
    assert torch.equal(on(ids_keep, 3)(**args), args["x"] + F.embedding(ids_keep % 6, args["pos_embed"]))


def test_gradients_of_ones_are_counts(device):
    """A place that no sample keeps gets zero, into memory that was full of NaN."""
    ids_keep = torch.tensor([0, 3, 5 + 3, 5 + 1, 10 + 3], device=device)
    x, pos_embed = (torch.zeros(n, 24, device=device, requires_grad=True) for n in (5, 5))
    y = add_positions(x, ids_keep, pos_embed, 3)
    dx, dpos_embed = torch.autograd.grad(y, (x, pos_embed), torch.ones_like(y))
    assert (dx == 1).all()
    assert torch.equal(dpos_embed, torch.tensor([1.0, 1, 0, 3, 0], device=device)[:, None].expand(5, 24))


def test_no_token(device):
    x, pos_embed = torch.zeros(0, 24, device=device).requires_grad_(), torch.ones(5, 24, device=device).requires_grad_()
    y = add_positions(x, torch.zeros(0, dtype=torch.int64, device=device), pos_embed, 2)
    dx, dpos_embed = torch.autograd.grad(y, (x, pos_embed), torch.ones_like(y))
    assert y.shape == dx.shape == (0, 24) and (dpos_embed == 0).all()


def test_only_what_is_asked_for_gets_a_gradient(device):
    ids_keep, args = case([3, 2], 6, 24, torch.float32, device=device)
    for wanted in args:
        leaves = {name: x.detach().requires_grad_(name == wanted) for name, x in args.items()}
        on(ids_keep, 2)(**leaves).sum().backward()
        assert {name for name, x in leaves.items() if x.grad is not None} == {wanted}


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_repeats_to_the_bit(device):
    ids_keep, args = case([3, 5, 1] * 30, 6, 40, torch.bfloat16, torch.float32, device)

    def step():
        leaves = [x.clone().requires_grad_() for x in args.values()]
        y = on(ids_keep, 90)(*leaves)
        return y, *torch.autograd.grad(y, leaves, y.detach())

    for first, second in zip(step(), step(), strict=True):
        assert torch.equal(first, second)


def test_takes_views(device):
    """Tokens, places and positions cut from wider ones; a gradient of strides zero."""
    ids_keep, args = case([3, 2], 4, 12, torch.float32, device=device)
    dense = [x[:, 2:10].contiguous().requires_grad_() for x in args.values()]
    views = [x.requires_grad_() for x in args.values()]
    y = add_positions(views[0][:, 2:10], torch.stack([ids_keep] * 2, 1)[:, 0], views[1][:, 2:10], 2)
    expected = on(ids_keep, 2)(*dense)
    assert torch.equal(y, expected)
    y.sum().backward()
    expected.sum().backward()
    for a, b in zip(views, dense, strict=True):
        assert torch.equal(a.grad[:, 2:10], b.grad)


def test_compiles_whole(device):
    ids_keep, args = case([3, 2, 4], 6, 24, torch.bfloat16, torch.float32, device)
    leaves = [x.requires_grad_() for x in args.values()]
    op = on(ids_keep, 3)
    compiler = "inductor" if device == "cuda" else "aot_eager"
    y, compiled = op(*leaves), torch.compile(op, fullgraph=True, backend=compiler)(*leaves)
    assert torch.equal(y, compiled)
    for a, b in zip(*(torch.autograd.grad(z, leaves, y.detach()) for z in (compiled, y)), strict=True):
        torch.testing.assert_close(a, b)


def test_operators(device):
    if not backend.use_triton(torch.empty(0, device=device)):
        pytest.skip("the definition is no operator")
    ids_keep, args = case([3, 2, 4], 6, 24, torch.bfloat16, torch.float32, device)
    x, pos_embed = (x.requires_grad_() for x in args.values())
    slots = token_slots(ids_keep, 3, 6, 0)
    torch.library.opcheck(token_slots.library, (ids_keep, 3, 6, 0))
    torch.library.opcheck(kernels.add_positions_fwd.library, (x, slots, pos_embed))
    torch.library.opcheck(kernels.add_positions_bwd.library, (x.detach(), slots, torch.float32))


WRONG = {
    "the rows of another place": ("place * S + s, mask=(s < S)", "(L - 1 - place) * S + s, mask=(s < S)"),
    "no position": ("x + position", "x"),
    "another place's position": ("pos_embed_ptr + here * D", "pos_embed_ptr + (L - 1 - here) * D"),
    "only the first samples, forward": ("tl.minimum(first + SAMPLES, S), BLOCK_S)", "first + 1, BLOCK_S)"),
    "only the first samples, backward": ("range(0, S, BLOCK_S * WARPS)", "range(0, 1, BLOCK_S * WARPS)"),
    "the same samples again": ("s += BLOCK_S * WARPS", "s += 0"),
    "absent tokens count": ("(cols < D)[None, :], other=0.0", "(cols < D)[None, :], other=1.0"),
    "the last samples only": ("total += tl.sum(dy", "total = tl.sum(dy"),
}  # fmt: skip


@pytest.mark.parametrize("change", WRONG)
def test_comparison_notices(compare, mutant, change):
    if not backend.INTERPRET:
        pytest.skip("kernels are compiled for the GPU here")
    wrong = mutant(positions, *WRONG[change])
    with backend.kernels("triton"), pytest.raises(AssertionError, match="off by|not finite|outside"):
        check(compare, ([3, 0, 5, 1] * 17)[:67], 20, 8, torch.float32, op=wrong.add_positions)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", torch.zeros(5, 4, 1)),
        ("x", torch.zeros(5, 4, dtype=torch.int32)),
        ("ids_keep", torch.zeros(4, dtype=torch.int64)),
        ("ids_keep", torch.zeros(5, dtype=torch.int32)),
        ("ids_keep", torch.zeros(5, dtype=torch.int64, device="meta")),
        ("pos_embed", torch.zeros(6, 5)),
        ("pos_embed", torch.zeros(4)),
        ("pos_embed", torch.zeros(6, 4, dtype=torch.int64)),
        ("pos_embed", torch.zeros(6, 4, device="meta")),
        ("num_samples", 0),
        ("num_samples", -1),
    ],
    ids=lambda value: str(getattr(value, "shape", value)),
)
def test_refuses_by_name(name, value):
    args = dict(x=torch.zeros(5, 4), ids_keep=torch.tensor([0, 1, 2, 6, 7]), pos_embed=torch.zeros(6, 4), num_samples=2)
    add_positions(**args)
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got "):
        add_positions(**(args | {name: value}))


def test_refuses_more_tokens_than_places():
    with pytest.raises(ValueError, match="^num_samples: expected at least 3, for 5 tokens, got 2"):
        add_positions(torch.zeros(5, 4), torch.arange(5), torch.zeros(2, 4), 2)


def test_the_definition_is_what_the_op_does_on_the_cpu():
    ids_keep, args = case([3, 2], 6, 24, torch.bfloat16, torch.float32)
    with backend.kernels("reference"):
        y = on(ids_keep, 2)(**args)
    assert torch.equal(y, add_positions_ref(args["x"], ids_keep, args["pos_embed"]))
