"""The `umd` command: what is printed, a whole small project from pictures to samples, and every mistake a sentence."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import umd as package
from umd import cli
from umd.checkpoint import list_checkpoints
from umd.cli import COMMANDS, Command, main
from umd.train import options as option_classes
from umd.train.log import read_metrics
from umd.train.presets import PRESETS
from umd.train.run import RunConfig

ROOT = Path(__file__).parents[2]
TINY = "--model.image-size 8 8 --model.patch-size 2 --model.hidden-size 32 --model.depth 1 --model.decoder-depth 1"
TINY += " --model.num-heads 2 --batch-size 8 --data.num-workers 0 --log-every 1 --precision fp32"


def umd(line: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `umd LINE`. Anything but SystemExit is raised: a stack trace for the user."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(shlex.split(line))
        except SystemExit as end:
            code = end.code or 0
    return code, out.getvalue(), err.getvalue()


def done(line: str) -> str:
    code, out, err = umd(line)
    assert code == 0, f"umd {line}\n{out}\n{err}"
    return out


def refused(line: str) -> str:
    """The sentence with which `umd LINE` is refused: exit code 2, one line on stderr."""
    code, out, err = umd(line)
    assert code == 2, f"umd {line}\n{out}\n{err}"
    assert err.startswith("umd: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err.removeprefix("umd: ").rstrip("\n")


# Help and options


def test_help_lists_every_command():
    for line in ("", "--help", "-h", "help"):
        out = done(line)
        for name, command in COMMANDS.items():
            assert re.search(rf"^ +{name} +{re.escape(command.what.split()[0])}", out, re.M), name
    assert done("--version") == f"umd {package.__version__}\n"


def test_every_command_has_a_help_of_its_own():
    """With all its options, also where a run that decides their defaults is not named."""
    for name, command in COMMANDS.items():
        shown = done(f"{name} --help")
        assert f"umd {name}" in shown
        for field in dataclasses.fields(getattr(option_classes, command.options)) if command.options else ():
            positional = field.name in ("kind", "path", "run")  # shown as {dit,...}, PATH, RUN
            assert positional or field.name.replace("_", "-") in shown
    assert all("--data.source" in done(f"{name} --help") for name in ("pretrain", "finetune", "plan"))
    assert all(name in done("pretrain --help") for name in PRESETS)
    assert "--objective.mask-ratio" in done("pretrain umd-b4 --help")


@pytest.mark.parametrize(
    ("line", "nearest"),
    [
        ("pretrian", "did you mean `umd pretrain`?"),
        ("sampel runs/x", "did you mean `umd sample`?"),
        ("xyz", "`umd --help` lists the commands"),
        ("pretrain umd-b", "did you mean umd-b4?"),
        ("pretrain mae-b", "did you mean mae-b4?"),
        ("pretrain qqq", "it is one of umd-tiny, "),
    ],
)
def test_an_unknown_name_gets_the_nearest(line, nearest):
    assert nearest in refused(line)


@pytest.mark.parametrize(
    ("line", "nearest"),
    [
        ("pretrain umd-tiny --batchsize 3", "--batch-size"),
        ("pretrain umd-tiny --objective.mask-ration 0.5", "--objective.mask-ratio"),
        ("pretrain umd-tiny --mask-ratio 0.5", "--objective.mask-ratio"),
        ("sample runs/x --cfg 4", "--cfg-scale"),
        ("inpaint runs/x --masks left", "--mask"),
        ("probe runs/x --shot 4", "--shots"),
        ("demo --minuts 3", "--minutes"),
        ("bench step --batches 3", "--batch"),
    ],
)
def test_an_unknown_option_gets_the_nearest(line, nearest):
    code, _, err = umd(line)
    assert code == 2 and "Unrecognized option" in err and nearest in err and "Traceback" not in err


@pytest.mark.parametrize("line", ["pretrain umd-tiny --batch-size many", "pretrain umd-tiny --precision fp16"])
def test_a_value_of_the_wrong_kind_names_the_option(line):
    code, _, err = umd(line)
    assert code == 2 and line.split()[2] in err and "Traceback" not in err


def test_switches_come_in_pairs():
    default = PRESETS["umd-tiny"][1]
    options = ["--data.no-hflip", "--model.no-adaLN", "--model.no-norm-affine", "--compile", "--no-checkpointing"]
    config = cli.parse(RunConfig, "pretrain umd-tiny", options, default)
    assert not (config.data.hflip or config.model.adaLN or config.model.norm_affine or config.checkpointing)
    assert config.compile and default.data.hflip and default.model.adaLN


def test_a_length_replaces_that_of_the_preset_whatever_its_unit():
    default = PRESETS["umd-tiny"][1]
    for options, length in (
        (["--steps", "7"], (0, 7, 0)),
        (["--steps=7"], (0, 7, 0)),
        (["--epochs", "0.5"], (0.5, 0, 0)),
        (["--minutes", "3", "--steps", "7"], (0, 7, 3)),
        (["--batch-size", "8"], (default.epochs, default.steps, default.minutes)),
    ):
        config = cli.parse(RunConfig, "pretrain", options, cli.with_length(default, options))
        assert (config.epochs, config.steps, config.minutes) == length
    options = ["--save-minutes", "1", "--draw-minutes=2"]
    config = cli.parse(RunConfig, "pretrain", options, cli.with_length(default, options))
    assert default.save_every and config.save_every is config.draw_every is None
    assert (config.save_minutes, config.draw_minutes) == (1, 2)


# A whole project


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """pictures/ with three classes; runs/mine pre-trained on it, runs/mine-labels fine-tuned."""
    root = tmp_path_factory.mktemp("project")
    rng = np.random.default_rng(0)
    for label, colour in enumerate(("red", "green", "blue")):
        (root / "pictures" / colour).mkdir(parents=True)
        for i in range(16):
            picture = rng.integers(0, 128, (11, 9, 3), dtype=np.uint8)
            picture[..., label] += 127
            Image.fromarray(picture).save(root / "pictures" / colour / f"{i}.png")
    source, run = shlex.quote(str(root / "pictures")), root / "runs" / "mine"
    root.joinpath("pretrain.txt").write_text(
        done(f"pretrain umd-tiny --data.source {source} --out {run} --steps 4 {TINY}")
    )
    root.joinpath("finetune.txt").write_text(
        done(f"finetune {run} --steps 4 --batch-size 20 --optim.lr 0.01 --optim.ema 0.9")
    )
    return root


@pytest.fixture
def run(project):
    return project / "runs" / "mine"


@pytest.fixture
def labelled(project):
    return project / "runs" / "mine-labels"


def test_pretraining_and_fine_tuning_leave_whole_run_folders(project, run, labelled):
    for folder, classes, name in ((run, 0, "pretrain"), (labelled, 3, "finetune")):
        assert {file.name for file in folder.iterdir()} >= {
            "config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "images",
        }  # fmt: skip
        assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3, 4]
        assert [path.name for path in list_checkpoints(folder / "checkpoints")] == ["step-00000004"]
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["model"]["num_classes"] == classes and config["data"]["image_size"] == [8, 8]
        printed = (project / f"{name}.txt").read_text()
        assert f"{name}: done: step 4" in printed and str(folder / "checkpoints" / "step-00000004") in printed
    assert (labelled / "images" / "samples-00000004.png").exists()


def test_the_same_command_goes_on_with_the_run_and_so_does_its_folder(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(run), str(copy)))
    assert "goes on at step 4" in done(f"pretrain {copy} --steps 6")
    assert "goes on at step 6" in done(f"pretrain {copy / 'config.yaml'} --steps 7")
    assert [row["step"] for row in read_metrics(copy / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]


def test_probe(run):
    table = done(f"probe {run} --shots 5 --seeds 0 1 --l2 1 1024")
    results = json.loads((run / "probe.json").read_text())
    assert len(results) == 3 and "raw pixels" in results
    for name, result in results.items():
        assert name in table and f"{result['mean']:.3f}" in table
        assert result["shots"] == 5 and result["seeds"] == [0, 1] and 0 <= result["mean"] <= 1
    assert results["raw pixels"]["mean"] > 0.9  # the classes are colours


def test_samples(labelled, tmp_path):
    line = f"sample {labelled} --classes 2 0 --per-class 3 --steps 4 --out"
    out = done(f"{line} {tmp_path / 'one.png'} --seed 3")
    assert f"6 samples in {tmp_path / 'one.png'} and {tmp_path / 'one.npz'}" in out
    stored = np.load(tmp_path / "one.npz")
    assert stored["arr_0"].shape == (6, 8, 8, 3) and stored["arr_0"].dtype == np.uint8
    assert stored["arr_1"].tolist() == [2, 2, 2, 0, 0, 0] and stored["arr_1"].dtype == np.int64
    sheet = np.asarray(Image.open(tmp_path / "one.png"))
    assert sheet.shape == (16 * (2 * 10 + 2), 16 * (3 * 10 + 2), 3)  # 8 pixels and 2 between, each 16 times
    assert np.array_equal(sheet[::16, ::16][2:10, 2:10], stored["arr_0"][0])

    done(f"{line} {tmp_path / 'two'} --seed 3")  # .png is added
    for suffix in ("png", "npz"):
        assert (tmp_path / f"two.{suffix}").read_bytes() == (tmp_path / f"one.{suffix}").read_bytes()
    done(f"{line} {tmp_path / 'batched'} --seed 3 --batch 4")
    assert (tmp_path / "batched.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()
    done(f"{line} {tmp_path / 'other'} --seed 4")
    assert not np.array_equal(np.load(tmp_path / "other.npz")["arr_0"], stored["arr_0"])


def test_sampling_without_labels_and_by_default(run, labelled):
    done(f"sample {run} --per-class 2 --steps 3")
    assert np.load(run / "samples.npz")["arr_1"].tolist() == [-1, -1]  # unconditional
    done(f"sample {labelled} --per-class 1 --steps 3 --no-ema --eta 0 --cfg-scale 1")
    assert np.load(labelled / "samples.npz")["arr_1"].tolist() == [0, 1, 2]


def test_classes_are_asked_for_by_name_and_named_in_the_npz(labelled, tmp_path):
    """ADM's layout stays: its evaluator reads arr_0 and arr_1 by these names."""
    done(f"sample {labelled} --classes red 0 --per-class 1 --steps 2 --out {tmp_path / 'a'}")
    stored = np.load(tmp_path / "a.npz")
    assert stored.files == ["arr_0", "arr_1", "classes"]
    assert [stored["classes"][label] for label in stored["arr_1"]] == ["red", "blue"]


