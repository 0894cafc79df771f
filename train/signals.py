"""Signals that stop a training run, and which of its processes react to them."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

STOPS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGUSR1"):  # not on Windows
    STOPS += [signal.SIGUSR1, signal.SIGHUP]


class StopRequest:
    requested: signal.Signals | None = None
    alone = True  # whether no other rank waits for the step that this process makes

    @property
    def patience(self) -> float:
        """Seconds to keep waiting for a batch after the request. Without it, other ranks could not save.

        The process is killed 30 s after SIGTERM; launch/slurm.sbatch sends SIGUSR1 300 s before.
        """
        if self.alone:
            return 0.0
        return 150.0 if self.requested is not None and self.requested.name == "SIGUSR1" else 15.0


@contextmanager
def stop_signal() -> Iterator[StopRequest]:
    """Note Ctrl-C, SIGTERM, SIGUSR1 and a closed terminal, so that the loop stops after its step.

    A second Ctrl-C interrupts at once. Under nohup, SIGHUP stays ignored.

    The handlers before are restored at the end, but not if the body fails while other ranks wait (`not stop.alone`):
    when one rank ends, torchrun sends SIGTERM to the others, and they must live long enough to print their error.
    """
    stop = StopRequest()

    def note(number: int, _frame: object) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.requested = signal.Signals(number)

    try:
        ignored = [s for s in STOPS if s.name == "SIGHUP" and signal.getsignal(s) is signal.SIG_IGN]
        before = {s: signal.signal(s, note) for s in STOPS if s not in ignored}
    except ValueError:  # not in the main thread, where signals never arrive
        before = {}
    try:
        yield stop
    except Exception:
        if not stop.alone:
            before = {}
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def heed_parent_alone() -> None:
    """In a worker: ignore Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP, except a SIGTERM from the parent process.

    Terminals send signals to the whole process group, and Slurm's proctrack/linuxproc to every process of a step. But
    the training process may need one more batch before it saves, and torch raises when a worker dies, even in the
    middle of a step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    if hasattr(signal, "sigwaitinfo"):  # it says who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP})
        threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def end_when_orphaned() -> None:
    """For a process of a pool: end it, as SIGTERM would, when its parent is gone. One that was killed tells nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a process of a pool has one"

    def watch(pid: int | None) -> None:
        while os.getppid() == pid:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, args=(parent.pid,), daemon=True).start()
