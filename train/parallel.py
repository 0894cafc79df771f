"""How weights, gradients, optimiser and EMA lie over the ranks: all on one, DDP, or DeepSpeed's ZeRO (zero.py).

The three classes have the same methods, and their checkpoints the same files: whole fp32 tensors by the network's own
names. So a run may go on with another number of ranks, another stage, or alone.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from umd.checkpoint import load_optimizer_tensors, optimizer_tensors
from umd.ema import EMA, HasParameters
from umd.machine.device import autocast
from umd.methods import AnyCorruption, AnyModel
from umd.spans import span
from umd.train.distributed import World
from umd.train.optim import clipped_step
from umd.train.settings import ParallelConfig

DDP_BELOW = 1_000_000_000  # weights: 16 bytes each fit beside the activations, and DDP sends least and waits least

Tensors = dict[str, Tensor]


def strategy(config: ParallelConfig, world: World, num_weights: int) -> str:
    """alone, ddp or zero. Stage 0 partitions nothing: that is DDP, without the optimizer step that DeepSpeed takes
    on zero gradients before a bf16 run of stage 0, and with the gradient norm that it lacks in fp32."""
    if world.size == 1:
        return "alone"
    if config.strategy == "ddp" or config.zero_stage == 0:
        return "ddp"
    return "zero" if config.strategy == "zero" or num_weights >= DDP_BELOW else "ddp"


def static_compile(call: Callable[..., Any], backend: str | Callable = "inductor") -> Callable[..., Any]:
    """A network, or a function, through torch.compile, with all lengths as constants: a second layout makes a second
    graph.

    Left to itself, torch makes symbols of lengths that were others before, in another network too, and compiles half as
    long again, for lengths that never change.
    """
    return torch.compile(call, backend=backend, dynamic=False)


class LossStep(nn.Module):
    """The forward pass of a micro-batch to its loss as one module, which DDP and DeepSpeed can wrap."""

    def __init__(
        self, network: Callable[..., Tensor], objective: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype
    ):
        """network, objective: of one kind; the objective takes the corruptions that it drew."""
        super().__init__()
        self.network, self.objective, self.dtype = network, objective, dtype

    def forward(self, x_start: Tensor, corruption: AnyCorruption) -> tuple[Tensor, Tensor]:
        """x_start [B, C, H, W] to (loss [], its parts [3])."""
        with span("forward"), autocast(x_start.device, self.dtype):
            return self.objective(self.network, x_start, corruption)


class Alone:
    """One process has it all."""

    weights: HasParameters  # what the EMA averages here

    def __init__(
        self, model: AnyModel, loss: nn.Module, optimizer: torch.optim.Optimizer, accumulate: int, clip: float
    ):
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.accumulate, self.clip = accumulate, clip
        self.weights = model

    def place(self, device: torch.device) -> str:
        return str(device)

    def forward_backward(self, x_start: Tensor, corruption: AnyCorruption, last: bool) -> tuple[Tensor, Tensor]:
        """Add the gradient of one micro-batch; `last` is the last of the step. Returns (loss [], parts [3])."""
        loss, parts = self.loss(x_start, corruption)
        with span("backward"):
            (loss / self.accumulate).backward()
        return loss.detach(), parts

    def update(self) -> Tensor:
        """One optimiser step; returns the norm of the whole gradient before clipping, []."""
        norm = clipped_step(self.optimizer, self.clip)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def tensors(self, ema: EMA | None) -> dict[str, Tensors]:
        """What a checkpoint holds, by the names in memory. All ranks call this together; only rank 0's is whole."""
        parts: dict[str, Tensors] = {"model": {**dict(self.model.named_parameters())}}
        parts["optimizer"] = optimizer_tensors(self.optimizer, self.model)
        return parts | ({} if ema is None else {"ema": ema.state_dict()})

    def load(self, parts: Mapping[str, Tensors], ema: EMA | None) -> None:
        """Put back optimiser and EMA, by the names in memory; the weights were there before this was made."""
        load_optimizer_tensors(self.optimizer, self.model, parts["optimizer"])
        if ema is not None:
            ema.load_state_dict(parts["ema"])

    @contextmanager
    def averaged(self, ema: EMA | None) -> Iterator[AnyModel]:
        """The network with averaged weights on every rank, for as long as the block runs. All ranks call this together.

        The weights are overwritten and put back where they lie, which is where a recorded step reads them.
        """
        if ema is None:
            yield self.model
        else:
            with ema.applied(self.model):
                yield self.model


