"""How long calls take on a GPU without the host's share: recorded as one CUDA graph, and replayed.

Launched one by one, calls below some 100 µs are timed at the speed of the host: Python, autograd and Triton's launcher
take longer than the kernel.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

WINDOWS = 20  # measurements; their median counts
WINDOW_MS = 2.0  # of work in each, beside which a replay's own few µs are nothing
MOST_COPIES = 32  # where these still fit into the cache, a training step too would find them there


class Timing(NamedTuple):
    ms: float  # of a call, median
    replayed: bool  # False: could not be recorded; launched one by one, so that a short call has the host's time


def copies_beyond(cache_bytes: int, call_bytes: int) -> int:
    """How many calls, each on memory of its own and taking turns, move twice what the cache holds."""
    return min(MOST_COPIES, max(1, math.ceil(2 * cache_bytes / call_bytes)))


def turns_of(ms: float) -> int:
    """How many turns that take `ms` each fill a window."""
    return max(1, math.ceil(WINDOW_MS / max(ms, 1e-3)))


def windows(run: Callable[[], object]) -> list[float]:
    """Milliseconds that each of WINDOWS runs takes on the current stream, queued without waiting in between."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(WINDOWS)]
    run()
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def time_calls(calls: Sequence[Callable[[], object]]) -> Timing:
    """Time calls that do the same on different memory (see `copies_beyond`), in turn.

    The current stream must be one that can be recorded (`umd.train.step.side_stream`), and what the calls go backward
    through must have been made on it.
    """

    def turn() -> None:
        for call in calls:
            call()

    for _ in range(3):  # compilers, autotuning and libraries set up what they need
        turn()
    turns = turns_of(statistics.median(windows(turn)))

    def window() -> None:
        for _ in range(turns):
            turn()

    count, graph = turns * len(calls), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            window()
    except RuntimeError:  # the call waits for the device, or makes something that a graph cannot hold
        torch.cuda.synchronize()
        return Timing(statistics.median(windows(window)) / count, replayed=False)
    return Timing(statistics.median(windows(graph.replay)) / count, replayed=True)
