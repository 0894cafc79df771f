#!/usr/bin/env python3
"""Check a new GPU in a few minutes: does the project run on it, is it correct, how fast is it.

    PYTHONPATH=. python3 bench/first_light.py               at most 8 minutes (--budget SECONDS)
    PYTHONPATH=. python3 bench/first_light.py --smoke       without a GPU: tiny sizes, to test this script
    PYTHONPATH=. python3 bench/first_light.py --parts env,correct

Parts, in this order. Each is a process with its own time limit; if one fails or hangs, the others still run. With
eight CPU cores or more, correct, cli and tests run beside one another, as nothing in them is timed:

    env      versions, device, `umd doctor`, the speed of a copy and of matrix products
    correct  the ops of training and sampling at real shapes against fp64, and twice for equal bits; the whole step, and
             that it never waits for the GPU; captured steps (also with DDP) and captured sampling against eager ones
    cli      `umd pretrain` on synthetic pictures: the loss falls; SIGTERM, resume, finish
    tests    the project's own tests for a GPU
    step     the training step: eager, captured, with reference ops, compared with plain DiTs; host time, a profile
    sample   guided sampling, compared with diffusers' pipeline
    timing   each op, timed as in `umd bench kernels`
    compile  training steps under torch.compile, in the remaining time

Results go to $OUT, or ./out: first_light.json (all rows), first_light.log, profile.txt, tests.log, trace-*.json.gz (two
steps each). A summary is printed at the end.
The parts themselves are in first_light_checks.py and first_light_parts.py.
"""

# Import only the standard library: for a script, this folder comes first on sys.path, and its kernels.py and trace.py
# would shadow packages of these names. The parts run as modules.
import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

# Time limits in seconds. If the parts asked for need less than the budget, they grow in proportion. Time that a part
# does not use goes to the last ones.
PARTS = {
    "env": 40, "correct": 140, "cli": 100, "tests": 215, "step": 150, "sample": 95, "timing": 65, "compile": 300,
}  # fmt: skip
CHECKS = ("correct", "cli", "tests")  # they time nothing, and may run beside one another
Row = dict[str, Any]


def run_parts(args: argparse.Namespace) -> int:
    """Run the parts in turn. Returns the exit status: 1 if a check was wrong, or a part failed or was left out."""
    began = time.monotonic()
    out = Path(os.environ.get("OUT") or "out").resolve()
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"made": made(), "argv": sys.argv[1:], "parts": {}}
    (out / "first_light.log").unlink(missing_ok=True)  # as this process and the parts append to it
    with tempfile.TemporaryDirectory(prefix="first-light-") as folder, open(out / "first_light.log", "a") as log:
        scratch = Path(folder)

        def say(text: str) -> None:
            print(text, flush=True)
            print(text, file=log, flush=True)

        def run(name: str, limit: float) -> dict[str, Any]:
            if limit < 15:
                say(f"== {name}: left out, no time")
                return {"status": "left out: no time", "seconds": 0, "rows": []}
            say(f"== {name} (at most {limit:.0f} s)")
            rows, output = scratch / f"{name}.jsonl", scratch / f"{name}.log"
            command = [sys.executable, "-m", "umd.bench.first_light", "--part", name, "--rows", str(rows)]
            command += ["--limit", f"{limit:.0f}", "--scratch", folder, *["--smoke"] * args.smoke]
            started = time.monotonic()
            with open(output, "w") as written:
                status = run_limited(command, limit, written, deterministic=name in CHECKS)
            took, found = time.monotonic() - started, read_rows(rows)
            log.write(output.read_text(errors="replace"))
            say(f"   {name}: {status}, {took:.0f} s, {len(found)} rows")
            return {"status": status, "seconds": round(took, 1), "rows": found}

        groups = grouped(args.parts.split(","), together=(os.cpu_count() or 1) >= 8)
        longer = max(1, args.budget / sum(max(PARTS[name] for name in group) for group in groups))
        for group in groups:
            left = args.budget - (time.monotonic() - began) - 5
            with ThreadPoolExecutor(len(group)) as beside:
                limits = [min(PARTS[name] * (5 if args.smoke else longer), left) for name in group]
                results["parts"] |= dict(zip(group, beside.map(run, group, limits), strict=True))
            for file in (*scratch.glob("profile.txt"), *scratch.glob("tests.log"), *scratch.glob("trace-*.json.gz")):
                shutil.copy(file, out / file.name)
            (out / "first_light.json").write_text(json.dumps(results, indent=1) + "\n")
        say(summary(results["parts"]))
    parts = results["parts"].values()
    return int(any(map(is_bad, parts)) or any(part["status"] != "ok" for part in parts))


