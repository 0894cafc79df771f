"""Training a classifier: it learns, resumes to the bit, starts from every kind of encoder, and is scored rightly."""

import contextlib
import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from umd import cli
from umd.checkpoint import load_checkpoint
from umd.config import (
    ClassifierConfig,
    ClassifierObjectiveConfig,
    DiffMAEConfig,
    DiffMAEObjectiveConfig,
    ModelConfig,
    ObjectiveConfig,
    classifier_config,
)
from umd.errors import UserError
from umd.report.figures import confusion_sheet
from umd.train.classify import score
from umd.train.data import center_view, open_dataset
from umd.train.log import read_metrics
from umd.train.loop import train
from umd.train.presets import PRESETS
from umd.train.run import RunConfig, classify_config, read_config
from umd.train.settings import DataConfig, OptimConfig
from umd.train.weights import load_model

QUIET = Console(quiet=True)
PLAIN = ClassifierObjectiveConfig(smoothing=0, mixup=0, cutmix=0, erase=0, drop_path=0)
TINY = ModelConfig(image_size=(8, 8), patch_size=2, hidden_size=32, depth=2, decoder_depth=1, num_heads=2)
MODEL = classifier_config(TINY, num_classes=4)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """16 pictures of noise in 4 classes and 4 held-out ones; nothing but memory tells the classes."""
    rng = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("data") / "tiny.npz"
    images, labels = rng.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8), np.arange(20) % 4
    np.savez(file, train_images=images[:16], train_labels=labels[:16], test_images=images[16:], test_labels=labels[16:])
    return file


@pytest.fixture
def tiny(tmp_path, source):
    def make(out="run", data=None, **changes) -> RunConfig:
        settings = {
            "out": tmp_path / out, "model": MODEL, "objective": PLAIN, "optim": OptimConfig(lr=0.03, clip=0),
            "data": DataConfig(source=str(source), num_workers=0, **(data or {})), "batch_size": 8, "steps": 6,
            "precision": "fp32", "device": "cpu", "log_every": 1, "draw_every": 0, **changes,
        }  # fmt: skip
        return RunConfig(**settings)

    return make


def test_it_learns_sixteen_pictures_by_heart(tiny):
    config = tiny(steps=60, batch_size=16, draw_every=30, data={"area_min": 1.0, "hflip": False})
    train(config, QUIET)
    dataset = open_dataset(config.data, "train")
    scores = score(load_model(config.out), dataset, config.data, torch.float32)
    assert len(dataset) == 16 and scores.top1 == 1 and torch.equal(scores.confusion, torch.eye(4).long() * 4)
    rows = [row for row in read_metrics(config.out / "metrics.jsonl") if "top-1" in row]
    assert [row["step"] for row in rows] == [30, 60]
    record = json.loads((config.out / "scores.json").read_text())
    assert record["top-1"] == rows[-1]["top-1"] and record["top-5"] == 1 and record["images"] == 4
    assert np.array(record["confusion"]).sum() == 4
    assert {file.name for file in (config.out / "images").iterdir()} == {
        "confusion-00000030.png",
        "confusion-00000060.png",
    }


def test_scores_that_cannot_be_written_end_no_run(tiny, capsys):
    config = tiny(draw_every=3)
    (config.out / "scores.json").mkdir(parents=True)
    train(config, Console(width=500))
    told = capsys.readouterr().out
    assert told.count("cannot write scores.json (") == 1 and "done: step 6" in told and "step 3: top-1 " in told
    assert load_checkpoint(config.checkpoints).step == 6


@pytest.mark.parametrize("linear", [False, True])
def test_a_run_resumed_from_its_middle_is_the_run_never_stopped(tiny, linear):
    objective = PLAIN if linear else ClassifierObjectiveConfig()
    config = tiny(
        model=replace(MODEL, linear=linear), objective=objective, save_every=3, accumulate=2,
        optim=OptimConfig(lr=0.03, clip=0, layer_decay=1.0 if linear else 0.65),
    )  # fmt: skip
    last = train(config, QUIET)
    again = replace(config, out=config.out.with_name("again"))
    shutil.copytree(config.out, again.out)
    shutil.rmtree(again.checkpoints / last.name)
    end = train(again, QUIET)
    assert end.name == last.name == "step-00000006"
    for part in ("model.safetensors", "optimizer.safetensors"):
        assert (end / part).read_bytes() == (last / part).read_bytes(), part


