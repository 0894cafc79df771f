"""The training step of a benchmark, `TrainStep` as `umd pretrain` makes it for one process, and how steps are timed."""

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
IN_A_ROW = 20  # steps of a window on a GPU: its pipeline fills once in as many


def with_modulation(model: UMD) -> UMD:
    """The network with modulation of other than zero, as it is after the first steps."""
    if model.adaLN_modulation is not None:
        for parameter in model.adaLN_modulation.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.02)
    return model


def our_optimizer(model: AnyModel, narrow: bool) -> torch.optim.Optimizer:
    """As `umd pretrain` makes it for one process. narrow: each step is of one backward pass, in bf16."""
    recipe = OptimConfig()
    optimizer = adamw(model, LR, recipe.betas, recipe.weight_decay)
    if narrow:
        narrow_gradients(model, optimizer)
    return optimizer


def train_step(
    model: AnyModel, objective: AnyObjective, batch: int, dtype: str, device: str, capture: bool = False,
    compiled: bool = False,
) -> TrainStep:  # fmt: skip
    """The step of one process that `umd pretrain` would make.

    Args:
        model: moved to `device`.
        batch: samples of a step.
        dtype: bf16 (autocast) or fp32.
        capture: record it as a CUDA graph; it must then be called within `umd.train.step.side_stream`.
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
    """The step on one batch [B, C, H, W] again and again, at one learning rate; it returns the step's metrics."""
    indices = torch.arange(len(x_start), device=x_start.device)
    return lambda: step(x_start, None, indices, LR)


def timed(step: Step, device: str) -> float:
    """Seconds of a step: of one on the CPU; on a GPU of IN_A_ROW that are queued one after another, by its own clock,
    as a training queues them."""
    if torch.device(device).type == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(IN_A_ROW):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / IN_A_ROW


def host_time(step: Step, device: str) -> float | None:
    """Seconds until a GPU that has nothing to do was sent all work of a step: median of five. None on the CPU."""
    if torch.device(device).type == "cpu":
        return None
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize()  # with steps in the queue the host would wait for room in it
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(seconds)
