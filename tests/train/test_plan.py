"""`umd plan` against what training really does: counted operations, and the memory of real steps."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from umd import ops
from umd.config import OBJECTIVES, DiffMAEConfig, DiffMAEObjectiveConfig, ModelConfig, ScheduleConfig
from umd.errors import UserError
from umd.methods import build_model, build_objective
from umd.schedule import NoiseSchedule
from umd.train.loop import train
from umd.train.options import Cluster
from umd.train.plan import (
    GPUS,
    checkpoint_line,
    communication,
    disk_rate,
    make_plan,
    overrun,
    print_plan,
    states,
    stopping,
)
from umd.train.presets import PRESETS
from umd.train.run import RunConfig, to_plain
from umd.train.settings import DataConfig, ParallelConfig
from umd.train.step_counts import Ledger, StepCounts, count_gpu_step, run_step, without_data

ROOT = Path(__file__).parents[2]
TINY = ModelConfig(image_size=(16, 16), hidden_size=64, depth=2, decoder_depth=1, num_heads=4)
FP32 = torch.float32
NOTHING = StepCounts(1000, 0, 0, [(10**9, 10**6)], [(1000, 1)])


def run_config(**changes) -> RunConfig:
    return RunConfig(**{"model": TINY, "batch_size": 8, "precision": "fp32", "device": "cpu"} | changes)


def count_step(
    config: RunConfig, micro: int, dtype: torch.dtype, weights: torch.dtype, attention: ops.Attention
) -> StepCounts:
    """`run_step` on fake tensors. attention: a backend of `ops.attention`."""
    with without_data(), ops.attention(attention):
        return run_step(config, micro, dtype, weights)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_flops_are_torchs_count_of_a_real_step(objective):
    config = run_config(objective=OBJECTIVES[objective], model=replace(TINY, adaLN=objective != "mae"))
    counts = count_step(config, 8, FP32, FP32, "matmul")
    model, corrupt = build_model(config.model), build_objective(config.model, config.objective, NoiseSchedule("cosine"))
    with FlopCounterMode(display=False) as counter, ops.cpu_paths(False):  # it does not see what is compiled
        loss, _ = corrupt(model, torch.zeros(8, 3, 16, 16), corrupt.corrupt(8, 0, torch.device("cpu")))
        loss.backward()
    assert sum(flops for flops, _ in counts.operations) == counter.get_total_flops()
    assert counts.weights == sum(p.numel() for p in model.parameters())
    # MFU's convention, three forward passes, also counts a gradient of the pictures, which nobody takes
    planned = make_plan(config, Cluster(gpus=1), counts).flops_per_image * 8
    assert counter.get_total_flops() <= planned <= 1.1 * counter.get_total_flops()


def test_fake_tensors_live_as_long_as_real_ones():
    most = []
    for checkpointing in (False, True):
        counted = count_step(run_config(checkpointing=checkpointing), 32, FP32, FP32, "matmul")
        model = build_model(TINY)
        model.set_checkpointing(checkpointing)
        objective = build_objective(TINY, run_config().objective, NoiseSchedule("cosine"))
        corruption = objective.corrupt(32, 0, torch.device("cpu"))
        with Ledger(model.parameters(), {}) as ledger, ops.attention("matmul"):
            x_start = torch.zeros(32, 3, 16, 16)
            loss, _ = objective(model, x_start, corruption)
            loss.backward()
        assert ledger.with_gradients == pytest.approx(counted.with_gradients, rel=0.01)
        most.append(counted.activations)
    assert most[1] < 0.7 * most[0]  # recomputed, not kept


def test_counting_leaves_nothing_behind_and_meets_nothing_left():
    """Tensors without data and real ones do not mix, and the CPU's bf16 ops keep some from call to call."""
    bf16 = torch.bfloat16
    model, objective = build_model(TINY), build_objective(TINY, run_config().objective, NoiseSchedule("cosine"))
    counts = []
    for _ in range(2):
        with torch.autocast("cpu", dtype=bf16), ops.kernels("reference"):
            counts.append(count_step(run_config(), 4, bf16, FP32, "matmul"))
            objective(model, torch.zeros(4, 3, 16, 16), objective.corrupt(4, 0, torch.device("cpu")))[0].backward()
    assert counts[0] == counts[1]
    count_step(run_config(), 4, FP32, FP32, "matmul")
    corrupt = build_objective(TINY, run_config().objective, NoiseSchedule("cosine"))
    layout = corrupt.corrupt(4, 0, torch.device("cpu")).layout
    assert layout.encoder.cu_seqlens.tolist() == [0, 11, 22, 27, 32]


