"""The backends behind `varlen_attention`: each against the fp64 definition, the choice between them, and refusals.

flash-attn and varlen_attn have kernels for CUDA only; conftest.py gives their operators one for the CPU.
"""

import inspect
import sys

import pytest
import torch

from umd.kernels import attention
from umd.kernels.attention import (
    FLASH_ATTN_SIGNATURES,
    attention_backend,
    set_attention,
    varlen_attention,
    varlen_attention_ref,
)
from umd.kernels.packing import pack

CPU = torch.device("cpu")
HALF = [torch.bfloat16, torch.float16]
LENGTHS = [[5], [3, 3], [4, 4, 7, 7, 7, 1], [2, 0, 1, 3], [0], [64, 64, 160]]


def draw(lengths, H=3, d=8, dtype=torch.bfloat16, device="cpu"):
    packing = pack(lengths, device=device)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(packing.num_tokens, 3, H, d, generator=generator, dtype=torch.float64)
    return packing, qkv.to(device, dtype)


def plain(packing):
    """softmax(q kᵀ / √d) v sample by sample, in the type of its input."""

    def attend(qkv):
        out = torch.zeros_like(qkv[:, 0])
        bounds = packing.cu_seqlens.tolist()
        for start, stop in zip(bounds, bounds[1:], strict=False):
            q, k, v = qkv[start:stop].permute(1, 2, 0, 3)  # [H, L, d]
            out[start:stop] = ((q @ k.mT / qkv.shape[-1] ** 0.5).softmax(-1) @ v).transpose(0, 1)
        return out

    return attend


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_every_backend_computes_the_definition(compare, backend, lengths, dtype):
    packing, qkv = draw(lengths, dtype=dtype)
    compare(lambda qkv: varlen_attention(qkv, packing, backend), plain(packing), {"qkv": qkv})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("lengths", [*LENGTHS, [257] * 3, [1, 5, 68, 164, 257]], ids=str)
@pytest.mark.parametrize("name", ["triton", "flash_attn", "varlen_attn", "sdpa", "matmul"])
def test_every_backend_on_a_gpu(compare, name, lengths, dtype):
    packing, qkv = draw(lengths, H=4, d=64, dtype=dtype, device="cuda")
    refusal = attention._refusal(name, qkv.device, dtype, 64)
    if refusal:
        pytest.skip(f"{name} {refusal}")
    compare(lambda qkv: varlen_attention(qkv, packing, name), plain(packing), {"qkv": qkv})


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "flash_attn", "varlen_attn", "sdpa", "matmul"])
def test_repeats_to_the_bit_on_a_gpu(name, strictly_deterministic):
    packing, qkv = draw([257, 1, 164, 257], H=4, d=64, device="cuda")
    refusal = attention._refusal(name, qkv.device, qkv.dtype, 64)
    if refusal:
        pytest.skip(f"{name} {refusal}")

    def step():
        leaf = qkv.clone().requires_grad_()
        out = varlen_attention(leaf, packing, name)
        return out, torch.autograd.grad(out, leaf, out.detach())[0]

    out, dqkv = step()
    for _ in range(5):
        again = step()
        assert torch.equal(again[0], out) and torch.equal(again[1], dqkv)


def test_every_backend_takes_views(compare, backend):
    """Heads cut from a wider projection."""
    packing, wide = draw([4, 4, 2], H=5, d=24)
    strided = wide[:, :, 1:4, 8:16]
    compare(lambda qkv: varlen_attention(qkv, packing, backend), plain(packing), {"qkv": strided})


@pytest.mark.parametrize("lengths", [[5, 5, 3], [4, 4]], ids=str)
def test_every_backend_compiles_whole(backend, lengths):
    packing, qkv = draw(lengths)
    qkv.requires_grad_()

    def call(qkv):
        return varlen_attention(qkv, packing, backend) * 2

    out, compiled = call(qkv), torch.compile(call, fullgraph=True, backend="aot_eager")(qkv)
    torch.testing.assert_close(compiled, out)
    gradients = (torch.autograd.grad(y, qkv, out.detach())[0] for y in (compiled, out))
    torch.testing.assert_close(*gradients)


