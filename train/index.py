"""Lists of a million files: names in one array of bytes, kept on disk for the next start and mapped by every process.

A Python string costs 60 bytes and more, and a forked worker that looks at one copies the page it lies in: eight ranks
of eight workers would hold a million names 72 times. Here the kernel holds one copy.
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

from umd.files import write_whole

log = logging.getLogger("umd")

INDEXED_FROM = 20_000  # files: what is smaller is listed in less time than it takes to look
SETTLED = 2.0  # seconds: a folder that changed later might change again within the clock tick of its time stamp
TYPES: dict[str, np.dtype[Any]] = {"I64": np.dtype("<i8"), "U8": np.dtype("u1")}
Arrays = dict[str, np.ndarray]


class Names(Sequence[str]):
    """Strings [N] as one array of bytes. Any of them may be taken, in any order, without copying the bytes.

    data: uint8, all of them one after another; ends: int64 [M], where each ends.
    rows: int64 [N], which of the M; None: all. prefix: what each begins with.
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
        index = range(len(self))[index]  # negative ones too; IndexError beyond
        row = index if self.rows is None else int(self.rows[index])
        start = int(self.ends[row - 1]) if row else 0
        return self.prefix + self.data[start : int(self.ends[row])].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        """All of them, faster than one by one."""
        if self.rows is not None:
            yield from map(self.__getitem__, range(len(self)))
            return
        start, data = 0, self.data.tobytes()
        for end in self.ends.tolist():
            yield self.prefix + data[start:end].decode("utf-8", "surrogateescape")
            start = end

    def sums(self) -> np.ndarray:
        """CRC-32 of each, without the prefix: uint32 [N]."""
        rows = np.arange(len(self.ends)) if self.rows is None else self.rows
        ends, data = self.ends[rows], memoryview(self.data.tobytes())
        starts = np.where(rows > 0, self.ends[rows - 1], 0)
        places = zip(starts.tolist(), ends.tolist(), strict=True)
        return np.fromiter((zlib.crc32(data[start:end]) for start, end in places), np.uint32, len(rows))

    def first_without(self, *suffixes: str) -> str | None:
        """The first that ends with none of these, in capitals or not; None if there is none."""
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
        """Those at some places, int64 [n]."""
        return Names(self.data, self.ends, rows if self.rows is None else self.rows[rows], self.prefix)


# On disk


def kept(what: str, source: Path, make: Callable[[], tuple[Arrays, list[Path], int]]) -> Arrays:
    """What `make` finds out about a source: its arrays, the folders or files they were read from, and how many files
    they list. The next call maps the arrays from disk, unless one of the former has changed meanwhile."""
    name = hashlib.sha256(f"{what} {os.path.abspath(source)}".encode("utf-8", "surrogateescape")).hexdigest()[:24]
    try:
        file = cache_folder() / f"{name}.safetensors"
    except RuntimeError:  # a user without a home
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
        flat = {name: np.ascontiguousarray(array) for name, array in arrays.items()}  # `save` takes it for granted
        sums = {name: zlib.crc32(array.data) for name, array in flat.items()}
        about = {"source": str(source), "stamps": json.dumps(stamps), "crc32": json.dumps(sums)}
        write_whole(file, save(flat, about))
    except OSError as error:
        log.warning("the list of %d files is not kept (%s): each process lists them anew", count, error)
        return arrays
    return mapped(file) or arrays


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/umd, or ~/.cache/umd. Hosts that share it list a source once. RuntimeError without a home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "umd"


def mapped(file: Path) -> Arrays | None:
    """The arrays of a list, memory-mapped; None if there is none, it is damaged, or what it was made of has changed."""
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
        return None  # made anew


def stamp(path: Path | str) -> list[int] | None:
    """Of a folder or file: time (ns) its contents changed, size of a file, number, time (ns) anything changed; None if
    it is gone. Adding, removing and renaming an entry change a folder's times. Not the device: hosts number a network
    disk each in their own way."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    size = 0 if S_ISDIR(status.st_mode) else status.st_size
    return [status.st_mtime_ns, size, status.st_ino, status.st_ctime_ns]
