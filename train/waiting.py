"""Prepare batches in workers and wait for them, so that no stalled disk or dead process blocks the run forever."""

import errno
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.queues import Queue
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset

from umd.errors import TemporaryError, UserError
from umd.train.pools import DEATHS, MORE_SHM, STALL_SECONDS, processes_explained
from umd.train.signals import StopRequest, heed_parent_alone

log = logging.getLogger("umd")

POLL_SECONDS = 1.0  # between checks for a stop request
STALLS = 60  # times STALL_SECONDS without a batch until the run ends
END_SECONDS = 2.0  # that workers have to end before they are killed; only a kill ends one in a stalled disk
NO_WORKERS = "--data.num-workers 0 needs none"


class Stopped(Exception):
    """The run was asked to stop while no batch was available."""


class NotYet(Exception):
    """No batch within a second."""


def start_worker(_: int) -> None:
    """Set up a worker: leave signals and warnings to the training process."""
    log.disabled = True  # the training process reports files that are left out
    # The thread that sends batches would print a traceback if the training process ends during a handshake.
    sys.excepthook = lambda *_: None
    # Otherwise the training process would wait forever for a batch that could not be sent.
    Queue._on_queue_feeder_error = staticmethod(end_worker)  # type: ignore[attr-defined]
    heed_parent_alone()


def end_worker(error: BaseException, _: object) -> None:
    print(f"umd: a process cannot hand its batch over: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def handed_over(collate: Callable[[list], Any], items: list) -> Any:
    """In a worker: collate a batch and move its tensors to shared memory. If that is full, pickle it for a pipe.

    Torch would move tensors in a thread of the worker, whose failure nobody would notice.
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
    """Iterator over batches of a dataset, prepared by `workers` processes, or if 0 by a thread on request.

    Args:
        keys: for each batch, the keys to pass to the dataset.
        source: name of the source, for messages.
        device: if it is a GPU, batches of worker processes come in pinned memory.
        stop: if its `requested` is set while a batch is waited for, `Stopped` is raised after `stop.patience` seconds.
    """

    def __init__(
        self, dataset: Dataset, keys: Iterator[list[tuple[int, int]]], workers: int, collate_fn: Callable, source: str,
        device: torch.device | None = None, stop: StopRequest | None = None,
    ):  # fmt: skip
        self.source, self.stop = source, stop or StopRequest()
        # Forked workers share the pictures' memory. Forking is safe on Linux only.
        fork = workers > 0 and sys.platform == "linux"
        self.piped = False  # whether the warning about pipes was printed
        loader = DataLoader(
            dataset,
            batch_sampler=keys,
            collate_fn=partial(handed_over, collate_fn) if workers else collate_fn,
            num_workers=workers,
            pin_memory=workers > 0 and device is not None and device.type == "cuda",
            worker_init_fn=start_worker,
            multiprocessing_context=multiprocessing.get_context("fork") if fork else None,
            generator=torch.Generator(),  # its own, so that the global generator is not used
        )
        with processes_explained(workers, source, NO_WORKERS):
            if workers:
                # A loader makes about as many, and where it fails in the middle, it prints a traceback when deleted.
                _ = [multiprocessing.Queue() for _ in range(workers + 4)]
            self.loading = without_handler(lambda: iter(loader))
        self.workers: list[Any] = getattr(self.loading, "_workers", [])
        # A worker killed in the middle of a message blocks its reader forever. So the reader is always a thread.
        self.items = ReadByThread(self.loading)

    def __next__(self) -> Any:
        """Wait for the next batch, with a warning each minute that the disk stalls.

        Raises TemporaryError if it stalls for an hour, UserError if a worker died, `Stopped` on a request to stop.
        """
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
                raise TemporaryError(
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
            for _ in range(20 if self.workers else 0):  # torch may notice a dying worker before it has exited
                self.check_alive()
                time.sleep(0.05)
            raise
        if not isinstance(batch, bytes):
            return batch
        if not self.piped:
            self.piped = True
            log.warning(
                "/dev/shm has no room for batches: they come through pipes, which is slower. %s; %s",
                MORE_SHM,
                NO_WORKERS,
            )
        return pickle.loads(batch)

    def check_alive(self) -> None:
        dead = next((worker for worker in self.workers if worker.exitcode is not None), None)
        if dead is None:
            return
        how, why = f"with exit code {dead.exitcode}", ""
        if dead.exitcode < 0:
            name = signal.Signals(-dead.exitcode).name
            how, why = f"by {name}", f": {DEATHS[name]}" if name in DEATHS else ""
        ended = UserError(f"a process that reads {self.source} (pid {dead.pid}) was ended {how}{why}.")
        ended.code = 1  # as of a rank that was killed
        raise ended from None

    def close(self) -> None:
        """End the workers. Call it explicitly, as a traceback may keep this object alive."""
        self.items.close()
        if not self.workers:
            return
        if sys.is_finalizing():  # called by an unclosed generator: the workers are gone, and threads cannot start
            return
        # Torch's shutdown takes locks that a dead worker may hold. So it runs in a thread that may be left behind.
        end = threading.Thread(target=self.loading._shutdown_workers, name="end workers", daemon=True)
        end.start()
        end.join(END_SECONDS)
        for worker in self.workers:
            worker.kill()
        end.join(END_SECONDS)


def without_handler(start: Callable[[], Any]) -> Any:
    """Call `start` and remove the SIGCHLD handler that torch sets in it.

    The handler raises in the middle of a step when a worker dies, and half a step cannot be saved. `Prepared` checks
    its workers at each batch instead.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return start()
    before = signal.getsignal(signal.SIGCHLD)
    try:
        return start()
    finally:
        signal.signal(signal.SIGCHLD, before)


class ReadByThread:
    """Reads an iterator in a thread, one item per request, so that the caller never blocks for long.

    If a stalled disk holds the thread, it is left behind.
    """

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
        """The next item. Raises NotYet if it is not read within a second; the next call then returns it."""
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
