"""`umd bench trace A B`: show where two traces of torch.profiler differ, e.g. ours and DiT's, or before and after.

In GPU traces kernels are compared, in CPU traces ops, each without the ops inside it. All times are per step.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import groupby

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from umd.bench.options import TraceBench
from umd.errors import UserError
from umd.files import write_json
from umd.train.trace import Trace, read_trace, readable

TOTAL, IDLE, LAUNCHING, STEP = WHOLE = ("total", "GPU idle", "host, launching", "step")  # groups with a single row
CAPTION = "share: of the difference in all; step: by the clock of the host"
CAPTION_GPU = f"{CAPTION}; GPU idle: between kernels of the stream that computes most"
SHOWN, LEAST = 6, 0.01  # most names shown per group; smallest difference shown, relative to the largest of any group
# The first pattern found in a name decides its group.
GROUPS = {
    "NCCL": r"nccl|gloo|c10d|record_param_comms",
    "memcpy": r"^mem(cpy|set)",
    "attention": r"flash|fmha|attention|attn|sdpa|(?<!log)(?<!log_)softmax",
    "optimizer": r"multi_tensor|adam|_foreach",
    "matmul": r"gemm|gemv|cutlass|cublas|xmma|nvjet|split_?k|matmul|addmm|bmm|\bmm\b|linear|\bdot\b|conv(olution|\dd)",
    "norm": r"layer_?norm|rms_?norm|group_?norm|batch_?norm|gammabeta",
    "copies and casts": r"copy|copied|\bcat\b|catarray|clone|index|gather|scatter|embedding|fill|zero",
    "reduction": r"reduce|triton_(red|per)|\bsum|_sum_|mean|norm",
    "allocation": r"::(new_)?(empty|resize)",
    "elementwise": r"elementwise|pointwise|triton_poi|gelu|silu|::(add|sub|rsub|mul|div|neg|abs|sqrt|rsqrt|pow|square"
    r"|exp|log|sin|cos|where|clamp|clamp_min|lerp|addcmul|addcdiv|sigmoid|tanh|bitwise_\w+?|eq|ne|lt|gt|le|ge)_?$",
}


@dataclass(frozen=True)
class Row:
    """Times per step of a kernel or op. With name "": of a whole group, or of an entry of `WHOLE`."""

    group: str
    name: str
    a_ms: float
    b_ms: float
    a_calls: float
    b_calls: float
    difference_ms: float  # B's time minus A's
    share: float | None = None  # of the total difference; None if the total is 0


def group_of(name: str) -> str:
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def compare(a: Trace, b: Trace, steps: int = 1) -> list[Row]:
    """Compare two traces. Returns a row per group, each followed by rows of its names; then total and whole step.

    Rows with the largest difference come first.
    steps: number of steps in a trace that does not mark them.
    Raises UserError if only one of the traces is of a GPU.
    """
    if a.on_gpu != b.on_gpu:
        gpu, cpu = (a, b) if a.on_gpu else (b, a)
        raise UserError(
            f"{gpu.path} has the kernels of a GPU and {cpu.path} has ops alone, which do not compare; give two traces "
            "from the same kind of device (torch.profiler needs ProfilerActivity.CUDA to see a GPU)"
        )
    counts = a.steps or steps, b.steps or steps
    times: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for i, trace in enumerate((a, b)):
        for work in trace.work:
            times[work.name][i].append(work.ms)
    total = sum(sum(ms) for _, ms in times.values()) / counts[1] - sum(sum(ms) for ms, _ in times.values()) / counts[0]

    def row(group: str, name: str, names: list[str]) -> Row:
        a_ms, b_ms = (sum(sum(times[n][i]) for n in names) / counts[i] for i in (0, 1))
        a_calls, b_calls = (sum(len(times[n][i]) for n in names) / counts[i] for i in (0, 1))
        return Row(group, name, a_ms, b_ms, a_calls, b_calls, b_ms - a_ms, (b_ms - a_ms) / total if total else None)

    def most_first(rows: Iterable[Row]) -> list[Row]:
        return sorted(rows, key=lambda row: -abs(row.difference_ms))

    groups: dict[str, list[str]] = defaultdict(list)
    for name in times:
        groups[group_of(name)].append(name)
    rows = []
    for whole in most_first(row(group, "", names) for group, names in groups.items()):
        rows += [whole, *most_first(row(whole.group, name, [name]) for name in groups[whole.group])]
    rows.append(row(TOTAL, "", list(times)))
    if a.on_gpu:
        rows.append(whole_step(IDLE, a.idle_ms / counts[0], b.idle_ms / counts[1]))
        rows.append(whole_step(LAUNCHING, a.launch_ms / counts[0], b.launch_ms / counts[1]))
    if a.step_ms is not None and b.step_ms is not None:
        rows.append(whole_step(STEP, a.step_ms, b.step_ms))
    return rows


def whole_step(name: str, a_ms: float, b_ms: float) -> Row:
    return Row(name, "", a_ms, b_ms, 0, 0, b_ms - a_ms)


def run(options: TraceBench, console: Console) -> list[Row]:
    """Compare two traces, print the table, write the JSON. Returns the rows."""
    a, b = read_trace(options.a), read_trace(options.b)
    rows = compare(a, b, options.steps)
    for letter, trace in (("A", a), ("B", b)):
        marked = (
            f"{trace.steps} step{'' if trace.steps == 1 else 's'}"
            if trace.steps
            else f"marks no steps, taken as {options.steps} (--steps)"
        )
        console.print(f"{letter}: {trace.path}: {marked}", highlight=False, markup=False, soft_wrap=True)
    print_rows(rows, a.on_gpu, console)
    if options.json is not None:
        write_json(options.json, [asdict(row) for row in rows])
    return rows


def print_rows(rows: list[Row], on_gpu: bool, console: Console) -> None:
    table = Table(
        title=f"Time of {'kernels' if on_gpu else 'ops, each without those inside it,'} by the step",
        caption=CAPTION_GPU if on_gpu else CAPTION,
        box=box.SIMPLE,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    # The name column gets the width that the numbers leave, as they must not be cut.
    table.add_column("kernel" if on_gpu else "op", no_wrap=True, max_width=max(16, console.width - 50))
    for column in ("A ms", "B ms", "B - A", "share", "A calls", "B calls"):
        table.add_column(column, justify="right", no_wrap=True)

    def add(label: Text, row: Row) -> None:
        share = "" if row.share is None else f"{row.share:.0%}".replace("-0%", "0%")
        calls = (f"{row.a_calls:.4g}", f"{row.b_calls:.4g}") if row.a_calls or row.b_calls else ("", "")
        digits = 2 if max(row.a_ms, row.b_ms) < 100 else 0  # to fit the columns
        times = f"{row.a_ms:.{digits}f}", f"{row.b_ms:.{digits}f}", f"{row.difference_ms:+.{digits}f}"
        table.add_row(label, *times, share, *calls)

    least = LEAST * max(abs(row.difference_ms) for row in rows if row.group not in WHOLE and not row.name)
    for group, found in groupby(rows, key=lambda row: row.group):
        whole, *named = found
        if group == TOTAL:
            table.add_section()
        add(Text(group, style="bold"), whole)
        shown = [row for row in named[:SHOWN] if abs(row.difference_ms) >= least]
        for row in shown:
            add(Text(f"  {readable(row.name) if on_gpu else row.name}"), row)
        if shown and (rest := named[len(shown) :]):
            add(Text(f"  {len(rest)} more"), sum_of(rest))
    console.print(table)


def sum_of(rows: list[Row]) -> Row:
    def add(field: str) -> float:
        return sum(getattr(row, field) or 0.0 for row in rows)

    share = None if rows[0].share is None else add("share")
    return Row("", "", add("a_ms"), add("b_ms"), add("a_calls"), add("b_calls"), add("difference_ms"), share)
