"""The common format of stored latents and stored pictures: shards with checksums, and the folder's header.

A shard is a safetensors file with large rows (`moments` or `pixels`) and small int64 tensors: `indices`, `labels`,
`sizes`, and `crc32` with the CRC-32 of each row. Its own header says how it was made.

- One more CRC-32, of the shard's header and small tensors, stands in the shard and in the folder's header. It is
  compared when a shard is opened, so damage there, or a shard from another folder, is noticed.
- A row is compared with its CRC-32 when it is read.
"""

import json
import math
import os
import re
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save
from torch import Tensor

from umd.errors import TemporaryError, UserError
from umd.files import LOST, check_apart, check_place, write_whole
from umd.train.index import Names
from umd.train.run import differences

SHARD = re.compile(r"(pixels-)?(train|test)-(\d{5})-of-(\d{5})\.safetensors")
ROWS = {"latents": "moments", "pixels": "pixels"}  # the large tensor of each kind
BYTES = {"I64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1}  # bytes per element of the dtypes in shards
ABOUT: dict[str, Any] = {  # see `amiss`
    "latents": {
        "format": int, "recipe": {"shape": [int]}, "names": [str], "left_out": [str], "values": int,
        "sum": [float | int], "sum_of_squares": [float | int], "crc32": int,
    },
    "pixels": {"format": int, "recipe": {"size": [int]}, "left_out": int, "crc32": int},
}  # fmt: skip


def kind_of(path: Path | str) -> str:
    """What a shard holds, by its name: `latents` or `pixels`."""
    return "pixels" if Path(path).name.startswith("pixels-") else "latents"


def is_store(folder: Path, kind: str) -> bool:
    """Whether a folder is a store of this kind (`latents` or `pixels`), complete or unfinished."""
    return folder.is_dir() and ((folder / f"{kind}.json").exists() or bool(shards_in(folder, kind)))


def shards_in(folder: Path, kind: str) -> list[Path]:
    names = sorted(name for name in os.listdir(folder) if SHARD.fullmatch(name) and kind_of(name) == kind)
    return [folder / name for name in names]


def damaged(path: Path | str, what: str, command: str = "") -> UserError:
    return UserError(f"{kind_of(path)} shard {path} {what}; remove it and run {command or same_command(path)}")


def unreadable(path: Path | str, error: OSError, command: str = "") -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{kind_of(path)} shard {path} is not there; run {command or same_command(path)}")
    kind = TemporaryError if error.errno in LOST else UserError
    return kind(
        f"cannot read {kind_of(path)} shard {path} ({error.strerror or error}); see to the disk that it lies on, then "
        "run the same command again"
    )


def same_command(path: Path | str) -> str:
    return f"the same umd encode-{kind_of(path)} command again"


# Shards


@dataclass(frozen=True)
class Shard:
    """The header of a shard: positions of its tensors, and how it was made."""

    path: Path
    about: dict
    tensors: dict[str, tuple[tuple[int, ...], int]]  # name -> (shape, position of the first byte)

    @property
    def images(self) -> int:
        return self.tensors["indices"][0][0]

    def array(self, name: str) -> np.ndarray:
        """Read a small tensor: int64."""
        shape, start = self.tensors[name]
        try:
            return np.fromfile(self.path, "<i8", math.prod(shape), offset=start).reshape(shape)
        except (OSError, ValueError) as error:  # ValueError: the file has become shorter
            raise unreadable(self.path, error) if isinstance(error, OSError) else changed(self.path) from error

    def sum(self) -> int:
        """CRC-32 of everything but the rows, computed from the file as it is now."""
        return small_sum(self.about, {name: self.array(name) for name in self.tensors if name not in ROWS.values()})


def small_sum(about: Mapping, small: Mapping[str, np.ndarray]) -> int:
    """CRC-32 of a shard's header and its small tensors."""
    found = zlib.crc32(json.dumps({**about, "crc32": None}, sort_keys=True).encode())
    for name in sorted(small):
        found = zlib.crc32(np.ascontiguousarray(small[name], "<i8").data, found)
    return found


def shard_file(tensors: Mapping[str, Tensor], about: dict[str, Any]) -> bytes:
    """Serialise a shard. The bytes depend only on the arguments, so any rank writes the same file."""
    small = {name: tensor.numpy() for name, tensor in tensors.items() if name not in ROWS.values()}
    about = about | {"crc32": small_sum(about, small)}
    # One metadata entry, as safetensors would write several in random order.
    return save(dict(tensors), {"umd": json.dumps(about, sort_keys=True)})


def changed(path: Path) -> UserError:
    return damaged(path, "is not what was written")


def read_shard(path: Path, command: str = "") -> Shard:
    """Read the header of a shard. Raises UserError if the file is not a complete shard."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        about = json.loads(header.pop("__metadata__")["umd"])
        end = 8 + length + max(t["data_offsets"][1] for t in header.values())
        check_layout(kind_of(path), header, about)
    except OSError as error:
        raise unreadable(path, error, command) from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, MemoryError, OverflowError) as error:
        raise damaged(path, "is not what was written", command) from error
    if size != end:
        raise damaged(path, f"has {size} bytes where {end} were written", command)
    return Shard(
        path, about, {name: (tuple(t["shape"]), 8 + length + t["data_offsets"][0]) for name, t in header.items()}
    )


def check_layout(kind: str, header: dict, about: dict) -> None:
    """Raise any exception if the tensors are not those of a shard, stored one after the other."""
    if found := amiss(about, ABOUT[kind]):
        raise ValueError(found)
    end = 0
    for tensor in sorted(header.values(), key=lambda t: t["data_offsets"]):
        start, stop = tensor["data_offsets"]
        if start != end or stop - start != math.prod(tensor["shape"]) * BYTES[tensor["dtype"]]:
            raise ValueError("a tensor lies elsewhere")
        end = stop
    shapes = {name: list(tensor["shape"]) for name, tensor in header.items()}
    if any(tensor["dtype"] != "I64" for name, tensor in header.items() if name != ROWS[kind]):
        raise ValueError("a small tensor is of another type")
    n, rows = shapes["indices"][0], shapes.pop(ROWS[kind])
    expected = {"indices": [n], "labels": [n]}
    if kind == "pixels":
        expected |= {"crc32": [n], "sizes": [n, 2]}
        fits = rows == [n, *about["recipe"]["size"], 3]
    else:
        expected |= {"crc32": rows[:2]}
        fits = rows[1] == n == len(about["names"]) and len(rows) == 6 and rows[3:] == about["recipe"]["shape"]
    if "labels" not in shapes:
        del expected["labels"]
    if not fits or shapes != expected:
        raise ValueError("a tensor has another shape")


def open_shards(folder: Path, entries: Sequence[Mapping], recipe: dict, command: str = "") -> list[Shard]:
    """Open the shards that a header lists, and compare everything but their rows with their checksums.

    entries: one per shard: its header entry, or only its `file` while the folder has no header.
    Raises UserError, naming the shard, if one is missing, damaged, made with another recipe, or under a wrong name.
    """
    shards, last = [], -1
    for entry in entries:
        shard = read_shard(folder / entry["file"], command)
        path, size, found = shard.path, shard.path.stat().st_size, shard.sum()
        if shard.about["crc32"] != found:
            raise damaged(path, "differs from its checksum", command)
        if differ := [name for name, *_ in differences(shard.about["recipe"], recipe)]:
            raise damaged(path, f"is of another folder, made with another {', '.join(differ)}", command)
        if (shard.images, found) != (entry.get("images", shard.images), entry.get("crc32", found)):
            raise damaged(path, "is of another folder, or changed", command)
        if size != entry.get("bytes", size):
            raise damaged(path, f"has {size} bytes where {entry['bytes']} were written", command)
        indices = shard.array("indices")
        if (np.diff(indices, prepend=last) <= 0).any():
            raise damaged(path, "is in the place of another", command)
        if recipe.get("class_names") and "labels" not in shard.tensors:
            raise damaged(path, "has no labels", command)
        last = int(indices[-1]) if len(indices) else last
        # Thousands of shards share one recipe, with its class names, and hold their names in one array each.
        about = shard.about | {"recipe": recipe}
        about |= {"names": Names.of(about["names"])} if "names" in about else {}
        shards.append(replace(shard, about=about))
    return shards


def check_rows(shard: Shard, command: str = "") -> None:
    """Compare every row of a shard with its CRC-32. As fast as the disk reads."""
    sums = shard.array("crc32")
    _, start = shard.tensors[ROWS[kind_of(shard.path)]]
    starts = [first for _, first in shard.tensors.values() if first > start]
    nbytes = (min(starts, default=shard.path.stat().st_size) - start) // max(1, sums.size)
    try:
        with shard.path.open("rb") as file:
            file.seek(start)
            for row, expected in enumerate(sums.flat):
                if zlib.crc32(file.read(nbytes)) != expected:
                    raise damaged(shard.path, f"differs from its checksums in row {row}", command)
    except OSError as error:
        raise unreadable(shard.path, error, command) from error


# The folder


def check_folder(folder: Path, kind: str, about: dict[str, Any], names: Collection[str]) -> None:
    """Make the folder for new shards.

    about: `format` and `recipe` of the shards to write. names: their file names.
    Raises UserError if the folder cannot be made, or holds damaged shards, or shards of another kind or recipe.
    """
    source = about["recipe"].get("source", {}).get("path", "")
    if source and Path(source).exists():
        check_apart(folder, source)
    check_place(folder / "shard")
    other = next(each for each in ROWS if each != kind)
    if is_store(folder, other):
        raise UserError(f"{folder} holds {'latents' if other == 'latents' else 'stored pictures'}; give another --out")
    for path in shards_in(folder, kind):
        before = read_shard(path).about
        was, will = ({"format": found["format"], **found["recipe"]} for found in (before, about))
        differ = sorted(name for name, *_ in differences(was, will))
        if path.name not in names:
            differ = differ or ["number of shards"]
        if differ:
            raise UserError(
                f"{folder} holds {'latents' if kind == 'latents' else 'shards'} made with another {', '.join(differ)}; "
                "give the settings they were made with, or another --out"
            )


def finished(folder: Path, names: Sequence[str], recipe: dict) -> tuple[list[Shard], list[dict[str, Any]]]:
    """Compare all shards of a split byte for byte. Returns the shards, and the header's entry for each."""
    shards = open_shards(folder, [{"file": name} for name in names], recipe)
    for shard in shards:
        check_rows(shard)
    return shards, [{"file": s.path.name, "images": s.images, "crc32": s.about["crc32"]} for s in shards]


def write_header(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    """Write the header of a folder whose shards are complete. Returns it. Removes leftovers of killed processes."""
    for leftover in path.parent.glob(".unfinished-*.safetensors-*"):  # all shards exist, so no rank is writing one
        leftover.unlink(missing_ok=True)
    header = header | {"crc32": header_sum(header)}
    write_whole(path, json.dumps(header, indent=1).encode())
    return header


def header_sum(header: Mapping) -> int:
    return zlib.crc32(json.dumps({**header, "crc32": None}, sort_keys=True).encode())


def read_header(path: Path, pattern: dict[str, Any], expected: int) -> dict[str, Any]:
    """Read a folder's header. Raises UserError if it is missing, damaged (see `amiss`), or of another format."""
    kind, what = path.stem, "latents" if path.stem == "latents" else "pictures"
    again = f"run the same umd encode-{kind} command again"
    try:
        header = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"the {what} in {path.parent} are not finished: {again}") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error}); see to the disk that it lies on") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged (it is no JSON); remove it and {again}") from error
    found = amiss(header, {"format": int})
    if not found and header.get("crc32", header_sum(header)) != header_sum(header):  # another format may lack it
        found = "it differs from its checksum"
    if not found and header["format"] != expected:
        raise UserError(f"{path.parent} has format {header['format']}, and this version of umd reads format {expected}")
    if found := found or amiss(header, pattern | {"crc32": int}):
        raise UserError(f"{path} is damaged ({found}); remove it and {again}")
    return header


def amiss(value: object, pattern: Any, name: str = "") -> str:
    """Say what is wrong with a value from JSON. "" if nothing.

    pattern: a type; or a list with one pattern for all items; or a dict of patterns. Keys ending in ? are optional.
    """
    if isinstance(pattern, list):
        if not isinstance(value, list):
            return f"{name} is no list"
        (each,) = pattern
        nested = isinstance(each, dict | list)
        items = (item for item in value if nested or not isinstance(item, each))  # fast for long lists
        return next((found for item in items if (found := amiss(item, each, f"an item of {name}"))), "")
    if not isinstance(pattern, dict):
        return "" if isinstance(value, pattern) else f"{name} is {value!r}"
    if not isinstance(value, dict):
        return f"{name or 'it'} is no table"
    for key, expected in pattern.items():
        inner = f"{name}.{key}".strip(".?")
        if key.strip("?") not in value:
            if not key.endswith("?"):
                return f"{inner} is missing"
        elif found := amiss(value[key.strip("?")], expected, inner):
            return found
    return ""
