"""The demo's report: a self-contained HTML page, and the record from which it is made."""

import base64
import hashlib
import io
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from umd.errors import UserError
from umd.files import make_folder, write_whole
from umd.report import figures

NBSP = "\N{NO-BREAK SPACE}"  # keeps a number and its unit on one line
MAX_STACKS = 12  # most image stacks side by side; with more a figure is too small to read
LOSS_PARTS = {
    "loss_noised_eps": "noise ε̂ (noised half)",
    "loss_noised_x0": "picture x̂₀ (noised half)",
    "loss_clean": "picture x̂₀ (clean half)",
    "loss": "loss",
}
NEXT = (
    "umd pretrain umd-tiny --data.source path/to/images --out runs/mine --minutes 30",
    "umd probe runs/mine --shots 10",
    "umd finetune runs/mine --out runs/mine-labels --minutes 30",
    "umd sample runs/mine-labels --cfg-scale 4",
)


@dataclass
class Part:
    """One part of the run: its name, its duration in seconds, its result in a few words, and its command."""

    name: str
    seconds: float
    summary: str
    command: str = ""


@dataclass
class ProbeRow:
    """Probe accuracy of one representation: mean and standard deviation over `seeds`, fractions in [0, 1]."""

    name: str
    mean: float
    std: float
    shots: int
    chance: float
    seeds: int = 3


@dataclass
class DemoRecord:
    """Everything that the page shows, as plain data. Images are uint8 [H, W, 3].

    If a field is empty, a sentence replaces its section.
    """

    title: str
    command: str
    started: str
    machine: dict[str, str]
    settings: dict[str, str]
    dataset: str
    parts: list[Part] = field(default_factory=list)
    # Run name → rows of its metrics.jsonl.
    metrics: dict[str, list[dict]] = field(default_factory=dict)
    # (masked input, reconstruction, original), first for noise-free images, then for noised ones.
    triplets: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    noised_triplets: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    # (model time t, x_t, x̂0).
    denoising: list[tuple[int, np.ndarray, np.ndarray]] = field(default_factory=list)
    class_names: list[str] = field(default_factory=list)
    # "guidance 1.0" → uint8 [num_classes, n, H, W, 3].
    samples: dict[str, np.ndarray] = field(default_factory=dict)
    # Samples of a model that was trained for longer: description → uint8 [n, H, W, 3].
    longer_samples: dict[str, np.ndarray] = field(default_factory=dict)
    # Each row holds the views of one image; the columns name them: given, samples, original.
    inpainting_columns: list[str] = field(default_factory=list)
    inpainting: list[list[np.ndarray]] = field(default_factory=list)
    # The model first, then the floors it is compared with.
    probe: list[ProbeRow] = field(default_factory=list)
    # (name of the distance, what was measured, value); the first one is also shown at the top.
    frechet: list[tuple[str, str, float]] = field(default_factory=list)
    mask_ratio_no_noise: float = 0.0  # mask ratio of `triplets`
    mask_ratio: float = 0.0  # mask ratio of `noised_triplets`