def test_the_automatic_choice_compiles_whole():
    packing, qkv = draw([5, 5, 3])
    compiled = torch.compile(varlen_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(qkv, packing), varlen_attention(qkv, packing))


def test_flash_attn_is_asked_for_the_same_gradient_bits_each_time(flash_attn_on_cpu):
    packing, qkv = draw([3, 2])
    varlen_attention(qkv.requires_grad_(), packing, "flash_attn").sum().backward()
    assert flash_attn_on_cpu == [True]


def test_the_signatures_are_those_of_the_package(flash_attn_on_cpu):
    import flash_attn

    for name, expected in FLASH_ATTN_SIGNATURES.items():
        assert ", ".join(inspect.signature(getattr(flash_attn, name)).parameters) == expected
    assert attention._flash_attn_refusal() == ""


def test_sdpa_copies_nothing_with_one_run():
    """Its output is a view of SDPA's own, and the gradient arrives as one tensor in qkv's layout."""
    packing, qkv = draw([6, 6], dtype=torch.float32)
    leaf = qkv.requires_grad_()
    with torch.profiler.profile() as profile:
        varlen_attention(leaf, packing, "sdpa").backward(torch.ones(12, 3, 8))
    counts = {event.key: event.count for event in profile.key_averages()}
    assert "aten::clone" not in counts and counts.get("aten::cat", 0) <= 1  # stack: dq, dk, dv into one
    assert leaf.grad.is_contiguous()


def test_choice_for_a_call_a_block_and_the_process():
    assert attention_backend(CPU, torch.float32, 64) == ("matmul", attention_backend(CPU, torch.float32, 64).reason)
    with attention.attention("sdpa"):
        assert attention_backend(CPU, torch.float32, 64) == ("sdpa", "was asked for")
        assert attention_backend(CPU, torch.float32, 64, backend="matmul").name == "matmul"
    assert attention_backend(CPU, torch.float32, 64).name == "matmul"
    set_attention("sdpa")
    try:
        assert attention_backend(CPU, torch.float32, 64).name == "sdpa"
    finally:
        set_attention("auto")


def test_the_rule_on_the_cpu():
    def chosen(*lengths):
        return attention_backend(CPU, torch.bfloat16, 32, pack(lengths)).name

    assert chosen(192, 192) == "matmul"
    with torch.no_grad():
        assert chosen(192, 192) == "sdpa" and chosen(68, 128) == "matmul"


def test_the_rule_off_the_cpu():
    """Rows of the table in `attention_backend`, given what can run."""

    def pick(flash_attn, varlen_attn, runs, triton="is switched off", longest=257):
        refused = dict(triton=triton, flash_attn=flash_attn, varlen_attn=varlen_attn)
        name, reason = attention._automatic(refused, runs, longest)
        for other, why in refused.items():  # who asks why one does not run is told
            assert name != other or not why
        assert name in ("triton", "flash_attn") or flash_attn in reason
        return name

    assert pick("", "", 2, triton="") == pick("", "", None, triton="", longest=attention.SHORT) == "triton"
    assert pick("", "", 2, triton="", longest=attention.SHORT + 1) == "flash_attn"

    assert pick("", "", 2) == pick("", "", None) == pick("", "", 1) == "flash_attn"
    assert pick("is not installed", "", 1) == pick("is not installed", "", 0) == "sdpa"
    assert pick("is not installed", "", 2) == pick("is not installed", "", 3) == "varlen_attn"
    assert pick("is not installed", "", None) == "varlen_attn"
    assert pick("takes bf16 and fp16, not float32", "takes bf16 and fp16, not float32", 5) == "sdpa"


