"""Reference loss curves, and how far a run is from the curve of its recipe.

`train/curves/*.json` holds each reference curve with its recipe. A run with the same recipe is compared with it,
whatever its seed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umd.train.run import RunConfig, to_plain

FOLDER = Path(__file__).parent / "curves"
WINDOW = 100  # steps per point of a curve: the mean of the losses logged in them


def recipe_of(config: RunConfig) -> dict[str, Any]:
    """The settings that the loss depends on, without the seed."""
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
    """A reference curve: mean loss of each `WINDOW` steps, with its standard error."""

    name: str  # preset and options
    recipe: dict[str, Any]
    made: dict[str, Any]
    points: list[tuple[int, float, float]]  # last step of the window, mean, standard error

    def at(self, step: int) -> tuple[float, float] | None:
        """Mean and standard error of the window that ends at a step, None if no window ends there."""
        return next(((mean, error) for last, mean, error in self.points if last == step), None)


def curves() -> list[Curve]:
    """Read all reference curves."""
    found = []
    for file in sorted(FOLDER.glob("*.json")):
        values = json.loads(file.read_text("utf-8"))
        values["points"] = [tuple(point) for point in values["points"]]
        found.append(Curve(**values))
    return found


def reference_curve(config: RunConfig) -> Curve | None:
    """The reference curve of a run's recipe, None if there is none."""
    recipe = recipe_of(config)
    return next((curve for curve in curves() if curve.recipe == recipe), None)


def windows(rows: Sequence[Mapping[str, float]]) -> list[tuple[int, float, float]]:
    """Average the rows of a metrics.jsonl to points (last step, mean, standard error). Omits an unfinished window."""
    losses: dict[int, list[float]] = {}  # last step of a window -> its losses
    step = 0
    for row in (row for row in rows if "loss" in row):
        step = int(row["step"])
        losses.setdefault(-(-step // WINDOW) * WINDOW, []).append(row["loss"])
    return [(last, *mean_and_error(values)) for last, values in losses.items() if last <= step]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the mean, to six digits."""
    n = len(values)
    mean = sum(values) / n
    variance = sum((value - mean) ** 2 for value in values) / max(n - 1, 1)
    return float(f"{mean:.6g}"), float(f"{(variance / n) ** 0.5:.3g}")


class Comparison:
    """Compares a run with its reference: add logged losses, read from `note` how far the run is from the curve."""

    def __init__(self, curve: Curve | None, start: int = 0):
        """start: steps done before. A window that began before is not compared, as its first losses are missing."""
        self.curve, self.start = curve, start
        self.last = start // WINDOW * WINDOW  # step at which the last finished window ended
        self.losses: list[tuple[int, float]] = []  # (step, loss) after that
        self.note = ""  # about the last finished window

    def add(self, step: int, loss: float) -> float | None:
        """Add one logged loss. Returns the reference's mean if a window has ended since the last call, else None."""
        if self.curve is None:
            return None
        self.losses.append((step, loss))
        last = step // WINDOW * WINDOW
        if last == self.last:
            return None
        inside = [loss for step, loss in self.losses if last - WINDOW < step <= last]
        self.last, self.losses = last, [(step, loss) for step, loss in self.losses if step > last]
        reference = self.curve.at(last)
        if last - WINDOW < self.start or len(inside) < 2 or reference is None:  # a single loss has no error
            return None
        (ours, error), (mean, spread) = mean_and_error(inside), reference
        self.note = f"{ours:.4f} ± {error:.4f}, of the reference {mean:.4f} ± {spread:.4f} ({ours / mean - 1:+.1%})"
        return mean
