"""Which pictures of a source without splits of its own are held out as its test split."""

import hashlib
import math
from collections.abc import Iterable

import numpy as np

from umd.errors import UserError


def hashes_of(keys: Iterable[str]) -> np.ndarray:
    """The first eight bytes of the SHA-256 of each key: uint64 [N]."""
    digests = b"".join(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8] for key in keys)
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def held_out(hashes: np.ndarray, holdout: float) -> np.ndarray:
    """Whether each item is held out: bool [N]. It depends only on the hash of its own name."""
    below = math.ceil(holdout * 2**64)  # 2**64, for a holdout of 1, is no uint64
    return hashes <= np.uint64(max(below - 1, 0)) if below else np.zeros(len(hashes), bool)


def in_test_split(key: str, holdout: float) -> bool:
    return bool(held_out(hashes_of([key]), holdout)[0])


def choose_split(hashes: np.ndarray, split: str, holdout: float, name: str) -> np.ndarray:
    """Indices (int64) of the items in `split`. The test split may be empty if `holdout` is 0.

    Raises UserError if no training items are left.
    """
    held = held_out(hashes, holdout)
    if split == "train" and held.all():
        raise UserError(f"no image of {name} is left to train on at holdout={holdout}: lower it.")
    return np.flatnonzero(held == (split == "test"))
