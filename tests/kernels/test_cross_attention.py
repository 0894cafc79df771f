"""varlen_cross_attention by every backend against its definition, with gradients; and what it refuses."""

from itertools import groupby

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from umd.kernels import attention
from umd.kernels.attention import attention_backend
from umd.kernels.cross_attention import varlen_cross_attention, varlen_cross_attention_ref
from umd.kernels.packing import pack, paired_runs

CPU = torch.device("cpu")
HALF = [torch.bfloat16, torch.float16]
lengths = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=8)
# Queries and keys of each sample: dense, ragged, none of either, of both, of all.
PAIRS = [
    [(5, 3)],
    [(4, 7)] * 3,
    [(4, 7), (4, 7), (4, 2), (1, 2)],
    [(0, 3), (2, 1), (3, 0), (0, 0), (2, 5)],
    [(3, 0), (2, 0)],
    [(0, 3)],
    [(0, 0)],
]


def streams(pairs, dtype=torch.float64, H=2, d=4, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    packing, kv_packing = pack([q for q, _ in pairs], device=device), pack([k for _, k in pairs], device=device)
    q = torch.randn(packing.num_tokens, H, d, generator=generator, dtype=torch.float64).to(device, dtype)
    kv = torch.randn(kv_packing.num_tokens, 2, H, d, generator=generator, dtype=torch.float64).to(device, dtype)
    return q.requires_grad_(), kv.requires_grad_(), packing, kv_packing


def plain(packing, kv_packing):
    """softmax(q kᵀ / √d) v sample by sample, in the type of its inputs."""

    def attend(q, kv):
        out = torch.zeros_like(q)
        starts, kv_starts = packing.cu_seqlens.tolist(), kv_packing.cu_seqlens.tolist()
        for start, stop, kv_start, kv_stop in zip(starts, starts[1:], kv_starts, kv_starts[1:], strict=False):
            k, v = kv[kv_start:kv_stop].permute(1, 2, 0, 3)  # [H, M, d]
            weights = (q[start:stop].transpose(0, 1) @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
            out[start:stop] = (weights @ v).transpose(0, 1)
        return out

    return attend


def by(backend, *packings):
    return lambda q, kv: varlen_cross_attention(q, kv, *packings, backend)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("pairs", PAIRS, ids=str)
def test_every_backend_computes_the_definition(compare, backend, pairs, dtype):
    q, kv, *packings = streams(pairs, dtype, H=3, d=8)
    compare(by(backend, *packings), plain(*packings), {"q": q, "kv": kv})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("pairs", [*PAIRS, [(96, 161)] * 3 + [(192, 65)] * 2, [(257, 1), (1, 164)]], ids=str)
@pytest.mark.parametrize("name", ["flash_attn", "varlen_attn", "sdpa", "matmul"])
def test_every_backend_on_a_gpu(compare, name, pairs, dtype):
    q, kv, *packings = streams(pairs, dtype, H=4, d=64, device="cuda")
    refusal = attention._refusal(name, q.device, dtype, 64, cross=True)
    if refusal:
        pytest.skip(f"{name} {refusal}")
    compare(by(name, *packings), plain(*packings), {"q": q, "kv": kv})


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash_attn", "varlen_attn", "sdpa", "matmul"])
def test_repeats_to_the_bit_on_a_gpu(name, strictly_deterministic):
    q, kv, *packings = streams([(96, 161), (257, 65), (96, 161)], torch.bfloat16, H=4, d=64, device="cuda")
    refusal = attention._refusal(name, q.device, q.dtype, 64, cross=True)
    if refusal:
        pytest.skip(f"{name} {refusal}")

    def step():
        out = varlen_cross_attention(q, kv, *packings, name)
        return out, *torch.autograd.grad(out, (q, kv), out.detach())

    first = step()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))


def test_every_backend_takes_views(compare, backend):
    """Heads cut from wider projections."""
    q, kv, *packings = streams([(4, 2), (4, 2), (2, 3)], torch.bfloat16, H=5, d=24)
    compare(by(backend, *packings), plain(*packings), {"q": q[:, 1:4, 8:16], "kv": kv[:, :, 1:4, 8:16]})


