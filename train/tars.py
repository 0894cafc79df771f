"""WebDataset tars: where each picture lies in its tar, so that any of them can be read in any order.

A sample is a run of members with one key, the name up to its first dot: `000.jpg`, and `000.cls` with its class number.
The index that DALI's `wds2idx` writes (`x.idx` beside `x.tar`) is used where it is; without, the tar is walked through.
"""

import os
import tarfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from umd.errors import UserError
from umd.train.quarantine import Quarantine
from umd.train.sources import ImageDataset, choose_split, is_image


class TarMember(NamedTuple):
    """One file inside a tar."""

    tar: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar}/{self.name}"

    def read(self) -> bytes:
        file = os.open(self.tar, os.O_RDONLY)
        try:
            return os.pread(file, self.size, self.offset)
        finally:
            os.close(file)


def is_tars(source: Path) -> bool:
    """Whether a source is a tar, or a folder of tars, alone or in train/ beside test/ or val/."""
    return source.suffix == ".tar" or bool(tars_in(source) or tars_in(source / "train"))


def tars_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar")) if folder.is_dir() else []


def split_tars(source: Path) -> dict[str, list[Path]]:
    """Tars by split, `train` and `test` (or `val`); all under "" where the source has no splits of its own."""
    if source.suffix == ".tar":
        return {"": [source]}
    if tars_in(source):
        return {"": tars_in(source)}
    tests = next((found for name in ("test", "val") if (found := tars_in(source / name))), [])
    if not tests:
        raise UserError(
            f"{source} has tars in train/ without a counterpart: expected some in test/ or val/; "
            f"to have the tars split, give {source / 'train'} itself."
        )
    return {"train": tars_in(source / "train"), "test": tests}


def members(tar: Path) -> list[TarMember]:
    """Every file of a tar in its order. Raises UserError if the tar, or its index, is damaged."""
    index = tar.with_suffix(".idx")
    try:
        entries = read_index(index) if index.exists() else None
        if entries is None:
            with tarfile.open(tar, "r:") as archive:
                entries = [(m.name, m.offset_data, m.size) for m in archive if m.isfile()]
        end, size = max((offset + length for _, offset, length in entries), default=0), tar.stat().st_size
    except (OSError, tarfile.TarError, ValueError) as error:
        raise UserError(f"cannot read {tar} ({error}): write or download it again.") from error
    if end > size:
        other = f", or {index} is of another tar" if index.exists() else ""
        raise UserError(f"{tar} has {size} bytes where its members need {end}: it is cut off{other}.")
    return [TarMember(str(tar), name, offset, length) for name, offset, length in entries]


def read_index(index: Path) -> list[tuple[str, int, int]] | None:
    """(name, offset, size) of each member from a v1.2 index; None if it gives no names, as older ones."""
    head, *lines = index.read_text().splitlines()
    fields = [line.split(" ") for line in lines]
    if head.split()[:1] != ["v1.2"] or any(len(line) % 4 for line in fields):  # a space in a name
        return None
    return [(line[i + 3], int(line[i + 1]), int(line[i + 2])) for line in fields for i in range(0, len(line), 4)]


class TarSamples(NamedTuple):
    pictures: list[TarMember]
    keys: list[str]  # in the source: tar/name of the picture
    labels: np.ndarray | None  # int64 [N]


@lru_cache(maxsize=2)  # opening a split reads both
def samples(tars: tuple[Path, ...]) -> TarSamples:
    """Pictures of some tars, with their classes where every one has one."""
    pictures: list[TarMember] = []
    labels: list[int] = []
    for tar in tars:
        classes: dict[str, TarMember] = {}
        found: list[tuple[str, TarMember]] = []
        for member in members(tar):
            key, _, extension = os.path.basename(member.name).partition(".")
            key = f"{os.path.dirname(member.name)}/{key}"
            if extension == "cls":
                classes[key] = member
            elif is_image(os.path.basename(member.name)) and not (found and found[-1][0] == key):
                found.append((key, member))  # a sample's second picture, a mask or a depth, is not read
        pictures += [member for _, member in found]
        labels += [read_class(classes[key]) for key, _ in found if key in classes]
    if not pictures:
        raise UserError(f"{tars[0]} has no images: expected a WebDataset tar with .jpg and .cls members.")
    if labels and len(labels) != len(pictures):
        raise UserError(f"{len(labels)} of the {len(pictures)} samples of {tars[0].parent} have a .cls: give all one.")
    keys = [f"{os.path.basename(member.tar)}/{member.name}" for member in pictures]
    return TarSamples(pictures, keys, np.array(labels, dtype=np.int64) if labels else None)


def read_class(member: TarMember) -> int:
    try:
        label = int(member.read())
    except ValueError:
        label = -1
    if label < 0:
        raise UserError(f"{member} holds no class: expected a number from 0.")
    return label


def open_tars(source: Path, split: str, holdout: float, skip_broken: bool, quarantine: Quarantine) -> ImageDataset:
    """The pictures of one split of a tar or a folder of tars. Raises UserError as `open_folder` does."""
    splits = split_tars(source)
    pictures, keys, labels = samples(tuple(splits.get(split) or splits[""]))
    every = [samples(tuple(tars)).labels for tars in splits.values()]
    if len({labels is None for labels in every}) > 1:
        raise UserError(f"one split of {source} has .cls members and the other has none: give both.")
    num_classes = max((int(labels.max()) + 1 for labels in every if labels is not None), default=0)
    folder = "" if "" in splits else splits[split][0].parent.name
    rows = np.arange(len(keys)) if folder else choose_split(keys, split, holdout, str(source))
    reasons = quarantine.under(folder)
    good = [row for row in rows.tolist() if keys[row] not in reasons]
    if len(rows) and not good:
        raise UserError(f"all {len(rows)} images of {source} are in quarantine ({quarantine.path}): replace them.")
    return ImageDataset(
        name=source.resolve().name,
        split=split,
        pictures=[pictures[row] for row in good],
        labels=None if labels is None else labels[good],
        class_names=[str(label) for label in range(num_classes)],
        skip_broken=skip_broken,
        quarantined={keys[row]: reasons[keys[row]] for row in rows.tolist() if keys[row] in reasons},
    )
