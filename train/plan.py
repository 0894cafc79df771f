"""`umd plan`: estimate memory, time and communication of a run on a cluster, without the cluster.

- Memory and operations are counted (`umd.train.step_counts`).
- Time is a roofline: an operation takes as long as its arithmetic or its memory traffic, whichever is longer, at the
  fraction of the data sheet's rates that such operations usually reach.
- Gradients are sent bucket by bucket during the backward pass. Communication that ends after it is waited for.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from umd.errors import UserError
from umd.machine.gpus import GPUS, GiB
from umd.methods import build_objective
from umd.objective import Part
from umd.schedule import schedule_of
from umd.tensor_files import write_safetensors
from umd.train.distributed import World
from umd.train.options import Cluster
from umd.train.parallel import strategy
from umd.train.run import RunConfig
from umd.train.spread import check_gelu, check_strategy
from umd.train.step_counts import StepCounts, as_on_gpu, count_gpu_step
from umd.train.zero import deepspeed_config

DDP_BUCKET = 25 * 2**20 // 4  # fp32 gradients per bucket, torch's default
# Seconds from one kernel to the next, (best, usual): replayed as a CUDA graph; launched one by one by a fast host, and
# by the host of an H200 (bench/results/gpu). torch.compile has fewer kernels.
REPLAYED, LAUNCHED = (2e-6, 2e-6), (10e-6, 60e-6)
TERM_SECONDS = 25.0  # for a save: torchrun, and Slurm by default, kill 30 s after SIGTERM
SIGNAL_SECONDS = 300  # launch/slurm.sbatch asks for the signal this long before the job's time limit


# Fractions of the data sheet's (FLOP/s, bandwidth): reached by large operations, and usual for the operations here.
BEST, USUAL = (0.75, 0.85), (0.45, 0.65)
LINK_SHARE = 0.8  # of a link that exchanges reach


@dataclass(frozen=True)
class Plan:
    """The estimates for one GPU: memory in bytes, and the work of one step."""

    how: str
    micro: int
    weights: float
    gradients: float
    optimizer: float
    ema: float
    activations: float
    buckets: float
    peak: float  # largest sum of the above at one time; they do not peak together
    flops_per_image: float
    moved: float  # bytes read and written in a step
    seconds: tuple[float, float]  # (best, usual) time of a step, without exposed communication
    kernels: int  # in a step's forward and backward passes
    captured: bool  # recorded as one CUDA graph
    sent: float  # bytes that each GPU sends in a step
    exchange: float  # seconds that sending takes
    hidden: float  # seconds of it that overlap with the passes, at the best of `seconds`
    checkpoint: float  # bytes of a checkpoint


def bf16_or_fp32(config: RunConfig) -> torch.dtype:
    return torch.float32 if config.precision == "fp32" else torch.bfloat16


def how_spread(config: RunConfig, gpus: int, num_weights: int) -> str:
    """The strategy that the training loop would choose: alone, ddp, or zero1 to zero3."""
    world = World(0, gpus, torch.device("cpu"))
    how = strategy(config.parallel, world, num_weights)
    return f"zero{config.parallel.zero_stage}" if how == "zero" else how


def states(how: str, num_weights: int, gpus: int, bf16: bool) -> tuple[float, float, float, float]:
    """Bytes of (weights, gradients, optimizer, EMA) on each GPU.

    ZeRO in bf16 computes with bf16 weights. Each rank's shard of the optimizer keeps fp32 weights and AdamW's moments.
    """
    P = num_weights
    if how == "alone":
        return 4 * P, 4 * P, 8 * P, 4 * P
    if how == "ddp":
        return 4 * P, 4 * P, 8 * P, 4 * P / gpus
    low = 2 if bf16 else 4
    weights = low * P + (low * P / gpus if how == "zero3" else 0)  # stage 3 keeps gathered weights, up to 1e9
    gradients = 4 * P if how == "zero1" else 4 * P / gpus
    return weights, gradients, 12 * P / gpus, 4 * P / gpus


def checkpoint_bytes(num_weights: int, ema: bool) -> float:
    """Bytes of a checkpoint: weights, AdamW's two moments and the EMA, whole and in fp32, for any number of ranks."""
    return 4 * num_weights * (4 if ema else 3)


def disk_rate(folder: Path, size: float) -> float:
    """Measure the rate in bytes/s at which a file of `size` bytes is hashed, written and flushed in `folder`.

    If the folder does not exist, take its nearest existing parent. The file is removed. Raises OSError, e.g. if the
    disk is full.
    """
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    file = there / ".unfinished-disk-rate"
    block = torch.randn(min(1 << 26, math.ceil(size / 4)))  # random, so that no disk compresses it
    try:
        began = time.perf_counter()
        write_safetensors(file, {str(i): block for i in range(math.ceil(size / block.nbytes))})
        return file.stat().st_size / (time.perf_counter() - began)
    finally:
        file.unlink(missing_ok=True)


