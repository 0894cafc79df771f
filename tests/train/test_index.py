"""Lists of many files: as they were listed, made anew when something changed; arrays and tars read where they lie."""

import io
import os
import socket
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from umd.bench.options import ProbeBench
from umd.bench.probe import link_pictures
from umd.errors import UserError
from umd.train import index, tars
from umd.train.data import open_dataset, train_loader
from umd.train.index import Names, kept
from umd.train.settings import DataConfig
from umd.train.sources import Rows

ODD = ["a/1.jpg", "", "ein Wort/größer.png", b"\xff\xfe.jpg".decode("utf-8", "surrogateescape"), "z"]

as_root = pytest.mark.skipif(getattr(os, "geteuid", int)() != 0 or os.name != "posix", reason="who may be another user")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "INDEXED_FROM", 1)
    tars.listed.cache_clear()
    return tmp_path / "cache" / "umd"


def age(*paths) -> None:
    """As if nothing had changed for a minute."""
    for path in paths:
        then = os.stat(path).st_mtime - 60
        os.utime(path, (then, then))


def picture(path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path)


def test_names_are_the_strings_they_were_made_of():
    names = Names.of(ODD)
    assert list(names) == ODD and [names[i] for i in range(-5, 5)] == ODD * 2
    chosen = names.take(np.array([4, 2, 2])).take(np.array([2, 0]))
    assert list(chosen) == [ODD[2], ODD[4]] and len(chosen) == 2
    assert list(Names(names.data, names.ends, prefix="at/"))[0] == "at/a/1.jpg"
    assert list(Names.of([])) == []
    with pytest.raises(IndexError):
        names[5]


def test_the_first_name_with_another_ending():
    names = [*ODD, "b.JPG", "jpg", "c.jPeG", "é.jpg"]
    for rows in ([0, 3, 5, 7, 8], [0, 3, 6, 1], [2, 0], [1], [], [8, 4]):
        chosen = Names.of(names).take(np.array(rows, np.int64))
        expected = next((name for name in chosen if not name.lower().endswith((".jpg", ".jpeg"))), None)
        assert chosen.first_without(".jpg", ".jpeg") == expected
    assert Names.of(["a.jpg", "b.png"]).first_without(".jpg") == "b.png"


def test_a_list_is_kept_until_what_it_was_made_of_changes(tmp_path, cache):
    source, calls = tmp_path / "source", []
    source.mkdir()

    def make():
        calls.append(1)
        return {"n": np.array([len(calls)]), "none": np.empty(0, np.int64)}, [source], 10

    assert kept("x", source, make)["n"].item() == 1 and not cache.exists(), (
        "it has just changed, and may change again unseen"
    )
    age(source)
    assert [kept("x", source, make)["n"].item() for _ in range(3)] == [2, 2, 2]
    assert kept("y", source, make)["n"].item() == 3, "of another kind"
    (source / "new").touch()
    age(source)
    assert [kept("x", source, make)["n"].item() for _ in range(2)] == [4, 4]
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:-4])
    assert kept("x", source, make)["n"].item() == 5, "damaged"
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:-8] + b"\x03" + bytes(7))
    assert [kept("x", source, make)["n"].item() for _ in range(2)] == [6, 6], "a flipped bit"
    source.rename(tmp_path / "other")
    source.mkdir()
    times = os.stat(tmp_path / "other")
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert [kept("x", source, make)["n"].item() for _ in range(2)] == [7, 7], "another folder of the same time"
    for file in cache.iterdir():
        file.unlink()
    cache.rmdir()
    cache.touch()
    assert [kept("x", source, make)["n"].item() for _ in range(2)] == [8, 9], "nowhere to keep it"


