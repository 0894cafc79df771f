"""One command at a time in a folder: a lock that says who holds it, and that nobody has to clear away.

The file `lock.json` names host, process and start. It is taken over without a question where its process is gone. On
the same machine the system tells that. Of another machine, where a job was queued again, nobody can: there the holder
gives a sign of life every few seconds, and a lock without one for `WATCH_SECONDS` is taken over. That is watched, so no
clocks are compared. `flock` would be simpler, but on NFS it may hold for one host alone, or outlive a host that died.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from umd.errors import UserError
from umd.files import make_folder, write_whole

LOCK_FILE = "lock.json"
BEAT_SECONDS = 5.0  # between signs of life
WATCH_SECONDS = 60.0  # without one: longer than anything that keeps the interpreter lock, or a name in an NFS cache
SETTLE_SECONDS = 1.0  # in which another process that takes over the same lock would have written


@contextmanager
def alone_in(out: Path, command: str = "umd") -> Iterator[None]:
    """The folder is this process's while the block runs. Raises UserError, naming the holder, if it is another's.

    Where the block still runs and someone else has taken the folder (this process was suspended for minutes), the
    process ends at once: what it would write belongs to another run.
    """
    make_folder(out, "give another --out")
    lock, me = out / LOCK_FILE, describe(command)
    take(lock, me)
    ended = threading.Event()
    beating = threading.Thread(target=beat, args=(lock, me, ended), name="lock", daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        if read(lock)[0] == me:
            lock.unlink(missing_ok=True)


def describe(command: str) -> dict[str, Any]:
    """Who this process is."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "start": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": command,
        "machine": machine(),
        "ticks": ticks(os.getpid()),
        "token": secrets.token_hex(8),
    }


def machine() -> str:
    """What process numbers are numbers of: a boot of a machine, and in it a container. "" where nothing tells."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def ticks(pid: int) -> int | None:
    """When a process of this machine began, which tells it from a later one of its number. None: it is gone."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(rest[18])  # field 22 of proc(5); a zombie writes no more


def read(lock: Path) -> tuple[dict[str, Any] | None, int]:
    """What the lock says ({} if it cannot be understood, None if there is none), and its last sign of life."""
    try:
        with lock.open("rb") as file:  # opened: NFS may answer for a name from memory, but not for an open file
            seen = os.fstat(file.fileno()).st_mtime_ns
            holder = json.loads(file.read())
    except FileNotFoundError:
        return None, 0
    except ValueError:
        return {}, seen
    return holder if isinstance(holder, dict) else {}, seen


def take(lock: Path, me: dict[str, Any]) -> None:
    """Write the lock, new or over one whose holder is gone. Raises UserError if its holder is at work."""
    data = json.dumps(me, indent=1).encode()
    try:
        with open(lock, "xb") as file:
            file.write(data)
        return
    except FileExistsError:
        holder, _ = read(lock)
    except OSError as error:
        with contextlib.suppress(OSError):  # a full disk leaves an empty file
            if not lock.stat().st_size:
                lock.unlink()
        raise UserError(f"cannot write {lock} ({error.strerror or error}); give another --out") from error
    if holder is not None and at_work(lock, holder):
        raise UserError(
            f"{lock.parent} is in use by {holder.get('command', 'a command')} on {holder.get('host', '?')}, process "
            f"{holder.get('pid', '?')}, since {holder.get('start', '?')}: wait for it or stop it, or give another "
            f"--out. If there is no such process, remove {lock}"
        )
    write_whole(lock, data)
    time.sleep(SETTLE_SECONDS)
    if read(lock)[0] != me:
        raise UserError(f"{lock.parent} was taken by another command at the same moment; wait for it, or give another")


def at_work(lock: Path, holder: dict[str, Any]) -> bool:
    """Whether a lock's holder lives. On another machine its signs of life are waited for."""
    if holder.get("machine") and holder["machine"] == machine():
        return ticks(holder.get("pid", 0)) == holder.get("ticks")
    before, until = read(lock), WATCH_SECONDS
    print(
        f"umd: {lock} is held from {holder.get('host', 'an unknown host')}, process {holder.get('pid', '?')}; it is "
        f"taken over if that gives no sign of life for {WATCH_SECONDS:.0f} s",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    while until > 0:  # counted in looks: a disk that stalls does not make a living holder look dead
        time.sleep(min(1.0, WATCH_SECONDS / 10))
        until -= min(1.0, WATCH_SECONDS / 10)
        now = read(lock)
        if now[0] is None:
            return False
        if now != before:
            return True
    return False


def beat(lock: Path, me: dict[str, Any], ended: threading.Event) -> None:
    """Signs of life until the block has ended."""
    while not ended.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):  # a disk that is full or stalls is told by those who need it
            holder, _ = read(lock)
            if holder is None:  # removed by hand
                write_whole(lock, json.dumps(me, indent=1).encode())
            elif holder == me:
                os.utime(lock)
            elif holder:
                who = f"{holder.get('command')} on {holder.get('host')}, process {holder.get('pid')}"
                print(f"umd: {lock.parent} was taken over by {who}; this process ends", file=sys.stderr, flush=True)
                os._exit(2)