@pytest.mark.parametrize("pairs", [[(5, 3), (5, 3), (2, 4)], [(4, 2)] * 2], ids=str)
def test_every_backend_compiles_whole(backend, pairs):
    q, kv, *packings = streams(pairs, torch.bfloat16, H=3, d=8)

    def call(q, kv):
        return varlen_cross_attention(q, kv, *packings, backend) * 2

    out, compiled = call(q, kv), torch.compile(call, fullgraph=True, backend="aot_eager")(q, kv)
    torch.testing.assert_close(compiled, out)
    for a, b in zip(*(torch.autograd.grad(y, (q, kv), out.detach()) for y in (compiled, out)), strict=True):
        torch.testing.assert_close(a, b)


def test_flash_attn_is_asked_for_the_same_gradient_bits_each_time(flash_attn_on_cpu):
    q, kv, *packings = streams([(3, 2), (1, 4)], torch.bfloat16, d=8)
    varlen_cross_attention(q, kv, *packings, "flash_attn").sum().backward()
    assert flash_attn_on_cpu == [True]


def test_the_choice_is_that_of_self_attention():
    """It counts runs that are equal in both lengths, and takes the longer one."""
    packings = [pack([5] * 4), pack([5] * 3 + [300])]
    options = dict(packing=packings[0], kv_packing=packings[1])
    assert attention_backend(CPU, torch.bfloat16, 64, **options).name == "matmul"
    q, kv, *own = streams([(3, 2)], torch.float32, d=8)
    with attention.attention("sdpa"):
        assert attention_backend(CPU, torch.bfloat16, 64, **options) == ("sdpa", "was asked for")
        with torch.profiler.profile() as profile:
            varlen_cross_attention(q, kv, *own)
    assert any("scaled_dot_product" in event.key for event in profile.key_averages())
    with pytest.raises(ValueError, match="^backend: varlen_attn takes bf16 and fp16, not float32; 'auto'"):
        varlen_cross_attention(q, kv, *own, "varlen_attn")
    with pytest.raises(ValueError, match="did you mean 'flash_attn'"):
        varlen_cross_attention(q, kv, *own, "flash-attn")


def test_the_choice_off_the_cpu_sees_both_lengths():
    """On a GPU that is not there: without flash-attn and a kernel of varlen_attn, SDPA says what it has."""
    meta = torch.device("meta")

    def reason(queries, keys):
        found = attention_backend(meta, torch.float32, 64, pack(queries), None, pack(keys))
        assert found.name == "sdpa"
        return found.reason

    assert reason([9] * 4, [200] * 4).startswith("has one dense batch")
    assert reason([9] * 4, [200, 200, 4, 4]).startswith("runs anywhere")
    assert reason([9, 9, 4, 4], [7, 8, 8, 8]).startswith("runs anywhere")
    assert reason([0, 9], [3, 3]).startswith("has one dense batch")  # who has no queries asks nothing


@settings(max_examples=50)
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


@given(lengths)
def test_runs_are_the_samples_in_order(pairs):
    _, _, packing, kv_packing = streams(pairs)
    expected = [(len(list(same)), *pair) for pair, same in groupby(pairs)]
    found = paired_runs(packing, kv_packing)
    assert [pair for samples, *pair in found for _ in range(samples)] == [list(p) for p in pairs if sum(p)]
    assert len(found) <= len(expected)


def test_equal_samples_are_one_run():
    assert paired_runs(pack([3] * 7), pack([2] * 7)) == [(7, 3, 2)]


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
    with pytest.raises(ValueError, match=r"q: expected floating-point \[6, H, d\], got float64 \[5, 2, 4\]"):
        varlen_cross_attention(q[:5], kv, packing, kv_packing)
    with pytest.raises(ValueError, match=r"kv: expected float64 \[4, 2, 2, 4\], got float64 \[4, 2, 1, 4\]"):
        varlen_cross_attention(q, kv[:, :, :1], packing, kv_packing)
    with pytest.raises(ValueError, match="expected 2 samples as in packing, got 1"):
        varlen_cross_attention(q, kv, packing, pack([4]))
    with pytest.raises(ValueError, match="^kv: expected float64 .*, got float32"):
        varlen_cross_attention(q, kv.float(), packing, kv_packing)
    with pytest.raises(ValueError, match="^kv: expected on cpu like q, got meta"):
        varlen_cross_attention(q, kv.to("meta"), packing, kv_packing)
    with pytest.raises(ValueError, match="^kv_packing: expected on cpu like q, got meta"):
        varlen_cross_attention(q, kv, packing, pack([3, 1], device="meta"))
