"""Write docs/results/paper.json, .md and .png from what `umd bench reproduce paper` has finished so far."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from umd.files import write_json, write_whole
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


class Claim(NamedTuple):
    """`better` beats `worse` in the paper, by whose numbers `theirs`."""

    measure: str
    better: str
    worse: str
    theirs: tuple[float, float]
    worse_measure: str = ""  # if it is another


UMD, X0, NOISE = "UMD", "UMD, only x0", "UMD, only noise"
FEWER, MASKED, WHOLE = "UMD, fewer noise-free", "UMD, noised 70 % masked", "UMD, noised not masked"
PLAIN = "UMD, no adaLN"
TABLE1 = [
    Claim("shots", "MAE", UMD, (36.6, 31.8)), Claim("shots", "MAE", "MaskDiT", (36.6, 26.3)),
    Claim("shots", "MAE", "DiT", (36.6, 25.7)), Claim("shots", UMD, "MaskDiT", (31.8, 26.3)),
    Claim("shots", UMD, "DiT", (31.8, 25.7)), Claim("shots", "MaskDiT", "DiT", (26.3, 25.7)),
    Claim("fd", "DiT", "MaskDiT", (21.2, 22.1)), Claim("fd", "DiT", UMD, (21.2, 23.2)),
    Claim("fd", "MaskDiT", UMD, (22.1, 23.2)), Claim("fd", UMD, "MAE", (23.2, 34.1)),
    Claim("fd_guided", "DiT", "MaskDiT", (18.9, 19.0)), Claim("fd_guided", "DiT", UMD, (18.9, 19.8)),
    Claim("fd_guided", "MaskDiT", UMD, (19.0, 19.8)), Claim("fd_guided", UMD, "MAE", (19.8, 26.8)),
]  # fmt: skip
TABLE2 = [
    Claim("shots", X0, UMD, (31.3, 30.9)), Claim("shots", NOISE, UMD, (31.5, 30.9)),
    Claim("shots", UMD, FEWER, (30.9, 27.7)), Claim("shots", UMD, MASKED, (30.9, 28.9)),
    Claim("shots", WHOLE, UMD, (32.7, 30.9)), Claim("shots", UMD, PLAIN, (30.9, 26.1)),
    Claim("fd_x0", UMD, UMD, (20.9, 23.2), "fd"), Claim("fd_x0", UMD, X0, (20.9, 26.7)),
    Claim("fd", UMD, NOISE, (23.2, 25.0)), Claim("fd", FEWER, UMD, (22.3, 23.2)),
    Claim("fd", UMD, MASKED, (23.2, 27.5)), Claim("fd", WHOLE, UMD, (21.1, 23.2)),
    Claim("fd", UMD, PLAIN, (23.2, 25.4)), Claim("fd_x0", FEWER, UMD, (20.0, 20.9)),
    Claim("fd_x0", UMD, MASKED, (20.9, 23.3)), Claim("fd_x0", WHOLE, UMD, (18.8, 20.9)),
    Claim("fd_x0", UMD, PLAIN, (20.9, 24.7)),
]  # fmt: skip
# 97.5 % quantile of Student's t by degrees of freedom.
T95 = (math.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31)
Values = Sequence[float]
Seeds = Mapping[int, float]  # seed -> value


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
            scale, predict, *more = name.removeprefix(start).split("-")
            if more:  # with more sampling steps
                continue
            if predict == "x_start" and scale == "1":
                found["fd_x0"] = result["fd"]
            if predict == chain["leads"]:
                suffix = "" if scale == "1" else "_guided"
                found |= {f"fd{suffix}": result["fd"], f"kd{suffix}": 1000 * result["kd"]}
    return found


def by_method(
    record: Mapping[str, Any], data: str, end: str, longer: int = 1, rate: float = 1.0
) -> dict[str, dict[str, dict[int, float]]]:  # fmt: skip
    """method -> measure -> seed -> value, at equal `images` or `compute`."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for chain in chains_of(record, data, longer=longer, rate=rate):
        if "ends" in chain:
            step = chain["ends"].get(end, chain["ends"]["images"])
            for key, value in measured(chain, step).items():
                found.setdefault(chain["method"], {}).setdefault(key, {})[chain["seed"]] = value
    return found


def paired(better: Seeds, worse: Seeds, more: bool) -> tuple[float, float | None]:
    """Mean difference between runs of the same seed, in favour of `better`, and half the width of its 95 % interval.

    By Student's t of the differences. The half width is None with a single common seed.
    """
    sign = 1 if more else -1
    differences = [sign * (better[seed] - worse[seed]) for seed in better if seed in worse]
    if len(differences) == 1:
        return differences[0], None
    return fmean(differences), T95[len(differences) - 1] * stdev(differences) / math.sqrt(len(differences))


def verdict(difference: float, half: float | None) -> str:
    if half is None:
        return "one seed"
    return "not resolved" if abs(difference) <= half else "**holds**" if difference > 0 else "**reversed**"


def shown(key: str, values: Seeds | None) -> str:
    if not values:
        return "–"
    scale = 100 if MEASURES[key][1] else 1
    mean, error = mean_and_error([scale * value for value in values.values()])
    return f"{mean:.1f}" if error is None else f"{mean:.1f} ± {error:.1f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)] + [""]


