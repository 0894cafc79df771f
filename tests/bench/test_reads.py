"""`umd bench reads`: its ways read the same rows, and its figures are those of a disk."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from umd.bench.options import ReadsBench
from umd.bench.reads import WAYS, stored
from umd.cli import main
from umd.errors import UserError
from umd.train.latent_batches import StoredViews


def test_every_way_reads_the_same(tmp_path):
    keys = [(0, index) for index in (4000, 3, 64, 17)]
    with stored(ReadsBench(folder=tmp_path, shards=1)) as dataset:
        found = [StoredViews(dataset, block).__getitems__(keys)[0].numpy() for block in WAYS.values()]
        with safe_open(dataset.shards[0].path, "pt") as shard:
            expected = shard.get_tensor("moments")[0, [index for _, index in keys]].view(torch.int16).numpy()
    assert expected.shape == (4, 2, 4, 32, 32) and len({row.tobytes() for row in expected}) == 4
    assert all(np.array_equal(rows, expected) for rows in found)
    assert not list(tmp_path.iterdir())


def test_rows_of_every_way(tmp_path):
    file = tmp_path / "new" / "reads.json"
    options = f"--folder {tmp_path} --shards 1 --count 512 --batch 64 --processes 1 2 --repeats 1 --json {file}"
    main(["bench", "reads", *options.split()])
    rows = json.loads(file.read_text())["rows"]
    assert [(row["way"], row["processes"], row["cache"]) for row in rows] == [
        (way, processes, cache) for processes in (1, 2) for way in WAYS for cache in ("cold", "warm")
    ]
    for row in rows:
        assert 0 < row["min_seconds"] <= row["seconds"] <= row["max_seconds"]
    for cold, warm in zip(rows[::2], rows[1::2], strict=True):
        assert warm["bytes"] <= cold["bytes"] / 4  # none, unless the system needs its memory in between


def test_what_cannot_be_measured():
    for bad in ({"shards": 0}, {"count": 0}, {"repeats": 0}, {"processes": (3,)}, {"processes": ()}):
        with pytest.raises(UserError, match=next(iter(bad))):
            ReadsBench(**bad)
