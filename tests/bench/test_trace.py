"""`umd bench trace`: sums of hand-made traces, what is printed and written, and what cannot be compared."""

import io
import json

import pytest
import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from umd import cli
from umd.bench.options import TraceBench
from umd.bench.trace import group_of, run
from umd.errors import UserError


def event(cat, name, ts, dur, tid=1, **args) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": tid, "ts": ts, "dur": dur, "args": args}


def step(number: int, kernels: list[tuple[str, int]], gap: int) -> list[dict]:
    """A step of 10 ms whose kernels, given with their µs, run `gap` µs after one another; each launch takes 5 µs."""
    start = 10_000 * number
    events = [event("user_annotation", f"ProfilerStep#{number}", start, 10_000)]
    at = start + 100
    for i, (name, dur) in enumerate(kernels):
        link = 100 * number + i
        events.append(event("cuda_runtime", "cudaLaunchKernel", start + 10 * i, 5, correlation=link))
        events.append(event("kernel", name, at, dur, tid=7, correlation=link))
        at += dur + gap
    return events


@pytest.fixture
def compared(tmp_path):
    """Runs the comparison: its rows by group and name, and what was printed."""

    def make(a, b, **options):
        for name, events in (("a", a), ("b", b)):
            (tmp_path / f"{name}.json").write_text(json.dumps({"traceEvents": events}))
        console = Console(width=100, file=io.StringIO())
        run(
            TraceBench(tmp_path / "a.json", tmp_path / "b.json", json=tmp_path / "new" / "rows.json", **options),
            console,
        )
        rows = json.loads((tmp_path / "new" / "rows.json").read_text())
        return {(row["group"], row["name"]): row for row in rows}, console.file.getvalue()

    return make


# Two steps of A and one of B. By the step: products 3 ms less, norms 1 ms more; B has no copy.
A_STEP = [("gemm_a", 3000), ("gemm_b", 1000), ("_layer_norm_fwd_kernel", 1000), ("direct_copy_kernel_cuda", 500)]
B_STEP = [("gemm_a", 500), ("gemm_a", 500), ("_layer_norm_fwd_kernel", 2000)]
A, B = step(1, A_STEP, 0) + step(2, A_STEP, 0), step(4, B_STEP, gap=200)


def test_rows_are_by_the_step_those_that_differ_most_first(compared):
    rows, _ = compared(A, B)
    assert list(rows) == [
        ("matmul", ""), ("matmul", "gemm_a"), ("matmul", "gemm_b"),
        ("norm", ""), ("norm", "_layer_norm_fwd_kernel"),
        ("copies and casts", ""), ("copies and casts", "direct_copy_kernel_cuda"),
        ("total", ""), ("GPU idle", ""), ("host, launching", ""), ("step", ""),
    ]  # fmt: skip
    # A's ms, B's ms, A's calls, B's calls, difference, share of -2.5 ms
    expected = {
        ("matmul", ""): (4, 1, 2, 2, -3, 1.2),
        ("matmul", "gemm_a"): (3, 1, 1, 2, -2, 0.8),
        ("matmul", "gemm_b"): (1, 0, 1, 0, -1, 0.4),
        ("norm", ""): (1, 2, 1, 1, 1, -0.4),
        ("copies and casts", ""): (0.5, 0, 1, 0, -0.5, 0.2),
        ("total", ""): (5.5, 3, 4, 3, -2.5, 1),
    }
    keys = ("a_ms", "b_ms", "a_calls", "b_calls", "difference_ms", "share")
    for key, values in expected.items():
        assert tuple(rows[key][k] for k in keys) == pytest.approx(values), key


def test_what_is_said_of_the_step(compared):
    """A's kernels follow without gaps, 4.5 ms from those of one step to those of the next; B has two gaps of 0.2."""
    rows, _ = compared(A, B)
    assert [rows["GPU idle", ""][k] for k in ("a_ms", "b_ms")] == pytest.approx([4.5 / 2, 0.4])
    assert [rows["host, launching", ""][k] for k in ("a_ms", "b_ms")] == pytest.approx([0.020, 0.015])
    assert [rows["step", ""][k] for k in ("a_ms", "b_ms")] == pytest.approx([10, 10])


