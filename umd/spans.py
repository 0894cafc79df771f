"""Named spans for the parts of a training step. A profiler shows them together with the ops inside."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

# In the order of a step. In nested spans the inner one counts: a head inside a decoder is "head".
PARTS = (
    "data", "corruption", "forward", "adaLN", "encoder", "decoder", "head", "loss", "backward", "clip", "optimizer",
    "EMA",
)  # fmt: skip

_on = False


def span(name: str) -> AbstractContextManager[None]:
    """Mark what runs inside a with block as one of `PARTS`, for torch.profiler and, on a GPU, as an NVTX range.

    Does nothing outside of `spans_on`, and nothing in code that torch.compile traces.
    """
    # is_compiling() comes first: if compiled code read _on, it would recompile whenever profiling starts or ends.
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
    """Switch `span` on within a with block."""
    global _on
    before, _on = _on, True
    try:
        yield
    finally:
        _on = before
