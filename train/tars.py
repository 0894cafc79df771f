"""WebDataset tars: where each picture lies in its tar, so that any of them can be read in any order.

A sample is a run of members with one key, the name up to its first dot: `000.jpg`, and `000.cls` with its class number.
The index that DALI's `wds2idx` writes (`x.idx` beside `x.tar`) is used where it is; without, the tar is walked through.
"""

import os
import tarfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from umd.errors import UserError
from umd.train.index import Arrays, Names, kept
from umd.train.quarantine import Quarantine
from umd.train.sources import ImageDataset, choose_split, is_image, opened


class TarMember(NamedTuple):
    """One file inside a tar."""

    tar: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar}/{self.name}"

    def read(self) -> bytes:
        """Raises OSError if the tar is gone, or shorter than it was."""
        data = bytearray(self.size)
        if not opened(self.tar).read_into(memoryview(data), self.offset):
            raise OSError("the tar ends before: it has shrunk since it was listed")
        return bytes(data)


class Members(Sequence[TarMember]):
    """Files in some tars, as a few arrays: see `Names`."""

    def __init__(self, tars: Sequence[str], names: Names, tar: np.ndarray, offsets: np.ndarray, sizes: np.ndarray):
        self.tars, self.names, self.tar, self.offsets, self.sizes = tars, names, tar, offsets, sizes

    def __len__(self) -> int:
        return len(self.tar)

    def __getitem__(self, index):  # slices are not needed
        where = int(self.tar[index]), int(self.offsets[index]), int(self.sizes[index])
        return TarMember(self.tars[where[0]], self.names[index], *where[1:])

    def take(self, rows: np.ndarray) -> "Members":
        return Members(self.tars, self.names.take(rows), self.tar[rows], self.offsets[rows], self.sizes[rows])

    def keys(self) -> Iterator[str]:
        """tar/name of each."""
        bases = [os.path.basename(tar) for tar in self.tars]
        return (f"{bases[tar]}/{name}" for tar, name in zip(self.tar.tolist(), self.names, strict=True))


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
    pictures: Members
    labels: np.ndarray | None  # int64 [N]


@lru_cache(maxsize=2)  # opening a split reads both
def samples(tars: tuple[Path, ...]) -> TarSamples:
    """Pictures of some tars, with their classes where every one has one; listed, or as they were listed before."""
    arrays = kept(f"tars {[str(tar) for tar in tars]}", tars[0].parent, lambda: walk(tars))
    names = Names(arrays["names"], arrays["ends"])
    pictures = Members([str(tar) for tar in tars], names, arrays["tar"], arrays["offsets"], arrays["sizes"])
    return TarSamples(pictures, np.array(arrays["labels"]) if len(arrays["labels"]) else None)


def walk(tars: Sequence[Path]) -> tuple[Arrays, list[Path], int]:
    """Names, places and classes (none, if they have none) of the pictures in some tars; the tars and their indices."""
    names: list[str] = []
    places: list[tuple[int, int, int]] = []
    labels: list[int] = []
    for number, tar in enumerate(tars):
        classes: dict[str, TarMember] = {}
        found: list[tuple[str, TarMember]] = []
        for member in members(tar):
            key, _, extension = os.path.basename(member.name).partition(".")
            key = f"{os.path.dirname(member.name)}/{key}"
            if extension == "cls":
                classes[key] = member
            elif is_image(os.path.basename(member.name)) and not (found and found[-1][0] == key):
                found.append((key, member))  # a sample's second picture, a mask or a depth, is not read
        names += [member.name for _, member in found]
        places += [(number, member.offset, member.size) for _, member in found]
        labels += [read_class(classes[key]) for key, _ in found if key in classes]
    if not names:
        raise UserError(f"{tars[0]} has no images: expected a WebDataset tar with .jpg and .cls members.")
    if labels and len(labels) != len(names):
        raise UserError(f"{len(labels)} of the {len(names)} samples of {tars[0].parent} have a .cls: give all one.")
    listed, (tar, offsets, sizes) = Names.of(names), np.array(places, dtype=np.int64).T
    arrays = {"names": listed.data, "ends": listed.ends, "tar": tar, "offsets": offsets, "sizes": sizes}
    indices = [index for tar in tars if (index := tar.with_suffix(".idx")).exists()]
    return arrays | {"labels": np.array(labels, dtype=np.int64)}, [*tars, *indices], len(names)


def read_class(member: TarMember) -> int:
    try:
        label = int(member.read())
    except (ValueError, OSError):
        label = -1
    if label < 0:
        raise UserError(f"{member} holds no class: expected a number from 0.")
    return label


def open_tars(source: Path, split: str, holdout: float, skip_broken: bool, quarantine: Quarantine) -> ImageDataset:
    """The pictures of one split of a tar or a folder of tars. Raises UserError as `open_folder` does."""
    splits = split_tars(source)
    pictures, labels = samples(tuple(splits.get(split) or splits[""]))
    every = [samples(tuple(tars)).labels for tars in splits.values()]
    if len({labels is None for labels in every}) > 1:
        raise UserError(f"one split of {source} has .cls members and the other has none: give both.")
    num_classes = max((int(labels.max()) + 1 for labels in every if labels is not None), default=0)
    folder = "" if "" in splits else splits[split][0].parent.name
    rows = np.arange(len(pictures)) if folder else choose_split(pictures.keys(), split, holdout, str(source))
    reasons = quarantine.under(folder)
    quarantined = {}
    if reasons:
        keys = list(pictures.keys())
        quarantined = {keys[row]: reasons[keys[row]] for row in rows.tolist() if keys[row] in reasons}
        good = np.array([row for row in rows.tolist() if keys[row] not in reasons], dtype=np.int64)
        if len(rows) and not len(good):
            raise UserError(f"all {len(rows)} images of {source} are in quarantine ({quarantine.path}): replace them.")
        rows = good
    return ImageDataset(
        name=source.resolve().name,
        split=split,
        pictures=pictures.take(rows),
        labels=None if labels is None else labels[rows],
        class_names=[str(label) for label in range(num_classes)],
        skip_broken=skip_broken,
        quarantined=quarantined,
    )
