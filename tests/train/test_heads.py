"""Both heads of a run: weighed when it ends, kept with its weights, used where they are known."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from umd.checkpoint import save_checkpoint
from umd.config import ModelConfig, ObjectiveConfig
from umd.errors import UserError
from umd.heads import head_products, head_times, head_weights
from umd.schedule import schedule_of
from umd.train.data import center_view, open_dataset
from umd.train.heads import heads_file, heads_of, measured, read_heads
from umd.train.loop import train
from umd.train.options import Sample
from umd.train.run import RunConfig, read_config, to_plain
from umd.train.sample import draw
from umd.train.settings import DataConfig
from umd.train.weights import load_model, weights_identity

QUIET = Console(quiet=True)
TINY = ModelConfig(image_size=(8, 8), patch_size=2, hidden_size=32, depth=1, decoder_depth=1, num_heads=2)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """100 pictures of 3 classes, a fifth of them held out."""
    rng = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("pictures") / "tiny.npz"
    np.savez(file, images=rng.integers(0, 256, (100, 8, 8, 3), dtype=np.uint8), labels=np.arange(100) % 3)
    return file


@pytest.fixture
def run(make_run, pictures, tmp_path) -> RunConfig:
    return read_config(make_run(tmp_path / "run", data=DataConfig(source=str(pictures), holdout=0.4)))


def drawn(config: RunConfig, console: Console = QUIET, **options) -> dict:
    out = config.out / "drawn"
    draw(config.out, Sample(out=out, count=40, steps=3, **options), config, console)
    return json.loads(out.with_suffix(".json").read_text())


def test_a_run_that_ends_weighs_its_heads(pictures, tmp_path):
    """Those of the averaged network of the last checkpoint, by the formula; its samples then use both."""
    config = RunConfig(
        out=tmp_path / "run", model=replace(TINY, num_classes=3), batch_size=8, steps=4, draw_minutes=60,
        precision="fp32", data=DataConfig(source=str(pictures), num_workers=0),
    )  # fmt: skip
    train(config, QUIET)
    weights = weights_identity(config.out)
    assert weights["part"] == "ema" and weights["step"] == 4
    (file,) = config.out.glob("heads-*.json")
    assert file == heads_file(config.out, weights)
    record = json.loads(file.read_text())
    assert record["weights"] == weights and record["split"] == "test"

    config, network = read_config(config.out), load_model(config.out)
    held_out, schedule = open_dataset(config.data, "test"), schedule_of(config.schedule)
    x, labels = center_view(held_out, np.arange(len(held_out)), config.data), torch.from_numpy(held_out.labels)
    products = head_products(network.denoise, x, schedule, head_times(1000), labels)
    assert record["pictures"] == len(x)
    assert record["times"] == head_times(1000) and record["x_start"] == pytest.approx(head_weights(products), abs=2e-3)
    recipe = drawn(config)
    assert recipe["predict"] == "both" and recipe["heads"] == {name: record[name] for name in ("times", "x_start")}
    assert drawn(config, predict="eps")["heads"] is None and drawn(config, ema=False)["predict"] == "eps"


def test_networks_without_two_trained_heads_are_left(pictures, tmp_path):
    common = dict(batch_size=8, steps=1, precision="fp32", data=DataConfig(source=str(pictures), num_workers=0))
    mae = RunConfig(out=tmp_path / "mae", model=TINY, objective=ObjectiveConfig(no_noise_prob=1.0), **common)
    silent = RunConfig(out=tmp_path / "silent", model=TINY, draw_every=0, **common)
    for config in (mae, silent):
        train(config, QUIET)
        assert not list(config.out.glob("heads-*"))


def test_ranks_add_up(run):
    network, schedule = load_model(run.out), schedule_of(run.schedule)
    whole, about = measured(network, run, schedule, torch.float32)
    parts = [measured(network, run, schedule, torch.float32, rank, 3)[0] for rank in range(3)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-5)
    assert about == {"pictures": 40, "split": "test"}


def test_heads_of_other_weights_are_measured_anew_and_that_is_said(run, capsys):
    console = Console(width=500)
    said = "the heads of these weights were not measured yet: done on 40 pictures, kept in"
    assert drawn(run, console)["predict"] == "eps"
    assert said not in capsys.readouterr().out
    first = drawn(run, console, predict="both")["heads"]
    assert said in capsys.readouterr().out
    assert drawn(run, console, predict="both")["heads"] == drawn(run)["heads"] == first
    assert said not in capsys.readouterr().out

    model = load_model(run.out)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    save_checkpoint(run.checkpoints, 2, {"model": dict(model.named_parameters())}, {"config": to_plain(run)})
    assert drawn(run, console)["predict"] == "eps", "the newest weights have none"
    assert drawn(run, console, predict="both")["heads"] != first
    assert said in capsys.readouterr().out and len(list(run.out.glob("heads-*.json"))) == 2


def test_what_cannot_be_weighed(run, monkeypatch):
    file = heads_file(run.out, weights_identity(run.out))
    for content in ("no", "[]", '{"times": [1]}', '{"times": ["a"], "x_start": [1]}'):
        file.write_text(content)
        with pytest.raises(UserError, match="is damaged .*remove it, and the heads are measured again"):
            drawn(run)
    file.unlink()
    assert read_heads(file) is None
    network = load_model(run.out)

    def one_head(x_t, t, labels=None, conditions=None):
        eps = 0.9 * x_t
        return schedule_of(run.schedule).xstart_from_eps(x_t, t, eps), eps

    monkeypatch.setattr(network, "denoise", one_head)
    with pytest.raises(UserError, match="this network has one head"):
        heads_of(run, weights_identity(run.out), network, torch.float32, QUIET)
    assert not file.exists()
    away = replace(run, data=replace(run.data, source="/nowhere"))
    with pytest.raises(UserError, match="/nowhere"):
        drawn(away, predict="both")
