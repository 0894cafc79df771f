"""Who may end the processes that prepare pictures."""

import multiprocessing
import os
import signal
import subprocess
import sys

import pytest

from umd.train.signals import heed_parent_alone


def answer(pipe) -> None:
    heed_parent_alone()
    while True:
        pipe.send("ready")
        pipe.recv()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody tells who sent a signal")
def test_a_worker_heeds_its_parent_and_no_one_else():
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    worker = context.Process(target=answer, args=(there,), daemon=True)
    worker.start()
    assert here.recv() == "ready"
    for name in ("TERM", "USR1", "INT"):  # from a process that is not its parent
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
        here.send("still there?")
        assert here.recv() == "ready", name
    assert os.getpgid(worker.pid) == worker.pid
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(60)
    assert worker.exitcode == 0
