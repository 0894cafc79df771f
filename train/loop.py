"""A training run: set up, steps, end. The step itself is `umd/train/step.py`."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from umd import ops
from umd.checkpoint import BackgroundSave, checkpoint_path, load_model_state, save_checkpoint, split
from umd.classifier import Classifier
from umd.ema import EMA, ema_rate
from umd.errors import UserError
from umd.layers import set_recompute_gelu
from umd.machine.device import keep_freed_memory, take_device
from umd.methods import AnyModel, AnyObjective, build_model, build_objective
from umd.objective import Part
from umd.schedule import NoiseSchedule
from umd.spans import span
from umd.train.classify import open_held_out
from umd.train.curves import reference_of
from umd.train.data import ImageDataset, derive_seed, describe, open_dataset, reader, train_loader
from umd.train.distributed import GO_ON, World, end_all, join
from umd.train.diverged import check_finite
from umd.train.fingerprint import agreed_fingerprint, difference
from umd.train.heads import keep_heads
from umd.train.latents import LatentDataset, with_vae
from umd.train.lock import alone_in
from umd.train.log import NoLog, RunLog
from umd.train.monitor import Distance, Rate, draw, evaluate, shower
from umd.train.optim import lr_scale
from umd.train.parallel import DDP, Alone
from umd.train.preview import preview_images, rgb
from umd.train.profile import NoProfiler, Profiler, profiled
from umd.train.quarantine import record_quarantine
from umd.train.resume import load_pretrained, newest_checkpoint, with_ema_of
from umd.train.run import RunConfig, absolute, to_plain, write_config
from umd.train.signals import StopRequest, stop_signal
from umd.train.spread import check_attention, check_gelu, spread
from umd.train.step import Told, TrainStep, capture_refusal, captures, cast_type, side_stream
from umd.train.waiting import Stopped
from umd.train.zero import Zero

BuildObjective = Callable[..., AnyObjective]  # `build_objective`, or one like it
DRAWS = 2  # of the corruptions: 2 numbers them by (seed, step, sample), 1 had a generator a micro-batch
PATIENCE = 15.0  # seconds that one of several ranks, asked to stop, still waits for its batch: the others need it


def train(
    config: RunConfig, console: Console | None = None, name: str = "train", build: BuildObjective = build_objective
) -> Path:
    """Train to the end of the run, or go on with the run in `config.out`. Returns the last checkpoint.

    build: makes the objective, of network, configuration, schedule and number of pictures; an ablation brings its own.

    A step is a pure function of (weights, optimiser, EMA, step number): data order, crops, noise and masks are
    derived from the seed, so a resumed run is the run that was never stopped, to the bit on a CPU. A sample's draws
    depend on its place in the whole batch, so any number of ranks and micro-batches makes the same steps, up to
    rounding. Classifiers mix pictures within a micro-batch: there ranks times micro-batches must stay as they were.

    Raises:
        UserError: settings that do not fit together, data that cannot be read, another run in `config.out`, or one that
            is at work there.
        Diverged: NaN or infinite loss; the last good checkpoint is kept and the batch is described in `nan-dump.json`.
        KeyboardInterrupt, SystemExit(143), SystemExit(138): after saving, on Ctrl-C, SIGTERM or SIGUSR1.
    """
    world = join(config.device, config.parallel, config.out)
    with world.explained(), alone_in(config.out, name) if world.main else nullcontext(), side_stream(world.device):
        return train_rank(with_ema_of(absolute(config)), world, console or Console(), name, build)


def train_rank(config: RunConfig, world: World, console: Console, name: str, build: BuildObjective) -> Path:
    """`train` on one of the ranks. Only rank 0 prints, logs, draws and writes."""
    run = set_up(config, world, build)
    settings = to_plain(run.config)
    reference = reference_of(config)
    writer: RunLog | NoLog = NoLog()
    if world.main:
        writer = RunLog(config.out, console, run.number, name, config.wandb, settings, reference)
    left = math.inf if run.by_clock else run.total_steps - run.number
    with (
        writer as log, finished(run.background), stop_signal() as stop,
        ops.attention(config.attention), ops.gelu_by(config.gelu),
        profiled(config.profile and world.main, config.out, world.device, log.say, left) as profiler,
    ):  # fmt: skip
        announce(run, log)
        if run.preview is not None:
            run.show = shower(run, log)
        if config.evaluate_minutes and run.progress() < 1:
            run.distance = Distance(run, log)
        before = run.number
        stopped = make_steps(run, log, stop, profiler)
        return end(run, log, stop, stopped, before)


class Run:
    """What a training run holds on one rank, and how far it is."""

    def __init__(self, config: RunConfig, world: World, dataset: ImageDataset | LatentDataset):
        self.config, self.world, self.dataset = config, world, dataset
        self.number, self.seconds = 0, 0.0  # steps done, time trained
        self.saved_path: Path | None = None
        self.saved_step: int | None = None
        self.show: Callable[[Tensor], np.ndarray] = rgb
        self.distance: Distance | None = None
        self.looked = 0.0  # time trained when the clock was last looked at

    # Set by `set_up`.
    model: AnyModel
    objective: AnyObjective
    parallel: Alone | DDP | Zero
    ema: EMA | None
    step: TrainStep
    dtype: torch.dtype
    captured: bool  # whether the step is recorded as a CUDA graph
    saved: dict  # the state of the checkpoint that the run goes on from; {} of a new one
    source: dict  # fingerprint of the dataset
    background: BackgroundSave | None
    held_out: ImageDataset | LatentDataset | None
    preview: Tensor | None

    @property
    def micro_batches(self) -> int:
        """Of a step, over all ranks."""
        return self.world.size * self.config.accumulate

    @property
    def total_steps(self) -> int:
        return self.config.steps or math.ceil(self.config.epochs * len(self.dataset) / self.config.batch_size)

    @property
    def by_clock(self) -> bool:
        """Whether the run's length is given in minutes."""
        return self.config.minutes > 0 and self.config.steps == 0

    def progress(self) -> float:
        """Share of the run that is done."""
        if self.by_clock:
            return self.seconds / (60 * self.config.minutes)
        return self.number / self.total_steps

    def flops(self) -> int:
        """FLOPs of a step, forward and backward, over all ranks."""
        parts = (Part(i, self.micro_batches) for i in range(self.micro_batches))
        return sum(self.objective.step_flops(self.step.micro, part) for part in parts)

    def save(self) -> None:
        """Write a checkpoint, in the background where there is one. All ranks call this together."""
        self.written()  # it holds the memory that is filled next
        tensors = self.parallel.tensors(self.ema)
        state = {"config": to_plain(self.config), "seconds": self.seconds, "draws": DRAWS}
        state |= {"images_seen": self.number * self.config.batch_size}
        state |= {"micro_batches": self.micro_batches, "source": self.source}
        write = save_checkpoint if self.background is None else self.background.save
        self.saved_step, self.saved_path = self.number, checkpoint_path(self.config.checkpoints, self.number)
        if self.world.main:
            write(self.config.checkpoints, self.number, tensors, state, keep=self.config.keep)

    def written(self) -> None:
        """Until the checkpoint in the background is on the disk. All ranks call this together: a slow disk is waited
        for here, and not in an exchange of a step, whose time-out would end the run."""
        if self.background is not None:
            self.background.wait()
            self.world.barrier()

    def due(self, minutes: float, every: int | None) -> bool:
        """Whether it is time for what happens every so many steps, or else when the minutes of training pass a multiple
        of so many, however often the run was stopped. The same on all ranks, whose `seconds` are the same numbers."""
        if every is not None:
            return every > 0 and self.number % every == 0
        return minutes > 0 and self.seconds // (60 * minutes) > self.looked // (60 * minutes)


