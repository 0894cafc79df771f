"""Attention inside each sample: the op and its definition against plain torch, sample by sample."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from umd.kernels.attention import varlen_attention, varlen_attention_ref
from umd.kernels.packing import pack

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def draw(packing, H=3, d=8, dtype=torch.float64, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(packing.num_tokens, 3, H, d, generator=generator, dtype=torch.float64)
    return {"qkv": (scale * qkv).to(dtype)}


def on(op, packing):
    return lambda qkv: op(qkv, packing)


def plain(packing):
    """softmax(q kᵀ / √d) v with loops over samples and heads, in the type of its input."""

    def attention(qkv):
        out = torch.zeros_like(qkv[:, 0])
        offsets = packing.cu_seqlens.tolist()
        for start, stop in zip(offsets, offsets[1:], strict=False):
            for head in range(qkv.shape[2]):
                q, k, v = qkv[start:stop, :, head].unbind(1)  # [L, d]
                out[start:stop, head] = ((q @ k.T) / qkv.shape[-1] ** 0.5).softmax(-1) @ v
        return out

    return attention


@pytest.mark.parametrize("op", [varlen_attention, varlen_attention_ref])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    "lengths", [[5], [3, 3], [4, 4, 7, 7, 7, 1], [2, 0, 1, 3], [0], [1, 1], [0, 4, 0, 0, 4, 0]], ids=str
)
def test_lengths(compare, op, dtype, lengths):
    packing = pack(lengths)
    compare(on(op, packing), plain(packing), draw(packing, dtype=dtype))


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=6),
    H=st.integers(1, 3),
    d=st.sampled_from([1, 5, 16]),
    dtype=st.sampled_from(TYPES),
    seed=st.integers(0, 1000),
)
def test_any_packing(compare, lengths, H, d, dtype, seed):
    packing = pack(lengths)
    compare(on(varlen_attention, packing), plain(packing), draw(packing, H, d, dtype, seed))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_large_logits(compare, dtype):
    """Logits of a few hundred: exp without subtracting the maximum would overflow."""
    packing = pack([24, 24, 9])
    args = draw(packing, H=4, d=16, dtype=dtype, scale=10.0)
    compare(on(varlen_attention, packing), plain(packing), args)


def test_views_of_a_wider_tensor(compare):
    """Heads cut from a wider projection: strided input, strided gradient."""
    packing = pack([4, 4, 2])
    wide = draw(packing, H=5, d=12)["qkv"]
    strided = wide[:, :, 1:4, 2:10]
    assert not strided.is_contiguous()
    compare(on(varlen_attention, packing), plain(packing), {"qkv": strided})


def test_gradient_of_a_sum():
    """The gradient of a sum arrives expanded, with strides of zero."""
    packing = pack([3, 2])
    ours, theirs = (draw(packing)["qkv"].requires_grad_() for _ in range(2))
    varlen_attention(ours, packing).sum().backward()
    plain(packing)(theirs).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_gradcheck():
    packing = pack([2, 2, 0, 3])
    qkv = draw(packing, H=2, d=3)["qkv"].requires_grad_()
    assert torch.autograd.gradcheck(on(varlen_attention, packing), qkv)


def test_samples_do_not_see_each_other():
    packing = pack([3, 4, 4])
    qkv = draw(packing)["qkv"]
    changed = qkv.clone()
    changed[3:7] = 1e3
    before, after = varlen_attention(qkv, packing), varlen_attention(changed, packing)
    assert torch.equal(before[:3], after[:3]) and torch.equal(before[7:], after[7:])
    assert not torch.equal(before[3:7], after[3:7])


def test_comparison_notices_a_wrong_boundary(compare):
    for dtype in TYPES:
        with pytest.raises(AssertionError, match="off by"):
            args = draw(pack([4, 4]), dtype=dtype)
            compare(on(varlen_attention, pack([3, 5])), plain(pack([4, 4])), args)


def test_wrong_shapes_are_named():
    packing = pack([3, 2])
    qkv = draw(packing)["qkv"]
    for wrong in (qkv[:-1], qkv[:, :2], qkv[:, 0], qkv.flatten(2)):
        with pytest.raises(ValueError, match=r"^qkv: expected floating-point \[5, 3, H, d\]"):
            varlen_attention(wrong, packing)
