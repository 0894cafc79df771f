"""DALI's batches against the Python loader's, over epochs, ranks, threads and resumes; and pictures in tars."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from umd.config import model_config
from umd.errors import UserError
from umd.train.check import check_data
from umd.train.data import choose_loader, has_dali, open_dataset, reader, train_loader
from umd.train.loop import train
from umd.train.options import CheckData
from umd.train.run import RunConfig
from umd.train.settings import DataConfig
from umd.train.tars import members

needs_dali = pytest.mark.skipif(not has_dali(), reason="DALI is not installed")


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(60, 140, 2)
    blocks = Image.fromarray(rng.integers(0, 256, (height // 6, width // 6, 3), dtype=np.uint8))
    return blocks.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """23 JPEGs of two classes and of every kind that the readers must agree on."""
    root = tmp_path_factory.mktemp("pictures")
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    kinds = {3: ("RGB", {"exif": exif}), 5: ("L", {}), 7: ("CMYK", {}), 11: ("RGB", {"progressive": True})}
    for i in range(23):
        mode, options = kinds.get(i, ("RGB", {}))
        (root / "ab"[i % 2]).mkdir(exist_ok=True)
        path = root / "ab"[i % 2] / f"{i:02d}.JPEG"
        picture(i).convert(mode).save(path, "PNG" if i == 13 else "JPEG", quality=92, **({} if i == 13 else options))
    xmp = b'http://ns.adobe.com/xap/1.0/\0<rdf:Description tiff:Orientation="8"/>'
    turned = root / "b" / "09.JPEG"
    jpeg = turned.read_bytes()
    turned.write_bytes(jpeg[:2] + b"\xff\xe1" + (len(xmp) + 2).to_bytes(2, "big") + xmp + jpeg[2:])
    return root


def config(source, **options) -> DataConfig:
    return DataConfig(
        source=str(source), **{"image_size": (24, 32), "holdout": 0, "num_workers": 0, "area_min": 0.3} | options
    )


def take(source, count, batch_size=6, seed=1, start=0, places=None, **options):
    settings = config(source, **options)
    batches = train_loader(
        open_dataset(settings, "train"), settings, batch_size=batch_size, seed=seed, start=start, places=places
    )
    taken = list(islice(batches, count))
    batches.close()
    return taken


def same(a, b) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("x_start", "labels", "indices"))


@needs_dali
# To grey, the two round CMYK and PNG in another order.
@pytest.mark.parametrize(("channels", "area_min", "mean"), [(3, 0.3, 0.3), (3, 1.0, 0.3), (1, 0.8, 0.6)])
def test_pictures_are_pillows_up_to_rounding(folder, channels, area_min, mean, monkeypatch):
    """Same order, labels, crops and mirrors. DALI rounds once where Pillow rounds after each pass of its filter."""
    monkeypatch.setattr("umd.train.data.shrink_for", lambda box, config: 1)  # DALI decodes JPEGs at full size
    options = dict(channels=channels, area_min=area_min)
    ours = take(folder, 6, loader="dali", **options)
    theirs = take(folder, 6, loader="python", num_workers=0, **options)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.indices, b.indices) and torch.equal(a.labels, b.labels)
        assert a.x_start.shape == b.x_start.shape and a.x_start.dtype == torch.float32
        difference = (a.x_start - b.x_start).abs() * 127.5  # in steps of 8 bits
        assert difference.flatten(1).mean(1).max() < mean
        assert difference.max() < 10


@needs_dali
def test_resume_in_the_middle_of_an_epoch_is_exact(folder):
    whole = take(folder, 9, loader="dali")  # 54 samples: two epochs and 8
    for done in (1, 2, 5):
        assert all(map(same, whole[done:], take(folder, 9 - done, loader="dali", start=6 * done)))


@needs_dali
def test_threads_change_nothing_and_epochs_and_seeds_do(folder):
    one, three = (take(folder, 2, batch_size=23, loader="dali", num_workers=n) for n in (1, 3))
    assert all(map(same, one, three))
    first, second = one
    assert not torch.equal(first.indices, second.indices)
    assert not torch.equal(first.x_start[first.indices.argsort()], second.x_start[second.indices.argsort()])
    (other,) = take(folder, 1, batch_size=23, seed=2, loader="dali")
    assert not torch.equal(first.indices, other.indices)


@needs_dali
def test_three_ranks_see_every_sample_once_an_epoch(folder):
    alone = take(folder, 8, batch_size=9, loader="dali")
    ranks = [take(folder, 8, batch_size=9, places=range(3 * r, 3 * r + 3), loader="dali") for r in range(3)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert torch.equal(whole.x_start, torch.cat([part.x_start for part in parts]))
    order = torch.cat([part.indices for step in zip(*ranks, strict=True) for part in step])
    for epoch in range(3):
        assert sorted(order[23 * epoch : 23 * epoch + 23].tolist()) == list(range(23))


@needs_dali
def test_auto_is_dali_for_jpegs_alone(folder, tmp_path):
    jpegs = open_dataset(config(folder), "train")
    assert choose_loader(jpegs, "auto") == "dali" and choose_loader(jpegs, "python") == "python"
    assert reader(jpegs, config(folder, num_workers=3)) == "read by DALI, 3 threads"
    assert reader(jpegs, config(folder, num_workers=3, loader="python")) == "read by Pillow, 3 processes"
    picture(0).save(tmp_path / "0.png")
    np.save(tmp_path / "array.npy", np.zeros((4, 8, 8, 3), np.uint8))
    for source, what in ((tmp_path, "0.png is none"), (tmp_path / "array.npy", "array.npy is no folder")):
        dataset = open_dataset(config(source), "train")
        assert choose_loader(dataset, "auto") == "python"
        with pytest.raises(UserError, match=what):
            choose_loader(dataset, "dali")


@needs_dali
def test_a_run_with_dali_resumes_to_the_bit(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    whole = (broken / "a" / "00.JPEG").read_bytes()
    (broken / "a" / "00.JPEG").write_bytes(whole[: len(whole) // 2])
    listed = [{"path": "a/00.JPEG", "reason": "truncated"}]
    (broken / "quarantine.json").write_text(json.dumps({"files": listed}))

    def run(name: str, steps: int) -> Path:
        run_config = RunConfig(
            out=tmp_path / name, data=config(broken, loader="dali"), batch_size=4, steps=steps, save_every=2,
            draw_every=0, precision="fp32", device="cpu",
            model=model_config("UMD-Ti/4", image_size=(16, 16), hidden_size=16, num_heads=2, depth=1, decoder_depth=1),
        )  # fmt: skip
        return train(replace(run_config, optim=replace(run_config.optim, warmup=0)), Console(quiet=True))

    # The learning rate follows the length, so the halted run has the whole length and loses its last checkpoint.
    straight, halted = run("straight", 8), run("halted", 8)
    for path in sorted((tmp_path / "halted" / "checkpoints").iterdir())[1:]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run("halted", 8) == halted
    assert (halted / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    record = json.loads((tmp_path / "halted" / "quarantine.json").read_text())
    assert record["files"] == listed and record["left_out"] == 1 and record["images"] == 22
    assert record["share"] == pytest.approx(1 / 23)


# Tars


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def tars(folder, tmp_path_factory):
    """The folder's pictures as two WebDataset tars, in the folder's order."""
    root = tmp_path_factory.mktemp("tars")
    paths = sorted(folder.glob("*/*.JPEG"))
    for shard, part in enumerate((paths[:13], paths[13:])):
        files = {}
        for path in part:
            files |= {f"{path.stem}.jpg": path.read_bytes(), f"{path.stem}.cls": b"%d" % (path.parent.name == "b")}
        write_tar(root / f"train-{shard}.tar", files)
    return root


@pytest.mark.parametrize("loader", ["python", pytest.param("dali", marks=needs_dali)])
def test_tars_are_the_folder(folder, tars, loader):
    assert open_dataset(config(tars), "train").class_names == ["0", "1"]
    for a, b in zip(take(folder, 4, loader=loader), take(tars, 4, loader=loader), strict=True):
        assert torch.equal(a.x_start, b.x_start) and torch.equal(a.labels, b.labels)


@needs_dali
def test_the_index_of_wds2idx_is_what_a_walk_finds(tars, tmp_path):
    shutil.copy(tars / "train-1.tar", tmp_path)
    walked = open_dataset(config(tmp_path / "train-1.tar"), "train")
    subprocess.run([Path(sys.executable).with_name("wds2idx"), tmp_path / "train-1.tar"], check=True)
    (tmp_path / "indexed").mkdir()
    for name in ("train-1.tar", "train-1.idx"):
        (tmp_path / name).rename(tmp_path / "indexed" / name)
    indexed = open_dataset(config(tmp_path / "indexed" / "train-1.tar"), "train")
    assert [member[1:] for member in indexed.pictures] == [member[1:] for member in walked.pictures]
    assert np.array_equal(indexed.labels, walked.labels)
    write_tar(tmp_path / "indexed" / "train-1.tar", {"0.jpg": b"0"})  # the index is now of another
    with pytest.raises(UserError, match=r"cut off, or .*train-1\.idx is of another tar"):
        members(tmp_path / "indexed" / "train-1.tar")


def test_splits_and_holdout_of_tars(tars, tmp_path):
    for split, shard in (("train", 0), ("val", 1)):
        (tmp_path / split).mkdir()
        shutil.copy(tars / f"train-{shard}.tar", tmp_path / split)
    train_split, test_split = (open_dataset(config(tmp_path), split) for split in ("train", "test"))
    assert (len(train_split), len(test_split)) == (13, 10)
    assert train_split.class_names == test_split.class_names == ["0", "1"]
    halves = [open_dataset(config(tars, holdout=0.5), split) for split in ("train", "test")]
    assert sum(map(len, halves)) == 23 and min(map(len, halves)) > 0
    assert not {str(p) for p in halves[0].pictures} & {str(p) for p in halves[1].pictures}


def test_a_broken_tar_member_is_named_checked_and_left_out(folder, tmp_path):
    good = (folder / "a" / "00.JPEG").read_bytes()
    files = {"x/0.jpg": good, "x/1.jpg": good[: len(good) // 2], "x/2.jpg": good}
    write_tar(tmp_path / "t.tar", files)
    with pytest.raises(UserError, match=r"t\.tar/x/1\.jpg \(image file is truncated"):
        take(tmp_path / "t.tar", 1, batch_size=3, loader="python")
    written = check_data(tmp_path / "t.tar", CheckData(workers=1), Console(quiet=True))
    assert written == tmp_path / "t.quarantine.json"
    dataset = open_dataset(config(tmp_path / "t.tar"), "train")
    assert len(dataset) == 2 and dataset.quarantined == {"t.tar/x/1.jpg": "truncated"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0.txt": b"0"}, "has no images"),
        ({"0.jpg": b"", "1.jpg": b"", "1.cls": b"0"}, "1 of the 2 samples"),
        ({"0.jpg": b"", "0.cls": b"cat"}, "holds no class"),
    ],
)
def test_wrong_tars_are_a_sentence(tmp_path, files, message):
    write_tar(tmp_path / "t.tar", files)
    with pytest.raises(UserError, match=message):
        open_dataset(config(tmp_path / "t.tar"), "train")
    (tmp_path / "t.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(UserError, match=r"cannot read .*t\.tar"):
        open_dataset(config(tmp_path), "train")
