"""A training run: set up, make steps, end. The step itself is in `umd/train/step.py`."""

import math
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from umd import ops
from umd.checkpoint import checkpoint_path, load_model_state, save_checkpoint, split
from umd.classifier import Classifier
from umd.ema import EMA, ema_rate
from umd.errors import UserError
from umd.files import check_apart
from umd.layers import set_recompute_gelu
from umd.machine.device import keep_freed_memory, side_stream, take_device
from umd.methods import AnyModel, AnyObjective, build_model, build_objective
from umd.objective import Part
from umd.schedule import schedule_of
from umd.spans import span
from umd.train.classify import open_held_out
from umd.train.console import say
from umd.train.curves import reference_curve
from umd.train.data import Dataset, derive_seed, open_dataset, reader, train_loader
from umd.train.distributed import GO_ON, World, end_all, join
from umd.train.diverged import check_finite, check_weights
from umd.train.fingerprint import agreed_fingerprint
from umd.train.heads import keep_heads
from umd.train.latents import with_vae
from umd.train.lock import alone_in
from umd.train.log import NoLog, RunLog, check_wandb
from umd.train.monitor import Distance, Rate, announce, draw, evaluate, shower
from umd.train.optim import lr_scale
from umd.train.parallel import DDP, Alone
from umd.train.preview import preview_images, rgb
from umd.train.profile import NoProfiler, Profiler, profiled
from umd.train.quarantine import record_quarantine
from umd.train.resume import load_pretrained, newest_checkpoint, with_ema_of
from umd.train.run import RunConfig, absolute, to_plain, write_config
from umd.train.saves import BackgroundSave, finished, save_last
from umd.train.signals import StopRequest, stop_signal
from umd.train.sources import describe
from umd.train.spread import check_attention, check_gelu, spread
from umd.train.step import MetricsReader, TrainStep, capture_refusal, captures, cast_type
from umd.train.waiting import Stopped
from umd.train.zero import Zero

BuildObjective = Callable[..., AnyObjective]  # signature of `build_objective`


def train(
    config: RunConfig, console: Console | None = None, name: str = "train", build: BuildObjective = build_objective
) -> Path:
    """Train to the end of the run. If `config.out` holds a run, resume it. Returns the path of the last checkpoint.

    A step is a pure function of (weights, optimizer, EMA, step number), because data order, crops, noise and masks are
    derived from the seed. So:

    - A resumed run equals one that was never stopped, bit for bit on a CPU.
    - The draws of a sample depend on its place in the whole batch, so any number of ranks and micro-batches makes the
      same steps, up to rounding. Exception: classifiers mix pictures within a micro-batch, so ranks * micro-batches
      must not change.

    Args:
        build: makes the objective from network config, objective config, schedule and number of pictures. Ablations
            pass their own.

    Raises:
        UserError: settings do not fit together, data cannot be read, or `config.out` holds another run or one that is
            still at work.
        Diverged: the loss is NaN or infinite. The last good checkpoint is kept; `nan-dump.json` describes the batch.
        KeyboardInterrupt, or SystemExit(128 + signal): on Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP, after saving.
    """
    if config.data.source and Path(config.data.source).expanduser().exists():
        check_apart(config.out, config.data.source)
    if config.wandb:
        check_wandb()
    world = join(config.device, config.parallel, config.out)
    with world.explained(), alone_in(config.out, name) if world.main else nullcontext(), side_stream(world.device):
        return train_rank(with_ema_of(absolute(config)), world, console or Console(), name, build)


def train_rank(config: RunConfig, world: World, console: Console, name: str, build: BuildObjective) -> Path:
    """Run `train` on one rank. Only rank 0 prints, logs, draws and writes."""

    def tell(text: str) -> None:
        if world.main:
            say(console, f"{name}: {text}")

    run = set_up(config, world, build, tell)
    settings = to_plain(run.config)
    reference = reference_curve(config)
    writer: RunLog | NoLog = NoLog()
    if world.main:
        writer = RunLog(config.out, console, run.number, name, config.wandb, settings, reference)
    if world.watch is not None and run.background is not None:
        world.watch.farewell = run.background.linger
    left = math.inf if run.config.by_clock else run.total_steps - run.number
    with (
        writer as log, finished(run.background, log.say), stop_signal() as stop,
        ops.attention(config.attention), ops.gelu_by(config.gelu),
        profiled(config.profile and world.main, config.out, world.device, log.say, left) as profiler,
    ):  # fmt: skip
        announce(run, log)
        if run.preview is not None:
            run.show = shower(run, log)
        if config.evaluate_minutes and run.progress() < 1:
            run.distance = Distance(run, log)
        before = run.number
        try:
            stopped = make_steps(run, log, stop, profiler)
            return end(run, log, stop, stopped, before)
        finally:
            run.step.release()