def test_the_schedule_planned_with_is_the_runs():
    model = DiffMAEConfig((8, 8), 3, 2, 32, 1, 2, decoder_hidden_size=32, decoder_depth=1, decoder_num_heads=2)
    objective, schedule = DiffMAEObjectiveConfig(min_time=2000), ScheduleConfig(num_steps=4000)
    config = run_config(model=model, objective=objective, schedule=schedule)
    assert make_plan(config, Cluster(gpus=1)).peak > 0


# Peak memory of a real process: three optimisation steps of the training loop's parts.
MEASURE = """
import gc, json, sys, torch
from umd.ema import EMA
from umd.methods import build_model, build_objective
from umd.schedule import NoiseSchedule
from umd.train.optim import adamw
from umd.train.parallel import Alone, LossStep
from umd.train.run import RunConfig, from_plain

def kib(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

config = from_plain(RunConfig, json.load(sys.stdin), "test")
dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
objective = build_objective(config.model, config.objective, NoiseSchedule("cosine"))

def steps(batch, count, model):
    run = Alone(model, LossStep(model, objective, dtype), adamw(model, 1e-4, (0.9, 0.95), 0.05), 1, 1.0)
    ema = EMA(model, 1e-3)
    for step in range(count):
        x = torch.randn(batch, config.model.channels, *config.model.image_size)
        run.forward_backward(x, objective.corrupt(batch, step, x.device), True)
        run.update()
        ema.update(model)

def make():
    model = build_model(config.model)
    model.set_checkpointing(config.checkpointing)
    return model

steps(config.batch_size, 2, make())  # libraries compile their kernels and load their own memory first
gc.collect()
before = kib("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
steps(config.batch_size, 3, make())
print(1024 * (kib("VmHWM") - before))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("what", "changes", "batch"),
    [
        ("activations", {"hidden_size": 64, "depth": 4, "decoder_depth": 2}, 128),
        pytest.param("weights", {"hidden_size": 320, "depth": 4, "decoder_depth": 2}, 8, marks=pytest.mark.slow),
        pytest.param("checkpointing", {"hidden_size": 128, "depth": 6, "decoder_depth": 2}, 96, marks=pytest.mark.slow),
        pytest.param("bf16", {"hidden_size": 64, "depth": 4, "decoder_depth": 2}, 96, marks=pytest.mark.slow),
    ],
)
def test_memory_is_what_a_real_run_takes_at_its_peak(what, changes, batch):
    model = replace(TINY, image_size=(32, 32), **changes)
    config = run_config(model=model, batch_size=batch, checkpointing=what == "checkpointing")
    config = replace(config, optim=replace(config.optim, ema=1e-4), precision="bf16" if what == "bf16" else "fp32")
    # glibc then gives back what is freed, so that the process holds what its tensors do
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], input=json.dumps(to_plain(config)), env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    measured = float(done.stdout)
    with ops.kernels("reference"):
        counts = count_step(config, batch, torch.bfloat16 if what == "bf16" else FP32, FP32, "auto")
    planned = make_plan(config, Cluster(gpus=1), counts).peak
    assert planned == pytest.approx(measured, rel=0.1)


# The same on ranks, for several runs one after another: after a first step, the peak of two more.
MEASURE_RANKS = """
import gc, json, sys, torch
from pathlib import Path
from umd.ema import EMA
from umd.methods import build_model, build_objective
from umd.schedule import NoiseSchedule
from umd.train.distributed import ParallelConfig, join
from umd.train.spread import spread
from umd.train.run import RunConfig, from_plain

