"""`--profile`: what a run leaves in its folder, and that the run itself is the one it would have been."""

import gzip
import io
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from umd.config import ModelConfig
from umd.train.log import read_metrics
from umd.train.loop import train
from umd.train.profile import Profiler, profiled
from umd.train.run import RunConfig, finetune_config
from umd.train.settings import DataConfig
from umd.train.trace import read_trace

TINY = ModelConfig(image_size=(8, 8), patch_size=2, hidden_size=32, depth=1, decoder_depth=1, num_heads=2)


@pytest.fixture
def run(tmp_path):
    """Makes a run of some steps of 8 images and trains it: its configuration, and what it said."""
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "tiny.npz", images=images)

    def make(out="run", **changes) -> tuple[RunConfig, str]:
        config = RunConfig(
            out=tmp_path / out, model=TINY, data=DataConfig(source=str(tmp_path / "tiny.npz"), num_workers=0),
            batch_size=8, precision="fp32", log_every=1, draw_every=0, **changes,
        )  # fmt: skip
        console = Console(file=io.StringIO(), width=200)
        train(config, console)
        return config, console.file.getvalue()

    return make


def losses(config: RunConfig) -> list[float]:
    return [row["loss"] for row in read_metrics(config.out / "metrics.jsonl")]


def test_a_run_leaves_a_trace_and_tables_and_is_otherwise_the_same(run):
    config, said = run(steps=16, profile=True)
    folder = config.out / "profile"
    assert sorted(file.name for file in folder.iterdir()) == ["top.md", "trace.json.gz"]
    assert f"profile in {folder}: top.md" in said and "https://ui.perfetto.dev" in said and "on a GPU only" in said
    events = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
    names = [e["name"] for e in events]
    assert len([name for name in names if name.startswith("ProfilerStep#")]) == 3
    assert names.count("encoder") == names.count("head") == 3  # once a step

    top = (folder / "top.md").read_text()
    assert top.startswith("# 3 training steps under the profiler\n")
    tables = [part.splitlines() for part in top.split("\n## ")[1:]]
    parts = [line.split(" | ") for line in tables[0][4:]]
    expected = ["data", "corruption", "forward", "adaLN", "encoder", "decoder", "head", "loss"]
    expected += ["the rest of the backward pass", "clip", "optimizer", "outside of these"]
    assert [cells[0].removeprefix("| ") for cells in parts] == expected
    shares = [float(cells[-1].removesuffix("% |")) for cells in parts]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    trace = read_trace(folder)
    whole = sum(float(cells[1]) + float(cells[2]) for cells in parts)
    assert whole == pytest.approx(sum(w.ms for w in trace.work) / 3, abs=0.1)
    assert len(tables[1]) == 4 + 25 and any(" | encoder, backward | " in line for line in tables[1])

    plain, _ = run("plain", steps=16)
    assert losses(config) == losses(plain)
    assert not (plain.out / "profile").exists()


def test_a_run_made_without_goes_on_with_it(run):
    """It is the same run; of three steps that are left the last two are recorded."""
    run(steps=2)
    config, said = run(steps=5, profile=True)
    assert "goes on at step 2" in said and len(losses(config)) == 5
    assert read_trace(config.out).steps == 2


def test_a_full_disk_does_not_end_the_run(run, tmp_path):
    (tmp_path / "run" / "profile").mkdir(parents=True)
    os.symlink("/dev/full", tmp_path / "run" / "profile" / "trace.json.gz")
    config, said = run(steps=4, profile=True)
    assert "could not be written" in said and "No space left" in said and "training goes on" in said
    assert len(losses(config)) == 4 and "done: step 4" in said


def test_nor_does_a_folder_that_cannot_be_made(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").touch()
    _, said = run(steps=4, profile=True)
    assert "could not be written" in said and "done: step 4" in said


def test_training_that_ends_before_the_recorded_steps_says_so(tmp_path):
    said = []
    with profiled(True, tmp_path, torch.device("cpu"), said.append) as profiler:
        for _ in range(13):
            profiler.step()
    assert said == ["no profile: training ended after 13 steps, the profiler needed 15"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("steps", "wait", "last"), [(1, 0, 1), (4, 0, 4), (5, 0, 5), (9, 4, 9), (15, 10, 15)])
def test_of_few_steps_fewer_are_left_alone(steps, wait, last, tmp_path):
    profiler = Profiler(tmp_path, torch.device("cpu"), print, steps)
    profiler.recording.close()
    assert (profiler.wait, profiler.last) == (wait, last)


def test_what_starts_from_a_profiled_run_is_not_profiled(tmp_path):
    config = RunConfig(out=tmp_path, model=TINY, profile=True)
    assert not finetune_config(config, tmp_path, 3, tmp_path / "tuned").profile
    assert replace(config).profile
