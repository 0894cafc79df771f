"""One training step, from a batch on the device to metrics on the device. Used by the loop, benchmarks and profiler.

    load  copies the batch, the learning rate and the EMA rate into the step's own memory
    run   corruption, forward, backward, clipping, optimizer, EMA

`run` takes and returns nothing. It never waits for the device, its shapes never change, and it reads no host value that
changes between steps. So a GPU can record it once as a CUDA graph and replay it.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from umd.config import Capture
from umd.ema import EMA, warm_rate
from umd.errors import UserError
from umd.layers import CastWeights, casts_weights
from umd.machine.device import Captured, pick_device
from umd.machine.doctor import Row
from umd.methods import AnyObjective
from umd.objective import Part
from umd.spans import span
from umd.train.distributed import World
from umd.train.optim import rates_on_device, set_rate
from umd.train.parallel import DDP, Alone
from umd.train.zero import Zero

WARMUP = 11  # steps before recording; by then torch's DDP has laid out its buckets and libraries are set up


class TrainStep:
    """One training step on one rank: forward and backward of its micro-batches, then one update.

    Args:
        parallel: network, loss and optimizer, laid over the ranks.
        objective: draws the corruptions.
        micro: samples per micro-batch.
        seed: seed of the corruptions, 0 <= seed < 2**63.
        world: this rank among the others.
        ema, ema_rate: EMA of the weights, or None, and its final rate (see `warm_rate`).
        number: steps done before, for a resumed run.
        cast: dtype to which the weights of all linear layers are copied in each step. None: autocast casts them one by
            one.
        capture: record `run` as a CUDA graph. Check `capture_refusal` first.

    Attributes:
        metrics: [1 + parts + 1]: the loss, its parts, and the gradient norm before clipping, of this rank. float32, or
            the weights' dtype if wider. The next step overwrites it.
    """

    def __init__(
        self, parallel: Alone | DDP | Zero, objective: AnyObjective, micro: int, seed: int, world: World,
        ema: EMA | None = None, ema_rate: float = 0.0, number: int = 0, cast: torch.dtype | None = None,
        capture: bool = False,
    ):  # fmt: skip
        self.parallel, self.objective, self.micro, self.seed = parallel, objective, micro, seed
        self.device, self.ema, self.final_ema_rate, self.number = world.device, ema, ema_rate, number
        count = world.size * parallel.accumulate
        self.parts = [Part(world.rank * parallel.accumulate + i, count) for i in range(parallel.accumulate)]
        shares = [[1.0, *objective.part_weights(micro, part)] for part in self.parts]
        self.shares = torch.tensor(shares, dtype=torch.float64) / parallel.accumulate  # [accumulate, 1 + parts]
        wide = torch.promote_types(next(iter(parallel.model.parameters())).dtype, torch.float32)
        self.metrics = torch.zeros(self.shares.shape[1] + 1, dtype=wide, device=self.device)
        self.shares = self.shares.to(self.metrics)
        self.step = torch.full((), number, dtype=torch.int64, device=self.device)
        self.x_start: Tensor | None = None  # this and the next two are allocated for the first batch
        self.labels: Tensor | None = None
        self.indices: Tensor | None = None
        on_device = not isinstance(parallel, Zero) and rates_on_device(parallel.optimizer)
        self.ema_rate = torch.zeros((), dtype=wide, device=self.device) if on_device else None
        self.cast = None if cast is None else CastWeights(parallel.model, cast)
        again = "the same command with --capture off goes on from the last checkpoint"
        self.captured = Captured(WARMUP, "the step", again) if capture else None

    def release(self) -> None:
        """Free the CUDA graph. NCCL does not end while a graph holds its exchanges: a rank would hang at exit."""
        self.captured = None

    def __call__(self, x_start: Tensor, labels: Tensor | None, indices: Tensor, lr: float) -> Tensor:
        """Make one step. Returns `metrics`.

        B counts this rank's samples, micro-batch after micro-batch, each in the order of `objective.places`.

        Args:
            x_start: [B, C, H, W], or clips [B, C, F, H, W].
            labels: int64 [B], or None.
            indices: int64 [B], indices into the dataset.
            lr: learning rate.
        """
        self.load(x_start, labels, indices, lr)
        if self.captured is None:
            self.run()
        else:
            self.captured(self.run)
        self.number += 1
        return self.metrics

    def load(self, x_start: Tensor, labels: Tensor | None, indices: Tensor, lr: float) -> None:
        """Copy a batch, the learning rate and the EMA rate to the memory that `run` reads."""
        if self.x_start is None or self.indices is None:
            self.x_start, self.indices = torch.empty_like(x_start), torch.empty_like(indices)
            self.labels = None if labels is None else torch.empty_like(labels)
        self.x_start.copy_(x_start)
        self.indices.copy_(indices)
        if self.labels is not None and labels is not None:
            self.labels.copy_(labels)
        set_rate(self.parallel.optimizer, lr)
        if self.ema is not None:
            self.ema.rate = warm_rate(self.final_ema_rate, self.number)
            if self.ema_rate is not None:
                self.ema_rate.fill_(self.ema.rate)

    def run(self) -> None:
        """Make the step on the loaded batch."""
        assert self.x_start is not None and self.indices is not None, "load comes first"
        self.metrics.zero_()
        with self.casts():
            for i, part in enumerate(self.parts):
                here = slice(i * self.micro, (i + 1) * self.micro)
                with span("corruption"):
                    corruption = self.objective.corrupt(
                        self.micro, self.seed, self.device,
                        labels=None if self.labels is None else self.labels[here],
                        indices=self.indices[here],
                        step=self.step if self.objective.on_device else self.number,  # type: ignore[arg-type]
                        part=part,
                    )  # fmt: skip
                loss, parts = self.parallel.forward_backward(self.x_start[here], corruption, part is self.parts[-1])
                self.metrics[:-1] += self.shares[i] * torch.cat([loss[None], parts])
        self.metrics[-1] = self.parallel.update()
        if self.ema is not None:
            with span("EMA"):
                self.ema.update(self.parallel.weights, self.ema_rate)
        self.step += 1

    def casts(self) -> AbstractContextManager:
        """Within it, layers use casts of their weights as they are now, if this step makes casts."""
        if self.cast is None:
            return nullcontext()
        self.cast.refresh()
        return self.cast.used()


ZERO_REFUSES = "does not go with ZeRO, where DeepSpeed decides on the host between launches"


def capture_refusal(device: torch.device, objective: AnyObjective, parallel: Alone | DDP | Zero, compiled: bool) -> str:
    """Why a step cannot be recorded as a CUDA graph, as a sentence without its subject. "" if it can be."""
    if device.type != "cuda":
        return "needs a CUDA GPU"
    if isinstance(parallel, Zero):
        return ZERO_REFUSES
    if not objective.on_device:
        return "does not go with an objective that draws or reads on the host (classifiers, a file of features)"
    if compiled:
        return "does not go with --compile, which plans launches itself"
    if not isinstance(parallel.optimizer, torch.optim.AdamW):
        return "does not go with apex's FusedAdam, which keeps its learning rate on the host"
    return ""


def captures(choice: Capture, refusal: str, parallel: Alone | DDP | Zero, profiled: bool) -> bool:
    """Whether to record the step as a CUDA graph.

    - auto: on one GPU, if there is no refusal and the run is not profiled. (In a replayed graph, a profiler sees
      kernels but not which part of the step they belong to.)
    - on: also with DDP and in a profiled run.

    Raises:
        UserError: the choice is `on` and there is a refusal.
    """
    if choice == "on" and refusal:
        raise UserError(f"--capture on {refusal}; leave it at auto")
    return choice == "on" or (choice == "auto" and not refusal and not profiled and not isinstance(parallel, DDP))


def capture_row() -> Row:
    """The row of `umd doctor` about CUDA graphs."""
    if pick_device().type != "cuda":
        return Row("CUDA graphs", "none: recording a training step needs a CUDA GPU")
    other = "not with ZeRO, classifiers, a file of features, --compile and apex"
    return Row("CUDA graphs", f"the training step on one GPU; with DDP, or a profile, by --capture on; {other}")


class MetricsReader:
    """Bring the metrics of a step to the host, averaged over the ranks, without keeping the device waiting.

    They are sent when the step is queued and read one step later. So whenever the host waits, the device has another
    step to work on. Two buffers take turns.
    """

    def __init__(self, world: World, size: int):
        """size: number of metrics of a step. Two numbers of the host are added: seconds and stop request."""
        self.world, pinned = world, world.device.type == "cuda"
        self.hosts = [torch.zeros(2, pin_memory=pinned) for _ in range(2)]
        self.buffers = [torch.zeros(size + 2, pin_memory=pinned) for _ in range(2)]
        self.events = [torch.cuda.Event() for _ in range(2)] if pinned else []
        self.turn = 0

    def send(self, metrics: Tensor, elapsed: float, stopping: bool) -> int:
        """Queue the copies to the host. Returns the turn to pass to `read`.

        metrics: [size], on the device. elapsed: seconds of the last step. stopping: whether this rank is asked to stop.
        """
        self.turn = 1 - self.turn
        host = self.hosts[self.turn]
        host[0], host[1] = elapsed, stopping
        values = torch.cat([metrics, host.to(self.world.device, non_blocking=True)])
        self.buffers[self.turn].copy_(self.world.mean_(values), non_blocking=True)
        if self.events:
            self.events[self.turn].record()
        return self.turn

    def read(self, turn: int) -> list[float]:
        """Wait for that step. Returns its metrics, the seconds, and the fraction of ranks that are asked to stop."""
        if self.events:
            self.events[turn].synchronize()
        return self.buffers[turn].tolist()


def cast_type(dtype: torch.dtype, parallel: Alone | DDP | Zero, compiled: bool) -> torch.dtype | None:
    """dtype to which `TrainStep` copies weights, or None if something else casts them (CPU, compiler, DeepSpeed)."""
    wanted = casts_weights(parallel.model, dtype) and not compiled and not isinstance(parallel, Zero)
    return dtype if wanted else None