def kib(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

def steps(config, count):
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model = build_model(config.model)
    objective = build_objective(config.model, config.objective, NoiseSchedule("cosine"))
    run = spread(config, world, model, objective, 1e-4, dtype)
    ema = EMA(run.weights, 1e-3)
    micro = config.batch_size // world.size
    for step in range(count):
        if step == 1:  # DeepSpeed holds the weights several times while it cuts them
            gc.collect()
            open("/proc/self/clear_refs", "w").write("5")
        x = torch.randn(micro, config.model.channels, *config.model.image_size)
        run.forward_backward(x, objective.corrupt(micro, step, x.device), True)
        run.update()
        ema.update(run.weights)

world = join("cpu", ParallelConfig(), Path("unused"))
for config in json.load(open(sys.argv[1])):
    config = from_plain(RunConfig, config, "test")
    steps(config, 2)
    gc.collect()
    before = kib("VmRSS")
    steps(config, 3)
    if world.main:
        print("peak", 1024 * (kib("VmHWM") - before), flush=True)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_of_each_of_two_ranks_is_what_a_real_run_takes(precision, tmp_path):
    model = replace(TINY, hidden_size=384, depth=2, decoder_depth=1)
    cases = [ParallelConfig("zero", 1), ParallelConfig("zero", 2), ParallelConfig("zero", 3), ParallelConfig("ddp")]
    runs = [run_config(model=model, batch_size=16, precision=precision, parallel=case) for case in cases]
    runs = [replace(run, optim=replace(run.optim, ema=1e-4)) for run in runs]
    (tmp_path / "runs.json").write_text(json.dumps([to_plain(run) for run in runs]))
    (tmp_path / "measure.py").write_text(MEASURE_RANKS)
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "measure.py"), str(tmp_path / "runs.json")],
        env=env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak")]
    dtype, planned = getattr(torch, "bfloat16" if precision == "bf16" else "float32"), []
    for run in runs:
        with ops.kernels("reference"):
            weights = dtype if run.parallel.strategy == "zero" else FP32
            counts = count_step(run, 8, dtype, weights, "auto")
        planned.append(make_plan(run, Cluster(gpus=2), counts, device="cpu").peak)
    ratios = [a / b for a, b in zip(planned, measured, strict=True)]
    assert ratios == pytest.approx([1] * 4, abs=0.1), (planned, measured)


def test_a_gpu_step_saves_what_its_kernels_save():
    """Counted in a process with Triton's ops and flash attention: no attention weights, on the CPU one layer's."""
    config = run_config(model=replace(TINY, image_size=(64, 64)))
    on_gpu, on_cpu = count_gpu_step(config, 8, FP32, FP32), count_step(config, 8, FP32, FP32, "matmul")
    assert on_gpu.weights == on_cpu.weights
    decoder_attention = 4 * 8 * TINY.num_heads * 257 * 257  # bytes
    assert on_gpu.activations < on_cpu.activations - decoder_attention
    # both make the scores again in the backward pass
    assert sum(f for f, _ in on_gpu.operations) == sum(f for f, _ in on_cpu.operations)


def test_gelus_output_made_again_is_not_kept():
    """A GPU's step then holds 4·D numbers a token and block less while the backward pass has yet to come, and moves as
    many more; with checkpointing it is as without."""
    pytest.importorskip("triton", reason="the choice is between Triton kernels")
    config = run_config(model=replace(TINY, image_size=(64, 64), depth=6))
    bf16 = torch.bfloat16
    kept, again = (count_gpu_step(replace(config, recompute_gelu=on), 8, bf16, FP32) for on in (False, True))
    objective = build_objective(config.model, config.objective, NoiseSchedule("cosine"))
    layout = objective.corrupt(8, 0, torch.device("cpu")).layout
    encoder, decoder = (2 * 4 * TINY.hidden_size * p.num_tokens for p in (layout.encoder_blocks, layout.decoder_blocks))
    whole = 6 * encoder + decoder  # bytes of GELU's outputs
    # The decoder's block, whose backward pass comes first, has its output again when most is held.
    assert whole - 2 * decoder <= kept.activations - again.activations <= whole
    moved = [sum(size for _, size in counts.operations) for counts in (kept, again)]
    assert moved[1] - moved[0] == pytest.approx(whole, rel=0.01)
    checkpointing = replace(config, checkpointing=True)
    assert count_gpu_step(checkpointing, 8, bf16, FP32) == count_gpu_step(
        replace(checkpointing, recompute_gelu=True), 8, bf16, FP32
    )


def test_the_plan_tells_both_figures_of_gelus_output():
    pytest.importorskip("triton", reason="the choice is between Triton kernels")
    texts = []
    for on in (False, True):
        console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
        plan = print_plan(
            run_config(precision="bf16", recompute_gelu=on, batch_size=4096), Cluster(gpus=1), "x", console
        )
        texts.append(console.export_text())
        kept, again = map(
            float, re.search(r"kept ([\d.]+) GiB at most; with --recompute-gelu ([\d.]+),", texts[-1]).groups()
        )
        assert kept > again and f"{plan.peak / 2**30:.2f}" == f"{again if on else kept:.2f}"
    lines = [re.search(r"kept.* more", text)[0] for text in texts]
    assert lines[0] == lines[1]


