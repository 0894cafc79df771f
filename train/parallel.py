"""How weights, gradients, optimizer and EMA are spread over ranks: one process, DDP, or DeepSpeed's ZeRO (zero.py).

The three classes have the same methods and the same checkpoint files: whole fp32 tensors under the network's own names.
So a run may be resumed with another number of ranks, another ZeRO stage, or in one process.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from umd.checkpoint import load_optimizer_tensors, optimizer_tensors
from umd.classifier import BatchNorm
from umd.ema import EMA, HasParameters
from umd.machine.device import autocast
from umd.methods import AnyCorruption, AnyModel
from umd.spans import span
from umd.train.distributed import World
from umd.train.optim import clipped_step
from umd.train.settings import ParallelConfig

DDP_BELOW = 1_000_000_000  # weights; below, 16 bytes per weight fit beside the activations, and DDP communicates least

Tensors = dict[str, Tensor]


def strategy(config: ParallelConfig, world: World, num_weights: int) -> str:
    """Choose `alone`, `ddp` or `zero`.

    ZeRO stage 0 shards nothing, so it becomes `ddp`. (DeepSpeed's own stage 0 makes an optimizer step on zero gradients
    before a bf16 run, and has no gradient norm in fp32.)
    """
    if world.size == 1:
        return "alone"
    if config.strategy == "ddp" or config.zero_stage == 0:
        return "ddp"
    return "zero" if config.strategy == "zero" or num_weights >= DDP_BELOW else "ddp"


def static_compile(call: Callable[..., Any], backend: str | Callable = "inductor") -> Callable[..., Any]:
    """Compile a network or function with torch.compile, all lengths as constants. A second layout gets its own graph.

    By default, torch would turn lengths that differ from earlier ones (even of another network) into symbols. That
    takes half as long again to compile, for lengths that never change.
    """
    return torch.compile(call, backend=backend, dynamic=False)


class LossStep(nn.Module):
    """Forward pass of a micro-batch up to its loss, as one module that DDP and DeepSpeed can wrap."""

    def __init__(
        self, network: Callable[..., Tensor], objective: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype
    ):
        """network, objective: of the same kind. The objective must be the one that draws the corruptions."""
        super().__init__()
        self.network, self.objective, self.dtype = network, objective, dtype

    def forward(self, x_start: Tensor, corruption: AnyCorruption) -> tuple[Tensor, Tensor]:
        """x_start: [B, C, H, W], clips [B, C, F, H, W]. Returns (loss [], its parts: [3] of a UMD, else [0])."""
        with span("forward"), autocast(x_start.device, self.dtype):
            return self.objective(self.network, x_start, corruption)


class Alone:
    """Everything in one process."""

    weights: HasParameters  # parameters that this rank's EMA averages

    def __init__(
        self, model: AnyModel, loss: nn.Module, optimizer: torch.optim.Optimizer, accumulate: int, clip: float
    ):
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.accumulate, self.clip = accumulate, clip
        self.weights = model

    def place(self, device: torch.device) -> str:
        return str(device)

    def forward_backward(self, x_start: Tensor, corruption: AnyCorruption, last: bool) -> tuple[Tensor, Tensor]:
        """Add the gradient of one micro-batch. last: it is the last one of the step. Returns (loss [], its parts)."""
        loss, parts = self.loss(x_start, corruption)
        with span("backward"):
            (loss if self.accumulate == 1 else loss / self.accumulate).backward()
        return loss.detach(), parts

    def update(self) -> Tensor:
        """Make one optimizer step. Returns the norm of the whole gradient before clipping, []."""
        norm = clipped_step(self.optimizer, self.clip)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def tensors(self, ema: EMA | None) -> dict[str, Tensors]:
        """The tensors of a checkpoint, by their names in memory. All ranks call this; only rank 0 gets all of them."""
        parts: dict[str, Tensors] = {"model": {**dict(self.model.named_parameters())}}
        parts["optimizer"] = optimizer_tensors(self.optimizer, self.model)
        return parts | ({} if ema is None else {"ema": ema.state_dict()})

    def load(self, parts: Mapping[str, Tensors], ema: EMA | None) -> None:
        """Load optimizer and EMA state, by names in memory. The weights were loaded before this object was made."""
        load_optimizer_tensors(self.optimizer, self.model, parts["optimizer"])
        if ema is not None:
            ema.load_state_dict(parts["ema"])

    @contextmanager
    def averaged(self, ema: EMA | None) -> Iterator[AnyModel]:
        """The network with EMA weights, on every rank, while the block runs. All ranks call this together.

        The weights are overwritten in place and restored after, as a recorded step reads them from this memory.
        """
        if ema is None:
            yield self.model
        else:
            with ema.applied(self.model):
                yield self.model


class Shard:
    """One rank's shard of each parameter: fp32 [n] views into the flattened parameter, from `starts[name]` on."""

    def __init__(self, model: nn.Module, world: World, starts: Mapping[str, int], pieces: Tensors):
        self.world, self.starts, self.pieces = world, starts, pieces
        self.host: dict[str, Tensors] = {}
        # ZeRO 3 leaves parameters empty and keeps their shapes in ds_shape.
        self.shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in model.named_parameters()}

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.pieces.items())

    def cut(self, whole: Mapping[str, Tensor]) -> Tensors:
        """Cut this rank's shards from whole tensors."""
        return {
            name: whole[name].flatten()[self.starts[name] : self.starts[name] + len(piece)]
            for name, piece in self.pieces.items()
        }

    @torch.no_grad()
    def gather(self, pieces: Mapping[str, Tensor], part: str) -> Tensors:
        """Gather whole tensors in rank 0's host memory, one at a time through the device. {} on the other ranks.

        Memory is reused in the next call for the same part. The copies are done when this returns.
        """
        whole = self.host.setdefault(part, {})
        for name, shape in self.shapes.items():
            buffer = torch.zeros(shape.numel(), device=self.world.device)
            if name in pieces:
                buffer[self.starts[name] : self.starts[name] + len(pieces[name])] = pieces[name]
            dist.reduce(buffer, dst=0)  # exact: at each position only one rank is not zero
            if self.world.main:
                if name not in whole:
                    whole[name] = torch.empty(shape, pin_memory=buffer.is_cuda)
                whole[name].copy_(buffer.view(shape), non_blocking=True)
        if self.world.main and self.world.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the caller looks for NaN on the host
        return whole

    @torch.no_grad()
    def everywhere(self, pieces: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole tensor) on every rank's device, one at a time. The next one overwrites the tensor."""
        buffer = torch.empty(max(shape.numel() for shape in self.shapes.values()), device=self.world.device)
        for name, shape in self.shapes.items():
            whole = buffer[: shape.numel()].zero_()
            if name in pieces:
                whole[self.starts[name] : self.starts[name] + len(pieces[name])] = pieces[name]
            dist.all_reduce(whole)  # exact: at each position only one rank is not zero
            yield name, whole.view(shape)


