"""Plots: as inline SVG that follows the page's light or dark colours, and as PNG files."""

import html
import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image

from umd.files import write_whole

# In the SVG each colour becomes var(--name), which the page defines for its light and dark modes.
COLOURS = {
    "ink": "#1d2126",
    "muted": "#697079",
    "rule": "#d9dcdf",
    "blue": "#28598c",
    "orange": "#c05a1c",
    "green": "#3c7a50",
    "bar": "#b3b9c0",
}
LINES = ("blue", "orange", "green", "ink")

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,  # a run or class may have a "$" in its name
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.edgecolor": COLOURS["muted"],
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.unicode_minus": False,
    "grid.color": COLOURS["rule"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.4,
    "svg.fonttype": "none",
    "svg.hashsalt": "umd",
}


def series(rows: Sequence[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """The finite values of a column: (steps float64 [n], values float64 [n])."""
    pairs = [(row["step"], row[key]) for row in rows if _finite(row.get("step")) and _finite(row.get(key))]
    steps, values = np.array(pairs, np.float64).reshape(-1, 2).T
    return steps, values


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average of [n] values.

    At the start the window shrinks on both sides, because a loss falls fast there. At the end only its right side is
    cut off.
    """
    i = np.arange(len(values))
    half = np.minimum(i, window // 2)
    first, last = i - half, np.minimum(i + half, len(values) - 1)
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[last + 1] - total[first]) / (last - first + 1)


def curves(rows: Sequence[dict], keys: dict[str, str], *, name: str, title: str, unit: str, smoothed: bool) -> str:
    """Plot columns of metrics.jsonl over the training step.

    Args:
        rows: logged rows, each with `step`; values that are missing or not finite are left out.
        keys: column → its name in the legend; at most four. A single column has no legend.
        name: makes the ids inside this SVG unique on the page.
        title, unit: texts above the plot and along the vertical axis.
        smoothed: draw a bold moving average (over 5 % of the rows) on top of pale raw values; else only raw values.

    Returns:
        An `<svg>` element, or "" if no column has a finite value.
    """
    data = {label: series(rows, key) for key, label in keys.items()}
    data = {label: xy for label, xy in data.items() if len(xy[0])}
    if not data:
        return ""
    with rc_context(STYLE):
        figure, ax = _axes(3.9, 2.5)
        lowest, highest, end = math.inf, -math.inf, 1.0
        for colour, (label, (x, y)) in zip(LINES, data.items(), strict=False):
            marker = "o" if len(x) == 1 else ""
            line = smooth(y, max(3, len(y) // 20)) if smoothed else y
            if smoothed:
                ax.plot(x, y, color=COLOURS[colour], alpha=0.28, linewidth=0.7)
            ax.plot(x, line, color=COLOURS[colour], linewidth=1.5, label=label, marker=marker, markersize=3)
            lowest, highest, end = min(lowest, y.min()), max(highest, y.max()), max(end, x.max())
        if lowest > 0 and highest / lowest > 8 and smoothed:
            _log_axis(ax, lowest, highest)
        elif lowest >= 0:
            ax.set_ylim(0, highest * 1.08 or 1)
        ax.set_xlim(0, 1.01 * end)
        ax.set_title(title)
        ax.set_xlabel("training step")
        ax.set_ylabel(unit)
        ax.grid(axis="y")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        if len(data) > 1:
            ax.legend(loc="upper right")
        ends = "; ".join(f"{label}: {y[0]:.3g} at the start, {y[-1]:.3g} at the end" for label, (_, y) in data.items())
        return _svg(figure, name, f"{title}, {unit}, over training steps. {ends}.")


def probe_bars(bars: Sequence[tuple[str, float, float]], chance: float, *, name: str) -> str:
    """Draw horizontal bars with error bars, the first one highlighted, and a line across each bar at chance.

    Args:
        bars: (label, mean, standard deviation) as fractions; bars whose mean is not finite are left out.
        chance: accuracy of guessing, as a fraction; no line if it is not finite.
        name: makes the ids inside this SVG unique on the page.

    Returns:
        An `<svg>` element, or "" if no mean is finite.
    """
    bars = [(label, 100 * mean, 100 * std if _finite(std) else 0.0) for label, mean, std in bars if _finite(mean)]
    if not bars:
        return ""
    with rc_context(STYLE):
        figure, ax = _axes(4.9, 0.8 + 0.52 * len(bars))
        edge = min(112, 1.25 * max(mean + std for _, mean, std in bars))
        for i, (label, mean, std) in enumerate(bars):
            ax.barh(i, mean, height=0.42, color=COLOURS["blue" if i == 0 else "bar"])
            ax.errorbar(mean, i, xerr=std, color=COLOURS["ink"], linewidth=1, capsize=3)
            ax.annotate(label, (0, i - 0.27), va="bottom")  # above its bar, to fit a narrow screen
            clear = max(mean + std, 100 * chance if _finite(chance) else 0)
            _note(ax, f"{mean:.1f} ± {std:.1f}", (clear, i), (7, 0), va="center")
        if _finite(chance):
            x, rows, orange = np.full(len(bars), 100 * chance), np.arange(len(bars)), COLOURS["orange"]
            ax.vlines(x, rows - 0.25, rows + 0.25, orange, linewidth=1.5)
            below = (x[-1], rows[-1] + 0.25)
            _note(ax, f"chance {x[-1]:.1f}", below, (0, -3), ha="center", va="top", color=orange)
        ax.set_yticks([])
        ax.set_ylim(len(bars) - 0.45, -0.62)
        ax.set_xlim(0, edge)
        ax.set_xlabel("held-out accuracy, averaged over classes, %")
        ax.grid(axis="x")
        ax.spines["left"].set_visible(False)
        alt = "; ".join(f"{label} {mean:.1f} ± {std:.1f} %" for label, mean, std in bars)
        guess = f" Chance is {100 * chance:.1f} %." if _finite(chance) else ""
        return _svg(figure, name, f"Bar chart of probe accuracy: {alt}.{guess}")


def layer_curves(runs: Mapping[str, Mapping[int, Mapping[str, Mapping[str, float]]]], path: Path, shots: int) -> None:
    """Draw probe accuracy by block (one line per model time) and by model time, runs side by side; write a PNG.

    runs: name → {time: {layer: {mean, std}}}, fractions. The last layer is the representation, drawn separately.
    path: the PNG file. shots: for the label of the vertical axis.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(3.9 * len(runs) + 1.1, 5.6), layout="constrained", dpi=150)
        axes = figure.subplots(2, len(runs), squeeze=False, sharey=True)
        for (name, found), (above, below) in zip(runs.items(), axes.T, strict=True):
            times, layers = list(found), list(next(iter(found.values())))
            means = 100 * np.array([[found[time][layer]["mean"] for layer in layers] for time in times])
            colours = colormaps["viridis"](np.linspace(0, 0.9, len(times)))
            for time, row, colour in zip(times, means, colours, strict=True):
                above.plot(range(1, len(layers)), row[:-1], color=colour, lw=1.3, label=f"t = {time}")
                above.plot(len(layers) + 0.3, row[-1], "o", color=colour, ms=4)
            encoder = sum(layer.startswith("encoder") for layer in layers)
            above.axvline(encoder + 0.5, color=COLOURS["muted"], lw=0.6, ls=":")
            above.set_title(f"{name}\nby block: encoder | decoder   • representation")
            above.set_xlabel("block")
            above.xaxis.set_major_locator(MaxNLocator(9, integer=True))
            lines = {"the best block": means[:, :-1].max(1), "representation": means[:, -1]}
            for colour, (label, values) in zip(LINES, lines.items(), strict=False):
                below.plot(range(len(times)), values, color=COLOURS[colour], marker="o", ms=3.5, lw=1.3, label=label)
            below.set_title("by noise")
            below.set_xlabel("model time t (0: no noise)")
            below.set_xticks(range(len(times)), [str(time) for time in times])
        for ax in axes.flat:
            ax.grid(axis="y")
        for ax in axes[:, 0]:
            ax.set_ylabel(f"{shots}-shot accuracy, %")
        for ax in axes[:, -1]:
            ax.legend(bbox_to_anchor=(1, 1), loc="upper left")  # one legend for all runs, beside the last
        write_figure(figure, path)


def error_curves(
    runs: Sequence[tuple[str, Sequence[int], Mapping[str, Mapping[str, Sequence[float | None]]]]],
    names: Mapping[str, str], path: Path,
) -> None:  # fmt: skip
    """Draw errors by model time, one panel per kind of error and one line per run; write a PNG.

    runs: (name, times, {kind: {mean, se}}), with None for missing values. names: kind → its name in the title.
    """
    with rc_context(STYLE):
        kinds = [kind for kind in names if any(kind in curves for _, _, curves in runs)]
        figure = Figure(figsize=(3.4 * len(kinds) + 0.4, 2.7), layout="constrained", dpi=150)
        for ax, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
            for (name, times, curves), colour in zip(runs, itertools.cycle(LINES)):
                if kind not in curves:
                    continue
                mean, se = (np.array(curves[kind][what], float) for what in ("mean", "se"))  # None becomes NaN
                ax.plot(times, mean, color=COLOURS[colour], marker="o", ms=3, lw=1.3, label=name)
                ax.fill_between(times, mean - se, mean + se, color=COLOURS[colour], alpha=0.2, lw=0)
            ax.set_title(f"squared error of {names[kind]}")
            ax.set_xlabel("model time t (0: no noise)")
            ax.set_ylim(bottom=0)
            ax.grid(axis="y")
            if len(runs) > 1:
                ax.legend()
        write_figure(figure, path)


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file, atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    write_whole(path, buffer.getvalue())


def _finite(value: object) -> bool:
    return isinstance(value, (int, float, np.number)) and math.isfinite(value)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_visible(False)
    ax = figure.add_subplot()
    ax.patch.set_visible(False)
    return figure, ax


def _note(ax: Axes, text: str, point: tuple[float, float], offset: tuple[float, float], **style: str) -> None:
    """Write text at a distance of `offset` points from a point in data coordinates."""
    ax.annotate(text, point, xytext=offset, textcoords="offset points", **style)  # type: ignore[arg-type]


def _log_axis(ax: Axes, lowest: float, highest: float) -> None:
    ax.set_yscale("log")
    ax.set_ylim(lowest / 1.15, highest * 1.15)
    subs = (1.0, 2.0, 5.0) if highest / lowest < 300 else (1.0,)
    ax.yaxis.set_major_locator(LogLocator(subs=subs))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def _svg(figure: Figure, name: str, alt: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Remove what only a stand-alone file needs; a <style> inside would apply to the whole page.
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    box = svg.split('viewBox="')[1].split('"')[0]
    svg = f'<svg viewBox="{box}" role="img" aria-label="{html.escape(alt)}">' + svg[svg.index(">") + 1 :]
    for key, value in COLOURS.items():
        svg = svg.replace(value, f"var(--{key})")
    # Remove matplotlib's font family, so that the page's font is used. Releases write it as `font` or `font-family`.
    return re.sub(r"font-family: [^;\"]*; ?", "", re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg))


def confusion_sheet(counts: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Draw a confusion matrix in per cent of each class: counts [label, prediction] to an image, uint8 [H, W, 3].

    Class names are left out beyond 40 classes, numbers in the cells beyond 15.
    """
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    K = len(counts)
    side = min(9.0, 3.2 + 0.28 * K)
    with rc_context(STYLE):
        figure = Figure(figsize=(side + 0.6, side), layout="constrained", dpi=120)
        ax = figure.add_subplot()
        image = ax.imshow(share, cmap="Blues", vmin=0, vmax=100)
        figure.colorbar(image, ax=ax, label="% of the class", fraction=0.046)
        if K <= 40:
            ax.set_xticks(range(K), names, rotation=90)
            ax.set_yticks(range(K), names)
        for i, j in np.ndindex(K, K) if K <= 15 else ():
            ink = "white" if share[i, j] > 55 else "black"
            ax.text(j, i, f"{share[i, j]:.0f}", ha="center", va="center", color=ink)
        ax.set_xlabel("predicted")
        ax.set_ylabel("class")
        right = counts.trace() / max(counts.sum(), 1)
        ax.set_title(f"{counts.sum()} held-out pictures, {100 * right:.1f} % right")
        buffer = io.BytesIO()
        figure.savefig(buffer, bbox_inches="tight")  # long names may reach beyond the figure
        return np.asarray(Image.open(buffer).convert("RGB"))
