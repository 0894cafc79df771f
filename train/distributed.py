"""The ranks of a run: how they connect, communicate, and all end when one of them fails.

torchrun and deepspeed start one process per GPU and set RANK, WORLD_SIZE and LOCAL_RANK in its environment. For Slurm's
srun, `umd.machine.environment.slurm_ranks` sets them. Without them, a process is alone and nothing here communicates.
"""

import atexit
import contextlib
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from umd.errors import TemporaryError, UserError
from umd.machine.device import pick_device
from umd.train.settings import ParallelConfig

BEAT_SECONDS = 2.0  # between heartbeats
CONTROL_SECONDS = 7200.0  # longest wait for what one rank does alone; `Watch` notices a dead rank much sooner
GONE_SECONDS = 20.0  # without a heartbeat: longer than anything holds the GIL, shorter than torchrun waits to kill

# Signs in torch's messages that another rank is at fault; NCCL's own messages tell more.
LOST = ("gloo", "NCCL", "onnection closed")
LOST_BY_NCCL = ("ncclRemoteError", "onnection closed", "onnection reset", "onnection refused", "imed out", "imeout")


class World:
    """This process among the ranks of a run: `rank` of `size`, computing on `device`."""

    def __init__(
        self, rank: int, size: int, device: torch.device, watch: "Watch | None" = None,
        control: dist.ProcessGroup | None = None,
    ):  # fmt: skip
        """control: process group in host memory for what may take one rank long. None: the default group."""
        self.rank, self.size, self.device, self.watch, self.control = rank, size, device, watch, control

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which prints, logs, draws and writes."""
        return self.rank == 0

    def mean_(self, values: Tensor) -> Tensor:
        """Average `values` over the ranks, in place. On a GPU this is queued, not waited for."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def gather(self, values: Tensor) -> Tensor:
        """Concatenate [n] of each rank to [size * n], in order of rank, on every rank."""
        if self.size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values)
        return torch.cat(parts)

    def agree(self, value: Any) -> Any:
        """Broadcast rank 0's value. Returns it on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.control)
        return box[0]

    def barrier(self) -> None:
        """Wait on the host until all ranks have arrived, for up to CONTROL_SECONDS."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def collect(self, value: Any) -> list[Any]:
        """Gather one value per rank. Returns the list in order of rank on rank 0, [] on the others."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.main else None
        dist.gather_object(value, values, group=self.control)
        return values or []

    def sum(self, values: Tensor) -> Tensor:
        """Sum a CPU tensor over the ranks, in place, on every rank."""
        if self.size > 1:
            dist.all_reduce(values, group=self.control)
        return values

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the body on rank 0 first, then on the others, which read the caches that rank 0 has filled."""
        if not self.main:
            self.agree(None)
        yield
        if self.main:
            self.agree(None)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn torch's exception into a UserError if an exchange failed: a TemporaryError if another rank is lost.

        Gloo raises whenever an exchange fails or takes too long. NCCL raises only while its ranks connect, also for a
        fault of this rank (a GPU given to two ranks, an interface that does not exist). Later, its watchdog thread
        aborts the process, and `Watch` prints the reason before that.
        """
        try:
            yield
        except RuntimeError as error:
            text = " ".join(str(error).split())
            if self.size == 1 or "out of memory" in text:
                raise
            where = f"rank {self.rank} on {socket.gethostname()}"
            if "NCCL" in text and not any(sign in text for sign in LOST_BY_NCCL):
                failed = UserError(
                    f"{where}: NCCL failed ({text[-400:]}); NCCL_DEBUG=INFO shows more. The same command goes on from "
                    "the last checkpoint"
                )
                failed.code = 1
                raise failed from error
            if not isinstance(error, dist.DistError) and not any(sign in text for sign in LOST):
                raise
            raise TemporaryError(
                f"{where} lost the others ({text[:200]}): one of them ended or hangs; its own message tells why. The "
                "same command goes on from the last checkpoint"
            ) from error


def launched() -> tuple[int, int, int]:
    """(rank, size, local rank) from the launcher's environment variables; (0, 1, 0) without a launcher."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not all(name in os.environ for name in names):
        return 0, 1, 0
    rank, size, local = (int(os.environ[name]) for name in names)
    return rank, size, local


_world: World | None = None  # set once the ranks have connected; None in a single process
_meeting = False


