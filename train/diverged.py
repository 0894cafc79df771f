"""End a run whose loss is NaN or infinite, before its weights are saved."""

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from umd.errors import UserError
from umd.files import write_whole

if TYPE_CHECKING:
    from umd.train.loop import Run, Sent


class Diverged(UserError):
    """The loss became NaN or infinite."""


def check_weights(run: "Run", weights: Mapping[str, Tensor]) -> None:
    """Raise Diverged if weights are NaN or infinite, after the last step's update. All ranks call this together."""
    finite = [weight.isfinite().all() for weight in weights.values()]  # none on ranks that do not write
    if not run.world.agree(bool(torch.stack(finite).all()) if finite else True):
        run.settle_save()
        raise Diverged(
            f"the weights are not finite after step {run.number} and are not saved; last good checkpoint: "
            f"{run.saved_path or 'none'}; start again with a lower lr"
        )


def check_finite(run: "Run", step: "Sent", values: list[float]) -> None:
    """Raise Diverged if a finished step's loss or gradient norm is NaN or infinite. Its weights are never saved."""
    *numbers, norm, _, _ = values
    if all(map(math.isfinite, values)):
        return
    indices = run.world.gather(step.indices)
    lost = run.settle_save()
    dump = run.config.out / "nan-dump.json"
    names = zip(run.objective.part_names(), numbers[1:], strict=True)
    record = {
        "step": step.number,
        "grad_norm": str(norm),
        "loss": str(numbers[0]),
        **{name: str(value) for name, value in names if name},
        "batch_indices": indices.tolist(),
        "draws": {"seed": run.step.seed, "step": step.number - 1, "parts": run.micro_batches},
        "last_good_checkpoint": run.saved_path and str(run.saved_path),
    }
    where = f"{dump} has the batch"
    if run.world.main:
        try:
            write_whole(dump, json.dumps(record, indent=1).encode())
        except OSError as error:
            where = f"{dump}, the record of the batch, could not be written: {error.strerror or error}"
    raise Diverged(
        f"the loss or its gradient is not finite at step {step.number} (loss {numbers[0]}, gradient norm {norm}; "
        f"images {indices[:8].tolist()}...); {where}; last good checkpoint: {run.saved_path or 'none'}"
        f"{f' ({lost})' if lost else ''}; "
        "go on with --precision fp32, or start another run from its weights (--init) with a lower lr"
    )
