"""List a folder: pictures, class folders, and notes on everything that is not read.

Links to files and folders are followed, as an ImageNet made of links is common. Within a class, each real folder is
read once, so a link that leads back does not loop.
"""

import heapq
import os
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from umd.errors import UserError
from umd.files import again_if_lost

COMMON_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow lists them but cannot decode them by itself
# Folders that file servers, archives and programs create next to the data, in lower case.
SERVICE = {
    "@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "system volume information", "__macosx",
    "__pycache__", "lost+found",
}  # fmt: skip
UNTOLD = {"thumbs.db", "desktop.ini", "quarantine.json"}  # files left out without a note
HEIF = {".heic", ".heif", ".hif"}
NAMED = 5  # most suffixes or folders that a note names

Identity = tuple[int, int]  # device and inode


# Which names are read


@lru_cache(None)
def image_suffixes() -> frozenset[str]:
    """Suffixes of all files that Pillow reads here, in lower case; with .heic if pillow-heif is installed."""
    formats = Image.registered_extensions()
    return frozenset(s for s, kind in formats.items() if kind in Image.OPEN and kind not in NO_PICTURES)


def is_image(name: str) -> bool:
    """Whether a file is read as a picture, judged by its name."""
    small = name.lower()
    # Pillow loads all its readers to list its suffixes; most folders have only common ones.
    known = small.endswith(COMMON_SUFFIXES) or small[small.rfind(".") :] in image_suffixes()
    return known and name[0] != "."


def is_hidden(name: str) -> bool:
    """Whether a file or folder name belongs to some program's own files, which are no part of a source."""
    return name[:1] == "." or name.lower() in SERVICE


# What lies where


class Entries(NamedTuple):
    """The entries directly in a folder, without hidden ones."""

    folders: list[str]
    links: list[str]  # links to folders
    files: list[str]  # pictures
    others: Counter[str]  # number of files that are not read, by suffix
    identity: Identity  # of the folder itself


class Below(NamedTuple):
    """A class folder with all its subfolders. Paths are relative to the source."""

    files: list[str]  # pictures, sorted by the parts of their paths
    folders: dict[str, Identity]  # folders that were read
    passed: list[str]  # links not followed: to folders already read, or to parents of the class
    others: Counter[str]


def listing(folder: Path) -> tuple[list[str], list[str]]:
    """Sorted names of the subfolders and of the image files directly inside, without hidden ones."""
    found = entries(folder)
    return sorted(found.folders + found.links), sorted(found.files)


def entries(folder: Path, is_read: Callable[[str], bool] = is_image) -> Entries:
    """List the entries directly in a folder. is_read: file name -> bool. Raises UserError if it cannot be listed."""
    try:
        return again_if_lost(lambda: look_at(folder, is_read), folder)
    except OSError as error:
        where = error.filename or folder
        raise UserError(f"cannot list folder {where} ({error.strerror}): check that it can be read.") from error


def look_at(folder: Path, is_read: Callable[[str], bool]) -> Entries:
    folders, links, files, others = list[str](), list[str](), list[str](), Counter[str]()
    status = os.stat(folder)
    with os.scandir(folder) as inside:
        for entry in inside:
            name = entry.name
            if name[0] == ".":
                continue
            try:
                if entry.is_dir():
                    if not is_hidden(name):
                        (links if entry.is_symlink() else folders).append(name)
                # A dead link counts as a file and fails when read. FIFOs, sockets and devices do not: opening may hang.
                elif is_read(name):
                    if entry.is_file() or not os.path.exists(entry.path):
                        files.append(name)
                elif name.lower() not in UNTOLD:
                    others[suffix_of(name)] += 1
            except OSError:  # a link whose target cannot be examined
                if not is_read(name):
                    raise
                files.append(name)
    return Entries(folders, links, files, others, (status.st_dev, status.st_ino))


def above(folder: Path) -> frozenset[Identity]:
    """Identities of a folder and all its parents. A link from below to one of them leads back."""
    real = Path(os.path.realpath(folder))
    return frozenset((s.st_dev, s.st_ino) for path in (real, *real.parents) for s in (os.stat(path),))


def files_below(
    root: Path, name: str, outside: frozenset[Identity], is_read: Callable[[str], bool] = is_image
) -> Below:
    """List the pictures in a class folder and all its subfolders. outside: `above` of the root."""
    found = Below([], {}, [], Counter())
    seen, left, links = set(outside), [name], list[str]()
    while left or links:
        below = left.pop() if left else heapq.heappop(links)  # links last and sorted, so the result is deterministic
        here = entries(root / below, is_read)
        if here.identity in seen:
            found.passed.append(below)
            continue
        seen.add(here.identity)
        found.folders[below] = here.identity
        left += [f"{below}/{folder}" for folder in here.folders]
        for link in here.links:
            heapq.heappush(links, f"{below}/{link}")
        found.files.extend(f"{below}/{file}" for file in here.files)
        found.others.update(here.others)
    found.files.sort(key=lambda path: path.split("/"))
    return found


# What is told


def notes_of(below: list[Below], loose: Counter[str]) -> list[str]:
    """Notes on what is not read in a folder of classes. loose: files directly in it that are not read, by suffix."""
    notes = []
    if passed := [path for part in below for path in part.passed]:
        notes.append(f"links that lead back to folders already read are passed over: {named(passed)}")
    of: dict[Identity, list[str]] = {}
    for part in below:
        for path, identity in part.folders.items():
            of.setdefault(identity, []).append(path)
    if twice := [" and ".join(paths) for paths in of.values() if len(paths) > 1]:
        notes.append(f"one folder in several classes, by links: {named(twice)}")
    others = sum((part.others for part in below), loose)
    return notes + ([unread(others)] if others else [])


def unread(others: Mapping[str, int]) -> str:
    """Say how many files of which suffix are not read, and what to do if they are pictures."""
    counts = Counter(others).most_common()
    kinds = [f"{count:,} {suffix or 'without a suffix'}" for suffix, count in counts[:NAMED]]
    if len(counts) > NAMED:
        kinds.append(f"{sum(count for _, count in counts[NAMED:]):,} of {len(counts) - NAMED} other suffixes")
    total = sum(others.values())
    note = f"{total:,} file{'s are' if total > 1 else ' is'} not read: {', '.join(kinds)}"
    if HEIF & others.keys():
        note += "; `pip install pillow-heif` has .heic and .heif read"
    if any(not suffix or suffix[1:].rpartition(".")[2].isdigit() for suffix in others):
        note += (
            f"; pictures are known by their suffix ({' '.join(COMMON_SUFFIXES[:3])} ...): rename those that are some"
        )
    return note


def suffix_of(name: str) -> str:
    """A file name's suffix in lower case, "" without one. A number keeps the suffix before it, as in `.jpeg.1`."""
    stem, suffix = os.path.splitext(name.lower())
    return os.path.splitext(stem)[1] + suffix if suffix[1:].isdigit() else suffix


def no_pictures(folder: Path | str, others: Mapping[str, int]) -> str:
    """Error message for a folder without pictures: why it has none, and what to do."""
    if not others:
        return f"{folder} has no images"
    return (
        f"{folder} has no images that can be read ({unread(others)}; convert other kinds of pictures to .jpg or .png)"
    )


def named(paths: list[str]) -> str:
    more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    return ", ".join(paths[:NAMED]) + more
