"""`umd bench audit`: its counter and its reader against kernels that are known, and what our kernels must keep."""

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the audit compiles kernels: pip install triton")

from umd.bench.audit import audit, compile_counted, count_call, count_op, run_apart  # noqa: E402
from umd.bench.count_bytes import TorchBytes  # noqa: E402
from umd.bench.inspect_kernel import ARCHITECTURES, global_accesses, occupancy  # noqa: E402
from umd.bench.op_cases import OPS  # noqa: E402
from umd.bench.options import Audit  # noqa: E402
from umd.cli import main  # noqa: E402
from umd.train.step_counts import tensor_bytes  # noqa: E402

pytestmark = pytest.mark.timeout(1500)  # every kernel compiles for three architectures, beside seven other tests

N = 4096  # elements of the small kernels' tensors
CALLS = {
    "copy": ("_copy", f"run(_copy, floats({N}), floats({N}), {N}, grid=(4,), BLOCK=1024)"),
    "copy of 1000": ("_copy", "run(_copy, floats(1000), floats(1000), 1000, BLOCK=1024)"),
    "copy off by one": ("_copy", f"run(_copy, floats({N} + 1)[1:], floats({N}), {N}, grid=(4,), BLOCK=1024)"),
    "strided": ("_every_eighth", f"run(_every_eighth, floats(8 * {N}), floats({N}), BLOCK={N})"),
    "float": ("_scale", f"run(_scale, floats({N}), floats({N}), 0.3, BLOCK={N})"),
    "constant": ("_scale_constant", f"run(_scale_constant, floats({N}), floats({N}), 0.3, BLOCK={N})"),
    "spilling": ("_cumulative", f"run(_cumulative, floats({N}), floats({N}), BLOCK={N}, num_warps=1, maxnreg=32)"),
    "not spilling": ("_cumulative", f"run(_cumulative, floats({N}), floats({N}), BLOCK={N}, num_warps=8)"),
    "float atomics": ("_count", f"run(_count, floats(4), floats({N}), BLOCK={N})"),
    "integer atomics": ("_count", f"run(_count, floats(4, dtype=torch.int32), torch.ones({N}).int(), BLOCK={N})"),
    "layer norm": (
        "_layer_norm_modulate",
        "run(_layer_norm_modulate, floats(6, 768, dtype=torch.bfloat16), floats(768), floats(768),"
        " floats(6, 768, dtype=torch.bfloat16), floats(6), grid=(6,), D=768, BLOCK=1024)",
    ),
    "assembly": ("_assembly", f"run(_assembly, floats({N}), floats({N}), BLOCK={N})"),
}


@pytest.fixture(scope="module")
def small():
    """{name: (what was counted, its row on sm_80)} of the kernels in kernels_to_audit.py."""
    sys.path.insert(0, str(Path(__file__).parent))  # the processes that run them inherit it
    try:
        jobs = [(count_call, f"kernels_to_audit:{kernel}", call) for kernel, call in CALLS.values()]
        counted = [found for (found,) in run_apart(True, jobs)]
        return dict(zip(CALLS, zip(counted, compile_counted(counted, ("sm_80",)), strict=True), strict=True))
    finally:
        sys.path.remove(str(Path(__file__).parent))


@pytest.fixture(scope="module")
def ours():
    """Rows of all ops at D = 768 on an H100. The slow test has every GPU."""
    few = ("scatter_tokens", "add_positions")  # whose sums weigh more than the gates allow in four samples
    samples = {name: 8 if name in few else 4 for name in OPS}
    jobs = [(count_op, name, "UMD-B/4", n, "bf16") for name, n in samples.items()]
    counted = [one for found in run_apart(True, jobs) for one in found]
    return compile_counted(counted, ("sm_90",))


