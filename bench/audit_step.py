"""`umd bench audit --step`: a whole training step as a GPU would run it, counted on tensors without data.

Lists every operation with its kernel launches, bytes and FLOPs (`record_step.py`). The time of an operation is its
roofline: arithmetic or memory traffic at the data sheet's rate, whichever takes longer. Nothing is measured. Real
kernels are slower than the roofline, or faster where they find their input in the cache.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from umd import ops
from umd.bench.record_step import KINDS, Call, record
from umd.bench.step import diffusers_dit, diffusers_eps, dit_loss
from umd.config import OBJECTIVES, ModelConfig, ObjectiveConfig, model_config
from umd.errors import UserError
from umd.files import write_json
from umd.machine.device import autocast
from umd.machine.gpus import GPUS, Gpu
from umd.methods import build_objective
from umd.schedule import NoiseSchedule
from umd.spans import PARTS, span
from umd.train.plan import LAUNCHED
from umd.train.run import RunConfig
from umd.train.step_counts import as_on_gpu, labels_of, make_step, sample_lengths

LAUNCH_SECONDS = 2e-6  # shortest time of any kernel
CARDS = {"a100": GPUS["a100-80"], "h100": GPUS["h100"]}
ByCard = dict[str, float]  # by the keys of CARDS
BF16 = torch.bfloat16
EAGER = "eager DiT-L/2"


@dataclass(frozen=True)
class Network:
    """A network and its objective. `eager`: diffusers' DiT of the same sizes, trained as in its users' scripts."""

    model: ModelConfig
    objective: ObjectiveConfig
    eager: bool = False
    recompute_gelu: bool = False
    gelu: ops.Gelu = "ours"


_LATENTS = model_config("UMD-L/2", image_size=(32, 32), channels=4)
_LABELLED = replace(_LATENTS, num_classes=1000)
NETWORKS = {
    "UMD-B/4": Network(model_config("UMD-B/4", image_size=(64, 64)), OBJECTIVES["umd"]),
    "UMD-L/2": Network(_LATENTS, OBJECTIVES["umd"]),
    "DiT-L/2": Network(_LABELLED, OBJECTIVES["dit"]),
    EAGER: Network(_LABELLED, OBJECTIVES["dit"], eager=True),
}


# Alternatives to keeping the output of our GELU kernels for the backward pass.
GELU_CHOICES: dict[str, dict] = {
    "GELU made again": dict(recompute_gelu=True),
    "GELU in products": dict(gelu="transformer_engine"),
}


@dataclass(frozen=True)
class Row:
    """All equal operations in one part of the step, added up."""

    op: str
    kind: str
    part: str  # one of umd.spans.PARTS, with " backward" appended in the backward pass, or "rest"
    launches: int
    bytes: int
    flops: int
    us: ByCard


@dataclass(frozen=True)
class Block:
    """What one encoder block adds to the step, as (forward, backward)."""

    launches: dict[str, tuple[int, int]]  # by kind
    rows: dict[str, tuple[float, float]]  # by kind: bytes per token, in units of D numbers in bf16


@dataclass(frozen=True)
class Step:
    """The totals and rows of a whole step of one network."""

    network: str
    batch: int
    launches: int
    bytes: int
    flops: int
    model_flops: int  # as MFU counts: each product once forward and twice backward, no recomputation
    ms: ByCard
    images_per_second: ByCard
    mfu: ByCard
    product_share: ByCard  # matrix products' share of the time
    host_ms: float  # time of a fast host to launch all kernels one by one, without a CUDA graph
    block: Block
    other_blocks: dict[str, Block]  # of `GELU_CHOICES`
    programs: dict[str, int]  # by kernel of ours: programs of its smallest launch, to compare with an H100's SMs
    rows: tuple[Row, ...]


def record_network(network: Network, batch: int) -> list[Call]:
    """Record the calls of the second step of `batch` images. The first also allocates the optimizer's state."""
    return record_eager(network, batch) if network.eager else record_ours(network, batch)


def record_ours(network: Network, batch: int) -> list[Call]:
    config = RunConfig(
        model=network.model, objective=network.objective, batch_size=batch, recompute_gelu=network.recompute_gelu,
        gelu=network.gelu,
    )  # fmt: skip
    with as_on_gpu(), ops.gelu_by(network.gelu):
        step = make_step(config, batch, BF16, torch.float32)
        labels = labels_of(config, batch)
        work = torch.zeros(batch, config.model.channels, *config.model.image_size), labels, torch.arange(batch), 1e-4
        step(*work)
        step.load(*work)
        corruption = step.objective.corrupt(batch, 0, torch.device("cpu"), labels)
        return record(step.run, sample_lengths(corruption.layout))  # type: ignore[union-attr]


