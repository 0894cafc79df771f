"""A lock on a folder, so that one command at a time works in it. A stale lock is taken over automatically.

The file `lock.json` names host, process and start time of its holder. It is stale if that process is gone:

- On the same machine, the system knows whether the process lives.
- On another machine, the holder writes a heartbeat every few seconds. A lock without one for `WATCH_SECONDS` is stale.
  The waiting process measures this itself, so clocks of two machines are never compared.

`flock` would be simpler, but on NFS it may hold on one host only, or outlive a host that died.
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
BEAT_SECONDS = 5.0  # between heartbeats
WATCH_SECONDS = 60.0  # without a heartbeat: longer than anything holds the GIL, or NFS caches a file name
SETTLE_SECONDS = 1.0  # wait after writing; another process that takes over the same lock has written by then


@contextmanager
def alone_in(out: Path, command: str = "umd") -> Iterator[None]:
    """Hold the folder's lock while the block runs. Raises UserError, naming the holder, if another process holds it.

    A folder that was made for it and is empty at the end is removed.

    If another process takes over the lock while the block runs (this one was suspended for minutes), this process ends
    at once, before it writes into another run.
    """
    new = not out.exists()
    make_folder(out, "give another --out")
    lock, me = out / LOCK_FILE, describe(command) | {"folder": out.stat().st_ino}
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
        if new:
            with contextlib.suppress(OSError):  # it is not empty
                out.rmdir()


def describe(command: str) -> dict[str, Any]:
    """What identifies this process, as written to the lock."""
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
    """Identifies the scope of process ids: this boot of the machine, and the container. "" if unknown."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def ticks(pid: int) -> int | None:
    """Start time of a process, to tell it from a later process with the same id. None if it is gone."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(rest[18])  # field 22 of proc(5); a zombie counts as gone


def read(lock: Path) -> tuple[dict[str, Any] | None, int]:
    """Read a lock. Returns its contents ({} if unreadable, None if there is no lock) and its last heartbeat."""
    try:
        with lock.open("rb") as file:  # open it first: NFS may answer from its cache for a name, not for an open file
            seen = os.fstat(file.fileno()).st_mtime_ns
            holder = json.loads(file.read())
    except FileNotFoundError:
        return None, 0
    except ValueError:
        return {}, seen
    return holder if isinstance(holder, dict) else {}, seen


def take(lock: Path, me: dict[str, Any]) -> None:
    """Write the lock, if there is none or it is stale. Raises UserError if its holder is at work."""
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
    """Whether a lock's holder is alive. For a holder on another machine, wait for a heartbeat."""
    if holder.get("folder", inode := lock.parent.stat().st_ino) != inode:  # a copied folder brought its lock along
        return False
    if holder.get("machine") and holder["machine"] == machine():
        return ticks(holder.get("pid", 0)) == holder.get("ticks")
    before, until = read(lock), WATCH_SECONDS
    print(
        f"umd: {lock} is held from {holder.get('host', 'an unknown host')}, process {holder.get('pid', '?')}; it is "
        f"taken over if that gives no sign of life for {WATCH_SECONDS:.0f} s",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    while until > 0:  # counts reads, not time: a stalled disk does not make a holder look dead
        time.sleep(min(1.0, WATCH_SECONDS / 10))
        until -= min(1.0, WATCH_SECONDS / 10)
        now = read(lock)
        if now[0] is None:
            return False
        if now != before:
            return True
    return False


def beat(lock: Path, me: dict[str, Any], ended: threading.Event) -> None:
    """Write heartbeats until `ended` is set."""
    while not ended.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):  # whoever needs the disk reports that it is full or stalls
            holder, _ = read(lock)
            if holder is None:  # someone removed the lock file
                write_whole(lock, json.dumps(me, indent=1).encode())
            elif holder == me:
                os.utime(lock)
            elif holder:
                who = f"{holder.get('command')} on {holder.get('host')}, process {holder.get('pid')}"
                print(f"umd: {lock.parent} was taken over by {who}; this process ends", file=sys.stderr, flush=True)
                os._exit(2)