def save_record(record: DemoRecord, folder: Path) -> Path:
    """Write `record.json` and, with its arrays, `record.npz` into `folder`. Returns the path of the JSON file."""
    arrays: dict[str, Any] = {}

    def pack(value):
        if isinstance(value, np.ndarray):
            arrays[f"{len(arrays)}"] = value
            return {"array": f"{len(arrays) - 1}"}
        if isinstance(value, dict):
            return {key: pack(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [pack(item) for item in value]
        return value.item() if isinstance(value, np.generic) else value

    packed = pack(asdict(record))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    packed["arrays_sha256"] = hashlib.sha256(buffer.getvalue()).hexdigest()
    write(Path(folder) / "record.npz", buffer.getvalue())
    return write(Path(folder) / "record.json", json.dumps(packed, indent=1).encode())


def load_record(folder: Path) -> DemoRecord:
    """Read what `save_record` wrote. Raises UserError if it is missing or damaged."""
    path = Path(folder) / "record.json"
    if not path.is_file():
        raise UserError(f"There is no record.json in {folder}; name a folder the demo wrote, such as runs/demo.")
    try:
        packed = json.loads(path.read_bytes())
        data = path.with_suffix(".npz").read_bytes()
        if hashlib.sha256(data).hexdigest() != packed.pop("arrays_sha256"):
            raise ValueError("record.npz is not the file that record.json was written with")
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            arrays = dict(stored)

        def unpack(value):
            if isinstance(value, dict) and set(value) == {"array"}:
                return arrays[value["array"]]
            if isinstance(value, dict):
                return {key: unpack(item) for key, item in value.items()}
            return [unpack(item) for item in value] if isinstance(value, list) else value

        values = {name: unpack(value) for name, value in packed.items()}
        for name in ("triplets", "noised_triplets", "denoising", "frechet"):
            values[name] = [tuple(row) for row in values[name]]
        values["parts"] = [Part(**row) for row in values["parts"]]
        values["probe"] = [ProbeRow(**row) for row in values["probe"]]
        return DemoRecord(**values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"The record in {folder} cannot be read ({error}); run the demo again.") from error


def write_report(record: DemoRecord, path: Path) -> Path:
    """Write the page; an older one is replaced atomically. Returns its path."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"accuracy": _accuracy, "data_uri": _data_uri, "duration": _duration}
    environment.filters |= {"loss": _loss, "number": _number, "percent": _percent, "points": _points}
    environment.globals["enlargement"] = _enlargement
    page = environment.get_template("report.html").render(
        record=record,
        runs=[_run(name, rows) for name, rows in record.metrics.items() if rows],
        total_seconds=sum(part.seconds for part in record.parts),
        denoising=_evenly(record.denoising, MAX_STACKS),
        triplets=_evenly(record.triplets, MAX_STACKS),
        noised_triplets=_evenly(record.noised_triplets, MAX_STACKS),
        inpainting=_evenly(record.inpainting, MAX_STACKS),
        probes=_probes(record.probe),
        frechet=[row for row in record.frechet if math.isfinite(row[2])],
        next_commands=NEXT,
    )
    return write(Path(path), page.encode())


def write(path: Path, data: bytes) -> Path:
    """Write a file with `write_whole`, make its folder if needed, and raise UserError instead of OSError."""
    try:
        make_folder(path.parent)
        write_whole(path, data)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{path} cannot be written: {why}; free space or choose another folder.") from error
    return path


def probe_margins(rows: list[ProbeRow]) -> list[tuple[ProbeRow, float, float]]:
    """By how much the first row beats each of the other rows, the floors.

    Returns:
        For each floor (floor, difference of the means, its standard deviation √(σ₁² + σ₂²)), as fractions.
    """
    return [(floor, rows[0].mean - floor.mean, math.hypot(rows[0].std, floor.std)) for floor in rows[1:]]


def _probes(rows: list[ProbeRow]) -> list[dict]:
    """Data of the probe's section: one entry for each number of shots."""
    probes = []
    for shots in dict.fromkeys(row.shots for row in rows):
        model, *floors = [row for row in rows if row.shots == shots]
        if not math.isfinite(model.mean):
            continue
        kept = [model] + [floor for floor in floors if math.isfinite(floor.mean)]
        margins = probe_margins(kept)
        bars = [(row.name, row.mean, row.std) for row in kept]
        probes.append(
            {
                "rows": kept,
                "margins": margins,
                "sentences": [_in_words(model, *margin) for margin in margins],
                "svg": Markup(figures.probe_bars(bars, model.chance, name=f"probe-{shots}")),
            }
        )
    return probes


def _in_words(model: ProbeRow, floor: ProbeRow, difference: float, deviation: float) -> str:
    points = f"{abs(100 * difference):.1f} percentage points"
    spread = f"(±{NBSP}{100 * deviation:.1f})" if math.isfinite(deviation) else "(spread unknown)"
    if math.isfinite(deviation) and abs(difference) <= deviation:
        return f"{model.name} and “{floor.name}” are level: {points} apart, within the spread {spread}."
    verb = "beats" if difference > 0 else "falls short of"
    return f"{model.name} {verb} “{floor.name}” by {points} {spread}."


def _run(name: str, rows: list[dict]) -> dict:
    """Data of one run: the plot of its loss, and the numbers of its row in the throughput table."""

    def column(key: str) -> np.ndarray:
        return figures.series(rows, key)[1]

    steps, seconds = figures.series(rows, "seconds")
    step_times = [dt / n for dt, n in zip(np.diff(seconds), np.diff(steps), strict=True) if n > 0 and dt > 0]
    loss = column("loss")
    tail = loss[-max(1, len(loss) // 20) :]
    slug = f"run-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    plot = figures.curves(rows, LOSS_PARTS, name=slug, title=name, unit="mean squared error", smoothed=True)
    return {
        "name": name,
        "steps": int(max(column("step"), default=0)),
        "images_seen": max(column("images_seen"), default=None),
        "seconds": max(seconds, default=None),
        "images_per_second": _median(column("images_per_second")),
        "step_seconds": _median(step_times),
        "mfu": _median(column("mfu")),
        "first_loss": loss[0] if len(loss) else None,
        "last_loss": tail.mean() if len(tail) else None,
        "plot": Markup(plot),
    }


def _median(values: Iterable[float]) -> float | None:
    values = list(values)
    return statistics.median(values) if values else None


def _evenly(items: list, count: int) -> list:
    """At most `count` of the items, evenly spaced, the first and the last included."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _data_uri(image: np.ndarray) -> str:
    """uint8 [H, W, 3] (or [H, W, 1]) as a PNG data URI."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
        raise ValueError(f"A picture must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}.")
    buffer = io.BytesIO()
    Image.fromarray(image.repeat(3 // image.shape[2], 2)).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _enlargement(height: int, size: int) -> int:
    """The integer factor that brings `height` closest to `size`; with an integer all pixels keep equal size."""
    return max(1, round(size / height))


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 60:
        return f"{seconds:.1f}{NBSP}s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
    return text.replace(" ", NBSP)


def _number(value: float | None, digits: int = 3) -> str:
    """Format with three significant digits and separated thousands; a dash for a missing value."""
    if value is None or not math.isfinite(value):
        return "–"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def _accuracy(row: ProbeRow) -> str:
    spread = f" ± {100 * row.std:.1f}" if math.isfinite(row.std) else ""
    return f"{100 * row.mean:.1f}{spread}{NBSP}%"


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f} points".replace("-", "−")


def _loss(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}" if abs(value) < 1000 else f"{value:.2g}"


def _percent(fraction: float, digits: int = 1) -> str:
    return f"{100 * fraction:.{digits}f}{NBSP}%" if math.isfinite(fraction) else "–"
