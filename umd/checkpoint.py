"""Checkpoints: a folder with safetensors files and one JSON file, written completely or not at all, checked at load.

    root/step-00000100/model.safetensors       one file for each entry of `tensors`
                       optimizer.safetensors
                       state.json              format, step, state, size and sha256 of each file

A save is written to a hidden folder beside its destination, flushed to the disk, and renamed once. Every `step-*` is
therefore complete, whatever kills the process. Only one process may write to a root.

Files hold the adaLN projections of all blocks as one tensor, `adaLN_modulation.weight`. In memory each block has its
own, e.g. `adaLN_modulation.3.weight`. `joined` and `split` convert weights, averages and optimiser state.
"""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from umd.errors import UserError
from umd.files import LOST, again_if_lost, flush, sha256
from umd.tensor_files import write_safetensors

FORMAT = 1
STATE = "state.json"
_FOLDER = re.compile(r"step-(\d+)(\.replaced)?")  # .replaced: an earlier save of the same step, soon removed
_UNFINISHED = ".unfinished-"
_BLOCK = re.compile(r"(.*adaLN_modulation(?:\.up)?)\.(\d+)\.(weight|bias)")


class CheckpointError(UserError):
    """A checkpoint cannot be written, is missing, is damaged, or does not fit the model."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: its tensors as `tensors[part][name]`, and `state`, the JSON data saved with them."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict


def save_checkpoint(
    root: Path | str, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict, keep: int = 3
) -> Path:
    """Write the checkpoint `root/step-{step:08d}`, then remove all complete checkpoints except the newest `keep`.

    A checkpoint whose `state` says `"kept": true` is never removed, nor counted.

    Args:
        root: folder of the run's checkpoints; made if missing.
        step: number in the folder's name. An earlier save of the same step is replaced.
        tensors: `tensors[part][name]`, of any device, dtype, shape and strides. Tensors may share memory; each name is
            stored as a contiguous copy.
        state: JSON data.
        keep: checkpoints to keep, this one included.

    Returns:
        The path of the checkpoint.

    Raises:
        CheckpointError: the disk refuses. Earlier checkpoints are then untouched, and nothing is left of the new one.
        UserError: the disk's handle stays stale.

    Warns if the new checkpoint is complete and an old one cannot be removed.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}, but the checkpoint being written must stay: pass 1 or more.")
    # A round trip through JSON: unsuitable data fails before anything is written, and the digest is what a reader gets.
    document = {"format": FORMAT, "step": step, "state": json.loads(json.dumps(state))}
    path = checkpoint_path(root, step)
    try:
        again_if_lost(lambda: _write(path, tensors, document), path)
    except OSError as error:
        raise _refused(path, error) from error
    replaced = _replaced(path)
    try:
        earlier = [
            other
            for other in list_checkpoints(root)
            if other not in (path, replaced) and not _document(other)["state"].get("kept")
        ]
        for other in [replaced, *earlier[: max(0, len(earlier) - keep + 1)]]:
            _discard(other)
    except (OSError, UserError) as error:  # the new one is whole: no reason to end a run
        warnings.warn(f"Earlier checkpoints could not be removed, and the next save tries again: {error}", stacklevel=2)
    return path


def _write(path: Path, tensors: Mapping[str, Mapping[str, Tensor]], document: dict) -> None:
    """Write the folder of a checkpoint. Raises OSError if a network disk was lost, else CheckpointError."""
    root, replaced = path.parent, _replaced(path)
    unfinished = root / f"{_UNFINISHED}{path.name}"
    document = document | {"files": {}}
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(f"{_UNFINISHED}*"):  # left by killed saves and removals
            shutil.rmtree(leftover, ignore_errors=True)
        unfinished.mkdir()
        for part, named in tensors.items():
            file = unfinished / f"{part}.safetensors"
            digest = write_safetensors(file, joined(named))
            document["files"][file.name] = {"sha256": digest, "bytes": file.stat().st_size}
        document["sha256"] = _digest(document)
        (unfinished / STATE).write_text(json.dumps(document, indent=1))
        flush(unfinished / STATE)
        flush(unfinished)
        if path.exists():  # keep the earlier save of this step readable until the new one has its name
            _discard(replaced)
            path.rename(replaced)
        unfinished.rename(path)
        flush(root)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if error.errno in LOST:
            raise
        raise _refused(path, error) from error
    except BaseException:  # Ctrl-C in the middle of a save
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _refused(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"Could not write checkpoint {path}: {error.strerror or error}; "
        "make room there or choose another run folder (earlier checkpoints are untouched)."
    )


def checkpoint_path(root: Path | str, step: int) -> Path:
    """The path of a step's checkpoint, whether it exists or not."""
    return Path(root) / f"step-{step:08d}"