def test_the_table_has_all_of_it(compared):
    _, printed = compared(A, B)
    lines = [line.split() for line in printed.splitlines()]
    assert printed.splitlines()[0].endswith("a.json: 2 steps") and printed.splitlines()[1].endswith("b.json: 1 step")
    assert ["matmul", "4.00", "1.00", "-3.00", "120%", "2", "2"] in lines
    assert ["gemm_b", "1.00", "0.00", "-1.00", "40%", "1", "0"] in lines
    assert ["total", "5.50", "3.00", "-2.50", "100%", "4", "3"] in lines
    assert ["GPU", "idle", "2.25", "0.40", "-1.85"] in lines


def test_a_trace_with_itself_differs_in_nothing(compared):
    rows, printed = compared(A, A)
    assert all(row["difference_ms"] == 0 and row["share"] is None for row in rows.values())
    assert "5.50" in printed


def test_unmarked_steps_are_counted_as_told(compared):
    unmarked = [e for e in A if e["cat"] != "user_annotation"]
    rows, printed = compared(unmarked, B, steps=2)
    assert rows["total", ""]["a_ms"] == pytest.approx(5.5) and ("step", "") not in rows
    assert "marks no steps, taken as 2 (--steps)" in printed


def test_traces_of_a_gpu_and_of_a_cpu_do_not_compare(compared):
    cpu = [event("cpu_op", "aten::mm", 0, 10)]
    for a, b in ((A, cpu), (cpu, A)):
        with pytest.raises(UserError, match="has the kernels of a GPU and .* has ops alone"):
            compared(a, b)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas", "matmul"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NTT", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x64>(Params)", "matmul"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>(cublasSplitKParams<float>)", "matmul"),
        ("void pytorch_flash::flash_bwd_kernel<Flash_bwd_kernel_traits<64, cutlass::bfloat16_t>>(Params)", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel::Params)", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x64x64", "attention"),
        ("void at::native::vectorized_layer_norm_kernel<float, float>(int, float)", "norm"),
        ("_layer_norm_bwd_kernel", "norm"),
        ("triton_per_fused_native_layer_norm_0", "norm"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>(int)", "elementwise"),
        ("triton_poi_fused_add_gelu_1", "elementwise"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>(int)", "copies and casts"),
        ("_scatter_tokens_fwd_kernel", "copies and casts"),
        ("void at::native::reduce_kernel<512, 1, at::native::MeanOps<float>>(int)", "reduction"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>(int)", "optimizer"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "NCCL"),
        ("Memcpy DtoH (Device -> Pinned)", "memcpy"),
        ("Memset (Device)", "memcpy"),
        ("_masked_diffusion_loss_fwd_kernel", "other"),
        ("aten::addmm", "matmul"),
        ("mkldnn::_linear_pointwise", "matmul"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::mul_", "elementwise"),
        ("aten::_to_copy", "copies and casts"),
    ],
)
def test_kernels_and_ops_find_their_group(name, group):
    assert group_of(name) == group


def test_on_the_command_line_a_real_trace_of_a_cpu(tmp_path, capsys):
    """B takes two products where A takes one."""
    x = torch.randn(64, 64)
    for name, products in (("a", 1), ("b", 2)):
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            for _ in range(products):
                torch.mm(x, x)
        recorded.export_chrome_trace(str(tmp_path / f"{name}.json.gz"))
    paths = [str(tmp_path / "a.json.gz"), str(tmp_path / "b.json.gz")]
    cli.main(["bench", "trace", *paths, "--json", str(tmp_path / "rows.json")])
    assert "aten::mm" in capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text()) if row["group"] == "matmul"}
    assert (rows["aten::mm"]["a_calls"], rows["aten::mm"]["b_calls"]) == (1, 2)


def test_a_file_that_is_none_ends_in_a_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", "trace", str(tmp_path / "a.json"), str(tmp_path)])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert "no trace can be read at" in err and "a.json" in err and "Traceback" not in err


def test_steps_must_be_some():
    with pytest.raises(UserError, match="steps 0: must be at least 1"):
        TraceBench("a", "b", steps=0)
