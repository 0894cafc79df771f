"""Time calls on a GPU without the host's overhead: record them as one CUDA graph and replay it.

Launched one by one, a call below about 100 µs would be timed at the speed of the host: Python, autograd and Triton's
launcher take longer than the kernel.
"""

import math
import os
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from umd.machine.device import recording

WINDOWS = 20  # measurements; the result is their median
WINDOW_MS = 2.0  # work per window in ms; the few µs of a replay itself do not count beside it
MOST_COPIES = 32  # if these still fit into the cache, a training step would find its data there too


class Timing(NamedTuple):
    ms: float  # per call, median
    replayed: bool  # False: could not be recorded and was launched one by one; a short time is then the host's


def copies_beyond(cache_bytes: int, call_bytes: int) -> int:
    """Number of calls, each on its own memory, that together move twice the cache size."""
    return min(MOST_COPIES, max(1, math.ceil(2 * cache_bytes / call_bytes)))


def turns_of(ms: float) -> int:
    """Number of turns of `ms` milliseconds each that fill a window of WINDOW_MS."""
    return max(1, math.ceil(WINDOW_MS / max(ms, 1e-3)))


def windows(run: Callable[[], object]) -> list[float]:
    """Time WINDOWS runs on the current stream, queued without waiting in between. Returns milliseconds per run."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(WINDOWS)]
    run()
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def time_calls(calls: Sequence[Callable[[], object]]) -> Timing:
    """Time calls that do the same work on different memory (see `copies_beyond`), run in turn.

    The current stream must be one that can be recorded (`umd.machine.device.side_stream`). If the calls run a backward
    pass, its forward pass must have run on the same stream.
    """

    def turn() -> None:
        for call in calls:
            call()

    for _ in range(3):  # warm-up: compilation, autotuning, set-up of libraries
        turn()
    turns = turns_of(statistics.median(windows(turn)))

    def window() -> None:
        for _ in range(turns):
            turn()

    try:
        replayed = statistics.median(windows(recorded(window).replay))
        if replayed < WINDOW_MS / 2:  # launched one by one, short calls have the host's time
            turns *= turns_of(replayed)
            replayed = statistics.median(windows(recorded(window).replay))
        return Timing(replayed / (turns * len(calls)), replayed=True)
    except RuntimeError:  # the call waits for the device, or does something that a graph cannot record
        torch.cuda.synchronize()
        return Timing(statistics.median(windows(window)) / (turns * len(calls)), replayed=False)


def recorded(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Record what a call launches on the current stream."""
    with recording() as graph:
        run()
    return graph


@contextmanager
def watched_clocks(on_gpu: bool) -> Iterator[dict[str, float]]:
    """Yields a dict that after the block holds the GPU's median clock (MHz) and power (W), as nvidia-smi told them."""
    found: dict[str, float] = {}
    if not on_gpu or shutil.which("nvidia-smi") is None:
        yield found
        return
    command = "nvidia-smi --query-gpu=clocks.sm,power.draw --format=csv,noheader,nounits -lms 100 -i"
    process = subprocess.Popen([*command.split(), os.environ.get("CUDA_VISIBLE_DEVICES", "0")], stdout=subprocess.PIPE)
    try:
        yield found
    finally:
        process.terminate()
        lines = process.communicate()[0].decode(errors="replace").splitlines()
    told = [[float(x) for x in line.split(",")] for line in lines if re.fullmatch(r"[\d. ]+,[\d. ]+", line)]
    if told:
        found["mhz"], found["watts"] = map(statistics.median, zip(*told, strict=True))
