"""`umd check-data`: every file of a source is read and decoded once, on all cores; the unusable go into quarantine."""

import json
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import simplejpeg
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import track
from rich.table import Table

from umd.errors import UserError
from umd.files import check_place, write_whole
from umd.train.folders import files_below, listing
from umd.train.quarantine import default_path
from umd.train.sources import flatten
from umd.train.tars import is_tars, samples, split_tars
from umd.train.waiting import in_order

CHUNK = 32  # files a process takes at a time
OUTSIDE, EMPTY = "outside a class folder", "empty class"


@dataclass(frozen=True)
class CheckData:
    """Read every image of a source once; list those that no reader shall use, with the reason."""

    min_side: int = 16
    """Fewest pixels that the shorter side of a picture must have."""
    workers: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    """Processes that read."""
    out: Path | None = None
    """Where the list goes; default: quarantine.json in the source, where runs find it by themselves."""

    def __post_init__(self) -> None:
        for name in ("min_side", "workers"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Finding:
    """One unusable file, or class folder (its path then ends in /)."""

    path: str  # relative to the source
    reason: str
    detail: str = ""


def examine(encoded: bytes, min_side: int) -> tuple[str, str] | None:
    """(reason, detail) why an image file is unusable, or None.

    A JPEG decoder paints what it cannot read in grey and only warns; here a warning is an error. Damage that leaves a
    valid stream of codes is a picture like any other, and no reader of one file can tell.
    """
    if not encoded:
        return "zero bytes", ""
    try:
        with Image.open(BytesIO(encoded)) as image:
            size, kind = image.size, image.format
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
    except Exception as error:  # Pillow's readers raise many kinds on damaged data
        detail = " ".join(str(error).split()) or type(error).__name__
        cut_off = "Premature end of JPEG file" in detail or "truncated" in detail.lower()
        return "truncated" if cut_off else "damaged", detail
    return None


def examine_files(files: list[tuple[str, Any]], min_side: int) -> list[Finding]:
    findings = []
    for path, file in files:
        try:
            found = examine(Path(file).read_bytes() if isinstance(file, str) else file.read(), min_side)
        except OSError as error:
            found = "unreadable", error.strerror or str(error)
        if found:
            findings.append(Finding(path, *found))
    return findings


def files_of(source: Path) -> tuple[list[tuple[str, Any]], dict[str, list[str]], list[Finding]]:
    """(path in the source, file) of every image that readers would use; those paths by class folder; what lies wrong.

    Raises UserError if the source is no folder of images or tars.
    """
    if not source.exists() or not (source.is_dir() or source.suffix == ".tar"):
        raise UserError(f"{source} is no folder of images and no .tar: umd check-data reads these.")
    if is_tars(source):
        files = []
        for tars in split_tars(source).values():
            prefix = "" if source.suffix == ".tar" or tars[0].parent == source else f"{tars[0].parent.name}/"
            listed = samples(tuple(tars)).pictures
            files += [(prefix + key, member) for key, member in zip(listed.keys(), listed, strict=True)]
        return files, {}, []
    subfolders, _ = listing(source)
    tests = [name for name in ("test", "val") if name in subfolders]
    if "train" not in subfolders or not tests:
        return files_in(source, "")
    outside = [Finding(name, OUTSIDE) for name in listing(source)[1]]
    (files, classes, wrong), test = files_in(source, "train"), files_in(source, tests[0])
    return files + test[0], classes | test[1], outside + wrong + test[2]


def files_in(source: Path, split: str) -> tuple[list[tuple[str, Any]], dict[str, list[str]], list[Finding]]:
    """`files_of` one folder of classes, or of images: the source, or its subfolder `split`."""
    root = source / split
    subfolders, loose = ([(root / name).relative_to(source) for name in names] for names in listing(root))
    classes: dict[str, list[str]] = {}
    for subfolder in subfolders:
        classes[f"{subfolder.as_posix()}/"] = files_below(source, subfolder.as_posix())[0]
    wrong = [Finding(folder, EMPTY) for folder, paths in classes.items() if not paths]
    paths = [path for inside in classes.values() for path in inside]
    outside = [path.as_posix() for path in loose]
    if paths:
        wrong += [Finding(path, OUTSIDE) for path in outside]
    elif not outside:
        raise UserError(f"{root} has no images.")
    files = [(path, str(source / path)) for path in paths or outside]
    return files, {folder: inside for folder, inside in classes.items() if inside}, wrong


def check_data(source: Path, options: CheckData, console: Console) -> Path:
    """Examine a source, print what was found, and write the list. Returns its path."""
    source = source.expanduser()
    out = options.out or default_path(source)
    if source.exists():
        check_place(
            out, instead=f"give another place, e.g. --out {source.stem}.json; runs read it by --data.quarantine"
        )
    files, classes, findings = files_of(source)
    jobs = [files[i : i + CHUNK] for i in range(0, len(files), CHUNK)]
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        done = track(
            in_order(pool, partial(examine_files, min_side=options.min_side), jobs, source, 4 * options.workers),
            description=f"reading {len(files)} images", total=len(jobs), console=console, transient=True,
        )  # fmt: skip
        for found in done:
            findings += found
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


def print_findings(report: dict, out: Path, console: Console) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2))
    for reason, count in report["counts"].items():
        first = next(entry for entry in report["files"] if entry["reason"] == reason)
        table.add_row(str(count), reason, f"{first['path']}{', ...' if count > 1 else ''}")
    console.print(table)
    lost = f"{report['left_out']} of {report['images']} images in quarantine ({report['share']:.2%})"
    console.print(f"{lost}; written: {out}", highlight=False, markup=False, soft_wrap=True)
