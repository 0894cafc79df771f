"""The training loop: set up, resume, and then one step after another, read from top to bottom."""

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from umd import ops
from umd.checkpoint import BackgroundSave, checkpoint_path, load_model_state, save_checkpoint, split
from umd.classifier import Classifier
from umd.conditions import make_conditions
from umd.device import autocast, keep_freed_memory, peak_flops, peak_memory, pick_dtype
from umd.diffmae import DiffMAE
from umd.ema import EMA, ema_rate, warm_rate
from umd.errors import UserError
from umd.images import grid
from umd.methods import AnyModel, AnyObjective, build_model, build_objective
from umd.model import UMD
from umd.objective import DiffMAEObjective, Objective
from umd.sampler import ddim_sample, model_times
from umd.schedule import NoiseSchedule
from umd.train.classify import open_held_out, show_scores
from umd.train.data import center_view, derive_seed, describe, open_dataset, reader, train_loader
from umd.train.distributed import World, join
from umd.train.latents import with_vae
from umd.train.log import NoLog, RunLog
from umd.train.optim import adamw, lr_scale, narrow_gradients
from umd.train.parallel import DDP, Alone, LossStep, Zero, strategy
from umd.train.preview import filled_sheets, picture_maker, reconstructions, rgb
from umd.train.quarantine import record_quarantine
from umd.train.resume import fingerprint, load_pretrained, newest_checkpoint
from umd.train.run import RunConfig, check_attention, to_plain, write_config

PREVIEW_IMAGES = 8


class Diverged(UserError):
    """The loss became NaN or infinite."""


def train(config: RunConfig, console: Console | None = None, name: str = "train") -> Path:
    """Train to the end of the run, or go on with the run in `config.out`. Returns the last checkpoint.

    A step is a pure function of (weights, optimiser, EMA, step number): data order, crops, noise and masks are
    derived from the seed, so a resumed run is the run that was never stopped, to the bit on a CPU. Micro-batches are
    numbered over all ranks, so W ranks with `accumulate` A make the steps of one rank with W·A.

    Raises:
        UserError: settings that do not fit together, data that cannot be read, another run in `config.out`.
        Diverged: NaN or infinite loss; the last good checkpoint is kept and the batch is described in `nan-dump.json`.
        KeyboardInterrupt, SystemExit(143): after saving, on Ctrl-C or SIGTERM.
    """
    world = join(config.device, config.parallel)
    with world.explained():
        return train_rank(config, world, console or Console(), name)


