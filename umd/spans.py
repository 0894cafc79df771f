"""Names for the parts of a training step, which a profiler shows beside the ops inside them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

# In the order of a step. Of spans within spans the inner one counts: a head within a decoder is "head".
PARTS = (
    "data", "corruption", "forward", "adaLN", "encoder", "decoder", "head", "loss", "backward", "clip", "optimizer",
    "EMA",
)  # fmt: skip

_on = False


def span(name: str) -> AbstractContextManager[None]:
    """Marks what runs inside as one of `PARTS`, for torch.profiler and, on a GPU, as an NVTX range.

    Does nothing unless within `spans_on`, nor in code that torch.compile traces, which never sees the switch.
    """
    # The order matters: reading _on in compiled code would make it compile again whenever profiling starts or ends.
    if torch.compiler.is_compiling() or not _on:
        return nullcontext()
    assert name in PARTS, f"{name!r} is no part of a step; expected one of {', '.join(PARTS)}"
    return _marked(name)


@contextmanager
def _marked(name: str) -> Iterator[None]:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.nvtx.range_push(name)
    try:
        with torch.profiler.record_function(name):
            yield
    finally:
        if on_gpu:
            torch.cuda.nvtx.range_pop()


@contextmanager
def spans_on() -> Iterator[None]:
    """`span` marks within this block."""
    global _on
    before, _on = _on, True
    try:
        yield
    finally:
        _on = before
