"""Read a trace of torch.profiler (Chrome's format): what ran in a step, for how long, in which part of it.

Ops, spans and launches are events on host threads, nested in time. A kernel has the correlation number of its launch.
An arrow links an op to the backward op that computes its gradient.
"""

import gzip
import json
import re
import zlib
from collections import defaultdict
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from umd.errors import UserError
from umd.spans import PARTS

NO_OP = "(in no op)"  # Python, and work that torch does not see
GPU = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
HOST = ("cpu_op", "user_annotation", *LAUNCHES)
ROUNDING = 0.002  # µs; by rounding, an event may end this much after the event around it

Event = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """On a GPU: a kernel or copy. On a CPU: an op, without the ops inside it."""

    name: str
    op: str  # the op that launched the kernel, or the op itself; "" if unknown
    part: str  # one of umd.spans.PARTS, "" outside of them
    backward: bool  # whether it computes the gradient of that part
    ms: float


@dataclass(frozen=True)
class Trace:
    """The work in the marked steps of a trace, or in the whole trace if no steps are marked."""

    path: Path
    on_gpu: bool  # whether `work` ran on a GPU
    steps: int  # number of steps marked as ProfilerStep#; 0: none
    work: list[Work]
    step_ms: float | None  # time per step by the host's clock; None if no steps are marked
    idle_ms: float  # over all steps: gaps between kernels on the busiest stream
    launch_ms: float  # over all steps: host time in calls that launch kernels


@dataclass(eq=False)
class Span:
    """An event on a host thread."""

    name: str
    kind: str
    start: float  # µs
    end: float
    correlation: int | None  # number that a launch shares with its kernels
    inside: float = 0.0  # µs of the events directly inside
    op: str = ""
    part: str = ""
    backward: bool = False

    @property
    def own_ms(self) -> float:
        return (self.end - self.start - self.inside) / 1000


def read_trace(path: Path) -> Trace:
    """Read the trace from a .json or .json.gz file, or from the folder of a profiled run.

    Raises:
        UserError: there is no such file, it is not a trace of torch.profiler, or it is empty.
    """
    if path.is_dir():
        path = path / "trace.json.gz" if path.name == "profile" else path / "profile" / "trace.json.gz"
    events = read_events(path)
    try:
        for event in events:
            if not isinstance(event.get("name", ""), str):
                raise TypeError(f"an event's name is {event['name']!r}")
        spans = host_spans(events)
        kernels = [e for e in events if e.get("cat") in GPU and e.get("ph") == "X"]
        on_gpu = bool(kernels)
        marks = [s for s in spans if s.kind == "user_annotation" and s.name.startswith("ProfilerStep#")]
        if marks:
            start, end = min(mark.start for mark in marks), max(mark.end for mark in marks)
            spans = [span for span in spans if start <= span.start < end]
            # Select kernels by launch: those of an earlier step may still run in the first, the last step's after it.
            launched = {span.correlation for span in spans} - {None}
            kernels = [e for e in kernels if correlation(e) in launched] or kernels
        work = gpu_work(kernels, spans) if on_gpu else cpu_work(spans)
        idle = idle_time(kernels)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is not a trace of torch.profiler ({type(error).__name__}: {error}); expected what its "
            "export_chrome_trace writes"
        ) from error
    if not work:
        raise UserError(f"{path} holds no ops and no kernels; profile some steps, e.g. umd pretrain PRESET --profile")
    launches = (s for s in spans if s.kind in LAUNCHES and "Launch" in s.name)
    return Trace(
        path=path,
        on_gpu=on_gpu,
        steps=len({mark.name for mark in marks}),
        work=work,
        step_ms=sum(mark.end - mark.start for mark in marks) / 1000 / len(marks) if marks else None,
        idle_ms=idle / 1000,
        launch_ms=sum(s.end - s.start for s in launches) / 1000,
    )