def chains_of(
    record: Mapping[str, Any], data: str, method: str | None = None, longer: int = 1, rate: float = 1.0
) -> list[Mapping[str, Any]]:
    found = [c for c in record["chains"] if c["data"] == data and (c["longer"], c["rate"]) == (longer, rate)]
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
    rows = {"raw pixels": floors["pixels"], "untrained UMD": floors["untrained"]}
    for name, part in (("training pictures as samples", "real"), ("the same, cropped and mirrored", "views")):
        real = {"fd": floors[part]["fd"], "kd": 1000 * floors[part]["kd"]}
        rows |= {f"*{name}*": real | {f"{k}_guided": v for k, v in real.items()}}
    found = [[name, *[""] * pad, *(shown(k, {0: r[k]} if k in r else None) for k in keys)] for name, r in rows.items()]
    # Binomial error at a share of 1/2 in each class, of independent pictures. All methods have the same pictures:
    # differences have less error.
    classes = floors["counts"]["test_classes"]
    error = math.sqrt(sum(0.25 / n for n in classes)) / len(classes)
    noise = [f"± {100 * error:.1f}" if MEASURES[k][1] else "" for k in keys]
    return [
        *found,
        [f"*sampling error of an accuracy near 50 %, on {sum(classes)} independent pictures*", *[""] * pad, *noise],
    ]


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
            lines += [*claims(found, TABLE1, f"The paper's Table 1 (equal images), and here at {title}"), ""]
        found = by_method(record, data, "images")
        some = ["UMD", *names(record, data, True)]
        rows = [
            [n, *cost_columns(record, data, n, "images")[1:], *(shown(k, found.get(n, {}).get(k)) for k in keys)]
            for n in some
        ]
        lines += ["### Ablations at equal images", ""]
        lines += table(["variant", "TFLOP", "CPU s", *(MEASURES[k][0] for k in keys)], rows)
        lines += [*claims(found, TABLE2, "The paper's Table 2"), "", *longer_table(record, data, keys)]
        lines += [*tuning_table(record, data), *checks(record, data)]
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


def claims(found: Mapping[str, Mapping[str, Seeds]], order: Sequence[Claim], title: str) -> list[str]:
    """A table with a row for each comparison that the paper makes."""
    rows = []
    for key, better, worse, theirs, other in order:
        a, b = found.get(better, {}).get(key), found.get(worse, {}).get(other or key)
        if not a or not b or not (seeds := [seed for seed in a if seed in b]):
            continue
        name, percent, more = MEASURES[key]
        difference, half = paired(a, b, more)
        scale = 100 if percent else 1
        rows.append(
            [name.removesuffix(", by x̂0") if other else name,
             *((f"{better}, by x̂0", f"{worse}, by ε̂") if other else (better, worse)),
             f"{theirs[0]}, {theirs[1]}", ", ".join(f"{scale * fmean(x[s] for s in seeds):.1f}" for x in (a, b)),
             f"{scale * difference:+.1f}{'' if half is None else f' ± {scale * half:.1f}'}", verdict(difference, half)]
        )  # fmt: skip
    head = ["", "better", "worse", "in the paper", "here", "difference, 95 %", ""]
    return [f"{title}:", "", *table(head, rows)] if rows else []


def checks(record: Mapping[str, Any], data: str) -> list[str]:
    """What another learning rate and more steps of sampling change, with the first seed."""
    plan = record["plan"]
    seed, rates, more = plan["seeds"][0], sorted([1.0, *plan["rates"]]), plan["more_sampling_steps"]
    columns: dict[str, dict[str, str]] = {}  # heading -> method -> value
    for key in ("shots", "fd"):
        for rate in rates:
            found = by_method(record, data, "images", rate=rate)
            there = {name: found.get(name, {}).get(key, {}).get(seed) for name in names(record, data, False)}
            values = {name: shown(key, {seed: value}) for name, value in there.items() if value is not None}
            columns[f"{MEASURES[key][0]}, rate × {rate:g}"] = values
    last = columns[f"FD, {more} sampling steps"] = {}
    for chain in chains_of(record, data):
        if chain["seed"] == seed and not chain.get("ablation", True):
            start = f"finetune-{chain['ends']['images']}-distance-{chain['finetune_steps']}"
            if result := chain["results"].get(f"{start}-guidance-1-{chain['leads']}-steps-{more}"):
                last[chain["method"]] = shown("fd", {seed: result["fd"]})
    columns = {head: values for head, values in columns.items() if values}
    if len(columns) <= 2:  # nothing but the usual
        return []
    rows = [[name, *(values.get(name, "–") for values in columns.values())] for name in names(record, data, False)]
    return ["### Other learning rates, more sampling steps", "", *table(["first seed, equal images", *columns], rows)]


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
            values = [{0: curve[s][key]} if key in curve.get(s, {}) else None for s in steps]
            rows.append([f"{name}: {MEASURES[key][0]}", *(shown(key, value) for value in values)])
    head = ["while fine-tuning, first seed; after steps", *map(str, steps)]
    return ["### Fine-tuning with labels (the paper's Figure 4)", "", *table(head, rows)] if rows else []


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
    write_json(figures / "paper.json", record)
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
        usual = "ends" in chain and not chain["ablation"] and chain["longer"] == chain["rate"] == 1
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
