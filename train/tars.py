"""WebDataset tars, indexed by the position of each picture, so that pictures can be read in any order.

- A sample is a sequence of members with the same key, the name up to its first dot: `000.jpg`, and `000.cls` with its
  class number. The same key later in the tar is another sample, as shards may be appended to each other.
- Hidden members are ignored.
- If DALI's `wds2idx` has written an index (`x.idx` next to `x.tar`), it is used. Otherwise the whole tar is scanned.
"""

import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from umd.errors import UserError
from umd.files import again_if_lost
from umd.train.index import Arrays, Names, kept, stamp, sums_of
from umd.train.listing import is_hidden, is_image, listing, named, no_pictures, suffix_of, unread
from umd.train.quarantine import Quarantine
from umd.train.sources import MAX_CLASSES, ImageDataset, opened
from umd.train.splits import choose_split, hashes_of


class Changed(UserError):
    """A source changed while it is read."""


class TarMember(NamedTuple):
    """One file inside a tar."""

    tar: str
    name: str
    offset: int
    size: int
    stamp: tuple[int, int]  # size and time of change (ns) of the tar when it was listed

    def __str__(self) -> str:
        return f"{self.tar}/{self.name}"

    def read(self) -> bytes:
        """Read the bytes. Raises Changed if the tar is not as it was when it was listed, OSError if the disk fails."""
        data = bytearray(self.size)
        try:
            file = opened(self.tar, self.stamp)
            whole = file.read_into(memoryview(data), self.offset)
            status = os.fstat(file.descriptor)  # after reading: what was read before a change is right
        except FileNotFoundError as error:
            raise Changed(f"{self.tar} is gone since it was listed; give the command again") from error
        except OSError:
            opened.cache_clear()  # a stale handle stays stale: the next attempt opens the tar anew
            raise
        if not whole or (status.st_size, status.st_mtime_ns) != self.stamp:
            how = "was replaced or changed" if whole else "has shrunk"
            raise Changed(f"{self.tar} {how} since it was listed, seen at {self.name}; give the command again")
        return bytes(data)


class Members(Sequence[TarMember]):
    """Files in several tars, stored compactly in a few arrays (see `Names`)."""

    def __init__(
        self, tars: Sequence[tuple[str, tuple[int, int]]], names: Names, tar: np.ndarray, offsets: np.ndarray,
        sizes: np.ndarray, hashes: np.ndarray, sums: np.ndarray,
    ):  # fmt: skip
        """tars: path and stamp of each. The rest, int64 [N], is of each file: hashes and sums are of its key."""
        self.tars, self.names, self.tar, self.offsets, self.sizes = tars, names, tar, offsets, sizes
        self.hashes, self.sums = hashes, sums

    def __len__(self) -> int:
        return len(self.tar)

    def __getitem__(self, index):  # slices are not needed
        tar, stamp = self.tars[int(self.tar[index])]
        return TarMember(tar, self.names[index], int(self.offsets[index]), int(self.sizes[index]), stamp)

    def take(self, rows: np.ndarray) -> "Members":
        arrays = (self.tar, self.offsets, self.sizes, self.hashes, self.sums)
        return Members(self.tars, self.names.take(rows), *(array[rows] for array in arrays))

    def keys(self) -> list[str]:
        """tar/name of each file."""
        return keys_of([tar for tar, _ in self.tars], self.tar, self.names)

    def key(self, index: int) -> str:
        return f"{os.path.basename(self.tars[int(self.tar[index])][0])}/{self.names[index]}"


def keys_of(tars: Sequence[str | Path], tar: np.ndarray, names: Iterable[str]) -> list[str]:
    bases = [os.path.basename(path) for path in tars]
    return [f"{bases[number]}/{name}" for number, name in zip(tar.tolist(), names, strict=True)]


def is_tars(source: Path) -> bool:
    """Whether a source is a tar, or a folder of tars, directly or in train/ and test/ (or val/)."""
    return source.suffix == ".tar" or bool(tars_in(source) or tars_in(source / "train"))


def tars_in(folder: Path) -> list[Path]:
    found = folder.glob("*.tar") if folder.is_dir() else ()
    return sorted(path for path in found if not is_hidden(path.name))


def beside(source: Path) -> list[str]:
    """Notes on class folders and pictures that lie beside tars, and are not read."""
    if not source.is_dir():
        return []
    own = () if tars_in(source) else ("train", "test", "val")
    roots = [source] if not own else [source, *(source / name for name in own if tars_in(source / name))]
    notes = []
    for root in roots:
        folders, images = listing(root)
        others = [f"{name}/" for name in folders if root != source or name not in own]
        others += [f"{len(images):,} images"] if images else []
        notes += [f"not read, beside the tars in {root}: {named(others)}"] if others else []
    return notes