class Run:
    """The state of a training run on one rank: its parts, and how far it is."""

    def __init__(self, config: RunConfig, world: World, dataset: Dataset):
        self.config, self.world, self.dataset = config, world, dataset
        self.number, self.seconds = 0, 0.0  # steps done, seconds of training
        self.saved_path: Path | None = None
        self.saved_step: int | None = None
        self.saved_seconds = 0.0  # `seconds` at the last save
        self.saved_before: tuple[int | None, Path | None, float] = None, None, 0.0  # these of the save before
        self.show: Callable[[Tensor], np.ndarray] = rgb
        self.distance: Distance | None = None
        self.looked = 0.0  # `seconds` at the last check of what is due

    # Set by `set_up`.
    model: AnyModel
    objective: AnyObjective
    parallel: Alone | DDP | Zero
    ema: EMA | None
    step: TrainStep
    dtype: torch.dtype
    captured: bool  # whether the step is recorded as a CUDA graph
    saved: dict  # state of the checkpoint that the run resumes from; {} for a new run
    source: dict  # fingerprint of the dataset
    background: BackgroundSave | None
    held_out: Dataset | None
    preview: Tensor | None

    @property
    def micro_batches(self) -> int:
        """Micro-batches per step, over all ranks."""
        return self.world.size * self.config.accumulate

    @property
    def total_steps(self) -> int:
        return self.config.total_steps(len(self.dataset))

    def progress(self) -> float:
        """Fraction of the run that is done."""
        if self.config.by_clock:
            return self.seconds / (60 * self.config.minutes)
        return self.number / self.total_steps

    def flops(self) -> int:
        """FLOPs of a step, forward and backward, over all ranks."""
        parts = (Part(i, self.micro_batches) for i in range(self.micro_batches))
        return sum(self.objective.step_flops(self.step.micro, part) for part in parts)

    def save(self) -> None:
        """Write a checkpoint, in the background if there is a background writer. All ranks call this together."""
        self.written()  # the write before must be done: its memory is reused
        tensors = self.parallel.tensors(self.ema)
        state = {"config": to_plain(self.config), "seconds": self.seconds}
        state |= {"images_seen": self.number * self.config.batch_size}
        state |= {"micro_batches": self.micro_batches, "source": self.source}
        hours = 3600 * self.config.keep_hours
        state["kept"] = hours > 0 and self.seconds // hours > self.saved_seconds // hours
        check_weights(self, tensors["model"])
        write = save_checkpoint if self.background is None else self.background.save
        self.saved_before, self.saved_seconds = (self.saved_step, self.saved_path, self.saved_seconds), self.seconds
        self.saved_step, self.saved_path = self.number, checkpoint_path(self.config.checkpoints, self.number)
        if self.world.main:
            write(self.config.checkpoints, self.number, tensors, state, keep=self.config.keep)

    def written(self) -> None:
        """Wait until the background checkpoint is on the disk. All ranks call this together.

        Waiting in an exchange of the next step instead would let a slow disk run into the time-out and end the run.
        """
        if self.background is not None:
            self.background.wait()
            self.world.barrier()

    def check_save(self, log: RunLog | NoLog, wait: bool) -> None:
        """Say it if the last save in the background failed (wait: wait for its end). Raises the second in a row.

        Only rank 0, which writes, hears of it; `settle_save` tells the others.
        """
        if self.background is not None and (lost := self.background.check(wait)):
            self.saved_step, self.saved_path, self.saved_seconds = self.saved_before
            log.say(f"{lost}; training goes on, and the next checkpoint is tried when it is due")

    def settle_save(self) -> str:
        """Wait for the save in the background; if it failed, the save before is the last. Returns its error, or "".

        All ranks call this together.
        """
        lost = "" if self.background is None else str(self.background.lost() or "")
        if lost:
            self.saved_step, self.saved_path, self.saved_seconds = self.saved_before
        self.saved_step, self.saved_path, lost = self.world.agree((self.saved_step, self.saved_path, lost))
        return lost

    def due(self, minutes: float, every: int | None) -> bool:
        """Whether something periodic is due: every `every` steps, or, if that is None, every `minutes` of training.

        Minutes count over the whole run, however often it was stopped. All ranks have the same `seconds`, and so get
        the same answer.
        """
        if every is not None:
            return every > 0 and self.number % every == 0
        return minutes > 0 and self.seconds // (60 * minutes) > self.looked // (60 * minutes)


