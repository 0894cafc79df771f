"""Spread a run's network, optimizer and loss over its ranks, and check that the settings allow it."""

import torch

from umd import ops
from umd.config import AnyModelConfig, DiffMAEConfig, ModelConfig
from umd.errors import UserError
from umd.methods import AnyModel, AnyObjective
from umd.train.distributed import World
from umd.train.optim import adamw, narrow_gradients
from umd.train.parallel import DDP, Alone, LossStep, static_compile, strategy
from umd.train.run import RunConfig
from umd.train.step import ZERO_REFUSES
from umd.train.zero import Zero


def spread(
    config: RunConfig, world: World, model: AnyModel, objective: AnyObjective, peak_lr: float, dtype: torch.dtype
) -> Alone | DDP | Zero:
    """Wrap the model, its optimizer and the forward pass as `Alone`, `DDP` or `Zero`."""
    how = strategy(config.parallel, world, sum(p.numel() for p in model.parameters()))
    check_strategy(config, how)
    if how == "ddp" and config.parallel.wire == "bf16" and world.device.type != "cuda":
        raise UserError("parallel.wire bf16 is sent by NCCL, between GPUs; leave it out here")
    if how != "zero":
        model.to(world.device)
    recipe = config.optim
    optimizer = adamw(model, peak_lr, recipe.betas, recipe.weight_decay, recipe.layer_decay, recipe.fused)
    loss = LossStep(static_compile(model) if config.compile else model, objective, dtype)
    if how == "alone":
        if config.accumulate == 1 and dtype == torch.bfloat16 and not config.compile:
            narrow_gradients(model, optimizer)
        return Alone(model, loss, optimizer, config.accumulate, config.optim.clip)
    if how == "ddp":
        return DDP(model, loss, optimizer, config.accumulate, config.optim.clip, world, config.parallel.wire)
    micro = config.batch_size // (world.size * config.accumulate)
    stage = config.parallel.zero_stage
    return Zero(model, loss, optimizer, config.accumulate, config.optim.clip, world, stage, micro, dtype)


def check_strategy(config: RunConfig, how: str) -> None:
    """Raise UserError for settings that are incompatible with `how`: alone, ddp or zero."""
    if how != "zero":
        return
    if config.is_classifier:
        raise UserError("a classifier trains with DDP, not ZeRO; leave out --parallel.strategy zero")
    if config.parallel.zero_stage == 3 and config.compile:
        raise UserError("compile does not go with ZeRO 3, whose weights come and go; use --parallel.zero-stage 2")
    if config.parallel.wire == "bf16":
        raise UserError("parallel.wire bf16 is DDP's; ZeRO sends bf16 in a bf16 run: leave it out, or use ddp")
    if config.optim.fused == "apex":
        raise UserError("apex's FusedAdam goes with one process or DDP, not ZeRO; leave optim.fused at auto")
    if config.capture == "on":
        raise UserError(f"--capture on {ZERO_REFUSES}; leave it at auto")


def check_attention(config: RunConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raise UserError if the configured attention backend cannot run this network on this device."""
    decoder = getattr(config.model, "decoder", "self")
    if config.attention == "triton" and decoder in ("cross", "cross_self"):
        raise UserError(
            f"attention triton is for self-attention, which decoder {decoder} goes beyond; leave it at auto"
        )
    try:
        for width, heads in towers(config.model):
            ops.attention_backend(device, dtype, width // heads, backend=config.attention)
    except ValueError as error:
        raise UserError(f"attention {error}") from error


def towers(model: AnyModelConfig) -> list[tuple[int, int]]:
    """(width, attention heads) of the encoder, and of the decoder if there is one."""
    found = [(model.hidden_size, model.num_heads)]
    if isinstance(model, ModelConfig) and model.decoder_depth:
        found.append((model.decoder_vit.hidden_size, model.decoder_vit.num_heads))
    if isinstance(model, DiffMAEConfig):
        found.append((model.decoder_hidden_size, model.decoder_num_heads))
    return found


def check_gelu(config: RunConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raise UserError if the configured GELU cannot run this network on this device."""
    if config.gelu == "ours":
        return
    widths = {w for n, _ in towers(config.model) for w in (n, int(n * config.model.mlp_ratio))}
    if reason := ops.epilogues_refusal(device, dtype, *sorted(widths)):
        raise UserError(f"gelu: {config.gelu} {reason}; 'ours' runs anywhere")
