"""Pictures on a network disk that goes away: tried again; never counted as broken pictures.

/proc/self/mem answers every read of its beginning with EIO, as Lustre answers a host that it has dropped.
"""

import errno
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
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
from umd.train import check
from umd.train.clips import decode_clip
from umd.train.dali import read_sample
from umd.train.data import open_dataset, train_loader
from umd.train.decoding import BrokenPicture, read_file
from umd.train.fingerprint import fingerprint
from umd.train.options import CheckData, EncodePixels
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
    with pytest.raises(TemporaryError, match=r"cannot read .*04\.jpg \(Input/output error\)") as caught:
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


def test_check_data_lists_one_bad_sector_and_nothing_of_a_lost_disk(folder, tmp_path, monkeypatch):
    """One file that fails beside others that do not is listed. If the others fail too at the end, nothing is."""
    monkeypatch.setattr(check, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))  # where no_waiting holds
    lost(folder / "a" / "04.jpg")
    options = CheckData(workers=1, out=tmp_path / "list.json")
    check.check_data(folder, options, QUIET)
    (found,) = json.loads((tmp_path / "list.json").read_text())["files"]
    assert found == {"path": "a/04.jpg", "reason": "disk error", "detail": os.strerror(errno.EIO)}
    (tmp_path / "list.json").unlink()
    read, calls = Path.read_bytes, []

    def read_bytes(self):
        calls.append(self)
        if self.suffix == ".jpg" and len(calls) > 4:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(TemporaryError, match=r"cannot read .*jpg \(Input/output error\)"):
        check.check_data(folder, options, QUIET)
    assert not (tmp_path / "list.json").exists()


def test_a_link_to_itself_is_a_broken_picture(folder):
    dataset = open_dataset(config(folder), "train")
    (folder / "a" / "04.jpg").unlink()
    (folder / "a" / "04.jpg").symlink_to("04.jpg")
    with pytest.raises(BrokenPicture, match=r"04\.jpg \(Too many levels of symbolic links\)"):
        read_file(str(folder / "a" / "04.jpg"))
    take(dataset, config(folder))
    assert [dataset.pictures[i][-6:] for i in dataset.broken] == ["04.jpg"]


def test_a_process_without_room_breaks_no_picture(folder, monkeypatch):
    dataset = open_dataset(config(folder), "train")

    def read_bytes(self):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(UserError, match=r"\(Too many open files\): raise that limit"):
        take(dataset, config(folder))
    assert not dataset.broken


def test_a_video_on_a_lost_disk_is_no_broken_clip(tmp_path):
    pytest.importorskip("av")
    lost_video = tmp_path / "a.mp4"
    lost_video.symlink_to(EIO)
    with pytest.raises(TemporaryError, match=r"cannot read .*a\.mp4 \(Input/output error\)"):
        decode_clip(lost_video)
    (tmp_path / "b.mp4").write_bytes(b"no video")
    with pytest.raises(BrokenPicture, match=r"cannot read video .*b\.mp4"):
        decode_clip(tmp_path / "b.mp4")


def test_ranks_are_not_told_of_other_pictures_where_one_has_lost_its_disk(folder):
    """The sample of a fingerprint would hold -1 for every picture that could not be read."""
    dataset = open_dataset(config(folder), "train")
    lost(folder / "a" / "04.jpg")
    with pytest.raises(TemporaryError, match=r"cannot read .*04\.jpg"):
        fingerprint(dataset)


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
