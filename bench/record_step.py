"""Record every operation of a training step, on tensors without data: part of the step, launches, bytes, FLOPs.

A launch is one kernel. Number of launches of an operation:

- none for views and empty tensors,
- for our ops: the kernels that their function calls (`wrap_triton`), and PyTorch's operations between them,
- one for all other operations, except those in the table below.
"""

from bisect import bisect_right
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from umd import ops
from umd.spans import PARTS, spans_on
from umd.train.step_counts import EPILOGUES, FREE, STAND_INS, Lengths, flops_of, moved, tensor_bytes, tensors

# PyTorch operations that launch more than one kernel, according to its CUDA sources.
LAUNCHES = {
    "torch_attn._varlen_attn": 2,  # flash attention, and a fill of two values
    "torch_attn._varlen_attn_backward": 3,  # dout·out, the gradients, dq from fp32
    "aten._scaled_dot_product_flash_attention_backward": 3,  # the same
    "aten.convolution_backward": 2,  # weight and bias; the picture needs no gradient
    "aten.embedding_dense_backward": 12,  # for more than 3072 rows: a radix sort, segments, their sums
    "aten.index_copy": 2,  # a copy first
    "aten.mse_loss": 2,
    "aten.select_backward": 2,  # zeros first
    "aten.slice_backward": 2,
    "aten.sort": 3,  # the numbers 0 to n, sorting, values
}
# Limits of one multi_tensor_apply launch: blocks of 65536 elements, and tensors per list for 1 to 5 lists.
CHUNK, BLOCKS, TENSORS = 65536, 320, (110, 64, 48, 36, 30)
CAT_INPUTS = 128  # most tensors that one launch concatenates

KINDS = {
    "products": ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", *EPILOGUES),
    "attention": (
        "_varlen_attn", "_varlen_attn_backward", "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_backward", "short_attention_fwd", "short_attention_bwd",
    ),
    "norms": ("layer_norm_fwd", "layer_norm_bwd", "native_layer_norm", "native_layer_norm_backward"),
    "GELU": ("gelu", "gelu_backward", "gelu_fwd", "gelu_bwd"),
    "sums": ("sum", "column_sum"),
    "copies": ("_to_copy", "copy_", "clone", "cat", "stack", "_foreach_copy_"),
}  # fmt: skip
UPDATE = ("clip", "optimizer", "EMA")  # parts whose operations all have the kind "update"


class Call(NamedTuple):
    """One operation."""

    op: str  # aten.mm, umd.layer_norm_fwd
    kind: str
    part: str  # of umd.spans.PARTS, or "rest"
    backward: bool  # in the backward pass of that part
    launches: int
    bytes: int
    flops: int
    fp32: bool  # whether its first tensor is fp32
    kernel: str = ""  # our kernel, if it is one; then with its number of programs
    programs: int = 0


class Recorder(TorchDispatchMode):
    """Records `calls` while a step runs inside `umd.spans.spans_on`."""

    def __init__(self, lengths: Lengths):
        """lengths: `umd.train.step_counts.sample_lengths`."""
        super().__init__()
        self.lengths = lengths
        self.calls: list[Call] = []
        self.parts = ["rest"]  # stack of open spans
        # Autograd numbers nodes in order of the forward pass: the first number of each part, and its name.
        self.starts, self.started = [0], ["rest"]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "profiler":
            self.follow(func, args)
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        op = f"{func.namespace}.{STAND_INS.get(func.overloadpacket, func.overloadpacket).__name__}"

        def launch(kernel: str, given: list[Tensor], grid: tuple[int, ...]) -> None:  # counts each tensor once
            self.add(op, 1, sum(map(tensor_bytes, given)), 0, given, kernel, prod(grid))

        ours = ops.launches(func, launch)
        if ours is not None:
            first = len(self.calls)
            with self:  # also records PyTorch's operations between the kernels
                ours(*args)
            call = self.calls[first]
            flops = flops_of(func, args, kwargs, out, self.lengths)
            self.calls[first] = call._replace(flops=call.flops + flops, bytes=call.bytes - unread(op, args))
        elif not func.is_view and func.namespace != "prim" and func.overloadpacket.__name__ not in FREE:
            size = moved(func, args, kwargs, out)
            flops = flops_of(func, args, kwargs, out, self.lengths)
            self.add(op, num_launches(op, args) if size else 0, size, flops, args)
        return out

    def follow(self, func: Any, args: tuple) -> None:
        """A span opens or closes."""
        if "enter" in func.overloadpacket.__name__:
            self.parts.append(args[0] if args[0] in PARTS else self.parts[-1])
        else:
            self.parts.pop()
        if self.parts[-1] != "backward":
            self.starts.append(torch._C._autograd._get_sequence_nr())
            self.started.append(self.parts[-1])

    def add(
        self, op: str, launches: int, size: int, flops: int, args: Any, kernel: str = "", programs: int = 0
    ) -> None:
        part, backward = self.parts[-1], False
        node = torch._C._current_autograd_node()
        if part == "backward" and node is not None:
            at = bisect_right(self.starts, node._sequence_nr()) - 1
            part, backward = self.started[at], True
        name = op.partition(".")[2]
        kind = next((kind for kind, names in KINDS.items() if name in names), "other")
        first = next(iter(tensors(args)), None)
        fp32 = first is not None and first.dtype == torch.float32
        kind = "update" if part in UPDATE else kind
        self.calls.append(Call(op, kind, part, backward, launches, size, flops, fp32, kernel, programs))


def unread(op: str, args: tuple) -> int:
    """Bytes of its tensors that our op does not touch: columns whose sums are known to be 0, gradients of others."""
    if op == "umd.short_attention_bwd":  # one launch writes dq, the other dk and dv, both into dqkv
        return tensor_bytes(args[1])
    if op != "umd.column_sum":
        return 0
    x, _, zero_start, zero_stop = args
    return len(x) * (zero_stop - zero_start) * x.element_size()


def num_launches(op: str, args: tuple) -> int:
    name = op.partition(".")[2]
    if name.startswith(("_foreach_", "_fused_")):
        return multi_tensor_launches(name, args)
    if name in ("cat", "stack"):
        return -(-len(args[0]) // CAT_INPUTS)
    return LAUNCHES.get(op, 1)


def multi_tensor_launches(name: str, args: tuple) -> int:
    """Launches of an operation on lists of tensors: as many as its chunks need, or one per tensor if shapes differ."""
    lists = [x for x in args if isinstance(x, list | tuple) and x and isinstance(x[0], Tensor)]
    if name.startswith("_fused_adam"):
        lists = lists[:-1]  # the step counters are passed by address, not as a list
    shapes = [[x.shape for x in tensors_of] for tensors_of in lists]
    if any(s != shapes[0] for s in shapes):
        return len(shapes[0])
    launches, blocks, held = 0, 0, 0
    for x in lists[0]:
        held += 1
        for _ in range(-(-x.numel() // CHUNK)):
            blocks += 1
            if blocks == BLOCKS:
                launches, blocks, held = launches + 1, 0, 1
        if held == TENSORS[len(lists) - 1]:
            launches, blocks, held = launches + (blocks > 0), 0, 0
    launches += blocks > 0
    return launches + 2 * (name == "_foreach_norm")  # one to zero the chunks' buffer, one to sum it


def record(step: Callable[[], object], lengths: Lengths) -> list[Call]:
    """Record the calls of `step`. Run it inside `umd.train.step_counts.as_on_gpu`."""
    recorder = Recorder(lengths)
    with spans_on(), recorder:
        step()
    return recorder.calls
