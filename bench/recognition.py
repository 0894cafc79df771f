"""`umd bench recognition`: fine-tuning for classification from pre-trained encoders against the same from scratch.

Emoji in Unicode's nine groups, few labels a class, a fixed number of steps. Each start chooses its learning rate among
the same few, on training pictures that are not drawn for training; only then come the held-out ones, over several
seeds of labels, order and weights. The pre-training sees the whole training split without labels, the scratch none.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from rich.console import Console
from rich.table import Table

from umd.config import OBJECTIVES
from umd.errors import UserError
from umd.train.data import DataConfig
from umd.train.emoji import GROUPS, load
from umd.train.loop import train
from umd.train.run import PRESETS, RunConfig, classify_config
from umd.train.sources import in_test_split

HOLDOUT = 0.2  # of DataConfig: the pre-training has seen the others
STARTS = ("UMD", "MAE", "DiffMAE", "scratch")
SEARCH_SEED = 1000


@dataclass(frozen=True)
class RecognitionBench:
    """What is trained and compared."""

    starts: tuple[str, ...] = STARTS
    """Among UMD, MAE, DiffMAE and scratch."""
    pretraining: int = 600
    """Steps of each pre-training, 64 pictures each."""
    shots: int = 50
    """Labelled pictures a class."""
    steps: int = 200
    """Steps of each fine-tuning, 32 pictures each."""
    rates: tuple[float, ...] = (2e-3, 6e-3, 2e-2)
    """Learning rates (for a batch of 256) that each start chooses among."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the labels drawn, their order, and new weights."""
    out: Path = Path("runs/recognition")
    """Folder of the runs; finished ones there are not run again."""
    json: Path | None = None
    """Write the rows here."""

    def __post_init__(self) -> None:
        if unknown := set(self.starts) - set(STARTS):
            raise UserError(f"unknown start {unknown.pop()!r}; it is one of {', '.join(STARTS)}")
        if len(self.seeds) < 2:
            raise UserError(f"a spread needs 2 seeds or more, got {len(self.seeds)}")
        if not self.rates or min(self.pretraining, self.shots, self.steps) < 1:
            raise UserError("rates must be one or more, and pretraining, shots and steps at least 1")


@dataclass(frozen=True)
class Row:
    start: str
    rate: float  # chosen
    searched: dict[str, float]  # averaged accuracy on the pictures of the search, by rate
    top1: list[float]  # on the held-out pictures, a seed each
    averaged: list[float]  # accuracy averaged over classes


def pretraining_config(start: str, bench: RecognitionBench) -> RunConfig:
    """The tiny presets, all with four CLS tokens; MAE as the setting of UMD that it is."""
    config = PRESETS["diffmae-tiny" if start == "DiffMAE" else "umd-tiny"][1]
    model, objective = replace(config.model, num_cls=4), config.objective
    if start == "MAE":
        model, objective = replace(model, adaLN=False), OBJECTIVES["mae"]
    return replace(
        config,
        out=bench.out / start.lower(),
        model=model,
        objective=objective,
        data=replace(config.data, num_workers=1),
        minutes=0,
        steps=bench.pretraining,
        save_every=200,
        keep=1,
        draw_every=0,
    )


def labelled(path: Path, shots: int, seed: int, search: bool) -> None:
    """Write a .npz of `shots` training pictures a class and those to score on: the held-out ones, or for the search a
    fifth of the training split, whose emoji are then not trained on."""
    images, labels, bases = load()
    held_out = np.array([in_test_split(base, HOLDOUT) for base in bases])
    if search:
        aside = np.array([in_test_split(f"search {base}", 0.2) for base in bases])
        train_rows, test_rows = ~held_out & ~aside, ~held_out & aside
    else:
        train_rows, test_rows = ~held_out, held_out
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(np.flatnonzero(train_rows & (labels == label)))[:shots] for label in range(len(GROUPS))]
    chosen = np.concatenate(drawn)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path,
        train_images=images[chosen],
        train_labels=labels[chosen],
        test_images=images[test_rows],
        test_labels=labels[test_rows],
    )


def classified(start: str, rate: float, seed: int, search: bool, bench: RecognitionBench, console: Console) -> dict:
    """The scores of one fine-tuning; `umd finetune --task classify` with a recipe for few steps."""
    source = bench.out / f"{'search' if search else 'labels'}-{seed}.npz"
    if not source.exists():
        labelled(source, bench.shots, seed, search)
    scratch = start == "scratch"
    pretrained = pretraining_config("UMD" if scratch else start, bench)
    out = bench.out / f"{start.lower()}-{rate:g}-{source.stem}"
    config = classify_config(pretrained, pretrained.out, out, linear=False, from_scratch=scratch)
    config = replace(
        config,
        model=replace(config.model, num_classes=len(GROUPS), pool="mean"),
        objective=replace(config.objective, mixup=0.0, cutmix=0.0),
        optim=replace(config.optim, lr=rate),
        data=DataConfig(str(source), area_min=0.5, num_workers=1),
        batch_size=32,
        steps=bench.steps,
        epochs=0,
        save_every=bench.steps,
        draw_every=bench.steps,
        seed=seed,
    )
    file = out / "scores.json"
    if not file.exists():
        train(config, console, f"{start} {rate:g}")
    return json.loads(file.read_text())


def averaged_accuracy(scores: dict) -> float:
    """Accuracy averaged over the classes that have pictures."""
    confusion = np.array(scores["confusion"])
    counts = confusion.sum(1)
    return float((confusion.diagonal()[counts > 0] / counts[counts > 0]).mean())


def run(bench: RecognitionBench, console: Console) -> list[Row]:
    """Pre-train, search, fine-tune, print the table, write the JSON. Returns the rows."""
    rows = []
    for start in bench.starts:
        if start != "scratch":
            train(pretraining_config(start, bench), console, start)
        searched = {
            rate: averaged_accuracy(classified(start, rate, SEARCH_SEED, True, bench, console)) for rate in bench.rates
        }
        rate = max(searched, key=searched.__getitem__)
        scores = [classified(start, rate, seed, False, bench, console) for seed in bench.seeds]
        rows.append(
            Row(
                start,
                rate,
                {f"{value:g}": accuracy for value, accuracy in searched.items()},
                [score["top-1"] for score in scores],
                [averaged_accuracy(score) for score in scores],
            )
        )
    print_rows(bench, rows, console)
    if bench.json is not None:
        bench.json.parent.mkdir(parents=True, exist_ok=True)
        bench.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return rows


def print_rows(bench: RecognitionBench, rows: list[Row], console: Console) -> None:
    def spread(values: Sequence[float]) -> str:
        return f"{fmean(values):.3f} ± {stdev(values):.3f}"

    table = Table(title=f"{bench.shots} labels a class, {bench.steps} steps, {len(bench.seeds)} seeds, held-out emoji")
    for column in ("start", "rate", "top-1", "averaged over classes"):
        table.add_column(column)
    for row in rows:
        table.add_row(row.start, f"{row.rate:g}", spread(row.top1), spread(row.averaged))
    console.print(table)
