"""`ImageDataset`, which every source of pictures becomes; reading of numpy files and idx files."""

import gzip
import logging
import math
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from io import SEEK_CUR
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from umd.errors import UserError
from umd.files import OpenFile
from umd.train.decoding import BrokenPicture, Picture, Shrink, decode, whole
from umd.train.quarantine import summary
from umd.train.splits import choose_split, hashes_of

if TYPE_CHECKING:
    from umd.train.latents import LatentDataset

log = logging.getLogger("umd")

MAX_CLASSES = 1_000_000  # a label beyond is a mistake, and class names would fill the memory
LEAVE_OUT = (
    "`umd check-data` lists such files, which all commands then leave out; training, with --data.skip-broken, too"
)
CHECKED = 512 << 20  # bytes; the checksum of a larger mapped array is not checked, as that would delay the start
IDX_NAME = re.compile(r"images[-.]idx3-ubyte(\.gz)?$")


class Rows(Sequence[np.ndarray]):
    """Rows `rows`, int64 [N], of an array that is memory-mapped from a file. Read on access."""

    def __init__(self, array: np.ndarray, rows: np.ndarray):
        self.array, self.rows = array, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index) -> np.ndarray:  # type: ignore[override]  # int, or int64 [n]
        return np.asarray(self.array[self.rows[index]])


@lru_cache(maxsize=512)  # more than the shards of ImageNet's pictures: 313
def opened(path: str, stamp: tuple[int, int] | None = None) -> OpenFile:
    """Open a file, once per process; forked workers share it. stamp: tells its versions apart."""
    return OpenFile(Path(path))


@dataclass
class ImageDataset:
    """Pictures of one split, in a fixed order.

    pictures: uint8 [N, h, w, C] (C = 1, 3, or 4 for RGBA), in memory or mapped; or N image files: paths or tar members.
    labels: int64 [N] indices into `class_names`. None, and no class names, if the source has no labels.
    """

    name: str
    split: str
    pictures: np.ndarray | Sequence[Any]  # Rows, str or Stored
    labels: np.ndarray | None = None
    class_names: list[str] = field(default_factory=list)
    skip_broken: bool = False
    quarantined: dict[str, str] = field(default_factory=dict)  # file -> reason, from `umd check-data`
    left_out: int = 0  # number of unreadable files found when the dataset was opened
    broken: set[int] = field(default_factory=set)  # indices found unreadable since then
    notes: list[str] = field(default_factory=list)  # messages about the source, printed when a command begins

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def num_broken(self) -> int:
        return self.left_out + len(self.broken)

    def picture(self, index: int, shrink: Shrink | None = None) -> Picture:
        """Read a picture. shrink: allows decoding at a fraction of its size. Raises as `decode`."""
        picture = self.pictures[index]
        if isinstance(picture, np.ndarray):
            return whole(picture)
        try:
            return decode(picture, shrink)
        except BrokenPicture as error:
            raise BrokenPicture(f"{error}. {LEAVE_OUT}") from error

    def read(self, index: int, shrink: Shrink | None = None) -> tuple[int, Picture]:
        """Read a picture. Returns (index, picture). With `skip_broken`, the next of its class replaces a broken one."""
        for candidate in chain(range(index, len(self)), range(index)):
            same_class = self.labels is None or self.labels[candidate] == self.labels[index]
            if candidate in self.broken or not same_class:
                continue
            try:
                return candidate, self.picture(candidate, shrink)
            except BrokenPicture:
                if not self.skip_broken:
                    raise
                self.mark_broken(candidate)
        raise UserError(f"no image can stand in for the unreadable {self.pictures[index]}: replace it.")

    def mark_broken(self, index: int) -> None:
        """Mark a picture as unreadable, and say so the first time."""
        if index not in self.broken:
            self.broken.add(index)
            log.warning("left out unreadable image %s", self.pictures[index])


def describe(dataset: "ImageDataset | LatentDataset") -> str:
    """One line for the log: name, split, number of images, classes and unreadable images."""
    count = len(dataset.class_names)
    classes = f"{count} class{'es' * (count > 1)}" if count else "no labels"
    quarantined = getattr(dataset, "quarantined", {})
    left_out = f", {summary(quarantined, len(dataset))}" if quarantined else ""
    left_out += f", {dataset.num_broken} unreadable left out" if dataset.num_broken else ""
    return f"{dataset.name} {dataset.split}: {len(dataset)} images, {classes}{left_out}"