def train_rank(config: RunConfig, world: World, console: Console, name: str) -> Path:
    """`train` on one of the ranks. Only rank 0 prints, logs, draws and writes."""
    device = world.device
    if device.type == "cpu":
        keep_freed_memory()
    micro, left = divmod(config.batch_size, world.size * config.accumulate)
    if left or not micro:
        raise UserError(
            f"batch_size {config.batch_size} is not divisible by {world.size} ranks x accumulate {config.accumulate}; "
            f"use a multiple of {world.size * config.accumulate}"
        )
    dtype = pick_dtype(config.precision, device)
    check_attention(config, device, dtype)
    with world.main_first():
        dataset = open_dataset(config.data, "train")
        config = replace(config, data=with_vae(config.data, dataset))
    schedule = NoiseSchedule(config.schedule.name, config.schedule.num_steps, config.schedule.rho)
    objective = build_objective(config.model, config.objective, schedule, len(dataset))
    labelled = config.model.num_classes > 0
    if labelled and len(dataset.class_names) != config.model.num_classes:
        raise UserError(
            f"the model has {config.model.num_classes} classes but {dataset.name} has {len(dataset.class_names)}; "
            "fine-tune on a labelled source, one class for each row of the label table"
        )

    torch.manual_seed(derive_seed(config.seed, 0))
    model = build_model(config.model)
    model.set_checkpointing(config.checkpointing)
    source = fingerprint(dataset)
    saved_path, saved = newest_checkpoint(config, world, source)
    if saved is not None:
        saved = replace(saved, tensors={part: split(named, model) for part, named in saved.tensors.items()})
        load_model_state(model, saved.tensors["model"])
    elif config.init is not None:
        load_pretrained(model, config.init, config.data)
    num_weights = sum(p.numel() for p in model.parameters())
    peak_lr = config.optim.lr * config.batch_size / 256
    parallel = spread(config, world, model, objective, peak_lr, dtype)
    final_rate = min(1.0, ema_rate(config.batch_size, config.optim.ema))
    ema = EMA(parallel.weights, final_rate) if final_rate > 0 else None

    step, seconds, saved_step = 0, 0.0, None
    if saved is not None:
        parallel.load(saved.tensors, ema)
        step, seconds, saved_step = saved.step, saved.state["seconds"], saved.step
    micro_batches = world.size * config.accumulate
    before = {"micro_batches": micro_batches, "source": source} | (saved.state if saved is not None else {})
    saved = None  # its tensors
    if world.main:
        write_config(config)
        if quarantined := getattr(dataset, "quarantined", None):
            record_quarantine(quarantined, len(dataset), config.out)
    total_steps = config.steps or math.ceil(config.epochs * len(dataset) / config.batch_size)

    def progress() -> float:
        by_clock = config.minutes > 0 and config.steps == 0
        return seconds / (60 * config.minutes) if by_clock else step / total_steps

    part_names = objective.part_names(micro)
    flops = micro_batches * objective.step_flops(micro)
    peak = world.size * peak_flops(device, dtype) if world.main else math.inf
    classifies = isinstance(model, Classifier)
    held_out = open_held_out(config) if world.main and classifies and config.draw_every else None
    preview = preview_images(config, device) if world.main and not classifies else None
    # On one CPU a copy and a thread would take from the step what they save.
    background = BackgroundSave() if world.size > 1 or device.type == "cuda" else None

    def save() -> Path:
        if background is not None:
            background.wait()  # it holds the memory that is filled next
        tensors = parallel.tensors(ema)
        state = {"config": to_plain(config), "seconds": seconds, "images_seen": step * config.batch_size}
        state |= {"micro_batches": micro_batches, "source": source}
        write = save_checkpoint if background is None else background.save
        if not world.main:
            return checkpoint_path(config.checkpoints, step)
        return write(config.checkpoints, step, tensors, state, keep=config.keep)

    def draw() -> None:
        with parallel.averaged(ema) as network:
            if held_out is not None and isinstance(network, Classifier):
                show_scores(network, held_out, config, dtype, log, step)
            elif preview is not None and network is not None:
                sheets = previews(network, objective, preview, dtype, show, clip=not config.data.vae_hash)
                for label, sheet in sheets.items():
                    log.picture(label, sheet, step)

    writer = RunLog(config.out, console, step, name, config.wandb, to_plain(config)) if world.main else NoLog()
    with writer as log, finished(background), stop_signal() as stop, ops.attention(config.attention):
        log.say(f"{describe(dataset)}; {reader(dataset, config.data)}")
        log.say(
            f"{num_weights / 1e6:.1f} M parameters on {parallel.place(device)}, "
            f"{'bf16' if dtype == torch.bfloat16 else 'fp32'}, {flops / config.batch_size / 1e9:.2f} GFLOP an image"
            + (f"; goes on at step {step}" if step else "")
        )
        if before["micro_batches"] != micro_batches:
            log.say(
                f"the run had {before['micro_batches']} micro-batches a step and now has {micro_batches} (ranks x "
                "accumulate): it goes on, with other noise and masks than it would have had"
            )
        if before["source"] != source:
            log.say(
                f"{config.data.source} changed: the run had {before['source']['images']} pictures there and now has "
                f"{len(dataset)}; it goes on with them in another order than it would have had"
            )
        show: Callable[[Tensor], np.ndarray] = rgb
        if world.main and config.draw_every and not classifies:
            try:
                show = picture_maker(config.data, device)
            except UserError as error:  # a run can do without
                log.say(f"pictures show the first channel of latents: {error}")
        loader = train_loader(
            dataset, config.data, batch_size=config.batch_size, seed=derive_seed(config.seed, 1),
            start=step * config.batch_size, rank=world.rank, world_size=world.size, device=device,
        )  # fmt: skip
        pending: tuple[int, Tensor, Tensor, Tensor] | None = None  # last step: number, sums, indices, gradient norm
        window, window_start = 0, time.perf_counter()
        elapsed, agreed_stop = 0.0, False

        def read() -> list[float]:
            """The sums of the last step, waited for."""
            return check_finite(config, world, pending, saved_path, part_names)

        def stopping() -> bool:
            return agreed_stop if world.size > 1 else stop.requested is not None

        try:
            while progress() < 1 and not stopping():
                started = time.perf_counter()
                batch = next(loader)
                lr = peak_lr * lr_scale(progress(), config.optim.warmup)
                for group in parallel.optimizer.param_groups:
                    group["lr"] = lr * group["lr_multiplier"]
                sums = torch.zeros(1 + len(part_names) + 2, device=device)  # loss, its parts, clock and stop request
                for i in range(config.accumulate):
                    part = slice(i * micro, (i + 1) * micro)
                    labels = batch.labels[part] if labelled and batch.labels is not None else None
                    number = world.rank * config.accumulate + i  # of the micro-batch among those of all ranks
                    corruption = objective.corrupt(
                        micro, derive_seed(config.seed, 2, step, number), device, labels, batch.indices[part]
                    )
                    last = i == config.accumulate - 1
                    loss, parts = parallel.forward_backward(batch.x_start[part], corruption, last)
                    sums[:-2] += torch.cat([loss[None], parts]) / config.accumulate
                sums[-2], sums[-1] = elapsed, float(stop.requested is not None)
                world.mean_(sums)
                norm = parallel.update()
                if ema is not None:
                    ema.rate = warm_rate(final_rate, step)
                    ema.update(parallel.weights)

                # The step before is read now: a device works on this one meanwhile and is not kept waiting.
                before_last = read()
                step += 1
                pending = (step, sums, batch.indices, norm)
                window += 1
                elapsed = time.perf_counter() - started
                # Ranks stop and count time by what all of them know, which is a step old.
                seconds += elapsed if world.size == 1 else before_last[-2]
                agreed_stop = before_last[-1] > 0
                if background is not None:
                    background.check()
                log.progress(progress())
                if step % config.log_every == 0 or progress() >= 1:
                    total, *parts_read = read()[:-2]
                    took = time.perf_counter() - window_start
                    row: dict[str, float] = {"step": step, "images_seen": step * config.batch_size}
                    row |= {"epoch": step * config.batch_size / len(dataset), "seconds": seconds, "loss": total}
                    row |= {name: value for name, value in zip(part_names, parts_read, strict=True) if name}
                    row |= {"lr": lr, "grad_norm": float(norm), "images_per_second": window * config.batch_size / took}
                    row |= {"mfu": window * flops / took / peak, "peak_memory_bytes": peak_memory(device)}
                    log.row(row)
                    window, window_start = 0, time.perf_counter()
                paused = time.perf_counter()
                if step % config.save_every == 0:
                    read()
                    saved_path, saved_step = save(), step
                if config.draw_every and step % config.draw_every == 0 and progress() < 1:
                    draw()
                window_start += time.perf_counter() - paused
        finally:
            loader.close()
        read()
        if saved_path is None or saved_step != step:
            saved_path = save()
        if background is not None:
            background.wait()
        if stopping():
            reason = stop.requested or signal.SIGTERM  # another rank's
            log.say(f"stopped by {reason.name} at step {step}; saved {saved_path}; run the same command to go on")
            if reason is signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + reason)
        if config.draw_every and pending is not None:
            draw()
        log.progress(1.0)
        log.say(f"done: step {step}, {seconds / 60:.1f} min of training, saved {saved_path}")
    return saved_path


