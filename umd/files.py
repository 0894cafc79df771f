"""Files written whole or not at all, their checksums, and files read here and there."""

import errno
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from umd.errors import UserError

STALE_WAITS = (0.1, 1.0, 5.0)  # seconds between attempts
T = TypeVar("T")


def again_if_stale(call: Callable[[], T], path: Path) -> T:
    """`call()`, made anew where a network disk gives a stale handle (ESTALE): a file was replaced on another host, or
    the server came back, and names are looked up again. Raises UserError where that does not help."""
    for seconds in (*STALE_WAITS, None):
        try:
            return call()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        if seconds is not None:
            time.sleep(seconds)
    raise UserError(
        f"{path} is on a network disk whose handle stays stale (ESTALE): the server was restarted, or the folder there "
        "was replaced; mount it again on this host and repeat the command, which goes on from what is finished"
    )


def write_whole(path: Path, data: bytes) -> None:
    """Put `data` at `path` so that whoever looks, and whatever kills this process, finds all of it or what was there.

    Raises OSError with that path, e.g. for a full disk; nothing is left behind then.
    """
    try:
        again_if_stale(lambda: _write_whole(path, data), path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def _write_whole(path: Path, data: bytes) -> None:
    with written_whole(path) as unfinished:
        unfinished.write_bytes(data)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Where to write a file beside `path`, whose place it takes, flushed, when the block ends; of a block that fails
    nothing is left. Raises OSError."""
    # Ranks of several hosts may write one file, and have one number there.
    unfinished = path.with_name(f".unfinished-{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        yield unfinished
        flush(unfinished)
        unfinished.rename(path)
        flush(path.parent)
    except BaseException:
        with suppress(OSError):  # a folder that is not there, or cannot be written, has none
            unfinished.unlink(missing_ok=True)
        raise


def check_place(*files: Path, instead: str = "give another --out") -> None:
    """Raise UserError where a file could not be written: before the work, whose result would be lost after it.

    A folder in the way, a parent that is a file, no permission and a full disk are found; a file that is there is left
    as it is. instead: what to do, in words.
    """
    for file in files:
        make_folder(file.parent, instead)
        if file.is_dir():
            raise UserError(f"{file} is a folder, and a file is to be written there; {instead}")
        trial = file.with_name(f".unfinished-trial-{os.getpid()}-{secrets.token_hex(4)}")
        try:
            try:
                trial.write_bytes(bytes(4096))  # a full disk still makes empty files
            finally:
                trial.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {file} ({error.strerror or error}); {instead}") from error


def make_folder(path: Path, instead: str = "give another one to write to") -> None:
    """Make a folder and those above it. Raises UserError where that cannot be, e.g. below a file."""
    try:
        again_if_stale(lambda: path.mkdir(parents=True, exist_ok=True), path)
    except OSError as error:
        reason = "it is a file" if path.is_file() else error.strerror or error
        raise UserError(f"cannot make the folder {path} ({reason}); {instead}") from error


def sha256(path: Path) -> str:
    return again_if_stale(lambda: _sha256(path), path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """fsync of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class OpenFile:
    """A file opened for reads here and there, of which the system reads nothing unasked.

    Raises OSError where it cannot be opened or read; advice that a file system does not take is no error.
    """

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY)
        self._advise(0, 0, "POSIX_FADV_RANDOM")

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def _advise(self, start: int, size: int, advice: str) -> None:
        if hasattr(os, advice):  # on Linux
            with suppress(OSError):
                os.posix_fadvise(self.descriptor, start, size, getattr(os, advice))

    def expect(self, start: int, size: int) -> None:
        """Have the disk begin to read what will be asked for: nothing waits, and what is in memory is not read."""
        self._advise(start, size, "POSIX_FADV_WILLNEED")

    def read_into(self, buffer: memoryview, start: int) -> bool:
        """Fill the buffer; False if the file ends before."""
        while len(buffer) and (count := os.preadv(self.descriptor, [buffer], start)):
            buffer, start = buffer[count:], start + count
        return not len(buffer)
