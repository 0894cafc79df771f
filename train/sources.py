"""Where pictures come from: folders, numpy files and idx files, each read into an `ImageDataset`."""

import gzip
import hashlib
import logging
import math
import os
import re
import zipfile
import zlib
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from umd.errors import UserError
from umd.train.quarantine import Quarantine, summary

if TYPE_CHECKING:
    from umd.train.latents import LatentDataset

log = logging.getLogger("umd")

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IDX_NAME = re.compile(r"images[-.]idx3-ubyte(\.gz)?$")
# Above this many files the headers are left to the first read: a million of them would hold up every start.
HEADER_CHECK_LIMIT = 100_000


class Stored(Protocol):
    """An image file that lies inside another, such as a tar; as text, where it lies."""

    def read(self) -> bytes: ...


@dataclass
class ImageDataset:
    """Pictures of one split, in a fixed order.

    pictures: uint8 [N, h, w, C] (C = 1, 3 or 4: RGBA), or N image files: paths, or members of tars.
    labels: int64 [N] indices into `class_names`; None, with no class names, where the source has no labels.
    """

    name: str
    split: str
    pictures: np.ndarray | Sequence[Any]  # str or Stored
    labels: np.ndarray | None = None
    class_names: list[str] = field(default_factory=list)
    skip_broken: bool = False
    quarantined: dict[str, str] = field(default_factory=dict)  # reasons by file: what `umd check-data` left out
    left_out: int = 0  # unreadable files left out when the dataset was opened
    broken: set[int] = field(default_factory=set)  # indices found unreadable since

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def num_broken(self) -> int:
        return self.left_out + len(self.broken)

    def image(self, index: int) -> np.ndarray:
        """The picture as stored, uint8 [h, w, C]. Raises UserError naming the file if it cannot be read."""
        picture = self.pictures[index]
        return picture if isinstance(picture, np.ndarray) else decode(picture)

    def read(self, index: int) -> tuple[int, np.ndarray]:
        """(index, picture); with `skip_broken`, the next of its class in place of an unreadable one."""
        for candidate in chain(range(index, len(self)), range(index)):
            same_class = self.labels is None or self.labels[candidate] == self.labels[index]
            if candidate in self.broken or not same_class:
                continue
            try:
                return candidate, self.image(candidate)
            except UserError:
                if not self.skip_broken:
                    raise
                self.mark_broken(candidate)
        raise UserError(f"no image can stand in for the unreadable {self.pictures[index]}: replace it.")

    def mark_broken(self, index: int) -> None:
        """Count a picture as unreadable, and say so the first time."""
        if index not in self.broken:
            self.broken.add(index)
            log.warning("left out unreadable image %s", self.pictures[index])


def describe(dataset: "ImageDataset | LatentDataset") -> str:
    """One line for logs: name, split, number of images and classes, how many were unreadable."""
    classes = f"{len(dataset.class_names)} classes" if dataset.class_names else "no labels"
    quarantined = getattr(dataset, "quarantined", {})
    left_out = f", {summary(quarantined, len(dataset))}" if quarantined else ""
    left_out += f", {dataset.num_broken} unreadable left out" if dataset.num_broken else ""
    return f"{dataset.name} {dataset.split}: {len(dataset)} images, {classes}{left_out}"