# Arrays


def open_arrays(path: Path, split: str, holdout: float) -> ImageDataset:
    """Open a `.npy` with images, or a `.npz` with images and labels named as in `array_names`. Never unpickles."""
    try:
        plain = path.suffix == ".npy"
        stored = {"images": np.load(path, "r", allow_pickle=False)} if plain else ArrayFile(path)
        train = array_names(stored, "train")
        test = array_names(stored, "test") or array_names(stored, "val")
        own_splits = train is not None and test is not None
        names = (train if split == "train" else test) if own_splits else array_names(stored) or train or test
        if names is None:
            raise UserError(
                f"{path} holds no images: expected images, x or arr_0 (with labels, y or arr_1), or "
                "train_images and test_images (with train_labels and test_labels); "
                f"it has {', '.join(stored) or 'no arrays'}."
            )
        images = stored[names[0]]
        label_names = {pair[1] for pair in (names, train, test) if pair and pair[1]}
        labels = {name: stored[name] for name in label_names}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read {path} ({reason}): expected .npy or .npz without pickled objects.") from error

    check_images(images, f"{names[0]} in {path}")
    labels = {name: check_labels(array, f"{name} in {path}") for name, array in labels.items()}
    own_labels = labels[names[1]] if names[1] else None
    return from_arrays(path, split, images, own_labels, count_classes(labels), None if own_splits else holdout)


class ArrayFile(Mapping[str, np.ndarray]):
    """The arrays of an .npz. Uncompressed ones (np.savez) are memory-mapped, compressed ones read on access."""

    def __init__(self, path: Path):
        self.path = path
        with zipfile.ZipFile(path) as file:
            self.members = {info.filename.removesuffix(".npy"): info for info in file.infolist()}

    def __iter__(self) -> Iterator[str]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)

    def __contains__(self, name: object) -> bool:
        return name in self.members

    def __getitem__(self, name: str) -> np.ndarray:
        member = self.members[name]
        if member.compress_type == zipfile.ZIP_STORED:
            with self.path.open("rb") as file:
                file.seek(member.header_offset + 26)  # the local header ends with the lengths of name and extra field
                file.seek(sum(np.frombuffer(file.read(4), "<u2").tolist()), SEEK_CUR)
                start = file.tell()
                version = np.lib.format.read_magic(file)
                headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                if version in headers:
                    shape, fortran, dtype = headers[version](file)
                    size, first = math.prod(shape) * dtype.itemsize, file.tell()
                    if not (fortran or dtype.hasobject or size == 0):
                        if first - start + size != member.file_size:
                            raise ValueError(f"{name} has {member.file_size} bytes and another shape")
                        if member.file_size <= CHECKED:
                            file.seek(start)
                            check_sum(file, member)
                        return np.memmap(self.path, dtype, "r", first, shape)
        with np.load(self.path, allow_pickle=False) as arrays:
            return arrays[name]


def check_sum(file: BinaryIO, member: zipfile.ZipInfo) -> None:
    """Raise BadZipFile if the bytes from here on do not have the member's CRC-32. (zipfile checks it when it reads.)"""
    sum_of, left = 0, member.file_size
    while left and (data := file.read(min(left, 1 << 20))):
        sum_of, left = zlib.crc32(data, sum_of), left - len(data)
    if sum_of != member.CRC:
        raise zipfile.BadZipFile(f"Bad CRC-32 for file {member.filename!r}")


def array_names(stored: Mapping[str, Any], split: str | None = None) -> tuple[str, str | None] | None:
    """Names of images and labels (or None) in a file: of one split, as in MedMNIST and Keras, or without splits."""
    if split is None:
        images_as, labels_as = ["images", "x", "arr_0"], ["labels", "y", "arr_1"]
    else:
        images_as, labels_as = [f"{split}_images", f"x_{split}"], [f"{split}_labels", f"y_{split}"]
    images, labels = (next((name for name in names if name in stored), None) for names in (images_as, labels_as))
    return None if images is None else (images, labels)


