"""`umd bench audit`: memory traffic and resource use of every op's kernels on an A100, H100 or B200, without a GPU.

1. Each op runs in Triton's interpreter on the inputs of a training step (`op_cases.py`). The interpreter counts the
   bytes it reads and writes (`count_bytes.py`).
2. Each kernel that was launched is compiled for each architecture, and its PTX and binary are read
   (`inspect_kernel.py`).

So the audited code is the code that runs. `--step` audits a whole training step instead (`audit_step.py`).
"""

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from umd import ops
from umd.bench import audit_step, liger_cases
from umd.bench.count_bytes import Launch, TorchBytes, interpreted, record
from umd.bench.op_cases import DTYPES, OPS, Inputs, dtype_name
from umd.bench.options import Audit
from umd.errors import UserError
from umd.files import write_json
from umd.machine.gpus import GPUS
from umd.train.signals import end_when_orphaned

# Bytes per second of the memory of an A100 80GB, an H100 and a B200 (from NVIDIA's data sheet; `umd plan` lacks it).
BANDWIDTHS = {"sm_80": GPUS["a100-80"].bandwidth, "sm_90": GPUS["h100"].bandwidth, "sm_100": 8e12}


@dataclass(frozen=True)
class Counted:
    """An op in one direction (forward or backward): the kernels it launched and the bytes they move."""

    op: str
    dtype: str
    width: int
    samples: int
    direction: str
    launches: tuple[Launch, ...]
    torch_bytes: int  # moved by PyTorch around the kernels: folding tables, summing partial sums
    compulsory_bytes: int | None
    eager_bytes: int | None

    @property
    def error(self) -> str:
        return next((launch.error for launch in self.launches if launch.error), "")

    def bytes(self, which: str) -> int | None:
        """Bytes of all launches plus PyTorch's around them. None if a launch could not be counted.

        which: `asked` or `unique`, as in `count_bytes.Counts`.
        """
        if self.error:
            return None
        return self.torch_bytes + sum(getattr(launch.counts, which) for launch in self.launches)


@dataclass(frozen=True)
class Row:
    """One op, direction and architecture.

    Registers and shared memory are the maximum over its kernels. Spilled bytes are their sum.
    """

    op: str
    direction: str
    arch: str
    dtype: str
    width: int
    samples: int
    asked_bytes: int | None
    unique_bytes: int | None
    compulsory_bytes: int | None
    eager_bytes: int | None
    registers: int
    spill_bytes: int
    shared_bytes: int
    occupancy: float  # minimum over its kernels
    f64: int
    atomics: int  # on floats
    serialized: bool  # whether a matrix product of Hopper waits for the one before
    min_access_bits: int | None
    predicted_us: float | None
    eager_us: float | None
    kernels: tuple[dict, ...]
    note: str = ""


CASES = OPS | liger_cases.CASES
# The norms split their work as for this many images. With fewer, each multiprocessor would get fewer tokens per sum.
CHUNKS_OF = 256


def count_op(name: str, model: str, samples: int, dtype: str, own_rows: int = 0) -> list[Counted]:
    """Run an op forward and backward and count its bytes. Needs TRITON_INTERPRET=1 from the start of the process."""
    inputs = Inputs(model, samples, DTYPES[dtype], "cpu", own_rows=own_rows, like=CHUNKS_OF)
    case = CASES[name](inputs)
    foreign = name in liger_cases.CASES

    def counted(work: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], tuple[Launch, ...], int]:
        with record(tolerate=foreign) as launches, TorchBytes() as torch_bytes:
            result = work()
        return result, tuple(launches), torch_bytes.total

    outputs, launches, torch_bytes = counted(case.ours.call)
    eager = case.eager
    eager_outputs: tuple[Tensor, ...] = ()
    eager_bytes: int | None = None
    if eager is not None:
        with ops.kernels("reference"):
            eager_outputs, _, eager_bytes = counted(eager.call)
    common = (case.op, dtype_name(case.dtype), inputs.D, samples)
    found = [Counted(*common, "forward", launches, torch_bytes, case.forward_bytes, eager_bytes)]
    if case.backward_bytes is not None:
        douts = tuple(torch.randn_like(y) for y in outputs)
        _, launches, torch_bytes = counted(lambda: case.ours.gradients(outputs, douts))
        if eager is not None:
            douts = tuple(torch.randn_like(y) for y in eager_outputs)
            _, _, eager_bytes = counted(lambda: eager.gradients(eager_outputs, douts))
        found.append(Counted(*common, "backward", launches, torch_bytes, case.backward_bytes, eager_bytes))
    return found


