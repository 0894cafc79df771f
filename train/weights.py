"""Networks of finished runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from umd.checkpoint import STATE, Checkpoint, load_checkpoint, load_model_state
from umd.config import ClassifierConfig, DiffMAEConfig, ModelConfig
from umd.errors import UserError
from umd.methods import AnyModel, build_model
from umd.positions import resized_state
from umd.train.run import RunConfig, from_plain


def saved_weights(path: Path, ema: bool = True) -> tuple[Checkpoint, str]:
    """The checkpoint of a run folder, a folder of checkpoints, or one checkpoint, without its tensors; and the part
    with the weights: `ema`, if that is asked for and there, or `model`. Raises UserError as `load_model` does."""
    path = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    saved = load_checkpoint(path, parts=[])
    if "model" not in saved.state.get("config", {}):
        raise UserError(f"checkpoint {saved.path} does not say which network it is of; expected one written by umd")
    return saved, "ema" if ema and (saved.path / "ema.safetensors").exists() else "model"


def weights_identity(path: Path, ema: bool = True) -> dict[str, Any]:
    """Which weights `load_model` takes: {step, part, sha256}."""
    saved, part = saved_weights(path, ema)
    files = json.loads((saved.path / STATE).read_text())["files"]
    return {"step": saved.step, "part": part, "sha256": files[f"{part}.safetensors"]["sha256"]}


def load_model(
    path: Path, ema: bool = True, device: torch.device | str = "cpu", image_size: tuple[int, int] | None = None
) -> AnyModel:
    """The network of a run folder, a folder of checkpoints, or one checkpoint, in eval mode.

    ema: take the averaged weights where the checkpoint has them.
    image_size: of a UMD, height and width to read it at: its positions are interpolated.

    Raises:
        UserError: nothing there, damaged, or not a checkpoint of this network.
    """
    saved, part = saved_weights(path, ema)
    values = saved.state["config"]["model"]
    kinds = {"diffmae": DiffMAEConfig, "classifier": ClassifierConfig}
    config = from_plain(kinds.get(values.get("kind"), ModelConfig), values, str(saved.path))
    weights = load_checkpoint(saved.path, parts=[part]).tensors[part]
    if image_size is not None and image_size != config.image_size and isinstance(config, ModelConfig):
        resized = replace(config, image_size=image_size)
        config, weights = resized, resized_state(weights, config.grid_size, resized.grid_size)
    model = build_model(config)
    load_model_state(model, weights)
    return model.to(device).eval().requires_grad_(False)


def class_names(config: RunConfig) -> list[str]:
    """The names of a run's classes, by their numbers, as it was trained; [] where it does not know."""
    state = saved_weights(config.out)[0].state
    names = (state.get("source") or {}).get("classes", [])
    return names if len(names) == getattr(config.model, "num_classes", 0) else []
