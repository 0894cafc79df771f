"""The command line with a DiffMAE: pre-training, resuming, filling holes, and its mistakes in one sentence."""

import contextlib
import io
import json

import numpy as np
import pytest
from PIL import Image

from umd import cli

TINY = (
    "--model.image-size 8 8 --model.patch-size 2 --model.hidden-size 16 --model.depth 2 --model.num-heads 2 "
    "--model.decoder-hidden-size 8 --model.decoder-depth 2 --model.decoder-num-heads 2 --batch-size 8 --log-every 2 "
    "--draw-every 4 --device cpu --precision fp32 --data.num-workers 0 --seed 1"
)


def umd(line: str) -> tuple[int, str]:
    """(exit code, what was printed to stderr)."""
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            cli.main(line.split())
    except SystemExit as stop:
        return int(stop.code or 0), err.getvalue()
    return 0, err.getvalue()


def done(line: str) -> None:
    code, err = umd(line)
    assert code == 0, f"umd {line}\n{err}"


def refused(line: str) -> str:
    code, err = umd(line)
    assert code == 2 and err.startswith("umd: ") and err.count("\n") == 1, f"umd {line}\n{err}"
    return err


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp("diffmae")
    rng = np.random.default_rng(0)
    (root / "pictures").mkdir()
    for i in range(30):
        Image.fromarray(rng.integers(0, 256, (11, 9, 3), dtype=np.uint8)).save(root / "pictures" / f"{i}.png")
    done(f"pretrain diffmae-tiny --data.source {root / 'pictures'} --out {root / 'run'} --steps 4 {TINY}")
    return root


def test_a_run_is_resumed_to_the_bit(project, tmp_path):
    rows = {}
    for name, lengths in (("once", [6]), ("twice", [3, 6])):
        for steps in lengths:
            done(
                f"pretrain diffmae-tiny --data.source {project / 'pictures'} --out {tmp_path / name} --steps {steps} "
                f"{TINY} --log-every 1 --optim.warmup 0 --optim.lr 1e-3"
            )
        rows[name] = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    first = {row["step"]: row["loss"] for row in rows["once"]}
    again = {row["step"]: row["loss"] for row in rows["twice"]}
    assert list(first) == list(again) == [1, 2, 3, 4, 5, 6]
    assert [first[i] for i in (1, 2)] == [again[i] for i in (1, 2)]  # the curve of the rate differs from then on
    done(f"pretrain {project / 'run'} --steps 4")  # the configuration alone
    assert any((project / "run" / "images").glob("*filling*")) or any((project / "run" / "images").rglob("*filling*"))


def test_filling_pictures_with_a_drawn_mask(project, tmp_path):
    mask = np.zeros((8, 8), np.uint8)
    mask[3:5, 1:6] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    images = f"--image {project / 'pictures' / '0.png'} {project / 'pictures' / '1.png'}"
    for sampler in ("ddpm", "ddim"):
        done(
            f"inpaint {project / 'run'} {images} --mask {tmp_path / 'mask.png'} --samples 3 --steps 8 "
            f"--sampler {sampler} --out {tmp_path / sampler}"
        )
        folder, hole = tmp_path / sampler, mask > 0
        names = {
            f"{b}-{what}.png" for b in (1, 2) for what in ("masked", "original", *(f"sample-{i}" for i in (1, 2, 3)))
        }
        assert {file.name for file in folder.iterdir()} == names
        for b in (1, 2):
            read = {what: np.asarray(Image.open(folder / f"{b}-{what}.png")) for what in ("masked", "original")}
            assert (read["masked"][hole] == 128).all()
            samples = [np.asarray(Image.open(folder / f"{b}-sample-{i}.png")) for i in (1, 2, 3)]
            for sample in samples:
                assert np.array_equal(sample[~hole], read["original"][~hole])
            assert not np.array_equal(samples[0], samples[1])
        sheet, steps = (Image.open(tmp_path / f"{sampler}{end}.png").size for end in ("", "-steps"))
        assert sheet == (16 * (5 * 10 + 2), 16 * (2 * 10 + 2))  # masked, 3 samples, original; 2 pictures
        assert steps == (16 * (8 * 10 + 2), 16 * (6 * 10 + 2))  # masked, 6 views, original; 2 x 3 samples


@pytest.mark.parametrize("mask", ["center", "left", "random --mask-ratio 0.8"])
def test_filling_held_out_pictures(project, mask, tmp_path):
    done(f"inpaint {project / 'run'} --mask {mask} --samples 1 --steps 2 --out {tmp_path / 'x.png'}")
    assert (tmp_path / "x.png").exists()


def test_mistakes_are_one_sentence(project, tmp_path):
    run = project / "run"
    assert "fills holes" in refused(f"sample {run}")
    assert "takes no labels" in refused(f"finetune {run}")
    for name, array in (
        ("small", np.zeros((4, 4))),
        ("none", np.zeros((8, 8))),
        ("all", np.full((8, 8), 255)),
    ):
        Image.fromarray(array.astype(np.uint8)).save(tmp_path / f"{name}.png")
    assert "is 4x4; this model's pictures are 8x8" in refused(f"inpaint {run} --mask {tmp_path / 'small.png'}")
    assert "hides nothing" in refused(f"inpaint {run} --mask {tmp_path / 'none.png'}")
    assert "hides everything" in refused(f"inpaint {run} --mask {tmp_path / 'all.png'}")
    striped = np.zeros((8, 8), np.uint8)
    striped[::2] = 255
    Image.fromarray(striped).save(tmp_path / "striped.png")
    assert "touches every 2x2 patch of picture 0" in refused(f"inpaint {run} --mask {tmp_path / 'striped.png'}")
    assert "above 0 and below 1" in refused(f"inpaint {run} --mask random --mask-ratio 1")
    new = f"pretrain diffmae-tiny --data.source {project / 'pictures'} --out {tmp_path / 'new'} --steps 1 {TINY}"
    assert "above 0 and below 1" in refused(f"{new} --objective.mask-ratio 1.5")
    assert "not divisible by patch size 3" in refused(f"{new} --model.patch-size 3")
    np.save(tmp_path / "features.npy", np.zeros((3, 16, 4), np.float32))
    sentence = refused(f"{new} --objective.target {tmp_path / 'features.npy'} --model.target-size 4")
    assert "are float32 [3, 16, 4]; expected floats [" in sentence
    assert "holds a diffmae network, not a umd one" in refused(
        f"pretrain umd-tiny --data.source {project / 'pictures'} --out {run} --steps 9 --batch-size 8 --device cpu"
    )


def test_a_feature_target_trains_and_says_that_it_fills_no_holes(project, tmp_path):
    from umd.train.data import open_dataset
    from umd.train.settings import DataConfig

    count = len(open_dataset(DataConfig(source=str(project / "pictures"), image_size=(8, 8)), "train"))
    features = np.random.default_rng(0).standard_normal((count, 16, 4), dtype=np.float32)
    np.save(tmp_path / "features.npy", features)
    command = (
        f"pretrain diffmae-tiny --data.source {project / 'pictures'} --out {tmp_path / 'run'} --steps 3 {TINY} "
        f"--objective.target {tmp_path / 'features.npy'} --model.target-size 4"
    )
    done(command)
    assert "predicts another target than pixels" in refused(f"inpaint {tmp_path / 'run'}")
    np.save(tmp_path / "features.npy", 2 * features)
    assert "other targets than" in refused(command)
