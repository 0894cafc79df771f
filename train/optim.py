"""AdamW with UMD's decay mask, and the learning-rate curve of its recipes."""

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
    """Share of the peak rate at `progress` of the run (0 to 1): linear warm-up from 0, then half a cosine to 0 or no
    decay."""
    if progress < warmup:
        return progress / warmup
    if decay == "none":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


def adamw(
    model: AnyModel, lr: float, betas: tuple[float, float], weight_decay: float, layer_decay: float = 1.0,
    fused: str = "auto",
) -> torch.optim.Optimizer:  # fmt: skip
    """Fused AdamW over two groups: parameters in `model.no_weight_decay()`, and the others.

    With a layer decay two for each layer; `lr_multiplier` of a group is its rate's share of the run's.

    Raises:
        UserError: apex is asked for and is not to be had.
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

    # It counts steps a group and not a parameter; given from the start, checkpoints find the count there.
    groups = [group | {"step": 0} for group in groups if group["params"]]
    return FusedAdam(groups, lr=lr, betas=betas, eps=1e-8, adam_w_mode=True)


def check_apex(device: torch.device) -> None:
    """Raise UserError if FusedAdam of NVIDIA's apex cannot be used there."""
    if lacks := apex_lacks():
        raise UserError(
            "optim.fused apex needs NVIDIA's apex (github.com/NVIDIA/apex, not PyPI's package), and here it is "
            f"{lacks}; leave optim.fused at auto, for torch's fused AdamW"
        )
    if device.type != "cuda":
        raise UserError(f"optim.fused apex runs on GPUs, not on {device}; leave it at auto, for torch's fused AdamW")


def runs_compiled(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `clipped_step` takes the step in one compiled pass, whose gradients may be bf16 beside fp32 weights."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    ours = all(ops.use_cpu_path(p) and p.dtype == torch.float32 and p.is_contiguous() for p in params)
    return ours and isinstance(optimizer, torch.optim.AdamW) and not ops.compiler_lacks()


def narrow_gradients(model: AnyModel, optimizer: torch.optim.Optimizer) -> None:
    """Under bf16 autocast on a CPU, where `optimizer` makes compiled steps, each of one backward pass: keep the
    gradients of the weights whose products are in bf16 as those products come, the same numbers in half the memory.
    That of the adaLN projection, made in fp32, is rounded to bf16, as autocast would. There is then no sum to round."""
    if not runs_compiled(optimizer):
        return
    for module in model.modules():
        if isinstance(module, Linear | BlockModulation):
            module.weight.grad_dtype = torch.bfloat16


def rates_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Move AdamW's learning rates to the device, where a CUDA graph reads what they are at each replay. Returns whether
    they are there: apex keeps them on the host, and on the CPU there is nothing to gain."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if not isinstance(optimizer, torch.optim.AdamW) or ops.use_cpu_path(params[0]):
        return False
    for group in optimizer.param_groups:
        group["lr"] = torch.full((), group["lr"], device=params[0].device)
        group["capturable"] = params[0].is_cuda
    return True


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group its share of the run's learning rate. Waits for no device."""
    for group in optimizer.param_groups:
        rate = lr * group["lr_multiplier"]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def clipped_step(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """A step of `adamw`'s optimiser with a gradient of global norm at most `max_norm` (0: any). Returns the norm, [].

    AdamW divides the gradient on its way; clip_grad_norm_ would read and write all of it once more.
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
            optimizer.grad_scale = scale  # type: ignore[attr-defined]  # as torch's GradScaler hands it over
        elif scale is not None:  # apex's has no such way in
            torch._foreach_div_(gradients, scale)
        optimizer.step()
    return norm


@torch.no_grad()
def _compiled_step(optimizer: torch.optim.Optimizer, scale: float) -> None:
    for group in optimizer.param_groups:
        lists: list[list[Tensor]] = [[] for _ in range(6)]  # the last but one is amsgrad's, and stays empty
        optimizer._init_group(group, *lists)  # type: ignore[attr-defined]
        weights, gradients, averages, squares, _, steps = lists
        if weights:
            torch._foreach_add_(steps, 1)
            options = {key: group[key] for key in ("lr", "betas", "weight_decay", "eps")}
            ops.adamw_(weights, gradients, averages, squares, list(map(int, steps)), scale, **options)


def global_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all of them as one vector, [], fp32 or fp64.

    On the CPU compiled, or by BLAS's dot, which takes two thirds of the time of torch's norm there and, in fp32, is
    fifty times as accurate.
    """
    if not gradients:
        return torch.zeros(())
    if not ops.use_cpu_path(gradients[0]):  # get_total_norm does the same on a GPU, and elsewhere a call a tensor
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if {g.dtype for g in gradients} <= {torch.float32, torch.bfloat16} and not ops.compiler_lacks():
        return ops.square_sum(gradients).sqrt().float()
    flat = [g.reshape(-1).to(torch.promote_types(g.dtype, torch.float32)) for g in gradients]
    sums = [torch.dot(g, g) for g in flat]
    return torch.stack([s.double() for s in sums]).sum().sqrt().to(sums[0].dtype)
