"""Pictures on a network disk that goes away: tried again; never counted as broken pictures.

/proc/self/mem answers every read of its beginning with EIO, as Lustre answers a host that it has dropped.
"""

import errno
import os
import tarfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from umd import files
from umd.errors import TemporaryError, UserError
from umd.files import OpenFile
from umd.train.check import examine_files
from umd.train.dali import read_sample
from umd.train.data import open_dataset, train_loader
from umd.train.options import EncodePixels
from umd.train.pixels import encode_pixels
from umd.train.settings import DataConfig

QUIET = Console(quiet=True)
EIO = Path("/proc/self/mem")

pytestmark = pytest.mark.skipif(not EIO.exists(), reason="Linux only")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(files, "WAITS", (0.0, 0.0, 0.0))


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        (tmp_path / "pictures" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
        picture.save(tmp_path / "pictures" / "ab"[i % 2] / f"{i:02d}.jpg")
    return tmp_path / "pictures"


@pytest.fixture
def tar(folder):
    path = folder.parent / "pictures.tar"
    with tarfile.open(path, "w") as file:
        for picture in sorted(folder.glob("*/*.jpg")):
            file.add(picture, picture.name)
    return path


def config(source: Path, workers: int = 0) -> DataConfig:
    return DataConfig(str(source), image_size=(8, 8), num_workers=workers, holdout=0, skip_broken=True, loader="python")


def take(dataset, settings: DataConfig, count: int = 3) -> list[torch.Tensor]:
    batches = train_loader(dataset, settings, batch_size=6, seed=0)
    taken = [batch.x_start for batch in islice(batches, count)]
    batches.close()
    return taken


def lost(file: Path) -> None:
    """A picture whose reads fail from now on."""
    file.unlink()
    file.symlink_to(EIO)


def test_a_picture_that_answers_at_the_third_attempt_is_no_broken_one(folder, monkeypatch):
    clean = take(open_dataset(config(folder), "train"), config(folder))
    dataset = open_dataset(config(folder), "train")
    attempts: dict[Path, int] = {}
    read = Path.read_bytes

    def read_bytes(self):
        attempts[self] = attempts.get(self, 0) + 1
        if attempts[self] < 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert all(map(torch.equal, take(dataset, config(folder)), clean)) and not dataset.broken
    assert len(attempts) == 12


def test_a_tar_whose_handle_is_stale_is_opened_anew(tar, monkeypatch):
    clean = take(open_dataset(config(tar), "train"), config(tar))
    dataset = open_dataset(config(tar), "train")
    read, stale, count = OpenFile.read_into, set(), 0

    def read_into(self, buffer, start):
        nonlocal count
        count += 1
        if count in (5, 6, 11):
            stale.add(self)
        if self in stale:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(self, buffer, start)

    monkeypatch.setattr(OpenFile, "read_into", read_into)
    assert all(map(torch.equal, take(dataset, config(tar)), clean)) and not dataset.broken
    assert len(stale) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_stays_away_ends_training_with_75_and_no_picture_is_left_out(folder, workers):
    """With a worker, the error crosses to another process, which loses its cause."""
    dataset = open_dataset(config(folder), "train")
    lost(folder / "a" / "04.jpg")
    with pytest.raises(TemporaryError, match=r"cannot read .*04\.jpg \(Input/output error\), tried for") as caught:
        take(dataset, config(folder, workers))
    assert files.exit_status(caught.value) == 75 and not dataset.broken


def test_so_does_what_reads_for_dali(folder):
    settings = replace(config(folder), loader="dali")
    dataset = open_dataset(settings, "train")
    lost(folder / "a" / "00.jpg")
    with pytest.raises(TemporaryError, match=r"cannot read .*00\.jpg"):
        read_sample(dataset, settings, 0, 0, 0)
    assert not dataset.broken


def test_nor_does_opening_leave_any_out(folder):
    lost(folder / "a" / "04.jpg")
    with pytest.raises(OSError, match=os.strerror(errno.EIO)) as caught:
        open_dataset(config(folder), "train")
    assert files.exit_status(caught.value) == 75


def test_a_store_of_pictures_is_never_made_without_those_on_a_lost_disk(folder, tmp_path, monkeypatch):
    options = EncodePixels(str(folder), tmp_path / "store", (8, 8), holdout=0.5, skip_broken=True)
    read = Path.read_bytes

    def read_bytes(self):
        if self.name == "04.jpg":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(TemporaryError, match=r"cannot read .*04\.jpg"):
        encode_pixels(options, QUIET)
    monkeypatch.undo()
    encode_pixels(options, QUIET)
    splits = [open_dataset(config(tmp_path / "store"), split) for split in ("train", "test")]
    assert sum(map(len, splits)) == 12


def test_check_data_puts_no_picture_of_a_lost_disk_on_its_list(folder):
    lost(folder / "a" / "04.jpg")
    with pytest.raises(TemporaryError, match=r"cannot read .*04\.jpg"):
        examine_files([("a/04.jpg", str(folder / "a" / "04.jpg"))], 0)


def test_a_tar_that_is_gone_is_no_tar_of_broken_pictures(tar):
    dataset = open_dataset(config(tar), "train")
    tar.unlink()
    with pytest.raises(UserError, match=r"pictures\.tar is gone since it was listed"):
        take(dataset, config(tar))
    assert not dataset.broken


def test_a_picture_that_is_gone_is_replaced(folder):
    dataset = open_dataset(config(folder), "train")
    (folder / "a" / "04.jpg").unlink()
    take(dataset, config(folder))
    assert [dataset.pictures[i][-6:] for i in dataset.broken] == ["04.jpg"]
