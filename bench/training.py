"""Make the training step of a benchmark, a `TrainStep` as in `umd pretrain` for one process, and time steps."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from umd.machine.device import pick_dtype
from umd.methods import AnyModel, AnyObjective
from umd.model import UMD
from umd.train.distributed import World
from umd.train.optim import adamw, narrow_gradients
from umd.train.parallel import Alone, LossStep, static_compile
from umd.train.settings import OptimConfig
from umd.train.step import TrainStep, cast_type

Step = Callable[[], object]
LR = 1e-4
IN_A_ROW = 20  # steps per timed window on a GPU, so that filling its pipeline counts little


def with_modulation(model: UMD) -> UMD:
    """Give the network's modulation non-zero weights, as after the first training steps."""
    if model.adaLN_modulation is not None:
        for parameter in model.adaLN_modulation.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.02)
    return model


def our_optimizer(model: AnyModel, narrow: bool) -> torch.optim.Optimizer:
    """The optimizer of `umd pretrain` for one process.

    narrow: keep bf16 gradients; for bf16 steps with a single backward pass.
    """
    recipe = OptimConfig()
    optimizer = adamw(model, LR, recipe.betas, recipe.weight_decay)
    if narrow:
        narrow_gradients(model, optimizer)
    return optimizer


def train_step(
    model: AnyModel, objective: AnyObjective, batch: int, dtype: str, device: str, capture: bool = False,
    compiled: bool = False,
) -> TrainStep:  # fmt: skip
    """Make the step of `umd pretrain` for one process.

    Args:
        model: network; it is moved to `device`.
        batch: samples per step.
        dtype: bf16 (autocast) or fp32.
        capture: record it as a CUDA graph. It must then be called inside `umd.machine.device.side_stream`.
        compiled: run the network through torch.compile.
    """
    where = torch.device(device)
    autocast_to = pick_dtype(dtype, where)
    model.to(where)
    optimizer = our_optimizer(model, narrow=dtype == "bf16" and not compiled)
    loss = LossStep(static_compile(model) if compiled else model, objective, autocast_to)
    parallel = Alone(model, loss, optimizer, accumulate=1, clip=OptimConfig().clip)
    cast = cast_type(autocast_to, parallel, compiled)
    return TrainStep(parallel, objective, batch, seed=0, world=World(0, 1, where), cast=cast, capture=capture)


def on_batch(step: TrainStep, x_start: Tensor) -> Callable[[], Tensor]:
    """A function that makes the step on the same batch [B, C, H, W] at a fixed learning rate. Returns its metrics."""
    indices = torch.arange(len(x_start), device=x_start.device)
    return lambda: step(x_start, None, indices, LR)


def timed(step: Step, device: str, in_a_row: int = IN_A_ROW) -> float:
    """Seconds per step. On the CPU: of one step. On a GPU: of `in_a_row` steps queued as in training, by its clock."""
    if torch.device(device).type == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(in_a_row):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / in_a_row


def host_time(step: Step, device: str) -> float | None:
    """Seconds until the host has queued all work of a step on an idle GPU: median of five. None on the CPU."""
    if torch.device(device).type == "cpu":
        return None
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize()  # with a full queue, the host would wait for room in it
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(seconds)