@as_root
def test_a_user_without_a_home_lists_anew(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    before = os.getuid()
    os.setresuid(2**31 - 7, -1, before)
    try:
        found = kept("x", tmp_path, lambda: ({"n": np.array([1])}, [], 10))
    finally:
        os.setresuid(before, before, before)
    assert found["n"].item() == 1


def test_what_cannot_be_listed_is_told_and_never_kept(tmp_path, cache):
    """Neither read as empty, nor as if it were not there."""
    for name in ("a/1.png", "b/1.png"):
        picture(tmp_path / "source" / name)
    age(tmp_path / "source", tmp_path / "source" / "a", tmp_path / "source" / "b")
    loop = tmp_path / "source" / "b" / "deep"
    loop.symlink_to(loop)
    config = DataConfig(source=str(tmp_path / "source"), holdout=0)
    with pytest.raises(UserError, match="cannot list folder .*source/b/deep .*check that it can be read"):
        open_dataset(config, "train")
    assert not cache.exists()
    loop.unlink()
    assert len(open_dataset(config, "train")) == 2


@as_root
def test_a_folder_that_may_not_be_read_is_told():
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        for name in ("a/1.png", "b/deep/1.png"):
            picture(Path(root) / name)
        for closed in ("b/deep", "b"):
            os.chmod(Path(root) / closed, 0o700)
            os.seteuid(65534)
            try:
                with pytest.raises(UserError, match=f"cannot list folder {root}/{closed} .Permission denied"):
                    open_dataset(DataConfig(source=root, holdout=0), "train")
            finally:
                os.seteuid(0)


@pytest.mark.parametrize("place", ["", "a/"])
def test_only_files_are_pictures(tmp_path, place):
    """Who opened the others would wait for ever."""
    picture(tmp_path / place / "1.jpg")
    os.mkfifo(tmp_path / place / "2.jpg")
    (tmp_path / place / "3.jpg").symlink_to(tmp_path / place / "2.jpg")
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(tmp_path / place / "4.jpg"))
    (tmp_path / place / "5.jpg").symlink_to(tmp_path / place / "1.jpg")
    config = DataConfig(source=str(tmp_path), holdout=0)
    assert [os.path.basename(path) for path in open_dataset(config, "train").pictures] == ["1.jpg", "5.jpg"]
    (tmp_path / place / "6.jpg").symlink_to("nowhere")
    with pytest.raises(UserError, match="cannot read image .*6.jpg .*No such file"):
        open_dataset(config, "train")


def test_a_folder_listed_before_is_what_it_is_now(tmp_path):
    root = tmp_path / "pictures"
    for name in ("b/2.png", "a/10.png", "a/9.png", "a/deep/1.png", "b/.hidden.png"):
        picture(root / "train" / name)
        picture(root / "val" / name)

    def names(split="train"):
        dataset = open_dataset(DataConfig(source=str(root)), split)
        files = [os.path.relpath(path, root) for path in dataset.pictures]
        return [f"{file} {dataset.class_names[label]}" for file, label in zip(files, dataset.labels, strict=True)]

    first = names()
    assert first == ["train/a/10.png a", "train/a/9.png a", "train/a/deep/1.png a", "train/b/2.png b"]
    everything = [root / "train", *(path for path in (root / "train").rglob("*") if path.is_dir())]
    age(*everything)
    assert names() == first == names()
    picture(root / "train" / "a/deep/3.png")
    assert names() == [*first[:3], "train/a/deep/3.png a", first[3]]
    age(*everything)
    picture(root / "train" / "c/1.png")
    assert names()[-1] == "train/c/1.png c" and len(names("test")) == 4


def test_a_tenth_of_imagenet(tmp_path, monkeypatch):
    """128,000 links: listed once, held in a few dozen bytes each, any of them read at once."""
    source, bench = tmp_path / "pictures", ProbeBench(train=128_000, test=1000, side=32)
    link_pictures(source, bench)
    age(source / "train", *(source / "train").iterdir())
    first = open_dataset(DataConfig(source=str(source)), "train")
    monkeypatch.setattr("umd.train.folders.walk", None)  # whoever lists it again fails
    again = open_dataset(DataConfig(source=str(source)), "train")
    assert len(first) == len(again) == 128_000 and again.class_names == [f"{c:04d}" for c in range(1000)]
    names: Names = again.pictures
    assert isinstance(names.data, np.memmap) and names.data.nbytes + names.ends.nbytes < 30 * 128_000
    assert again.pictures[77_777] == first.pictures[77_777] == str(source / "train" / "0607" / "000081.jpg")
    config = DataConfig(source=str(source), image_size=(16, 16), num_workers=2)
    loader = train_loader(again, config, batch_size=64, seed=0)
    batch = next(loader)
    loader.close()
    assert torch.equal(batch.labels, torch.from_numpy(again.labels)[batch.indices]) and len(set(batch.indices)) == 64


