"""A run's log on a disk that takes no more."""

import json
import resource
import sys
import threading
from contextlib import contextmanager
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from umd.errors import UserError
from umd.train.log import RunLog, read_metrics

ROW = {"step": 1, "seconds": 1.0, "loss": 0.5, "images_per_second": 1.0, "mfu": 0.1}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of a file's size as Linux has them")


@contextmanager
def full_disk():
    """Files take no byte more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_training_goes_on_where_the_log_finds_no_room(tmp_path):
    """Each file is told once, and written again when there is room."""
    threads = threading.active_count()
    sheet = np.zeros((8, 8, 3), np.uint8)
    with RunLog(tmp_path, console := Console(file=StringIO(), width=500), 0, "test") as log:
        log.row(ROW)
        with full_disk():
            for step in range(2, 5):
                log.row(ROW | {"step": step})
                log.picture("samples", sheet, step)
        log.row(ROW | {"step": 5})
        log.picture("samples", sheet, 5)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 5]
    assert [file.name for file in tmp_path.rglob("*.png")] == ["samples-00000005.png"]
    told = console.file.getvalue()
    assert told.count("cannot write metrics.jsonl (") == told.count("cannot write images/ (") == 1
    assert "File too large" in told and "training goes on without; make room" in told
    assert threading.active_count() == threads and threading.excepthook is threading.__excepthook__
    assert not [*tmp_path.rglob(".unfinished*")] and len([*(tmp_path / "tensorboard").iterdir()]) <= 2


def test_a_log_that_cannot_be_begun_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=f"cannot write to {tmp_path}.*make room.*the same command goes on"):
        RunLog(tmp_path, Console(quiet=True), 0, "test")


def test_damaged_rows_are_left_out_and_the_whole_file_kept(tmp_path):
    file, rows = tmp_path / "metrics.jsonl", [ROW | {"step": step} for step in (1, 2, 3)]
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    file.write_bytes(b"".join([lines[0], b"<<<<<<<\n", lines[1], b'{"a": 1}\n', b"\xff\xfe\n", lines[2], b'{"step']))
    before = file.read_bytes()
    with RunLog(tmp_path, console := Console(file=StringIO(), width=500), 2, "test"):
        assert read_metrics(file) == rows[:2]
    assert (tmp_path / "metrics-old-1.jsonl").read_bytes() == before
    assert "has 3 damaged lines; it is kept as metrics-old-1.jsonl, and goes on from step 2" in console.file.getvalue()
    with RunLog(tmp_path, console, 0, "test"):  # a new run, where one was whose checkpoints are gone
        assert read_metrics(file) == []
    assert read_metrics(tmp_path / "metrics-old-2.jsonl") == rows[:2]


def test_a_log_that_cannot_be_closed_hides_no_error(tmp_path):
    log = RunLog(tmp_path, Console(quiet=True), 0, "test")
    with full_disk(), pytest.raises(ZeroDivisionError), log:
        log.row(ROW)
        raise ZeroDivisionError