@settings(max_examples=50)
@given(st.integers(1, 10**9), st.integers(1, 256), st.booleans())
def test_each_stage_holds_no_more_than_the_one_before(weights, gpus, bf16):
    held = [sum(states(how, weights, gpus, bf16)) for how in ("alone", "ddp", "zero1", "zero2")]
    assert held[0] >= held[1]
    if gpus >= 4:
        assert held[1] >= held[2] >= held[3]
    # 16 bytes a weight in ZeRO's paper; here 2 more for gradients in fp32, and 4 for the EMA
    assert sum(states("zero2", weights, 1, True)) == (2 + 4 + 12 + 4) * weights


def test_communication_is_that_of_rings():
    P, N = 10**9, 8
    share = (N - 1) / N

    def sent(how: str, micro_batches: int = 1, width: int = 2) -> float:
        return communication(how, P, N, micro_batches, width, [(P, 1.0)], 1.0, P, 1e11)[0]

    assert communication("alone", P, 1, 1, 2, [(P, 1.0)], 1.0, P, 1e11) == (0, 0)
    assert sent("ddp", 4, 4) == pytest.approx(2 * 4 * P * share)  # once, however many micro-batches
    assert sent("zero2") == pytest.approx(2 * 2 * P * share)
    assert sent("zero3") == pytest.approx(1.5 * sent("zero2"))
    assert sent("zero3", 4) == pytest.approx(3 * 2 * P * share * 4)


EVEN = [(10, float(second)) for second in range(1, 11)]  # ten gradients, one a second


def test_what_a_backward_pass_hides_is_a_timeline():
    assert overrun(EVEN, 10.0, 10, 1.0, float("inf")) == 0
    at_once = [(10, 0.0)] * 10
    assert overrun(at_once, 0.0, 10, 1.0, 5.0) == pytest.approx(100 / 5)  # zero compute: all is waited for
    assert overrun(EVEN, 10.0, 100, 1.0, 5.0) == pytest.approx(100 / 5)  # and so it is in one bucket
    assert overrun(EVEN, 10.0, 10, 1.0, 10.0) == pytest.approx(1)  # a link in step: the last bucket
    assert overrun(EVEN, 10.0, 10, 1.0, 5.0) == pytest.approx(100 / 5 - 9)  # busy from the first gradient on
    assert overrun(EVEN, 12.0, 10, 1.0, 10.0) == 0  # two seconds without a gradient
    large_last = [*EVEN[:-1], (1000, 10.0)]
    assert overrun(large_last, 10.0, 10, 1.0, 100.0) == pytest.approx(1000 / 100)


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.integers(1, 100), st.floats(0, 10)), min_size=1, max_size=20),
    st.integers(1, 500), st.floats(0.1, 1000),
)  # fmt: skip
def test_no_more_is_waited_for_than_is_sent_and_no_less_than_the_last_bucket(ready, bucket, speed):
    ready = sorted(ready, key=lambda pair: pair[1])
    end, total = ready[-1][1], sum(weights for weights, _ in ready)
    waited = overrun(ready, end, bucket, 1.0, speed)
    assert ready[-1][0] / speed <= waited * (1 + 1e-6) + 1e-9
    assert waited <= total / speed * (1 + 1e-6) + 1e-9


def test_zero_waits_for_the_weights_it_gathers_after_the_step():
    P, speed = 1000, 50.0
    for how, times in (("zero1", 1), ("zero2", 3)):
        sent, waited = communication(how, P, 2, 3, 4, [(P, 1.0)], 1.0, P, speed)
        assert sent == (times + 1) * 2 * P and waited == pytest.approx(sent / speed)  # one bucket, nothing hidden
    assert communication("zero2", P, 2, 3, 4, [(P, 0.0)], 1e9, P, speed)[1] == pytest.approx(2 * P / speed)
    assert communication("zero3", P, 2, 3, 4, [(P, 0.0)], 1e9, P, speed)[1] == 0