def load_checkpoint(
    path_or_root: Path | str,
    parts: Sequence[str] | None = None,
    verify: bool = True,
) -> Checkpoint:
    """Read one checkpoint, or the newest complete one in a root, and verify its checksums.

    Tensors are memory-mapped copy-on-write: changing one never changes the file.

    Args:
        path_or_root: a checkpoint, or a folder of checkpoints.
        parts: the entries of `tensors` to load; default: all.
        verify: False checks only the files' sizes. Of many ranks that read the same files, only one needs to verify.

    Raises:
        CheckpointError: there is no checkpoint, it lacks a part, or its files differ from what was written.
    """
    path = Path(path_or_root)
    if not path.is_dir():
        raise CheckpointError(f"There is no folder {path}; pass a checkpoint, or a folder of checkpoints.")
    if not _FOLDER.fullmatch(path.name) and not (path / STATE).exists():
        newest = latest_checkpoint(path)
        if newest is None:
            if any(path.glob("**/*model_states.pt")):
                raise CheckpointError(
                    f"{path} holds DeepSpeed's own files, which fit one number of ranks and are not read here; "
                    "pass a folder with complete checkpoints such as step-00000100, which fit any."
                )
            raise CheckpointError(f"There is no checkpoint in {path}; expected complete folders such as step-00000100.")
        path = newest
    document = _document(path)
    files = {Path(name).stem: path / name for name in document["files"]}
    tensors = {}
    for part in files if parts is None else parts:
        if part not in files:
            raise CheckpointError(f"Checkpoint {path} has no part {part!r}; it holds {', '.join(files)}.")
        if verify and _sha256(files[part]) != document["files"][files[part].name]["sha256"]:
            raise _damaged(files[part], "differs from its checksum")
        with safe_open(files[part], framework="pt") as opened:
            tensors[part] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no dict)
    return Checkpoint(path, document["step"], tensors, document["state"])


def list_checkpoints(root: Path | str) -> list[Path]:
    """The complete checkpoints in `root`, lowest step first. A damaged one is skipped with a warning."""
    complete = []
    for path in again_if_lost(lambda: list(Path(root).glob("step-*")), Path(root)):
        if match := _FOLDER.fullmatch(path.name):
            try:
                _document(path)
                complete.append((int(match[1]), not match[2], path))
            except CheckpointError as error:
                warnings.warn(f"Skipped: {error}", stacklevel=2)
    return [path for *_, path in sorted(complete)]


def latest_checkpoint(root: Path | str) -> Path | None:
    """The complete checkpoint in `root` with the highest step, or None."""
    return next(reversed(list_checkpoints(root)), None)


def load_model_state(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    allow_missing: Sequence[str] = (),
) -> None:
    """Copy `tensors` into the model's parameters and buffers.

    Args:
        model: the model.
        tensors: by parameter name, as saved.
        allow_missing: beginnings of names that may be absent from `tensors`; those parameters keep their values.

    Raises:
        CheckpointError: names or shapes differ. Nothing is changed then; the message tells the first differences.
    """
    own, saved = _as_in_files(model.state_dict()), _as_in_files(tensors)
    both = [name for name in own if name in saved]
    found = {
        "missing from the checkpoint": [
            name for name in own if name not in saved and not name.startswith(tuple(allow_missing))
        ],
        "only in the checkpoint": [name for name in saved if name not in own],
        "of another shape": [
            f"{name} ({list(saved[name].shape)} saved, {list(own[name].shape)} here)"
            for name in both
            if saved[name].shape != own[name].shape
        ],
    }
    if any(found.values()):
        listed = (
            f"{len(names)} {what}: {', '.join(names[:4])}{', …' if len(names) > 4 else ''}"
            for what, names in found.items()
            if names
        )
        raise CheckpointError(
            f"The checkpoint is of another architecture ({'; '.join(listed)}); "
            "use the settings it was trained with, or start a new run folder."
        )
    model.load_state_dict(split(tensors, model), strict=False)