def test_inpainting_with_a_drawn_mask(project, run, tmp_path):
    mask = np.zeros((8, 8), np.uint8)
    mask[2:5, 1:7] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    pictures = [project / "pictures" / "red" / "0.png", project / "pictures" / "blue" / "1.png"]
    line = f"inpaint {run} --image {pictures[0]} {pictures[1]} --mask {tmp_path / 'mask.png'} --samples 2 --steps 4"
    assert str(tmp_path / "a.png") in done(f"{line} --out {tmp_path / 'a.png'}")
    sheet = np.asarray(Image.open(tmp_path / "a.png"))[::16, ::16].astype(int)
    assert sheet.shape == (2 * 10 + 2, 4 * 10 + 2, 3)
    cells = np.stack([[sheet[2 + 10 * r :, 2 + 10 * c :][:8, :8] for c in range(4)] for r in range(2)])
    hole = mask > 0
    for masked, *filled, original in cells:
        assert (masked[hole] == 128).all() and np.array_equal(masked[~hole], original[~hole])
        for picture in filled:
            assert np.abs(picture[~hole] - original[~hole]).max() <= 1
            assert np.abs(picture[hole] - original[hole]).max() > 8
        assert not np.array_equal(filled[0], filled[1])
    done(f"{line} --out {tmp_path / 'b.png'}")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("mask", ["center", "left", "random"])