def split_tars(source: Path) -> dict[str, list[Path]]:
    """Tars by split, `train` and `test` (or `val`). All under "" if the source has no splits of its own."""
    if source.suffix == ".tar":
        return {"": [source]}
    if tars_in(source):
        return {"": tars_in(source)}
    tests = next((found for name in ("val", "test") if (found := tars_in(source / name))), [])
    if not tests:
        raise UserError(
            f"{source} has tars in train/ without a counterpart: expected some in val/ or test/; "
            f"to have the tars split, give {source / 'train'} itself."
        )
    return {"train": tars_in(source / "train"), "test": tests}


def members(tar: Path) -> list[TarMember]:
    """List every file of a tar, in order. Raises UserError if the tar or its index is damaged."""
    index = tar.with_suffix(".idx")
    try:
        status = again_if_lost(tar.stat, tar)
        entries = again_if_lost(lambda: read_index(index) if index.exists() else None, index)
        entries = again_if_lost(lambda: list(walked(tar)), tar) if entries is None else entries
    except (OSError, tarfile.TarError, ValueError) as error:
        raise UserError(f"cannot read {tar} ({error}): write or download it again.") from error
    if (end := max((offset + length for _, offset, length in entries), default=0)) > status.st_size:
        other = f", or {index} is of another tar" if index.exists() else ""
        raise UserError(f"{tar} has {status.st_size} bytes where its members need {end}: it is cut off{other}.")
    return [TarMember(str(tar), *entry, (status.st_size, status.st_mtime_ns)) for entry in entries]


