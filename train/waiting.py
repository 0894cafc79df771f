"""Who prepares batches, and how a run waits for them: a disk that stalls and a process that dies hold nobody up."""

import errno
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, wait
from functools import partial
from multiprocessing.queues import Queue
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset

from umd.errors import UserError
from umd.train.signals import StopRequest, heed_parent_alone

log = logging.getLogger("umd")
T = TypeVar("T")
U = TypeVar("U")

POLL_SECONDS = 1.0  # between looks at whether the run is asked to stop
STALL_SECONDS, STALLS = 60, 60  # how long a run waits for a batch before it says so, and how often it does
END_SECONDS = 2.0  # that processes have to end before they are killed; in a stalled disk they end by nothing else
DEATHS = {
    "SIGKILL": "most likely the host had no memory left (`dmesg` tells); fewer --data.num-workers need less",
    "SIGBUS": "a file that was read through memory has shrunk, its disk failed, or /dev/shm is full",
}
MORE_SHM = "A container has more with docker run --shm-size 8g or --ipc host; --data.num-workers 0 needs none"


class Stopped(Exception):
    """The run is asked to stop, and no batch comes."""


class NotYet(Exception):
    """No batch within a second."""


def start_worker(_: int) -> None:
    """Leave signals and warnings to the training process."""
    log.disabled = True  # what is left out, the training process tells
    # The thread that hands batches over prints a stack trace if the training process leaves in mid-handshake.
    sys.excepthook = lambda *_: None
    # A batch that cannot be handed over would be waited for without end.
    Queue._on_queue_feeder_error = staticmethod(end_worker)  # type: ignore[attr-defined]
    heed_parent_alone()


