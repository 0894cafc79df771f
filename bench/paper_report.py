"""Write docs/results/paper.json, .md and .png from what `umd bench reproduce paper` has finished so far."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from umd.files import write_whole
from umd.images import grid, save_png
from umd.report.figures import COLOURS, STYLE

BEGIN, END = "<!-- begin: written by umd bench reproduce paper -->", "<!-- end -->"
TITLES = {"fashion": "Fashion-MNIST", "emoji": "Emoji"}
COLOUR = {"MAE": COLOURS["orange"], "DiT": COLOURS["blue"], "MaskDiT": COLOURS["green"], "UMD": COLOURS["ink"]}
# measure: (name, whether in per cent, whether more is better)
MEASURES = {
    "shots": ("100-shot, %", True, True),
    "linear": ("linear, %", True, True),
    "knn": ("k-NN, %", True, True),
    "fd": ("FD", False, False),
    "fd_guided": ("FD, guided", False, False),
    "fd_x0": ("FD, by x̂0", False, False),
    "kd": ("KD · 10³", False, False),
    "kd_guided": ("KD · 10³, guided", False, False),
}
# Claims of the paper's Tables 1 and 2: (measure, better method, worse method).
ORDER = [
    ("shots", "MAE", "UMD"), ("shots", "UMD", "MaskDiT"), ("shots", "UMD", "DiT"), ("shots", "MaskDiT", "DiT"),
    ("fd", "DiT", "MaskDiT"), ("fd", "DiT", "UMD"), ("fd", "MaskDiT", "UMD"), ("fd", "UMD", "MAE"),
    ("fd_guided", "DiT", "UMD"), ("fd_guided", "MaskDiT", "UMD"), ("fd_guided", "UMD", "MAE"),
]  # fmt: skip
ABLATION_ORDER = [
    ("fd_x0", "UMD", "UMD, only x0"), ("fd", "UMD", "UMD, only noise"), ("shots", "UMD", "UMD, fewer noise-free"),
    ("fd", "UMD, fewer noise-free", "UMD"), ("shots", "UMD", "UMD, noised 70 % masked"),
    ("fd", "UMD", "UMD, noised 70 % masked"), ("shots", "UMD, noised not masked", "UMD"),
    ("fd", "UMD, noised not masked", "UMD"), ("shots", "UMD", "UMD, no adaLN"), ("fd", "UMD", "UMD, no adaLN"),
]  # fmt: skip
# 97.5 % quantile of Student's t by degrees of freedom; the last stands for more. With 0, no spread is known.
T95 = (0.0, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31)
Values = Sequence[float]


def mean_and_error(values: Values) -> tuple[float, float | None]:
    """Mean and its standard error s/√n (s with n - 1), which is None for a single value."""
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def measured(chain: Mapping[str, Any], step: int) -> dict[str, float]:
    """All measures of a training at a step: probes, and distances after the whole fine-tuning that starts there."""
    results = chain["results"]
    found = {key: results[f"probe-{step}"][key] for key in ("shots", "linear", "knn") if f"probe-{step}" in results}
    start = f"finetune-{step}-distance-{chain['finetune_steps']}-guidance-"
    for name, result in results.items():
        if name.startswith(start):
            scale, predict = name.removeprefix(start).split("-")
            if predict == "x_start" and scale == "1":
                found["fd_x0"] = result["fd"]
            if predict == chain["leads"]:
                suffix = "" if scale == "1" else "_guided"
                found |= {f"fd{suffix}": result["fd"], f"kd{suffix}": 1000 * result["kd"]}
    return found


def by_method(record: Mapping[str, Any], data: str, end: str, longer: int = 1) -> dict[str, dict[str, list[float]]]:
    """method -> measure -> one value per seed, at equal `images` or `compute`."""
    found: dict[str, dict[str, list[float]]] = {}
    for chain in chains_of(record, data, longer=longer):
        if "ends" in chain:
            step = chain["ends"].get(end, chain["ends"]["images"])
            for key, value in measured(chain, step).items():
                found.setdefault(chain["method"], {}).setdefault(key, []).append(value)
    return found


def pooled(groups: Iterable[Values]) -> tuple[float, int]:
    """Standard deviation between seeds, taken to be the same in all groups, and its degrees of freedom."""
    many = [values for values in groups if len(values) > 1]
    freedom = sum(len(values) - 1 for values in many)
    squares = sum((len(values) - 1) * stdev(values) ** 2 for values in many)
    return (math.sqrt(squares / freedom) if freedom else 0.0), freedom


def verdict(better: Values, worse: Values, more: bool, spread: float, freedom: int) -> tuple[str, float]:
    """Judge the claim that `better` beats `worse`. Returns the verdict and the difference in the claim's direction.

    The verdict is "holds" or "is reversed" if the 95 % interval of the difference is without 0 (Welch's t-test), else
    "cannot be told". spread, freedom: of `pooled`, for a method with one seed.
    """
    difference = (fmean(better) - fmean(worse)) * (1 if more else -1)
    error = spread * math.sqrt(1 / len(better) + 1 / len(worse))
    if min(len(better), len(worse)) > 1:
        parts = [stdev(v) ** 2 / len(v) for v in (better, worse)]
        error = math.sqrt(sum(parts))
        weights = sum(part**2 / (len(v) - 1) for part, v in zip(parts, (better, worse), strict=True))
        freedom = int(error**4 / weights + 1e-9) if weights else 1  # rounded down: a wider interval
    if abs(difference) <= T95[min(freedom, len(T95) - 1)] * error:
        return "cannot be told", difference
    return ("holds" if difference > 0 else "is reversed"), difference


def shown(key: str, values: Values | None) -> str:
    if not values:
        return "–"
    scale = 100 if MEASURES[key][1] else 1
    mean, error = mean_and_error([scale * value for value in values])
    return f"{mean:.1f}" if error is None else f"{mean:.1f} ± {error:.1f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)] + [""]


def chains_of(
    record: Mapping[str, Any], data: str, method: str | None = None, longer: int = 1
) -> list[Mapping[str, Any]]:  # fmt: skip
    found = [c for c in record["chains"] if c["data"] == data and c["longer"] == longer]
    return [c for c in found if method in (None, c["method"])]


def begun(record: Mapping[str, Any]) -> list[str]:
    """Datasets with any result."""
    return list(dict.fromkeys(c["data"] for c in record["chains"] if "ends" in c and c["results"]))


def names(record: Mapping[str, Any], data: str, ablation: bool) -> list[str]:
    found = [c["method"] for c in chains_of(record, data) if c.get("ablation") == ablation]
    return list(dict.fromkeys(found))


def cost_columns(record: Mapping[str, Any], data: str, method: str, end: str, longer: int = 1) -> list[str]:
    """Steps, TFLOP and core seconds of pre-training up to the point `end`."""
    chains = chains_of(record, data, method, longer)
    step = chains[0]["ends"].get(end, chains[0]["ends"]["images"])
    seconds = [cpu_seconds(chain, step) for chain in chains if f"pretrain-{step}" in chain["results"]]
    return [str(step), f"{step * chains[0]['step_flops'] / 1e12:.1f}", f"{fmean(seconds):.0f}" if seconds else "–"]


def cpu_seconds(chain: Mapping[str, Any], step: int) -> float:
    """Seconds of all pieces of a pre-training up to a step."""
    parts = {name: result for name, result in chain["results"].items() if name.startswith("pretrain-")}
    return sum(result["cpu_seconds"] for name, result in parts.items() if int(name.split("-")[1]) <= step)


def floor_rows(record: Mapping[str, Any], data: str, keys: Sequence[str], pad: int) -> list[list[str]]:
    floors = next((c["results"].get("floors") for c in chains_of(record, data, "floors")), None)
    if floors is None:
        return []
    rows = {"raw pixels": floors["pixels"], "untrained network": floors["untrained"]}
    real = {"fd": floors["real"]["fd"], "kd": 1000 * floors["real"]["kd"]}
    rows |= {"*training pictures as samples*": real | {f"{k}_guided": v for k, v in real.items()}}
    found = [[name, *[""] * pad, *(shown(k, [r[k]] if k in r else None) for k in keys)] for name, r in rows.items()]
    # Binomial error at a share of 1/2 in each class. All methods have the same pictures: differences have less error.
    classes = floors["counts"]["test_classes"]
    error = math.sqrt(sum(0.25 / n for n in classes)) / len(classes)
    noise = [f"± {100 * error:.1f} at most" if MEASURES[k][1] else "" for k in keys]
    return [*found, [f"*s.e. of a mean of {len(classes)} shares of {sum(classes)} pictures*", *[""] * pad, *noise]]


def markdown(record: Mapping[str, Any]) -> list[str]:
    lines = []
    keys = list(MEASURES)
    for data in begun(record):
        lines += [f"## {TITLES[data]}", ""]
        for end, title in (("images", "equal images"), ("compute", "equal compute (FLOPs of pre-training)")):
            found = by_method(record, data, end)
            rows = [
                [name, *cost_columns(record, data, name, end), *(shown(k, found.get(name, {}).get(k)) for k in keys)]
                for name in names(record, data, False)
            ]
            head = ["method", "steps", "TFLOP", "CPU s", *(MEASURES[k][0] for k in keys)]
            lines += [f"### Methods at {title}", "", *table(head, rows + floor_rows(record, data, keys, 3))]
            lines += [*claims(found, ORDER, f"Table 1's order at {title}"), ""]
        found = by_method(record, data, "images")
        some = ["UMD", *names(record, data, True)]
        rows = [
            [n, *cost_columns(record, data, n, "images")[1:], *(shown(k, found.get(n, {}).get(k)) for k in keys)]
            for n in some
        ]
        lines += ["### Ablations at equal images", ""]
        lines += table(["variant", "TFLOP", "CPU s", *(MEASURES[k][0] for k in keys)], rows)
        lines += [*claims(found, ABLATION_ORDER, "Table 2's order"), "", *longer_table(record, data, keys)]
        lines += [*tuning_table(record, data), ""]
    return lines + spent(record)


def longer_table(record: Mapping[str, Any], data: str, keys: Sequence[str]) -> list[str]:
    """The UMD that trained longer, beside the others."""
    longer = record["plan"]["longer"]
    found = by_method(record, data, "images", longer).get("UMD")
    if found is None:
        return []
    usual = by_method(record, data, "images").get("UMD", {})
    rows = [
        [name, *cost_columns(record, data, "UMD", "images", times), *(shown(k, measures.get(k)) for k in keys)]
        for name, times, measures in (("UMD", 1, usual), (f"UMD, {longer} times as long", longer, found))
    ]
    head = ["method", "steps", "TFLOP", "CPU s", *(MEASURES[k][0] for k in keys)]
    return [f"### {longer} times as long: the network in docs/results/paper-umd", "", *table(head, rows)]


def claims(found: Mapping[str, Mapping[str, Values]], order: Sequence[tuple[str, str, str]], title: str) -> list[str]:
    """One line for each comparison that the paper makes."""
    lines = []
    for key, better, worse in order:
        a, b = (found.get(name, {}).get(key) for name in (better, worse))
        if not a or not b:
            continue
        spread, freedom = pooled(measures.get(key, ()) for measures in found.values())
        word, difference = verdict(a, b, MEASURES[key][2], spread, freedom)
        scale = 100 if MEASURES[key][1] else 1
        lines.append(
            f"- {MEASURES[key][0].removesuffix(', %')}: {better} better than {worse}: **{word}** "
            f"(by {scale * difference:.1f}{'' if freedom else ', one seed and no spread known'})"
        )
    return [f"{title}:", "", *lines] if lines else []


def tuning_curve(chain: Mapping[str, Any]) -> dict[int, dict[str, float]]:
    """Step of the fine-tuning from equal images -> its 100-shot accuracy and Fréchet distance without guidance."""
    step, results = chain["ends"]["images"], chain["results"]
    found: dict[int, dict[str, float]] = {}
    if f"probe-{step}" in results:
        found[0] = {"shots": results[f"probe-{step}"]["shots"]}
    for name, result in results.items():
        part = name.removeprefix(f"finetune-{step}-").split("-")
        if part[0] == "probe" and name != f"probe-{part[1]}":
            found.setdefault(int(part[1]), {})["shots"] = result["shots"]
        if part[0] == "distance" and part[3:] == ["1", chain["leads"]]:
            found.setdefault(int(part[1]), {})["fd"] = result["fd"]
    return dict(sorted(found.items()))


def curves_of(record: Mapping[str, Any], data: str) -> dict[str, dict[int, dict[str, float]]]:
    """Fine-tuning curves by method, of the first seed, for methods measured during fine-tuning."""
    found = {n: tuning_curve(chains_of(record, data, n)[0]) for n in names(record, data, False)}
    return {n: curve for n, curve in found.items() if len(curve) > 2}


def tuning_table(record: Mapping[str, Any], data: str) -> list[str]:
    curves = curves_of(record, data)
    steps = sorted({step for curve in curves.values() for step in curve})
    rows = []
    for name, curve in curves.items():
        for key in ("shots", "fd"):
            values = [[curve[s][key]] if key in curve.get(s, {}) else None for s in steps]
            rows.append([f"{name}: {MEASURES[key][0]}", *(shown(key, value) for value in values)])
    head = ["while fine-tuning, first seed; after steps", *map(str, steps)]
    return ["### Fine-tuning with labels (Figure 4)", "", *table(head, rows)] if rows else []


def spent(record: Mapping[str, Any]) -> list[str]:
    """Hours spent, by kind of work."""
    hours: dict[str, float] = {}
    for chain in record["chains"]:
        for name, result in chain["results"].items():
            kinds = {"-probe-": "probes", "-distance-": "samples and distances", "finetune-": "fine-tuning"}
            kinds |= {"pretrain-": "pre-training", "probe-": "probes", "floors": "floors"}
            kind = next(kind for part, kind in kinds.items() if part in name)
            hours[kind] = hours.get(kind, 0.0) + result["cpu_seconds"] / 3600
    total = sum(hours.values())
    parts = ", ".join(f"{kind} {value:.1f}" for kind, value in sorted(hours.items(), key=lambda e: -e[1]))
    return [f"CPU hours, one thread each, on a machine that had other work too: {total:.1f} ({parts}).", ""]


def write_report(record: Mapping[str, Any], out: Path, figures: Path) -> None:
    """Write paper.json, the figures, and the part of paper.md between two marks. The text around it stays."""
    figures.mkdir(parents=True, exist_ok=True)
    write_whole(figures / "paper.json", (json.dumps(record, indent=1) + "\n").encode())
    file = figures / "paper.md"
    text = file.read_text("utf-8") if file.exists() else f"# The paper in small\n\n{BEGIN}\n{END}\n"
    before, after = text.split(BEGIN)[0], text.split(END)[-1]
    pictures = [
        "![Accuracy and distance against compute and images; while fine-tuning](paper.png)",
        "![Guided samples](paper-samples.png)",
        "*Guided samples, first seed. Rows: MAE, DiT, MaskDiT, UMD. The first columns are one sample of each class.*",
    ]
    numbers = "\n\n".join(["", *pictures, "\n".join(markdown(record))])
    write_whole(file, f"{before}{BEGIN}\n{numbers}\n{END}{after}".encode())
    draw(record, figures / "paper.png")
    samples(record, out, figures / "paper-samples.png")


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Draw one row per dataset: probe over compute and over images, distance over compute, and fine-tuning."""
    every = begun(record)
    if not every:
        return
    with rc_context(STYLE):
        figure = Figure(figsize=(13, 3.1 * len(every)), layout="constrained", dpi=130)
        rows = figure.subplots(len(every), 5, squeeze=False)
        for data, axes in zip(every, rows, strict=True):
            for name in names(record, data, False):
                draw_method(record, data, name, axes)
            titles = [f"{TITLES[data]}: 100-shot, %", "100-shot, %", "FD after fine-tuning"]
            titles += ["100-shot while fine-tuning, %", "FD while fine-tuning"]
            units = ["TFLOP of pre-training", "thousand images", "TFLOP of pre-training", "steps", "steps"]
            for ax, title, unit in zip(axes, titles, units, strict=True):
                ax.set_title(title)
                ax.set_xlabel(unit)
                ax.grid(axis="y")
            axes[0].legend()
        figure.savefig(path, facecolor="white")


def draw_method(record: Mapping[str, Any], data: str, name: str, axes: Any) -> None:
    chains, style = chains_of(record, data, name), dict(color=COLOUR.get(name, COLOURS["muted"]), marker="o", ms=3)
    flops, batch = chains[0]["step_flops"], record["plan"]["batch"]
    steps = sorted({int(p.split("-")[1]) for c in chains for p in c["results"] if p.startswith("probe-")})
    for ax, unit in ((axes[0], flops / 1e12), (axes[1], batch / 1e3)):
        line(ax, [s * unit for s in steps], [[100 * v["shots"] for v in at(chains, s)] for s in steps], name, style)
    tuned = [s for s in steps if any("fd" in v for v in at(chains, s))]
    values = [[v["fd"] for v in at(chains, s) if "fd" in v] for s in tuned]
    line(axes[2], [s * flops / 1e12 for s in tuned], values, name, style)
    curve = curves_of(record, data).get(name, {})
    for ax, key, scale in ((axes[3], "shots", 100), (axes[4], "fd", 1)):
        there = {s: scale * v[key] for s, v in curve.items() if key in v}
        ax.plot(list(there), list(there.values()), **style)


def at(chains: Sequence[Mapping[str, Any]], step: int) -> list[dict[str, float]]:
    """Measures at a step, for the seeds that have reached it."""
    return [v for v in (measured(chain, step) for chain in chains) if "shots" in v]


def line(ax: Any, x: Values, values: Sequence[Values], name: str, style: Any) -> None:
    """Draw means with their standard errors."""
    found = [mean_and_error(v) for v in values]
    ax.errorbar(x, [m for m, _ in found], [e or 0 for _, e in found], label=name, linewidth=1.2, **style)


def samples(record: Mapping[str, Any], out: Path, path: Path) -> None:
    """Draw guided samples: one row per method, one column per class. Does nothing if there are none."""
    rows = []
    for chain in record["chains"]:
        usual = "ends" in chain and not chain["ablation"] and chain["longer"] == 1
        if usual and chain["seed"] == record["plan"]["seeds"][0]:
            name = f"finetune-{chain['ends']['images']}-distance-{chain['finetune_steps']}-guidance-"
            name += f"{max(record['plan']['cfg_scales']):g}-{chain['leads']}.npz"
            files = list(out.glob(f"{chain['data']}-{chain['method'].lower()}-{chain['seed']}/{name}"))
            if files:
                with np.load(files[0], allow_pickle=False) as stored:
                    images = stored["images"][:18]
                padded = np.full((18, 32, 32, 3), 255, np.uint8)
                padded[: len(images), : images.shape[1], : images.shape[2]] = images
                rows.append(padded)
    if rows:
        save_png(grid(np.concatenate(rows), 18), path, scale=2)
