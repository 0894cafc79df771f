"""`umd probe` and `umd transfer` read the pictures they need, once, on any number of ranks; crops as published."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from umd.errors import UserError
from umd.probe import draw_shots
from umd.train import sources
from umd.train.data import center_view, open_dataset
from umd.train.layers import probe_layers
from umd.train.options import Probe, Transfer
from umd.train.probe import Recognition, noised, probe, published_zoom
from umd.train.run import read_config
from umd.train.settings import DataConfig
from umd.train.transfer import transfer

QUIET = Console(quiet=True)


def save_pictures(folder: Path, counts: dict[str, int], side: int = 12) -> None:
    """A folder a class, each of a colour of its own under noise."""
    rng = np.random.default_rng(0)
    for c, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            picture = rng.integers(0, 90, (side, side, 3))
            picture[..., c % 3] += 120
            Image.fromarray(picture.astype(np.uint8)).save(folder / name / f"{i:03d}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    save_pictures(folder / "train", {"blue": 40, "green": 50, "red": 60})
    save_pictures(folder / "test", {"blue": 10, "green": 8, "red": 7})
    return folder


@pytest.fixture
def run(make_run, tmp_path, folder) -> Path:
    return make_run(tmp_path / "run", data=DataConfig(source=str(folder)))


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The files that are decoded."""
    files: list[str] = []
    decode = sources.decode
    monkeypatch.setattr(sources, "decode", lambda file, shrink=None: files.append(str(file)) or decode(file, shrink))
    return files


def results(run: Path, ranks: int = 1, **options) -> dict:
    for rank in reversed(range(ranks)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANK", str(rank))
            patch.setenv("WORLD_SIZE", str(ranks))
            probe(run, Probe(**options), read_config(run), QUIET)
    return json.loads((run / "probe.json").read_text())


def test_only_the_shots_and_the_held_out_pictures_are_read_and_once(run, folder, opened):
    found = results(run, shots=4)
    labels = torch.from_numpy(open_dataset(DataConfig(source=str(folder)), "train").labels)
    drawn = {int(i) for draw in draw_shots(labels, 4, 3) for ids in draw for i in ids}
    assert len(opened) == len(set(opened)) == len(drawn) + 25 and len(drawn) <= 36
    assert len(found) == 3 and found["raw pixels"]["mean"] > 0.9
    opened.clear()
    assert results(run, shots=4) == found and not opened  # features are on the disk
    results(run, shots=5)  # others are drawn, the held-out ones stay
    assert opened and all(str(folder / "train") in file for file in opened)


def test_other_pictures_have_other_features(make_run, tmp_path, opened):
    """Though their names, sizes and labels are the same, and so are the few that a run's fingerprint looks at."""
    save_pictures(tmp_path / "pictures" / "train", {"a": 20, "b": 20})
    save_pictures(tmp_path / "pictures" / "test", {"a": 9, "b": 9})
    run = make_run(tmp_path / "run", data=DataConfig(source=str(tmp_path / "pictures")))
    before = results(run, shots=5)
    file = tmp_path / "pictures" / "test" / "a" / "003.png"
    file.write_bytes((tmp_path / "pictures" / "test" / "b" / "003.png").read_bytes())
    os.utime(file, ns=(1, 1))
    opened.clear()
    after = results(run, shots=5)
    assert len(opened) == 18 and all("/test/" in name for name in opened)  # the shots are as they were
    assert after["raw pixels"]["mean"] < before["raw pixels"]["mean"] == 1.0


def test_any_number_of_ranks(make_run, run, tmp_path, folder):
    other = make_run(tmp_path / "other", data=DataConfig(source=str(folder)))
    assert results(run, shots=3) == results(other, ranks=3, shots=3)


def test_shots_come_from_a_pool_and_classes_give_what_it_has(run, folder):
    recognition = Recognition(read_config(run), Probe(shots=30, pool=60))
    counts = [len(ids) for ids in recognition.draws[0]]
    assert sum(counts) <= 60 and min(counts) < 30 and len(recognition.shots.ids) <= 60
    with pytest.raises(UserError, match="class blue has 10 training images: ask for at most 10, or .*--allow-fewer"):
        Recognition(read_config(run), Probe(shots=30), candidates=np.r_[0:10, 40:150])
    with pytest.raises(
        UserError, match="class blue has 0 training images: add some, or take the class out, or .*--allow"
    ):
        Recognition(read_config(run), Probe(shots=3), candidates=np.arange(40, 150))
    config = read_config(run)
    with pytest.raises(UserError, match="of .* none is held out .data.holdout is 0.; give it a test/ folder"):
        Recognition(replace(config, data=DataConfig(source=str(folder / "train"), holdout=0)), Probe(shots=3))
    labels = torch.from_numpy(open_dataset(DataConfig(source=str(folder)), "train").labels)
    with pytest.raises(UserError, match="the pool of 1 training images has none of class"):
        draw_shots(labels, 1, 3, pool=1)


def test_the_crop_is_the_published_one(make_run, tmp_path):
    """Short side to int(256/246 · size), then the middle: by two calls of Pillow, up to their rounding."""
    config = read_config(make_run(tmp_path / "run", image_size=(64, 64), patch_size=16))
    assert published_zoom(config) == 66 / 64
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    picture = coarse.resize((400, 300), Image.Resampling.BICUBIC)
    (tmp_path / "pictures").mkdir()
    picture.save(tmp_path / "pictures" / "a.png")
    data = DataConfig(source=str(tmp_path / "pictures"), image_size=(64, 64), holdout=0)
    ours = (center_view(open_dataset(data, "train"), [0], data, published_zoom(config))[0] + 1) * 127.5
    resized = picture.resize((88, 66), Image.Resampling.BICUBIC).crop((12, 1, 76, 65))
    theirs = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).float()
    assert (ours - theirs).abs().max() <= 2 and (ours - theirs).abs().mean() < 0.5