def made() -> dict[str, str]:
    """Commit ($COMMIT, or git's), date and number of cores."""
    commit = os.environ.get("COMMIT", "")
    if not commit and shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit or "unknown: set COMMIT",
        "date": datetime.now().isoformat(" ", "minutes"),
        "cores": str(os.cpu_count()),
    }


def grouped(names: list[str], together: bool) -> list[list[str]]:
    """Cut the parts into groups that run at the same time: neighbours of CHECKS if `together`, else single parts."""
    groups: list[list[str]] = []
    for name in names:
        if together and groups and name in CHECKS and groups[-1][0] in CHECKS:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def is_bad(part: dict[str, Any]) -> bool:
    """Whether something in a part failed, was wrong, or was left out for lack of time."""
    return any(row["kind"] in ("failed", "skipped") or not row.get("ok", True) for row in part["rows"])


def run_limited(command: list[str], limit: float, log: TextIO, deterministic: bool = False) -> str:
    """Run a part and return how it ended. It and all its child processes are ended after `limit` seconds at the latest.

    Its output goes to the log. Lines that begin with | also go to the screen.
    """
    environment = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", **os.environ}
    if deterministic:  # cuBLAS is only if its workspace is set before it starts
        environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))
    start = os.path.getsize(log.name)
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    with open(log.name, errors="replace") as shown:
        shown.seek(start)
        deadline, rest = time.monotonic() + limit, ""
        while True:
            running = process.poll() is None
            *lines, rest = (rest + shown.read()).split("\n")
            for line in lines:
                if line.startswith("|"):
                    print(line[1:], flush=True)
            if not running or time.monotonic() > deadline:
                break
            time.sleep(0.1)
    for number, patience in ((signal.SIGTERM, 3), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    if running:
        return f"cut off after {limit:.0f} s"
    return f"exit status {process.returncode}" if process.returncode else "ok"


def read_rows(file: Path) -> list[Row]:
    """Read the rows of a JSON-lines file. Skips an unfinished line."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def cell(value: object, form: str = ".2f") -> str:
    if value is None:
        return "-"
    return format(value, form) if isinstance(value, float) else str(value)


def table(title: str, columns: list[str], lines: list[list[str]]) -> str:
    if not lines:
        return f"{title}: none"
    widths = [max(map(len, column)) for column in zip(columns, *lines, strict=True)]
    text = [title]
    for line in (columns, *lines):
        first, *others = (f"{x:<{w}}" if i == 0 else f"{x:>{w}}" for i, (x, w) in enumerate(zip(line, widths)))  # noqa: B905
        text.append("  ".join((first, *others)).rstrip())
    return "\n".join(text)


def summary(parts: dict[str, dict]) -> str:
    """Summarise all rows: first what is wrong, then speeds."""

    def rows(kind: str, *names: str) -> list[Row]:
        return [row for name in names or parts for row in parts.get(name, {}).get("rows", []) if row["kind"] == kind]

    blocks = ["", "; ".join(f"{name}: {part['status']}, {part['seconds']} s" for name, part in parts.items())]
    for row in rows("device") + rows("ceiling", "env"):
        blocks.append(", ".join(f"{key} {cell(value)}" for key, value in row.items() if key != "kind"))
    checks = rows("check")
    wrong = [row for row in checks if not row["ok"]]
    blocks.append(f"correctness: {len(checks) - len(wrong)} of {len(checks)} checks right")
    blocks += [f"  WRONG {row['model']} {row['op']}, {row['what']}: {cell(row['error'], '.1e')}" for row in wrong[:25]]
    blocks += [f"  FAILED {row['what']}: {row['message'][:300]}" for row in rows("failed")[:15]]
    blocks += [f"  LEFT OUT, no time: {row['what']}" for row in rows("skipped")[:15]]
    for row in rows("tests"):
        blocks.append(f"tests: {row['last']}")
        blocks += [f"  {line[:160]}" for line in row["failures"][:15]]
    steps = [
        [row["what"], str(row["batch"]), cell(row["images_per_second"], ".0f")]
        + [cell(row[name], ".1f") for name in ("ms", "ms_synced", "ms_host")]
        + [cell(row["tflops"], ".0f"), cell(row["mfu"], ".1%"), cell(row["gib"], ".1f")]
        for row in rows("step")
    ]
    title = "training step (ms: queued in a row; synced: waited for each; host: until its launches are queued)"
    columns = ["what", "batch", "img/s", "ms", "synced", "host", "TFLOP/s", "MFU", "GiB"]
    blocks.append(table(title, columns, steps))
    blocks += [f"  {row['what']}: {row['value']}" for row in rows("note")]
    attention: dict[str, list[str]] = {}
    for row in rows("attention"):
        line = attention.setdefault(f"attention, µs forward and backward, {row['model']} {row['lengths']} tokens", [])
        line.append(f"{row['backend']} {row['us']['full']}")
    blocks += [f"{what}: {', '.join(line)}" for what, line in attention.items()]
    timed: dict[tuple, dict[str, Row]] = {}
    for row in rows("op"):
        key = f"{row['op']} {row['direction']}", row["model"], str(row["batch"])
        timed.setdefault(key, {})[row["implementation"]] = row
    lines = []
    for key, found in timed.items():
        us = [found.get(name, {}).get("us") for name in ("triton", "eager", "torch.compile")]
        ours = found.get("triton", {})
        lines.append([*key, *(cell(x, ".0f") for x in us), cell(ours.get("of_copy"), ".0%")])
    columns = ["op", "model", "batch", "ours", "eager", "compile", "of a copy"]
    blocks.append(table("ops, µs on the device (ours: share of a copy's speed)", columns, lines))
    return "\n".join(blocks)


class Part:
    """The context of a part: writes its rows, knows its remaining time and its scratch folder."""

    def __init__(self, rows: str, limit: float, scratch: str, smoke: bool):
        self.rows, self.smoke, self.scratch = Path(rows), smoke, Path(scratch)
        self.deadline = time.monotonic() + limit - 4

    def row(self, kind: str, **values: object) -> None:
        with open(self.rows, "a") as file:
            file.write(json.dumps({"kind": kind, **values}, default=str) + "\n")

    def check(self, model: str, op: str, what: str, ok: bool, error: float | None = None) -> None:
        self.row("check", model=model, op=op, what=what, ok=bool(ok), error=error)
        if not ok:
            print(f"|   WRONG {model} {op}, {what}: {cell(error, '.1e')}")

    def note(self, what: str, value: str) -> None:
        self.row("note", what=what, value=value)
        print(f"|   {what}: {value}")

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def attempt(self, what: str, work, *arguments):
        """Call work(*arguments) and return its result. On failure, write a row and return None; also if time is up."""
        if self.left() < 3:
            self.row("skipped", what=what)
            return None
        try:
            return work(*arguments)
        except Exception as error:  # the part continues after a failure
            import traceback

            self.row("failed", what=what, message=f"{type(error).__name__}: {error}"[:2000])
            print(f"|   failed: {what}: {type(error).__name__}: {str(error)[:300]}")
            traceback.print_exc()
            return None


def run_part(args: argparse.Namespace) -> int:
    """Run one part; the main function of its process."""
    import torch

    from umd.bench.first_light_checks import correct
    from umd.bench.first_light_parts import cli, compile_, env, sample, step, tests, timing
    from umd.machine.device import side_stream

    if not args.smoke and not torch.cuda.is_available():
        print("|   no CUDA GPU here: use --smoke")
        return 1
    parts = dict(
        env=env, correct=correct, step=step, cli=cli, sample=sample, tests=tests, timing=timing, compile=compile_
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    part = Part(args.rows, args.limit, args.scratch, args.smoke)
    with side_stream(device):
        part.attempt(args.part, parts[args.part], part, device)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; runs without a GPU")
    parser.add_argument("--budget", type=float, default=480, help="seconds in all")
    parser.add_argument("--parts", default=",".join(PARTS), help="which of them")
    for name in ("part", "rows", "scratch"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if unknown := set(args.parts.split(",")) - set(PARTS):
        parser.error(f"unknown part {unknown.pop()!r}; expected of {','.join(PARTS)}")
    return run_part(args) if args.part else run_parts(args)


if __name__ == "__main__":
    sys.exit(main())
