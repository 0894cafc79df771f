"""`umd check-data`: read and decode every file of a source once, on all cores, and quarantine the unusable ones."""

import errno
import json
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import simplejpeg
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import track
from rich.table import Table

from umd.errors import TemporaryError, UserError
from umd.files import check_place, write_whole
from umd.train.console import say
from umd.train.decoding import FLOATS, BrokenPicture, flatten, read_file
from umd.train.folders import level_note, scan
from umd.train.listing import listing
from umd.train.options import CheckData
from umd.train.pools import in_order, processes_explained
from umd.train.quarantine import default_path
from umd.train.signals import end_when_orphaned
from umd.train.tars import beside, is_tars, samples, split_tars

CHUNK = 32  # files that a process takes at a time
OUTSIDE, EMPTY = "outside a class folder", "empty class"
DISK = "disk error"  # read again at the end: a lost disk has come back by then, a bad sector stays


@dataclass(frozen=True)
class Finding:
    """One unusable file, or one unusable class folder, whose path ends in /."""

    path: str  # relative to the source
    reason: str
    detail: str = ""


def examine(encoded: bytes, min_side: int) -> tuple[str, str] | None:
    """Decode an image file. Returns (reason, detail) if it is unusable, else None.

    encoded: the bytes of the file. min_side: smallest allowed length of the shorter side, in pixels.

    A JPEG decoder fills unreadable parts with grey and only warns. Here that warning counts as an error. Damage that
    leaves a valid code stream cannot be detected from the file alone.
    """
    if not encoded:
        return "zero bytes", ""
    try:
        with Image.open(BytesIO(encoded)) as image:
            size, kind = image.size, image.format
            if image.mode == "F":
                return "floating-point pixels", FLOATS
            if min(size) < min_side:
                return "too small", f"{size[0]}x{size[1]}"
            if kind in ("JPEG", "MPO"):
                simplejpeg.decode_jpeg(encoded, colorspace="CMYK" if image.mode == "CMYK" else "GRAY", strict=True)
            else:
                image.load()
                flatten(image)
    except UnidentifiedImageError:
        cut_off = encoded[:2] == b"\xff\xd8"  # the first two bytes of every JPEG
        return ("truncated", f"its header ends after {len(encoded)} bytes") if cut_off else ("not an image", "")
    except Exception as error:  # Pillow's readers raise many kinds of exceptions on damaged data
        detail = " ".join(str(error).split()) or type(error).__name__
        cut_off = "Premature end of JPEG file" in detail or "truncated" in detail.lower()
        return "truncated" if cut_off else "damaged", detail
    return None


def examine_files(files: list[tuple[str, Any]], min_side: int) -> list[Finding]:
    findings = []
    for path, file in files:
        try:
            found = examine(read_file(file), min_side)
        except BrokenPicture as error:
            cause = error.__cause__
            found = "unreadable", getattr(cause, "strerror", None) or str(cause)
        except TemporaryError as error:
            found = DISK, os.strerror(getattr(error.__cause__, "errno", None) or errno.ESTALE)
        if found:
            findings.append(Finding(path, *found))
    return findings


class Listed(NamedTuple):
    """The contents of a source. Paths are relative to it."""

    files: list[tuple[str, Any]]  # (path, file) of every image that a run would read
    classes: dict[str, list[str]]  # the same paths by class folder
    wrong: list[Finding]
    notes: list[str]  # messages about files that are not read

    def __add__(self, other: "Listed") -> "Listed":  # type: ignore[override]
        return Listed(
            self.files + other.files, self.classes | other.classes, self.wrong + other.wrong, self.notes + other.notes
        )


def files_of(source: Path) -> Listed:
    """List the images of a source. Raises UserError if it is not a folder of images or tars."""
    if not source.exists() or not (source.is_dir() or source.suffix == ".tar"):
        raise UserError(f"{source} is no folder of images and no .tar: umd check-data reads these.")
    if is_tars(source):
        files, notes = [], []
        for tars in split_tars(source).values():
            prefix = "" if source.suffix == ".tar" or tars[0].parent == source else f"{tars[0].parent.name}/"
            found = samples(tuple(tars))
            keys = found.pictures.keys()
            files += [(prefix + key, member) for key, member in zip(keys, found.pictures, strict=True)]
            notes += found.notes
        return Listed(files, {}, [], [*notes, *beside(source)])
    subfolders, loose = listing(source)
    tests = [name for name in ("val", "test") if name in subfolders]
    if "train" not in subfolders or not tests:
        return files_in(source, "")
    outside = Listed([], {}, [Finding(name, OUTSIDE) for name in loose], [])
    return outside + files_in(source, "train") + files_in(source, tests[0])


