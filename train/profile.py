"""`--profile`: record some steps of a run with torch.profiler; write a trace, two tables and a GPU memory record."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from umd.errors import UserError
from umd.spans import PARTS, spans_on
from umd.train.trace import Trace, Work, read_trace, readable

WAIT, WARMUP, ACTIVE = 10, 2, 3  # steps: not recorded, while kernels compile; profiler warm-up; recorded
MAX_ALLOCATIONS = 1_000_000  # in the memory record; of more, the last ones are kept
TOP = 25


class NoProfiler:
    """Profiler of a run or rank that is not profiled: does nothing."""

    def step(self) -> None:
        pass


class Profiler:
    """Records some training steps; see `profiled`."""

    def __init__(self, folder: Path, device: torch.device, say: Callable[[str], None], steps: float = math.inf):
        self.folder, self.device, self.say = folder, device, say
        active = int(min(ACTIVE, max(steps - 1, 1)))  # the profiler's first step is a warm-up
        warmup = int(min(WARMUP, steps - active))
        self.wait = int(min(WAIT, steps - active - warmup))
        self.last = self.wait + warmup + active
        self.done = 0
        self.recording = ExitStack()
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        plan = schedule(wait=0, warmup=warmup, active=active, repeat=1)
        self.torch = profile(activities=activities, schedule=plan, on_trace_ready=self._write)
        self._begin_or_end()

    def step(self) -> None:
        """Call this after every training step."""
        self.done += 1
        if self.wait < self.done <= self.last:
            self.torch.step()
        self._begin_or_end()

    def close(self) -> None:
        """Call this after training."""
        self.recording.close()
        if self.done < self.last:
            self.say(f"no profile: training ended after {self.done} steps, the profiler needed {self.last}")

    def _begin_or_end(self) -> None:
        if self.done == self.wait:
            if self.device.type == "cuda":
                torch.cuda.memory._record_memory_history(max_entries=MAX_ALLOCATIONS, stacks="python")
                self.recording.callback(torch.cuda.memory._record_memory_history, None)
            self.recording.enter_context(spans_on())
            self.recording.enter_context(self.torch)
        elif self.done == self.last:
            self.recording.close()

    def _write(self, recorded: profile) -> None:
        if self.done < self.last:
            return
        file = self.folder / "trace.json.gz"
        memory = "memory is recorded on a GPU only"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(file))
            (self.folder / "top.md").write_text(report(read_trace(file), self.device), encoding="utf-8")
            if self.device.type == "cuda":
                # A pickle for torch's memory viewer; this project never loads it.
                torch.cuda.memory._dump_snapshot(str(self.folder / "memory.pickle"))
                memory = "memory.pickle (drag it to https://pytorch.org/memory_viz)"
        except (OSError, RuntimeError, UserError) as error:
            self.say(f"the profile could not be written to {self.folder}, training goes on: {error}")
            return
        self.say(
            f"profile in {self.folder}: top.md (what takes the time), trace.json.gz (open it at "
            f"https://ui.perfetto.dev or chrome://tracing); {memory}"
        )


@contextmanager
def profiled(
    on: bool, out: Path, device: torch.device, say: Callable[[str], None], steps: float = math.inf
) -> Iterator[Profiler | NoProfiler]:
    """Yield a profiler whose `step()` is called after every training step. It records some, to `out / "profile"`.

    on: False: record nothing.
    say: prints where the files are, or why there are none. A full disk does not end the run.
    steps: number of steps to come, if known. If below 15, fewer steps are skipped and recorded.
    """
    if not on or steps < 1:
        yield NoProfiler()
        return
    profiler = Profiler(out / "profile", device, say, steps)
    try:
        yield profiler
    finally:
        profiler.close()


def report(trace: Trace, device: torch.device) -> str:
    """Write two Markdown tables: time by part of a step, and the kernels (on a CPU: ops) that take most time."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    steps, total = trace.steps or 1, sum(work.ms for work in trace.work)
    text = f"# {steps} training steps under the profiler\n\n{name}; a step took {trace.step_ms or 0:.1f} ms.\n"
    if trace.on_gpu:
        text += (
            f"Of it, kernels {total / steps:.1f} ms; the stream with most of them was idle for "
            f"{trace.idle_ms / steps:.1f} ms, and the host took {trace.launch_ms / steps:.1f} ms to launch them.\n"
        )
    text += "The profiler itself makes the host slower: read shares rather than times.\n"

    parts: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    tops: dict[tuple, list[float]] = defaultdict(list)
    for work in trace.work:
        parts[work.part][work.backward or work.part == "backward"] += work.ms
        tops[_row(trace, work)].append(work.ms)

    text += "\n## Parts of a step\n\n" + _head("part", "forward, ms", "backward, ms", "share")
    for part in (*PARTS, ""):
        if part in parts:
            forward, backward = parts[part]
            label = {"backward": "the rest of the backward pass", "": "outside of these"}.get(part, part)
            cells = (label, f"{forward / steps:.2f}", f"{backward / steps:.2f}", f"{(forward + backward) / total:.1%}")
            text += _line(*cells)

    first = ("kernel", "launched by", "part") if trace.on_gpu else ("op, without those inside it", "part")
    text += f"\n## The {TOP} that take most\n\n" + _head(*first, "calls a step", "ms a step", "share", names=len(first))
    for row, times in sorted(tops.items(), key=lambda item: -sum(item[1]))[:TOP]:
        ms = sum(times)
        text += _line(*row, f"{len(times) / steps:.4g}", f"{ms / steps:.2f}", f"{ms / total:.1%}")
    return text


def _row(trace: Trace, work: Work) -> tuple[str, ...]:
    """Cells of a table row that sum up some work."""
    part = f"{work.part}, backward" if work.backward else work.part
    return (readable(work.name), work.op, part) if trace.on_gpu else (work.name, part)


def _head(*columns: str, names: int = 1) -> str:
    return _line(*columns) + _line(*("---" if i < names else "---:" for i in range(len(columns))))


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n"
