"""`umd import`: make a run of published weights, so that sample, probe, evaluate and finetune work on it."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console

from umd.checkpoint import save_checkpoint
from umd.config import (
    ClassifierConfig,
    ClassifierObjectiveConfig,
    ModelConfig,
    ObjectiveConfig,
    ScheduleConfig,
    ScheduleName,
)
from umd.convert import from_small_vision, load_small_vision
from umd.errors import UserError
from umd.files import check_place
from umd.published import Published, load_published
from umd.train.options import Import
from umd.train.run import RunConfig, write_config
from umd.train.settings import DataConfig, OptimConfig


def import_run(options: Import, console: Console) -> None:
    """Write the run folder.

    Raises:
        UserError: the folder already holds a run, or the weights are not as `load_published` or `load_small_vision`
            expect.
    """
    out = options.out
    if (out / "config.yaml").exists() or (out / "checkpoints").exists():
        raise UserError(f"{out} holds a run already; give another --out")
    new = not out.exists()
    check_place(out / "config.yaml")
    try:
        model, tensors, told = weights_to_import(options)
        config = imported_config(model, out, told)
    except UserError:
        if new:
            out.rmdir()
        raise
    if options.source:
        config = replace(config, data=replace(config.data, source=options.source))
    state = {"config": {"model": asdict(model)}, "imported": {"kind": options.kind, "file": options.path.name}}
    written = save_checkpoint(out / "checkpoints", 0, tensors, state)
    write_config(config)
    weights = sum(tensor.numel() for tensor in tensors["model"].values())
    what = f"{weights / 1e6:.1f} M weights{', and their EMA' if 'ema' in tensors else ''}"
    console.print(f"written: {written}, {what}", highlight=False, soft_wrap=True)
    if options.kind == "mae" and isinstance(model, ModelConfig) and model.decoder_depth and "norm_pix" not in told:
        console.print(
            "the file does not tell whether this MAE predicts normalised patches (--norm_pix_loss): taken as pixels; "
            f"if it does, set norm_pix: true under objective in {out / 'config.yaml'}", highlight=False, soft_wrap=True,
        )  # fmt: skip
    console.print(what_next(config), highlight=False, soft_wrap=True)


def weights_to_import(options: Import) -> Published:
    """Read the published weights. Raises UserError as `load_published` and `from_small_vision`."""
    if options.kind != "small-vision":
        return load_published(options.kind, options.path, options.num_heads, options.decoder_num_heads)
    model, state = from_small_vision(load_small_vision(options.path))
    tensors = {"model": state}
    if ema := load_small_vision(options.path, "ema_params"):
        averaged, tensors["ema"] = from_small_vision(ema)
        if averaged != model:
            raise UserError(f"{options.path} holds two networks: the average has other shapes than the weights")
    return Published(model, tensors)


def imported_config(
    model: ModelConfig | ClassifierConfig, out: Path, told: Mapping[str, Any] = MappingProxyType({})
) -> RunConfig:
    """The run of a published network: noise schedule and objective as published, optimizer and data by default.

    told: what the file tells of an MAE's objective.
    """
    if isinstance(model, ClassifierConfig):
        return RunConfig(out=out, model=model, objective=ClassifierObjectiveConfig())
    kinds: dict[str, tuple[ObjectiveConfig, ScheduleName]] = {
        "x_start_eps": (ObjectiveConfig(), "cosine" if model.channels in (1, 3) else "linear"),
        "x_start": (ObjectiveConfig(no_noise_prob=1.0, **told), "cosine"),
        "eps": (ObjectiveConfig(no_noise_prob=0.0, mask_ratio=0.0), "linear"),
        "eps_sigma": (ObjectiveConfig(no_noise_prob=0.0, mask_ratio=0.0), "linear"),
        "edm": (ObjectiveConfig(no_noise_prob=0.0, mask_ratio=0.5), "edm"),
    }
    objective, schedule = kinds[model.outputs]
    data = DataConfig() if model.channels in (1, 3) else DataConfig(source="latents/train")
    settings: dict[str, Any] = dict(model=model, objective=objective, schedule=ScheduleConfig(schedule), data=data)
    if model.outputs in ("eps", "eps_sigma", "edm"):  # DiT's and MaskDiT's optimizer
        settings["optim"] = replace(OptimConfig(), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, warmup=0.0)
    return RunConfig(out=out, **settings)


def what_next(config: RunConfig) -> str:
    """Suggest the commands that work on the imported network."""
    run, model = config.out, config.model
    if not isinstance(model, ModelConfig):
        return f"umd probe {run}"
    if model.outputs == "x_start":
        return f"umd probe {run}; umd finetune {run} --task classify"
    vae = "" if model.channels in (1, 3) else " --vae stabilityai/sd-vae-ft-ema"
    return f"umd sample {run}{vae}; umd finetune {run}; umd evaluate {run}"
