"""The loss one should see: curves of runs that were made here, and how far a run is from the one of its recipe.

`train/curves/*.json` holds each curve with its recipe; a run of the same recipe is compared with it,
whatever its seed.
"""

import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umd.train.run import RunConfig, to_plain

FOLDER = Path(__file__).parent / "curves"
WINDOW = 100  # steps of a point: their logged losses are averaged


def recipe_of(config: RunConfig) -> dict[str, Any]:
    """The settings that a loss depends on, but the seed."""
    plain = to_plain(config)
    whole = ("model", "objective", "schedule", "batch_size", "epochs", "minutes", "steps", "init")
    data = ("source", "area_min", "area_max", "hflip", "holdout", "frame_stride")
    optim = ("lr", "betas", "weight_decay", "warmup", "decay", "clip", "layer_decay")
    return (
        {name: plain[name] for name in whole}
        | {f"data.{name}": plain["data"][name] for name in data}
        | {f"optim.{name}": plain["optim"][name] for name in optim}
    )


@dataclass(frozen=True)
class Curve:
    """A reference: mean loss of each `WINDOW` steps, with its standard error."""

    name: str  # of the preset and its options
    recipe: dict[str, Any]
    made: dict[str, Any]
    points: list[tuple[int, float, float]]  # last step of the window, mean, standard error

    def at(self, step: int) -> tuple[float, float] | None:
        """Mean and standard error of the window that ends at a step."""
        return next(((mean, error) for last, mean, error in self.points if last == step), None)


def curves() -> list[Curve]:
    """All that were made here."""
    found = []
    for file in sorted(FOLDER.glob("*.json")):
        values = json.loads(file.read_text())
        values["points"] = [tuple(point) for point in values["points"]]
        found.append(Curve(**values))
    return found


def reference_of(config: RunConfig) -> Curve | None:
    """The curve of a run's recipe, if one was made here."""
    recipe = recipe_of(config)
    return next((curve for curve in curves() if curve.recipe == recipe), None)


def windows(rows: Sequence[Mapping[str, float]]) -> list[tuple[int, float, float]]:
    """Points of the rows of a metrics.jsonl; a window that is not over is left out."""
    points = []
    losses: list[float] = []
    for row in (row for row in rows if "loss" in row):
        losses.append(row["loss"])
        if row["step"] % WINDOW == 0:
            points.append((int(row["step"]), *mean_and_error(losses)))
            losses = []
    return points


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, to six digits."""
    n = len(values)
    mean = sum(values) / n
    variance = sum((value - mean) ** 2 for value in values) / max(n - 1, 1)
    return float(f"{mean:.6g}"), float(f"{(variance / n) ** 0.5:.3g}")


class Comparison:
    """A run beside its reference: fed with its logged losses, it says how far it is from it."""

    def __init__(self, curve: Curve | None):
        self.curve = curve
        self.losses: deque[float] = deque()
        self.note = ""  # of the last whole window

    def add(self, step: int, loss: float) -> float | None:
        """One logged loss. Returns the reference's mean where a window ends, else None."""
        if self.curve is None:
            return None
        self.losses.append(loss)
        if step % WINDOW:
            return None
        ours, error = mean_and_error(self.losses)
        self.losses.clear()
        if (reference := self.curve.at(step)) is None:
            return None
        mean, spread = reference
        self.note = f"{ours:.4f} ± {error:.4f}, of the reference {mean:.4f} ± {spread:.4f} ({ours / mean - 1:+.1%})"
        return mean