@pytest.mark.parametrize(
    "model",
    [
        TINY,
        replace(TINY, adaLN=False),
        DiffMAEConfig((8, 8), patch_size=2, hidden_size=32, depth=2, num_heads=2, decoder_hidden_size=16),
    ],
    ids=["UMD", "MAE", "DiffMAE"],
)  # fmt: skip
def test_it_starts_from_a_run_and_a_linear_probe_leaves_its_encoder(tiny, model):
    objective = DiffMAEObjectiveConfig() if isinstance(model, DiffMAEConfig) else ObjectiveConfig()
    first = tiny("first", model=model, objective=objective, steps=3)
    train(first, QUIET)
    probe = classify_config(first, first.out, first.out.with_name("linear"), linear=True, from_scratch=False)
    probe = replace(probe, model=replace(probe.model, num_classes=4), steps=3)
    train(probe, QUIET)
    x = center_view(dataset := open_dataset(first.data, "train"), range(len(dataset)), first.data)
    before, after = load_model(first.out, ema=False), load_model(probe.out)
    assert before.represent(x).std() > 1e-3
    torch.testing.assert_close(after.features(x), before.represent(x), rtol=1e-4, atol=1e-5)
    assert after.batch_norm.running_mean.abs().max() > 0
    with pytest.raises(UserError, match="has num_heads 2, not 4"):
        train(replace(probe, out=first.out.with_name("heads"), model=replace(probe.model, num_heads=4)), QUIET)
    wide = replace(probe, out=first.out.with_name("wide"), model=replace(probe.model, image_size=(8, 16)))
    if isinstance(model, DiffMAEConfig):
        with pytest.raises(UserError, match=r"has image_size \[8, 8\], not \[8, 16\]"):
            train(wide, QUIET)
    else:
        train(wide, QUIET)  # its positions are interpolated
        assert load_model(wide.out).pos_embed.shape == (32, 32)
    with pytest.raises(UserError, match="holds a classifier"):
        train(replace(probe, out=first.out.with_name("twice"), init=probe.out), QUIET)


def test_scores_are_those_of_the_logits_in_any_batch(tiny, monkeypatch):
    config = tiny(model=replace(MODEL, num_classes=4), steps=2)
    train(config, QUIET)
    model, dataset = load_model(config.out), open_dataset(config.data, "train")
    logits = model(center_view(dataset, range(16), config.data))
    labels = torch.from_numpy(dataset.labels)
    for batch in (5, 16, 100):
        scores = score(model, dataset, config.data, torch.float32, batch)
        assert scores.top1 == (logits.argmax(1) == labels).double().mean().item() and scores.top5 == 1  # of 4 classes
        assert scores.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
        for label, prediction in np.ndindex(4, 4):
            expected = ((labels == label) & (logits.argmax(1) == prediction)).sum()
            assert scores.confusion[label, prediction] == expected
    monkeypatch.setattr("umd.train.classify.MOST_CONFUSED", 3)  # that of ImageNet-21k would take 3.8 GB
    assert score(model, dataset, config.data, torch.float32, 100) == scores._replace(confusion=None)


@pytest.mark.parametrize("classes", [2, 12, 30, 120])
def test_the_confusion_plot_is_darkest_where_the_counts_are(classes):
    right = confusion_sheet(np.eye(classes, dtype=np.int64) * 10, [f"class {i}" for i in range(classes)])
    wrong = confusion_sheet(np.roll(np.eye(classes, dtype=np.int64) * 10, 1, axis=1), ["x"] * classes)
    assert right.dtype == np.uint8 and right.ndim == 3 and right.shape[2] == 3 and min(right.shape[:2]) > 300
    assert not np.array_equal(right, wrong)


@pytest.mark.parametrize(
    ("preset", "rate"),
    [("umd-b4", 5e-4), ("umd-l4", 1e-3), ("diffmae-l16", 1e-3), ("umd-tiny", 5e-4 * (1e-2 / 1.5e-4) ** 0.5)],
)
def test_the_rate_is_mae_s_where_the_pretraining_s_is_the_paper_s_and_follows_it_else(preset, rate):
    run = PRESETS[preset][1]
    for from_scratch in (False, True):
        assert classify_config(run, run.out, run.out, False, from_scratch).optim.lr == pytest.approx(rate, rel=1e-12)
    assert classify_config(run, run.out, run.out, linear=True, from_scratch=False).optim.lr == 1e-3


