"""What a run was trained on is known again, and other pictures are told or refused before anything is made of them."""

import os
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from umd import cli
from umd.config import ModelConfig
from umd.errors import UserError
from umd.train.data import open_dataset
from umd.train.distributed import World
from umd.train.fingerprint import SAMPLE, agreed_fingerprint, compared, difference, fingerprint, sums_of
from umd.train.loop import train
from umd.train.options import EncodePixels
from umd.train.pixels import encode_pixels
from umd.train.run import RunConfig, absolute, read_config, to_plain
from umd.train.settings import DataConfig, OptimConfig

QUIET = Console(quiet=True)
TINY = ModelConfig(image_size=(8, 8), patch_size=4, hidden_size=16, depth=1, decoder_depth=1, num_heads=2)


def pictures(root, *names, count=20, seed=0):
    """A picture is a function of its class and number, and of the seed."""
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            rng = np.random.default_rng((seed, i, *name.encode()))
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / name / f"{i}.png")


def opened(source, **options):
    return open_dataset(DataConfig(source=str(source), image_size=(8, 8), **options), "train")


def found(source, **options):
    return fingerprint(opened(source, **options))


@pytest.fixture
def photos(tmp_path):
    pictures(tmp_path / "photos", "bird", "cat", "dog")
    return tmp_path / "photos"


@pytest.fixture
def run(tmp_path, photos):
    """A run of one step on the photos."""
    config = RunConfig(
        out=tmp_path / "run", model=TINY, data=DataConfig(source=str(photos), num_workers=0),
        optim=OptimConfig(lr=0.01), batch_size=8, steps=1, precision="fp32", draw_every=0, device="cpu",
    )  # fmt: skip
    train(config, QUIET)
    return config


