"""Reference curves of the loss."""

import json
import math
from dataclasses import replace

import pytest

from umd.train import curves as module
from umd.train.curves import Comparison, Curve, curves, mean_and_error, recipe_of, reference_curve, windows
from umd.train.presets import PRESETS


def test_points_are_means_with_their_error():
    rows = [{"step": step, "loss": float(step)} for step in range(50, 301, 50)] + [
        {"step": 310, "loss": 9.0},
        {"step": 311},
    ]
    assert windows(rows) == [(100, 75.0, 25.0), (200, 175.0, 25.0), (300, 275.0, 25.0)]
    sparse = [{"step": step, "loss": float(step)} for step in range(40, 241, 40)]
    assert windows(sparse) == [(100, 60.0, 20.0), (200, 160.0, 23.1)]
    assert mean_and_error([1.0, 2.0, 3.0, 4.0]) == (2.5, float(f"{math.sqrt(5 / 3 / 4):.3g}"))
    assert mean_and_error([3.0]) == (3.0, 0.0)


def test_a_run_says_how_far_it_is():
    curve = Curve("tiny", {}, {}, [(100, 2.0, 0.1), (200, 1.0, 0.1)])
    beside = Comparison(curve)
    assert [beside.add(step, loss) for step, loss in ((50, 2.0), (100, 2.4), (150, 1.0))] == [None, 2.0, None]
    assert beside.note == "2.2000 ± 0.2000, of the reference 2.0000 ± 0.1000 (+10.0%)"
    assert beside.add(200, 1.0) == 1.0 and "(+0.0%)" in beside.note
    assert beside.add(300, 1.0) is None  # the reference has ended
    assert Comparison(None).add(100, 1.0) is None
    sparse = Comparison(curve)  # --log-every 40: a window ends between two lines
    assert [sparse.add(step, 2.0 if step <= 100 else 1.0) for step in (40, 80, 120, 160, 200)] == [
        None,
        None,
        2.0,
        None,
        1.0,
    ]
    assert "(+0.0%)" in sparse.note
    assert Comparison(curve).add(200, 1.0) is None  # a mean of one loss
    resumed = Comparison(curve, start=60)
    assert [resumed.add(step, 1.0) for step in (100, 150, 200)] == [None, None, 1.0]


def test_a_reference_is_of_the_same_recipe(monkeypatch, tmp_path):
    """The seed and where it runs are free, all that moves the loss is not."""
    config = replace(PRESETS["umd-tiny"][1], steps=400, minutes=0)
    record = {"name": "x", "recipe": recipe_of(config), "made": {}, "points": [[100, 1.0, 0.1]]}
    (tmp_path / "x.json").write_text(json.dumps(record))
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    assert reference_curve(replace(config, seed=5, device="cpu", out=tmp_path, save_every=1)).at(100) == (1.0, 0.1)
    for other in (
        replace(config, steps=401), replace(config, batch_size=32),
        replace(config, optim=replace(config.optim, lr=1e-3)), replace(config, data=replace(config.data, hflip=False)),
    ):  # fmt: skip
        assert reference_curve(other) is None


@pytest.mark.parametrize("curve", curves(), ids=lambda curve: curve.name)
def test_the_curves_that_are_kept_are_of_presets(curve):
    """The name says the command, and its recipe is that of today."""
    preset, _, steps = curve.name.partition(" --steps ")
    config = replace(PRESETS[preset][1], steps=int(steps), minutes=0, epochs=0)
    assert recipe_of(config) == curve.recipe
    assert [step for step, *_ in curve.points] == list(range(100, int(steps) + 1, 100))
