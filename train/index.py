"""Lists of a million files: names in one array of bytes, kept on disk and memory-mapped by every process.

A Python string takes at least 60 bytes, and a forked worker that reads one copies its memory page (reference counts).
Eight ranks with eight workers each would hold a million names 72 times. Here all share one copy in the page cache.
"""

import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from stat import S_ISDIR
from typing import Any

import numpy as np
from safetensors.numpy import save

from umd.files import cache_folder, write_whole

log = logging.getLogger("umd")

INDEXED_FROM = 20_000  # files; a shorter list is made as fast as it is checked
SETTLED = 2.0  # seconds; a folder that changed more recently might change again within one tick of its time stamp
TYPES: dict[str, np.dtype[Any]] = {"I64": np.dtype("<i8"), "U8": np.dtype("u1")}
Arrays = dict[str, np.ndarray]


class Names(Sequence[str]):
    """N strings in one array of bytes. A selection, in any order, shares the bytes.

    Args:
        data: uint8, M strings one after another.
        ends: int64 [M], end of each string in data.
        rows: int64 [N], indices of the selected strings. None: all M.
        prefix: put before each string.
    """

    def __init__(self, data: np.ndarray, ends: np.ndarray, rows: np.ndarray | None = None, prefix: str = ""):
        self.data, self.ends, self.rows, self.prefix = data, ends, rows, prefix

    @classmethod
    def of(cls, texts: Iterable[str], prefix: str = "") -> "Names":
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return cls(np.frombuffer(b"".join(encoded), np.uint8), lengths.cumsum(), prefix=prefix)

    def __len__(self) -> int:
        return len(self.ends if self.rows is None else self.rows)

    def __getitem__(self, index):  # slices are not needed
        index = range(len(self))[index]  # handles negative indices; IndexError if out of range
        row = index if self.rows is None else int(self.rows[index])
        start = int(self.ends[row - 1]) if row else 0
        return self.prefix + self.data[start : int(self.ends[row])].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        """Iterate over all strings, ten times as fast as by index."""
        data = self.data.tobytes()
        for start, end in self.places():
            yield self.prefix + data[start:end].decode("utf-8", "surrogateescape")

    def places(self) -> Iterator[tuple[int, int]]:
        """Start and end of each string in the bytes."""
        rows = np.arange(len(self.ends)) if self.rows is None else self.rows
        starts = np.where(rows > 0, self.ends[rows - 1], 0)
        return zip(starts.tolist(), self.ends[rows].tolist(), strict=True)

    def sums(self) -> np.ndarray:
        """CRC-32 of each string without the prefix: uint32 [N]."""
        data = memoryview(self.data.tobytes())
        return np.fromiter((zlib.crc32(data[start:end]) for start, end in self.places()), np.uint32, len(self))

    def first_without(self, *suffixes: str) -> str | None:
        """The first string that ends with none of these suffixes (case ignored). None if there is none."""
        rows = np.arange(len(self)) if self.rows is None else self.rows
        ends = self.ends[rows]
        lengths = ends - np.where(rows > 0, self.ends[rows - 1], 0)
        good = np.zeros(len(rows), bool)
        for suffix in suffixes:
            wanted = np.frombuffer(suffix.encode(), np.uint8)
            long = np.flatnonzero(lengths >= len(wanted))
            last = self.data[ends[long, None] + np.arange(-len(wanted), 0)]  # [n, len(suffix)]
            capital = (last >= ord("A")) & (last <= ord("Z"))
            good[long] |= (last + 32 * capital.astype(np.uint8) == wanted).all(1)
        return None if good.all() else self[int(good.argmin())]

    def take(self, rows: np.ndarray) -> "Names":
        """Select the strings at indices `rows`, int64 [n]."""
        return Names(self.data, self.ends, rows if self.rows is None else self.rows[rows], self.prefix)


def sums_of(names: Iterable[str]) -> np.ndarray:
    """CRC-32 of each name: uint32 [N]."""
    return np.fromiter((zlib.crc32(name.encode("utf-8", "surrogateescape")) for name in names), np.uint32)


# On disk


def kept(what: str, source: Path, make: Callable[[], tuple[Arrays, list[Path], int]]) -> Arrays:
    """Cache the arrays that `make` returns for a source.

    make: returns the arrays, the folders or files that they were made from, and the number of files listed. The next
        call maps the arrays from disk, unless one of these folders or files has changed.
    what: distinguishes several lists of one source.

    Hosts that share a cache folder list a source once.
    """
    name = hashlib.sha256(f"{what} {os.path.abspath(source)}".encode("utf-8", "surrogateescape")).hexdigest()[:24]
    try:
        file = cache_folder() / f"{name}.safetensors"
    except RuntimeError:  # the user has no home folder
        return make()[0]
    if (found := mapped(file)) is not None:
        return found
    began = time.time()
    arrays, origins, count = make()
    stamps = {os.path.abspath(path): stamp(path) for path in origins}
    settled = all(then is not None and then[0] < (began - SETTLED) * 1e9 for then in stamps.values())
    if count < INDEXED_FROM or not settled:
        return arrays
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        flat = {name: np.ascontiguousarray(array) for name, array in arrays.items()}  # as `save` requires
        sums = {name: zlib.crc32(array.data) for name, array in flat.items()}
        about = {"source": str(source), "stamps": json.dumps(stamps), "crc32": json.dumps(sums)}
        write_whole(file, save(flat, about))
    except OSError as error:
        log.warning("the list of %d files is not kept (%s): each process lists them anew", count, error)
        return arrays
    return mapped(file) or arrays


def mapped(file: Path) -> Arrays | None:
    """Memory-map the arrays of a kept list. None if there is none, it is damaged, or its source has changed."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        kept_about = header.pop("__metadata__")
        stamps, sums = json.loads(kept_about["stamps"]), json.loads(kept_about["crc32"])
        if any(stamp(path) != then for path, then in stamps.items()):
            return None
        found = {}
        for name, about in header.items():
            dtype, shape, start = TYPES[about["dtype"]], tuple(about["shape"]), 8 + length + about["data_offsets"][0]
            found[name] = np.empty(shape, dtype) if 0 in shape else np.memmap(file, dtype, "r", start, shape)
            if zlib.crc32(found[name].data) != sums[name]:  # 40 ms for a million names
                return None
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
        return None  # the caller makes it again


def stamp(path: Path | str) -> list[int] | None:
    """mtime (ns), size (files only), inode number and ctime (ns) of a folder or file. None if it is gone.

    Adding, removing or renaming an entry changes a folder's times. The device number is not used, as hosts number a
    network disk differently.
    """
    try:
        status = os.stat(path)
    except OSError:
        return None
    size = 0 if S_ISDIR(status.st_mode) else status.st_size
    return [status.st_mtime_ns, size, status.st_ino, status.st_ctime_ns]
