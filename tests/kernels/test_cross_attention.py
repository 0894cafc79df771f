"""varlen_cross_attention against its definition, sample by sample, with gradients; and what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from umd.kernels.cross_attention import paired_runs, varlen_cross_attention, varlen_cross_attention_ref
from umd.kernels.packing import pack

lengths = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=8)


def streams(pairs, dtype=torch.float64, H=2, d=4):
    generator = torch.Generator().manual_seed(0)
    packing, kv_packing = pack([q for q, _ in pairs]), pack([k for _, k in pairs])
    q = torch.randn(packing.num_tokens, H, d, generator=generator, dtype=torch.float64).to(dtype)
    kv = torch.randn(kv_packing.num_tokens, 2, H, d, generator=generator, dtype=torch.float64).to(dtype)
    return q.requires_grad_(), kv.requires_grad_(), packing, kv_packing


@settings(deadline=None, max_examples=50)
@given(lengths)
def test_equals_the_definition_with_gradients(pairs):
    q, kv, packing, kv_packing = streams(pairs)
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=q.dtype)
    found = varlen_cross_attention(q, kv, packing, kv_packing)
    expected = varlen_cross_attention_ref(q, kv, packing, kv_packing)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for name, a, b in zip(
        ("dq", "dkv"),
        torch.autograd.grad(found, (q, kv), dout, materialize_grads=True),
        torch.autograd.grad(expected, (q, kv), dout, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@settings(deadline=None, max_examples=50)
@given(lengths)
def test_runs_cover_every_sample_once_and_in_order(pairs):
    seen, q_stop, k_stop = [], 0, 0
    _, _, packing, kv_packing = streams(pairs)
    for queries, keys, samples, q_length, k_length in paired_runs(packing, kv_packing):
        assert (queries.start, keys.start) == (q_stop, k_stop)
        assert (queries.stop - q_stop, keys.stop - k_stop) == (samples * q_length, samples * k_length)
        q_stop, k_stop = queries.stop, keys.stop
        seen += [(q_length, k_length)] * samples
    assert seen == pairs


def test_equal_samples_are_one_run():
    assert len(list(paired_runs(pack([3] * 7), pack([2] * 7)))) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_in_low_precision_is_that_of_torch(dtype):
    q, kv, packing, kv_packing = streams([(5, 9)] * 3 + [(1, 4)], dtype, H=3, d=16)
    truth = varlen_cross_attention_ref(q.double(), kv.double(), packing, kv_packing)
    plain = []
    for i in range(packing.num_samples):
        rows, keys = (slice(*p.cu_seqlens[i : i + 2].tolist()) for p in (packing, kv_packing))
        k, v = kv[keys].permute(1, 2, 0, 3)
        heads = q[rows].transpose(0, 1)
        plain.append(torch.nn.functional.scaled_dot_product_attention(heads, k, v).transpose(0, 1))
    theirs = (torch.cat(plain).double() - truth).abs().max()
    ours = (varlen_cross_attention(q, kv, packing, kv_packing).double() - truth).abs().max()
    assert ours <= 2 * theirs + torch.finfo(dtype).eps


def test_a_sample_sees_no_other():
    q, kv, packing, kv_packing = streams([(2, 3), (4, 1), (0, 2), (3, 3)])
    before = varlen_cross_attention(q, kv, packing, kv_packing)
    with torch.no_grad():
        kv[3:4] = 9.0  # the keys of sample 1
    changed = (varlen_cross_attention(q, kv, packing, kv_packing) != before).flatten(1).any(1)
    assert changed.tolist() == [False] * 2 + [True] * 4 + [False] * 3


def test_what_does_not_fit_is_refused():
    q, kv, packing, kv_packing = streams([(2, 3), (4, 1)])
    with pytest.raises(ValueError, match=r"q: expected \[6, H, d\], got \(5, 2, 4\)"):
        varlen_cross_attention(q[:5], kv, packing, kv_packing)
    with pytest.raises(ValueError, match=r"kv: expected \(4, 2, 2, 4\), got \(4, 2, 1, 4\)"):
        varlen_cross_attention(q, kv[:, :, :1], packing, kv_packing)
    with pytest.raises(ValueError, match="expected 2 samples as in packing, got 1"):
        varlen_cross_attention(q, kv, packing, pack([4]))