def test_a_copy_asks_for_what_it_moves(small):
    for name, size in (("copy", 4 * N), ("copy of 1000", 4000)):
        counts = small[name][0].launches[0].counts
        assert (counts.asked, counts.unique, counts.touched, counts.float_atomics) == (2 * size, 2 * size, 2 * size, 0)
        row = small[name][1]
        assert (row.asked_bytes, row.unique_bytes, row.compulsory_bytes) == (2 * size,) * 3
        assert (row.spill_bytes, row.f64, row.atomics) == (0, 0, 0)
    assert small["copy"][0].launches[0].grid == (4,)
    assert small["copy"][1].predicted_us == pytest.approx(8 * N / 2039e9 * 1e6)


def test_a_strided_read_touches_a_sector_an_element(small):
    counts = small["strided"][0].launches[0].counts
    assert (counts.asked, counts.unique, counts.touched) == (8 * N, 32 * N + 4 * N, 8 * N)
    assert small["strided"][1].kernels[0]["access_bits"] == {"x_ptr": 32, "out_ptr": 128}


def test_alignment_decides_the_width_of_accesses(small):
    assert small["copy"][1].min_access_bits == 128
    assert small["copy off by one"][1].kernels[0]["access_bits"] == {"x_ptr": 32, "out_ptr": 128}


def test_a_run_time_float_is_fp64_and_a_constant_is_not(small):
    assert small["float"][1].f64 > 0 and small["constant"][1].f64 == 0


def test_spills_are_seen_and_launch_options_reach_the_compiler(small):
    assert small["spilling"][1].spill_bytes > 0 and small["spilling"][1].registers <= 32
    assert small["not spilling"][1].spill_bytes == 0
    assert small["not spilling"][1].kernels[0]["num_warps"] == 8


def test_atomics_on_floats_are_seen_and_on_integers_are_none(small):
    counted, row = small["float atomics"]
    assert row.atomics > 0 and counted.launches[0].counts.float_atomics == N
    assert counted.launches[0].counts.asked == 3 * 4 * N  # x, and the sums read and written
    counted, row = small["integer atomics"]
    assert row.atomics == 0 and counted.launches[0].counts.float_atomics == 0


def test_a_layer_norm_in_closed_form(small):
    """A program a row: x and y in bf16, both tables again, a mean; only that is narrower than 128 bits."""
    counted, row = small["layer norm"]
    assert row.asked_bytes == 6 * (768 * (2 + 2) + 768 * (4 + 4) + 4)
    assert row.unique_bytes == 6 * 768 * (2 + 2) + 768 * (4 + 4) + 32
    assert row.compulsory_bytes == 6 * 768 * (2 + 2) + 768 * (4 + 4) + 6 * 4
    bits = row.kernels[0]["access_bits"]
    assert bits == {"x_ptr": 128, "scale_ptr": 128, "shift_ptr": 128, "y_ptr": 128, "mean_ptr": 32}
    assert row.min_access_bits == 128


def test_what_the_interpreter_cannot_run_is_compiled_and_said_so(small):
    _, row = small["assembly"]
    assert row.asked_bytes is row.unique_bytes is row.predicted_us is None
    assert "not counted" in row.note and "inline_asm" in row.note.lower()
    assert row.registers > 0 and row.min_access_bits == 128


def test_accesses_are_told_apart_by_their_pointers():
    """A loop's pointer has two origins; a loaded index is none; what has no known origin counts against all."""
    ptx = """
    ld.param.b64 %rd1, [k_param_0];
    ld.param.b64 %rd2, [k_param_1];
    ld.param.b32 %r9, [k_param_2];
    mov.b64 %rd3, %rd1;
    $L__BB0_1:
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd3 + 0 ];
    add.s64 %rd3, %rd3, 64;
    mad.wide.s32 %rd4, %r1, 2, %rd2;
    @%p1 st.global.b16 [ %rd4 + 0 ], { %rs1 };
    red.global.add.f32 [ %rd4 + 0 ], %f1;
    cp.async.cg.shared.global [ %r8 + 0 ], [ %rd4 + 0 ], 0x10, 0x10;
    ld.global.v2.b32 { %r5, %r6 }, [ %rd9 + 0 ];
    """
    found = global_accesses(ptx, ["a", "b", "n"], ["a", "b"])
    assert [(x.kind, x.bits, x.is_float, set(x.arguments)) for x in found] == [
        ("load", 128, False, {"a"}),
        ("store", 16, False, {"b"}),
        ("atomic", 32, True, {"b"}),
        ("load", 128, False, {"b"}),
        ("load", 64, False, set()),
    ]