def refused(line: str, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(line.split())
    assert ended.value.code == 2
    return " ".join(capsys.readouterr().err.split())


# The fingerprint


def test_it_is_of_the_pictures_and_not_of_their_place(tmp_path, photos):
    before = found(photos)
    assert before == found(photos) and len(before["sample"]) == before["images"]
    shutil.copytree(photos, tmp_path / "moved")
    assert difference(before, found(tmp_path / "moved")) is None


def test_what_differs_is_said(photos):
    before = found(photos, holdout=0)

    def said():
        return difference(before, found(photos, holdout=0))

    (photos / "cat").rename(photos / "kitty")
    assert said() == ("class 'cat' became 'kitty'", True)
    (photos / "kitty").rename(photos / "cat")
    assert said() is None
    for i in range(3):
        (photos / "dog" / f"{i}.png").unlink()
    assert said() == ("3 pictures fewer, dog/0.png is gone", False)
    pictures(photos, "dog", count=30, seed=1)  # all of its names again, and more
    what, others = said()
    assert what == "10 pictures more, dog/20.png is new, 20 of 60 looked at are others, e.g. dog/0.png" and not others
    pictures(photos, "bird", "cat", "dog", count=30, seed=1)
    assert said().others
    pictures(photos, "emu")
    assert said().said.startswith("class 'emu' is new; ") and said().others
    shutil.rmtree(photos / "emu")
    shutil.rmtree(photos / "bird")
    pictures(photos, "ant", "eel", "fly", "gnu")
    assert said().said.startswith("class 'bird' is gone, classes 'ant', 'eel', 'fly' and 1 more are new; ")


def test_arrays_are_known_by_their_rows_and_labels(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (60, 6, 6, 3), dtype=np.uint8), np.arange(60) % 3

    def of(images, labels=None, **options):
        np.savez(tmp_path / "x.npz", images=images, **({} if labels is None else {"labels": labels}))
        return found(tmp_path / "x.npz", holdout=0, **options)

    before = of(images, labels)
    assert difference(before, of(images, labels)) is None
    assert difference(before, of(images, labels[::-1])) == ("other labels", True)
    assert difference(before, of(images)).said == "no labels, and not 3 classes"
    assert difference(before, of(images[:40], labels[:40])).others is False
    assert difference(before, of(np.concatenate([images] * 3), np.tile(labels, 3))).others is False
    other = images.copy()
    other[7, 0, 0, 0] ^= 1
    assert difference(before, of(other, labels)) == ("1 of 60 looked at are others, e.g. 7", False)
    assert difference(before, of(255 - images, labels)).others


@pytest.mark.parametrize("more", [1.5, 20])
def test_a_sample_knows_what_came_from_what_is_other(more):
    """A collection that grew, from either side, and one that shares no name with it."""
    names, rng = [f"n{i:08d}" for i in range(5000)], np.random.default_rng(0)
    grown = names + [f"new{i}" for i in range(int(5000 * (more - 1)))]

    def sample(names):
        sums = sums_of(names)
        return {names[row]: 7 for row in np.argsort(sums, kind="stable")[:SAMPLE]}

    for before, now in ((names, grown), (grown, names)):
        gone, new, changed, stayed = compared(sample(before), sample(now))
        came, went = (new, gone) if before is names else (gone, new)
        assert not went and not changed and stayed == pytest.approx(SAMPLE / more, rel=0.35)
        assert len(came) == pytest.approx(SAMPLE * (1 - 1 / more), rel=0.35)
    others = [f"{name}x" for name in rng.permutation(names)]
    assert compared(sample(names), sample(others))[3] == 0


def test_tars_and_clips_have_one_too(tmp_path, photos):
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(photos / "cat", "cat")
    before = found(tmp_path / "set.tar", holdout=0)
    assert before["sample"]["set.tar/cat/3.png"] == found(photos, holdout=0)["sample"]["cat/3.png"] > 0
    before = found(photos, holdout=0, num_frames=2)
    assert list(before["sample"]) == ["bird", "cat", "dog"]
    (photos / "dog" / "3.png").unlink()
    assert difference(before, found(photos, holdout=0, num_frames=2)).said.endswith("are others, e.g. dog")


def test_stored_pictures_are_known_by_their_checksums(photos, tmp_path):
    def of(out):
        encode_pixels(EncodePixels(str(photos), out, (12, 12)), QUIET)
        return found(out)

    before = of(tmp_path / "a")
    assert difference(before, of(tmp_path / "b")) is None
    pictures(photos, "bird", "cat", "dog", seed=1)
    assert difference(before, of(tmp_path / "c")).others


def test_a_rank_that_sees_other_data_is_told(photos, tmp_path):
    class Two(World):
        """Rank 1 of two, whose rank 0 sees the photos."""

        def agree(self, value):
            return found(photos), "a VAE"

    world = Two(1, 2, None)
    assert agreed_fingerprint(opened(photos), world, vae_hash="a VAE") == found(photos)
    pictures(tmp_path / "other", "bird", "cat")
    with pytest.raises(
        UserError, match=r"rank 1 sees \d+ pictures in 2 classes in other, and rank 0 \d+ pictures in 3"
    ):
        agreed_fingerprint(opened(tmp_path / "other"), world)
    copy = shutil.copytree(photos, tmp_path / "older copy")
    assert agreed_fingerprint(opened(copy), world, vae_hash="a VAE") == found(photos)
    with pytest.raises(UserError, match=r"rank 1 does not see the data of rank 0 in older copy \(another VAE\)"):
        agreed_fingerprint(opened(copy), world, vae_hash="another")
    first = sorted(copy.glob("*/*.*"))[0]
    first.write_bytes(first.read_bytes() + b"1")
    with pytest.raises(UserError, match=rf"\(1 of \d+ looked at are others, e.g. .*{first.name}\): give all hosts the"):
        agreed_fingerprint(opened(copy), world, vae_hash="a VAE")


# Runs


def test_a_source_is_kept_absolute(run, tmp_path, monkeypatch, photos):
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(tmp_path / "run")
    train(replace(run, data=replace(run.data, source="photos"), init=None), QUIET)
    assert read_config(run.out).data.source == str(photos)
    for name in ("emoji", "nowhere/photos", ""):
        assert absolute(replace(run, data=replace(run.data, source=name))).data.source == name
    assert absolute(replace(run, init=run.out.relative_to(tmp_path))).init == run.out


def test_the_same_relative_path_elsewhere_is_refused(run, tmp_path, monkeypatch):
    pictures(tmp_path / "else" / "photos", "bird", "cat", "dog", seed=5, count=25)
    monkeypatch.chdir(tmp_path / "else")
    with pytest.raises(
        UserError, match=r"data.source .*/photos, not .*/else/photos, which holds other pictures \(\d+ pic"
    ):
        train(replace(run, steps=2, data=replace(run.data, source="photos")), QUIET)


def test_a_renamed_class_is_refused_at_resume(run, photos):
    (photos / "cat").rename(photos / "zebra")
    with pytest.raises(
        UserError, match=r"holds a run with other pictures than .*photos has now \(class 'cat' became 'zebr"
    ):
        train(replace(run, steps=2), QUIET)
    (photos / "zebra").rename(photos / "cat")
    assert train(replace(run, steps=2), QUIET).name == "step-00000002"


def test_other_pictures_in_its_place_are_refused_and_more_are_told(run, photos, capsys):
    pictures(photos, "cat", count=22)
    train(replace(run, steps=2), Console(width=400))
    said = capsys.readouterr().out
    assert "photos changed: the run had" in said and " more, cat/" in said and f"--init {run.out}" in said
    pictures(photos, "bird", "cat", "dog", count=25, seed=9)
    with pytest.raises(UserError, match="looked at are others"):
        train(replace(run, steps=3), QUIET)


@pytest.mark.parametrize("command", ["probe RUN --shots 2", "finetune RUN --steps 1 --draw-every 0", "inpaint RUN"])
def test_commands_on_a_run_refuse_other_pictures(run, photos, capsys, command):
    (photos / "cat").rename(photos / "kitty")
    said = refused(command.replace("RUN", str(run.out)), capsys)
    assert f"{run.out} was trained on" in said and "pictures in 3 classes in" in said
    assert "class 'cat' became 'kitty'; " in said
    assert "Which are held out may differ too: put them back as they were, or" in said
    mend = {"p": "--source", "f": "--data.source", "i": "--image"}[command[0]]
    assert mend in said


def test_pictures_that_are_asked_for_are_taken_and_told(run, photos, capsys, tmp_path):
    (photos / "cat").rename(photos / "kitty")
    cli.main(f"probe {run.out} --shots 2 --seeds 0 --source {photos}".split())
    said = " ".join(capsys.readouterr().out.split())
    assert "class 'cat' became 'kitty'" in said and "2-shot" in said
    (photos / "kitty").rename(photos / "cat")
    cli.main(f"probe {run.out} --shots 2 --seeds 0".split())
    assert "was trained on" not in capsys.readouterr().out
    pictures(tmp_path / "other", "x", "y")
    (run.out / "config.yaml").write_text(
        (run.out / "config.yaml").read_text().replace(str(photos), str(tmp_path / "other"))
    )
    cli.main(f"probe {run.out} --shots 2 --seeds 0".split())
    assert f"in {photos}; {tmp_path}/other has" in " ".join(capsys.readouterr().out.split())


def test_a_probe_of_one_class_is_refused_with_the_path_to_give(run, photos, capsys):
    root = photos.parent / "deep"
    root.mkdir()
    shutil.copytree(photos, root / "photos")
    said = refused(f"probe {run.out} --shots 2 --source {root}", capsys)
    assert "all pictures of deep are of one class (photos): a probe of them is always right; " in said
    assert f"the 3 folders in {root}/photos (bird/ ...) are the classes, give {root}/photos" in said
    said = refused(f"finetune {run.out} --task classify --data.source {root} --steps 1", capsys)
    assert "deep has 1 class; a classifier needs 2 or more, a subfolder each; " in said
    assert f"give {root}/photos" in said


def test_weights_without_pictures_of_their_own_are_probed_on_any(make_run, tmp_path, photos, capsys):
    """Such as imported weights."""
    run = make_run(tmp_path / "imported", data=DataConfig(source=str(photos)))
    cli.main(f"probe {run} --shots 2 --seeds 0".split())
    assert "was trained on" not in capsys.readouterr().out


def test_a_run_of_pictures_that_are_not_here_still_samples(run, photos, capsys):
    shutil.rmtree(photos)
    assert f"the pictures of {run.out} are not at {photos}: give --source" in refused(f"probe {run.out}", capsys)
    cli.main(f"sample {run.out} --per-class 2 --steps 2".split())
    assert os.path.exists(run.out / "samples.png")
    assert to_plain(read_config(run.out))["data"]["source"] == str(photos)