def in_test_split(key: str, holdout: float) -> bool:
    """Whether the item called `key` is held out: by a hash of its name, so that others may come and go."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < holdout * 2**64


def choose_split(keys: Iterable[str], split: str, holdout: float, name: str) -> np.ndarray:
    """Rows (int64) of the items that belong to `split`; the test split may be empty, where `holdout` is 0.

    Raises UserError if nothing is left to train on.
    """
    held_out = np.array([in_test_split(key, holdout) for key in keys])
    if split == "train" and held_out.all():
        raise UserError(f"no image of {name} is left to train on at holdout={holdout}: lower it.")
    return np.flatnonzero(held_out == (split == "test"))


# Pictures


def decode(file: str | Path | Stored) -> np.ndarray:
    """Read an image file: uint8 [h, w, 1 or 3], upright as its EXIF tag says, on white where transparent."""
    try:
        with Image.open(file if isinstance(file, str | Path) else BytesIO(file.read())) as image:
            return pixels(flatten(ImageOps.exif_transpose(image)))
    except Exception as error:  # Pillow's readers raise many kinds on damaged data
        raise UserError(unreadable(file, error)) from error


def flatten(image: Image.Image) -> Image.Image:
    """Any Pillow image as mode L or RGB; transparent parts become white."""
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it at 255
        return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point, expected 8 or 16 bits")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return white.convert("RGB")
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")


def pixels(image: Image.Image) -> np.ndarray:
    """Mode L or RGB to uint8 [h, w, 1 or 3]."""
    array = np.asarray(image)
    return array if array.ndim == 3 else array[..., None]


def unreadable(file: str | Path | Stored, error: Exception) -> str:
    reason = str(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        reason = "it is not an image"
    return f"cannot read image {file} ({reason}): replace or remove it, or set skip_broken to leave such out."


def header_error(path: str) -> str | None:
    """What is wrong with the header of an image file, or None. Reads no pixels."""
    try:
        with Image.open(path):
            return None
    except Exception as error:
        return unreadable(path, error)


# Folders


def open_folder(root: Path, split: str, holdout: float, skip_broken: bool, quarantine: Quarantine) -> ImageDataset:
    """One subfolder a class, or images directly inside; `train/` and `test/` (or `val/`) are splits."""
    subfolders, _ = listing(root)
    tests = [name for name in ("test", "val") if name in subfolders]
    if ("train" in subfolders) != bool(tests):
        raise UserError(
            f"{root} has {tests[0] if tests else 'train'}/ without its counterpart: "
            "expected train/ beside test/ or val/; to have one folder split, give that folder itself."
        )
    if not tests:
        reasons = quarantine.under("")
        files, labels, class_names = scan(root, reasons)
        rows = choose_split((file.as_posix() for file in files), split, holdout, str(root))
        files = [files[row] for row in rows]
        labels = None if labels is None else labels[rows]
        folder = root
    else:
        folder = root / ("train" if split == "train" else tests[0])
        reasons = quarantine.under(folder.name)
        files, labels, class_names = scan(folder, reasons)
        if split == "test" and labels is not None:
            train_names = classes_in(root / "train", quarantine.under("train"))[0]
            unknown = sorted(set(class_names) - set(train_names))
            if unknown:
                raise UserError(f"class folder {folder / unknown[0]} has no counterpart in {root / 'train'}: add one.")
            labels = np.array([train_names.index(name) for name in class_names])[labels]
            class_names = train_names
    paths = [str(folder / file) for file in files]
    good = check_headers(paths, skip_broken)
    dataset = ImageDataset(
        name=root.resolve().name,
        split=split,
        pictures=[paths[row] for row in good],
        labels=None if labels is None else labels[good],
        class_names=class_names,
        skip_broken=skip_broken,
        quarantined={
            path: why
            for path, why in reasons.items()
            if tests or path.endswith("/") or in_test_split(path, holdout) == (split == "test")
        },
        left_out=len(paths) - len(good),
    )
    if paths and not dataset.pictures:
        raise UserError(f"none of the {len(paths)} images of {folder} can be read: replace them.")
    return dataset


def listing(folder: Path) -> tuple[list[str], list[str]]:
    """Sorted names of the subfolders and of the image files directly inside, without hidden ones."""
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith((".", "__"))]
    except OSError as error:
        raise UserError(f"cannot list folder {folder} ({error.strerror}): check that it can be read.") from error
    subfolders = sorted(entry.name for entry in entries if entry.is_dir())
    return subfolders, sorted(entry.name for entry in entries if is_image(entry.name) and entry.is_file())


def is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def classes_in(root: Path, left_out: Collection[str]) -> tuple[list[str], list[str]]:
    """`listing` without what is in quarantine."""
    subfolders, loose = listing(root)
    return [n for n in subfolders if f"{n}/" not in left_out], [n for n in loose if n not in left_out]


def scan(root: Path, left_out: Collection[str] = ()) -> tuple[list[Path], np.ndarray | None, list[str]]:
    """Image files relative to `root`, their labels [N] (None if directly inside) and the class names."""
    class_names, loose = classes_in(root, left_out)
    if class_names and loose:
        raise UserError(
            f"{root} has images ({loose[0]}) beside subfolders ({class_names[0]}/): "
            "expected either one subfolder per class or images directly inside, not both."
        )
    if not class_names and not loose:
        raise UserError(
            f"{root} has no images: expected one subfolder per class, or images directly inside "
            f"({' '.join(IMAGE_SUFFIXES)})."
        )
    if loose:
        return [Path(name) for name in loose], None, []
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        walk = os.walk(root / name, followlinks=True)
        inside = (Path(folder, file) for folder, _, names in walk for file in names if is_image(file))
        found = sorted(file.relative_to(root) for file in inside)
        found = [file for file in found if file.as_posix() not in left_out] if left_out else found
        if not found:
            raise UserError(f"class folder {root / name} has no images: add some or remove the folder.")
        files += found
        labels += [label] * len(found)
    return files, np.array(labels, dtype=np.int64), class_names


def check_headers(paths: list[str], skip_broken: bool) -> np.ndarray:
    """Rows of the files whose header Pillow can read. Raises UserError at a bad one unless `skip_broken`."""
    if len(paths) > HEADER_CHECK_LIMIT:
        return np.arange(len(paths))
    with ThreadPoolExecutor(16) as pool:  # waiting for the disk, mostly
        errors = list(pool.map(header_error, paths))
    bad = [error for error in errors if error]
    if bad and not skip_broken:
        raise UserError(bad[0])
    for error in bad:
        log.warning(error)
    return np.flatnonzero([error is None for error in errors])


# Arrays


def open_arrays(path: Path, split: str, holdout: float) -> ImageDataset:
    """`.npy` (images) or `.npz` with images and labels, named as in `array_names`; nothing pickled."""
    try:
        stored = np.load(path, allow_pickle=False)
        if isinstance(stored, np.ndarray):
            stored = {"images": stored}
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
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read {path} ({reason}): expected .npy or .npz without pickled objects.") from error

    check_images(images, f"{names[0]} in {path}")
    labels = {name: check_labels(array, f"{name} in {path}") for name, array in labels.items()}
    own_labels = labels[names[1]] if names[1] else None
    return from_arrays(path, split, images, own_labels, count_classes(labels), None if own_splits else holdout)


def array_names(stored: dict, split: str | None = None) -> tuple[str, str | None] | None:
    """Names of images and labels (or None) in a file: of one split, as in MedMNIST or Keras, or of all."""
    if split is None:
        images_as, labels_as = ["images", "x", "arr_0"], ["labels", "y", "arr_1"]
    else:
        images_as, labels_as = [f"{split}_images", f"x_{split}"], [f"{split}_labels", f"y_{split}"]
    images, labels = (next((name for name in names if name in stored), None) for names in (images_as, labels_as))
    return None if images is None else (images, labels)


def open_idx(path: Path, split: str, holdout: float) -> ImageDataset:
    """`train-images-idx3-ubyte(.gz)` as in MNIST; labels and the `t10k` (or `test`) split lie beside it."""
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
    """The first existing file named like `path` with `pattern` replaced, compressed or not."""
    plain = path.name.removesuffix(".gz")
    if not re.search(pattern, plain):
        return None
    renamed = [re.sub(pattern, text, plain) for text in replacements]
    candidates = [path.with_name(name + suffix) for name in renamed for suffix in ("", ".gz")]
    return next((file for file in candidates if file.is_file()), None)


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """An idx file: 0, 0, 8 (its code for uint8), ndim, the sizes as big-endian uint32, then the bytes."""
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
    """Labels as int64 [N]."""
    if labels.ndim == 2 and labels.shape[1] == 1:  # MedMNIST
        labels = labels[:, 0]
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        kind = f"dtype {labels.dtype} and shape {labels.shape}"
        raise UserError(f"{what} has {kind}: expected one integer per image.")
    if labels.min(initial=0) < 0:
        raise UserError(f"{what} holds the label {labels.min()}: expected classes counted from 0.")
    return labels.astype(np.int64)


def count_classes(labels: dict) -> int:
    """Classes over all splits, so that both have the same."""
    return max((1 + int(array.max(initial=-1)) for array in labels.values()), default=0)


def from_arrays(
    path: Path,
    split: str,
    images: np.ndarray,
    labels: np.ndarray | None,
    num_classes: int,
    holdout: float | None,
) -> ImageDataset:
    """Images [N, H, W] or [N, H, W, C] and labels [N]; `holdout` where the file has no splits of its own."""
    if labels is not None and len(labels) != len(images):
        raise UserError(f"{path} has {len(images)} images but {len(labels)} labels for {split}: expected as many.")
    rows = np.arange(len(images))
    if holdout is not None:
        rows = choose_split(map(str, rows), split, holdout, str(path))
    return ImageDataset(
        name=path.name,
        split=split,
        pictures=images.reshape(*images.shape[:3], -1)[rows],  # [N, h, w, C]
        labels=None if labels is None else labels[rows],
        class_names=[] if labels is None else [str(label) for label in range(num_classes)],
    )
