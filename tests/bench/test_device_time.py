"""Times of a GPU: how many calls a window has, that they beat its caches, and what is done where none is recorded."""

import pytest
import torch

from umd.bench.device_time import MOST_COPIES, copies_beyond, time_calls, turns_of
from umd.machine.device import side_stream

MB = 10**6


def test_calls_taking_turns_move_twice_the_cache():
    assert copies_beyond(50 * MB, 100 * MB) == copies_beyond(50 * MB, 500 * MB) == 1
    assert copies_beyond(50 * MB, 99 * MB) == 2 and copies_beyond(50 * MB, 10 * MB) == 10
    assert copies_beyond(50 * MB, 1000) == MOST_COPIES and copies_beyond(0, 1000) == 1


def test_a_window_has_two_milliseconds_of_work():
    assert turns_of(0.005) == 400 and turns_of(1.5) == 2 and turns_of(10) == 1
    assert turns_of(0) == 2000  # an event's clock may not have moved


@pytest.mark.gpu
def test_a_short_call_is_replayed_and_one_that_waits_is_not():
    x, device = torch.randn(1024, device="cuda"), torch.device("cuda")
    with side_stream(device):
        short, waiting = time_calls([lambda: x + 1]), time_calls([lambda: (x + 1).sum().item()])
        after = time_calls([lambda: x + 1])
    assert short.replayed and after.replayed and not waiting.replayed
    assert min(short.ms, after.ms, waiting.ms) > 0
