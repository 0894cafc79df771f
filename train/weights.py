"""Load the networks of finished runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from umd.checkpoint import STATE, Checkpoint, checkpoint_path, list_checkpoints, load_checkpoint, load_model_state
from umd.config import ClassifierConfig, DiffMAEConfig, ModelConfig
from umd.errors import UserError
from umd.methods import AnyModel, build_model
from umd.positions import resized_state
from umd.train.run import RunConfig, from_plain


def saved_weights(path: Path, ema: bool = True) -> tuple[Checkpoint, str]:
    """Find the checkpoint of a run folder, a folder of checkpoints, or a single checkpoint.

    Returns it without tensors, and the part with the weights: `ema` if wanted and available, else `model`.
    Raises UserError as `load_model` does.
    """
    path = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    saved = load_checkpoint(path, parts=[])
    if "model" not in saved.state.get("config", {}):
        raise UserError(f"checkpoint {saved.path} does not say which network it is of; expected one written by umd")
    return saved, "ema" if ema and (saved.path / "ema.safetensors").exists() else "model"


def weights_identity(path: Path, ema: bool = True, step: int | None = None) -> dict[str, Any]:
    """Identify the weights that `load_model` would load: {step, part, sha256}.

    step: of a run's checkpoint; None: the newest. Raises UserError if there is none, and as `load_model`.
    """
    if step is not None:
        kept = list_checkpoints(path / "checkpoints")
        path = checkpoint_path(path / "checkpoints", step)
        if path not in kept:
            steps = ", ".join(str(int(other.stem.removeprefix("step-"))) for other in kept) or "none"
            raise UserError(f"there is no checkpoint of step {step}: {path.parent} has {steps}")
    saved, part = saved_weights(path, ema)
    files = json.loads((saved.path / STATE).read_text("utf-8"))["files"]
    return {"step": saved.step, "part": part, "sha256": files[f"{part}.safetensors"]["sha256"]}


def load_model(
    path: Path, ema: bool = True, device: torch.device | str = "cpu", image_size: tuple[int, int] | None = None
) -> AnyModel:
    """Load the network of a run folder, a folder of checkpoints, or a single checkpoint, in eval mode.

    Args:
        ema: use the EMA weights if the checkpoint has them.
        image_size: UMD only: another image size (height, width); position embeddings are interpolated.

    Raises:
        UserError: there is no checkpoint, it is damaged, its weights are not finite, or do not fit its network.
    """
    saved, part = saved_weights(path, ema)
    values = saved.state["config"]["model"]
    kinds = {"diffmae": DiffMAEConfig, "classifier": ClassifierConfig}
    config = from_plain(kinds.get(values.get("kind"), ModelConfig), values, str(saved.path))
    weights = load_checkpoint(saved.path, parts=[part]).tensors[part]
    if image_size is not None and image_size != config.image_size and isinstance(config, ModelConfig):
        resized = replace(config, image_size=image_size)
        config, weights = resized, resized_state(weights, config.grid_size, resized.grid_size)
    if not all(bool(weight.isfinite().all()) for weight in weights.values() if weight.is_floating_point()):
        raise UserError(f"{saved.path} holds weights that are NaN or infinite: its run diverged; take an earlier one")
    model = build_model(config)
    load_model_state(model, weights)
    return model.to(device).eval().requires_grad_(False)


def class_names(config: RunConfig) -> list[str]:
    """Class names of a run by number, as it was trained. [] if unknown."""
    state = saved_weights(config.out)[0].state
    names = (state.get("source") or {}).get("classes", [])
    return names if len(names) == getattr(config.model, "num_classes", 0) else []