def stopping(size: float, rate: float, step: float) -> tuple[float, float]:
    """Returns (seconds from SIGTERM to a saved state, seconds before the end at which USR1 must come).

    size: bytes of a checkpoint. rate: bytes/s of the disk. step: seconds of a step.

    Two steps pass until all ranks know of the signal. At that time an earlier checkpoint may still be being written:
    after SIGTERM that one suffices in the worst case, while USR1 allows time for both.
    """
    return 2 * step + size / rate, 2 * step + 2 * size / rate


def make_plan(config: RunConfig, cluster: Cluster, counts: StepCounts | None = None, device: str = "cuda") -> Plan:
    """Estimate a run on a cluster. Raises UserError if ranks * accumulate does not divide the batch size.

    counts: counts of one micro-batch, if already known. device: device type of the ranks; gradient buckets differ.
    """
    ranks = cluster.gpus * config.accumulate
    micro, left = divmod(config.batch_size, ranks)
    if left or not micro:
        raise UserError(
            f"batch_size {config.batch_size} is not divisible by {cluster.gpus} GPUs x accumulate {config.accumulate}; "
            f"use a multiple of {ranks}"
        )
    dtype = bf16_or_fp32(config)
    bf16 = dtype == torch.bfloat16
    gpu = GPUS[cluster.gpu]
    with as_on_gpu():
        check_gelu(config, torch.device("cuda"), dtype)
    if counts is None:
        counts = count_gpu_step(config, micro, dtype, torch.float32)
        how = how_spread(config, cluster.gpus, counts.weights)
        if how.startswith("zero") and bf16:
            counts = count_gpu_step(config, micro, dtype, torch.bfloat16)
    how = how_spread(config, cluster.gpus, counts.weights)
    check_strategy(config, "zero" if how.startswith("zero") else how)
    weights, gradients, optimizer, ema = states(how, counts.weights, cluster.gpus, bf16)
    ema *= config.ema > 0
    buckets, bucket = 0.0, DDP_BUCKET
    if how.startswith("zero"):
        zero = deepspeed_config(2, micro, 1, 1.0, dtype, torch.device(device), counts.weights)["zero_optimization"]
        bucket = zero["reduce_bucket_size"]
        copies = 2 if zero["overlap_comm"] and how != "zero3" else 1
        buckets = copies * (4 if how == "zero1" or not bf16 else 2) * zero["reduce_bucket_size"]
    # Peak of gradients plus activations. Activations are freed as gradients appear. Gradients of earlier micro-batches,
    # DDP's buckets and ZeRO's fp32 sums exist before.
    both = gradients + counts.activations
    if config.accumulate == 1 and (how == "alone" or (how == "zero1" and not bf16)):
        both = max(counts.with_gradients, gradients)
    elif how == "zero3" or (how == "zero1" and bf16):
        both = gradients + counts.with_gradients
    peak = weights + optimizer + ema + buckets + both

    objective = build_objective(config.model, config.objective, schedule_of(config.schedule))
    flops = objective.step_flops(micro, Part(0, ranks))
    rate = gpu.bf16 if bf16 else gpu.fp32
    state_traffic = 2 * optimizer + gradients + weights + 2 * ema
    seconds, passes = [], []  # passes: for a micro-batch, the start time of each operation
    captured = config.capture == "on" or (config.capture == "auto" and how == "alone" and not config.compile)
    for (compute, memory), launch in zip((BEST, USUAL), REPLAYED if captured else LAUNCHED, strict=True):
        times = roofline(counts.operations, compute * rate, memory * gpu.bandwidth, launch)
        passes.append(times)
        seconds.append(config.accumulate * times[-1] + state_traffic / (memory * gpu.bandwidth))
    # Between nodes there are as many rings as GPUs in a node, each through its own network card.
    link = gpu.link
    if cluster.gpus > cluster.gpus_per_node:
        link = min(link, cluster.gpus_per_node * cluster.network * 1e9 / 8)
    ready = [(weights_of, passes[0][n]) for weights_of, n in counts.gradients]
    wire = 2 if config.parallel.wire == "bf16" else 4
    sent, rest = communication(
        how, counts.weights, cluster.gpus, config.accumulate, wire if how == "ddp" else 2 if bf16 else 4,
        ready, passes[0][-1], bucket, LINK_SHARE * link,
    )  # fmt: skip
    exchange = sent / (LINK_SHARE * link)
    return Plan(
        how=how, micro=micro, weights=weights, gradients=gradients, optimizer=optimizer, ema=ema,
        activations=counts.activations, buckets=buckets, peak=peak, flops_per_image=flops / micro,
        moved=config.accumulate * sum(b for _, b in counts.operations) + state_traffic,
        seconds=(seconds[0], seconds[1]), kernels=config.accumulate * len(counts.operations), captured=captured,
        sent=sent, exchange=exchange,
        hidden=exchange - rest, checkpoint=checkpoint_bytes(counts.weights, config.ema > 0),
    )  # fmt: skip


