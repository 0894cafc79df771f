"""`umd bench reproduce`: small trainings from scratch, and the figures of docs/results. To resume, repeat it."""

from importlib import import_module

import torch
from rich.console import Console

from umd.bench.options import Reproduce

PARTS = {  # part -> module with a function reproduce(options, console)
    "filling": "umd.bench.filling",
    "layers": "umd.bench.layers",
    "paper": "umd.bench.paper",
    "recognition": "umd.bench.recognition",
    "video": "umd.bench.video",
    "real-video": "umd.bench.video",
}


def run(options: Reproduce, console: Console) -> None:
    console.print(f"{torch.get_num_threads()} threads, torch {torch.__version__}", highlight=False)
    import_module(PARTS[options.part]).reproduce(options, console)