class Shard:
    """One rank's piece of each parameter: fp32 [n] views into the flattened weights, from `starts[name]` on."""

    def __init__(self, model: nn.Module, world: World, starts: Mapping[str, int], pieces: Tensors):
        self.world, self.starts, self.pieces = world, starts, pieces
        self.host: dict[str, Tensors] = {}
        # ZeRO 3 leaves parameters empty and keeps their shapes beside them.
        self.shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in model.named_parameters()}

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.pieces.items())

    def cut(self, whole: Mapping[str, Tensor]) -> Tensors:
        """This rank's pieces of whole tensors."""
        return {
            name: whole[name].flatten()[self.starts[name] : self.starts[name] + len(piece)]
            for name, piece in self.pieces.items()
        }

    @torch.no_grad()
    def gather(self, pieces: Mapping[str, Tensor], part: str) -> Tensors:
        """Whole tensors on rank 0's host, one at a time through the device; nothing on the other ranks.

        The memory is that of the last call for the same part, and from a GPU the copies are only queued.
        """
        whole = self.host.setdefault(part, {})
        for name, shape in self.shapes.items():
            buffer = torch.zeros(shape.numel(), device=self.world.device)
            if name in pieces:
                buffer[self.starts[name] : self.starts[name] + len(pieces[name])] = pieces[name]
            dist.reduce(buffer, dst=0)  # a sum of zeros and one piece at each place
            if self.world.main:
                if name not in whole:
                    whole[name] = torch.empty(shape, pin_memory=buffer.is_cuda)
                whole[name].copy_(buffer.view(shape), non_blocking=True)
        return whole

    @torch.no_grad()
    def everywhere(self, pieces: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors on every rank's device, one after another; each is overwritten by the next."""
        buffer = torch.empty(max(shape.numel() for shape in self.shapes.values()), device=self.world.device)
        for name, shape in self.shapes.items():
            whole = buffer[: shape.numel()].zero_()
            if name in pieces:
                whole[self.starts[name] : self.starts[name] + len(pieces[name])] = pieces[name]
            dist.all_reduce(whole)  # a sum of zeros and one piece at each place
            yield name, whole.view(shape)


class DDP(Alone):
    """Everything on every rank but the EMA, of which each keeps and updates an equal share."""

    weights: Shard
    loss: DistributedDataParallel

    def __init__(
        self, model: AnyModel, loss: nn.Module, optimizer: Any, accumulate: int, clip: float, world: World, wire: str
    ):
        """wire: type in which gradients are sent, fp32 or bf16."""
        wrapped = DistributedDataParallel(loss, gradient_as_bucket_view=True)
        if wire == "bf16":
            wrapped.register_comm_hook(None, bf16_compress_hook)
        super().__init__(model, wrapped, optimizer, accumulate, clip)
        starts, pieces = {}, {}
        for name, p in model.named_parameters():
            share = -(-p.numel() // world.size)
            piece = p.detach().view(-1)[world.rank * share : (world.rank + 1) * share]
            if len(piece):
                starts[name], pieces[name] = world.rank * share, piece
        self.weights = Shard(model, world, starts, pieces)

    def place(self, device: torch.device) -> str:
        return f"{self.weights.world.size} x {device.type}, DDP"

    def forward_backward(self, x_start: Tensor, corruption: AnyCorruption, last: bool) -> tuple[Tensor, Tensor]:
        self.loss.require_backward_grad_sync = last  # what DDP's no_sync() sets
        return super().forward_backward(x_start, corruption, last)

    def tensors(self, ema: EMA | None) -> dict[str, Tensors]:
        return super().tensors(None) | ({} if ema is None else {"ema": self.weights.gather(ema.state_dict(), "ema")})

    def load(self, parts: Mapping[str, Tensors], ema: EMA | None) -> None:
        super().load(parts, None)
        if ema is not None:
            ema.load_state_dict(self.weights.cut(parts["ema"]))

    @contextmanager
    def averaged(self, ema: EMA | None) -> Iterator[AnyModel]:
        if ema is None:
            yield self.model
            return
        parameters = dict(self.model.named_parameters())
        own = {name: p.detach().clone() for name, p in parameters.items()}
        try:
            copy_into(parameters, self.weights.everywhere(ema.state_dict()))
            yield self.model
        finally:
            copy_into(parameters, own.items())


@torch.no_grad()
def copy_into(parameters: Mapping[str, Tensor], values: Iterable[tuple[str, Tensor]]) -> None:
    for name, value in values:
        parameters[name].copy_(value)
