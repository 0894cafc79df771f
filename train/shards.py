"""Long work cut into files. Each rank makes its share of them; a file that exists is done.

Ranks do not communicate or wait for each other. A repeated command makes the missing files, on any number of ranks. A
rank that finds all files done does the work that needs all of them.
"""

import errno
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from umd.errors import UserError
from umd.files import make_folder, write_whole

Advance = Callable[[float], None]  # called with the number of images done
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota exceeded, file too large
LOOK_SECONDS = 10.0  # between looks at what other ranks have made
LINE_SECONDS = 30.0  # between progress lines if there is no terminal


def rank_and_size() -> tuple[int, int]:
    """(rank, number of ranks) from the launcher (torchrun, deepspeed); (0, 1) without one."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own_device(name: str) -> str:
    """Resolve `auto` to the GPU of this rank's local number. Other names stay."""
    if name == "auto" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local} of this host has no GPU: torch sees {torch.cuda.device_count()}; start as many "
                "processes as there are GPUs, or give --device"
            )
        return f"cuda:{local}"
    return name


@dataclass(frozen=True)
class Job:
    """A file to make. Its bytes depend only on what its name stands for."""

    path: Path
    images: int  # number of images it counts for in the progress
    make: Callable[[Advance], bytes]  # returns the bytes; may report how many of its images are done


def share(jobs: Sequence[Job], console: Console, what: str) -> bool:
    """Make this rank's missing files, then help other ranks. Returns whether all files exist now.

    The jobs' folders are made first. Whoever puts the files together may remove them: ranks still at work then stop.

    Raises UserError if a file cannot be written.
    """
    rank, size = rank_and_size()
    total = sum(job.images for job in jobs)
    for folder in {job.path.parent for job in jobs}:
        make_folder(folder, "see to it that it can be made, and run the same command again")
    own = deque(jobs[rank::size])
    made: set[Path] = set()
    looked, there, done = -math.inf, made, 0
    with progress(console, what, total, show=rank == 0) as advance_to:
        while True:
            # Each look lists the folders and goes through all jobs: 0.8 s for 55,000 files on a slow core.
            if not own or time.monotonic() - looked > LOOK_SECONDS:
                there = listed(jobs) | made
                looked, done = time.monotonic(), sum(job.images for job in jobs if job.path in there)
                advance_to(done)
            job = own.popleft() if own else next_job(jobs, there, rank, size)
            if job is None:
                break
            if job.path in there:
                continue
            data = job.make(lambda part, done=done: advance_to(done + part))  # type: ignore[misc]
            try:
                write_whole(job.path, data)
            except FileNotFoundError:  # another rank has put the files together and removed the folder
                return False
            except OSError as error:
                if job.path in listed(jobs):  # another rank made it meanwhile
                    continue
                mend = "make room there" if error.errno in FULL else "see to it that files can be made there"
                raise UserError(
                    f"could not write {job.path}: {error.strerror or error}; {mend} and run the same command again, "
                    "which keeps what is finished"
                ) from error
            made.add(job.path)
            done += job.images
            advance_to(done)
    return images_done(jobs) == total


def next_job(jobs: Sequence[Job], there: set[Path], rank: int, size: int) -> Job | None:
    """The next file for a rank to make. None if nothing is left for it.

    A rank owns every size-th file and makes its missing ones in order. Then it helps others: if a node was lost, the
    missing files may all belong to a few ranks. A helper never takes a rank's first missing file, which that rank is
    making, and starts from the last.
    """
    missing = [[job for job in jobs[other::size] if job.path not in there] for other in range(size)]
    if missing[rank]:
        return missing[rank][0]
    spare = sorted(((i, job) for own in missing for i, job in enumerate(own[1:])), key=lambda entry: -entry[0])
    far = spare[: (len(spare) + 1) // 2]
    return far[rank * len(far) // size][1] if far else None  # helpers start at different files


def listed(jobs: Sequence[Job]) -> set[Path]:
    """All files in the jobs' folders. Folders are listed, as a network disk may cache that a single file is missing."""
    folders = {job.path.parent for job in jobs}
    return {folder / name for folder in folders if folder.is_dir() for name in os.listdir(folder)}


def images_done(jobs: Sequence[Job]) -> int:
    """Number of images in the existing files of all ranks."""
    there = listed(jobs)
    return sum(job.images for job in jobs if job.path in there)


@contextmanager
def progress(console: Console, what: str, total: int, show: bool = True) -> Iterator[Advance]:
    """Show progress towards `total` and the time left: a bar on a terminal, else a line every LINE_SECONDS."""
    if not show:
        yield lambda done: None
        return
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TaskProgressColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done)
        return
    began = told = time.monotonic()
    before = -1.0

    def tell(done: float) -> None:
        nonlocal told, before
        before = done if before < 0 else before  # the first value was done by an earlier process
        now = time.monotonic()
        if now - told >= LINE_SECONDS and done > before:
            left = (now - began) * (total - done) / (done - before)
            console.print(f"{what}: {done:.0f} of {total}, {left / 60:.0f} min left", highlight=False, soft_wrap=True)
            sys.stdout.flush()
            told = now

    yield tell


def others_work() -> str:
    """Message of a rank that ends while others still work."""
    rank, size = rank_and_size()
    return (
        f"rank {rank} of {size} is done; the last rank to finish puts the parts together (if none did, one was killed: "
        "the same command goes on)"
    )
