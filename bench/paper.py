"""`umd bench reproduce paper`: the paper's four methods and six ablations, small enough for two cores.

- Training: one run per method and seed, with a constant learning rate after a warm-up, and EMA weights. The EMA weights
  at any step are a result, so equal images and equal compute are two points of one run.
- Fine-tuning with labels, as in the paper's Table 5, starts from both points.
- Work: a chain is a training with everything that depends on it, divided into pieces. A piece is done if its JSON file
  exists. Processes of one thread each take one chain after another. A stopped training resumes bit for bit from its
  checkpoint.
"""

import json
import multiprocessing
import os
import sys
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from umd.bench.options import Reproduce
from umd.bench.paper_plan import NAMES, Chain, Name, Plan, chains, ends, pieces, ship, step_flops
from umd.bench.paper_report import write_report
from umd.errors import UserError
from umd.files import write_whole
from umd.machine.device import pick_device
from umd.machine.environment import own_cores
from umd.train.lock import alone_in
from umd.train.run import to_plain
from umd.train.signals import end_when_orphaned


def work(plan: Plan, todo: list[Chain], out: Path, turn: Any) -> None:
    """Take chain after chain until none is left. `turn`: the number of the next, shared by all that work."""
    torch.set_num_threads(1)
    end_when_orphaned()
    while True:
        with turn.get_lock():
            number, turn.value = turn.value, turn.value + 1
        if number >= len(todo):
            return
        try:
            make_chain(plan, todo[number], out)
        except Exception:  # a failed chain must not stop the others
            (out / todo[number].id).mkdir(parents=True, exist_ok=True)
            (out / todo[number].id / "failed.txt").write_text(traceback.format_exc())


def make_chain(plan: Plan, chain: Chain, out: Path) -> None:
    folder = out / chain.id
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "failed.txt").unlink(missing_ok=True)
    for piece in pieces(plan, chain, out):
        file, stopped = folder / f"{piece.name}.json", folder / f"{piece.name}.stopped.json"
        if file.exists():
            continue
        spent = json.loads(stopped.read_text("utf-8")) if stopped.exists() else {"seconds": 0.0, "cpu_seconds": 0.0}
        began, used = time.perf_counter(), time.process_time()
        result: dict[str, Any] | None = None
        try:
            result = piece.make()
        finally:  # a training that is stopped is saved, and its time counts
            spent["seconds"] += time.perf_counter() - began
            spent["cpu_seconds"] += time.process_time() - used
            if result is None:
                write_whole(stopped, json.dumps(spent).encode())
        write_whole(file, json.dumps(result | spent, indent=1).encode())
        stopped.unlink(missing_ok=True)


def settings_of(plan: Plan) -> dict[str, Any]:
    """A plan as JSON keeps it, without what the results do not depend on."""
    values = asdict(plan) | {"fashion": Path(plan.fashion).name}
    return {name: value for name, value in json.loads(json.dumps(values)).items() if name != "save_every"}


def check_plan(plan: Plan, out: Path) -> None:
    """Write `out`/plan.json, or compare it. Raises UserError if the pieces in `out` were made by another plan."""
    file, ours = out / "plan.json", settings_of(plan)
    if not file.exists():
        write_whole(file, json.dumps(ours, indent=1).encode())
        return
    try:
        theirs = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); give another --out, or remove {out}") from error
    other = [f"{k} {theirs.get(k)}, now {ours.get(k)}" for k in theirs | ours if theirs.get(k) != ours.get(k)]
    if other:
        raise UserError(f"{out} holds results of another plan ({'; '.join(other)}); give another --out")


def gather(plan: Plan, todo: list[Chain], out: Path) -> dict[str, Any]:
    """Collect the finished pieces, in the form of docs/results/paper.json."""
    record: dict[str, Any] = {"plan": settings_of(plan), "chains": []}
    for chain in todo:
        results = {}
        for piece in pieces(plan, chain, out):
            file = out / chain.id / f"{piece.name}.json"
            if file.exists():
                results[piece.name] = json.loads(file.read_text("utf-8"))
        entry = {"data": chain.data, "method": chain.method.name if chain.method else "floors", "seed": chain.seed}
        entry |= {"longer": chain.longer, "rate": chain.rate}
        if chain.method is not None:
            entry |= {"ends": ends(plan, chain), "step_flops": step_flops(plan, chain)}
            entry |= {
                "finetune_steps": plan.finetune_steps * chain.longer,
                "objective": to_plain(chain.method.objective),
            }
            entry |= {"adaLN": chain.method.adaLN, "leads": chain.method.leads, "ablation": chain.method.ablation}
        record["chains"].append(entry | {"results": results})
    return record


