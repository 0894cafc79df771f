"""Count a training step's memory and operations by running it on tensors without data (torch's fake tensors).

Model, autograd functions and optimizer run unchanged; only shapes and lifetimes are real. So memory follows the code:
whatever an op saves for its backward pass is counted. FLOPs of our own ops, and which ops read less than their inputs,
are written down by hand (`flops_of`, `moved`).
"""

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from umd import ops
from umd.ema import EMA
from umd.layers import set_recompute_gelu
from umd.methods import build_model, build_objective
from umd.schedule import NoiseSchedule
from umd.train.distributed import World
from umd.train.optim import adamw
from umd.train.parallel import Alone, LossStep
from umd.train.run import RunConfig
from umd.train.step import TrainStep, cast_type

aten = torch.ops.aten
# CPU flash attention is counted as the GPU's: the first arguments and the shapes are the same.
STAND_INS = {
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: aten._scaled_dot_product_flash_attention_backward,
}
# These ops make or name a tensor and move no bytes.
FREE = (
    "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "lift_fresh", "_unsafe_view",
    "set_",
)  # fmt: skip
# These ops write their first argument without reading it.
OVERWRITES = (aten.copy_, aten.fill_, aten.zero_, aten._foreach_copy_)
# These ops read no more of their first argument than they return.
LOOKUPS = (aten.embedding, aten.index_select, aten.gather, aten.index)

EPILOGUES = ("linear_gelu", "gelu_gradient", "weight_and_bias_gradient")  # products of kernels/epilogues.py

Lengths = Mapping[int, Sequence[int]]  # storage of a packing's `cu_seqlens` -> lengths of its samples


@dataclass(frozen=True)
class StepCounts:
    """Counts of one micro-batch, forward and backward. In bytes unless said otherwise."""

    weights: int  # number of parameters
    activations: int  # peak without weights and gradients: tensors saved for the backward pass, and temporary ones
    with_gradients: int  # peak including the gradients that exist by then, in the weights' dtype
    operations: list[tuple[int, int]]  # (FLOPs, bytes read and written) of every operation that reads memory
    gradients: list[tuple[int, int]]  # (weights, operations before it) of each gradient, in order of appearance