def test_gradients_come_block_by_block_and_the_embeddings_last():
    counts = count_step(run_config(), 4, FP32, FP32, "matmul")
    assert sum(weights for weights, _ in counts.gradients) == counts.weights
    order = [n for _, n in counts.gradients]
    assert order == sorted(order) and order[-1] <= len(counts.operations)
    D, total = TINY.hidden_size, len(counts.operations)
    of_modulation = [n for weights, n in counts.gradients if weights == 6 * D * D]
    assert len(of_modulation) == 3  # a block
    assert of_modulation[0] < of_modulation[1] - 0.05 * total < of_modulation[2] - 0.1 * total
    last = counts.gradients[-1][0]
    assert last < 2 * 256 * D  # of the embeddings of times and patches, no third of the network


def test_nodes_talk_through_a_network_card_for_each_gpu():
    """A DGX A100's eight cards of 200 Gbit/s: NCCL's all-reduce between such nodes moves up to 200 GB/s."""
    counts = replace(NOTHING, weights=10**9)
    config = run_config(batch_size=64, precision="bf16")
    config = replace(config, parallel=replace(config.parallel, strategy="ddp"))
    inside, between = (make_plan(config, Cluster(gpus=n), counts) for n in (8, 64))
    assert inside.exchange == pytest.approx(inside.sent / (0.8 * 300e9))
    assert between.exchange == pytest.approx(between.sent / (0.8 * 200e9))


def test_time_is_a_roofline():
    gpu = GPUS["a100-80"]
    config = run_config(precision="bf16")
    ops_of = {"compute": [(10**15, 10**6)], "memory": [(10**6, 10**12)]}
    for kind, floor in (("compute", 1e15 / gpu.bf16), ("memory", 1e12 / gpu.bandwidth)):
        best, usual = make_plan(config, Cluster(gpus=1), replace(NOTHING, operations=ops_of[kind])).seconds
        assert floor < best < usual < 3 * floor


def test_launches_bound_a_step_unless_it_is_captured():
    """1000 small kernels: of a quick host 10 ms, and replayed 2."""
    counts = replace(NOTHING, operations=[(0, 100)] * 1000)
    best = {
        (capture, gpus): make_plan(run_config(capture=capture), Cluster(gpus=gpus), counts).seconds[0]
        for capture in ("auto", "on", "off") for gpus in (1, 4)
    }  # fmt: skip
    assert {case for case, seconds in best.items() if seconds < 0.003} == {("auto", 1), ("on", 1), ("on", 4)}
    assert all(seconds > 0.01 for case, seconds in best.items() if case not in {("auto", 1), ("on", 1), ("on", 4)})


def test_what_training_refuses_is_not_planned():
    zero = ParallelConfig(strategy="zero")
    with pytest.raises(UserError, match="--capture on does not go with ZeRO"):
        make_plan(run_config(parallel=zero, capture="on"), Cluster(gpus=2), NOTHING)
    with pytest.raises(UserError, match="parallel.wire bf16 is DDP's"):
        make_plan(run_config(parallel=replace(zero, wire="bf16")), Cluster(gpus=2), NOTHING)


@pytest.mark.parametrize("gpus", [8, 64])
def test_the_documented_table_is_what_is_printed(gpus):
    text = (ROOT / "docs" / "cluster.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith(f"| `umd-b4` | {gpus} |"))
    config = PRESETS["umd-b4"][1]
    plan = make_plan(config, Cluster(gpus=gpus))
    ms = [1e3 * (seconds + plan.exchange - plan.hidden) for seconds in plan.seconds]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:7] == [
        str(plan.micro), str(config.accumulate), plan.how, f"{plan.peak / 2**30:.1f}", f"{ms[0]:.0f}–{ms[1]:.0f}"
    ]  # fmt: skip


def test_a_batch_that_does_not_divide_is_a_sentence():
    with pytest.raises(UserError, match="batch_size 8 is not divisible by 3 GPUs x accumulate 1; use a multiple of 3"):
        make_plan(run_config(), Cluster(gpus=3))
    with pytest.raises(UserError, match="gpus 0: must be at least 1"):
        Cluster(gpus=0)


