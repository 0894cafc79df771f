"""DeepSpeed's ZeRO: optimizer state, gradients and weights sharded over the ranks."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from umd.ema import EMA
from umd.errors import UserError
from umd.layers import Linear
from umd.methods import AnyCorruption, AnyModel, build_model
from umd.train.distributed import World
from umd.train.parallel import Shard, Tensors, copy_into

DEEPSPEED_VERSION = "0.19.8"  # `flat_tensors` reads its private fields; setup.py and constraints.txt pin it

# Positions of parameters in a flat tensor: (name, start in the parameter, length, start in the flat tensor).
Places = list[tuple[str, int, int, int]]


class Zero:
    """DeepSpeed's ZeRO stages 1 to 3. Each rank has a shard of optimizer and EMA, in 2 of gradients, in 3 of weights.

    In bf16, ranks hold the weights in bf16, and their own shard in fp32. Gradients are summed in fp32.
    """

    def __init__(
        self, model: AnyModel, loss: nn.Module, optimizer: Any, accumulate: int, clip: float, world: World, stage: int,
        micro: int, dtype: torch.dtype,
    ):  # fmt: skip
        deepspeed = import_deepspeed(world.device)
        whole = {name: p.detach().float().clone() for name, p in model.named_parameters()}
        num_weights = sum(p.numel() for p in model.parameters())
        settings = deepspeed_config(stage, micro, accumulate, clip, dtype, world.device, num_weights)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # DeepSpeed prints memory figures
            if stage == 3:  # each parameter is sharded on its way to the device, which never holds all of them
                for module in model.modules():
                    if isinstance(module, Linear):
                        module.splits = False
                for p in model.parameters():
                    p.data = p.data.to(dtype)
                for buffer in model.buffers():
                    buffer.data = buffer.data.to(world.device)
                deepspeed.zero.Init(module=loss, config_dict_or_path=settings, dtype=dtype)
            self.engine, *_ = deepspeed.initialize(
                model=loss, optimizer=optimizer, dist_init_required=False, config=settings
            )
        self.model, self.optimizer, self.accumulate, self.stage = model, optimizer, accumulate, stage
        self.flats = flat_tensors(self.engine, optimizer, model, world, stage)
        starts = {name: start for _, places in self.flats for name, start, _, _ in places}
        pieces = {name: piece for flat, places in self.flats for name, piece in views(flat, places).items()}
        self.trained = [name for name, p in model.named_parameters() if p.requires_grad]
        if world.main:  # fixed tables of positions, which DeepSpeed does not optimize: rank 0 holds them whole
            fixed = {name: p.flatten().to(world.device) for name, p in whole.items() if name not in self.trained}
            starts, pieces = starts | dict.fromkeys(fixed, 0), pieces | fixed
        self.weights = Shard(model, world, starts, pieces)
        with torch.no_grad():  # DeepSpeed made the fp32 shards from weights already rounded to bf16
            for name, piece in self.weights.cut(whole).items():
                self.weights.pieces[name].copy_(piece)

    def place(self, device: torch.device) -> str:
        return f"{self.weights.world.size} x {device.type}, ZeRO {self.stage}"

    def forward_backward(self, x_start: Tensor, corruption: AnyCorruption, last: bool) -> tuple[Tensor, Tensor]:
        loss, parts = self.engine(x_start, corruption)
        self.engine.backward(loss)
        if not last:
            self.engine.step()  # only counts the micro-batch
        return loss.detach(), parts

    def update(self) -> Tensor:
        self.engine.step()
        if self.stage == 3 and self.weights.world.device.type == "cuda":
            # DeepSpeed gathers weights on a stream of its own, which does not wait for the update on this one.
            torch.cuda.current_stream().synchronize()
        return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32)

    def tensors(self, ema: EMA | None) -> dict[str, Tensors]:
        gather = self.weights.gather
        parts = {"model": gather(self.weights.pieces, "model"), "optimizer": {}}
        for key in ("exp_avg", "exp_avg_sq"):
            moments: Tensors = {}
            for flat, places in self.flats:
                moments |= views(self.optimizer.state[flat][key], places)
            gathered = gather(moments, key)  # {} on ranks other than 0
            parts["optimizer"] |= {f"{key}::{name}": gathered[name] for name in self.trained if name in gathered}
        steps = next(self.optimizer.state[flat]["step"] for flat, _ in self.flats)
        parts["optimizer"] |= {f"step::{name}": steps.detach().clone() for name in self.trained if parts["model"]}
        return parts | ({} if ema is None else {"ema": gather(ema.state_dict(), "ema")})

    @torch.no_grad()
    def load(self, parts: Mapping[str, Tensors], ema: EMA | None) -> None:
        saved = parts["optimizer"]
        for flat, places in self.flats:
            state = {"step": saved[f"step::{self.trained[0]}"].to(flat.device, copy=True)}
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(flat)
                for name, view in views(state[key], places).items():
                    start = self.weights.starts[name]
                    view.copy_(saved[f"{key}::{name}"].flatten()[start : start + len(view)])
            self.optimizer.state[flat] = state
        if ema is not None:
            ema.load_state_dict(self.weights.cut(parts["ema"]))

    @contextmanager
    def averaged(self, ema: EMA | None) -> Iterator[AnyModel]:
        """A separate network on every rank, as DeepSpeed's holds weights in bf16, or only a shard of them."""
        copy = build_model(self.model.config).to(self.weights.world.device)
        pieces = self.weights.pieces if ema is None else ema.state_dict()
        copy_into(dict(copy.named_parameters()), self.weights.everywhere(pieces))
        yield copy


