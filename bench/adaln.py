"""`umd bench adaln`: weights, FLOPs and step time of each adaLN projection, measured in turn in one process."""

import statistics
from dataclasses import asdict, dataclass, replace
from typing import get_args

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from umd.bench.options import AdaLNBench
from umd.bench.step import WARMUP, machine
from umd.bench.training import Step, on_batch, timed, train_step
from umd.config import AdaLNProjection, ObjectiveConfig
from umd.files import write_json
from umd.machine.device import keep_freed_memory, take_device
from umd.model import UMD
from umd.objective import Objective
from umd.schedule import NoiseSchedule

PROJECTIONS: tuple[AdaLNProjection, ...] = get_args(AdaLNProjection)


@dataclass(frozen=True)
class Row:
    projection: str
    weights: int
    of_adaLN: int
    flops_per_image: float  # forward and backward
    seconds: float | None  # per step, median
    ratio: float | None  # seconds over the first row's: median of the ratios within each round


def training_step(bench: AdaLNBench, model: UMD) -> Step:
    objective = Objective(model.config, ObjectiveConfig(), NoiseSchedule("cosine"))
    x = torch.randn(bench.batch, bench.channels, bench.image_size, bench.image_size, device=bench.device)
    return on_batch(train_step(model, objective, bench.batch, bench.dtype, bench.device), x)


def run(bench: AdaLNBench, console: Console) -> list[Row]:
    """Measure all projections, print the table, write the JSON. Returns the rows."""
    keep_freed_memory()
    bench = replace(bench, device=str(take_device(bench.device, bench.dtype)[0]))
    counts: dict[str, tuple[int, int, float]] = {}
    steps: dict[str, Step] = {}
    for projection in PROJECTIONS:
        config = bench.config(projection)
        with torch.device("meta" if bench.repeats == 0 else bench.device):
            model = UMD(config)
        flops = Objective(config, ObjectiveConfig(), NoiseSchedule("cosine")).step_flops(bench.batch) / bench.batch
        weights = sum(p.numel() for p in model.parameters())
        of_adaLN = sum(p.numel() for name, p in model.named_parameters() if name.startswith("adaLN_modulation."))
        counts[projection] = weights, of_adaLN, flops
        if bench.repeats:
            steps[projection] = training_step(bench, model)
    for step in [*steps.values()] * WARMUP:
        step()
    seconds: dict[str, list[float]] = {name: [] for name in PROJECTIONS}
    for _ in track(range(bench.repeats), description="rounds", console=console, transient=True):
        for name, step in steps.items():
            seconds[name].append(timed(step, bench.device))
    rows = []
    for name in PROJECTIONS:
        ratios = [b / a for a, b in zip(seconds[PROJECTIONS[0]], seconds[name], strict=True)]
        times = (statistics.median(seconds[name]), statistics.median(ratios)) if ratios else (None, None)
        rows.append(Row(name, *counts[name], seconds=times[0], ratio=times[1]))
    where = machine(bench.device)
    what = f"{bench.model}" + (f", depth / {bench.shallower}" if bench.shallower > 1 else "")
    table = Table(
        "adaLN",
        "weights, M",
        "of adaLN",
        "GFLOP an image",
        "ms a step",
        "ratio",
        title=f"{what}, batch {bench.batch}, {where}",
    )
    for row in rows:
        cells = [f"{row.weights / 1e6:.1f}", f"{row.of_adaLN / 1e6:.1f}", f"{row.flops_per_image / 1e9:.2f}"]
        cells += ["", ""] if row.seconds is None else [f"{1e3 * row.seconds:.1f}", f"{row.ratio:.2f}"]
        table.add_row(row.projection, *cells)
    console.print(table)
    if bench.json is not None:
        settings = {**asdict(bench), "json": None, "torch": torch.__version__, "threads": torch.get_num_threads()}
        write_json(bench.json, {"settings": settings, "rows": [asdict(row) for row in rows]})
    return rows