def test_inpainting_held_out_pictures(run, mask):
    done(f"inpaint {run} --mask {mask} --samples 1 --steps 2 --resample 1")
    assert (run / "inpainting.png").exists()


def test_imported_weights_are_a_run(tmp_path):
    """The authors' tiny network, 10 classes and images of 16x16 (tests/data/README.md)."""
    done(f"import small-vision {ROOT / 'tests/data/umd_adaln.npz'} --out {tmp_path / 'imported'}")
    done(f"sample {tmp_path / 'imported'} --per-class 1 --steps 2 --cfg-scale 1.5")
    with np.load(tmp_path / "imported/samples.npz") as arrays:
        assert arrays["arr_0"].shape == (10, 16, 16, 3) and arrays["arr_1"].tolist() == list(range(10))


# Mistakes


@pytest.fixture
def pictures(tmp_path):
    """A folder with one picture in class a and none in class b, to be changed."""
    (tmp_path / "pictures" / "a").mkdir(parents=True)
    (tmp_path / "pictures" / "b").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "a" / "1.png")
    return tmp_path / "pictures"


def test_sources_that_cannot_be_trained_on(pictures, tmp_path):
    train = f"pretrain umd-tiny {TINY} --steps 1 --out {tmp_path / 'run'} --data.source"
    assert f"class folder {pictures / 'b'} has no images" in refused(f"{train} {pictures}")
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'} has no images" in refused(f"{train} {tmp_path / 'empty'}")
    assert "does not exist" in refused(f"{train} {tmp_path / 'nowhere'}")
    whole = (pictures / "a" / "1.png").read_bytes()
    (pictures / "b").rmdir()
    (pictures / "a" / "2.png").write_bytes(whole[: len(whole) // 2])
    sentence = refused(f"{train} {pictures} --data.holdout 0")
    assert f"cannot read image {pictures / 'a' / '2.png'}" in sentence and "umd check-data" in sentence
    assert not list_checkpoints(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            "--model.image-size 30 30 --model.patch-size 4",
            "image size 30x30 is not divisible by patch size 4; use 28x28",
        ),
        ("--objective.mask-ratio 0.99", "mask ratio 0.99 leaves no patch of 16 visible"),
        ("--objective.mask-ratio 1", "--objective.mask-ratio 1: must be at least 0 and below 1"),
        ("--objective.mask-ratio-no-noise 0.95", "mask ratio 0.95 leaves no patch of 16 visible"),
        ("--objective.mask-ratio-no-noise 0", "noise-free samples would have nothing to predict"),
        ("--objective.no-noise-prob 1.5", "--objective.no-noise-prob 1.5: must be at least 0 and at most 1"),
        ("--accumulate 3", "batch_size 8 is not divisible by accumulate 3"),
        ("--device cuda:99", "device 'cuda:99' is not here"),
        ("--device gpu", "unknown device 'gpu'; expected auto, cpu, cuda or cuda:N"),
        ("--init nowhere", "no folder nowhere"),
        ("--seed -1", "--seed -1: must be at least 0"),
        ("--optim.lr 0", "--optim.lr 0: must be above 0"),
    ],
)
def test_settings_that_cannot_be(project, tmp_path, options, said):
    line = f"pretrain umd-tiny --data.source {project / 'pictures'} --out {tmp_path / 'run'} --steps 1 {TINY} {options}"
    assert said in refused(line)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_resuming_with_another_network(run, project):
    line = f"pretrain umd-tiny --data.source {project / 'pictures'} --out {run} --steps 6 {TINY}"
    assert "depth 1, not 2" in refused(f"{line} --model.depth 2")
    assert "num_heads 2, not 4" in refused(f"{line} --model.num-heads 4")
    assert "batch_size 8, not 16" in refused(f"{line} --batch-size 16")


