"""Start a run from its own newest checkpoint, if it is still the same run, or from the weights of another run."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from umd.checkpoint import (
    Checkpoint,
    CheckpointError,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_model_state,
)
from umd.classifier import Classifier
from umd.diffmae import DiffMAE
from umd.errors import UserError
from umd.methods import AnyModel
from umd.positions import resized_state
from umd.train.classify import load_encoder
from umd.train.distributed import World
from umd.train.fingerprint import Difference, difference, same_source
from umd.train.latents import check_run_vae
from umd.train.run import RunConfig, differences, to_plain
from umd.train.settings import DataConfig

# Settings that define a run. All others (length, saving, logging, device, speed) may change when it is resumed.
RUN = ("model", "objective", "schedule", "data", "optim", "batch_size", "seed")
# Exceptions: `source` is compared by its pictures. The others follow from model and VAE, which are compared themselves.
FREE = {
    "data": {"source", "image_size", "channels", "num_frames", "vae", "vae_hash"}
    | {"skip_broken", "quarantine", "loader", "num_workers"},
    "optim": {"fused"},
}


def newest_checkpoint(config: RunConfig, world: World, source: dict) -> tuple[Path | None, Checkpoint | None]:
    """The checkpoint that this run resumes from, the same on every rank, with tensors on the CPU. None: a new run.

    source: `fingerprint` of the dataset it will train on.
    """
    path = world.agree(latest_checkpoint(config.checkpoints) if world.main else None)
    if path is None:
        check_none_there(config.checkpoints)
        return None, None
    if not path.is_dir():
        raise UserError(f"rank {world.rank} does not see {path}; all hosts must share the folder of the run")
    check_same_run(load_checkpoint(path, parts=[]), config, source)
    parts = ["model", "optimizer"] + (["ema"] if config.ema > 0 else [])
    path = world.agree(newest_undamaged(config.checkpoints, parts) if world.main else None)
    return path, load_checkpoint(path, parts=parts, verify=False)


def newest_undamaged(checkpoints: Path, parts: list[str]) -> Path:
    """The newest checkpoint whose files are what was written. Warns of damaged ones. Raises if all are."""
    damaged: list[CheckpointError] = []
    for path in reversed(list_checkpoints(checkpoints)):
        try:
            load_checkpoint(path, parts=parts)
            return path
        except CheckpointError as error:
            warnings.warn(f"Skipped: {error}", stacklevel=2)
            damaged.append(error)
    raise damaged[0]


def with_ema_of(config: RunConfig) -> RunConfig:
    """Resolve `optim.ema` None: to the rate of the run in `config.out`, or to the default for a new run."""
    path = latest_checkpoint(config.checkpoints) if config.optim.ema is None else None
    if path is None:
        return config.resolved()
    saved = load_checkpoint(path, parts=[]).state.get("config", {}).get("optim", {})
    return replace(config, optim=replace(config.optim, ema=saved.get("ema", config.ema)))


def check_none_there(checkpoints: Path) -> None:
    """Raise UserError if there are checkpoints but none can be read. The run would silently start from scratch."""
    if any(not path.name.startswith(".") for path in checkpoints.glob("*")):  # hidden: an unfinished save
        try:
            load_checkpoint(checkpoints, parts=[])
        except CheckpointError as error:
            raise UserError(
                f"no checkpoint in {checkpoints} can be gone on from ({str(error).rstrip('.')}); restore one, or give "
                "another --out to train from the start"
            ) from error


def check_same_run(saved: Checkpoint, config: RunConfig, source: dict) -> None:
    """Raise UserError, naming each setting, if `config` differs from the run in `config.out` in what defines a run."""
    before, now = saved.state.get("config", {}), to_plain(config)
    check_kind(before.get("model", {}), now["model"], config.out)
    check_run_vae(saved.state, config.data, config.out)
    differ = [  # None: imported weights know only their network
        f"{name} {a}, not {b}"
        for name, a, b in differences({name: before.get(name) for name in RUN}, {name: now[name] for name in RUN})
        if None not in (a, b)
        and not (name == "objective.target" and same_source(a, b))
        and name.partition(".")[2] not in FREE.get(name.partition(".")[0], ())
    ]
    trained_on, source_before = saved.state.get("source") or {}, before.get("data", {}).get("source", "")
    found = difference(trained_on, source) if trained_on else Difference("nothing is known of the others", False)
    if found and not same_source(source_before, config.data.source):
        said = f"which holds other pictures ({found.said})"
        differ.append(f"data.source {source_before}, not {config.data.source}, {said}")
    elif found and found.others:
        differ.append(f"other pictures than {config.data.source} has now ({found.said}; put them back as they were)")
    shards = source.get("shards"), trained_on.get("shards")
    if config.data.shuffle == "blocks" and None not in shards and shards[0] != shards[1]:
        differ.append("data.source in shards of other sizes, which --data.shuffle blocks takes in another order")
    targets = trained_on.get("target"), source.get("target")
    if None not in targets and targets[0] != targets[1]:
        differ.append(f"other targets than {now['objective']['target']} holds now")
    if config.init is not None and not same_source(before.get("init") or "", config.init):
        differ.append(f"init {before.get('init')}, not {config.init}")
    if differ:
        raise UserError(
            f"{config.out} holds a run with {'; '.join(differ)}: give the settings it was trained with to go on with "
            f"it, or another --out for a new run (--init {config.out} starts that from its weights)"
        )


def load_pretrained(model: AnyModel, init: Path, data: DataConfig) -> None:
    """Load the weights of another run into `model`. Label embeddings may be new, and the image size may differ.

    Raises UserError, saying what differs, if the networks do not fit.
    """
    path = init / "checkpoints" if (init / "checkpoints").is_dir() else init
    if isinstance(model, Classifier):
        load_encoder(model, path, data)
        return
    saved = load_checkpoint(path, parts=["model"])
    before, now = saved.state.get("config", {}).get("model", {}), to_plain(model.config)
    check_kind(before, now, init)
    # Compare all settings, as some change no shape, such as num_heads.
    differ = [f"{name} {before[name]}, not {now[name]}" for name in now if name in before and before[name] != now[name]]
    free = ("num_classes ", "image_size ", "residual_in_fp32 ")
    differ = [what for what in differ if not what.startswith(free)]
    if differ:
        raise UserError(
            f"{init} holds a network with {'; '.join(differ)}: give the settings it was trained with, or another folder"
        )
    check_run_vae(saved.state, data, init)
    weights = saved.tensors["model"]
    if before.get("num_classes") != now.get("num_classes"):  # other classes: keep new embeddings
        weights = {name: value for name, value in weights.items() if not name.startswith("y_embedder.")}
    if not isinstance(model, DiffMAE):
        grid = tuple(side // now["patch_size"] for side in before["image_size"])
        weights = resized_state(weights, grid, model.config.grid_size)
    load_model_state(model, weights, allow_missing=("y_embedder.",))


def check_kind(before: Mapping, now: Mapping, folder: Path) -> None:
    kinds = before.get("kind", "umd"), now.get("kind", "umd")
    if kinds[0] != kinds[1]:
        raise UserError(f"{folder} holds a {kinds[0]} network, not a {kinds[1]} one: give another folder")
