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
def full_after_a_row(folder):
    """A log whose files take no byte more from its second row on, also when it is closed."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with RunLog(folder, Console(quiet=True), 0, "test") as log:
            log.row(ROW)
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
            yield log
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("what", ["row", "picture", "scalar"])
def test_a_full_disk_is_told(tmp_path, what):
    threads = threading.active_count()
    with (
        pytest.raises(UserError, match=f"cannot write to {tmp_path}.*make room.*the same command goes on"),
        full_after_a_row(tmp_path) as log,
    ):
        if what == "row":
            log.row(ROW | {"step": 2})
        elif what == "picture":
            log.picture("samples", np.zeros((8, 8, 3), np.uint8), 2)
        else:
            log._board.add_scalar("loss", 0.5, 2)  # TensorBoard's thread writes it, now or at the end
    assert read_metrics(tmp_path / "metrics.jsonl") == [ROW]
    assert threading.active_count() == threads and threading.excepthook is threading.__excepthook__
    assert not [*tmp_path.rglob("*.png"), *tmp_path.rglob(".unfinished*")]


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


def test_what_ended_the_run_is_what_is_told(tmp_path):
    with pytest.raises(ZeroDivisionError), full_after_a_row(tmp_path):
        raise ZeroDivisionError