@pytest.mark.parametrize(
    "arch, registers, shared, warps, expected",
    [
        ("sm_80", 32, 0, 4, 1.0),  # 16 blocks of 4 warps
        ("sm_80", 64, 0, 4, 0.5),  # 65536 registers hold 32 warps of 64
        ("sm_80", 65, 0, 4, 0.4375),  # 65 become 72: 7 warps in each quarter
        ("sm_80", 255, 0, 4, 0.125),
        ("sm_80", 32, 0, 1, 0.5),  # 32 blocks at most
        ("sm_80", 32, 100 * 1024, 8, 0.125),  # one block in 164 KiB
        ("sm_90", 32, 100 * 1024, 8, 0.25),  # two in 228
    ],
)
def test_occupancy_is_that_of_the_cuda_occupancy_calculator(arch, registers, shared, warps, expected):
    assert occupancy(ARCHITECTURES[arch], registers, shared, warps) == expected


def test_bytes_of_eager_ops():
    x, y = torch.zeros(100, 8), torch.zeros(100, 8)
    cases = [
        (lambda: x + y, 3 * 3200),
        (lambda: x.add_(y), 3 * 3200),
        (lambda: x.copy_(y), 2 * 3200),
        (lambda: x.zero_(), 3200),
        (lambda: x.view(8, 100).t()[1:], 0),
        (lambda: torch.empty(100), 0),
        (lambda: x[:1].expand(100, 8) + y, 32 + 2 * 3200),
        (lambda: x.index_select(0, torch.tensor([3, 4])), 16 + 2 * 64),
    ]
    for work, expected in cases:
        with TorchBytes() as counted:
            work()
        assert counted.total == expected


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.data())
def test_broadcast_dimensions_take_no_room(shape, data):
    x = torch.zeros(shape)
    wider = [data.draw(st.integers(1, 4)), *shape]
    assert tensor_bytes(x.expand(wider)) == tensor_bytes(x) == 4 * x.numel()


def test_every_op_launches_its_kernels_in_every_direction(ours):
    backward = set(OPS) - {"gather_patches", "ddim_step", "sample_posterior", "column_sum"}
    expected = {(op, "forward") for op in OPS} | {(op, "backward") for op in backward}
    assert {(row.op, row.direction) for row in ours} == expected
    assert all(kernel["kernel"].startswith("umd.kernels.") for row in ours for kernel in row.kernels)


def keeps_the_gates(rows):
    for row in rows:
        what = f"{row.op} {row.direction} {row.arch} D = {row.width}"
        # A patch of latents has 16 values: beside them, its role and its program's four sums are 13 %.
        latents = row.op == "masked_diffusion_loss" and row.width > 768
        assert row.asked_bytes <= (1.13 if latents else 1.10) * row.compulsory_bytes, f"{what}: bytes"
        assert row.asked_bytes >= row.compulsory_bytes, f"{what}: bytes that must move were not counted"
        assert (row.spill_bytes, row.f64, row.atomics) == (0, 0, 0), f"{what}: spills, fp64, float atomics"
        assert row.min_access_bits in (None, 128), f"{what}: accesses of {row.min_access_bits} bits"
        pixels = ("gather_patches", "masked_diffusion_loss", "ddim_step", "sample_posterior")
        if row.op not in pixels:  # which have no tensor of width D
            assert row.min_access_bits == 128, what
        if row.op == "gated_residual_layer_norm":
            limit = {"forward": 0.40, "backward": 0.50}[row.direction]
            assert row.asked_bytes <= limit * row.eager_bytes, f"{what}: against eager"