class DDP(Alone):
    """DDP: everything on every rank, except the EMA, of which each rank keeps and updates an equal shard."""

    weights: Shard
    loss: DistributedDataParallel

    def __init__(
        self, model: AnyModel, loss: nn.Module, optimizer: Any, accumulate: int, clip: float, world: World, wire: str
    ):
        """wire: dtype in which gradients are sent, fp32 or bf16."""
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
        self.loss.require_backward_grad_sync = last  # the flag behind DDP's no_sync()
        return super().forward_backward(x_start, corruption, last)

    def average_moments(self) -> None:
        """Average the running moments of batch norms, which each rank counts on its own, over the ranks.

        So the network that is scored is that of the checkpoint, on every rank.
        """
        for norm in (module for module in self.model.modules() if isinstance(module, BatchNorm)):
            for moment in norm.parameters():
                self.weights.world.mean_(moment)

    def check_replicas(self) -> None:
        """Warn if the weights of ranks differ. All ranks call this together.

        All make the same updates, so other weights come from a faulty GPU, or from a bad read when the run was resumed.
        """
        weights = [p.detach().view(torch.int32) for p in self.model.parameters()]
        sums = torch.stack([bits.sum(dtype=torch.int64) for bits in weights])  # exact in any order
        bits = self.weights.world.gather(sums.sum()[None])  # [ranks]
        if others := (bits != bits[0]).nonzero().flatten().tolist():
            warnings.warn(
                f"the weights of ranks {', '.join(map(str, others))} differ from rank 0's: a device computes or reads "
                "wrongly. Stop the run, take it out, and go on from an earlier checkpoint",
                stacklevel=2,
            )

    def tensors(self, ema: EMA | None) -> dict[str, Tensors]:
        self.average_moments()
        self.check_replicas()
        return super().tensors(None) | ({} if ema is None else {"ema": self.weights.gather(ema.state_dict(), "ema")})

    def load(self, parts: Mapping[str, Tensors], ema: EMA | None) -> None:
        super().load(parts, None)
        if ema is not None:
            ema.load_state_dict(self.weights.cut(parts["ema"]))

    @contextmanager
    def averaged(self, ema: EMA | None) -> Iterator[AnyModel]:
        self.average_moments()
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
