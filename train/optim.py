"""AdamW without weight decay on some parameters, gradient clipping, and the learning-rate schedule."""

import math
from typing import Literal

import torch
from torch import Tensor

from umd import ops
from umd.classifier import Classifier
from umd.errors import UserError
from umd.layers import Linear
from umd.machine.device import apex_lacks
from umd.methods import AnyModel
from umd.modulation import BlockModulation
from umd.spans import span


def lr_scale(progress: float, warmup: float, decay: Literal["cosine", "none"] = "cosine") -> float:
    """Learning rate over its peak at `progress` of the run (0 to 1).

    Linear warm-up from 0 in the first `warmup` of the run, then half a cosine to 0, or no decay.
    """
    if progress < warmup:
        return progress / warmup
    if decay == "none":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


def adamw(
    model: AnyModel, lr: float, betas: tuple[float, float], weight_decay: float, layer_decay: float = 1.0,
    fused: str = "auto",
) -> torch.optim.Optimizer:  # fmt: skip
    """Fused AdamW with two parameter groups: parameters in `model.no_weight_decay()`, and all others.

    With a layer decay, there are two groups per layer. `lr_multiplier` of a group is its learning rate over the run's.

    Raises:
        UserError: `fused` is apex, and apex is missing or the model is not on a GPU.
    """
    undecayed = model.no_weight_decay()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    multipliers = {name: 1.0 for name, _ in named}
    if layer_decay != 1:
        assert isinstance(model, Classifier), "RunConfig asks for it"
        multipliers = model.lr_multipliers(layer_decay)
    groups = [
        {
            "params": [p for name, p in named if (name in undecayed) == spared and multipliers[name] == multiplier],
            "weight_decay": 0.0 if spared else weight_decay,
            "lr": lr * multiplier,
            "lr_multiplier": multiplier,
        }
        for multiplier in sorted({multipliers[name] for name, _ in named}, reverse=True)
        for spared in (False, True)
    ]
    if fused != "apex":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=True)
    check_apex(named[0][1].device)
    from apex.optimizers import FusedAdam

    # FusedAdam counts steps per group, not per parameter. Set from the start, so that checkpoints find the count.
    groups = [group | {"step": 0} for group in groups if group["params"]]
    return FusedAdam(groups, lr=lr, betas=betas, eps=1e-8, adam_w_mode=True)


def check_apex(device: torch.device) -> None:
    """Raise UserError if FusedAdam of NVIDIA's apex cannot be used on this device."""
    if lacks := apex_lacks():
        raise UserError(
            "optim.fused apex needs NVIDIA's apex (github.com/NVIDIA/apex, not PyPI's package), and here it is "
            f"{lacks}; leave optim.fused at auto, for torch's fused AdamW"
        )
    if device.type != "cuda":
        raise UserError(f"optim.fused apex runs on GPUs, not on {device}; leave it at auto, for torch's fused AdamW")


def runs_compiled(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `clipped_step` makes the step in one compiled CPU pass, which takes bf16 gradients of fp32 weights."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    ours = all(ops.use_cpu_path(p) and p.dtype == torch.float32 and p.is_contiguous() for p in params)
    return ours and isinstance(optimizer, torch.optim.AdamW) and not ops.compiler_lacks()


def narrow_gradients(model: AnyModel, optimizer: torch.optim.Optimizer) -> None:
    """Keep weight gradients in bf16 if the optimizer makes compiled steps. For bf16 autocast on a CPU.

    Gradients of bf16 products are bf16 already, so this halves their memory without changing them. The gradient of the
    adaLN projection, an fp32 product, is rounded to bf16, as autocast would. Each step must have one backward pass, so
    that no sum of gradients is rounded.
    """
    if not runs_compiled(optimizer):
        return
    for module in model.modules():
        if isinstance(module, Linear | BlockModulation):
            module.weight.grad_dtype = torch.bfloat16


def rates_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Move AdamW's learning rates to the device, where a CUDA graph reads their current value at each replay.

    Returns whether they were moved. They are not for apex, which keeps them on the host, nor on the CPU.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if not isinstance(optimizer, torch.optim.AdamW) or ops.use_cpu_path(params[0]):
        return False
    for group in optimizer.param_groups:
        group["lr"] = torch.full((), group["lr"], device=params[0].device)
        group["capturable"] = params[0].is_cuda
    return True


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set each group's learning rate to `lr` times its multiplier. Does not wait for the device."""
    for group in optimizer.param_groups:
        rate = lr * group["lr_multiplier"]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def clipped_step(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """Clip the gradient to a global norm of `max_norm` (0: no clipping) and make a step. Returns the norm before, [].

    AdamW's kernel scales the gradients on its way; it reads and writes them once. clip_grad_norm_ would once more.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    with span("clip"):
        norm = global_norm(gradients)
        scale = ((norm + 1e-6) / max_norm).clamp(min=1).float() if max_norm else None
    with span("optimizer"):
        if runs_compiled(optimizer):
            _compiled_step(optimizer, 1.0 if scale is None else 1 / float(scale))
            return norm
        if isinstance(optimizer, torch.optim.AdamW):
            optimizer.grad_scale = scale  # type: ignore[attr-defined]  # the attribute that torch's GradScaler sets
        elif scale is not None:  # apex's optimizer has no such attribute
            torch._foreach_div_(gradients, scale)
        optimizer.step()
    return norm


@torch.no_grad()
def _compiled_step(optimizer: torch.optim.Optimizer, scale: float) -> None:
    for group in optimizer.param_groups:
        lists: list[list[Tensor]] = [[] for _ in range(6)]  # the last but one is for amsgrad and stays empty
        optimizer._init_group(group, *lists)  # type: ignore[attr-defined]
        weights, gradients, averages, squares, _, steps = lists
        if weights:
            torch._foreach_add_(steps, 1)
            options = {key: group[key] for key in ("lr", "betas", "weight_decay", "eps")}
            ops.adamw_(weights, gradients, averages, squares, list(map(int, steps)), scale, **options)


def global_norm(gradients: list[Tensor]) -> Tensor:
    """Norm of all gradients as one vector: [], fp32 or fp64.

    On a CPU, it is computed by a compiled kernel or by BLAS's dot. The latter takes two thirds of the time of torch's
    norm and is fifty times as accurate in fp32.
    """
    if not gradients:
        return torch.zeros(())
    if not ops.use_cpu_path(gradients[0]):  # as torch's get_total_norm does on a GPU
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if {g.dtype for g in gradients} <= {torch.float32, torch.bfloat16} and not ops.compiler_lacks():
        return ops.square_sum(gradients).sqrt().float()
    flat = [g.reshape(-1).to(torch.promote_types(g.dtype, torch.float32)) for g in gradients]
    sums = [torch.dot(g, g) for g in flat]
    return torch.stack([s.double() for s in sums]).sum().sqrt().to(sums[0].dtype)
