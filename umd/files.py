"""Files written whole or not at all, and their checksums."""

import hashlib
import os
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Put `data` at `path` so that whoever looks, and whatever kills this process, finds all of it or what was there.

    Raises OSError, e.g. for a full disk; nothing is left behind then.
    """
    unfinished = path.with_name(f".unfinished-{path.name}-{os.getpid()}")
    try:
        unfinished.write_bytes(data)
        flush(unfinished)
        unfinished.rename(path)
        flush(path.parent)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def sha256(path: Path) -> str:
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
