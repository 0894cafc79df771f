"""Files that `umd check-data` found unusable: the list, which every reader leaves out, and a run's copy of it."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from umd.errors import UserError
from umd.files import write_whole


@dataclass(frozen=True)
class Quarantine:
    """Reasons by path relative to the source; a path that ends in / is a class folder without a usable image."""

    path: Path | None = None
    reasons: dict[str, str] = field(default_factory=dict)

    def under(self, folder: str) -> dict[str, str]:
        """The entries below a folder of the source, relative to it."""
        prefix = f"{folder}/" if folder else ""
        return {path.removeprefix(prefix): why for path, why in self.reasons.items() if path.startswith(prefix)}


def default_path(source: Path) -> Path:
    """Where the list of a source lies: in a folder of images or tars, or beside a tar."""
    return source / "quarantine.json" if source.is_dir() else source.with_suffix(".quarantine.json")


def read_quarantine(source: Path, given: str) -> Quarantine:
    """The list `given`, or that of the source, or an empty one. Raises UserError if it is missing or damaged."""
    path = Path(given).expanduser() if given else default_path(source)
    if not given and not path.exists():
        return Quarantine()
    try:
        return Quarantine(path, {entry["path"]: entry["reason"] for entry in json.loads(path.read_text())["files"]})
    except OSError as error:
        raise UserError(f"cannot read quarantine list {path} ({error.strerror}): umd check-data writes one.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no quarantine list: make it anew with umd check-data.") from error


def count(reasons: dict[str, str]) -> int:
    """Files of a list; the class folders in it are no pictures."""
    return sum(not path.endswith("/") for path in reasons)


def share_lost(reasons: dict[str, str], left: int) -> float:
    return count(reasons) / max(1, count(reasons) + left)


def summary(reasons: dict[str, str], left: int) -> str:
    """Count, share and reasons in words: `7 in quarantine (1.40 %: 4 truncated, 3 damaged)`."""
    counts = ", ".join(f"{n} {reason}" for reason, n in Counter(reasons.values()).most_common())
    return f"{count(reasons)} in quarantine ({share_lost(reasons, left):.2%}: {counts})"


def record_quarantine(reasons: dict[str, str], left: int, out: Path) -> None:
    """Write quarantine.json into a run's folder: what the run leaves out of its training split, and why."""
    listed = [{"path": path, "reason": reason} for path, reason in sorted(reasons.items())]
    record = {
        "images": left, "left_out": count(reasons), "share": share_lost(reasons, left),
        "counts": dict(Counter(reasons.values()).most_common()), "files": listed,
    }  # fmt: skip
    write_whole(out / "quarantine.json", json.dumps(record, indent=1).encode())
