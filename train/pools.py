"""Work shared by a pool of threads or processes. It is told when the disk stalls or a process dies. No torch here."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from umd.errors import UserError

log = logging.getLogger("umd")
T = TypeVar("T")
U = TypeVar("U")

STALL_SECONDS = 60.0  # without an answer until a warning
DEATHS = {
    "SIGKILL": "most likely the host had no memory left (`dmesg` tells); fewer --data.num-workers need less",
    "SIGBUS": "a file that was read through memory has shrunk, its disk failed, or /dev/shm is full",
}
MORE_SHM = "A container has more with docker run --shm-size 8g or --ipc host"


def in_order(
    pool: Executor, work: Callable[[T], U], items: Iterable[T], source: object, ahead: int | None = None
) -> Iterator[U]:
    """`pool.map(work, items)` with a warning when the disk stalls.

    source: name of the source, for messages. ahead: number of items submitted in advance; None: all.
    Raises UserError if a process of the pool has died.
    """
    waiting: deque[Future[U]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if ahead is not None and len(waiting) > ahead:
                yield awaited(waiting.popleft(), source)
        while waiting:
            yield awaited(waiting.popleft(), source)
    except BrokenExecutor as error:
        raise UserError(
            f"a process that reads {source} was ended: {DEATHS['SIGKILL'].partition(';')[0]}; try fewer --workers"
        ) from error
    finally:
        for future in waiting:
            future.cancel()


def awaited(future: "Future[U]", source: object) -> U:
    while not wait([future], STALL_SECONDS).done:
        log.warning("no answer for %d s: the disk of %s has stalled, this waits", STALL_SECONDS, source)
    return future.result()


@contextmanager
def processes_explained(number: int, source: str | Path, instead: str) -> Iterator[None]:
    """Turn an OSError of starting processes, for want of locks, pipes or processes, into a UserError.

    instead: advice that ends the message.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot start the {number} processes that read {source} ({error.strerror or error}): shared memory "
            f"(/dev/shm), or your processes or open files (ulimit -u, -n), are used up. {MORE_SHM}; {instead}"
        ) from error