def spread(
    config: RunConfig, world: World, model: AnyModel, objective: AnyObjective, peak_lr: float, dtype: torch.dtype
) -> Alone | DDP | Zero:
    """The model, its optimiser and the forward pass, laid over the ranks."""
    how = strategy(config.parallel, world, sum(p.numel() for p in model.parameters()))
    stage = config.parallel.zero_stage
    if how == "zero" and isinstance(model, Classifier):
        raise UserError("a classifier trains with DDP, not ZeRO; leave out --parallel.strategy zero")
    if how == "zero" and stage == 3 and config.compile:
        raise UserError("compile does not go with ZeRO 3, whose weights come and go; use --parallel.zero-stage 2")
    if how == "zero" and config.parallel.wire == "bf16":
        raise UserError("parallel.wire bf16 is DDP's; ZeRO sends bf16 in a bf16 run: leave it out, or use ddp")
    if how == "ddp" and config.parallel.wire == "bf16" and world.device.type != "cuda":
        raise UserError("parallel.wire bf16 is sent by NCCL, between GPUs; leave it out here")
    if how != "zero":
        model.to(world.device)
    if how == "zero" and config.optim.fused == "apex":
        raise UserError("apex's FusedAdam goes with one process or DDP, not ZeRO; leave optim.fused at auto")
    recipe = config.optim
    optimizer = adamw(model, peak_lr, recipe.betas, recipe.weight_decay, recipe.layer_decay, recipe.fused)
    loss = LossStep(torch.compile(model) if config.compile else model, objective, dtype)
    if how == "alone":
        if config.accumulate == 1 and dtype == torch.bfloat16 and not config.compile:
            narrow_gradients(model, optimizer)
        return Alone(model, loss, optimizer, config.accumulate, config.optim.clip)
    if how == "ddp":
        return DDP(model, loss, optimizer, config.accumulate, config.optim.clip, world, config.parallel.wire)
    micro = config.batch_size // (world.size * config.accumulate)
    return Zero(model, loss, optimizer, config.accumulate, config.optim.clip, world, stage, micro, dtype)