def record_eager(network: Network, batch: int) -> list[Call]:
    with as_on_gpu():
        step = eager_step(network.model, batch)
        step()
        return record(step, {})


def eager_step(config: ModelConfig, batch: int) -> Callable[[], None]:
    """Make a training step of diffusers' DiT: autocast, torch's fused AdamW.

    Raises:
        UserError: diffusers is not installed.
    """
    try:
        model = diffusers_dit(config, config.depth + config.decoder_depth)
    except ImportError as error:
        raise UserError(
            f"{EAGER} needs diffusers ({error}): pip install diffusers, or leave it out of --models"
        ) from error
    model.train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    averages = [p.detach().clone() for p in parameters]
    x_start, schedule = torch.zeros(batch, config.channels, *config.image_size), NoiseSchedule("cosine")
    predict, labels = diffusers_eps(model), torch.zeros(batch, dtype=torch.int64)

    def step() -> None:
        with autocast(x_start.device, BF16):
            loss = dit_loss(predict, x_start, schedule, labels)
        with span("backward"):
            loss.backward()
        with span("clip"):
            clip_as_on_gpu([p.grad for p in parameters if p.grad is not None])
        with span("optimizer"):
            optimizer.step()
        with span("EMA"), torch.no_grad():
            for average, p in zip(averages, parameters, strict=True):
                average.mul_(0.9999).add_(p, alpha=1e-4)
        optimizer.zero_grad(set_to_none=True)

    return step


