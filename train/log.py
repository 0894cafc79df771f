"""The log of a run: metrics.jsonl, scalars and pictures for TensorBoard and W&B, a progress bar."""

import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import BinaryIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from umd.errors import UserError
from umd.files import write_whole
from umd.images import save_png
from umd.train.console import say
from umd.train.curves import WINDOW, Comparison, Curve

PLAIN_SECONDS = 10.0  # between progress lines if there is no terminal for a bar


class RunLog:
    """Writes metrics and pictures of a run from step `start` on. Rows of later steps, of a killed run, are removed.

    If the disk or W&B fails later, training goes on without what could not be written.

    Args:
        project: Weights & Biases project to log to as well, with `settings`. "": none.
        reference: curve to compare losses with, or None.

    Raises:
        UserError: a W&B project is given and wandb cannot be used.
    """

    def __init__(
        self, out: Path, console: Console, start: int, name: str, project: str = "", settings: dict | None = None,
        reference: Curve | None = None,
    ):  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.console, self.name = out, console, name
        with self._writes():
            self._drop_rows_after(start)
            self._rows: BinaryIO | None = self._open_rows()
            self._board: SummaryWriter | None = self._open_board(purge_step=start + 1 if start else None)
        self._wandb = None
        if project:
            try:
                self._wandb = open_wandb(out, project, settings)
            except Exception as error:
                if not start:
                    raise
                self.say(f"{error}; the run goes on without")  # it may have been started again at night
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}% {task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=1.0, note="")
        self._beside = Comparison(reference, start)
        self._last_line = 0.0
        self._failing: set[str] = set()  # what could not be written last time
        self._board_at = 0.0  # when TensorBoard's writer may be opened again

    def _open_rows(self) -> BinaryIO:
        """Open metrics.jsonl to append lines, after a line that a full disk or a kill cut short."""
        rows = (self.out / "metrics.jsonl").open("ab+")
        if rows.tell():
            rows.seek(-1, os.SEEK_END)
            rows.write(b"" if rows.read() == b"\n" else b"\n")
        return rows

    def _open_board(self, purge_step: int | None = None) -> SummaryWriter:
        return SummaryWriter(str(self.out / "tensorboard"), purge_step=purge_step)

    def __enter__(self) -> "RunLog":
        # TensorBoard's thread would print a traceback for a full disk, though this thread tells it too.
        threading.excepthook = lambda hook: issubclass(hook.exc_type, OSError) or threading.__excepthook__(hook)
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Close all files."""
        closes = []
        if self._rows is not None:
            closes.append(("metrics.jsonl", self._rows.close))
        if self._board is not None:
            closes.append(("tensorboard/", self._board.close))
        if self._wandb is not None:
            closes.append(("W&B's log", self._wandb.finish))
        try:
            with suppress(SystemExit, OSError):  # the terminal may be closed
                self._bar.stop()
            for what, close in closes:
                with self._tries(what, Exception):
                    close()
        finally:
            threading.excepthook = threading.__excepthook__

    @contextmanager
    def _writes(self) -> Iterator[None]:
        """Turn a full or missing disk into a UserError. (TensorBoard's thread may notice it a little earlier.)"""
        try:
            yield
        except OSError as error:
            where = os.fsdecode(error.filename or self.out)
            mend = "make room there, or mount it again"
            if not self.out.exists():
                mend = f"{self.out} was moved or removed; move it back"
            raise UserError(
                f"cannot write to {where} ({error.strerror or error}): {mend}; then the same command goes on from the "
                "last checkpoint"
            ) from error

    @contextmanager
    def _tries(self, what: str, *others: type[Exception]) -> Iterator[None]:
        """A log that cannot be written ends no run. Say so, once until `what` is written again."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, (OSError, UserError, *others)):
                raise
            if what not in self._failing:
                mend = "; make room, or mount the disk again" if isinstance(error, (OSError, UserError)) else ""
                self.say(f"cannot write {what} ({error}): training goes on without{mend}")
            self._failing.add(what)
        else:
            self._failing.discard(what)

    def _to_board(self, add: Callable[[SummaryWriter], object]) -> None:
        """Call `add` with TensorBoard's writer. After an error its thread is dead: another is opened a minute later."""
        if self._board is None and time.monotonic() < self._board_at:
            return
        self._board_at = time.monotonic() + 60  # each one that is opened leaves a file
        with self._tries("tensorboard/", Exception):
            board, self._board = self._board or self._open_board(), None
            add(board)
            self._board = board

    def row(self, row: dict) -> None:
        """Log one step. The row is flushed, so it survives a kill right after."""
        if (loss := self._beside.add(row["step"], row["loss"])) is not None:
            row = row | {"loss_reference": loss}
            self.say(f"mean of the losses logged in {WINDOW} steps: {self._beside.note}")
        self.scores(row)
        note = f"step {row['step']}  loss {row['loss']:.4f}  {row['images_per_second']:.0f} img/s  MFU {row['mfu']:.0%}"
        self._bar.update(self._task, note=note)
        if not self.console.is_terminal and time.monotonic() - self._last_line > PLAIN_SECONDS:
            self._last_line = time.monotonic()
            self.say(f"{self._bar.tasks[0].completed:4.0%}  {note}")

    def scores(self, row: dict, **settings: float) -> None:
        """Log values of a step without printing a line. settings: how they were made; kept in the row, not plotted."""
        with self._tries("metrics.jsonl"):
            rows, self._rows = self._rows or self._open_rows(), None  # after an error it is opened anew
            rows.write(json.dumps(row | settings).encode() + b"\n")
            rows.flush()
            self._rows = rows
        scalars = [(key, value) for key, value in row.items() if key not in ("step", "seconds")]

        def add(board: SummaryWriter) -> None:
            for key, value in scalars:
                board.add_scalar(key, value, row["step"])

        self._to_board(add)
        if self._wandb is not None:
            with self._tries("W&B's log", Exception):
                self._wandb.log(row, step=row["step"])

    def progress(self, share: float) -> None:
        self._bar.update(self._task, completed=min(share, 1.0))

    def file(self, path: Path, content: bytes) -> None:
        """Write a file of the run, whole."""
        with self._tries(path.name):
            write_whole(path, content)

    def picture(self, name: str, sheet: np.ndarray, step: int) -> None:
        """Write a picture, uint8 [H, W, 3], to images/NAME-STEP.png and to TensorBoard."""
        with self._tries("images/"):
            save_png(sheet, self.out / "images" / f"{name}-{step:08d}.png")
        self._to_board(lambda board: board.add_image(name, sheet, step, dataformats="HWC"))
        if self._wandb is not None:
            import wandb

            with self._tries("W&B's log", Exception):
                self._wandb.log({name: wandb.Image(sheet)}, step=step)

    def say(self, text: str) -> None:
        say(self.console, f"{self.name}: {text}")

    def _drop_rows_after(self, start: int) -> None:
        """Keep the rows up to `start`. If others are more than a kill leaves, keep the whole old file as well."""
        file = self.out / "metrics.jsonl"
        rows, damaged = parsed(file)
        if damaged or (rows and not start):
            old = next(path for i in count(1) if not (path := self.out / f"metrics-old-{i}.jsonl").exists())
            shutil.copyfile(file, old)
            why = f"{damaged} damaged lines" if damaged else "rows of a run whose checkpoints are gone"
            self.say(f"{file} has {why}; it is kept as {old.name}, and goes on from step {start}")
        kept = [row for row in rows if row["step"] <= start]
        write_whole(file, "".join(json.dumps(row) + "\n" for row in kept).encode())


class NoLog:
    """The log of a rank that does not log: ignores everything."""

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def row(self, row: dict) -> None:
        pass

    def scores(self, row: dict, **settings: float) -> None:
        pass

    def progress(self, share: float) -> None:
        pass

    def picture(self, name: str, sheet: np.ndarray, step: int) -> None:
        pass

    def file(self, path: Path, content: bytes) -> None:
        pass

    def say(self, text: str) -> None:
        pass


def open_wandb(out: Path, project: str, settings: dict | None):
    """Open the W&B run of this folder; a resumed run keeps its W&B run. Raises UserError if wandb cannot be used."""
    check_wandb()
    import wandb

    file = out / "wandb-id"
    if not file.exists():
        write_whole(file, secrets.token_hex(4).encode())
    try:
        return wandb.init(
            project=project, id=file.read_text(), name=out.name, dir=out, config=settings, resume="allow",
            settings=wandb.Settings(quiet=True),
        )  # fmt: skip
    except wandb.errors.Error as error:
        raise UserError(f"Weights & Biases: {error} Or WANDB_MODE=offline, or without --wandb") from error


def read_metrics(file: Path) -> list[dict]:
    """Read the rows of a metrics.jsonl. Skips damaged lines."""
    return parsed(file)[0]


def parsed(file: Path) -> tuple[list[dict], int]:
    """The rows of a metrics.jsonl, and the number of damaged lines, without a last one that a kill cut short."""
    rows, damaged = [], 0
    for line in file.read_bytes().splitlines(keepends=True) if file.exists() else []:
        try:
            row = json.loads(line)
            if not isinstance(row["step"], int):
                raise ValueError("a step is a number")
            rows.append(row)
        except (ValueError, KeyError, TypeError):
            damaged += line.endswith(b"\n")
    return rows, damaged


def check_wandb() -> None:
    """Raise UserError if wandb is not installed."""
    if find_spec("wandb") is None:
        raise UserError("wandb is not installed: pip install wandb, or leave out --wandb")
