"""Who may end the processes that prepare pictures."""

import os
import signal
import subprocess
import sys

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
        for name in ("TERM", "USR1", "INT"):  # from a process that is not its parent
            subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
            worker.stdin.write("still there?\n")
            assert worker.stdout.readline() == "ready\n", name
        assert os.getpgid(worker.pid) == worker.pid
        os.kill(worker.pid, signal.SIGTERM)
        assert worker.wait(60) == 0