def test_noise_is_a_pictures_own():
    from umd.schedule import NoiseSchedule

    x, schedule = torch.zeros(3, 3, 8, 8), NoiseSchedule("cosine", 1000)
    seen, timesteps = noised(x, torch.tensor([5, 9, 5]), schedule, 300)
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1]) and timesteps.tolist() == [300]
    assert noised(x, torch.arange(3), schedule, 0)[1] is None


def test_every_block_at_every_time(run):
    probe_layers(run, Probe(shots=3, times=(0, 400), layers=True), read_config(run), QUIET)
    record = json.loads((run / "layers.json").read_text())["accuracy"]
    assert list(record) == ["0", "400"]
    assert list(record["0"]) == ["encoder 1", "decoder 1", "representation"]
    assert Image.open(run / "layers.png").size[0] > 300
    with pytest.raises(UserError, match="time 1001 is outside the noise schedule"):
        probe_layers(run, Probe(shots=3, times=(1001,), layers=True), read_config(run), QUIET)


def test_transfer_over_folders(run, tmp_path, capsys):
    sets = tmp_path / "sets"
    save_pictures(sets / "stl10" / "train", {"a": 12, "b": 12})
    save_pictures(sets / "stl10" / "val", {"a": 5, "b": 5})
    save_pictures(sets / "ucmerced", {"x": 40, "y": 40})
    save_pictures(sets / "tiny" / "train", {"a": 2, "b": 2})
    save_pictures(sets / "tiny" / "test", {"a": 2, "b": 2})
    transfer(run, sets, Transfer(), read_config(run), Console(width=200))
    out = capsys.readouterr().out
    record = json.loads((run / "transfer.json").read_text())
    assert list(record["sets"]) == ["stl10", "ucmerced"] and record["sets"]["stl10"]["test_images"] == 10
    assert "10 shots a class were asked for, but class a has 2" in record["refused"]["tiny"]
    assert "of the paper's sets not there: cifar100, dtd" in out
    for name, entry in record["sets"].items():
        assert f"{name}, 10-shot" in out and len(entry["rows"]) == 3
    with pytest.raises(UserError, match="has no subfolders: expected one a set"):
        transfer(run, sets / "ucmerced" / "x", Transfer(), read_config(run), QUIET)


@pytest.mark.slow
def test_thirty_thousand_linked_files(make_run, tmp_path, opened):
    """A folder of hard links: no more is read than shots and held-out pictures."""
    source = tmp_path / "pictures"
    save_pictures(tmp_path / "originals", {"one": 8})
    originals = sorted((tmp_path / "originals" / "one").iterdir())
    for split, each in (("train", 250), ("test", 50)):
        for c in range(100):
            (source / split / f"{c:03d}").mkdir(parents=True)
            for i in range(each):
                os.link(originals[(c + i) % 8], source / split / f"{c:03d}" / f"{i:04d}.png")
    run = make_run(tmp_path / "run", data=DataConfig(source=str(source)))
    results(run, shots=10)
    pictures = [file for file in opened if "/originals/" not in file]
    assert len(pictures) == len(set(pictures)) <= 3 * 10 * 100 + 5000