def flat_tensors(engine: Any, optimizer: Any, model: AnyModel, world: World, stage: int) -> list[tuple[Tensor, Places]]:
    """The flat fp32 tensors that DeepSpeed optimizes on this rank, and the positions of parameters in them.

    This is the only code that reads DeepSpeed's private fields, besides ds_shape in `Shard`. Raises UserError if the
    installed DeepSpeed lacks them.
    """
    flats: list[tuple[Tensor, Places]]
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    try:
        if stage == 3:
            zero = engine.optimizer
            flats = [(flat, []) for flat in zero.fp32_partitioned_groups_flat]
            for name, p in trained:
                group, place, share = zero.grad_position[zero.get_param_id(p)]
                whole = p.ds_numel  # type: ignore[attr-defined]  # set by DeepSpeed
                length = min(share, whole - world.rank * share)  # the last rank's share is padded
                if length > 0:
                    flats[group][1].append((name, world.rank * share, length, place))
            return flats
        flats = [(group["params"][0], []) for group in optimizer.param_groups]
        for name, p in trained:
            here = p._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's
            if here is not None:
                lp, hp = here.lp_fragment_address, here.hp_fragment_address
                flats[here.param_group_index][1].append((name, lp.start, lp.numel, hp.start))
        return flats
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        import deepspeed

        raise UserError(
            f"DeepSpeed {deepspeed.__version__} does not tell where weights lie as {DEEPSPEED_VERSION} does, which is "
            f"expected ({type(error).__name__}: {error}); pip install deepspeed=={DEEPSPEED_VERSION}, or use "
            "--parallel.strategy ddp"
        ) from error


def views(flat: Tensor, places: Places) -> Tensors:
    return {name: flat.detach()[place : place + length] for name, _, length, place in places}


def deepspeed_config(
    stage: int, micro: int, accumulate: int, clip: float, dtype: torch.dtype, device: torch.device, num_weights: int
) -> dict:
    bf16 = dtype == torch.bfloat16
    # DeepSpeed allocates whole buckets, even for a small network. On a CPU a large bucket saves nothing.
    bucket = min(2**26 if device.type == "cuda" else 2**20, num_weights)
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip,
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": device.type == "cuda",
            "contiguous_gradients": True,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": 2**27,
        },
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a micro-batch
    }


def import_deepspeed(device: torch.device):
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"ZeRO is DeepSpeed's, and it does not import here ({error}); "
            f"pip install deepspeed=={DEEPSPEED_VERSION}, or use --parallel.strategy ddp"
        ) from error
    if deepspeed.__version__.partition("+")[0] != DEEPSPEED_VERSION:  # after + : a local build
        warnings.warn(
            f"found DeepSpeed {deepspeed.__version__}, expected {DEEPSPEED_VERSION}: with another one "
            f"checkpoints of ZeRO may be wrong; pip install deepspeed=={DEEPSPEED_VERSION}",
            stacklevel=2,
        )
    warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning)  # its calls
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed's shared-memory exchange is for inference only, and a CPU run would first compile it for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
