"""What a training step holds and does, counted by running it on tensors without data (torch's fake tensors).

The model, its autograd functions and the optimiser run as they are; only shapes and lifetimes are real. So the counts
follow the code: whatever an op saves for its backward pass is found, and no constant has to be kept in step with it.
"""

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from umd import classifier, diffmae, masking, ops
from umd.methods import build_model, build_objective
from umd.schedule import NoiseSchedule
from umd.train.parallel import LossStep
from umd.train.run import RunConfig, from_plain, to_plain

aten = torch.ops.aten
# The CPU's flash attention, in whose place the GPU's is counted: same arguments first, same shapes.
STAND_INS = {
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: aten._scaled_dot_product_flash_attention_backward,
}


@dataclass(frozen=True)
class StepCounts:
    """Of one micro-batch, forward and backward. Bytes, unless said otherwise."""

    weights: int  # number of parameters
    activations: int  # most at any time beside weights and gradients: saved for the backward pass, and in work
    with_gradients: int  # most at any time with the gradients there are by then, in the weights' type
    operations: list[tuple[int, int]]  # (FLOPs, bytes read and written) of every operation that reads memory
    gradients: list[tuple[int, int]]  # (weights, operations before it) of each gradient, in the order they come


class Ledger(TorchDispatchMode):
    """Follows every tensor's memory from the operation that makes it to its release."""

    def __init__(self, apart: Iterable[Tensor]) -> None:
        """apart: tensors whose memory is not counted, nor that of views of them."""
        super().__init__()
        self.apart = {x.untyped_storage()._cdata for x in apart}
        self.live: dict[int, int] = {}  # bytes by storage
        self.gradients: dict[int, int] = {}
        self.total = self.activations = self.with_gradients = 0
        self.operations: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for x in made:
            self.add(x)
        if not func.is_view and func.namespace != "prim":
            moved = sum(x.numel() * x.element_size() for x in (*made, *read))
            count = flop_registry.get(STAND_INS.get(func.overloadpacket, func.overloadpacket))
            flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
            self.operations.append((int(flops), moved))
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


def run_step(config: RunConfig, micro: int, dtype: torch.dtype, weights: torch.dtype) -> StepCounts:
    """Count a micro-batch of `micro` samples: autocast to `dtype`, with parameters of type `weights`."""
    # Any schedule does: they differ in numbers alone, and one of them looks at its numbers.
    objective = build_objective(config.model, config.objective, NoiseSchedule("cosine"))
    torch.set_default_dtype(weights)  # fake parameters cannot be converted
    try:
        model = build_model(config.model)
    finally:
        torch.set_default_dtype(torch.float32)
    model.set_checkpointing(config.checkpointing)
    # Numbers of samples and patches are all that the layouts know of a batch.
    corruption = objective.corrupt(micro, 0, torch.device("cpu"), labels_of(config, micro))
    ledger = Ledger(model.parameters())
    gradients = []

    def hook(parameter: Tensor) -> None:
        ledger.now_gradient(parameter.grad)  # type: ignore[arg-type]
        gradients.append((parameter.numel(), len(ledger.operations)))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(hook)
    with ledger:
        x_start = torch.zeros(micro, config.model.channels, *config.model.image_size)
        loss, _ = LossStep(model, objective, dtype)(x_start, corruption)
        loss.backward()
        ledger.look()
    num_weights = sum(p.numel() for p in model.parameters())
    return StepCounts(num_weights, ledger.activations, ledger.with_gradients, ledger.operations, gradients)


def labels_of(config: RunConfig, micro: int) -> Tensor | None:
    return torch.zeros(micro, dtype=torch.int64) if getattr(config.model, "num_classes", 0) else None


def count_step(
    config: RunConfig, micro: int, dtype: torch.dtype, weights: torch.dtype, attention: ops.Attention
) -> StepCounts:
    """`run_step` on fake tensors. attention: a backend of `ops.attention`."""
    forget()
    try:
        with FakeTensorMode(), ops.attention(attention):
            return run_step(config, micro, dtype, weights)
    finally:
        forget()


def forget() -> None:
    """Fake and real tensors do not mix: what is cached of either goes."""
    for module in (masking, diffmae, classifier):
        module.layout.cache_clear()
    ops.forget()


def count_gpu_step(config: RunConfig, micro: int, dtype: torch.dtype, weights: torch.dtype) -> StepCounts:
    """Counts as on a GPU, without one: Triton's kernels and flash attention, in a process where they are chosen."""
    names = [str(t).removeprefix("torch.") for t in (dtype, weights)]
    request = json.dumps({"config": to_plain(config), "micro": micro, "types": names})
    done = subprocess.run(
        [sys.executable, "-c", "from umd.train.step_counts import answer; answer()"],
        input=request, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"counting a step failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return StepCounts(**found | {key: [tuple(pair) for pair in found[key]] for key in ("operations", "gradients")})


def answer() -> None:
    """`count_gpu_step`'s process: a request from stdin, the counts to stdout."""
    request = json.loads(sys.stdin.read())
    config = from_plain(RunConfig, request["config"], "plan")
    dtype, weights = (getattr(torch, name) for name in request["types"])
    with ops.cpu_paths(False):
        print(json.dumps(asdict(count_step(config, request["micro"], dtype, weights, "sdpa"))))