class Watch:
    """Reports finished pieces and the time left, from expected seconds corrected by what each kind of piece took."""

    def __init__(self, plan: Plan, todo: list[Chain], out: Path, workers: int, console: Console):
        self.files = [(c, p, out / c.id / f"{p.name}.json") for c in todo for p in pieces(plan, c, out)]
        self.workers, self.console = workers, console
        self.seen: dict[Path, float] = {}

    def look(self) -> int:
        """Print a line for each newly finished piece. Returns their number."""
        new = [entry for entry in self.files if entry[2] not in self.seen and entry[2].exists()]
        for chain, piece, file in new:
            result = json.loads(file.read_text("utf-8"))
            self.seen[file] = result["seconds"]
            shown = ", ".join(f"{k} {v:.3f}" for k, v in result.items() if isinstance(v, float) and "seconds" not in k)
            self.say(f"{chain.id} {piece.name}: {shown} ({result['seconds']:.0f} s)")
        if new:
            self.say(f"{len(self.seen)} of {len(self.files)} pieces, about {self.left() / 3600:.1f} hours left")
        return len(new)

    def left(self) -> float:
        """Time left, in seconds."""
        done: dict[str, list[float]] = {}
        for _, piece, file in self.files:
            if file in self.seen:
                took, expected = done.get(piece.kind, [0.0, 0.0])
                done[piece.kind] = [took + self.seen[file], expected + piece.expected]
        ratio = {kind: took / expected for kind, (took, expected) in done.items()}
        rest = sum(p.expected * ratio.get(p.kind, 1.0) for _, p, file in self.files if file not in self.seen)
        return rest / self.workers

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)
        sys.stdout.flush()


def reproduce(options: Reproduce, console: Console) -> None:
    device = str(pick_device(options.device))
    steps = options.steps or Plan.steps
    finetune_steps = max(round(Plan.finetune_steps * steps / Plan.steps), 4)  # the same share of the work
    plan = Plan(steps=steps, finetune_steps=finetune_steps, device=device)
    plan = replace(plan, seeds=tuple(options.seed + seed for seed in plan.seeds))
    names = NAMES if options.data == "all" else (options.data,)
    if "fashion" in names and not Path(plan.fashion).exists():
        raise UserError(f"there is no {plan.fashion}: apt-get install dataset-fashion-mnist (Debian, Ubuntu)")
    carry_out(plan, names, options.out / "paper", options.figures, own_cores() if device == "cpu" else 1, console)


def carry_out(
    plan: Plan, names: tuple[Name, ...], out: Path, figures: Path, workers: int, console: Console
) -> None:  # fmt: skip
    """Make the missing pieces in `out`. Rewrites the report whenever a piece is done."""
    todo = chains(plan, names)

    def report() -> None:
        write_report(gather(plan, chains(plan, NAMES), out), out, figures)  # with the other dataset's finished pieces
        ship(plan, out, figures / "paper-umd")

    with alone_in(out, "bench reproduce paper"):
        check_plan(plan, out)
        watch = Watch(plan, todo, out, workers, console)
        flops = sum(step_flops(plan, chain) * max(ends(plan, chain).values()) for chain in todo if chain.method)
        expected = sum(piece.expected for _, piece, _ in watch.files) / workers / 3600
        watch.say(
            f"{len(todo)} chains of {len(watch.files)} pieces: {flops / 1e15:.1f} PFLOP of pre-training; "
            f"about {expected:.1f} hours in {workers} processes of one thread"
        )
        context = multiprocessing.get_context("spawn")
        turn = context.Value("i", 0)
        os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that start now
        processes = [
            context.Process(target=work, args=(plan, todo, out, turn)) for _ in range(workers)
        ]  # fmt: skip
        try:
            for process in processes:
                process.start()
            while any(process.is_alive() for process in processes):
                time.sleep(1)
                if watch.look():
                    report()
        finally:
            for process in processes:
                if process.is_alive():
                    process.terminate()  # a training saves first
            for process in processes:
                process.join()
        watch.look()
        report()
    if failed := [str(file) for file in sorted(out.glob("*/failed.txt"))]:
        raise UserError(f"{len(failed)} chains failed, see {', '.join(failed)}; the same command tries them again")
    ended = [process.exitcode for process in processes if process.exitcode]
    if ended:
        raise UserError(f"a process ended with {ended[0]}; the same command goes on with what is missing")
    watch.say(f"written: {figures / 'paper.json'}, .md and .png")
