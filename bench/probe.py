"""`umd bench probe`: time, memory and number of pictures read of a few-shot probe on a folder of ImageNet's shape.

The folder consists of hard links to a few JPEGs, so it needs little disk space. Each link is opened, read and decoded
like a separate file. The network is small and untrained, as the benchmark is about everything but the network.
"""

import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from umd.bench.options import ProbeBench
from umd.bench.step import machine
from umd.checkpoint import save_checkpoint
from umd.config import model_config
from umd.files import write_json
from umd.machine.device import peak_memory
from umd.methods import build_model
from umd.train.options import Probe
from umd.train.probe import Recognition, print_rows
from umd.train.run import RunConfig, read_config, to_plain, write_config
from umd.train.settings import DataConfig
from umd.train.shards import share


def run(bench: ProbeBench, console: Console) -> dict[str, float]:
    """Make the folder and a run, probe it, print and write the figures."""
    with tempfile.TemporaryDirectory(prefix="umd-probe-") as folder:
        source, out = Path(folder) / "pictures", Path(folder) / "run"
        link_pictures(source, bench)
        make_run(out, source, bench)
        figures = measure(out, bench, console)
    for name, value in figures.items():
        console.print(f"{name:28} {value:12,.1f}", highlight=False)
    if bench.json is not None:
        record = {"machine": machine("cpu"), "bench": {k: str(v) for k, v in asdict(bench).items()}, "figures": figures}
        write_json(bench.json, record)
    return figures


def link_pictures(source: Path, bench: ProbeBench) -> None:
    """Make train/ and test/ with one folder per class: hard links to 256 JPEGs of noise around a colour."""
    rng = np.random.default_rng(0)
    originals = source.parent / "originals"
    originals.mkdir(parents=True)
    for i in range(256):
        picture = rng.integers(0, 64, (bench.side, bench.side, 3)) + rng.integers(0, 192, 3)
        Image.fromarray(picture.astype(np.uint8)).save(originals / f"{i}.jpg")
    for split, count in (("train", bench.train), ("test", bench.test)):
        for label in range(bench.classes):
            folder = source / split / f"{label:04d}"
            folder.mkdir(parents=True)
            for i in range(count // bench.classes):
                os.link(originals / f"{(label + i) % 256}.jpg", folder / f"{i:06d}.jpg")


def make_run(out: Path, source: Path, bench: ProbeBench) -> None:
    """Write an untrained run on the pictures of `source`."""
    torch.manual_seed(0)
    data = DataConfig(source=str(source))
    config = RunConfig(out=out, model=model_config(bench.model, image_size=(32, 32)), data=data)
    write_config(config)
    parameters = dict(build_model(config.model).named_parameters())
    save_checkpoint(config.checkpoints, 1, {"model": parameters}, {"config": to_plain(config)})


def measure(out: Path, bench: ProbeBench, console: Console) -> dict[str, float]:
    began = time.perf_counter()
    recognition = Recognition(read_config(out), Probe(shots=bench.shots))
    jobs = recognition.jobs()
    opened = time.perf_counter()
    share(jobs, console, "pictures read")
    read = time.perf_counter()
    pictures = len(recognition.shots.ids) + len(recognition.held_out.ids)
    reading = peak_memory(torch.device("cpu"))
    entry = recognition.entry()
    print_rows(entry["rows"], "an untrained network", console)
    return {
        "pictures in the folder": bench.train + bench.test,
        "pictures read": pictures,
        "seconds to open": opened - began,
        "seconds to read": read - opened,
        "pictures a second": pictures / (read - opened),
        "seconds to fit": time.perf_counter() - read,
        "GB at most, reading": reading / 1e9,
        "GB at most": peak_memory(torch.device("cpu")) / 1e9,
    }