@torch.no_grad()
def clip_as_on_gpu(gradients: list[Tensor]) -> None:
    """Clip to norm 1 with the calls on lists that torch's clip_grad_norm_ makes on a GPU only."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    torch._foreach_mul_(gradients, (1 / (norm + 1e-6)).clamp(max=1))


def seconds(call: Call, gpu: Gpu) -> float:
    """Roofline time of one call on a GPU, in seconds. Products in fp32 run in TF32, at half the rate of bf16."""
    rate = gpu.bf16 / 2 if call.fp32 else gpu.bf16
    return max(call.flops / rate, call.bytes / gpu.bandwidth, call.launches * LAUNCH_SECONDS)


def model_flops(network: Network, batch: int, calls: list[Call]) -> int:
    """FLOPs of the step as MFU counts them, by formula.

    For diffusers' DiT: as counted, less the attention scores that the backward pass recomputes.
    """
    if not network.eager:
        objective = build_objective(network.model, network.objective, NoiseSchedule("cosine"))
        return objective.step_flops(batch)
    again = sum(call.flops for call in calls if call.kind == "attention" and call.backward) // 5
    return sum(call.flops for call in calls) - again


def rows_of(calls: list[Call]) -> tuple[Row, ...]:
    """Add up equal operations, in order of first appearance."""
    groups: dict[tuple[str, str, str], list[Call]] = {}
    for call in calls:
        groups.setdefault((call.op, call.kind, call.part + " backward" * call.backward), []).append(call)
    return tuple(
        Row(
            *key,
            launches=sum(c.launches for c in group),
            bytes=sum(c.bytes for c in group),
            flops=sum(c.flops for c in group),
            us={card: 1e6 * sum(seconds(c, gpu) for c in group) for card, gpu in CARDS.items()},
        )
        for key, group in groups.items()
    )


def programs_of(calls: list[Call]) -> dict[str, int]:
    ours = [call for call in calls if call.kernel]
    return {name: min(c.programs for c in ours if c.kernel == name) for name in dict.fromkeys(c.kernel for c in ours)}


def block_of(network: Network, batch: int) -> Block:
    """Cost of one encoder block: a shallow network of full width with one block more, less that network."""
    launches, moved = ({kind: [0, 0] for kind in (*KINDS, "other")} for _ in range(2))
    for sign, depth in ((1, 2), (-1, 1)):
        model = replace(network.model, depth=depth, decoder_depth=1)
        for call in record_network(replace(network, model=model), batch):
            if call.kind != "update" and call.part != "rest":
                launches[call.kind][call.backward] += sign * call.launches
                moved[call.kind][call.backward] += sign * call.bytes
    row = 2 * network.model.hidden_size * num_tokens(network, batch)
    rows = {kind: (a / row, b / row) for kind, (a, b) in moved.items()}
    return Block({kind: (a, b) for kind, (a, b) in launches.items()}, rows)


def num_tokens(network: Network, batch: int) -> int:
    """Number of tokens of the whole batch in an encoder block."""
    if network.eager:
        return batch * network.model.num_patches
    objective = build_objective(network.model, network.objective, NoiseSchedule("cosine"))
    return objective.corrupt(batch, 0, torch.device("cpu")).layout.encoder_blocks.num_tokens  # type: ignore[union-attr]


def audit_step(name: str, batch: int) -> Step:
    """Audit one of `NETWORKS`, trained in bf16 on `batch` images per step."""
    network = NETWORKS[name]
    calls = record_network(network, batch)
    rows, needed = rows_of(calls), model_flops(network, batch, calls)
    times = {card: sum(row.us[card] for row in rows) / 1e6 for card in CARDS}
    products = {card: sum(row.us[card] for row in rows if row.kind == "products") / 1e6 for card in CARDS}
    launches = sum(row.launches for row in rows)
    return Step(
        network=name, batch=batch, launches=launches,
        bytes=sum(row.bytes for row in rows), flops=sum(row.flops for row in rows), model_flops=needed,
        host_ms=1e3 * launches * LAUNCHED[0], block=block_of(network, batch), rows=rows,
        other_blocks={
            what: block_of(replace(network, **changes), batch)
            for what, changes in ({} if network.eager else GELU_CHOICES).items()
        },
        programs=programs_of(calls),
        ms={card: 1e3 * time for card, time in times.items()},
        images_per_second={card: batch / time for card, time in times.items()},
        mfu={card: needed / times[card] / gpu.bf16 for card, gpu in CARDS.items()},
        product_share={card: products[card] / time for card, time in times.items()},
    )  # fmt: skip


def run(models: tuple[str, ...], batch: int, rows: Path | None, chart: Path | None, console: Console) -> list[Step]:
    """Count every operation of each model's step, print the tables, write JSON and chart.

    Raises:
        UserError: diffusers is needed and not installed, or the batch is too small for an objective.
    """
    jobs = track(models, description="counting", console=console, transient=True)
    steps = [audit_step(name, batch) for name in jobs]
    for step in steps:
        print_rows(step, console)
    print_blocks(steps, console)
    print_programs(steps, console)
    print_totals(steps, console)
    if rows is not None:
        write_json(rows, [asdict(step) for step in steps])
    if chart is not None:
        draw(steps, chart)
    return steps


def print_rows(step: Step, console: Console, share: float = 0.01) -> None:
    """Print the operations that take at least `share` of the time on either GPU, by part, and the rest as one row."""
    table = Table(title=f"{step.network}, batch {step.batch}, bf16: roofline of each operation; nothing is measured")
    for name in ("part", "op", "launches", "MB", "GFLOP", "A100 µs", "H100 µs"):
        table.add_column(name, justify="left" if name in ("part", "op") else "right", overflow="fold")
    order = {name: i for i, name in enumerate((*PARTS, "rest"))}
    rows = sorted(step.rows, key=lambda r: (order[r.part.removesuffix(" backward")], r.part, -r.us["h100"]))
    large = [r for r in rows if max(r.us[card] / step.ms[card] for card in CARDS) >= 1e3 * share]
    small = [row for row in rows if row not in large]
    cells = [(row.part, row.op, [row]) for row in large] + [("", f"{len(small)} others", small)]
    for part, op, group in cells:
        table.add_row(
            part, op, str(sum(r.launches for r in group)),
            f"{sum(r.bytes for r in group) / 1e6:.1f}", f"{sum(r.flops for r in group) / 1e9:.1f}",
            *(f"{sum(r.us[card] for r in group):.0f}" for card in CARDS),
        )  # fmt: skip
    console.print(table)


def print_blocks(steps: list[Step], console: Console) -> None:
    kinds = [kind for kind in (*KINDS, "other") if kind not in ("products", "attention")]
    table = Table(
        title="One encoder block, forward + backward;\nbut for products and attention, bytes in rows of D bf16 a token"
    )
    for name in ("", "launches", *kinds, "together"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=not name)
    for step in steps:
        for name, block in {step.network: step.block, **step.other_blocks}.items():
            launches = zip(*block.launches.values(), strict=True)
            rows = [block.rows[kind] for kind in kinds]
            rows.append((sum(a for a, _ in rows), sum(b for _, b in rows)))
            cells = ("{:.1f} + {:.1f}".format(*r) for r in rows)
            table.add_row(name, "{} + {}".format(*map(sum, launches)), *cells)
    console.print(table)


def print_programs(steps: list[Step], console: Console) -> None:
    steps = [step for step in steps if step.programs]
    if not steps:
        return
    table = Table(title="Programs of a launch, the smallest of a step, cut for 132 multiprocessors")
    for name in ("kernel", *(f"{step.network}, {step.batch} images" for step in steps)):
        table.add_column(name, justify="left" if name == "kernel" else "right")
    for kernel in dict.fromkeys(name for step in steps for name in step.programs):
        table.add_row(kernel, *(str(step.programs.get(kernel, "")) for step in steps))
    console.print(table)


def print_totals(steps: list[Step], console: Console) -> None:
    table = Table(title="A step; times are the roofline's, without overlap")
    for name in ("", *(step.network for step in steps)):
        table.add_column(name, justify="left" if not name else "right")
    both: dict[str, tuple[Callable[[Step], ByCard], str]] = {
        "ms, A100 / H100": (lambda s: s.ms, ".1f"),
        "images/s": (lambda s: s.images_per_second, ".0f"),
        "MFU": (lambda s: s.mfu, ".0%"),
        "of the time in products": (lambda s: s.product_share, ".0%"),
    }
    table.add_row("launches", *(str(step.launches) for step in steps))
    table.add_row("GB moved", *(f"{step.bytes / 1e9:.1f}" for step in steps))
    table.add_row("TFLOP", *(f"{step.flops / 1e12:.2f}" for step in steps))
    table.add_row("of the model", *(f"{step.model_flops / 1e12:.2f}" for step in steps))
    for label, (values, form) in both.items():
        table.add_row(label, *(" / ".join(format(value, form) for value in values(step).values()) for step in steps))
    table.add_row("ms of the host, uncaptured", *(f"{step.host_ms:.1f}" for step in steps))
    console.print(table)


KIND_COLORS = {
    "products": "#4477aa", "attention": "#66ccee", "norms": "#228833", "GELU": "#ccbb44", "sums": "#aa3377",
    "copies": "#ee6677", "other": "#bbbbbb", "update": "#555555",
}  # fmt: skip
PLACE_COLORS = {
    "encoder": "#4477aa", "encoder backward": "#99bbdd", "decoder": "#228833", "decoder backward": "#99cc99",
    "forward": "#aa3377", "forward backward": "#dd99bb", "rest": "#bbbbbb", "update": "#555555",
}  # fmt: skip
LABELS = {
    "products": "matrix products", "sums": "column sums", "other": "other elementwise", "update": "clip, AdamW, EMA",
    "forward": "whole network", "forward backward": "whole network backward",
    "rest": "corruption, casts, adaLN, head, loss",
}  # fmt: skip


def place_of(row: Row) -> str:
    if row.kind == "update":
        return "update"
    return row.part if row.part in PLACE_COLORS else "rest"


def draw(steps: list[Step], file: Path) -> None:
    """Draw each network's step on both GPUs as bars: above by kind of operation, below by part of the step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1.1 * len(steps) + 3.4), layout="constrained")
    figure.suptitle(
        f"A training step of {steps[0].batch} images in bf16: roofline from counted bytes and FLOPs, nothing measured"
    )
    axes = figure.subplots(2, 2, sharey=True, sharex="col")
    looks: tuple[tuple[Callable[[Row], str], dict[str, str]], ...]
    looks = (lambda row: row.kind, KIND_COLORS), (place_of, PLACE_COLORS)
    for line, (key, colors) in zip(axes, looks, strict=True):
        for ax, card in zip(line, CARDS, strict=True):
            left = [0.0] * len(steps)
            for name, color in colors.items():
                widths = [sum(r.us[card] for r in s.rows if key(r) == name) / 1e3 for s in steps]
                ax.barh(range(len(steps)), widths, left=left, color=color, label=LABELS.get(name, name), height=0.65)
                left = [a + b for a, b in zip(left, widths, strict=True)]
            for i, step in enumerate(steps if key is looks[0][0] else []):
                images, mfu = step.images_per_second[card], step.mfu[card]
                text = f" {left[i]:.0f} ms, {images:.0f} images/s, MFU {mfu:.0%}"
                ax.text(left[i], i, text, va="center", fontsize=8)
            ax.set_xlim(0, 1.5 * max(step.ms[card] for step in steps))
            ax.spines[["top", "right"]].set_visible(False)
        line[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    axes[0, 0].set_yticks(range(len(steps)), [step.network for step in steps])
    axes[0, 0].invert_yaxis()
    for ax, name in zip(axes[0], ("A100 80GB", "H100 SXM"), strict=True):
        ax.set_title(name, fontsize=10)
    for ax in axes[1]:
        ax.set_xlabel("ms a step")
    axes[0, 0].set_ylabel("by kind")
    axes[1, 0].set_ylabel("by part")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