def read_events(path: Path) -> list[Event]:
    expected = "expected a .json or .json.gz that torch.profiler wrote, or the folder of a run made with --profile"
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        document = json.loads(data, strict=False)  # names of kernels may hold control characters
    except gzip.BadGzipFile as error:
        raise UserError(f"{path} is damaged ({error}); {expected}") from error
    except OSError as error:
        raise UserError(f"no trace can be read at {path} ({error.strerror}); {expected}") from error
    except (ValueError, RecursionError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not JSON or was cut short ({error}); {expected}") from error
    events = document.get("traceEvents") if isinstance(document, dict) else document
    if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
        raise UserError(f"{path} has no traceEvents; {expected}")
    return events


def host_spans(events: list[Event]) -> list[Span]:
    """Host events in order of start time, each with the op and the part of the step around it."""
    arrows: dict[Any, dict[str, tuple]] = defaultdict(dict)  # forward end ("s") and backward end ("f") of each arrow
    for e in events:
        if e.get("cat") == "fwdbwd":
            arrows[e["id"]][e["ph"]] = (e["pid"], e["tid"], e["ts"])
    forward_of = {ends["f"]: ends["s"] for ends in arrows.values() if len(ends) == 2}
    sources = set(forward_of.values())
    part_of: dict[tuple, str] = {}
    stacks: dict[tuple, list[Span]] = defaultdict(list)  # open events of each thread
    spans = []
    host = [e for e in events if e.get("cat") in HOST and e.get("ph") == "X"]
    # In order of time, so that enclosing events and the forward ops of gradients come first.
    for e in sorted(host, key=lambda e: (e["ts"], -e["dur"])):
        at = (e.get("pid"), e.get("tid"), e["ts"])
        span = Span(e["name"], e["cat"], e["ts"], e["ts"] + e["dur"], correlation(e))
        stack = stacks[at[:2]]
        while stack and span.end > stack[-1].end + ROUNDING:
            stack.pop()
        if stack:
            parent = stack[-1]
            parent.inside += span.end - span.start
            span.op, span.part, span.backward = parent.op, parent.part, parent.backward
        if span.kind == "user_annotation" and span.name in PARTS:
            span.part, span.backward = span.name, False
        elif span.kind == "cpu_op":
            span.op = span.name
            if part := part_of.get(forward_of.get(at, ())):
                span.part, span.backward = part, True
            if at in sources:
                part_of[at] = span.part
        stack.append(span)
        spans.append(span)
    return spans


def correlation(event: Event) -> int | None:
    """The number that links a launch to its kernels."""
    return event.get("args", {}).get("correlation")


def cpu_work(spans: list[Span]) -> list[Work]:
    return [
        Work(span.name if span.kind == "cpu_op" else NO_OP, span.op or NO_OP, span.part, span.backward, span.own_ms)
        for span in spans
    ]


def gpu_work(kernels: list[Event], spans: list[Span]) -> list[Work]:
    launches = {span.correlation: span for span in spans if span.kind in LAUNCHES}
    nowhere = Span("", "", 0, 0, None)
    found = [(e, launches.get(correlation(e), nowhere)) for e in kernels]
    return [Work(e["name"], by.op, by.part, by.backward, e["dur"] / 1000) for e, by in found]


def idle_time(kernels: list[Event]) -> float:
    """Idle time in µs of the busiest stream, between its first kernel's start and its last kernel's end."""

    def stream(e: Event) -> tuple:
        return e.get("pid", 0), e.get("tid", 0)

    streams = [list(group) for _, group in groupby(sorted(kernels, key=stream), key=stream)]
    busiest = max(streams, key=lambda es: sum(e["dur"] for e in es), default=[])
    idle, until = 0.0, min((e["ts"] for e in busiest), default=0.0)
    for e in sorted(busiest, key=lambda e: e["ts"]):
        idle += max(0.0, e["ts"] - until)
        until = max(until, e["ts"] + e["dur"])
    return idle


def readable(name: str) -> str:
    """Shorten a kernel's C++ name: remove namespaces, arguments and lambdas. Other names stay."""
    if "::" not in name or name.startswith(("aten::", "Mem")):
        return name
    name = name.removeprefix("void ").replace("operator()", "").replace("(anonymous namespace)::", "")
    while (shorter := re.sub(r"\([^()]*\)( const)?|\{[^{}]*\}", "", name)) != name:
        name = shorter
    return re.sub(r"(\w+::)+(?=\w)|:{2,}", "", name).replace(" >", ">").strip()