def set_up(config: RunConfig, world: World, build: BuildObjective = build_objective) -> Run:
    """Data, network, optimiser and step of a run, new or as its newest checkpoint has them."""
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
    run = Run(config, world, dataset)
    run.dtype = dtype
    schedule = NoiseSchedule(config.schedule.name, config.schedule.num_steps, config.schedule.rho)
    run.objective = objective = build(config.model, config.objective, schedule, len(dataset))
    if config.model.num_classes > 0 and len(dataset.class_names) != config.model.num_classes:
        raise UserError(
            f"the model has {config.model.num_classes} classes but {dataset.name} has {len(dataset.class_names)}; "
            "fine-tune on a labelled source, one class for each row of the label table"
        )
    objective.step_flops(micro, Part(0, run.micro_batches))  # a batch too small for its noise-free share fails here

    torch.manual_seed(derive_seed(config.seed, 0))
    run.model = model = build_model(config.model)
    model.set_checkpointing(config.checkpointing)
    set_recompute_gelu(model, config.recompute_gelu and not config.checkpointing)
    run.source = agreed_fingerprint(dataset, world)
    run.saved_path, saved = newest_checkpoint(config, world, run.source)
    world.barrier()  # rank 0 reads the files twice, to check them
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
        run.looked = run.seconds
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
    elif config.draws:  # read once, for all ranks
        run.preview = world.agree(preview_images(config, device).cpu() if world.main else None).to(device)
    # On one CPU a copy and a thread would take from the step what they save.
    run.background = BackgroundSave() if world.size > 1 or device.type == "cuda" else None
    return run