def test_folders_that_cannot_be_written(project, run, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/umd")):
        line = f"pretrain umd-tiny --data.source {project / 'pictures'} --steps 1 {TINY} --out {out}"
        assert f"cannot make the folder {out} " in refused(line)
    assert "cannot make the folder" in refused(
        f"sample {run} --steps 1 --per-class 1 --out {tmp_path / 'file' / 'a.png'}"
    )


def test_memory_that_cannot_be_had_is_a_sentence(monkeypatch):
    """Sizes beyond the address space, so that no machine has them."""
    for make in (lambda: torch.empty(2**62), lambda: torch.empty(2**50), lambda: np.empty(2**50)):
        monkeypatch.setitem(COMMANDS, "doctor", Command("", lambda arguments, make=make: make()))
        assert "there is not enough memory (" in refused("doctor")
    with pytest.raises(RuntimeError, match="must match"):  # any other is a fault of ours, and shows where
        monkeypatch.setitem(COMMANDS, "doctor", Command("", lambda arguments: torch.ones(2) + torch.ones(3)))
        umd("doctor")


def test_divergence(project, tmp_path):
    out = tmp_path / "run"
    line = f"pretrain umd-tiny --data.source {project / 'pictures'} --out {out} --steps 9 {TINY}"
    sentence = refused(f"{line} --optim.lr 1e30 --optim.warmup 0")
    assert "not finite at step 2" in sentence and str(out / "nan-dump.json") in sentence
    assert json.loads((out / "nan-dump.json").read_text())["step"] == 2


def test_labels_where_there_are_none(project, run, tmp_path):
    assert "class 1 is unknown: this run was trained without labels" in refused(f"sample {run} --classes 1")
    np.savez(tmp_path / "plain.npz", images=np.zeros((30, 8, 8, 3), np.uint8))
    plain = f"--data.source {tmp_path / 'plain.npz'}"
    assert "plain.npz has no labels to fine-tune with" in refused(f"finetune {run} {plain} --steps 1 --batch-size 8")
    done(f"pretrain umd-tiny {plain} --out {tmp_path / 'run'} --steps 1 {TINY}")
    assert "a probe needs labels, and plain.npz has none" in refused(f"probe {tmp_path / 'run'}")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--classes 7", "class 7 is unknown: this run has 3 classes, 0 to 2"),
        ("--classes -1", "class -1 is unknown"),
        ("--classes rde", "this run has 3 classes, 0 to 2 (blue, green, red); did you mean red?"),
        ("--classes 0 blue", "class 0 is given twice"),
        ("--per-class 0", "--per-class 0: must be at least 1"),
        ("--batch 0", "--batch 0: must be at least 1"),
        ("--steps 0", "--steps 0: must be at least 1"),
        ("--steps 1001", "cannot sample in 1001 steps"),
        ("--eta 2 --steps 1", "--eta 2: must be at least 0 and at most 1"),
    ],
)
def test_samples_that_cannot_be(labelled, options, said):
    assert said in refused(f"sample {labelled} {options}")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "100 shots a class were asked for, but class "),
        ("--shots 0", "--shots 0: must be at least 1"),
        ("--shots 2 --seeds", "--seeds (nothing): must be one or more"),
        ("--shots 2 --l2 0", "--l2 0: must be above 0"),
    ],
)
def test_probes_that_cannot_be(run, options, said):
    assert said in refused(f"probe {run} {options}")


