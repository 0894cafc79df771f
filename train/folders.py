"""Folders of image files: one subfolder per class, or images directly inside. Splits: `train/`, `test/`, `val/`."""

import logging
import os
from collections import Counter
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from umd.errors import UserError
from umd.train.decoding import read_patiently, unreadable
from umd.train.index import Arrays, Names, kept
from umd.train.listing import COMMON_SUFFIXES, above, entries, files_below, listing, named, no_pictures, notes_of
from umd.train.pools import in_order
from umd.train.quarantine import Quarantine
from umd.train.sources import LEAVE_OUT, ImageDataset
from umd.train.splits import choose_split, hashes_of, in_test_split

log = logging.getLogger("umd")

# With more files than this, headers are not checked at the start: a million would delay every start.
HEADER_CHECK_LIMIT = 20_000
LISTERS = 16  # threads, which wait for the disk


def open_folder(root: Path, split: str, holdout: float, skip_broken: bool, quarantine: Quarantine) -> ImageDataset:
    """Open the images of one split. Raises UserError if the folder has none, or has an unknown layout."""
    subfolders, beside = listing(root)
    tests = [name for name in ("val", "test") if name in subfolders]  # ImageNet's test/ has no labels
    if ("train" in subfolders) != bool(tests):
        raise UserError(
            f"{root} has {tests[0] if tests else 'train'}/ without its counterpart: "
            "expected train/ beside val/ or test/; to have one folder split, give that folder itself."
        )
    folder = root / ("train" if split == "train" else tests[0]) if tests else root
    reasons = quarantine.under(folder.name if tests else "")
    found = without(scan(folder), folder, reasons)
    notes = [*found.notes, *filter(None, [level_note(folder, found, bool(tests))])]
    if tests:
        others = [f"{name}/" for name in subfolders if name not in ("train", tests[0])]
        others += [f"{len(beside):,} images"] if beside else []
        notes += [f"not read, beside train/ and {tests[0]}/ in {root}: {named(others)}"] if others else []
    else:
        found = found.take(choose_split(hashes_of(found.files), split, holdout, str(root)))
    class_names = found.class_names
    labels = found.labels if class_names else None
    if tests and split == "test" and labels is not None:
        left_out = quarantine.under("train")
        train_names = [name for name in listing(root / "train")[0] if f"{name}/" not in left_out]
        unknown = sorted(set(class_names) - set(train_names))
        if unknown:
            deeper = next((name.split("/")[1] for name in found.files if name.count("/") > 1), "")
            mend = f"move what is in it up into {folder}" if deeper in train_names else "add one"
            raise UserError(f"class folder {folder / unknown[0]} has no counterpart in {root / 'train'}: {mend}.")
        numbers = {name: number for number, name in enumerate(train_names)}
        labels = np.array([numbers[name] for name in class_names])[labels]
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
        notes=notes,
    )
    if len(paths) and not len(dataset):
        kind = "training" if split == "train" else "held-out"
        raise UserError(f"none of the {len(paths)} {kind} images of {folder} can be read: replace or remove them.")
    return dataset


class Found(NamedTuple):
    """The image files of a folder."""

    files: Names  # paths relative to the folder: those in class folders, then those directly inside
    labels: np.ndarray  # int64 [N]; -1 for files directly inside
    class_names: list[str]
    notes: list[str]  # messages about what is not read

    def take(self, rows: np.ndarray) -> "Found":
        return Found(self.files.take(rows), self.labels[rows], self.class_names, self.notes)


def scan(root: Path) -> Found:
    """List the image files of a folder, or take the list kept from before. Classes may be empty."""
    arrays = kept("folder, notes", root, lambda: walk(root))
    class_names = list(Names(arrays["classes"], arrays["class_ends"]))
    labels = np.repeat(np.arange(-1, len(class_names)), arrays["counts"])
    labels, notes = np.roll(labels, -int(arrays["counts"][0])), list(Names(arrays["notes"], arrays["note_ends"]))
    return Found(Names(arrays["files"], arrays["ends"]), labels, class_names, notes)