def test_the_printed_plan_of_a_preset_holds_together():
    console = Console(record=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115
    config = PRESETS["umd-b4"][1]
    plan = print_plan(config, Cluster(gpus=64), "umd-b4", console)
    text = console.export_text()
    assert "umd-b4 on 64 x a100-80: ddp, 16 images a GPU" in text and "800 epochs" in text
    slow, fast = map(int, re.search(r"images/s +(\d+) to (\d+)", text).groups())
    assert 0 < slow < fast
    assert f"{plan.peak / 2**30:.2f} of 80" in text
    parts = plan.weights + plan.gradients + plan.optimizer + plan.ema + plan.activations
    assert plan.peak == pytest.approx(parts)  # under DDP all are full at once


@pytest.mark.parametrize("length, row", [
    (dict(steps=100), "100 steps"), (dict(steps=100, minutes=3.0), "100 steps"), (dict(epochs=2.5), "2.5 epochs"),
])  # fmt: skip
def test_the_plan_is_for_the_length_of_the_run(length, row):
    """Steps times seconds, as printed for the step itself (1024 images, on ImageNet 1251.1 steps an epoch)."""
    console = Console(record=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115
    config = replace(PRESETS["umd-b4"][1], **length)
    print_plan(config, Cluster(gpus=8), "umd-b4", console)
    text = console.export_text()
    slow = int(re.search(r"images/s +(\d+) to", text).group(1))
    steps = length.get("steps") or math.ceil(length["epochs"] * 1_281_167 / 1024)
    found = re.search(rf"{row} +[\d.]+ to ([\d.]+) (minutes|hours|seconds)", text)
    seconds = float(found.group(1)) * {"seconds": 1, "minutes": 60, "hours": 3600}[found.group(2)]
    assert seconds == pytest.approx(steps * 1024 / slow, rel=0.05)


def test_the_plan_of_a_run_by_the_clock_tells_its_epochs():
    console = Console(record=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115
    print_plan(replace(PRESETS["umd-b4"][1], minutes=60.0), Cluster(gpus=8), "umd-b4", console)
    text = console.export_text()
    slow = int(re.search(r"images/s +(\d+) to", text).group(1))
    assert float(re.search(r"60 minutes +([\d.]+) to", text).group(1)) == pytest.approx(
        3600 * slow / 1_281_167, rel=0.06
    )


def test_clips_are_planned_too():
    config = PRESETS["diffmae-video-l"][1]
    plan = print_plan(config, Cluster(gpus=64), "diffmae-video-l", Console(quiet=True))
    objective = build_objective(config.model, config.objective, NoiseSchedule("linear_rho", rho=0.8))
    assert plan.flops_per_image == objective.step_flops(8) / 8


@pytest.mark.parametrize("rate", [0, 1e-4])
def test_bytes_of_a_checkpoint_are_those_of_a_run(rate, tmp_path):
    np.savez(tmp_path / "tiny.npz", images=np.zeros((8, 16, 16, 3), np.uint8))
    data = DataConfig(source=str(tmp_path / "tiny.npz"), num_workers=0)
    config = run_config(out=tmp_path / "run", data=data, steps=1, draw_every=0)
    config = replace(config, optim=replace(config.optim, ema=rate))
    saved = train(config, Console(file=open(os.devnull, "w")))  # noqa: SIM115
    written = sum(file.stat().st_size for file in saved.glob("*.safetensors"))
    weights = sum(p.numel() for p in build_model(TINY).parameters())
    plan = make_plan(config, Cluster(gpus=1), replace(NOTHING, weights=weights))
    assert plan.checkpoint <= written <= 1.03 * plan.checkpoint  # names and shapes


def test_whether_a_stop_is_saved_in_time_is_told_beforehand():
    """UMD-L/2: 0.61e9 weights and their two moments are 7.3 GB. A step takes 0.4 s."""
    config = run_config(save_minutes=7)
    plan = make_plan(config, Cluster(gpus=1), replace(NOTHING, weights=608_586_512))
    assert stopping(7.3e9, 0.5e9, 0.4) == (0.8 + 14.6, 0.8 + 29.2)
    line = {disk: checkpoint_line(config, Cluster(disk=disk), plan, 0.4) for disk in (1, 0.25, 0.025)}
    assert line[1] == "7.30 GB, written in 7.3 s at 1.00 GB/s; saved 8 s after SIGTERM, which leaves 30"
    assert "SIGTERM leaves 30 s, and 30 are needed: ask for USR1 300 s ahead (launch/slurm.sbatch does)" in line[0.25]
    assert "ask for USR1 600 s ahead (sbatch --signal B:USR1@600)" in line[0.025]
    assert line[0.025].endswith("since the last save (--save-minutes 7)")


def test_the_rate_of_a_disk_is_measured_where_the_run_would_be(tmp_path):
    assert disk_rate(tmp_path / "runs" / "new", 1e6) > 0
    assert not any(tmp_path.iterdir())
    with pytest.raises(UserError, match="disk -1: must be at least 0"):
        Cluster(disk=-1)