def join(device: str, config: ParallelConfig, out: Path) -> World:
    """Connect to the other ranks, once per process. Returns this rank's World.

    If an NCCL exchange fails or takes longer than `config.timeout` seconds, each rank's last exchanges are written to
    `out`/nccl.

    Raises TemporaryError if not all ranks connect within that time, UserError if a host has more processes than GPUs.
    """
    global _world, _meeting
    rank, size, local = launched()
    if size == 1:
        return World(0, 1, pick_device(device))
    if _world is not None:
        return _world
    _meeting = True
    where, trace = pick_device(device), None
    if where.type == "cuda":
        if where.index is not None:
            raise UserError(f"device {device} is one GPU, and {size} processes were started; leave device at auto")
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local} of host {socket.gethostname()} has no GPU: torch sees {torch.cuda.device_count()}; "
                "start as many processes on a host as it has GPUs (--nproc_per_node, slots= in a hostfile, "
                "--ntasks-per-node of srun)"
            )
        where = torch.device("cuda", local)
        torch.cuda.set_device(where)
        trace = trace_exchanges(out / "nccl", rank, config.timeout)
    meeting = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo", timeout=timedelta(seconds=config.timeout))
    except (RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"rank 0 cannot wait for the others at {meeting}, a port that another program has: set MASTER_PORT to "
                "a free one (`export MASTER_PORT=29501`) for all of them"
            ) from error
        raise TemporaryError(
            f"rank {rank} on {socket.gethostname()} waited {config.timeout:.0f} s at {meeting} and not all {size} "
            f"ranks came ({str(error).splitlines()[0][:200]}): a host is down, or cannot reach that "
            "address. Try `ssh HOST true` for each host of a hostfile, and take dead ones out"
        ) from error
    # A clone has its own connection: on a shared one, waiting for a key would block other exchanges.
    watch = Watch(dist.distributed_c10d._get_default_store().clone(), rank, size, trace)  # type: ignore[attr-defined]
    watch.start()
    _world = World(rank, size, where, watch)
    atexit.register(leave)
    _world.control = control_group(config.timeout)
    return _world


def control_group(timeout: float) -> dist.ProcessGroup:
    """A gloo process group for waiting on what rank 0 does alone, such as listing a million files.

    On NCCL's group, its time-out would end the run meanwhile. The ranks must connect within `timeout` seconds. After
    that, they wait for each other up to max(timeout, CONTROL_SECONDS).
    """
    try:
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    except RuntimeError as error:
        raise UserError(
            f"{socket.gethostname()} and the other hosts do not connect through gloo within {timeout:.0f} s "
            f"({str(error).splitlines()[0][:200]}): it uses the interface that the host's name stands for; set "
            "GLOO_SOCKET_IFNAME to the one that reaches the other hosts (`ip addr` lists them)"
        ) from error
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=max(timeout, CONTROL_SECONDS)), group)
    return group