def roofline(operations: Sequence[tuple[int, int]], rate: float, bandwidth: float, launch: float) -> list[float]:
    """Start time of each operation in a micro-batch, and the end time of the last, in seconds.

    operations: (FLOPs, bytes) of each. launch: average minimum time from one kernel to the next, in seconds.
    """
    times = [0.0, *accumulate(max(flops / rate, moved / bandwidth) for flops, moved in operations)]
    slower = max(1.0, launch * len(operations) / times[-1]) if times[-1] else 1.0
    return [slower * time for time in times]


def communication(
    how: str, num_weights: int, gpus: int, micro_batches: int, width: int,
    ready: Sequence[tuple[int, float]], end: float, bucket: int, speed: float,
) -> tuple[float, float]:  # fmt: skip
    """Returns (bytes that each GPU sends in a step by ring exchanges, seconds in which it sends but computes nothing).

    width: bytes per number sent. ready, end, bucket, speed: as in `overrun`; end counts from the start of the forward.
    """
    ring = (gpus - 1) / gpus * width
    if how == "alone":
        return 0.0, 0.0
    if how == "ddp":  # gradients are summed once per step
        return 2 * ring * num_weights, overrun(ready, end, bucket, 2 * ring, speed)
    if how == "zero3":  # per micro-batch: gather weights in forward and backward, scatter gradients in backward
        forward = max(0.0, ring * num_weights / speed - end / 3)
        waited = micro_batches * (forward + overrun(ready, end, bucket, 2 * ring, speed))
        return 3 * ring * num_weights * micro_batches, waited
    times = micro_batches if how == "zero2" else 1
    waited = times * overrun(ready, end, bucket, ring, speed)
    # Weights are gathered after the step, when no computation overlaps.
    return (times + 1) * ring * num_weights, waited + ring * num_weights / speed


def overrun(ready: Sequence[tuple[int, float]], end: float, bucket: int, per_weight: float, speed: float) -> float:
    """Seconds from the end of a backward pass to the end of its gradient exchange.

    ready: (number of weights, time in s) of each gradient, in order of appearance.
    end: time at which the backward pass ends, in s.
    bucket: once this many weights are ready, they are sent. The rest is sent as the last bucket.
    per_weight: bytes sent per weight. speed: bytes/s of the link, which sends one bucket after another.
    """
    free, waiting = 0.0, 0  # time at which the link is free; weights in the open bucket
    for i, (weights, seconds) in enumerate(ready, 1):
        waiting += weights
        if waiting >= bucket or i == len(ready):
            free, waiting = max(free, seconds) + waiting * per_weight / speed, 0
    return max(0.0, free - end)


def whole_run(config: RunConfig, cluster: Cluster, steps: Sequence[float]) -> str:
    """How long the run takes if a step takes from steps[0] to steps[1] seconds; by the clock, how far it comes."""
    if config.by_clock:
        slow, fast = (60 * config.minutes / s * config.batch_size / cluster.images for s in (steps[1], steps[0]))
        return f"{slow:.2g} to {fast:.2g} epochs"
    seconds = [config.total_steps(cluster.images) * s for s in steps]
    units = ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
    size, unit = next((u for u in units if seconds[1] >= u[0]), units[-1])
    return f"{seconds[0] / size:.1f} to {seconds[1] / size:.1f} {unit}"


