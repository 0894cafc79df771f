"""A disk that stalls and a process that dies end a run with its last step saved."""

import contextlib
import itertools
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from umd.checkpoint import load_checkpoint
from umd.config import ModelConfig
from umd.errors import UserError
from umd.train.data import has_dali
from umd.train.log import read_metrics
from umd.train.loop import train
from umd.train.pools import in_order
from umd.train.run import RunConfig
from umd.train.settings import DataConfig
from umd.train.waiting import Prepared

TINY = ModelConfig(image_size=(8, 8), patch_size=2, hidden_size=32, depth=1, decoder_depth=1, num_heads=2)
QUIET = Console(quiet=True)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux's signals and FIFOs")
needs_dali = pytest.mark.skipif(not has_dali(), reason="DALI is not installed")
DALI = [pytest.param("dali", workers, marks=needs_dali) for workers in (0, 1)]


@pytest.fixture
def endless(tmp_path):
    """endless(loader, workers): a run on 40 JPEG files without end."""
    (tmp_path / "source").mkdir()
    for number in range(40):
        picture = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "source" / f"{number}.jpg")

    def make(loader: str, workers: int) -> RunConfig:
        data = DataConfig(source=str(tmp_path / "source"), num_workers=workers, loader=loader)
        return RunConfig(
            out=tmp_path / "run", model=TINY, data=data, batch_size=8, steps=10**6, precision="fp32", log_every=1,
            draw_every=0,
        )  # fmt: skip

    return make


def steps(config: RunConfig) -> int:
    return len(read_metrics(config.out / "metrics.jsonl"))


def after_steps(config: RunConfig, act) -> threading.Thread:
    """`act()` once the run has made three steps."""

    def wait() -> None:
        while steps(config) < 3:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def until_it_stands(config: RunConfig) -> None:
    made = -1
    while steps(config) != made:
        made = steps(config)
        time.sleep(2)


@pytest.mark.parametrize(("loader", "workers"), [("python", 0), ("python", 2), *DALI])
def test_a_run_that_waits_for_a_stalled_disk_is_asked_to_stop(endless, loader, workers, caplog, monkeypatch):
    config = endless(loader, workers)
    monkeypatch.setattr("umd.train.waiting.STALL_SECONDS", 1)
    files = list(Path(config.data.source).iterdir())

    def stall() -> None:
        for file in files:  # a FIFO that nobody writes to: who opens it waits
            os.mkfifo(file.with_suffix(".fifo"))
            file.with_suffix(".fifo").rename(file)
        until_it_stands(config)
        os.kill(os.getpid(), signal.SIGTERM)

    before = {thread.ident for thread in threading.enumerate()}
    thread = after_steps(config, stall)
    try:
        with pytest.raises(SystemExit) as ended:
            train(config, QUIET)
    finally:
        thread.join()
        for file in files:  # lets go of the threads
            with contextlib.suppress(OSError):
                os.close(os.open(file, os.O_WRONLY | os.O_NONBLOCK))
    assert ended.value.code == 128 + signal.SIGTERM
    assert load_checkpoint(config.checkpoints).step == steps(config) >= 3
    assert "the disk of source has stalled, the run waits" in caplog.text
    assert not multiprocessing.active_children()
    assert not [t for t in threading.enumerate() if t.ident not in before and not t.daemon], "the process cannot end"


@pytest.mark.parametrize(("number", "hint"), [(signal.SIGKILL, "no memory left"), (signal.SIGBUS, "has shrunk")])
def test_a_process_that_dies_is_told_and_the_last_step_saved(endless, number, hint):
    config = endless("python", 2)
    handler = signal.getsignal(signal.SIGCHLD)
    thread = after_steps(config, lambda: os.kill(multiprocessing.active_children()[0].pid, number))
    with pytest.raises(UserError, match=rf"a process that reads source \(pid \d+\) was ended by {number.name}.*{hint}"):
        train(config, QUIET)
    thread.join()
    assert load_checkpoint(config.checkpoints).step == steps(config) >= 3
    assert signal.getsignal(signal.SIGCHLD) is handler and not multiprocessing.active_children()


def test_a_disk_that_stalls_at_the_start_is_told(monkeypatch, caplog):
    monkeypatch.setattr("umd.train.pools.STALL_SECONDS", 0.05)
    let_go = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        answers = in_order(pool, lambda i: (let_go.wait(0.3 * i), i)[1], range(3), "pictures")
        assert list(answers) == [0, 1, 2]
    assert "the disk of pictures has stalled, this waits" in caplog.text


class Batches(torch.utils.data.Dataset):
    """[number] of a batch -> what `make` says, made in the process that reads."""

    def __init__(self, make):
        self.make = make

    def __getitems__(self, numbers):
        return self.make(numbers[0])


def prepared(make) -> Prepared:
    return Prepared(Batches(make), ([number] for number in itertools.count()), 1, lambda batch: batch, "pictures")


def test_batches_for_which_shared_memory_has_no_room_come_through_pipes(caplog):
    def make(number: int):
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))  # of shared memory too, not of pipes
        return torch.full((1000,), number), np.array([number])

    reading = prepared(make)
    for number in range(5):
        values, index = next(reading)
        assert values.tolist() == [number] * 1000 and index == number
    reading.close()
    assert caplog.text.count("--shm-size") == 1


def test_a_batch_that_cannot_be_handed_over_ends_the_run():
    reading = prepared(lambda number: threading.Lock())  # cannot be pickled
    with pytest.raises(UserError, match="a process that reads pictures .* was ended with exit code 1"):
        next(reading)
    reading.close()


def test_a_process_killed_in_the_middle_of_a_batch_ends_the_run():
    reading = prepared(lambda number: bytes(10**6))  # more than a pipe holds: the process waits within it
    pipe = reading.loading._worker_result_queue._reader
    assert pipe.poll(60)
    os.kill(reading.workers[0].pid, signal.SIGKILL)
    with pytest.raises(UserError, match="was ended by SIGKILL: most likely the host had no memory left"):
        next(reading)
    reading.close()


def test_processes_that_cannot_start_are_told():
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")), files[1]))
    try:
        with pytest.raises(UserError, match=r"cannot start the 1 processes that read pictures .*--data.num-workers"):
            prepared(lambda number: number)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, files)


def test_a_process_of_a_pool_that_dies_is_told():
    with (
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
        pytest.raises(UserError, match="a process that reads pictures was ended.*fewer --workers"),
    ):
        list(in_order(pool, signal.raise_signal, [signal.SIGKILL] * 3, "pictures", ahead=1))
