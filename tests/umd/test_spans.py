"""Spans: seen by the profiler when they are on, by nothing else."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.profiler import ProfilerActivity, profile

from umd.spans import span, spans_on


def names(recorded: profile) -> list[str]:
    return [event.name for event in recorded.events() if event.name in ("encoder", "loss", "EMA")]


def test_the_profiler_sees_spans_where_they_are_on():
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        with span("encoder"):
            torch.ones(2) + 1
        with spans_on():
            with span("loss"):
                torch.ones(2) + 1
            with pytest.raises(ZeroDivisionError), span("EMA"):  # what runs inside may fail
                raise ZeroDivisionError
        with span("encoder"):
            torch.ones(2) + 1
    assert names(recorded) == ["loss", "EMA"]


def test_a_name_that_is_no_part_is_a_mistake():
    with spans_on(), pytest.raises(AssertionError, match="'attention' is no part of a step"):
        span("attention")


def test_torch_compile_sees_no_span_and_compiles_once():
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def step(x):
        with span("encoder"):
            x = x.sin()
        with span("loss"):
            return x.cos()

    x = torch.linspace(0, 1, 3)
    assert torch.equal(step(x), x.sin().cos())
    with spans_on():
        assert torch.equal(step(x), x.sin().cos())
    assert (counter.frame_count, counter.op_count) == (1, 2)