def count_call(kernel: str, call: str) -> list[Counted]:
    """Evaluate `call` and count the launches of `kernel` in it. Each byte it touches counts once as compulsory."""
    module, _, name = kernel.partition(":")
    try:
        names = vars(import_module(module))
        with record(tolerate=True) as launches:
            eval(call, {**names, "torch": torch})
    except Exception as error:
        raise UserError(f"call {call!r} failed: {type(error).__name__}: {error}") from error
    ours = tuple(launch for launch in launches if launch.kernel.endswith(f":{name}"))
    if not ours:
        ran = sorted({launch.kernel for launch in launches})
        raise UserError(f"call {call!r} did not launch {name}; it launched {', '.join(ran) or 'nothing'}")
    tensors = [(a.storage_bytes, a.shape, a.dtype) for launch in ours for a in launch.arguments if a.dtype]
    _, shape, dtype = max(tensors, key=lambda tensor: tensor[0])
    counts = [launch.counts for launch in ours if launch.counts is not None]
    touched = sum(c.touched for c in counts) if len(counts) == len(ours) else None
    return [Counted(name, dtype_name(getattr(torch, dtype)), shape[-1], 0, "call", ours, 0, touched, None)]


def _compile(launch: Launch, arch: str):
    """`inspect_kernel.compile_launch`, imported late: only in a process where Triton is not the interpreter."""
    from umd.bench.inspect_kernel import compile_launch

    return compile_launch(launch, arch)


def row_of(counted: Counted, arch: str, compiled: list) -> Row:
    """Merge an op's counts and its compiled kernels into one row."""
    launches = counted.launches
    bits = [c.min_access_bits(_of_width(x, counted.width)) for c, x in zip(compiled, launches, strict=True)]
    asked, unique = counted.bytes("asked"), counted.bytes("unique")
    rate = BANDWIDTHS[arch] / 1e6  # bytes per microsecond
    return Row(
        op=counted.op,
        direction=counted.direction,
        arch=arch,
        dtype=counted.dtype,
        width=counted.width,
        samples=counted.samples,
        asked_bytes=asked,
        unique_bytes=unique,
        compulsory_bytes=counted.compulsory_bytes,
        eager_bytes=counted.eager_bytes,
        registers=max(c.registers for c in compiled),
        spill_bytes=sum(c.spill_bytes for c in compiled),
        shared_bytes=max(c.shared_bytes for c in compiled),
        occupancy=min(c.occupancy for c in compiled),
        f64=sum(c.f64 for c in compiled),
        atomics=sum(c.atomics for c in compiled),
        serialized=any(c.serialized for c in compiled),
        min_access_bits=min((b for b in bits if b is not None), default=None),
        predicted_us=None if asked is None or unique is None else max(asked, unique) / rate,
        eager_us=None if counted.eager_bytes is None else counted.eager_bytes / rate,
        kernels=tuple(
            dict(
                kernel=c.kernel,
                grid=x.grid,
                num_warps=c.num_warps,
                registers=c.registers,
                spill_bytes=c.spill_bytes,
                shared_bytes=c.shared_bytes,
                occupancy=c.occupancy,
                access_bits=c.access_bits(),
                asked_bytes=x.counts.asked if x.counts else None,
            )
            for c, x in zip(compiled, launches, strict=True)
        ),
        note=f"not counted, the interpreter cannot run it: {counted.error}" if counted.error else "",
    )


def _of_width(launch: Launch, width: int) -> set[str]:
    """Names of the arguments whose last dimension is D or a multiple of D."""
    return {
        a.name
        for a in launch.arguments
        if a.shape and a.shape[-1] > 0 and (a.shape[-1] == width or (len(a.shape) > 1 and a.shape[-1] % width == 0))
    }


def run_apart(interpret: bool, jobs: list[tuple], progress: Callable[[list], Iterable] = iter) -> list:
    """Run jobs (function, *arguments) in other processes, with Triton's interpreter on or off. Returns results."""
    spawn = multiprocessing.get_context("spawn")
    with interpreted(interpret), ProcessPoolExecutor(torch.get_num_threads(), spawn, end_when_orphaned) as pool:
        return [job.result() for job in progress([pool.submit(*job) for job in jobs])]


def audit(options: Audit, progress: Callable[[list], Iterable] = iter) -> list[Row]:
    """Count each op's bytes, then compile every kernel that ran. Returns the rows."""
    jobs: list[tuple]
    if options.kernel:
        jobs = [(count_call, options.kernel, options.call)]
    else:
        models = options.models or ("UMD-B/4", "UMD-L/2")
        names = options.ops or tuple(name for name in CASES if name in OPS or find_spec("liger_kernel"))
        jobs = [(count_op, name, model, options.samples, options.dtype) for name in names for model in models]
    return compile_counted([one for found in run_apart(True, jobs, progress) for one in found], options.arch, progress)


def compile_counted(
    counted: list[Counted], archs: tuple[str, ...], progress: Callable[[list], Iterable] = iter
) -> list[Row]:
    """One row for each counted op that launched a kernel, and each architecture."""
    pairs = [(one, arch) for one in counted if one.launches for arch in archs]
    jobs = [(_compile, launch, arch) for one, arch in pairs for launch in one.launches]
    compiled = iter(run_apart(False, jobs, progress))
    return [row_of(one, arch, [next(compiled) for _ in one.launches]) for one, arch in pairs]


