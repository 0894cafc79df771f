"""`umd bench reproduce layers` writes what it says, into a folder that was not there."""

import json

import numpy as np
import pytest
from PIL import Image

from umd.cli import main
from umd.errors import UserError
from umd.kernels import backend


def idx_files(folder):
    """Pictures and labels named and stored as Fashion-MNIST's."""
    rng = np.random.default_rng(0)
    for split in ("train", "t10k"):
        images, labels = rng.integers(0, 256, (40, 28, 28), dtype=np.uint8), np.arange(40, dtype=np.uint8) % 10
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
            (folder / f"{split}-{name}-ubyte").write_bytes(head + array.tobytes())
    return folder / "train-images-idx3-ubyte"


def test_the_command_trains_measures_and_draws(tmp_path, monkeypatch):
    monkeypatch.setattr("umd.bench.layers.FASHION", idx_files(tmp_path))
    monkeypatch.setattr("umd.bench.layers.SHOTS", 3)
    monkeypatch.setattr("umd.bench.layers.TIMES", (0, 50))
    options = f"--steps 2 --out {tmp_path / 'runs'} --figures {tmp_path / 'figures'} --device cpu"
    with backend.kernels("reference"):
        main(["bench", "reproduce", "layers", *options.split()])
    record = json.loads((tmp_path / "figures" / "layers.json").read_text())
    assert (record["steps"], record["shots"]) == (2, 3) and record["accuracy"].keys() == {"UMD"}
    blocks = [f"{part} {i}" for part in ("encoder", "decoder") for i in range(1, 7)]
    for rows in record["accuracy"].values():
        assert list(rows) == ["0", "50"]
        for row in rows.values():
            assert list(row) == [*blocks, "representation"]
            assert all(0 <= found["mean"] < 1 for found in row.values())
    assert Image.open(tmp_path / "figures" / "layers.png").size[0] > 300


def test_pictures_that_are_not_there_are_named(tmp_path, monkeypatch):
    from rich.console import Console

    from umd.bench.layers import reproduce
    from umd.bench.options import Reproduce

    monkeypatch.setattr("umd.bench.layers.FASHION", tmp_path / "none.gz")
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist"):
        reproduce(Reproduce("layers", figures=tmp_path / "figures"), Console(quiet=True))