def trace_exchanges(folder: Path, rank: int, timeout: float) -> Path:
    """Have torch's flight recorder write each rank's last exchanges when one fails or takes longer than `timeout` s.

    Returns this rank's file, `folder`/rank_N. Torch reads the settings from the environment when the ranks connect;
    variables that are already set stay. Files of an earlier time-out are moved to a folder next to `folder`, named by
    the time they were written.
    """
    settings = {
        ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"): "2000",  # exchanges to remember
        ("TORCH_NCCL_DUMP_ON_TIMEOUT",): "1",
        # Limit for a watchdog that itself hangs: torch's default, but never shorter than an exchange may take.
        ("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC",): str(max(480, math.ceil(timeout))),
    }
    for names, value in settings.items():
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = value
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        if name in os.environ:
            return Path(f"{os.environ[name]}{rank}")
    folder = folder.absolute()
    if rank == 0:  # once is enough, as hosts share the run's folder; torch does not create it
        if any(folder.glob("rank_*")):
            written = time.localtime(folder.stat().st_mtime)
            folder.rename(folder.with_name(f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S', written)}"))
        folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_FR_DUMP_TEMP_FILE"] = f"{folder}/rank_"
    return folder / f"rank_{rank}"


def leave() -> None:
    """End normally: tell the other ranks that missing heartbeats do not mean a dead process."""
    if _world is None or _world.watch is None:
        return
    if getattr(sys, "last_value", None) is not None:  # a stack trace was printed
        _world.watch.fail(f"rank {_world.rank} failed, as its stack trace tells; every rank stops", 1)
    _world.watch.leave()
    dist.destroy_process_group()


def end_all(message: str, code: int) -> str:
    """End the run because this process failed.

    Once the ranks have connected: end all of them; the first to call this prints the message. Before that: return what
    this process should print, "" for nothing. One process of each host prints, as one host may lack a folder that the
    others have.
    """
    if _world is not None and _world.watch is not None:
        _world.watch.fail(message, code)
    rank, _, local = launched()
    if rank == 0:
        return message
    return f"on {socket.gethostname()}: {message}" if _meeting or local == 0 else ""


class Watch(threading.Thread):
    """Heartbeats through the launcher's key-value store, as a collective would wait for a dead rank without end.

    Every rank increments its own key and watches the key of rank + 1. A rank that sees no heartbeat, or fails itself,
    tells all ranks through the store. A second thread does what may hang or would be missed if this one hangs:

    - It ends the process if the store does not answer, as its host is gone.
    - It looks for `trace`, this rank's file of torch's flight recorder, on a disk that may stall. If it appears, an
      NCCL exchange has failed or timed out, and the thread prints that in the minute before torch aborts the process.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, trace: Path | None = None):
        super().__init__(daemon=True, name="watch")
        self.store, self.rank, self.size = dist.PrefixStore("umd", store), rank, size
        self.neighbour = (rank + 1) % size
        self.trace, self.trace_before = trace, modified(trace)
        self.leaving = threading.Event()
        self.farewell: Callable[[], None] | None = None  # called before this process ends for another rank's fault
        self.turns = 0  # of this thread's loop
        self.guard = threading.Thread(target=self._guard, daemon=True, name="watch-guard")
        self.store.set(f"host/{rank}", socket.gethostname())

    def start(self) -> None:
        super().start()
        self.guard.start()

    def run(self) -> None:
        beats = missed = 0
        while not self.leaving.wait(BEAT_SECONDS):
            try:
                self.store.add(f"beat/{self.rank}", 1)
                if self.store.add("ended", 0) and not self.leaving.is_set():
                    if self.rank == 0:
                        time.sleep(1.5 * BEAT_SECONDS)
                    self._exit(1)
                seen = self.store.add(f"beat/{self.neighbour}", 0)
                left = self.store.add(f"left/{self.neighbour}", 0)
            except RuntimeError:  # the process that hosts the store has ended; at a normal end that is fine
                if not self.leaving.is_set():
                    self._say("the process that the ranks met at is gone; every rank stops. " + GO_ON)
                    self._exit(1)
                return
            self.turns += 1
            # Turns are counted, not seconds: to a job that was suspended, its pause is no time without heartbeats.
            beats, missed = seen, (0 if seen != beats or left else missed + 1)
            if missed * BEAT_SECONDS > GONE_SECONDS:
                host = self.store.get(f"host/{self.neighbour}").decode()
                self.fail(f"rank {self.neighbour} on {host} is gone; every rank stops. {GO_ON}", 1)

    def _guard(self) -> None:
        turns = stuck = 0
        while not self.leaving.wait(BEAT_SECONDS):
            turns, stuck = self.turns, (0 if self.turns != turns else stuck + 1)
            if stuck * BEAT_SECONDS > GONE_SECONDS:
                self._say(
                    f"rank {self.rank}: the host that the ranks met at does not answer; every rank stops. {GO_ON}"
                )
                self._exit(1)
            written = modified(self.trace)
            if written is not None and written != self.trace_before:  # None: rank 0 moved an earlier file away
                with contextlib.suppress(RuntimeError):  # `run` notices that the store is gone
                    self._tell_of_trace()

    def _exit(self, code: int) -> None:
        if self.farewell is not None:
            self.farewell()
        os._exit(code)

    def _tell_of_trace(self) -> None:
        assert self.trace is not None
        if self.store.add("told", 1) == 1:
            self._say(
                f"rank {self.rank} on {socket.gethostname()}: an exchange between GPUs failed or took longer than "
                "--parallel.timeout, and torch ends the processes within minutes. A rank hangs, or made another "
                f"exchange than the others: `torchfrtrace {self.trace.parent}` tells which. {GO_ON}"
            )
        self.trace_before = modified(self.trace)

    def fail(self, message: str, code: int) -> None:
        """End this process and make the others end. The first rank to fail prints its message."""
        self.leaving.set()
        last = threading.Timer(60, os._exit, (code,))  # if the store's host is gone, an exchange may not return
        last.daemon = True
        with contextlib.suppress(RuntimeError):  # Python 3.12 starts no threads at exit
            last.start()
        try:
            first = self.store.add("told", 1) == 1
            if first:
                self._say(message)
            elif code == TemporaryError.code:
                code = 1  # this rank lost the one that tells, and that one's status says why
            if not first:
                time.sleep(1)  # the launcher kills all once one ends, and another rank is still printing
            self.store.add("ended", 1)
            if self.rank == 0:  # this process may host the store
                time.sleep(1.5 * BEAT_SECONDS)
        except RuntimeError:
            self._say(message)
        self._exit(code)

    def leave(self) -> None:
        """End normally. Rank 0, which may host the store, ends last."""
        self.leaving.set()
        with contextlib.suppress(RuntimeError):
            self.store.add(f"left/{self.rank}", 1)
            left, latest = self.store.add("left", 1), time.monotonic() + GONE_SECONDS
            while self.rank == 0 and left < self.size and time.monotonic() < latest:
                time.sleep(0.05)
                left = self.store.add("left", 0)

    @staticmethod
    def _say(message: str) -> None:
        with contextlib.suppress(OSError):  # a closed terminal
            sys.stdout.flush()
            print(f"umd: {message}", file=sys.stderr, flush=True)


def modified(file: Path | None) -> int | None:
    """Time of a file's last change, in nanoseconds. None if it does not exist."""
    try:
        return None if file is None else file.stat().st_mtime_ns
    except OSError:
        return None


GO_ON = "The same command goes on from the last checkpoint"