def print_plan(config: RunConfig, cluster: Cluster, name: str, console: Console) -> Plan:
    plan = make_plan(config, cluster)
    other = None
    if config.gelu == "ours" and not config.checkpointing:
        other = make_plan(replace(config, recompute_gelu=not config.recompute_gelu), cluster)
    gpu = GPUS[cluster.gpu]
    peak_rate = gpu.bf16 if bf16_or_fp32(config) == torch.bfloat16 else gpu.fp32
    unhidden = plan.exchange - plan.hidden
    steps = [s + unhidden for s in plan.seconds]
    rates = [config.batch_size / s for s in steps]
    mfu = [plan.flops_per_image * config.batch_size / cluster.gpus / s / peak_rate for s in steps]

    memory = Table(title="memory of one GPU, GiB", box=None, show_header=False, padding=(0, 2), title_justify="left")
    memory.add_column(min_width=24)
    memory.add_column(justify="right")
    for label in ("weights", "gradients", "optimizer", "ema", "activations", "buckets"):
        memory.add_row(label.replace("ema", "EMA"), f"{getattr(plan, label) / GiB:.2f}")
    memory.add_row("at most at once", f"{plan.peak / GiB:.2f} of {gpu.memory / GiB:.0f}")
    rest = Table(title="a step", box=None, show_header=False, padding=(0, 2), title_justify="left")
    rest.add_column(min_width=24)
    per_node = min(cluster.gpus, cluster.gpus_per_node)
    for label, value in (
        ("FLOPs of an image", f"{plan.flops_per_image / 1e9:.1f} G, forward and backward"),
        ("memory traffic", f"{plan.moved / 1e9:.0f} GB on each GPU"),
        ("time", f"{1e3 * steps[0]:.0f} to {1e3 * steps[1]:.0f} ms"),
        *([] if other is None else [("GELU's output", gelu_choice(config, plan, other))]),
        ("MFU", f"{mfu[1]:.0%} to {mfu[0]:.0%}"),
        ("launches", launches(plan)),
        ("communication", f"{plan.sent / 1e9:.2f} GB from each GPU, {1e3 * plan.exchange:.0f} ms; " + exposed(plan)),
        ("images/s", f"{rates[1]:.0f} to {rates[0]:.0f}"),
        ("loader must give", f"{rates[0] * per_node / cluster.gpus:.0f} images/s on each node"),
        ("checkpoint", checkpoint_line(config, cluster, plan, steps[1])),
        (config.length, whole_run(config, cluster, steps)),
    ):
        rest.add_row(label, value)
    what = f"{name} on {cluster.gpus} x {cluster.gpu}: {plan.how}, {plan.micro} images a GPU"
    what += f" x {config.accumulate} micro-batches" if config.accumulate > 1 else ""
    console.print(what + (", checkpointing" if config.checkpointing else ""), highlight=False)
    console.print(memory)
    console.print(rest)
    if plan.peak > 0.92 * gpu.memory:  # torch's allocator and CUDA itself need memory too
        console.print(
            "does not fit: raise --accumulate, set --recompute-gelu or --checkpointing, or "
            "--parallel.strategy zero with a higher --parallel.zero-stage",
            highlight=False,
        )
    return plan


def checkpoint_line(config: RunConfig, cluster: Cluster, plan: Plan, step: float) -> str:
    """Say how large a checkpoint is, how long saving takes, and whether a stopped run has that long.

    step: seconds of a step.
    """
    rate = 1e9 * cluster.disk or disk_rate(config.out, plan.checkpoint)
    term, ahead = stopping(plan.checkpoint, rate, step)
    line = f"{plan.checkpoint / 1e9:.2f} GB, written in {plan.checkpoint / rate:.1f} s at {rate / 1e9:.2f} GB/s"
    line += " measured" if not cluster.disk else ""
    if term <= TERM_SECONDS:
        return f"{line}; saved {term:.0f} s after SIGTERM, which leaves 30"
    ahead = max(SIGNAL_SECONDS, 60 * math.ceil(ahead / 60))
    asked = "launch/slurm.sbatch does" if ahead == SIGNAL_SECONDS else f"sbatch --signal B:USR1@{ahead}"
    return (
        f"{line}; SIGTERM leaves 30 s, and {term:.0f} are needed: ask for USR1 {ahead} s ahead ({asked}); a preemption "
        f"with less notice loses what was trained since the last save (--save-minutes {config.save_minutes:g})"
    )


def launches(plan: Plan) -> str:
    if plan.captured:
        return f"{plan.kernels} kernels, replayed as one CUDA graph"
    fast, slow = (1e3 * plan.kernels * launch for launch in LAUNCHED)
    return f"{plan.kernels} kernels one by one, {fast:.0f} to {slow:.0f} ms of the host's time"


def gelu_choice(config: RunConfig, plan: Plan, other: Plan) -> str:
    """Compare keeping GELU's output with recomputing it. other: the plan with the other setting of recompute_gelu."""
    kept, again = (other, plan) if config.recompute_gelu else (plan, other)
    more = [1e3 * (b - a) for a, b in zip(kept.seconds, again.seconds, strict=True)]
    return (
        f"kept {kept.peak / GiB:.2f} GiB at most; with --recompute-gelu {again.peak / GiB:.2f}, "
        f"{(again.moved - kept.moved) / 1e9:.1f} GB and {more[0]:.1f} to {more[1]:.1f} ms more"
    )


def exposed(plan: Plan) -> str:
    """Say how much of the communication does not overlap with the backward pass."""
    if not plan.sent:
        return "one GPU has no one to talk to"
    return f"{1e3 * (plan.exchange - plan.hidden):.1f} ms of it behind the backward pass, where nothing hides it"
