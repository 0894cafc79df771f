"""Folders of image files: a subfolder a class, or images directly inside; `train/` and `test/` or `val/` are splits."""

import logging
import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from umd.errors import UserError
from umd.files import again_if_stale
from umd.train.index import Arrays, Names, kept
from umd.train.quarantine import Quarantine
from umd.train.sources import IMAGE_SUFFIXES, LEAVE_OUT, ImageDataset, choose_split, in_test_split, is_image, unreadable
from umd.train.waiting import in_order

log = logging.getLogger("umd")

# Above this many files the headers are left to the first read: a million of them would hold up every start.
HEADER_CHECK_LIMIT = 20_000
LISTERS = 16  # threads that wait for the disk


def open_folder(root: Path, split: str, holdout: float, skip_broken: bool, quarantine: Quarantine) -> ImageDataset:
    """The images of one split. Raises UserError if the folder has none, or is laid out in no known way."""
    subfolders, _ = listing(root)
    tests = [name for name in ("test", "val") if name in subfolders]
    if ("train" in subfolders) != bool(tests):
        raise UserError(
            f"{root} has {tests[0] if tests else 'train'}/ without its counterpart: "
            "expected train/ beside test/ or val/; to have one folder split, give that folder itself."
        )
    folder = root / ("train" if split == "train" else tests[0]) if tests else root
    reasons = quarantine.under(folder.name if tests else "")
    found = without(scan(folder), folder, reasons)
    if not tests:
        found = found.take(choose_split(found.files, split, holdout, str(root)))
    class_names = found.class_names
    labels = found.labels if class_names else None
    if tests and split == "test" and labels is not None:
        left_out = quarantine.under("train")
        train_names = [name for name in listing(root / "train")[0] if f"{name}/" not in left_out]
        unknown = sorted(set(class_names) - set(train_names))
        if unknown:
            raise UserError(f"class folder {folder / unknown[0]} has no counterpart in {root / 'train'}: add one.")
        labels = np.array([train_names.index(name) for name in class_names])[labels]
        class_names = train_names
    paths = Names(found.files.data, found.files.ends, found.files.rows, f"{folder}{os.sep}")
    good = check_headers(paths, skip_broken)
    dataset = ImageDataset(
        name=root.resolve().name,
        split=split,
        pictures=paths.take(good),
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
    if len(paths) and not len(dataset):
        kind = "training" if split == "train" else "held-out"
        raise UserError(f"none of the {len(paths)} {kind} images of {folder} can be read: replace or remove them.")
    return dataset


def listing(folder: Path) -> tuple[list[str], list[str]]:
    """Sorted names of the subfolders and of the image files directly inside, without hidden ones."""
    subfolders, files = entries(folder)
    return sorted(name for name in subfolders if not name.startswith((".", "__"))), sorted(files)


def entries(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the subfolders and of the image files directly inside. Raises UserError if it cannot be listed."""
    try:
        return again_if_stale(lambda: look_at(folder), folder)
    except OSError as error:
        where = error.filename or folder
        raise UserError(f"cannot list folder {where} ({error.strerror}): check that it can be read.") from error


def look_at(folder: Path) -> tuple[list[str], list[str]]:
    subfolders, files = [], []
    with os.scandir(folder) as found:
        for entry in found:
            try:
                if entry.is_dir():
                    subfolders.append(entry.name)
                # A link to nowhere is told when it is read; what opens a FIFO, a socket or a device may wait for ever.
                elif is_image(entry.name) and (entry.is_file() or not os.path.exists(entry.path)):
                    files.append(entry.name)
            except OSError:  # of a link: whether to a folder is not to be known
                if not is_image(entry.name):
                    raise
                files.append(entry.name)
    return subfolders, files


class Found(NamedTuple):
    """Image files of a folder."""

    files: Names  # relative to it: those in its class folders, then those directly inside
    labels: np.ndarray  # int64 [N]; -1 directly inside
    class_names: list[str]

    def take(self, rows: np.ndarray) -> "Found":
        return Found(self.files.take(rows), self.labels[rows], self.class_names)


def scan(root: Path) -> Found:
    """The image files of a folder, listed or as they were listed before. Classes may be empty."""
    arrays = kept("folder", root, lambda: walk(root))
    class_names = list(Names(arrays["classes"], arrays["class_ends"]))
    labels = np.repeat(np.arange(-1, len(class_names)), arrays["counts"])
    return Found(Names(arrays["files"], arrays["ends"]), np.roll(labels, -int(arrays["counts"][0])), class_names)


def walk(root: Path) -> tuple[Arrays, list[Path], int]:
    """Names of the image files and of the class folders; how many files lie directly inside, and in each class; and all
    folders that were listed."""
    class_names, loose = listing(root)
    with ThreadPoolExecutor(LISTERS) as pool:
        inside = list(in_order(pool, lambda name: files_below(root, name), class_names, root))
    files, classes = Names.of([*(file for listed, _ in inside for file in listed), *loose]), Names.of(class_names)
    arrays = {
        "files": files.data,
        "ends": files.ends,
        "classes": classes.data,
        "class_ends": classes.ends,
        "counts": np.array([len(loose), *(len(listed) for listed, _ in inside)], dtype=np.int64),
    }
    return arrays, [root, *(folder for _, folders in inside for folder in folders)], len(files)


def files_below(root: Path, name: str) -> tuple[list[str], list[Path]]:
    """Images in a class folder and all folders in it, relative to `root`, by the parts of their paths; the folders."""
    found, folders, left = [], [], [name]
    while left:
        below = left.pop()
        folders.append(root / below)
        subfolders, files = entries(root / below)
        left += [f"{below}/{subfolder}" for subfolder in subfolders]
        found += [f"{below}/{file}" for file in files]
    return sorted(found, key=lambda path: path.split("/")), folders


def without(found: Found, root: Path, left_out: Collection[str]) -> Found:
    """Without what is in quarantine: files, and class folders (which end in /). Their classes have other numbers then.

    Raises UserError if nothing is left of all, or of a class, or if images lie beside class folders.
    """
    files, labels, class_names = found
    if left_out:
        in_use = np.array([f"{name}/" not in left_out for name in class_names], dtype=bool)
        keep = np.array([file not in left_out for file in files], dtype=bool) & np.append(in_use, True)[labels]
        labels = np.append(in_use.cumsum() - 1, -1)[labels]
        class_names = [name for name, used in zip(class_names, in_use, strict=True) if used]
        files, labels, class_names = Found(files, labels, class_names).take(np.flatnonzero(keep))
    if not class_names and not len(files):
        raise UserError(
            f"{root} has no images: expected one subfolder per class, or images directly inside "
            f"({' '.join(IMAGE_SUFFIXES)})."
        )
    if class_names and len(files) and labels[-1] < 0:
        first = files[int((labels < 0).argmax())]
        raise UserError(
            f"{root} has images ({first}) beside subfolders ({class_names[0]}/): "
            "expected either one subfolder per class or images directly inside, not both."
        )
    there = np.bincount(labels[labels >= 0], minlength=len(class_names))
    if class_names and there.min() == 0:
        empty = root / class_names[int(there.argmin())]
        raise UserError(f"class folder {empty} has no images: add some or remove the folder.")
    return Found(files, labels, class_names)


def check_headers(paths: Names, skip_broken: bool) -> np.ndarray:
    """Rows of the files whose header Pillow can read. Raises UserError at a bad one unless `skip_broken`."""
    if len(paths) > HEADER_CHECK_LIMIT:
        return np.arange(len(paths))
    with ThreadPoolExecutor(LISTERS) as pool:
        errors = list(in_order(pool, header_error, paths, paths.prefix))
    bad = [error for error in errors if error]
    if bad and not skip_broken:
        raise UserError(f"{bad[0]}. {LEAVE_OUT}")
    for error in bad:
        log.warning(error)
    return np.flatnonzero([error is None for error in errors])


def header_error(path: str) -> str | None:
    """What is wrong with the header of an image file, or None. Reads no pixels."""
    try:
        with Image.open(path):
            return None
    except Exception as error:
        return unreadable(path, error)
