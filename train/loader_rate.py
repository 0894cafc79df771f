"""Measure how many pictures per second the loaders prepare on this machine, for `umd doctor` and `umd bench`."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from umd.machine.device import pick_device
from umd.machine.doctor import Row
from umd.train.data import has_dali, open_dataset, train_loader
from umd.train.settings import DataConfig

BATCH, BATCHES = 32, 8


@contextmanager
def photographs(count: int) -> Iterator[Path]:
    """Make a temporary folder of JPEGs as large and detailed as ImageNet's, about 110 kB each."""
    height, width = 375, 500
    with TemporaryDirectory() as folder:
        for seed in range(count):
            rng = np.random.default_rng(seed)
            small = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
            picture = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)) + rng.normal(
                0, 6, (height, width, 1)
            )
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(Path(folder, f"{seed:03d}.jpg"), quality=92)
        yield Path(folder)


def rates(folder: Path, loader: str, size: int, workers: int) -> tuple[float, float]:
    """(images per second, CPU seconds per image) of a loader in steady state, workers included."""
    config = DataConfig(str(folder), (size, size), holdout=0, num_workers=workers)
    config = replace(config, loader=loader)  # type: ignore[arg-type]
    stream = train_loader(open_dataset(config, "train"), config, batch_size=BATCH, seed=0, device=pick_device())
    try:
        for _ in islice(stream, 3):  # skip the batches that were read ahead
            pass
        start, cpu = time.perf_counter(), cpu_seconds()
        for _ in islice(stream, BATCHES):
            pass
        seconds = time.perf_counter() - start
    finally:
        stream.close()
    return BATCHES * BATCH / seconds, (cpu_seconds() - cpu) / (BATCHES * BATCH)


def cpu_seconds() -> float:
    """CPU time of this process and of workers that have ended."""
    usage = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in usage)


def loader_row() -> Row:
    """The row of `umd doctor` about what reads JPEG files here, and how fast."""
    workers = DataConfig().workers
    with photographs(BATCH) as folder:
        told = [f"Pillow {rates(folder, 'python', 64, workers)[0]:.0f} images/s with {workers} processes"]
        if has_dali():
            told.insert(0, f"DALI {rates(folder, 'dali', 64, workers)[0]:.0f} images/s with {workers} threads")
    return Row("loader", f"{'; '.join(told)} (JPEGs of 500x375 to 64x64; the first is used)")
