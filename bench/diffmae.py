"""`umd bench diffmae`: cost of DiffMAE's denoising step when filling a hole, and of its training step.

- Filling: run only the decoder at each step, compared with running the whole network (the naive way).
- Training: the same encoder under the DiffMAE, MAE and UMD objectives, each in a process of its own.

All rows of a part run in turn. Read the ratios, not the seconds.
"""

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from umd.bench.options import DiffMAEBench
from umd.bench.step import WARMUP, count_flops, images, machine, own_process, umd_step, vit_mae_step
from umd.bench.training import Step, on_batch, timed, train_step
from umd.config import OBJECTIVES, DiffMAEObjectiveConfig
from umd.diffmae import DiffMAE
from umd.files import write_json
from umd.machine.device import autocast, keep_freed_memory, pick_dtype, take_device
from umd.objective import DiffMAEObjective
from umd.schedule import NoiseSchedule


@dataclass(frozen=True)
class Row:
    part: str  # filling or training
    name: str
    batch: int
    dtype: str
    seconds: float  # median
    seconds_min: float
    seconds_max: float
    images_per_second: float
    flops: int
    time_ratio: float  # seconds over the part's first row: median over rounds
    flop_ratio: float


def filling_steps(bench: DiffMAEBench) -> dict[str, Step]:
    """Make the two ways to compute one denoising step: decoder alone, and encoder and decoder."""
    model, objective = DiffMAE(bench.config()).to(bench.device).eval(), diffmae_objective(bench)
    x = images(bench.step_bench())
    dtype = pick_dtype(bench.dtype, x.device)
    c = objective.corrupt(bench.batch, 0, x.device)
    visible, masked = (objective.clean_patches(x, ids) for ids in (c.ids_keep, c.ids_masked))
    with torch.no_grad(), autocast(x.device, dtype):
        memories = model.encode(visible, c.ids_keep, c.layout)

    def decoder() -> None:
        with torch.no_grad(), autocast(x.device, dtype):
            model.decode(masked, c.ids_masked, c.layout, c.timesteps, memories)

    def whole() -> None:
        with torch.no_grad(), autocast(x.device, dtype):
            model(visible, c.ids_keep, masked, c.ids_masked, c.layout, c.timesteps)

    return {"decoder alone": decoder, "whole network": whole}


def diffmae_objective(bench: DiffMAEBench) -> DiffMAEObjective:
    config = DiffMAEObjectiveConfig(mask_ratio=bench.mask_ratio)
    return DiffMAEObjective(bench.config(), config, NoiseSchedule("linear_rho"))


def diffmae_step(bench: DiffMAEBench) -> Step:
    """Make one training step of DiffMAE."""
    model, objective = DiffMAE(bench.config()), diffmae_objective(bench)
    step = train_step(model, objective, bench.batch, bench.dtype, bench.device)
    return on_batch(step, images(bench.step_bench()))


TRAINING: dict[str, Callable[[DiffMAEBench], Step]] = {
    "diffmae": diffmae_step,
    "umd as mae": lambda b: umd_step(b.step_bench(), replace(OBJECTIVES["mae"], mask_ratio_no_noise=b.mask_ratio)),
    "umd": lambda b: umd_step(b.step_bench(), OBJECTIVES["umd"]),
    "transformers vit-mae": lambda b: vit_mae_step(b.step_bench()),
}


def filling_rows(bench: DiffMAEBench, console: Console) -> list[Row]:
    """Time both ways of filling in each round, after warm-up rounds."""
    steps = filling_steps(bench)

    def flops_of(step: Step) -> int:
        return count_flops(lambda: step, bench.device)

    flops = {name: flops_of(step) for name, step in steps.items()}
    for step in [*steps.values()] * WARMUP:
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in track(range(bench.repeats), description="filling", console=console, transient=True):
        for name, step in steps.items():
            seconds[name].append(timed(step, bench.device))
    return rows_of("filling", seconds, flops, bench)


def serve(bench: DiffMAEBench, name: str, pipe: Connection) -> None:
    """Process of one training row: send its FLOPs (or the missing package), then one step's time per request."""
    keep_freed_memory()
    take_device(bench.device, bench.dtype)
    try:
        step = TRAINING[name](bench)
    except ImportError as error:
        pipe.send(error)
        return
    for _ in range(WARMUP):
        step()
    pipe.send(count_flops(lambda: step if bench.device != "cpu" else TRAINING[name](bench), bench.device))
    while pipe.recv():
        pipe.send(timed(step, bench.device))


def training_rows(bench: DiffMAEBench, console: Console) -> list[Row]:
    """Time each network in a process of its own, as in a training; each makes one step per round."""
    flops: dict[str, int] = {}
    with ExitStack() as stack:
        pipes = {}
        for name in TRAINING:
            pipe = stack.enter_context(own_process(serve, bench, name))
            made = pipe.recv()
            if isinstance(made, ImportError):
                console.print(f"{name} left out: {made}; pip install transformers")
            else:
                pipes[name], flops[name] = pipe, made
        seconds: dict[str, list[float]] = {name: [] for name in pipes}
        for _ in track(range(bench.repeats), description="training", console=console, transient=True):
            for name, pipe in pipes.items():
                pipe.send(True)
                seconds[name].append(pipe.recv())
    return rows_of("training", seconds, flops, bench)


def rows_of(part: str, seconds: dict[str, list[float]], flops: dict[str, int], bench: DiffMAEBench) -> list[Row]:
    first = next(iter(seconds))
    rows = []
    for name, taken in seconds.items():
        # median of the ratios within each round: drift of the machine's speed cancels out
        ratio = statistics.median(b / a for a, b in zip(seconds[first], taken, strict=True))
        median, least, most = statistics.median(taken), min(taken), max(taken)
        speed, work = bench.batch / median, flops[name]
        rows.append(
            Row(part, name, bench.batch, bench.dtype, median, least, most, speed, work, ratio, work / flops[first])
        )
    return rows


def run(bench: DiffMAEBench, console: Console) -> list[Row]:
    """Measure, print the table and the ratios, write the JSON. Returns the rows."""
    keep_freed_memory()
    bench = replace(bench, device=str(take_device(bench.device, bench.dtype)[0]))
    rows = filling_rows(bench, console) + training_rows(bench, console)
    print_rows(bench, rows, console)
    if bench.json is not None:
        write_json(bench.json, [asdict(row) for row in rows])
    return rows


def print_rows(bench: DiffMAEBench, rows: list[Row], console: Console) -> None:
    where = machine(bench.device)
    table = Table(
        title=f"{bench.model} {bench.image_size}x{bench.image_size}, batch {bench.batch}, {bench.dtype}, {where}",
        box=box.SIMPLE,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in ("", "row", "seconds (min-max)", "img/s", "GFLOP", "time", "FLOPs"):
        table.add_column(column, justify="left" if column in ("", "row") else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.part,
            row.name,
            f"{row.seconds:.3f} ({row.seconds_min:.3f}-{row.seconds_max:.3f})",
            f"{row.images_per_second:.1f}",
            f"{row.flops / 1e9:.0f}",
            f"{row.time_ratio:.2f}x",
            f"{row.flop_ratio:.2f}x",
        )
    console.print(table)
    whole = rows[1]
    console.print(
        f"Filling with the decoder alone: {whole.time_ratio:.2f} times as fast as the whole network, of "
        f"{whole.flop_ratio:.2f} times the FLOPs ({whole.time_ratio / whole.flop_ratio:.0%}; at least 90% is the aim)."
    )
