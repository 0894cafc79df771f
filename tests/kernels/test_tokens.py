"""Tokens in front of packed samples, and the decoder's input: against loops over samples."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from umd.kernels.packing import pack
from umd.kernels.tokens import prepend_tokens, scatter_tokens_ref, split_tokens

TYPES = [torch.float64, torch.float32, torch.bfloat16]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def prepend_by_loops(front, x, lengths):
    rest = x.split(lengths)
    return torch.cat([part for pair in zip(front, rest, strict=True) for part in pair])


@settings(max_examples=40, deadline=None, derandomize=True)
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


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("num_cls", [1, 4])
@pytest.mark.parametrize("lengths", [[2, 2], [5, 5, 2, 2], [6], [1, 6, 3]], ids=str)
def test_scatter_tokens(compare, lengths, num_cls, dtype):
    S, L, D = len(lengths), 6, 4
    places = [randn(L, seed=s).argsort()[:length] + s * L for s, length in enumerate(lengths)]
    ids_keep = torch.cat(places)
    packing = pack([num_cls + length for length in lengths])
    args = {
        "tokens": randn(S * num_cls + sum(lengths), D, dtype=dtype),
        "mask_token": randn(D, seed=1, dtype=dtype),
        "pos_embed": randn(L, D, seed=2, dtype=dtype),
    }
    compare(
        lambda tokens, mask_token, pos_embed: scatter_tokens_ref(
            tokens, packing, ids_keep, num_cls, mask_token, pos_embed
        ),
        lambda tokens, mask_token, pos_embed: scatter_by_loops(
            tokens, mask_token, pos_embed, lengths, num_cls, ids_keep
        ),
        args,
    )


def test_comparison_notices_a_swapped_place():
    args = randn(7, 4), randn(4, seed=1), randn(6, 4, seed=2)
    ids_keep = torch.tensor([4, 0, 3, 7, 11])
    expected = scatter_by_loops(*args, [3, 2], 1, ids_keep)
    tokens, mask_token, pos_embed = args
    for ids, same in ((ids_keep, True), (ids_keep[[1, 0, 2, 3, 4]], False)):
        found = scatter_tokens_ref(tokens, pack([4, 3]), ids, 1, mask_token, pos_embed)
        assert torch.allclose(found, expected) == same


def test_scatter_takes_the_type_of_the_stream():
    ids_keep, packing = torch.tensor([0, 2]), pack([3])
    tokens, mask_token, pos_embed = randn(3, 4, dtype=torch.bfloat16), randn(4).float(), randn(3, 4).float()
    found = scatter_tokens_ref(tokens, packing, ids_keep, 1, mask_token, pos_embed)
    assert found.dtype == torch.bfloat16
