"""`umd bench scale`: start-up time, memory and speed of commands on a folder and a tar of ImageNet's size.

The folder consists of hard links to a few JPEGs (see `umd.bench.probe`). Each is listed, opened and decoded like a
separate file. Every command runs in its own process, as users run it. pretrain runs a second time with the list of
files that the first has kept.
"""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from umd.bench.options import ProbeBench, ScaleBench
from umd.bench.probe import link_pictures
from umd.bench.step import machine
from umd.errors import UserError
from umd.files import write_json
from umd.train.console import say

TINY = "--model.hidden-size 32 --model.depth 1 --model.decoder-depth 1 --model.num-heads 2 --model.image-size 32 32"
TINY += " --batch-size 64 --save-every 1 --draw-every 0 --device cpu --data.num-workers 2"


@dataclass(frozen=True)
class Row:
    command: str
    first_seconds: float
    again_seconds: float | None  # second run, with the kept list of files
    images_per_second: float | None
    gigabytes: float  # memory of the largest process


def run(bench: ScaleBench, console: Console) -> list[Row]:
    """Make the pictures, run the commands, print and write the rows."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="umd-scale-", dir=bench.folder) as made:
        root = Path(made)
        say(console, f"linking {bench.train + bench.test} pictures in {root}")
        source = root / "pictures"
        link_pictures(source, ProbeBench(train=bench.train, test=bench.test, classes=bench.classes, side=bench.side))
        tar = write_tar(source / "train", root / "train.tar")
        settle([source, *source.glob("*"), *source.glob("*/*"), tar])
        for row in measured(bench, source, tar, root):
            say(console, f"{row.command}: {row.first_seconds:.1f} s, {row.gigabytes:.2f} GB")
            rows.append(row)
    table = Table("command", "s, first", "s, again", "images/s", "GB", title=machine("cpu"))
    for row in rows:
        again = "" if row.again_seconds is None else f"{row.again_seconds:.1f}"
        rate = "" if row.images_per_second is None else f"{row.images_per_second:,.0f}"
        table.add_row(row.command, f"{row.first_seconds:.1f}", again, rate, f"{row.gigabytes:.2f}")
    console.print(table)
    if bench.json is not None:
        settings = {**asdict(bench), "folder": None, "json": None}
        record = {"machine": machine("cpu"), "settings": settings, "rows": [asdict(row) for row in rows]}
        write_json(bench.json, record)
    return rows


def measured(bench: ScaleBench, source: Path, tar: Path, root: Path) -> Iterator[Row]:
    total = bench.train + bench.test
    few = ProbeBench(train=256, test=64, classes=2, side=bench.side)
    link_pictures(root / "few" / "pictures", few)
    line = f"pretrain umd-s4 {TINY} --steps 1 --data.source {root / 'few' / 'pictures'} --out"
    starts = [command(f"{line} {root / f'run-few-{i}'}", root / "cache-few") for i in range(2)]
    yield Row("pretrain, one step, 256 pictures", starts[0][0], starts[1][0], None, max(starts[0][1], starts[1][1]))
    for name, place in (("folder", source), ("tar", tar)):
        cache = root / f"cache-{name}"
        runs = [
            command(f"pretrain umd-s4 {TINY} --steps 1 --data.source {place} --out {root / f'run-{name}-{i}'}", cache)
            for i in range(2)
        ]
        yield Row(f"pretrain, one step, {name}", runs[0][0], runs[1][0], None, max(runs[0][1], runs[1][1]))
        whole = total if name == "folder" else bench.train
        seconds, memory = command(
            f"encode-pixels --data.source {place} --out {root / f'pixels-{name}'} --size 48 48", cache
        )
        yield Row(f"encode-pixels, {name}", seconds, None, whole / seconds, memory)
        shutil.rmtree(root / f"pixels-{name}")
        seconds, memory = command(f"check-data {place} --out {root / 'list.json'}", cache)
        yield Row(f"check-data, {name}", seconds, None, whole / seconds, memory)
        latents = root / f"latents-{name}"
        line = f"encode-latents --data.source {place} --data.vae {small_vae(root / 'vae')} --out {latents} --device cpu"
        line += " --image-size 32 32 --views 1 --crop center --shard-images 256"
        seconds, memory = command(line, cache, until=latents, shows="*.safetensors")
        yield Row(f"encode-latents, first 256, {name}", seconds, None, None, memory)


def command(line: str, cache: Path, until: Path | None = None, shows: str = "") -> tuple[float, float]:
    """Run an umd command. Returns its seconds, and the memory of its largest process in GB.

    until, shows: stop the command once the folder `until` has a file that matches `shows`. None: run to the end.
    Raises UserError, with the command's output, if it fails.
    """
    env = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "umd.cli", *line.split()], env=env, stdout=said, stderr=said)
        # Left for wait4, which alone tells the memory.
        exited = partial(os.waitid, os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        shown = False
        while until is not None and not shown and exited() is None:
            time.sleep(0.05)
            shown = any(until.glob(shows))
        seconds = time.perf_counter() - began
        if until is not None:
            process.kill()
        _, status, usage = os.wait4(process.pid, 0)
        if until is None:
            seconds = time.perf_counter() - began
        if status and not shown:
            said.seek(0)
            raise UserError(f"umd {line} failed: {said.read().decode()[-2000:]}")
    return seconds, usage.ru_maxrss * 1024 / 1e9


def small_vae(folder: Path) -> Path:
    """Write an autoencoder with Stable Diffusion's structure and few weights."""
    from diffusers import AutoencoderKL

    if not folder.exists():
        AutoencoderKL(
            block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=8,
        ).save_pretrained(folder)  # fmt: skip
    return folder


def write_tar(folder: Path, tar: Path) -> Path:
    """Write a WebDataset tar of a folder of classes."""
    with tarfile.open(tar, "w") as archive:
        for label, name in enumerate(sorted(os.listdir(folder))):
            for file in sorted(os.listdir(folder / name)):
                for suffix, data in ((".jpg", (folder / name / file).read_bytes()), (".cls", b"%d" % label)):
                    member = tarfile.TarInfo(f"{name}/{file.removesuffix('.jpg')}{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return tar


def settle(paths: list[Path]) -> None:
    """Set the paths' times a minute back, as the list of a folder that has just changed is not kept."""
    for path in paths:
        os.utime(path, (time.time() - 60, time.time() - 60))
