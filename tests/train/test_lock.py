"""Two commands in one folder: the second is refused; one whose process is gone is in nobody's way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from umd.errors import UserError
from umd.train import lock
from umd.train.lock import LOCK_FILE, alone_in, describe
from umd.train.loop import train
from umd.train.run import RunConfig
from umd.train.settings import DataConfig

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes as Linux tells of them")
HOLDS = """
import sys, time
from pathlib import Path
from umd.train.lock import alone_in
with alone_in(Path(sys.argv[1]), "umd pretrain"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds `tmp_path`."""
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(lock.__file__).parents[1]) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_folder_in_use_is_refused_and_its_user_named(tmp_path, holder):
    message = rf"{tmp_path} is in use by umd pretrain on {os.uname().nodename}, process {holder.pid}, since 20\d\d-"
    with pytest.raises(UserError, match=message), alone_in(tmp_path):
        pass
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == holder.pid


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_holder_is_in_nobodys_way(tmp_path, holder, reaped):
    holder.send_signal(signal.SIGKILL)
    if reaped:
        holder.wait()
    else:
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # a zombie
    assert (tmp_path / LOCK_FILE).exists()
    with alone_in(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_copied_folder_is_the_originals(tmp_path, holder):
    shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-copy"))
    with alone_in(tmp_path.with_name(f"{tmp_path.name}-copy")):
        assert holder.poll() is None


def test_a_later_process_of_the_same_number_is_another(tmp_path):
    before = describe("umd pretrain")
    (tmp_path / LOCK_FILE).write_text(json.dumps(before | {"ticks": before["ticks"] - 1}))
    with alone_in(tmp_path):
        pass


@pytest.mark.parametrize("text", [json.dumps({"host": "node7", "pid": 1, "machine": "another"}), "", "[]"])
def test_of_another_machine_a_sign_of_life_counts(tmp_path, monkeypatch, capfd, text):
    monkeypatch.setattr(lock, "WATCH_SECONDS", 2.0)
    file, ended = tmp_path / LOCK_FILE, threading.Event()
    file.write_text(text)

    def live() -> None:
        while not ended.wait(0.1):
            os.utime(file)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with (
            pytest.raises(UserError, match=f"in use by .*If there is no such process, remove {file}"),
            alone_in(tmp_path),
        ):
            pass
    finally:
        ended.set()
        thread.join()
    assert file.read_text() == text
    with alone_in(tmp_path):  # now without
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert "is held from" in capfd.readouterr().err


def test_a_holder_gives_signs_of_life_and_ends_when_another_has_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    file = tmp_path / LOCK_FILE
    with alone_in(tmp_path):
        first = file.stat().st_mtime_ns
        while file.stat().st_mtime_ns == first:
            time.sleep(0.01)
        file.unlink()
        while not file.exists():  # removed by hand: written again
            time.sleep(0.01)
    assert not file.exists()


def test_a_holder_that_lost_the_folder_ends(tmp_path, holder):
    (tmp_path / LOCK_FILE).write_text(json.dumps(describe("umd finetune")))
    assert holder.wait(60) == 2
    assert json.loads((tmp_path / LOCK_FILE).read_text())["command"] == "umd finetune"


def test_a_folder_that_cannot_be_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot make the folder .*give another --out"),
        alone_in(tmp_path / "file" / "run"),
    ):
        pass


def test_a_run_in_a_folder_in_use_touches_nothing(tmp_path):
    config = RunConfig(out=tmp_path / "run", data=DataConfig(source="nowhere"))
    with alone_in(config.out, "pretrain"):
        before = {path: path.read_bytes() for path in config.out.rglob("*")}
        with pytest.raises(UserError, match="run is in use by pretrain on "):
            train(config, Console(quiet=True))
        assert {path: path.read_bytes() for path in config.out.rglob("*")} == before
    with pytest.raises(UserError, match="nowhere does not exist"):  # and now it begins
        train(config, Console(quiet=True))
    assert not config.out.exists()  # nor stays an empty folder of a run that could not begin