def announce(run: Run, log: RunLog | NoLog) -> None:
    """What is trained on what, and in what a run that goes on is another than it was."""
    config, dataset, device = run.config, run.dataset, run.world.device
    log.say(f"{describe(dataset)}; {reader(dataset, config.data)}")
    for note in getattr(dataset, "notes", ()):
        log.say(note)
    weights = sum(p.numel() for p in run.model.parameters())
    log.say(
        f"{weights / 1e6:.1f} M parameters on {run.parallel.place(device)}, "
        f"{'bf16' if run.dtype == torch.bfloat16 else 'fp32'}, "
        f"{run.flops() / config.batch_size / 1e9:.2f} GFLOP an image"
        + (", the step a CUDA graph" if run.captured else "")
        + (f"; goes on at step {run.number}" if run.number else "")
    )
    if (curve := reference_of(config)) is not None:
        log.say(f"a reference run of this recipe was made here: {curve.name}, {curve.made['device']}")
    if not run.saved:
        return
    if run.saved.get("draws") != DRAWS and not isinstance(run.model, Classifier):
        log.say("the run was begun by an earlier version: it goes on with other noise and masks than it would have had")
    before = run.saved["micro_batches"]
    if before != run.micro_batches and isinstance(run.model, Classifier):
        log.say(
            f"the run had {before} micro-batches a step and now has {run.micro_batches} (ranks x accumulate): it goes "
            "on with other mixtures of pictures than it would have had"
        )
    if (found := difference(run.saved["source"], run.source)) is not None:
        log.say(
            f"{config.data.source} changed: the run had {run.saved['source']['images']} pictures there and now has "
            f"{len(dataset)} ({found.said}); it goes on with them in another order than it would have had. For a run "
            f"on these from its first step, from the weights so far: --init {config.out}, and another --out"
        )


class Sent(NamedTuple):
    """A step that was queued, and what its line in the log says beside what the device finds."""

    turn: int  # of `Told`
    number: int
    indices: Tensor
    row: dict[str, float] | None  # None: this step has no line


def make_steps(run: Run, log: RunLog | NoLog, stop: StopRequest, profiler: Profiler | NoProfiler) -> bool:
    """Steps until the run is done or asked to stop; returns whether it was asked to. The last step is looked at."""
    config, world, objective, before = run.config, run.world, run.objective, run.number
    labelled = config.model.num_classes > 0
    places = [place for part in run.step.parts for place in objective.places(run.step.micro, part)]
    loader = train_loader(
        run.dataset, config.data, batch_size=config.batch_size, seed=derive_seed(config.seed, 1),
        start=run.number * config.batch_size, places=places, device=world.device, stop=stop,
    )  # fmt: skip
    stop.patience = 0.0 if world.size == 1 else PATIENCE
    told = Told(world, len(run.step.metrics))
    rate = Rate(run)
    sent: Sent | None = None
    elapsed, asked = 0.0, False  # seconds of the last step; whether any rank is asked to stop

    def settle() -> None:
        """Read the last step sent, if it was not, and write its line."""
        nonlocal sent, asked
        if sent is None:
            return
        step, sent = sent, None
        values = told.read(step.turn)
        check_finite(run, step, values)
        *numbers, norm, seconds, stopping = values
        if world.size > 1:  # ranks stop and count time by what all of them know, which is a step old
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
            settle()  # the step before: the device works on this one meanwhile and is not kept waiting
            run.number += 1
            elapsed = time.perf_counter() - started
            run.seconds += elapsed if world.size == 1 else 0
            row = {"step": run.number, "images_seen": run.number * config.batch_size, "seconds": run.seconds, "lr": lr}
            row["epoch"] = run.number * config.batch_size / len(run.dataset)
            logged = run.number % config.log_every == 0 or run.progress() >= 1
            sent = Sent(turn, run.number, batch.indices, row if logged else None)
            if run.background is not None:
                run.background.check()
            log.progress(run.progress())
            with rate.paused():
                profiler.step()
            saves = run.due(config.save_minutes, config.save_every)
            draws = run.due(config.draw_minutes, config.draw_every) and run.progress() < 1
            evaluates = run.due(config.evaluate_minutes, None) and run.progress() < 1
            run.looked = run.seconds
            if saves or draws or evaluates:
                settle()  # weights of a loss that is not finite are never saved
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
    """The last checkpoint, and the last pictures. Returns the checkpoint's path; raises what a stop request asks for.

    before: steps that were done when this process took the run up.
    """
    if run.saved_path is None or run.saved_step != run.number:
        run.save()
    run.written()
    assert run.saved_path is not None
    if stopped:
        reason = stop.requested or signal.SIGTERM  # another rank's
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
    """Save the last step where no batch comes any more. Of several ranks the others wait in a step, for this one."""
    if run.world.size > 1 or run.number == before:
        return
    if run.saved_step != run.number:
        run.save()
    run.written()
    log.say(f"step {run.number} is saved: {run.saved_path}; the same command goes on from there")


def give_up(run: Run, stop: StopRequest, error: Stopped) -> None:
    """End all ranks, unsaved: asked to stop, this one has no batch, and the others wait for it in a step."""
    if run.background is not None:
        run.background.wait()
    reason = stop.requested or signal.SIGTERM
    end_all(
        f"rank {run.world.rank} was asked to stop by {reason.name}, and {error}; every rank stops where the last "
        f"checkpoint is. {GO_ON}", 128 + reason,
    )  # fmt: skip


@contextmanager
def finished(background: BackgroundSave | None) -> Iterator[None]:
    """Whatever ends the block, a checkpoint that is being written is written."""
    try:
        yield
    finally:
        if background is not None:
            background.wait()