def test_layer_decay_is_for_classifiers(tiny):
    with pytest.raises(UserError, match="layer_decay is for classifiers"):
        tiny(model=TINY, objective=ObjectiveConfig(), optim=OptimConfig(layer_decay=0.5))
    with pytest.raises(UserError, match="a classifier network cannot be trained with a umd objective"):
        tiny(model=ClassifierConfig((8, 8)), objective=ObjectiveConfig())


# The command line


SMALL = "--model.image-size 8 8 --model.patch-size 2 --model.hidden-size 32 --model.depth 1 --model.num-heads 2"
SHORT = "--batch-size 8 --data.num-workers 0 --log-every 1 --precision fp32 --device cpu"


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
    """pictures/ in three classes, run/ pre-trained on it, classify/ fine-tuned by commands."""
    root = tmp_path_factory.mktemp("project")
    rng = np.random.default_rng(0)
    for name in "abc":
        (root / "pictures" / name).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(root / "pictures" / name / f"{i}.png")
    done(f"pretrain umd-tiny --data.source {root / 'pictures'} --out {root / 'run'} --steps 2 {SMALL} {SHORT}")
    done(f"finetune {root / 'run'} --task classify --steps 3 {SHORT}")
    return root


def test_the_commands(project):
    run = project / "run"
    done(f"finetune {run} --task=linear --steps 2 {SHORT}")
    done(f"finetune {run} --task classify --from-scratch --steps 2 --model.pool mean {SHORT}")
    for name, rate, init in (("classify", 0.65, run), ("linear", 1.0, run), ("scratch", 1.0, None)):
        out = project / f"run-{name}"
        scores = json.loads((out / "scores.json").read_text())
        assert scores["classes"] == ["a", "b", "c"] and 0 <= scores["top-1"] <= scores["top-5"] == 1
        rows = read_metrics(out / "metrics.jsonl")
        assert "top-1" in rows[-1] and "held_out_loss" in rows[-1] and list((out / "images").glob("confusion-*.png"))
        config = read_config(out)
        assert config.optim.layer_decay == rate and config.init == init
        assert config.model.num_classes == 3 and config.model.linear == (name == "linear")
    done(f"finetune {run} --task classify --steps 3 {SHORT}")  # there is nothing left to do
    done(f"pretrain {project / 'run-classify'} --steps 4")  # goes on from its own config.yaml
    done(f"probe {project / 'run-classify'} --shots 2 --allow-fewer")


def test_mistakes_are_one_sentence(project, tmp_path):
    run, classifier = project / "run", project / "run-classify"
    new = f"finetune {run} --task classify --out {tmp_path / 'new'} --steps 1 {SHORT}"
    assert "unknown task 'sort'; it is one of generate, classify, linear" in refused(f"finetune {run} --task sort")
    np.savez(tmp_path / "plain.npz", images=np.zeros((9, 8, 8, 3), np.uint8))
    assert "plain.npz has no labels to classify by" in refused(f"{new} --data.source {tmp_path / 'plain.npz'}")
    np.savez(tmp_path / "one.npz", images=np.zeros((9, 8, 8, 3), np.uint8), labels=np.zeros(9, np.int64))
    assert "one.npz has 1 class; a classifier needs 2 or more" in refused(f"{new} --data.source {tmp_path / 'one.npz'}")
    assert "has num_heads 2, not 4" in refused(f"{new} --model.num-heads 4")
    assert "has no held-out pictures to score on" in refused(f"{new} --data.holdout 0")
    assert "--objective.drop-path 1: must be at least 0 and below 1" in refused(f"{new} --objective.drop-path 1")
    assert "needs 2 images or more" in refused(new.replace("classify", "linear") + " --accumulate 8")
    assert "is a classifier already" in refused(f"finetune {classifier} --task classify")
    assert "is a classifier and draws nothing" in refused(f"sample {classifier}")
    assert "is a classifier and cannot fill a hole" in refused(f"inpaint {classifier}")
    assert "counts pre-training runs" in refused(f"plan {classifier}")
    assert "--from-scratch is for --task classify" in refused(f"finetune {run} --from-scratch")
    assert "--from-scratch is for --task classify" in refused(f"finetune {run} --task linear --from-scratch")