def files_in(source: Path, split: str) -> Listed:
    """`files_of` for one folder of classes or images: the source, or its subfolder `split`."""
    root, prefix = source / split, f"{split}/" if split else ""
    found = scan(root)
    classes: dict[str, list[str]] = {f"{prefix}{name}/": [] for name in found.class_names}
    folders, outside = list(classes), list[str]()
    for path, label in zip(found.files, found.labels.tolist(), strict=True):
        (outside if label < 0 else classes[folders[label]]).append(prefix + path)
    wrong = [Finding(folder, EMPTY) for folder, paths in classes.items() if not paths]
    paths = [path for inside in classes.values() for path in inside]
    if paths:
        wrong += [Finding(path, OUTSIDE) for path in outside]
    elif not outside:
        raise UserError(f"{root} has no images{'. '.join(['', *found.notes])}.")
    files = [(path, str(source / path)) for path in paths or outside]
    notes = [*found.notes, *filter(None, [level_note(root, found, bool(split))])]
    return Listed(files, {folder: inside for folder, inside in classes.items() if inside}, wrong, notes)


def check_data(source: Path, options: CheckData, console: Console) -> Path:
    """Examine all images of a source, print the findings, and write the quarantine list. Returns the list's path."""
    source = source.expanduser()
    out = options.out or default_path(source)
    if source.exists():
        check_place(
            out, instead=f"give another place, e.g. --out {source.stem}.json; runs read it by --data.quarantine"
        )
        if out.exists() and not is_list(out):
            raise UserError(f"{out} is there and is no list of umd check-data; give another --out, or remove it")
    files, classes, findings, notes = files_of(source)
    for note in notes:
        say(console, note)
    jobs = [files[i : i + CHUNK] for i in range(0, len(files), CHUNK)]
    with processes_explained(options.workers, source, "close other programs"):
        pool = ProcessPoolExecutor(options.workers, get_context("spawn"), end_when_orphaned)
    with pool:
        done = track(
            in_order(pool, partial(examine_files, min_side=options.min_side), jobs, source, 4 * options.workers),
            description=f"reading {len(files)} images", total=len(jobs), console=console, transient=True,
        )  # fmt: skip
        for found in done:
            findings += found
    if lost := {finding.path for finding in findings if finding.reason == DISK}:
        findings = [finding for finding in findings if finding.reason != DISK]
        for path, file in files[:: max(1, len(files) // 64)]:  # if others cannot be read either, the disk is away
            if path not in lost:
                read_file(file)
        findings += examine_files([file for file in files if file[0] in lost], options.min_side)
    unusable = {finding.path for finding in findings}
    findings += [
        Finding(folder, EMPTY, f"none of its {len(paths)} images is usable")
        for folder, paths in classes.items()
        if unusable.issuperset(paths)
    ]
    pictures = [finding for finding in findings if not finding.path.endswith("/")]
    read = len(files) + sum(finding.reason == OUTSIDE for finding in findings)
    counts = Counter(finding.reason for finding in findings)
    report = {
        "source": str(source),
        "images": read,
        "left_out": len(pictures),
        "share": len(pictures) / read,
        "counts": dict(counts.most_common()),
        "files": [vars(finding) for finding in sorted(findings, key=lambda finding: finding.path)],
    }
    write_whole(out, json.dumps(report, indent=1).encode())
    print_findings(report, out, console)
    return out


def is_list(path: Path) -> bool:
    """Whether a file is a list as `check_data` writes it."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"source", "files"} <= found.keys()


def print_findings(report: dict, out: Path, console: Console) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2))
    for reason, count in report["counts"].items():
        first = next(entry for entry in report["files"] if entry["reason"] == reason)
        table.add_row(str(count), reason, f"{first['path']}{', ...' if count > 1 else ''}")
    if report["counts"]:
        console.print(table)
    lost = f"{report['left_out']} of {report['images']} images in quarantine ({report['share']:.2%})"
    say(console, f"{lost}; written: {out}")
