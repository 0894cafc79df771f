"""Files: atomic writes, checksums, stale network disks, and random reads."""

import errno
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from umd.errors import TemporaryError, UserError

# What a network disk reports when its server was restarted or has dropped this host, as Lustre does.
LOST = (errno.ESTALE, errno.EIO, errno.ESHUTDOWN, errno.ENOTCONN, errno.ETIMEDOUT)
WAITS = (0.1, 1.0, 5.0, 20.0)  # seconds between attempts
T = TypeVar("T")


def again_if_lost(call: Callable[[], T], path: Path) -> T:
    """Return `call()`; repeat it if a network disk is lost for a moment (an OSError of `LOST`).

    A handle gets stale (ESTALE) also when a file was replaced on another host: a new call looks names up again.
    Raises the OSError if it remains after the waits of `WAITS`, a stale handle as TemporaryError naming `path`.
    """
    for seconds in (*WAITS, None):
        try:
            return call()
        except OSError as error:
            if error.errno not in LOST or (seconds is None and error.errno != errno.ESTALE):
                raise
        if seconds is not None:
            time.sleep(seconds)
    raise TemporaryError(
        f"{path} is on a network disk whose handle stays stale (ESTALE): the server was restarted, or the folder there "
        "was replaced; mount it again on this host and repeat the command, which goes on from what is finished"
    )


def exit_status(error: Exception) -> int:
    """The exit status for an error: that of a TemporaryError if a lost network disk is its cause."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in LOST:
            return TemporaryError.code
        cause = cause.__cause__
    return getattr(error, "code", UserError.code)


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically: readers see the old file or the whole new one, even if this process is killed.

    Raises OSError with that path, e.g. for a full disk; nothing is left behind then.
    """
    try:
        again_if_lost(lambda: _write_whole(path, data), path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def _write_whole(path: Path, data: bytes) -> None:
    with written_whole(path) as unfinished:
        unfinished.write_bytes(data)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to within a with block.

    When the block ends, the file is flushed and renamed to `path`. If the block fails, the file is removed. Raises
    OSError.
    """
    # Ranks on several hosts may write the same file and have equal process ids: add random characters.
    unfinished = path.with_name(f".unfinished-{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        yield unfinished
        flush(unfinished)
        unfinished.rename(path)
        flush(path.parent)
    except BaseException:
        with suppress(OSError):  # a folder that is missing or read-only holds no temporary file
            unfinished.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON, in a folder that is made where it is missing. Raises UserError and OSError."""
    make_folder(path.parent)
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def check_place(*files: Path, instead: str = "give another --out") -> None:
    """Check that files can be written, before work whose result would otherwise be lost.

    Existing files are left as they are. instead: advice that ends the error message.

    Raises UserError if a folder has that name, a parent is a file, permission is missing or the disk is full.
    """
    for file in files:
        make_folder(file.parent, instead)
        if file.is_dir():
            raise UserError(f"{file} is a folder, and a file is to be written there; {instead}")
        if file.exists() and not file.is_file():
            raise UserError(f"{file} is a device or pipe, and a file is to be written there; {instead}")
        trial = file.with_name(f".unfinished-trial-{os.getpid()}-{secrets.token_hex(4)}")
        try:
            try:
                trial.write_bytes(bytes(4096))  # a full disk still makes empty files
            finally:
                trial.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {file} ({error.strerror or error}); {instead}") from error


def check_apart(out: Path, source: str | Path) -> None:
    """Raise UserError where an output would lie among the pictures of a source, or write over them."""
    here, data = out.expanduser().resolve(), Path(source).expanduser().resolve()
    if here == data or (data.is_dir() and data in here.parents):
        raise UserError(f"{out} lies in the data that are read ({source}), which would be spoiled; give another --out")


def make_folder(path: Path, instead: str = "give another one to write to") -> None:
    """Make a folder and its parents. Raises UserError if that fails, e.g. below a file."""
    try:
        again_if_lost(lambda: path.mkdir(parents=True, exist_ok=True), path)
    except OSError as error:
        reason = "it is a file" if path.is_file() else error.strerror or error
        raise UserError(f"cannot make the folder {path} ({reason}); {instead}") from error


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/umd, or ~/.cache/umd. It may not exist yet. Raises RuntimeError for a user without a home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "umd"


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    return again_if_lost(lambda: _sha256(path), path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """fsync a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class OpenFile:
    """A file opened for random reads, without the system's read-ahead.

    Raises OSError if it cannot be opened or read. A file system that ignores such advice is no error.
    """

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY)
        self._advise(0, 0, "POSIX_FADV_RANDOM")

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # bound: at exit, `os` may be gone first
        if hasattr(self, "descriptor"):
            close(self.descriptor)

    def _advise(self, start: int, size: int, advice: str) -> None:
        if hasattr(os, advice):  # Linux only
            with suppress(OSError):
                os.posix_fadvise(self.descriptor, start, size, getattr(os, advice))

    def expect(self, start: int, size: int) -> None:
        """Ask the system to start reading these bytes in the background. Does not wait; cached bytes are not read."""
        self._advise(start, size, "POSIX_FADV_WILLNEED")

    def read_into(self, buffer: memoryview, start: int) -> bool:
        """Fill the buffer with the bytes from `start` on. Returns False if the file ends before that."""
        while len(buffer) and (count := os.preadv(self.descriptor, [buffer], start)):
            buffer, start = buffer[count:], start + count
        return not len(buffer)
