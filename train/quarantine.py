"""The quarantine list: files that `umd check-data` found unusable and every run leaves out."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from umd.errors import UserError
from umd.files import write_whole


@dataclass(frozen=True)
class Quarantine:
    """Reasons by path, relative to the source. A path that ends in / is a class folder without any usable image."""

    path: Path | None = None
    reasons: dict[str, str] = field(default_factory=dict)

    def under(self, folder: str) -> dict[str, str]:
        """The entries below a folder of the source, with paths relative to that folder."""
        prefix = f"{folder}/" if folder else ""
        return {path.removeprefix(prefix): why for path, why in self.reasons.items() if path.startswith(prefix)}


def default_path(source: Path) -> Path:
    """Default path of a source's list: in a folder of images or tars, or next to a single tar."""
    return source / "quarantine.json" if source.is_dir() else source.with_suffix(".quarantine.json")


def read_quarantine(source: Path, given: str) -> Quarantine:
    """Read the list at `given`, else the source's own, else return an empty one.

    Raises UserError if the given list is missing, or a list is damaged.
    """
    path = Path(given).expanduser() if given else default_path(source)
    if not given and not path.exists():
        return Quarantine()
    try:
        return Quarantine(
            path, {entry["path"]: entry["reason"] for entry in json.loads(path.read_text("utf-8"))["files"]}
        )
    except OSError as error:
        raise UserError(f"cannot read quarantine list {path} ({error.strerror}): umd check-data writes one.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no quarantine list: make it anew with umd check-data.") from error


def count(reasons: dict[str, str]) -> int:
    """Number of files in a list; class folders do not count."""
    return sum(not path.endswith("/") for path in reasons)


def share_lost(reasons: dict[str, str], left: int) -> float:
    return count(reasons) / max(1, count(reasons) + left)


def summary(reasons: dict[str, str], left: int) -> str:
    """Say count, fraction and reasons: `7 in quarantine (1.40 %: 4 truncated, 3 damaged)`."""
    counts = ", ".join(f"{n} {reason}" for reason, n in Counter(reasons.values()).most_common())
    return f"{count(reasons)} in quarantine ({share_lost(reasons, left):.2%}: {counts})"


def record_quarantine(reasons: dict[str, str], left: int, out: Path) -> None:
    """Write quarantine.json into a run's folder: files that the run leaves out of its training split, with reasons."""
    listed = [{"path": path, "reason": reason} for path, reason in sorted(reasons.items())]
    record = {
        "images": left, "left_out": count(reasons), "share": share_lost(reasons, left),
        "counts": dict(Counter(reasons.values()).most_common()), "files": listed,
    }  # fmt: skip
    write_whole(out / "quarantine.json", json.dumps(record, indent=1).encode())