def test_our_kernels_keep_the_gates(ours):
    assert {row.width for row in ours} == {768}
    keeps_the_gates(ours)


@pytest.mark.slow
def test_our_kernels_keep_the_gates_at_every_width():
    keeps_the_gates(audit(Audit(models=("UMD-B/4", "UMD-L/2"), ops=tuple(OPS))))


@pytest.mark.slow
def test_short_samples_with_rows_of_their_own_keep_the_gate():
    """68 tokens each: a table row is read, and its partial sums written and added, for few tokens."""
    jobs = [(count_op, name, "UMD-B/4", 8, "bf16", 68) for name in OPS if name.endswith("layer_norm")]
    counted = [one for found in run_apart(True, jobs) for one in found]
    assert len(counted) == 4
    for one in counted:
        what = f"{one.op} {one.direction}"
        assert one.compulsory_bytes <= one.bytes("asked") <= 1.10 * one.compulsory_bytes, what
        rows = 2 * 8 * 768 * 4  # scale and shift, or scale and two gradients: of a row a sample
        assert one.compulsory_bytes > 2 * 8 * 68 * 768 * 2 + rows, what


def test_eager_moves_eleven_passes_forward_and_nineteen_backward(ours):
    """Over [N, D]. Forward: mul 2, add 3, norm 2, mul 2, add 2. Backward: shift's sum 1, the two gradients of mul 2 + 3
    and scale's sum 1, norm 3, the two residual gradients added 3, the two of gate·h 2 + 3 and gate's sum 1."""
    for row in ours:
        if row.op == "gated_residual_layer_norm":
            tokens = row.samples // 2 * (161 + 65)
            passes = row.eager_bytes / (tokens * row.width * 2)
            expected = {"forward": 11, "backward": 19}[row.direction]
            assert expected <= passes < expected + 0.1, row.direction


def test_liger_stands_beside_ours():
    pytest.importorskip("liger_kernel", reason="pip install liger-kernel")
    (forward, backward) = audit(Audit(models=("UMD-B/4",), ops=("liger layer_norm",), arch=("sm_80",), samples=2))
    assert "cannot run it" in forward.note and forward.asked_bytes is None and forward.registers > 0
    x = 226 * 768 * 2
    assert backward.compulsory_bytes == 3 * x + 3 * 768 * 2  # dy, x, dx; weight, dweight, dbias
    assert backward.compulsory_bytes <= backward.asked_bytes < 1.05 * backward.compulsory_bytes


def test_the_command_writes_rows_and_a_chart(tmp_path, capsys):
    file, chart = tmp_path / "new" / "audit.json", tmp_path / "audit.png"
    options = "--models UMD-Ti/4 --ops ddim_step --samples 2 --arch sm_80 sm_100"
    main(["bench", "audit", *options.split(), "--json", str(file), "--chart", str(chart)])
    rows = json.loads(file.read_text())
    assert [row["arch"] for row in rows] == ["sm_80", "sm_100"]
    for row in rows:
        assert row["op"] == "ddim_step" and row["direction"] == "forward" and row["width"] == 192
        assert row["compulsory_bytes"] == 5 * 2 * 3 * 16 * 16 * 4 + 5 * 4 + 2 * 8
        assert row["min_access_bits"] is None and row["eager_bytes"] > row["asked_bytes"] > 0
    assert "ddim_step" in capsys.readouterr().out
    assert chart.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("--arch sm_70", "arch must be of sm_80, sm_90, sm_100; got 'sm_70'"),
        ("--ops layer_norm", "ops must be of modulated_layer_norm"),
        ("--samples 3", "samples must be even"),
        ("--kernel a:b", "kernel and call go together"),
    ],
)
def test_mistakes_are_a_sentence(options, sentence, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", "audit", *options.split()])
    assert exit_info.value.code == 2 and sentence in " ".join(capsys.readouterr().err.split())