def check_finite(
    config: RunConfig,
    world: World,
    pending: tuple[int, Tensor, Tensor, Tensor] | None,
    saved: Path | None,
    part_names: tuple[str | None, ...],
) -> list[float]:
    """The sums of a finished step. Stops the run if its loss is not a number; its weights are never saved."""
    if pending is None:
        return [0.0, 0.0]  # no clock, no stop request
    step, sums, indices, norm = pending
    values = sums.tolist()
    if all(math.isfinite(v) for v in values) and math.isfinite(float(norm)):
        return values
    indices = world.gather(indices)
    dump = config.out / "nan-dump.json"
    numbers = range(world.size * config.accumulate)
    record = {
        "step": step,
        "grad_norm": str(float(norm)),
        "loss": str(values[0]),
        **{name: str(value) for name, value in zip(part_names, values[1:-2], strict=True) if name},
        "batch_indices": indices.tolist(),
        "corruption_seeds": [derive_seed(config.seed, 2, step - 1, i) for i in numbers],
        "last_good_checkpoint": saved and str(saved),
    }
    if world.main:
        dump.write_text(json.dumps(record, indent=1))
    raise Diverged(
        f"the loss or its gradient is not finite at step {step} (loss {values[0]}, gradient norm {float(norm)}; images "
        f"{indices[:8].tolist()}...); {dump} has the batch, last good checkpoint: {saved or 'none'}; "
        "go on with --precision fp32, or start another run from its weights (--init) with a lower lr"
    )


@contextmanager
def finished(background: BackgroundSave | None) -> Iterator[None]:
    """Whatever ends the block, a checkpoint that is being written is written."""
    try:
        yield
    finally:
        if background is not None:
            background.wait()


class StopRequest:
    requested: signal.Signals | None = None


@contextmanager
def stop_signal():
    """Ctrl-C and SIGTERM are noted and acted on after the step; a second Ctrl-C interrupts at once."""
    stop = StopRequest()

    def note(number: int, _frame: object) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.requested = signal.Signals(number)

    try:
        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, where signals never arrive
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def preview_images(config: RunConfig, device: torch.device) -> Tensor:
    """A few held-out images (of the training split where nothing is held out): [n, C, H, W]."""
    dataset = open_dataset(config.data, "test")
    if len(dataset) == 0:
        dataset = open_dataset(config.data, "train")
    chosen = np.linspace(0, len(dataset) - 1, min(PREVIEW_IMAGES, len(dataset))).astype(int)
    return center_view(dataset, chosen, config.data).to(device)


def previews(
    model: AnyModel, objective: AnyObjective, x: Tensor, dtype: torch.dtype, show: Callable[[Tensor], np.ndarray],
    clip: bool,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Sheets by name: masked input, reconstruction and original in three rows; with labels, a sample of each class."""
    if isinstance(model, DiffMAE) and isinstance(objective, DiffMAEObjective):
        return filled_sheets(model, objective, x, dtype, show, clip)
    assert isinstance(model, UMD) and isinstance(objective, Objective), "a classifier shows scores instead"
    sheets = {}
    T, r0 = objective.schedule.num_steps, objective.config.no_noise_prob
    trained = ({"reconstruction": 0} if r0 > 0 else {}) | ({"denoising": T // 4} if r0 < 1 else {})
    for label, timestep in trained.items():
        triplets = reconstructions(model, objective, x, timestep, dtype=dtype, show=show)
        sheets[label] = grid(
            np.stack([picture for row in zip(*triplets, strict=True) for picture in row]), len(triplets)
        )
    if classes := model.config.num_classes:
        labels = torch.arange(min(classes, 16), device=x.device)
        conditions = make_conditions(model, model_times(25, T), labels)

        def denoise(x_t: Tensor, t: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
            with autocast(x_t.device, dtype):
                return model.denoise(x_t, t, y, conditions)

        with torch.no_grad():
            samples = ddim_sample(
                denoise, (len(labels), *x.shape[1:]), objective.schedule, num_steps=25, labels=labels,
                null_label=classes, cfg_scale=2.0, clip=clip, device=x.device,
            )  # fmt: skip
        sheets["samples"] = grid(show(samples), columns=8)
    return sheets