def walk(root: Path) -> tuple[Arrays, list[Path], int]:
    """List a folder. Returns arrays, all folders that were listed, and the number of image files.

    The arrays hold: names of image files and class folders, number of files directly inside and in each class, notes.
    """
    here, outside = entries(root), above(root)
    subfolders, loose = sorted(here.folders + here.links), sorted(here.files)
    with ThreadPoolExecutor(LISTERS) as pool:
        inside = list(in_order(pool, lambda name: files_below(root, name, outside), subfolders, root))
    notes = Names.of(notes_of(inside, here.others))
    inside = [below for below in inside if below.folders]  # a link to the root itself is no class
    classes = Names.of(next(iter(below.folders)) for below in inside)
    files = Names.of([*(file for below in inside for file in below.files), *loose])
    arrays = {
        "files": files.data,
        "ends": files.ends,
        "classes": classes.data,
        "class_ends": classes.ends,
        "counts": np.array([len(loose), *(len(below.files) for below in inside)], dtype=np.int64),
        "notes": notes.data,
        "note_ends": notes.ends,
    }
    return arrays, [root, *(root / folder for below in inside for folder in below.folders)], len(files)


def without(found: Found, root: Path, left_out: Collection[str]) -> Found:
    """Remove quarantined files and class folders (paths that end in /). Removing a class renumbers the others.

    Raises UserError if no image is left, a class has no image left, or images lie next to class folders.
    """
    files, labels, class_names, notes = found
    if left_out:
        in_use = np.array([f"{name}/" not in left_out for name in class_names], dtype=bool)
        keep = np.array([file not in left_out for file in files], dtype=bool) & np.append(in_use, True)[labels]
        labels = np.append(in_use.cumsum() - 1, -1)[labels]
        class_names = [name for name, used in zip(class_names, in_use, strict=True) if used]
        files, labels, class_names, _ = Found(files, labels, class_names, notes).take(np.flatnonzero(keep))
    if not class_names and not len(files) and len(found.files):
        raise UserError(f"all {len(found.files)} images of {root} are in quarantine: replace them, or remove the list.")
    if not class_names and not len(files):
        raise UserError(
            f"{no_pictures(root, entries(root).others)}: expected one subfolder per class, or images directly inside "
            f"({' '.join(COMMON_SUFFIXES)} ...)."
        )
    if class_names and len(files) and labels[-1] < 0:
        first = files[int((labels < 0).argmax())]
        raise UserError(
            f"{root} has images ({first}) beside subfolders ({class_names[0]}/): "
            "expected either one subfolder per class or images directly inside, not both."
        )
    there = np.bincount(labels[labels >= 0], minlength=len(class_names))
    if class_names and there.min() == 0:
        empty = [class_names[int(there.argmin())]] if there.any() else class_names
        others = sum((files_below(root, name, above(root)).others for name in empty), Counter[str]())
        where = f"class folder {root / empty[0]}" if there.any() or len(empty) == 1 else f"{root}"
        raise UserError(f"{no_pictures(where, others)}: add some or remove the folder.")
    return Found(files, labels, class_names, notes)


def level_note(root: Path, found: Found, splits: bool) -> str:
    """Message if the class folders hold only folders of pictures, as when the source is one level too high.

    It names the folder to give instead. "" if the class folders hold pictures. splits: root is a split of the source.
    """
    files, class_names = found.files, found.class_names
    if not class_names or not len(files) or any(name.count("/") < 2 for name in files):
        return ""
    if len(class_names) > 1:
        name, inner, *_ = files[0].split("/")
        return (
            f"the {len(class_names):,} class folders of {root} hold no pictures themselves, only folders of them "
            f"({name}/{inner}/ ...): if these are the classes, give {root / name}"
        )
    shared = os.path.commonpath(
        [os.path.dirname(name) for name in (files[0], files[len(files) - 1])]
    )  # they are sorted
    if len(inner := listing(root / shared)[0]) < 2:
        return ""
    way = f"move them up into {root}" if splits else f"give {root / shared}"
    return (
        f"{root} has one class folder, {class_names[0]}/, so that all pictures are of one class; if the {len(inner):,} "
        f"folders in {root / shared} ({inner[0]}/ ...) are the classes, {way}"
    )


def check_headers(paths: Names, skip_broken: bool) -> np.ndarray:
    """Indices of the files whose header Pillow can read. Raises UserError at a bad one unless `skip_broken`."""
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
    """Say what is wrong with the header of an image file, None if nothing. Reads no pixels.

    Raises as `read_patiently`, but no OSError.
    """

    def look() -> None:
        with Image.open(path):
            pass

    try:
        read_patiently(look, path)
        return None
    except UserError:
        raise
    except Exception as error:
        return unreadable(path, error)