def run(options: Audit, console: Console) -> list:
    """Audit the ops (with --step: whole steps), print the tables, write JSON and chart. Returns the rows."""
    if find_spec("triton") is None:
        raise UserError("the audit compiles kernels and needs Triton, not a GPU: pip install triton")
    if options.step:
        models = options.models or tuple(audit_step.NETWORKS)
        return audit_step.run(models, options.batch, options.json, options.chart, console)
    rows = audit(options, lambda jobs: track(jobs, description="auditing", console=console, transient=True))
    if not rows:
        raise UserError("none of these ops launches a kernel of ours")
    print_rows(rows, console)
    if options.json is not None:
        write_json(options.json, [asdict(row) for row in rows])
    if options.chart is not None and not options.kernel:
        draw(rows, options.chart)
    return rows


def print_rows(rows: list[Row], console: Console) -> None:
    """Print two tables: bytes, and compiled kernels. Values that differ by architecture keep the order of the rows."""
    archs = " / ".join(dict.fromkeys(row.arch for row in rows))
    size = f"{rows[0].samples} samples, " if rows[0].samples else ""

    def ratio(a: int | None, b: int | None) -> str:
        return "?" if a is None or b is None else f"{a / b:.2f}"

    def number(value: float | None, form: str) -> str:
        return "?" if value is None else format(value, form)

    print_table(
        f"Bytes: {size}{rows[0].dtype}. Times from bytes alone, {archs}",
        {
            "needed MB": lambda r: number(r.compulsory_bytes and r.compulsory_bytes / 1e6, ".2f"),
            "asked / needed": lambda r: ratio(r.asked_bytes, r.compulsory_bytes),
            "sectors / needed": lambda r: ratio(r.unique_bytes, r.compulsory_bytes),
            "asked / eager": lambda r: ratio(r.asked_bytes, r.eager_bytes),
            "µs": lambda r: number(r.predicted_us, ".1f"),
            "eager µs": lambda r: number(r.eager_us, ".1f"),
        },
        rows,
        console,
    )
    print_table(
        f"Compiled for {archs}",
        {
            "registers": lambda r: str(r.registers),
            "spills": lambda r: str(r.spill_bytes),
            "shared": lambda r: str(r.shared_bytes),
            "occupancy": lambda r: f"{r.occupancy:.0%}",
            "bits": lambda r: "-" if r.min_access_bits is None else str(r.min_access_bits),
            "f64": lambda r: str(r.f64),
            "atomics": lambda r: str(r.atomics),
        },
        rows,
        console,
    )
    notes: dict[str, list[str]] = {}
    for row in rows:
        if row.note:
            notes.setdefault(row.note, []).append(f"{row.op} {row.direction}")
    for note, named in notes.items():
        console.print(f"{', '.join(dict.fromkeys(named))}: {note}", highlight=False, markup=False)


def print_table(title: str, columns: dict[str, Callable[[Row], str]], rows: list[Row], console: Console) -> None:
    """Print one line per op, direction and width. A cell has one value, or one per architecture if they differ."""
    table = Table(title=title)
    for name in ("op", "", "D", *columns):
        table.add_column(name, no_wrap=name == "op", overflow="fold", justify="left" if name in ("op", "") else "right")
    for group in _groups(rows):
        shown = [[show(row) for row in group] for show in columns.values()]
        cells = [values[0] if len(set(values)) == 1 else "/".join(values) for values in shown]
        table.add_row(group[0].op, group[0].direction, str(group[0].width), *cells)
    # In a file, rich would squeeze the table into 80 columns.
    console.print(table, width=None if console.is_terminal else 150, crop=console.is_terminal)


def _groups(rows: list[Row]) -> list[list[Row]]:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.op, row.direction, row.width), []).append(row)
    return list(groups.values())


def draw(rows: list[Row], file: Path) -> None:
    """Draw, for each op at the first width, bytes over compulsory bytes as bars, for our kernels and eager PyTorch."""
    from matplotlib.figure import Figure

    rows = [group[0] for group in _groups(rows) if group[0].asked_bytes and group[0].eager_bytes]
    rows = [row for row in rows if row.width == rows[0].width and row.op in OPS]
    figure = Figure(figsize=(8, 0.55 * len(rows) + 1.4), layout="constrained")
    axes = figure.add_subplot()
    places = list(range(len(rows)))[::-1]
    for offset, name, color in ((0.2, "asked", "#4477aa"), (-0.2, "eager", "#bbbbbb")):
        values = [getattr(row, f"{name}_bytes") / row.compulsory_bytes for row in rows]
        label = {"asked": "Triton kernels", "eager": "eager PyTorch"}[name]
        bars = axes.barh([p + offset for p in places], values, height=0.38, color=color, label=label)
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(places, [f"{row.op}\n{row.direction}" for row in rows], fontsize=8)
    axes.set_xlabel(f"bytes moved / bytes that must move, D = {rows[0].width}")
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