def joined(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert tensors from names in memory to names in files, joining the blocks' adaLN projections.

    Scalars of the blocks (the optimiser's step counts) are equal, and one is kept.
    """
    blocks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in named.items():
        match = _BLOCK.fullmatch(name)
        blocks.setdefault(f"{match[1]}.{match[3]}" if match else name, {})[int(match[2]) if match else 0] = tensor
    return {
        name: torch.cat([parts[i] for i in sorted(parts)]) if len(parts) > 1 and parts[0].ndim else parts[0]
        for name, parts in blocks.items()
    }


def split(named: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The inverse of `joined` for the blocks of `model`; parts are views. Tensors that do not fit stay unchanged."""
    blocks: dict[str, dict[str, int]] = {}  # name in files -> names in memory and their number of rows
    for name, parameter in model.named_parameters():
        if match := _BLOCK.fullmatch(name):
            blocks.setdefault(f"{match[1]}.{match[3]}", {})[name] = len(parameter)
    found: dict[str, Tensor] = {}
    for full_name, tensor in named.items():
        key, separator, name = full_name.rpartition("::")  # optimiser state has names such as exp_avg::…
        rows = blocks.get(name, {})
        if tensor.ndim == 0 and rows:
            found |= {f"{key}{separator}{block}": tensor for block in rows}
        elif rows and len(tensor) == sum(rows.values()):
            parts = tensor.split([*rows.values()])
            found |= {f"{key}{separator}{block}": part for block, part in zip(rows, parts, strict=True)}
        else:
            found[full_name] = tensor
    return found


def _as_in_files(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`joined` for names and shapes only: tensors on the meta device."""
    return joined({name: torch.empty_like(tensor, device="meta") for name, tensor in named.items()})


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state as `{"exp_avg::encoder.layers.0.mlp.fc1.weight": tensor, …}`, whatever its groups.

    apex keeps one step count per group; it is written once for each parameter, as torch's optimisers keep it.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    counts = {
        p: {"step": float(group["step"])}
        for group in optimizer.param_groups
        if "step" in group
        for p in group["params"]
    }
    return {
        f"{key}::{names[parameter]}": torch.as_tensor(value)
        for parameter, values in optimizer.state.items()
        for key, value in (counts.get(parameter, {}) | values).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Restore the state from `optimizer_tensors` bit for bit. Unlike `load_state_dict` this casts no moments.

    Raises CheckpointError if a tensor belongs to no parameter of the optimiser, or has another shape.
    """
    parameters = dict(model.named_parameters())
    groups: dict[Tensor, dict] = {p: group for group in optimizer.param_groups for p in group["params"]}
    state: dict[Tensor, dict[str, Tensor]] = {}
    for full_name, value in split(tensors, model).items():
        key, _, name = full_name.partition("::")
        parameter = parameters.get(name)
        if parameter is None or parameter not in groups or (value.ndim and value.shape != parameter.shape):
            raise CheckpointError(
                f"The optimiser state {full_name} {list(value.shape)} fits no parameter trained here; "
                "use the settings it was trained with, or start from its weights alone."
            )
        group = groups[parameter]
        if key == "step" and "step" in group:
            group["step"] = int(value)
            continue
        # AdamW expects its step count on the parameter's device if fused or capturable, else on the CPU.
        beside = value.ndim or group.get("fused") or group.get("capturable")
        state.setdefault(parameter, {})[key] = value.to(parameter.device if beside else "cpu", copy=True)
    optimizer.state.clear()
    optimizer.state.update(state)


def _document(path: Path) -> dict:
    """Read `state.json`. Raises CheckpointError if format, checksum or a file's size is wrong."""
    try:
        return again_if_lost(lambda: _read_document(path), path)
    except OSError as error:
        raise _damaged(path / STATE, f"cannot be read ({error.strerror or error})") from error


def _sha256(file: Path) -> str:
    try:
        return sha256(file)
    except OSError as error:
        raise _damaged(file, f"cannot be read ({error.strerror or error})") from error


def _read_document(path: Path) -> dict:
    try:
        document = json.loads((path / STATE).read_text("utf-8"))
        version = document["format"]
    except FileNotFoundError:
        raise _damaged(path, f"has no {STATE}") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, OSError) and error.errno in LOST:
            raise
        raise _damaged(path / STATE, f"is not what was written ({error})") from None
    if version != FORMAT:
        raise CheckpointError(
            f"Checkpoint {path} has format {version!r}, and this version of umd reads format {FORMAT}; "
            "use the version that wrote it."
        )
    if document.get("sha256") != _digest(document):
        raise _damaged(path / STATE, "differs from its checksum")
    for name, expected in document["files"].items():
        if not (path / name).is_file():
            raise _damaged(path, f"lacks its file {name}")
        size = (path / name).stat().st_size
        if size != expected["bytes"]:
            raise _damaged(path / name, f"has {size} bytes where {expected['bytes']} were written")
    return document


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: it {what}; remove that checkpoint, or pass an earlier one.")


def _replaced(path: Path) -> Path:
    """The name that an earlier save of the same step gets while it is replaced."""
    return path.with_name(f"{path.name}.replaced")


def _discard(path: Path) -> None:
    """Remove a checkpoint if it exists. It is renamed first, so that no reader sees half of it.

    Files that NFS keeps for a process that still reads them are removed by the next save.
    """
    if path.exists():
        hidden = path.with_name(f"{_UNFINISHED}removed-{path.name}")
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _digest(document: dict) -> str:
    """sha256 of the document without its own entry `sha256`."""
    content = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