def set_up(
    config: RunConfig, world: World, build: BuildObjective = build_objective,
    say: Callable[[str], object] = lambda text: None,
) -> Run:  # fmt: skip
    """Make data, network, optimizer and step of a run, and load its newest checkpoint if there is one.

    `say` is told of the data as soon as they are open, before the optimizer, whose first use imports Dynamo (2 s).
    """
    device = world.device
    if device.type == "cpu":
        keep_freed_memory()
    micro, left = divmod(config.batch_size, world.size * config.accumulate)
    if left or not micro:
        raise UserError(
            f"batch_size {config.batch_size} is not divisible by {world.size} ranks x accumulate {config.accumulate}; "
            f"use a multiple of {world.size * config.accumulate}"
        )
    device, dtype = take_device(str(device), config.precision)
    check_attention(config, device, dtype)
    check_gelu(config, device, dtype)
    with world.main_first():
        dataset = open_dataset(config.data, "train")
        config = replace(config, data=with_vae(config.data, dataset))
    say(f"{describe(dataset)}; {reader(dataset, config.data)}")
    for note in getattr(dataset, "notes", ()):
        say(note)
    run = Run(config, world, dataset)
    run.dtype = dtype
    run.objective = objective = build(config.model, config.objective, schedule_of(config.schedule), len(dataset))
    if config.model.num_classes > 0 and len(dataset.class_names) != config.model.num_classes:
        raise UserError(
            f"the model has {config.model.num_classes} classes but {dataset.name} has {len(dataset.class_names)}; "
            "fine-tune on a labelled source, one class for each row of the label table"
        )
    objective.step_flops(micro, Part(0, run.micro_batches))  # raises if the batch is too small for its noise-free share

    torch.manual_seed(derive_seed(config.seed, 0))
    run.model = model = build_model(config.model)
    model.set_checkpointing(config.checkpointing)
    set_recompute_gelu(model, config.recompute_gelu and not config.checkpointing)
    target = getattr(config.objective, "target", "")
    run.source = agreed_fingerprint(dataset, world, target, config.data.vae_hash)
    run.saved_path, saved = newest_checkpoint(config, world, run.source)
    world.barrier()  # rank 0 takes longer: it reads the files twice, to check them
    if saved is not None:
        saved = replace(saved, tensors={part: split(named, model) for part, named in saved.tensors.items()})
        load_model_state(model, saved.tensors["model"])
    elif config.init is not None:
        load_pretrained(model, config.init, config.data)
    run.parallel = parallel = spread(config, world, model, objective, config.peak_lr, dtype)
    final_rate = min(1.0, ema_rate(config.batch_size, config.ema))
    run.ema = EMA(parallel.weights, final_rate) if final_rate > 0 else None
    run.saved = {}
    if saved is not None:
        parallel.load(saved.tensors, run.ema)
        run.number, run.seconds, run.saved_step, run.saved = saved.step, saved.state["seconds"], saved.step, saved.state
        run.looked = run.saved_seconds = run.seconds
    refusal = capture_refusal(device, objective, parallel, config.compile)
    run.captured = captures(config.capture, refusal, parallel, config.profile)
    run.step = TrainStep(
        parallel, objective, micro, derive_seed(config.seed, 2), world, run.ema, final_rate, run.number,
        cast_type(dtype, parallel, config.compile), run.captured,
    )  # fmt: skip
    if world.main:
        write_config(config)
        if quarantined := getattr(dataset, "quarantined", None):
            record_quarantine(quarantined, len(dataset), config.out)
    classifies = isinstance(model, Classifier)
    run.held_out = run.preview = None
    if classifies and config.draws:
        with world.main_first():
            run.held_out = open_held_out(config)
    elif config.draws:  # rank 0 reads them once for all ranks
        run.preview = world.agree(preview_images(config, device).cpu() if world.main else None).to(device)
    # On a single CPU process, the copy and the thread would cost the step as much as they save.
    run.background = BackgroundSave() if world.size > 1 or device.type == "cuda" else None
    return run


class Sent(NamedTuple):
    """A step that was queued, with the host's part of its log line."""

    turn: int  # as returned by `MetricsReader.send`
    number: int
    indices: Tensor
    row: dict[str, float] | None  # None: this step has no log line