def end_worker(error: BaseException, _: object) -> None:
    print(f"umd: a process cannot hand its batch over: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def handed_over(collate: Callable[[list], Any], items: list) -> Any:
    """In a worker: a batch with its tensors in shared memory; pickled, to go through a pipe, where that has no room.

    Torch would move them there in a thread of the worker that can tell nobody of its failure.
    """
    batch = collate(items)
    try:
        for leaf in tree_leaves(batch):
            if isinstance(leaf, Tensor):
                leaf.share_memory_()
    except RuntimeError:
        return pickle.dumps(batch)
    return batch


class Prepared(Iterator[Any]):
    """Batches of a dataset, prepared by that many processes; by none: by a thread of this one, when asked for.

    keys: of each batch, what the dataset takes. source: whose disk it is, in words. device: towards a GPU what
    processes prepare comes in pinned memory. stop: whose `requested` ends the waiting by `Stopped`.
    """

    def __init__(
        self, dataset: Dataset, keys: Iterator[list[tuple[int, int]]], workers: int, collate_fn: Callable, source: str,
        device: torch.device | None = None, stop: StopRequest | None = None,
    ):  # fmt: skip
        self.source, self.stop = source, stop or StopRequest()
        # Forked workers share the pictures' memory; elsewhere than on Linux forking is not safe.
        fork = workers > 0 and sys.platform == "linux"
        self.piped = False  # whether it was told that batches come through pipes
        loader = DataLoader(
            dataset,
            batch_sampler=keys,
            collate_fn=partial(handed_over, collate_fn) if workers else collate_fn,
            num_workers=workers,
            pin_memory=workers > 0 and device is not None and device.type == "cuda",
            worker_init_fn=start_worker,
            multiprocessing_context=multiprocessing.get_context("fork") if fork else None,
            generator=torch.Generator(),  # its own, so that the global one stays untouched
        )
        try:
            if workers:
                multiprocessing.Queue()  # as torch makes first, and prints a stack trace where it cannot
            self.loading = without_handler(lambda: iter(loader))
        except OSError as error:  # of their locks, pipes or processes
            raise UserError(
                f"cannot start the {workers} processes that read {source} ({error.strerror or error}): shared memory "
                f"(/dev/shm), or your processes or open files (ulimit -u, -n), are used up. {MORE_SHM}"
            ) from error
        self.workers: list[Any] = getattr(self.loading, "_workers", [])
        # A worker that is killed in the middle of a message leaves who reads it waiting: that is a thread, always.
        self.items = ReadByThread(self.loading)

    def __next__(self) -> Any:
        """Tells of a disk that stalls. Raises UserError if it does so for an hour, or if a process has died; `Stopped`
        where the run is asked to stop."""
        began, told, asked = time.monotonic(), 0, 0.0
        while True:
            self.check_alive()
            try:
                return self.take()
            except NotYet:
                now = time.monotonic()
            if self.stop.requested is not None:
                asked = asked or now
                if now - asked >= self.stop.patience:
                    raise Stopped(f"no batch for {now - began:.0f} s: the disk of {self.source} has stalled")
            if now - began >= STALLS * STALL_SECONDS:
                raise UserError(
                    f"no batch for {STALLS * STALL_SECONDS} s: the disk of {self.source} has stalled; check it"
                )
            if now - began >= (told + 1) * STALL_SECONDS:
                told += 1
                log.warning(
                    "no batch for %.0f s: the disk of %s has stalled, the run waits", told * STALL_SECONDS, self.source
                )

    def take(self) -> Any:
        """The next batch. Raises NotYet if there is none within a second."""
        try:
            batch = next(self.items)
        except NotYet:
            raise
        except Exception as error:
            if "Too many open files" in str(error) or getattr(error, "errno", 0) == errno.EMFILE:
                raise UserError(
                    f"too many open files: {len(self.workers)} processes hand over batches of {self.source}; raise the "
                    "limit (`ulimit -n 65536`) or set fewer --data.num-workers"
                ) from error
            for _ in range(20 if self.workers else 0):  # torch tells of a dead process in many ways, perhaps before it
                self.check_alive()
                time.sleep(0.05)
            raise
        if not isinstance(batch, bytes):
            return batch
        if not self.piped:
            self.piped = True
            log.warning("/dev/shm has no room for batches: they come through pipes, which is slower. %s", MORE_SHM)
        return pickle.loads(batch)

    def check_alive(self) -> None:
        dead = next((worker for worker in self.workers if worker.exitcode is not None), None)
        if dead is None:
            return
        how, why = f"with exit code {dead.exitcode}", ""
        if dead.exitcode < 0:
            name = signal.Signals(-dead.exitcode).name
            how, why = f"by {name}", f": {DEATHS[name]}" if name in DEATHS else ""
        raise UserError(f"a process that reads {self.source} (pid {dead.pid}) was ended {how}{why}.") from None

    def close(self) -> None:
        """End the workers. Not left to the garbage collector: a traceback may hold them."""
        self.items.close()
        if not self.workers:
            return
        if sys.is_finalizing():  # by a generator that nobody closed: the workers are gone, and no thread starts
            return
        # Torch asks them to end, by locks that one which died may hold: a thread may be left with that.
        end = threading.Thread(target=self.loading._shutdown_workers, name="end workers", daemon=True)
        end.start()
        end.join(END_SECONDS)
        for worker in self.workers:
            worker.kill()
        end.join(END_SECONDS)


def without_handler(start: Callable[[], Any]) -> Any:
    """What `start` returns, without the handler for SIGCHLD that torch sets there: it raises wherever a step is when a
    process dies, and half a step is none that can be saved. `Prepared` looks at each batch."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return start()
    before = signal.getsignal(signal.SIGCHLD)
    try:
        return start()
    finally:
        signal.signal(signal.SIGCHLD, before)


def in_order(
    pool: Executor, work: Callable[[T], U], items: Iterable[T], source: object, ahead: int | None = None
) -> Iterator[U]:
    """`pool.map(work, items)`, that tells of a disk that stalls. ahead: so many are worked on meanwhile; None: all.

    Raises UserError if a process of the pool has died."""
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


class ReadByThread:
    """An iterator read by a thread, one item for each asked for: who asks need not wait, and a thread that a stalled
    disk holds is left behind."""

    def __init__(self, items: Iterator[Any]):
        self.items, self.pending = items, False
        self.asked: SimpleQueue[bool] = SimpleQueue()
        self.read: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        threading.Thread(target=self.run, name="read", daemon=True).start()

    def run(self) -> None:
        while self.asked.get():
            try:
                self.read.put((next(self.items), None))
            except BaseException as error:
                self.read.put((None, error))

    def __next__(self) -> Any:
        """Raises NotYet if the item is not read within a second; it is what the next call returns."""
        if not self.pending:
            self.asked.put(True)
        self.pending = True
        try:
            item, error = self.read.get(timeout=min(POLL_SECONDS, STALL_SECONDS))
        except Empty:
            raise NotYet from None
        self.pending = False
        if error is not None:
            raise error
        return item

    def close(self) -> None:
        self.asked.put(False)
