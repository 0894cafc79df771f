"""Stored shards of both kinds: every changed bit is told or changes nothing, and a shard stays in its folder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load, save

from umd.errors import UserError
from umd.train.data import open_dataset
from umd.train.encode import encode
from umd.train.latents import LatentDataset
from umd.train.options import EncodeLatents, EncodePixels
from umd.train.pixels import encode_pixels
from umd.train.settings import DataConfig

QUIET = Console(quiet=True)
KINDS = ["pixels", "latents"]
MEND = {kind: f"umd encode-{kind} --data.source " for kind in KINDS}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """14 pictures to train on and 6 held out, of 3 classes."""
    rng = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(file, images=rng.integers(0, 256, (20, 6, 8, 3), dtype=np.uint8), labels=np.arange(20) % 3)
    return file


def encode_as(kind: str, source: Path, out: Path, vae: Path, **options) -> Path:
    if kind == "pixels":
        encode_pixels(EncodePixels(str(source), out, (4, 4), **{"shard_images": 5} | options), QUIET)
        return out
    data = DataConfig(str(source), vae=str(vae), num_workers=0)
    fixed = {"image_size": (4, 4), "views": 2, "shard_images": 5, "device": "cpu"}
    return encode(EncodeLatents(data, out=out, **fixed | options), QUIET)


@pytest.fixture(scope="module")
def clean(source, vaes, tmp_path_factory):
    root = tmp_path_factory.mktemp("clean")
    return {kind: encode_as(kind, source, root / kind, vaes["kl"]) for kind in KINDS}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, clean, tmp_path):
    return shutil.copytree(clean[kind], tmp_path / kind)


@pytest.fixture
def again(kind, folder, source, vaes):
    """The command that made the folder."""
    return lambda **options: encode_as(kind, source, folder, vaes["kl"], **options)


def shard(folder: Path, number: int = 1) -> Path:
    return sorted(folder.glob(f"*train-{number:05d}-of-*.safetensors"))[0]


def opened(folder: Path, split: str = "train"):
    latents = folder.name == "latents"
    return open_dataset(DataConfig(str(folder), (2, 2) if latents else (4, 4), 4 if latents else 3), split)


def content(folder: Path) -> list[bytes]:
    """All that a run takes of a folder."""
    dataset = opened(folder)
    ids = np.arange(len(dataset))
    if isinstance(dataset, LatentDataset):
        return [dataset.labels.tobytes(), *(dataset.read(ids, ids * 0 + view).tobytes() for view in range(2))]
    return [dataset.labels.tobytes(), dataset.sizes.tobytes(), dataset.pictures.read(ids).tobytes()]


def flips(data: bytes, places):
    """Each copy of the data with one bit changed, which is another one each time."""
    for i, place in enumerate(places):
        changed = bytearray(data)
        changed[place] ^= 1 << i % 8
        yield place, bytes(changed)


def test_each_bit_of_a_shard_is_told_or_changes_nothing(kind, folder):
    file, before = shard(folder), content(folder)
    data = file.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    told = 0
    with safe_open(file, "np") as tensors:
        small = {"labels", "indices", "crc32"} | ({"sizes"} if kind == "pixels" else set())
        assert small < set(tensors.keys())
    places = [*range(8), *range(8, begin, 5), *range(begin, len(data), 3)]
    for place, changed in flips(data, places):
        file.write_bytes(changed)
        try:
            assert content(folder) == before and place < begin, place
        except UserError as error:
            told += 1
            assert file.name in str(error) and str(error).count("\n") == 0
            assert f"remove it and run {MEND[kind]}" in str(error) and f"--out {folder}" in str(error)
    assert told > 0.9 * len(places)  # but padding, and spaces, of the header


def test_each_bit_of_a_header_is_told_or_changes_nothing(kind, folder):
    file = folder / f"{kind}.json"
    text = file.read_bytes()
    header = json.loads(text)
    before, rest = content(folder), {name: header[name] for name in ("format", "recipe", "splits")}
    for place, changed in flips(text, range(0, len(text), 3)):
        file.write_bytes(changed)
        try:
            assert content(folder) == before, place
            assert {name: json.loads(changed)[name] for name in rest} == rest
        except UserError as error:
            assert str(error).count("\n") == 0 and str(folder) in str(error)
    for key in ("recipe", "splits", "crc32"):
        file.write_text(json.dumps({name: value for name, value in header.items() if name not in (key, "crc32")}))
        with pytest.raises(
            UserError, match=rf"{kind}.json is damaged \({key} is missing\); remove it and run the same"
        ):
            opened(folder)


def test_a_shard_without_a_sum_is_refused(kind, folder):
    with safe_open(shard(folder), "pt") as stored:
        about = json.loads(stored.metadata()["umd"])
    del about["crc32"]
    shard(folder).write_bytes(save(load(shard(folder).read_bytes()), {"umd": json.dumps(about)}))
    with pytest.raises(
        UserError, match=rf"{shard(folder).name} is not what was written; remove it and run {MEND[kind]}"
    ):
        opened(folder)


def test_a_shard_stays_in_its_folder(kind, folder, again, source, vaes, tmp_path):
    other = tmp_path / "other.npz"
    with np.load(source) as arrays:
        np.savez(other, images=255 - arrays["images"], labels=arrays["labels"])
    theirs = encode_as(kind, other, tmp_path / "other", vaes["kl"])
    mine = {n: shard(folder, n).read_bytes() for n in (0, 1)}
    shard(folder).write_bytes(shard(theirs).read_bytes())
    with pytest.raises(UserError, match=rf"{shard(folder).name} is of another folder, made with another source.path"):
        opened(folder)
    shard(folder, 0).write_bytes(mine[1])
    shard(folder, 1).write_bytes(mine[0])
    with pytest.raises(UserError, match=rf"{shard(folder, 0).name} is of another folder, or changed"):
        opened(folder)
    with pytest.raises(UserError, match=rf"{shard(folder, 1).name} is in the place of another"):
        again()


def test_the_end_of_encoding_finds_what_changed(kind, folder, again):
    """In the rows as outside of them, with the header there and without it."""
    data = shard(folder).read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    left = folder / f".unfinished-{shard(folder).name}-99-abcd"  # of a killed process
    for place in (begin, len(data) - 5):
        shard(folder).write_bytes(next(iter(flips(data, [place])))[1])
        with pytest.raises(UserError, match=rf"{shard(folder).name} differs from its checksum.*; remove it and run"):
            again()
        (folder / f"{kind}.json").unlink(missing_ok=True)
    shard(folder).unlink()
    left.write_bytes(b"half of it")
    again()
    assert shard(folder).read_bytes() == data and not left.exists()


def test_the_kinds_are_not_mixed(clean, source, vaes, tmp_path):
    for kind, other in zip(KINDS, reversed(KINDS), strict=True):
        with pytest.raises(UserError, match=rf"{clean[kind]} holds .*; give another --out"):
            encode_as(other, source, clean[kind], vaes["kl"])
        for each in KINDS:
            with pytest.raises(UserError, match=rf"{clean[each]} holds .*(give the files|encode pictures)"):
                encode_as(kind, clean[each], tmp_path / "out", vaes["kl"])
        assert not (tmp_path / "out").exists()
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="cannot make the folder .* give another"):
            encode_as(kind, source, tmp_path / "file" / kind, vaes["kl"])
        with pytest.raises(UserError, match="it is a file"):
            encode_as(kind, source, tmp_path / "file", vaes["kl"])


def test_a_missing_shard_is_not_to_be_removed(kind, folder):
    shard(folder).unlink()
    with pytest.raises(UserError, match=rf"shard .* is not there; run {MEND[kind]}"):
        opened(folder)