def open_idx(path: Path, split: str, holdout: float) -> ImageDataset:
    """Open `train-images-idx3-ubyte(.gz)` as in MNIST. Labels and the `t10k` (or `test`) split lie beside it."""
    token = r"(train|t10k|test)(?=-images)"
    train, test = beside(path, token, ["train"]), beside(path, token, ["t10k", "test"])
    chosen = path
    if train and test:
        chosen = train if split == "train" else test
    labels = {}
    for file in {chosen, train or chosen, test or chosen}:
        found = beside(file, r"images([-.])idx3", [r"labels\1idx1"])
        if found is not None:
            labels[file] = check_labels(read_idx(found, ndim=1), str(found))
    images = read_idx(chosen, ndim=3)
    check_images(images, str(chosen))
    return from_arrays(
        path, split, images, labels.get(chosen), count_classes(labels), None if train and test else holdout
    )


def beside(path: Path, pattern: str, replacements: list[str]) -> Path | None:
    """The first existing file, compressed or not, named like `path` with `pattern` replaced."""
    plain = path.name.removesuffix(".gz")
    if not re.search(pattern, plain):
        return None
    renamed = [re.sub(pattern, text, plain) for text in replacements]
    candidates = [path.with_name(name + suffix) for name in renamed for suffix in ("", ".gz")]
    return next((file for file in candidates if file.is_file()), None)


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read an idx file: bytes 0, 0, 8 (code for uint8), ndim; sizes as big-endian uint32; then the data."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path} ({error}): download it again.") from error
    start = 4 + 4 * ndim
    if data[:4] != bytes((0, 0, 8, ndim)) or len(data) < start:
        expected, found = bytes((0, 0, 8, ndim)).hex(), data[:start].hex()
        raise UserError(f"{path} begins with {found}, expected the idx{ndim} header {expected}: download it again.")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", ndim, 4))
    size, promised = len(data) - start, math.prod(shape)
    if size != promised:
        raise UserError(f"{path} is damaged: its header promises {promised} bytes, it has {size}; download it again.")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def check_images(images: np.ndarray, what: str) -> None:
    if images.dtype != np.uint8:
        raise UserError(f"{what} has dtype {images.dtype}: expected uint8 pixels, 0 to 255.")
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise UserError(f"{what} has shape {images.shape}: expected [N, H, W] or [N, H, W, C], none of these 0.")
    if images.ndim == 4 and images.shape[3] not in (1, 3, 4):
        raise UserError(f"{what} has shape {images.shape}: expected [N, H, W, C], the 1, 3 or 4 channels last.")


def check_labels(labels: np.ndarray, what: str) -> np.ndarray:
    """Check labels and convert them to int64 [N]."""
    if labels.ndim == 2 and labels.shape[1] == 1:  # MedMNIST
        labels = labels[:, 0]
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        kind = f"dtype {labels.dtype} and shape {labels.shape}"
        raise UserError(f"{what} has {kind}: expected one integer per image.")
    if labels.min(initial=0) < 0:
        raise UserError(f"{what} holds the label {labels.min()}: expected classes counted from 0.")
    if labels.max(initial=0) >= MAX_CLASSES:
        raise UserError(f"{what} holds the label {labels.max()}: expected classes below {MAX_CLASSES}.")
    return labels.astype(np.int64)


def count_classes(labels: dict) -> int:
    """Number of classes over all splits, so that both splits have the same."""
    return max((1 + int(array.max(initial=-1)) for array in labels.values()), default=0)


def from_arrays(
    path: Path,
    split: str,
    images: np.ndarray,
    labels: np.ndarray | None,
    num_classes: int,
    holdout: float | None,
) -> ImageDataset:
    """Make a dataset of images [N, H, W] or [N, H, W, C] and labels [N]. holdout: None if the file has splits."""
    if labels is not None and len(labels) != len(images):
        raise UserError(f"{path} has {len(images)} images but {len(labels)} labels for {split}: expected as many.")
    images = images.reshape(*images.shape[:3], -1)  # [N, h, w, C]
    rows = None if holdout is None else choose_split(hashes_of(map(str, range(len(images)))), split, holdout, str(path))
    pictures: np.ndarray | Rows = images
    if rows is not None:
        pictures = Rows(images, rows) if isinstance(images, np.memmap) else images[rows]
    return ImageDataset(
        name=path.name,
        split=split,
        pictures=pictures,
        labels=labels if labels is None or rows is None else labels[rows],
        class_names=[] if labels is None else [str(label) for label in range(num_classes)],
    )