class Ledger(TorchDispatchMode):
    """Tracks every tensor's memory from its creation to its release, and records every operation."""

    def __init__(self, apart: Iterable[Tensor], lengths: Lengths) -> None:
        """apart: tensors whose memory, and that of their views, is not counted. lengths: see `sample_lengths`."""
        super().__init__()
        self.lengths = lengths
        self.apart = {x.untyped_storage()._cdata for x in apart}
        self.live: dict[int, int] = {}  # bytes by storage
        self.gradients: dict[int, int] = {}
        self.total = self.activations = self.with_gradients = 0
        self.operations: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tensors(out):
            self.add(x)
        if not func.is_view and func.namespace != "prim":
            kwargs = kwargs or {}
            self.operations.append((flops_of(func, args, kwargs, out, self.lengths), moved(func, args, kwargs, out)))
        return out

    def add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self.live or key in self.apart:
            return
        self.live[key] = storage.nbytes()
        self.total += storage.nbytes()
        weakref.finalize(storage, self.release, key)
        self.look()

    def release(self, key: int) -> None:
        self.total -= self.live.pop(key, 0)
        self.gradients.pop(key, None)

    def now_gradient(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        self.gradients[storage._cdata] = self.live[storage._cdata]

    def look(self) -> None:
        self.activations = max(self.activations, self.total - sum(self.gradients.values()))
        self.with_gradients = max(self.with_gradients, self.total)


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def tensor_bytes(*given: Tensor | None) -> int:
    """Bytes of all distinct elements of the given tensors: an expanded dimension (stride 0) counts once."""
    total = 0
    for x in given:
        if x is not None and x.numel():
            sizes = [size for size, stride in zip(x.shape, x.stride(), strict=True) if stride]
            total += math.prod(sizes) * x.element_size()
    return total


def moved(func: Any, args: tuple, kwargs: dict, out: Any) -> int:
    """Bytes that an operation reads and writes: each input once, plus each tensor that it makes or changes."""
    total = tensor_bytes(*tensors((args, kwargs)))
    for argument, x in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            total += tensor_bytes(*tensors(x))
    if func.overloadpacket in OVERWRITES:
        total -= tensor_bytes(*tensors(args[0]))
    new = [x for x, kind in zip(as_tuple(out), func._schema.returns, strict=False) if kind.alias_info is None]
    made = tensor_bytes(*tensors(new))
    if func.overloadpacket in LOOKUPS:
        total -= max(0, tensor_bytes(args[0]) - made)
    return total + made


def as_tuple(out: Any) -> tuple:
    return out if isinstance(out, tuple) else (out,)


def flops_of(func: Any, args: tuple, kwargs: dict, out: Any, lengths: Lengths) -> int:
    """FLOPs of an operation, counted as by torch's flop counter: matrix products and attention only."""
    op = func.overloadpacket
    if func.namespace == "umd":  # our attention computes its weights twice in the backward pass
        if op.__name__ in EPILOGUES:
            return 2 * len(args[0]) * (out[0] if op.__name__ == "weight_and_bias_gradient" else args[1]).numel()
        if op.__name__ not in ("short_attention_fwd", "short_attention_bwd"):
            return 0
        out, cu_seqlens = out[0] if op.__name__ == "short_attention_fwd" else args[2], args[-2]
        products = 2 if op.__name__ == "short_attention_fwd" else 7
        return 2 * products * out.shape[1] * out.shape[2] * sum(n * n for n in lengths[storage_of(cu_seqlens)])
    if func.namespace == "torch_attn":  # 2 products per query and key forward; 5 backward, with recomputed scores
        backward = op is torch.ops.torch_attn._varlen_attn_backward
        first = args[1 if backward else 0]  # [N, H, d]
        queries, keys = (lengths[storage_of(x)] for x in (args[6:8] if backward else args[3:5]))
        pairs = sum(q * k for q, k in zip(queries, keys, strict=True))
        return (10 if backward else 4) * first.shape[1] * first.shape[2] * pairs
    count = flop_registry.get(STAND_INS.get(op, op))
    return int(count(*args, **kwargs, out_val=out)) if count else 0


def storage_of(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def sample_lengths(layout: Iterable) -> Lengths:
    """Sample lengths of a layout's packings. Ops cannot read them from `cu_seqlens`, which has no data here."""
    packings = [packing for packing in layout if isinstance(packing, ops.Packing)]
    return {storage_of(p.cu_seqlens): [length for samples, length in p.runs for _ in range(samples)] for p in packings}


def make_step(config: RunConfig, micro: int, dtype: torch.dtype, weights: torch.dtype) -> TrainStep:
    """Make the step of one rank with `micro` samples: autocast to `dtype`, parameters of dtype `weights`."""
    # Cosine stands for all schedules but EDM's, as they differ in values only, and the linear ones read their values.
    schedule = NoiseSchedule("edm" if config.schedule.name == "edm" else "cosine", config.schedule.num_steps)
    objective = build_objective(config.model, config.objective, schedule)
    torch.set_default_dtype(weights)  # fake parameters cannot be converted
    try:
        model = build_model(config.model)
    finally:
        torch.set_default_dtype(torch.float32)
    model.set_checkpointing(config.checkpointing)
    set_recompute_gelu(model, config.recompute_gelu and not config.checkpointing)
    optim = config.optim
    optimizer = adamw(model, optim.lr, optim.betas, optim.weight_decay)
    parallel = Alone(model, LossStep(model, objective, dtype), optimizer, 1, optim.clip)
    ema = EMA(model, config.ema) if config.ema else None
    ranks = max(1, config.batch_size // micro)  # count as the first of this many ranks
    return TrainStep(
        parallel, objective, micro, 0, World(0, ranks, torch.device("cpu")), ema=ema, ema_rate=config.ema,
        cast=cast_type(dtype, parallel, compiled=False),
    )  # fmt: skip


def run_step(config: RunConfig, micro: int, dtype: torch.dtype, weights: torch.dtype) -> StepCounts:
    """Count forward and backward pass of the step made by `make_step`."""
    step = make_step(config, micro, dtype, weights)
    model = step.parallel.model
    # A layout depends only on the numbers of samples and patches.
    corruption = step.objective.corrupt(micro, 0, torch.device("cpu"), labels_of(config, micro), part=step.parts[0])
    ledger = Ledger(model.parameters(), sample_lengths(getattr(corruption, "layout", ())))
    gradients = []

    def hook(parameter: Tensor) -> None:
        ledger.now_gradient(parameter.grad)  # type: ignore[arg-type]
        gradients.append((parameter.numel(), len(ledger.operations)))

    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        parameter.register_post_accumulate_grad_hook(hook)
    with ledger, step.casts():
        frames = [config.data.num_frames] if config.data.num_frames > 1 else []
        x_start = torch.zeros(micro, config.model.channels, *frames, *config.model.image_size)
        step.parallel.forward_backward(x_start, corruption, last=True)
        ledger.look()
    num_weights = sum(p.numel() for p in model.parameters())
    return StepCounts(num_weights, ledger.activations, ledger.with_gradients, ledger.operations, gradients)


def labels_of(config: RunConfig, micro: int) -> Tensor | None:
    return torch.zeros(micro, dtype=torch.int64) if getattr(config.model, "num_classes", 0) else None


@contextmanager
def without_data() -> Iterator[None]:
    """Make tensors inside the block fake. The CPU ops' cached matrices are dropped, as fake and real do not mix."""
    ops.forget()
    try:
        with FakeTensorMode():
            yield
    finally:
        ops.forget()


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """`without_data`, with the ops of a GPU: Triton kernels, if Triton is installed, and flash attention."""
    with ops.cpu_paths(False), ops.kernels("auto"), without_data():
        yield


def count_gpu_step(config: RunConfig, micro: int, dtype: torch.dtype, weights: torch.dtype) -> StepCounts:
    """Count a step as it would run on a GPU, without a GPU."""
    with as_on_gpu(), ops.attention("auto"), ops.gelu_by(config.gelu):
        return run_step(config, micro, dtype, weights)
