"""Long work cut into files: each rank makes its share of them, and a file that is there is done.

Ranks need not talk. A killed command goes on with the files that are missing, on any number of ranks, and no rank waits
for another: whoever finds the last file made does what needs all of them.
"""

import errno
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from umd.errors import UserError
from umd.files import write_whole

Advance = Callable[[float], None]  # takes the images that are done
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, the largest file
LINE_SECONDS = 30.0  # between lines of progress where there is no terminal


def rank_and_size() -> tuple[int, int]:
    """This process among those that a launcher (torchrun, deepspeed) started; (0, 1) without one."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own_device(name: str) -> str:
    """`name`, where auto is the GPU of this rank's own number."""
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
    """A file to be made: its bytes are a function of nothing but what its name stands for."""

    path: Path
    images: int  # that it stands for, in the progress
    make: Callable[[Advance], bytes]  # may tell on the way how many of its images are done


def share(jobs: Sequence[Job], console: Console, what: str) -> bool:
    """Make this rank's files that are not there, then some of those that another rank is far from; returns whether all
    are there now. Raises UserError where the disk refuses."""
    rank, size = rank_and_size()
    total = sum(job.images for job in jobs)
    with progress(console, what, total, show=rank == 0) as advance_to:
        done = images_done(jobs)
        advance_to(done)
        made: set[Path] = set()
        while job := next_job(jobs, listed(jobs) | made, rank, size):
            data = job.make(lambda part, done=done: advance_to(done + part))  # type: ignore[misc]
            try:
                job.path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(job.path, data)
            except OSError as error:
                if job.path in listed(jobs):  # another rank was faster, and cleared up
                    continue
                mend = "make room there" if error.errno in FULL else "see to it that files can be made there"
                raise UserError(
                    f"could not write {job.path}: {error.strerror or error}; {mend} and run the same command again, "
                    "which keeps what is finished"
                ) from error
            made.add(job.path)
            if rank == 0:
                done = images_done(jobs)
                advance_to(done)
    return images_done(jobs) == total


def next_job(jobs: Sequence[Job], there: set[Path], rank: int, size: int) -> Job | None:
    """What a rank makes next: of every size-th file its first that is not there; None: nothing is left for it.

    With all of its own there, it helps the others: after a node was lost all that is missing may be of few ranks. It
    leaves a rank's first missing file, which that rank is making, and begins at the other end.
    """
    missing = [[job for job in jobs[other::size] if job.path not in there] for other in range(size)]
    if missing[rank]:
        return missing[rank][0]
    spare = sorted(((i, job) for own in missing for i, job in enumerate(own[1:])), key=lambda entry: -entry[0])
    far = spare[: (len(spare) + 1) // 2]
    return far[rank * len(far) // size][1] if far else None  # helpers begin at different ones


def listed(jobs: Sequence[Job]) -> set[Path]:
    """Files in the jobs' folders. Folders are listed: a network disk remembers for a while that a single file was not
    there."""
    folders = {job.path.parent for job in jobs}
    return {folder / name for folder in folders if folder.is_dir() for name in os.listdir(folder)}


def images_done(jobs: Sequence[Job]) -> int:
    """Images of the files that are there, of all ranks."""
    there = listed(jobs)
    return sum(job.images for job in jobs if job.path in there)


@contextmanager
def progress(console: Console, what: str, total: int, show: bool = True) -> Iterator[Advance]:
    """Tells how much of `total` is done and the time left: a bar on a terminal, else a line every half a minute."""
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
        before = done if before < 0 else before  # done by an earlier process
        now = time.monotonic()
        if now - told >= LINE_SECONDS and done > before:
            left = (now - began) * (total - done) / (done - before)
            console.print(f"{what}: {done:.0f} of {total}, {left / 60:.0f} min left", highlight=False, soft_wrap=True)
            sys.stdout.flush()
            told = now

    yield tell


def others_work() -> str:
    """What a rank says that ends while others still work."""
    rank, size = rank_and_size()
    return (
        f"rank {rank} of {size} is done; the last rank to finish puts the parts together (if none did, one was killed: "
        "the same command goes on)"
    )