def test_a_tar_is_listed_once_and_one_that_shrank_is_told(tmp_path):
    tar = tmp_path / "set.tar"
    for i in range(6):
        picture(tmp_path / f"{i}.jpg", 40 * i)
    with tarfile.open(tar, "w") as archive:
        for i in range(6):
            archive.add(tmp_path / f"{i}.jpg", f"{i}.jpg")
    age(tar)
    config = DataConfig(source=str(tar), holdout=0)
    first = open_dataset(config, "train")
    tars.listed.cache_clear()
    walked, tars.members = tars.members, None  # whoever lists it again fails
    try:
        again = open_dataset(config, "train")
    finally:
        tars.members = walked
    assert list(map(str, again.pictures)) == list(map(str, first.pictures)) == [f"{tar}/{i}.jpg" for i in range(6)]
    assert [int(again.picture(i).pixels.mean()) // 40 for i in range(6)] == list(range(6))
    os.truncate(tar, first.pictures[5].offset + 100)
    with pytest.raises(UserError, match=r"set.tar has shrunk since it was listed, seen at 5.jpg"):
        again.picture(5)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_arrays_are_read_where_they_lie(tmp_path, write):
    images = np.random.default_rng(0).integers(0, 256, (40, 6, 7, 3), dtype=np.uint8)
    write(tmp_path / "all.npz", images=images, labels=np.arange(40) % 4)
    write(tmp_path / "splits.npz", train_images=images[:30], test_images=images[30:])
    np.save(tmp_path / "plain.npy", images[..., 0])
    for name, config in (("all.npz", {}), ("splits.npz", {}), ("plain.npy", {"holdout": 0.5})):
        parts = [open_dataset(DataConfig(source=str(tmp_path / name), **config), split) for split in ("train", "test")]
        for part in parts:
            array = part.pictures.array if isinstance(part.pictures, Rows) else part.pictures
            assert isinstance(array, np.memmap) == (write is np.savez or name == "plain.npy")
        found = np.concatenate([part.pictures[np.arange(len(part))] for part in parts])
        expected = images[..., :1] if name == "plain.npy" else images
        assert sorted(p.tobytes() for p in found) == sorted(p.tobytes() for p in expected)
    labelled = open_dataset(DataConfig(source=str(tmp_path / "all.npz")), "train")
    for i, label in enumerate(labelled.labels):
        rows = np.flatnonzero((images == labelled.picture(i).pixels).all((1, 2, 3)))
        assert rows.tolist() != [] and rows[0] % 4 == label


def test_an_array_that_is_mapped_is_the_one_that_was_stored(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 6, 7, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=images)
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[2000] ^= 8
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(UserError, match="cannot read .*x.npz .Bad CRC-32 for file 'images.npy'"):
        open_dataset(DataConfig(source=str(tmp_path / "x.npz")), "train")

    stored = io.BytesIO()
    np.lib.format.write_array(stored, images, version=(3, 0))
    with zipfile.ZipFile(tmp_path / "v3.npz", "w") as file:
        file.writestr("images.npy", stored.getvalue())
    assert np.array_equal(
        open_dataset(DataConfig(source=str(tmp_path / "v3.npz"), holdout=0), "train").pictures, images
    )

    np.savez(tmp_path / "objects.npz", images=np.array([images[0], images[1][:4]], dtype=object))
    with pytest.raises(UserError, match="Object arrays cannot be loaded .* expected .npy or .npz without pickled"):
        open_dataset(DataConfig(source=str(tmp_path / "objects.npz")), "train")
