"""Write checkpoints in the background, while training goes on."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from umd.checkpoint import checkpoint_path, save_checkpoint
from umd.errors import UserError
from umd.train.log import NoLog, RunLog
from umd.train.pools import awaited

if TYPE_CHECKING:
    from umd.train.loop import Run


class BackgroundSave:
    """Runs `save_checkpoint` in a thread, one save at a time, while training goes on.

    The thread saves copies in host memory, and waits for the GPU to make them. Its error is raised by the next `save`
    or `wait`, or returned by `lost` or `check`.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._saving: Future | None = None
        self._failed = False  # whether the last save did
        self._host: dict[str, dict[str, Tensor]] = {}  # host copies (pinned for a GPU), reused by each save

    def save(self, root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict, keep: int) -> Path:
        """Start `save_checkpoint` and return its path, before the checkpoint exists. Waits for an earlier save.

        Pinned tensors, copies from a GPU, are saved without another copy: do not change them before `wait`."""
        self.wait()
        for part, named in tensors.items():
            host = self._host.setdefault(part, {})
            for name, tensor in named.items():
                if tensor.is_pinned():
                    host[name] = tensor
                    continue
                if name not in host or host[name].shape != tensor.shape:
                    host[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
                host[name].copy_(tensor.detach(), non_blocking=True)
        copied = torch.cuda.Event() if torch.cuda.is_available() else None
        if copied is not None:
            copied.record()

        def write() -> None:
            if copied is not None:
                copied.synchronize()
            save_checkpoint(root, step, self._host, state, keep)

        self._saving = self._thread.submit(write)
        return checkpoint_path(root, step)

    def check(self, wait: bool = False) -> str:
        """The error of the last save once it has ended (wait: wait for that), or "". Raises the second in a row."""
        if self._saving is None or not (wait or self._saving.done()):
            return ""
        lost = self.lost()
        if lost is not None and self._failed:
            raise lost
        self._failed = lost is not None
        return str(lost or "")

    def lost(self) -> UserError | None:
        """Wait until the last save has ended; return its error."""
        try:
            self.wait()
        except UserError as error:
            return error
        return None

    def linger(self) -> None:
        """Give the last save 25 s to end, before this process ends for another's fault. Raises nothing."""
        saving = self._saving  # the main thread may set it to None meanwhile
        wait([saving] if saving else [], 25.0)  # torchrun and Slurm kill after 30

    def wait(self) -> None:
        """Wait until the last save has ended; raise its error."""
        if self._saving is not None:
            try:
                awaited(self._saving, "the checkpoints")
            finally:
                self._saving = None  # not before: meanwhile `linger` may wait for it too, in another thread


def save_last(run: "Run", log: RunLog | NoLog) -> None:
    """Save the last step, unless it is. All ranks call this together."""
    if lost := run.settle_save():
        log.say(f"{lost}; the last step is tried now")
    if run.saved_step != run.number:
        run.save()
    run.written()


@contextmanager
def finished(background: BackgroundSave | None, say: Callable[[str], object]) -> Iterator[None]:
    """However the block ends, finish writing the checkpoint in the background.

    If the block fails, a failed save is only said, so that it does not hide the block's error.
    """
    try:
        yield
    except BaseException:
        if background is not None and (lost := background.lost()):
            say(str(lost))
        raise
    if background is not None:
        background.wait()
