"""`umd sample`: the same bytes on any number of ranks, at any batch, after any interruption."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from umd.checkpoint import load_checkpoint, save_checkpoint
from umd.conditions import denoiser
from umd.errors import UserError
from umd.sampler import ddim_sample
from umd.schedule import schedule_of
from umd.train import opened
from umd.train.options import Sample
from umd.train.run import read_config
from umd.train.sample import Drawer, draw, drawn_labels, in_calls_of

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def run(make_run, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("sample") / "run")


def sample(run: Path, out: Path, ranks: int = 1, **options) -> tuple[bytes, ...]:
    """What one rank after another leaves at `out`."""
    for rank in reversed(range(ranks)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANK", str(rank))
            patch.setenv("WORLD_SIZE", str(ranks))
            draw(run, Sample(out=out, **options), read_config(run), QUIET)
    return tuple(out.with_suffix(suffix).read_bytes() for suffix in (".png", ".npz", ".json"))


def test_the_same_bytes_on_any_number_of_ranks_and_at_any_batch(run, tmp_path):
    options = dict(count=150, steps=3, cfg_scale=2.0)
    one = sample(run, tmp_path / "one", **options)
    for name, others in (("two", dict(ranks=2, batch=7)), ("three", dict(ranks=3, batch=64))):
        assert sample(run, tmp_path / name, **options, **others) == one
    assert not list(tmp_path.glob(".*")), "parts are left"
    with np.load(tmp_path / "one.npz") as arrays:
        assert list(arrays) == ["arr_0", "arr_1"]
        assert arrays["arr_0"].shape == (150, 8, 8, 3) and arrays["arr_0"].dtype == np.uint8
        assert len(np.unique(arrays["arr_0"].reshape(150, -1), axis=0)) == 150


def test_a_checkpoint_is_taken_by_its_step(run, tmp_path):
    """As the newest is another one for each rank of a command, while the run still trains."""
    options = dict(count=3, steps=3)
    before = sample(run, tmp_path / "before", **options)
    longer = shutil.copytree(run, tmp_path / "longer")
    newest = load_checkpoint(longer / "checkpoints")
    tensors = {part: {name: 2 * x for name, x in named.items()} for part, named in newest.tensors.items()}
    save_checkpoint(longer / "checkpoints", newest.step + 5, tensors, newest.state)
    assert sample(longer, tmp_path / "newest", **options)[1] != before[1]
    assert sample(longer, tmp_path / "named", step=newest.step, **options)[1] == before[1]
    with pytest.raises(
        UserError, match=rf"no checkpoint of step 3: .*checkpoints has {newest.step}, {newest.step + 5}$"
    ):
        sample(longer, tmp_path / "none", step=3, **options)


@pytest.mark.parametrize(
    "options",
    [dict(sampler=name) for name in ("ddpm", "dpm++", "heun", "unipc")]
    + [dict(cfg_interval=(100, 600), cfg_schedule="linear", cfg_channels=2), dict(predict="x_start")],
    ids=str,
)
def test_every_sampler_draws_the_same_bytes_by_anyone_and_after_an_interruption(run, tmp_path, monkeypatch, options):
    if options.get("sampler", "ddpm") != "ddpm":
        pytest.importorskip("diffusers")
    options = dict(count=140, steps=3, cfg_scale=2.0) | options
    one = sample(run, tmp_path / "one", **options)
    assert sample(run, tmp_path / "two", ranks=2, batch=7, **options) == one
    pictures = Drawer.pictures

    def until_the_second(drawer, first, last, advance):
        if first >= 64:
            raise KeyboardInterrupt
        return pictures(drawer, first, last, advance)

    monkeypatch.setattr("umd.train.sample.Drawer.pictures", until_the_second)
    with pytest.raises(KeyboardInterrupt):
        sample(run, tmp_path / "cut", **options)
    monkeypatch.undo()
    assert sample(run, tmp_path / "cut", **options) == one


def test_samples_are_those_of_the_sampler(run, tmp_path):
    """Drawn at once, without parts: up to rounding."""
    sample(run, tmp_path / "one", count=70, steps=3, cfg_scale=2.0, seed=5)
    config = read_config(run)
    model, device, dtype = opened.open_run(config)
    with np.load(tmp_path / "one.npz") as arrays:
        pictures, labels = arrays["arr_0"], torch.from_numpy(arrays["arr_1"])
    alone = ddim_sample(
        denoiser(model, dtype), (70, 3, 8, 8), schedule_of(config.schedule), num_steps=3,
        labels=labels, null_label=3, cfg_scale=2.0, seed=5,
    )  # fmt: skip
    expected = ((alone + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    assert np.abs(pictures - expected).mean() < 2, "bf16"


def test_progress_counts_what_is_asked_for(run):
    """40 images are two groups of 32."""
    config, seen = read_config(run), []
    model, _, dtype = opened.open_run(config)
    drawer = Drawer(
        model, schedule_of(config.schedule), torch.arange(40) % 3, 40, num_steps=2, cfg_scale=1.0, eta=0.0,
        seed=0, clip=True, dtype=dtype,
    )  # fmt: skip
    assert len(drawer.pictures(0, 40, seen.append)) == 40 == max(seen) and seen == sorted(seen)


def test_what_is_there_is_kept_and_the_rest_is_drawn(run, tmp_path, monkeypatch):
    """Ended in the middle, the command goes on with the parts that are missing; finished, it draws nothing."""
    options = dict(count=200, steps=2)
    whole = sample(run, tmp_path / "whole", **options)
    drawn = []
    pictures = Drawer.pictures

    def some(drawer, first, last, advance):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(first)
        return pictures(drawer, first, last, advance)

    monkeypatch.setattr("umd.train.sample.Drawer.pictures", some)
    with pytest.raises(KeyboardInterrupt):
        sample(run, tmp_path / "cut", **options)
    (parts,) = tmp_path.glob(".cut-*")
    assert len(list(parts.glob("*.npy"))) == 2 and not (tmp_path / "cut.npz").exists()
    drawn.clear()
    assert sample(run, tmp_path / "cut", **options) == whole and drawn == [128, 192]
    monkeypatch.setattr("umd.train.sample.Drawer.pictures", None)  # nothing is drawn any more
    assert sample(run, tmp_path / "cut", **options) == whole


def test_a_damaged_part_is_drawn_anew(run, tmp_path, monkeypatch):
    whole = sample(run, tmp_path / "whole", count=100, steps=2)
    monkeypatch.setattr("umd.train.sample.put_together", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sample(run, tmp_path / "cut", count=100, steps=2)
    monkeypatch.undo()
    (part,) = tmp_path.glob(".cut-*/00000064.npy")
    part.write_bytes(b"junk")
    with pytest.raises(UserError, match="was damaged and is removed: run the same command again"):
        sample(run, tmp_path / "cut", count=100, steps=2)
    assert sample(run, tmp_path / "cut.npz", count=100, steps=2) == whole


def test_other_settings_are_other_samples(run, tmp_path):
    first = sample(run, tmp_path / "a", count=40, steps=2)
    for name, value in dict(seed=1, cfg_scale=1.0, eta=0.0, steps=3, balanced=True).items():
        assert sample(run, tmp_path / "a", **{"count": 40, "steps": 2, name: value}) != first
    for changes in (
        dict(sampler="ddpm"), dict(cfg_interval=(400, 700)), dict(cfg_schedule="cosine"), dict(cfg_channels=1),
        dict(predict="x_start"),
    ):  # fmt: skip
        assert sample(run, tmp_path / "b", **{"count": 40, "steps": 2, **changes})[:2] != first[:2], changes
    settings = json.loads((tmp_path / "a.json").read_text())
    assert settings["labels"] == "in turn" and settings["weights"]["part"] == "model"


def test_calls_of_few_rows_hand_on_all_outputs():
    def denoise(x_t, timesteps, labels):
        assert len(x_t) == len(timesteps) == len(labels) == 2
        return x_t + 1, x_t * timesteps.view(-1, 1, 1, 1), x_t - labels.view(-1, 1, 1, 1)

    x, t, y = torch.rand(6, 1, 2, 2), torch.arange(6), torch.arange(6) % 3
    outputs = in_calls_of(2, denoise)(x, t, y)
    expected = (x + 1, x * t.view(-1, 1, 1, 1), x - y.view(-1, 1, 1, 1))
    assert len(outputs) == 3 and all(map(torch.equal, outputs, expected))


def test_labels():
    balanced = drawn_labels((4, 7, 9), 300, True, 0)
    assert torch.bincount(balanced)[[4, 7, 9]].tolist() == [100, 100, 100]
    drawn = drawn_labels(range(10), 50_000, False, 0)
    counts = torch.bincount(drawn, minlength=10).double()
    assert ((counts - 5000).square() / 5000).sum() < 27.9  # chi-squared of 9 degrees of freedom, 99.9 %
    assert torch.equal(drawn_labels(range(10), 100, False, 0), drawn[:100])
    assert not torch.equal(drawn_labels(range(10), 100, False, 1), drawn[:100])


def test_requests_that_cannot_be(make_run, run, tmp_path):
    unlabelled = make_run(tmp_path / "unlabelled", num_classes=0)
    with pytest.raises(UserError, match="trained without labels, so there are none to balance"):
        sample(unlabelled, tmp_path / "a", count=10, balanced=True)
    for options, said in (
        (dict(cfg_interval=(700, 400)), "cfg_interval is 700 400; expected two model times, from and to, of 1 to 1000"),
        (dict(cfg_channels=4), "cfg_channels is 4; these images have 3 channels"),
        (dict(sampler="heun", steps=5000), "heun cannot sample in 5000 steps"),
        (dict(sampler="heun", eta=0.0), "eta is 0, and it is DDIM's alone; leave it out with heun"),
        (dict(sampler="unipc", capture="on"), "--capture on is for ddim and ddpm"),
    ):
        with pytest.raises(UserError, match=said):
            sample(run, tmp_path / "a", **options)
    with pytest.raises(UserError, match="balanced goes with --count"):
        Sample(balanced=True)
    with pytest.raises(UserError, match="count -1: must be at least 0"):
        Sample(count=-1)


@pytest.mark.slow
def test_fifty_thousand_samples_killed_twice(run, tmp_path):
    """1, 2 and 3 ranks, at batches of 7 and 64, killed twice: the same files; memory does not grow with the count."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}

    def command(out: str, ranks: int, batch: int, count: int = 50_000) -> list[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
        launcher = launcher if ranks > 1 else [sys.executable]
        arguments = ["-m", "umd.cli", "sample", str(run), "--count", str(count), "--steps", "2"]
        return [*launcher, *arguments, "--batch", str(batch), "--out", str(tmp_path / out)]

    def finish(*arguments, **options) -> int:
        """Peak memory in KiB."""
        watched = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
        watched += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        timed = [sys.executable, "-c", watched, *command(*arguments, **options)]
        done = subprocess.run(timed, env=environment, capture_output=True, text=True, check=True)
        return int(done.stdout.split()[-1])

    large = finish("one", 1, 64)
    small = finish("few", 1, 64, count=500)
    assert large < small + 100_000, "KiB"
    for out, ranks, batch in (("two", 2, 7), ("three", 3, 64)):
        for parts in (50, 300):
            process = subprocess.Popen(command(out, ranks, batch), env=environment, start_new_session=True)
            while len(list(tmp_path.glob(f".{out}-*/*.npy"))) < parts:
                assert process.poll() is None
                time.sleep(0.1)
            os.killpg(process.pid, 9)
            process.wait()
        finish(out, ranks, batch)
        for suffix in ("png", "npz", "json"):
            assert (tmp_path / f"{out}.{suffix}").read_bytes() == (tmp_path / f"one.{suffix}").read_bytes()
