"""Reads a trace that torch.profiler wrote, in Chrome's format: what ran in a step, for how long, in which part.

Ops, spans and launches are events of the host's threads and lie within one another in time. A kernel has the number
of its launch; an arrow leads from an op to the one of the backward pass that makes its gradient.
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

NO_OP = "(in no op)"  # Python, and what torch does not see
GPU = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
HOST = ("cpu_op", "user_annotation", *LAUNCHES)
ROUNDING = 0.002  # µs: an event may end this much after the one around it

Event = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """A kernel or copy on a GPU; on a CPU an op, without the ops inside it."""

    name: str
    op: str  # that launched the kernel, or the op itself; "" if not known
    part: str  # of umd.spans.PARTS, "" outside of them
    backward: bool  # whether it makes the gradient of that part
    ms: float


@dataclass(frozen=True)
class Trace:
    """What ran in the steps of a trace, or in all of it where none are marked."""

    path: Path
    on_gpu: bool  # whether `work` is of a GPU
    steps: int  # marked as ProfilerStep#; 0: none
    work: list[Work]
    step_ms: float | None  # of a step by the host's clock; None: none are marked
    idle_ms: float  # of all steps: gaps between kernels on the stream that computes most
    launch_ms: float  # of all steps: the host in calls that launch kernels


@dataclass(eq=False)
class Span:
    """An event of the host."""

    name: str
    kind: str
    start: float  # µs
    end: float
    correlation: int | None  # of a launch with its kernels
    inside: float = 0.0  # µs of the events directly within
    op: str = ""
    part: str = ""
    backward: bool = False

    @property
    def own_ms(self) -> float:
        return (self.end - self.start - self.inside) / 1000


def read_trace(path: Path) -> Trace:
    """The trace in a .json or .json.gz file, or in the folder of a run that was profiled.

    Raises:
        UserError: no such file, not a trace of torch.profiler, or nothing in it.
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
            # Those launched before run into the first step, of the last step into the time after it.
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
    """The events of the host by their start, each with the op and the part of a step that it lies in."""
    arrows: dict[Any, dict[str, tuple]] = defaultdict(dict)  # from the forward pass ("s") to the backward pass ("f")
    for e in events:
        if e.get("cat") == "fwdbwd":
            arrows[e["id"]][e["ph"]] = (e["pid"], e["tid"], e["ts"])
    forward_of = {ends["f"]: ends["s"] for ends in arrows.values() if len(ends) == 2}
    sources = set(forward_of.values())
    part_of: dict[tuple, str] = {}
    stacks: dict[tuple, list[Span]] = defaultdict(list)  # of each thread, the events that are not over
    spans = []
    host = [e for e in events if e.get("cat") in HOST and e.get("ph") == "X"]
    # By time: what lies around an event, and the forward pass of a gradient, come before it.
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
    """The number that a launch and its kernels have in common."""
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
    """µs between the first kernel and the end of the last on the stream that computes most, in which it has none."""

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
    """A kernel's C++ name without namespaces, arguments and lambdas; others as they are."""
    if "::" not in name or name.startswith(("aten::", "Mem")):
        return name
    name = name.removeprefix("void ").replace("operator()", "").replace("(anonymous namespace)::", "")
    while (shorter := re.sub(r"\([^()]*\)( const)?|\{[^{}]*\}", "", name)) != name:
        name = shorter
    return re.sub(r"(\w+::)+(?=\w)|:{2,}", "", name).replace(" >", ">").strip()
