"""`umd bench adaln`: what it counts, and that it measures every projection."""

import json

import pytest
from rich.console import Console

from umd.bench.adaln import run
from umd.bench.options import AdaLNBench
from umd.cli import main
from umd.errors import UserError


def test_weights_in_closed_form_and_nothing_else_changes():
    """Tables: 6 a block and 2. D·D weights and D biases each; or 6 D·D shared; or two factors of rank r."""
    rows = {row.projection: row for row in run(AdaLNBench(repeats=0, rank=32), Console(quiet=True))}
    D, M = 768, 6 * 16 + 2
    assert rows["per_block"].of_adaLN == M * D * D + M * D
    assert rows["single"].of_adaLN == 6 * D * D + M * D
    assert rows["low_rank"].of_adaLN == 32 * D + M * D * 32 + M * D
    assert len({row.weights - row.of_adaLN for row in rows.values()}) == 1
    assert rows["per_block"].flops_per_image > max(rows[name].flops_per_image for name in ("single", "low_rank"))
    assert all(row.seconds is None for row in rows.values())


def test_every_projection_is_timed(tmp_path):
    file = tmp_path / "new" / "adaln.json"
    main(f"bench adaln --model UMD-Ti/4 --image-size 16 --shallower 6 --batch 4 --repeats 2 --json {file}".split())
    result = json.loads(file.read_text())
    assert [row["projection"] for row in result["rows"]] == ["per_block", "single", "low_rank"]
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in result["rows"])
    assert result["rows"][0]["ratio"] == 1 and result["settings"]["batch"] == 4


def test_mistakes_are_a_sentence():
    for bad in ({"batch": 0}, {"repeats": -1}, {"shallower": 0}):
        with pytest.raises(UserError, match=next(iter(bad))):
            AdaLNBench(**bad)
