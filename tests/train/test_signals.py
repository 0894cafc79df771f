"""Who may end the processes that prepare pictures, and a rank that failed."""

import os
import signal
import subprocess
import sys
import time

import pytest

WORKER = """
from umd.train.signals import heed_parent_alone
heed_parent_alone()
while True:
    print("ready", flush=True)
    input()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody tells who sent a signal")
def test_a_worker_heeds_its_parent_and_no_one_else():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", WORKER], text=True, bufsize=1, **pipes) as worker:
        assert worker.stdout.readline() == "ready\n"
        for name in ("TERM", "USR1", "INT", "HUP"):  # from a process that is not its parent
            subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
            worker.stdin.write("still there?\n")
            assert worker.stdout.readline() == "ready\n", name
        assert os.getpgid(worker.pid) == worker.pid
        while worker.poll() is None:  # again and again: one that comes while another waits is lost
            os.kill(worker.pid, signal.SIGTERM)
            time.sleep(0.1)
        assert worker.returncode == 0


def test_a_pool_ends_with_a_parent_that_was_killed():
    code = """
import os, signal, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from umd.train.signals import end_when_orphaned
if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, get_context("spawn"), end_when_orphaned)
    print(pool.submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    parent = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert parent.returncode == -signal.SIGKILL
    worker = int(parent.stdout)
    for _ in range(300):  # it looks once a second
        if not os.path.exists(f"/proc/{worker}"):
            return
        time.sleep(0.1)
    raise AssertionError("the pool's process lives on")


FAIL = """
import os, signal, sys
from umd.train.signals import stop_signal
try:
    with stop_signal() as stop:
        stop.alone = sys.argv[1] == "1"
        raise RuntimeError
except RuntimeError:
    os.kill(os.getpid(), signal.SIGTERM)
    print("its error")
"""


@pytest.mark.parametrize(("ranks", "told"), [(1, (-signal.SIGTERM, "")), (2, (0, "its error\n"))])
def test_the_launchers_sigterm_does_not_silence_a_rank_that_failed(ranks, told):
    done = subprocess.run([sys.executable, "-c", FAIL, str(ranks)], stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == told