def walked(tar: Path) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size) of each member, from the headers of a tar or of several concatenated ones (`cat`)."""
    places: dict[str, tuple[int, int]] = {}
    with tar.open("rb") as file:
        start: int | None = 0
        while start is not None:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    name, place = member.name, (member.offset_data, member.size)
                    if member.islnk() and member.linkname in places:  # how tar stores a file's second name
                        place = places[member.linkname]
                    elif part_of_sample(name) and (member.issparse() or not (member.isfile() or member.isdir())):
                        kind = "a link or a device: write the tar with the files themselves (`tar -ch`)."
                        kind = "sparse: write the tar without --sparse." if member.issparse() else kind
                        raise UserError(f"{tar}/{name} is {kind}")
                    elif not member.isfile():
                        continue
                    places[name] = place
                    yield name, *place
                end = archive.offset  # tarfile stops here silently, even at damage
            start = after_end(file, end)


def after_end(file: BinaryIO, end: int) -> int | None:
    """Position where another tar begins after the empty blocks at `end`. None if the file ends.

    Raises ValueError if there are no empty blocks at `end`: the tar is damaged or cut off there.
    """
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        whole = "" if block else "; if it is whole, `head -c 1024 /dev/zero >> TAR` adds them"
        raise ValueError(f"it ends at byte {end} without the empty blocks that end a tar: it is cut off{whole}")
    if any(block):
        raise ValueError(f"the header at byte {end} is damaged")
    while data := file.read(1 << 20):
        if rest := data.lstrip(b"\0"):
            return (file.tell() - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
    return None


def part_of_sample(name: str) -> bool:
    """Whether a member is a picture or a class file."""
    base = os.path.basename(name)
    return is_image(base) or (base.partition(".")[2] == "cls" and not base.startswith("."))


def read_index(index: Path) -> list[tuple[str, int, int]] | None:
    """Read (name, offset, size) of each member from a v1.2 index. None if it has no names, as older versions."""
    head, *lines = index.read_text("utf-8").splitlines()
    fields = [line.split(" ") for line in lines]
    if head.split()[:1] != ["v1.2"] or any(len(line) % 4 for line in fields):  # a space in a name
        return None
    return [(line[i + 3], int(line[i + 1]), int(line[i + 2])) for line in fields for i in range(0, len(line), 4)]


class TarSamples(NamedTuple):
    pictures: Members
    labels: np.ndarray | None  # int64 [N]
    notes: list[str]  # messages about what is not read


def samples(tars: tuple[Path, ...]) -> TarSamples:
    """List the pictures of some tars, or take the list kept from before. Labels only if every picture has a class."""
    return listed(tars, tuple(str(stamp(path)) for tar in tars for path in (tar, tar.with_suffix(".idx"))))


@lru_cache(maxsize=2)  # opening a split reads both
def listed(tars: tuple[Path, ...], _stamps: tuple[str, ...]) -> TarSamples:
    arrays = kept(f"tars, hashes {[str(tar) for tar in tars]}", tars[0].parent, lambda: walk(tars))
    names = Names(arrays["names"], arrays["ends"])
    stamps = map(tuple, arrays["stamps"].tolist())
    stamped = list(zip(map(str, tars), stamps, strict=True))
    columns = [arrays[name] for name in ("tar", "offsets", "sizes", "hashes", "sums")]
    pictures = Members(stamped, names, *columns)
    notes = list(Names(arrays["notes"], arrays["note_ends"]))
    return TarSamples(pictures, np.array(arrays["labels"]) if len(arrays["labels"]) else None, notes)


def walk(tars: Sequence[Path]) -> tuple[Arrays, list[Path], int]:
    """List tars. Returns arrays, the tars and their index files, and the number of pictures.

    The arrays hold names, positions and classes of the pictures (no classes if they have none), the tars' stamps, and
    notes on samples without a picture.
    """
    names: list[str] = []
    places: list[tuple[int, int, int]] = []
    labels: list[int] = []
    stamps: list[tuple[int, int]] = []
    others: Counter[str] = Counter()
    further = 0  # pictures of a sample behind its first
    for number, tar in enumerate(tars):
        alone: TarMember | None = None  # a class file without a picture
        before = len(names) - len(labels)
        every = members(tar)
        for _, sample in groupby((member for member in every if not in_hidden(member)), sample_key):
            whole = list(sample)
            parts = [member for member in whole if part_of_sample(member.name)]
            pictures = [member for member in parts if is_image(os.path.basename(member.name))]
            classes = [member for member in parts if member not in pictures]
            if pictures:  # only a sample's first picture is read; others are masks or depth
                names.append(pictures[0].name)
                further += len(pictures) - 1
                places.append((number, pictures[0].offset, pictures[0].size))
                labels += [read_class(member) for member in classes[:1]]
            else:
                alone = classes[0] if classes else alone
                others.update(suffix_of(member.name) for member in whole if member not in classes)
        if alone and len(names) - len(labels) > before:
            raise UserError(
                f"{alone} does not follow its picture: expected the members of a sample one after another, as "
                "`tar --sort=name` writes them."
            )
        stamps.append(every[0].stamp if every else (0, 0))
    if not names:
        raise UserError(f"{no_pictures(tars[0], others)}: expected a WebDataset tar with .jpg and .cls members.")
    if labels and len(labels) != len(names):
        raise UserError(f"{len(labels)} of the {len(names)} samples of {tars[0].parent} have a .cls: give all one.")
    texts, (tar, offsets, sizes) = Names.of(names), np.array(places, dtype=np.int64).T
    arrays = {"names": texts.data, "ends": texts.ends, "tar": tar, "offsets": offsets, "sizes": sizes}
    keys = keys_of(tars, tar, names)
    arrays |= {"hashes": hashes_of(keys).view(np.int64), "sums": sums_of(keys).astype(np.int64)}
    arrays |= {"labels": np.array(labels, dtype=np.int64), "stamps": np.array(stamps, dtype=np.int64)}
    note = f"not read: {further:,} further pictures of samples, whose names are the same up to the first dot"
    notes = Names.of([*([unread(others)] if others else []), *([note] if further else [])])
    arrays |= {"notes": notes.data, "note_ends": notes.ends}
    indices = [index for tar in tars if (index := tar.with_suffix(".idx")).exists()]
    return arrays, [*tars, *indices], len(names)


def in_hidden(member: TarMember) -> bool:
    """Whether a member, or one of its folders, is hidden."""
    return any(is_hidden(part) for part in member.name.split("/") if part not in (".", ".."))


def sample_key(member: TarMember) -> str:
    """A member's key: folder, and name up to the first dot."""
    folder, base = os.path.split(member.name)
    return f"{folder}/{base.partition('.')[0]}"


def read_class(member: TarMember) -> int:
    try:
        label = int(member.read()) if member.size < 64 else -1
    except (ValueError, OSError):
        label = -1
    if not 0 <= label < MAX_CLASSES:
        raise UserError(f"{member} holds no class: expected a number from 0 to {MAX_CLASSES - 1}.")
    return label


def open_tars(source: Path, split: str, holdout: float, skip_broken: bool, quarantine: Quarantine) -> ImageDataset:
    """Open one split of a tar or a folder of tars. Raises UserError as `open_folder` does."""
    splits = split_tars(source)
    pictures, labels, notes = samples(tuple(splits.get(split) or splits[""]))
    every = [samples(tuple(tars)).labels for tars in splits.values()]
    if len({labels is None for labels in every}) > 1:
        raise UserError(f"one split of {source} has .cls members and the other has none: give both.")
    num_classes = max((int(labels.max()) + 1 for labels in every if labels is not None), default=0)
    folder = "" if "" in splits else splits[split][0].parent.name
    rows = (
        np.arange(len(pictures))
        if folder
        else choose_split(pictures.hashes.view(np.uint64), split, holdout, str(source))
    )
    reasons = quarantine.under(folder)
    quarantined = {}
    if reasons:
        keys = pictures.keys()
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
        notes=[*notes, *beside(source)],
    )