def make_steps(run: Run, log: RunLog | NoLog, stop: StopRequest, profiler: Profiler | NoProfiler) -> bool:
    """Make steps until the run is done or asked to stop. Returns whether it was stopped before its end.

    The last step's loss has been read and checked when this returns.
    """
    config, world, objective, before = run.config, run.world, run.objective, run.number
    labelled = config.model.num_classes > 0
    places = [place for part in run.step.parts for place in objective.places(run.step.micro, part)]
    loader = train_loader(
        run.dataset, config.data, batch_size=config.batch_size, seed=derive_seed(config.seed, 1),
        start=run.number * config.batch_size, places=places, device=world.device, stop=stop,
    )  # fmt: skip
    stop.alone = world.size == 1
    told = MetricsReader(world, len(run.step.metrics))
    rate = Rate(run)
    sent: Sent | None = None
    elapsed, asked = 0.0, False  # seconds of the last step; whether any rank has been asked to stop

    def settle() -> None:
        """Wait for the last step sent, if it has not been read, check its loss and write its log line."""
        nonlocal sent, asked
        if sent is None:
            return
        step, sent = sent, None
        values = told.read(step.turn)
        check_finite(run, step, values)
        *numbers, norm, seconds, stopping = values
        if world.size > 1:  # ranks stop and count time by numbers that all of them share, which are one step old
            run.seconds += seconds
        asked = stopping > 0
        rate.steps += 1
        if step.row is not None:
            loss, *parts = numbers
            names = zip(objective.part_names(), parts, strict=True)
            row = step.row | {"seconds": run.seconds if world.size > 1 else step.row["seconds"], "loss": loss}
            row |= {name: value for name, value in names if name}
            log.row(row | {"grad_norm": norm, **rate.read()})

    def stopping() -> bool:
        return asked if world.size > 1 else stop.requested is not None

    try:
        while run.progress() < 1 and not stopping():
            started = time.perf_counter()
            try:
                with span("data"):
                    batch = next(loader)
            except Stopped as error:
                if world.size > 1:
                    give_up(run, stop, error)
                break
            except UserError:
                settle()
                keep_work(run, log, before)
                raise
            lr = config.peak_lr * lr_scale(run.progress(), config.optim.warmup, config.optim.decay)
            metrics = run.step(batch.x_start, batch.labels if labelled else None, batch.indices, lr)
            turn = told.send(metrics, elapsed, stop.requested is not None)
            settle()  # reads the previous step while the device works on this one
            run.number += 1
            elapsed = time.perf_counter() - started
            run.seconds += elapsed if world.size == 1 else 0
            row = {"step": run.number, "images_seen": run.number * config.batch_size, "seconds": run.seconds, "lr": lr}
            row["epoch"] = run.number * config.batch_size / len(run.dataset)
            logged = run.number % config.log_every == 0 or run.progress() >= 1
            sent = Sent(turn, run.number, batch.indices, row if logged else None)
            log.progress(run.progress())
            with rate.paused():
                profiler.step()
            saves = run.due(config.save_minutes, config.save_every)
            draws = run.due(config.draw_minutes, config.draw_every) and run.progress() < 1
            evaluates = run.due(config.evaluate_minutes, None) and run.progress() < 1
            run.looked = run.seconds
            run.check_save(log, wait=saves)
            if saves or draws or evaluates:
                settle()  # so that weights with a non-finite loss are never saved
                with rate.paused():
                    if saves:
                        run.save()
                    if draws:
                        draw(run, log)
                    if evaluates:
                        evaluate(run, log)
    finally:
        loader.close()
    settle()
    return stopping() and run.progress() < 1


def end(run: Run, log: RunLog | NoLog, stop: StopRequest, stopped: bool, before: int) -> Path:
    """Save the last checkpoint and draw the last pictures. Returns the checkpoint's path.

    before: number of steps done when this process started.
    Raises KeyboardInterrupt or SystemExit(128 + signal) if the run was stopped.
    """
    save_last(run, log)
    assert run.saved_path is not None
    if stopped:
        reason = stop.requested or signal.SIGTERM  # None here: another rank was asked to stop
        log.say(f"stopped by {reason.name} at step {run.number}; saved {run.saved_path}; run the same command to go on")
        if reason is signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + reason)
    if run.config.draws and run.number > before:
        draw(run, log)
        keep_heads(run, log)
    if run.config.evaluate_minutes and run.number > before:
        evaluate(run, log)
    log.progress(1.0)
    log.say(f"done: step {run.number}, {run.seconds / 60:.1f} min of training, saved {run.saved_path}")
    return run.saved_path


def keep_work(run: Run, log: RunLog | NoLog, before: int) -> None:
    """Save the last step when no more batches come. Only in a single process: other ranks would wait in a step."""
    if run.world.size > 1 or run.number == before:
        return
    save_last(run, log)
    log.say(f"step {run.number} is saved: {run.saved_path}; the same command goes on from there")


def give_up(run: Run, stop: StopRequest, error: Stopped) -> None:
    """End all ranks without saving: this rank was asked to stop and has no batch, and the others wait for it."""
    lost = "" if run.background is None else run.background.lost() or ""
    reason = stop.requested or signal.SIGTERM
    end_all(
        f"rank {run.world.rank} was asked to stop by {reason.name}, and {error}; every rank stops where the last "
        f"checkpoint is. {lost or GO_ON}", 128 + reason,
    )  # fmt: skip