def test_masks_that_do_not_fit(project, run, tmp_path):
    for name, size, value in (("small", 7, 255), ("white", 8, 255), ("black", 8, 0)):
        Image.new("L", (size, size), value).save(tmp_path / f"{name}.png")
    (tmp_path / "text.png").write_text("no picture")
    line = f"inpaint {run} --steps 1 --samples 1 --mask"
    photo = project / "pictures" / "red" / "0.png"
    assert f"is 7x7; give it the size of {photo}, 11x9, or of the model's pictures, 8x8" in refused(
        f"{line} {tmp_path / 'small.png'} --image {photo}"
    )
    assert "hides everything" in refused(f"{line} {tmp_path / 'white.png'}")
    assert "hides nothing" in refused(f"{line} {tmp_path / 'black.png'}")
    for ratio, hides in ((1e-9, "nothing"), (1 - 1e-9, "everything")):
        assert f"the random mask hides {hides}" in refused(f"{line} random --mask-ratio {ratio}")
    for mask in ("centre", tmp_path / "text.png"):
        assert "cannot be read; expected center, left, random, or a black and white PNG" in refused(f"{line} {mask}")
    assert "cannot read image" in refused(f"{line} left --image {tmp_path / 'text.png'}")
    assert "--samples 0: must be at least 1" in refused(f"inpaint {run} --samples 0")


def test_runs_that_are_not_there(tmp_path):
    for command in ("sample", "inpaint", "probe", "finetune"):
        assert f"no run configuration at {tmp_path}" in refused(f"{command} {tmp_path}")
        assert f"umd {command} needs RUN first" in refused(command)
    assert "no run configuration" in refused(f"pretrain {tmp_path / 'x.yaml'}")
    assert "There is no record.json" in refused(f"report {tmp_path}")


def damage(run: Path, to: Path, change) -> Path:
    """A copy of a run with its model file changed by `change(bytes) -> bytes`."""
    copy = shutil.copytree(run, to)
    (copy / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(run), str(copy)))
    file = list_checkpoints(copy / "checkpoints")[-1] / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    return copy


def test_a_corrupt_checkpoint(run, tmp_path):
    copy = damage(run, tmp_path / "copy", lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    for line in (
        f"sample {copy} --steps 1",
        f"finetune {copy} --steps 1 --batch-size 20",
        f"pretrain {copy} --steps 9",
    ):
        sentence = refused(line)
        assert "model.safetensors is damaged: it differs from its checksum" in sentence


def test_a_truncated_checkpoint(run, tmp_path):
    """Passed over with a warning, on one line; without another one that is all there is to load."""
    copy = damage(run, tmp_path / "copy", lambda data: data[:100])
    ended = subprocess.run(
        [sys.executable, "-m", "umd.cli", "sample", str(copy), "--steps", "1"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 2
    warning, sentence = ended.stderr.splitlines()
    assert warning.startswith("warning: ") and "model.safetensors is damaged: it has 100 bytes" in warning
    assert sentence.startswith(f"umd: There is no checkpoint in {copy / 'checkpoints'}")
