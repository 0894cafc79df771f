"""`umd bench diffmae`: what a step of filling costs a DiffMAE, and its training step beside MAE's and UMD's.

Filling: the decoder alone against the whole network run again at each step, the naive way. Training: the same encoder
under each objective. All rows of a part run alternately in one process; read the ratios, not the seconds.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from umd.bench.step import WARMUP, Step, StepBench, autocast, count_flops, images, timed, umd_step, vit_mae_step
from umd.config import OBJECTIVES, DiffMAEConfig, DiffMAEObjectiveConfig, diffmae_config
from umd.device import keep_freed_memory
from umd.diffmae import DiffMAE
from umd.errors import UserError
from umd.objective import DiffMAEObjective
from umd.schedule import NoiseSchedule
from umd.train.optim import adamw


@dataclass(frozen=True)
class DiffMAEBench:
    """What is measured."""

    model: str = "DiffMAE-B/4"
    """Size and patch size; MAE and UMD take its encoder."""
    image_size: int = 64
    """Side of the images."""
    batch: int = 16
    """Images a step."""
    mask_ratio: float = 0.75
    """Share of patches that DiffMAE and MAE predict; UMD keeps its own two."""
    dtype: str = "bf16"
    """bf16 (autocast) or fp32."""
    repeats: int = 5
    """Measured rounds; each runs every row once."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where."""
    json: Path | None = None
    """Write the rows here."""

    def config(self) -> DiffMAEConfig:
        return diffmae_config(self.model, image_size=(self.image_size, self.image_size))

    def step_bench(self) -> StepBench:
        return StepBench(
            model=self.model.replace("DiffMAE", "UMD"), image_size=self.image_size, batch=self.batch, dtype=self.dtype,
            device=self.device,
        )  # fmt: skip


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
    time_ratio: float  # to the part's first row: median over rounds
    flop_ratio: float


def filling_steps(bench: DiffMAEBench) -> dict[str, Step]:
    """One call at a time of the schedule, of the decoder alone and of encoder and decoder."""
    model, step_bench = DiffMAE(bench.config()).to(bench.device).eval(), bench.step_bench()
    objective = diffmae_objective(bench)
    x = images(step_bench)
    c = objective.corrupt(bench.batch, 0, x.device)
    visible, masked = (objective.clean_patches(x, ids) for ids in (c.ids_keep, c.ids_masked))
    with torch.no_grad(), autocast(step_bench):
        memories = model.encode(visible, c.ids_keep, c.layout)

    def decoder() -> None:
        with torch.no_grad(), autocast(step_bench):
            model.decode(masked, c.ids_masked, c.layout, c.timesteps, memories)

    def whole() -> None:
        with torch.no_grad(), autocast(step_bench):
            model(visible, c.ids_keep, masked, c.ids_masked, c.layout, c.timesteps)

    return {"decoder alone": decoder, "whole network": whole}


def diffmae_objective(bench: DiffMAEBench) -> DiffMAEObjective:
    config = DiffMAEObjectiveConfig(mask_ratio=bench.mask_ratio)
    return DiffMAEObjective(bench.config(), config, NoiseSchedule("linear_rho"))


def diffmae_step(bench: DiffMAEBench) -> Step:
    """One optimisation step of DiffMAE."""
    model, objective, step_bench = (
        DiffMAE(bench.config()).to(bench.device),
        diffmae_objective(bench),
        bench.step_bench(),
    )
    optimizer = adamw(model, 1e-4, (0.9, 0.95), 0.05)
    x, seed = images(step_bench), 0

    def step() -> None:
        nonlocal seed
        seed += 1
        with autocast(step_bench):
            loss, _ = objective(model, x, objective.corrupt(len(x), seed, x.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def training_steps(bench: DiffMAEBench, console: Console) -> dict[str, Step]:
    mae = replace(OBJECTIVES["mae"], mask_ratio_no_noise=bench.mask_ratio)
    makers: dict[str, Callable[[], Step]] = {
        "diffmae": lambda: diffmae_step(bench),
        "umd as mae": lambda: umd_step(bench.step_bench(), mae),
        "umd": lambda: umd_step(bench.step_bench(), OBJECTIVES["umd"]),
        "transformers vit-mae": lambda: vit_mae_step(bench.step_bench()),
    }
    steps = {}
    for name, make in makers.items():
        try:
            steps[name] = make()
        except ImportError as error:
            console.print(f"[yellow]{name} left out: {error}; pip install transformers")
    return steps


def measured(part: str, steps: dict[str, Step], bench: DiffMAEBench, console: Console) -> list[Row]:
    """Every row once a round, after rounds that do not count."""
    flops = {name: count_flops(step) for name, step in steps.items()}
    for _ in range(WARMUP):
        for step in steps.values():
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in track(range(bench.repeats), description=part, console=console, transient=True):
        for name, step in steps.items():
            seconds[name].append(timed(step, bench.device))
    first = next(iter(steps))
    rows = []
    for name, taken in seconds.items():
        # the median of the ratios within a round: drift of the machine's speed falls out
        ratio = statistics.median(b / a for a, b in zip(seconds[first], taken, strict=True))
        median = statistics.median(taken)
        rows.append(
            Row(
                part,
                name,
                bench.batch,
                bench.dtype,
                median,
                min(taken),
                max(taken),
                bench.batch / median,
                flops[name],
                ratio,
                flops[name] / flops[first],
            )  # fmt: skip
        )
    return rows


def run(bench: DiffMAEBench, console: Console) -> list[Row]:
    """Measure, print the table and the ratios, write the JSON. Returns the rows."""
    if bench.dtype not in ("bf16", "fp32"):
        raise UserError(f"dtype must be bf16 or fp32, got {bench.dtype!r}")
    for name in ("batch", "repeats"):
        if getattr(bench, name) < 1:
            raise UserError(f"{name} must be at least 1, got {getattr(bench, name)}")
    keep_freed_memory()
    rows = measured("filling", filling_steps(bench), bench, console)
    rows += measured("training", training_steps(bench, console), bench, console)
    print_rows(bench, rows, console)
    if bench.json is not None:
        bench.json.parent.mkdir(parents=True, exist_ok=True)
        bench.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return rows


def print_rows(bench: DiffMAEBench, rows: list[Row], console: Console) -> None:
    where = torch.cuda.get_device_name() if bench.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    table = Table(
        title=f"{bench.model} {bench.image_size}x{bench.image_size}, batch {bench.batch}, {bench.dtype}, {where}"
    )
    for column in ("", "row", "seconds (min-max)", "img/s", "GFLOP", "time", "FLOPs"):
        table.add_column(column, justify="left" if column in ("", "row") else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.part,
            row.name,
            f"{row.seconds:.3f} ({row.seconds_min:.3f}-{row.seconds_max:.3f})",
            f"{row.images_per_second:.1f}",
            f"{row.flops / 1e9:.1f}",
            f"{row.time_ratio:.2f}x",
            f"{row.flop_ratio:.2f}x",
        )
    console.print(table)
    whole = rows[1]
    console.print(
        f"Filling with the decoder alone: {whole.time_ratio:.2f} times as fast as the whole network, of "
        f"{whole.flop_ratio:.2f} times the FLOPs ({whole.time_ratio / whole.flop_ratio:.0%}; at least 90% is the aim)."
    )
