"""`umd bench reproduce recognition`: compare classifiers fine-tuned from pre-trained encoders with ones from scratch.

- Task: emoji in Unicode's nine groups, few labels per class, a fixed number of steps.
- Pre-training sees the whole training split without labels. Classifiers from scratch see only the labelled pictures.
- Each start chooses its learning rate from the same few, on training pictures that it is not trained on.
- Then it is scored on the held-out pictures, over several seeds of labels, order and weights.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from umd.bench.options import Reproduce
from umd.config import OBJECTIVES, ClassifierConfig, ClassifierObjectiveConfig, ModelConfig, model_config
from umd.files import write_json
from umd.report.figures import COLOURS, STYLE
from umd.train.emoji import GROUPS, load
from umd.train.log import read_metrics
from umd.train.loop import train
from umd.train.presets import PRESETS
from umd.train.run import RunConfig, classify_config
from umd.train.settings import DataConfig
from umd.train.splits import in_test_split

HOLDOUT = 0.2  # as in DataConfig, since the pre-training has seen the other pictures
SEARCH_SEED = 1000
STEPS, PRETRAINING = 200, 600


@dataclass(frozen=True)
class Comparison:
    """Settings of the comparison."""

    out: Path  # folder of the runs; finished runs are not run again
    starts: tuple[str, ...] = ("UMD", "MAE", "DiffMAE", "scratch")
    pretraining: int = PRETRAINING  # steps of 64 pictures
    shots: int = 50  # labelled pictures per class
    steps: int = STEPS  # of each fine-tuning, 32 pictures each
    rates: tuple[float, ...] = (2e-3, 6e-3, 2e-2, 6e-2)  # learning rates for a batch of 256; each start chooses one
    seeds: tuple[int, ...] = (0, 1, 2)  # of the labels drawn, their order, and new weights
    scored: int | None = None  # number of pictures to score on; None: all
    device: str = "auto"


@dataclass(frozen=True)
class Row:
    start: str
    rate: float  # the chosen learning rate
    searched: dict[str, float]  # learning rate -> class-averaged accuracy in the search
    top1: list[float]  # on the held-out pictures, one per seed
    averaged: list[float]  # class-averaged accuracy, one per seed


def pretraining_config(start: str, plan: Comparison) -> RunConfig:
    """Pre-training by the tiny presets, all with Ti's encoder and four CLS tokens. MAE is UMD with MAE's settings."""
    config = PRESETS["diffmae-tiny" if start == "DiffMAE" else "umd-tiny"][1]
    if start != "DiffMAE":
        config = replace(config, model=model_config("UMD-Ti/4", image_size=config.model.image_size))
    model, objective = replace(config.model, num_cls=4), config.objective
    if start == "MAE":
        assert isinstance(model, ModelConfig), "UMD's"
        model, objective = replace(model, adaLN=False), OBJECTIVES["mae"]
    return replace(
        config,
        out=plan.out / start.lower(),
        model=model,
        objective=objective,
        data=replace(config.data, num_workers=1),
        minutes=0,
        steps=plan.pretraining,
        save_every=200,
        keep=1,
        draw_every=0,
        device=plan.device,
    )


def labelled(path: Path, shots: int, seed: int, search: bool, scored: int | None = None) -> None:
    """Write a .npz with `shots` training pictures per class, and the pictures to score on.

    Scored are the held-out pictures; for the search, a fifth of the training split, which is then not trained on.
    """
    images, labels, bases = load()
    held_out = np.array([in_test_split(base, HOLDOUT) for base in bases])
    if search:
        aside = np.array([in_test_split(f"search {base}", 0.2) for base in bases])
        train_rows, test_rows = ~held_out & ~aside, ~held_out & aside
    else:
        train_rows, test_rows = ~held_out, held_out
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(np.flatnonzero(train_rows & (labels == label)))[:shots] for label in range(len(GROUPS))]
    chosen, test_ids = np.concatenate(drawn), rng.permutation(np.flatnonzero(test_rows))[:scored]
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path,
        train_images=images[chosen],
        train_labels=labels[chosen],
        test_images=images[test_ids],
        test_labels=labels[test_ids],
    )


def classified(start: str, rate: float, seed: int, search: bool, plan: Comparison, console: Console) -> dict:
    """Fine-tune once and return the scores: `umd finetune --task classify` with a recipe for few steps."""
    source = plan.out / f"{'search' if search else 'labels'}-{seed}.npz"
    if not source.exists():
        labelled(source, plan.shots, seed, search, plan.scored)
    scratch = start == "scratch"
    pretrained = pretraining_config("UMD" if scratch else start, plan)
    out = plan.out / f"{start.lower()}-{rate:g}-{source.stem}"
    config = classify_config(pretrained, pretrained.out, out, linear=False, from_scratch=scratch)
    model, objective = config.parts(ClassifierConfig, ClassifierObjectiveConfig)
    config = replace(
        config,
        model=replace(model, num_classes=len(GROUPS), pool="mean"),
        objective=replace(objective, mixup=0.0, cutmix=0.0),
        optim=replace(config.optim, lr=rate),
        data=DataConfig(str(source), area_min=0.5, num_workers=1),
        batch_size=32,
        steps=plan.steps,
        epochs=0,
        save_every=plan.steps,
        draw_every=plan.steps,
        seed=seed,
    )
    file = out / "scores.json"
    scores = json.loads(file.read_text("utf-8")) if file.exists() else {}
    if scores.get("step") != plan.steps:
        train(config, console, f"{start} {rate:g}")
        scores = json.loads(file.read_text("utf-8"))
    return scores


def averaged_accuracy(scores: dict) -> float:
    """Accuracy averaged over the classes that have pictures."""
    confusion = np.array(scores["confusion"])
    counts = confusion.sum(1)
    return float((confusion.diagonal()[counts > 0] / counts[counts > 0]).mean())


def reproduce(options: Reproduce, console: Console) -> None:
    steps = options.steps or STEPS
    plan = Comparison(
        options.out / "recognition", steps=steps, pretraining=steps * PRETRAINING // STEPS,
        seeds=tuple(range(options.seed, options.seed + 3)), device=options.device,
    )  # fmt: skip
    rows = compare(plan, console)
    console.print(table(plan, rows))
    options.figures.mkdir(parents=True, exist_ok=True)
    draw(plan, rows, options.figures / "recognition.png")
    stored = {"shots": plan.shots, "steps": plan.steps, "pretraining": plan.pretraining, "seeds": plan.seeds}
    stored |= {"minutes": minutes(plan), "rows": [asdict(row) for row in rows]}
    write_json(options.figures / "recognition.json", stored)


def compare(plan: Comparison, console: Console) -> list[Row]:
    """Pre-train, search the learning rate, fine-tune. Returns one row per start."""
    rows = []
    for start in plan.starts:
        if start != "scratch":
            train(pretraining_config(start, plan), console, start)
        searched = {
            rate: averaged_accuracy(classified(start, rate, SEARCH_SEED, True, plan, console)) for rate in plan.rates
        }
        rate = max(searched, key=searched.__getitem__)
        scores = [classified(start, rate, seed, False, plan, console) for seed in plan.seeds]
        rows.append(
            Row(
                start,
                rate,
                {f"{value:g}": accuracy for value, accuracy in searched.items()},
                [score["top-1"] for score in scores],
                [averaged_accuracy(score) for score in scores],
            )
        )
    return rows


def minutes(plan: Comparison) -> float:
    """Minutes of training of all runs together."""
    logs = plan.out.glob("*/metrics.jsonl")
    return sum(max(row.get("seconds", 0) for row in read_metrics(log)) for log in logs) / 60


def table(plan: Comparison, rows: list[Row]) -> Table:
    def spread(values: Sequence[float]) -> str:
        return f"{fmean(values):.3f} ± {stdev(values):.3f}"

    table = Table(title=f"{plan.shots} labels a class, {plan.steps} steps, {len(plan.seeds)} seeds, held-out emoji")
    for column in ("start", "rate", "top-1", "averaged over classes"):
        table.add_column(column)
    for row in rows:
        table.add_row(row.start, f"{row.rate:g}", spread(row.top1), spread(row.averaged))
    return table


def draw(plan: Comparison, rows: list[Row], path: Path) -> None:
    """Draw one dot per seed and a line at the mean, for both accuracies."""
    panels = {"averaged over classes": [row.averaged for row in rows], "top-1": [row.top1 for row in rows]}
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 2.8), layout="constrained", dpi=150)
        for ax, (title, values) in zip(figure.subplots(1, 2), panels.items(), strict=True):
            for i, (row, seeds) in enumerate(zip(rows, values, strict=True)):
                colour = COLOURS["muted" if row.start == "scratch" else "blue"]
                ax.plot([i] * len(seeds), seeds, "o", color=colour, markersize=4)
                ax.plot([i - 0.25, i + 0.25], [fmean(seeds)] * 2, color=colour)
            ax.set_xticks(range(len(rows)), [row.start for row in rows])
            ax.set_title(title)
            ax.grid(axis="y")
        figure.suptitle(f"Held-out accuracy, {plan.shots} labels a class, {plan.steps} steps", fontsize=9.5)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, facecolor="white")
