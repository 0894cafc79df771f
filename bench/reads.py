"""`umd bench reads`: compare ways to read stored latents: images/s, bytes and disk requests, cold and warm.

Run it on the disk you train from: `--folder /network/disk`. Cold means that the shards are not in the page cache:
before each measurement the system is told to drop them (`posix_fadvise`, needs no privileges). Linux only.
"""

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from umd.bench.options import ReadsBench
from umd.bench.step import machine
from umd.files import flush, write_json
from umd.train.data import sample_keys
from umd.train.latent_batches import StoredViews
from umd.train.latents import BLOCK, LatentDataset, finish, open_latents, shard_bytes, shard_name
from umd.train.loader_rate import cpu_seconds

Keys = list[tuple[int, int]]
WAYS = {"pread, global": 1, "pread, blocks": BLOCK}  # neighbours in a shard that are read together


@contextmanager
def stored(bench: ReadsBench) -> Iterator[LatentDataset]:
    """Write a folder of random latents."""
    moments = torch.randn(4096, 1, 2, 4, 32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        write_latents(Path(folder), moments, "bf16", bench.shards)
        yield open_latents(Path(folder), "train")


def write_latents(folder: Path, moments: Tensor, dtype: str, shards: int = 1) -> None:
    """Write latents [n, V, 2, 4, h, w] as `umd encode-latents` does, the same in each shard, flushed to the disk."""
    vae = dict(name="", kind="AutoencoderKL", sha256="", channels=4, factor=8, scale=1.0, shift=0.0)
    recipe = dict(vae=vae, shape=list(moments.shape[3:]), dtype=dtype, class_names=["all"])
    for number in range(shards):
        index = np.arange(len(moments)) + len(moments) * number
        file = folder / shard_name("train", number, shards)
        file.write_bytes(shard_bytes(recipe, "train", moments, np.zeros_like(index), index, list(map(str, index))))
        flush(file)  # the page cache drops only what is on the disk
    finish(folder, recipe, {"train": shards})


# Measuring


def first_batches(bench: ReadsBench, dataset: LatentDataset, way: str) -> list[Keys]:
    """The first batches of an epoch, in the order of a way."""
    blocks = dataset.blocks if WAYS[way] > 1 else None
    keys = sample_keys(len(dataset), batch_size=bench.batch, seed=0, blocks=blocks)
    return list(islice(keys, bench.count // bench.batch))


def read_share(dataset: LatentDataset, way: str, batches: list[Keys], rank: int, size: int, ready: Barrier) -> None:
    """Read the share of the batches of process `rank` of `size`, once all are ready."""
    views = StoredViews(dataset, WAYS[way])
    ready.wait()
    for keys in batches:
        views.__getitems__(keys[rank * len(keys) // size : (rank + 1) * len(keys) // size])


def measure(bench: ReadsBench, dataset: LatentDataset, way: str, size: int, cold: bool) -> dict[str, float]:
    """Measure per image: seconds, CPU seconds, bytes from the disk, and for a local disk requests to it."""
    files = [shard.path for shard in dataset.shards]
    if cold:
        for file in files:
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    batches = first_batches(bench, dataset, way)
    fork = multiprocessing.get_context("fork")
    ready = fork.Barrier(size + 1)
    readers = [fork.Process(target=read_share, args=(dataset, way, batches, rank, size, ready)) for rank in range(size)]
    for reader in readers:
        reader.start()
    cpu_before, bytes_before, requests_before = cpu_seconds(), bytes_read(), requests(files[0])
    ready.wait()
    begun = time.perf_counter()
    for reader in readers:
        reader.join()
        assert reader.exitcode == 0, f"a process that reads by {way} failed"
    seconds, requested = time.perf_counter() - begun, requests(files[0])
    images = bench.count // bench.batch * bench.batch
    found = {"seconds": seconds / images, "cpu_seconds": (cpu_seconds() - cpu_before) / images}
    found |= {"bytes": (bytes_read() - bytes_before) / images}
    if requested is not None and requests_before is not None:
        found["requests"] = (requested - requests_before) / images
    return found


def bytes_read() -> int:
    """Bytes read from disks by this process and the processes it has waited for."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def requests(file: Path) -> int | None:
    """Requests of this whole machine to the disk of a file. None if it is not a local disk."""
    device = file.stat().st_dev
    stat = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
    return int(stat.read_text().split()[0]) if stat.exists() else None


def run(bench: ReadsBench, console: Console) -> list[dict]:
    """Measure all ways, print the table, write the JSON. Returns rows: medians over rounds, and range of seconds."""
    found: dict[tuple[str, int, bool], list[dict[str, float]]] = {}
    with stored(bench) as dataset:
        for _ in range(bench.repeats):
            for size in bench.processes:
                for way in WAYS:
                    for cold in (True, False):  # warm: reads what the cold one has just read
                        found.setdefault((way, size, cold), []).append(measure(bench, dataset, way, size, cold))
    rows = []
    for (way, size, cold), values in found.items():
        row: dict = {"way": way, "processes": size, "cache": "cold" if cold else "warm"}
        for name in ("seconds", "cpu_seconds", "bytes", "requests"):
            numbers = [value[name] for value in values if name in value]
            row[name] = statistics.median(numbers) if numbers else None
        seconds = [value["seconds"] for value in values]
        rows.append(row | {"min_seconds": min(seconds), "max_seconds": max(seconds)})
    show(rows, console)
    if bench.json is not None:
        settings = {name: value for name, value in asdict(bench).items() if name not in ("json", "folder")}
        write_json(bench.json, {"settings": settings, "rows": rows})
    return rows


def show(rows: list[dict], console: Console) -> None:
    table = Table("", "processes", "cache", "images/s", "a core", "KiB each", "requests", title=machine("cpu"))
    for row in rows:
        asked = "?" if row["requests"] is None else f"{row['requests']:.3f}"
        rates = (f"{1 / row[name]:,.0f}" for name in ("seconds", "cpu_seconds"))
        table.add_row(row["way"], str(row["processes"]), row["cache"], *rates, f"{row['bytes'] / 1024:.1f}", asked)
    console.print(table)