def test_an_unknown_backend_names_the_nearest():
    packing, qkv = draw([3])
    for wrong, near in (
        ("flash-attn", "flash_attn"),
        ("flash", "flash_attn"),
        ("spda", "sdpa"),
        ("varlen", "varlen_attn"),
    ):
        with pytest.raises(ValueError, match=f"^backend: expected one of auto, .*got '{wrong}'; did you mean '{near}'"):
            varlen_attention(qkv, packing, wrong)
        with pytest.raises(ValueError, match=f"did you mean '{near}'"):
            set_attention(wrong)


@pytest.mark.parametrize("name", ["flash_attn", "varlen_attn"])
def test_a_backend_that_cannot_run_says_why(name, request):
    with pytest.raises(ValueError, match=f"^backend: {name} takes bf16 and fp16, not float32; 'auto'"):
        varlen_attention(*reversed(draw([3], dtype=torch.float32)), name)
    for d in (12, 264):
        with pytest.raises(ValueError, match=f"{name} takes head dimensions up to 256 .* multiples of 8, not {d};"):
            varlen_attention(*reversed(draw([3], d=d)), name)
    with pytest.raises(ValueError, match=f"{name} (is not installed|has no kernel for cpu|.* does not import)"):
        varlen_attention(*reversed(draw([3])), name)


def install(site, version, source):
    info = site / f"flash_attn-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {version}\n")
    (site / "flash_attn").mkdir()
    (site / "flash_attn" / "__init__.py").write_text(source)


@pytest.mark.parametrize(
    ("version", "source", "reason"),
    [
        ("2.5.9", "", "is version 2.5.9; expected 2.7 to 2.8"),
        ("3.0.0b1", "", "is version 3.0.0b1; expected 2.7 to 2.8"),
        ("2.8.3", "import flash_attn_2_cuda_of_another_torch", "does not import .ModuleNotFoundError: .*another_torch"),
        ("2.8.3", "", "has no flash_attn_varlen_qkvpacked_func"),
        (
            "2.8.3",
            "def flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens): ...",
            "2.8.3: flash_attn_varlen_qkvpacked_func takes .qkv, cu_seqlens., expected .qkv",
        ),
        (
            "2.8.3",
            f"def flash_attn_varlen_qkvpacked_func({FLASH_ATTN_SIGNATURES['flash_attn_varlen_qkvpacked_func']}): ...\n"
            "def flash_attn_varlen_kvpacked_func(q, kv): ...",
            "2.8.3: flash_attn_varlen_kvpacked_func takes .q, kv., expected .q, kv, cu_seqlens_q",
        ),
    ],
)
def test_another_flash_attn_is_not_called(tmp_path, monkeypatch, version, source, reason):
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, version, source)
    attention._flash_attn_refusal.cache_clear()
    try:
        with pytest.raises(ValueError, match=f"^backend: flash_attn .*{reason}"):
            varlen_attention(*reversed(draw([3])), "flash_attn")
    finally:
        attention._flash_attn_refusal.cache_clear()
        sys.modules.pop("flash_attn", None)


def test_a_gpu_is_asked_once_for_what_it_is():
    attention._gpu_refusal.cache_clear()
    first, second = (attention.attention_backend(torch.device("cuda"), torch.bfloat16, 64) for _ in range(2))
    assert first == second and attention._gpu_refusal.cache_info().misses == 1


def test_a_packing_elsewhere_is_refused():
    _, qkv = draw([3])
    with pytest.raises(ValueError, match="^packing: expected on cpu like qkv, got meta"):
        varlen_attention(qkv, pack([3], device="meta"))


def test_comparison_notices_a_wrong_scale(compare, monkeypatch):
    packing, qkv = draw([5, 4])
    with pytest.raises(AssertionError, match="off by"):
        compare(lambda qkv: varlen_attention(qkv * 1.1, packing, "sdpa"), plain(packing), {"qkv": qkv})
    assert varlen_attention_ref(qkv, packing).shape == (9, 3, 8)
