"""The training loop: set up, resume, and then one step after another, read from top to bottom."""

import json
import math
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from umd.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    load_model_state,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from umd.config import ModelConfig
from umd.device import autocast, keep_freed_memory, peak_flops, pick_device, pick_dtype
from umd.ema import EMA, ema_rate, warm_rate
from umd.errors import UserError
from umd.flops import step_flops
from umd.images import grid
from umd.model import UMD
from umd.objective import Objective
from umd.sampler import ddim_sample
from umd.schedule import NoiseSchedule
from umd.train.data import center_view, derive_seed, describe, open_dataset, train_loader
from umd.train.log import RunLog
from umd.train.optim import adamw, lr_scale
from umd.train.preview import reconstructions, rgb
from umd.train.run import RunConfig, to_plain, write_config

PREVIEW_IMAGES = 8


class Diverged(UserError):
    """The loss became NaN or infinite."""


def train(config: RunConfig, console: Console | None = None, name: str = "train") -> Path:
    """Train to the end of the run, or go on with the run in `config.out`. Returns the last checkpoint.

    A step is a pure function of (weights, optimiser, EMA, step number): data order, crops, noise and masks are
    derived from the seed, so a resumed run is the run that was never stopped, to the bit on a CPU.

    Raises:
        UserError: settings that do not fit together, data that cannot be read, another network in `config.out`.
        Diverged: NaN or infinite loss; the last good checkpoint is kept and the batch is described in `nan-dump.json`.
        KeyboardInterrupt, SystemExit(143): after saving, on Ctrl-C or SIGTERM.
    """
    console = console or Console()
    device = pick_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    dtype = pick_dtype(config.precision, device)
    dataset = open_dataset(config.data, "train")
    schedule = NoiseSchedule(config.schedule.name, config.schedule.num_steps, config.schedule.rho)
    objective = Objective(config.model, config.objective, schedule)
    labelled = config.model.num_classes > 0
    if labelled and len(dataset.class_names) != config.model.num_classes:
        raise UserError(
            f"the model has {config.model.num_classes} classes but {dataset.name} has {len(dataset.class_names)}; "
            "fine-tune on a labelled source, one class for each row of the label table"
        )

    torch.manual_seed(derive_seed(config.seed, 0))
    model = UMD(config.model)
    if config.init is not None:
        load_pretrained(model, config.init)
    model.to(device).set_checkpointing(config.checkpointing)
    peak_lr = config.optim.lr * config.batch_size / 256
    optimizer = adamw(model, peak_lr, config.optim.betas, config.optim.weight_decay)
    final_rate = min(1.0, ema_rate(config.batch_size, config.optim.ema))
    ema = EMA(model, final_rate) if final_rate > 0 else None

    step, seconds = 0, 0.0
    if latest_checkpoint(config.checkpoints) is not None:
        step, seconds = resume(config, model, optimizer, ema, device)
    write_config(config)
    network = torch.compile(model) if config.compile else model
    total_steps = config.steps or math.ceil(config.epochs * len(dataset) / config.batch_size)

    def progress() -> float:
        by_clock = config.minutes > 0 and config.steps == 0
        return seconds / (60 * config.minutes) if by_clock else step / total_steps

    micro = config.batch_size // config.accumulate
    noised, clean = objective.split(micro)
    keep = (objective.keep_noised,) * noised + (objective.keep_clean,) * clean
    flops = config.accumulate * step_flops(config.model, keep, noised + min(clean, 1))
    peak = peak_flops(device, dtype)
    preview = preview_images(config, device)

    def save() -> Path:
        tensors = {"model": dict(model.named_parameters()), "optimizer": optimizer_tensors(optimizer, model)}
        if ema is not None:
            tensors["ema"] = ema.state_dict()
        state = {"config": to_plain(config), "seconds": seconds, "images_seen": step * config.batch_size}
        return save_checkpoint(config.checkpoints, step, tensors, state, keep=config.keep)

    def draw() -> None:
        with averaged(ema, model):
            for label, sheet in previews(model, objective, preview, dtype).items():
                log.picture(label, sheet, step)

    saved = latest_checkpoint(config.checkpoints)
    with RunLog(config.out, console, step, name) as log, stop_signal() as stop:
        log.say(describe(dataset))
        log.say(
            f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters on {device}, "
            f"{'bf16' if dtype == torch.bfloat16 else 'fp32'}, {flops / config.batch_size / 1e9:.2f} GFLOP an image"
            + (f"; goes on at step {step}" if step else "")
        )
        loader = train_loader(
            dataset, config.data, batch_size=config.batch_size, seed=derive_seed(config.seed, 1),
            start=step * config.batch_size, device=device,
        )  # fmt: skip
        pending: tuple[int, Tensor, Tensor, Tensor] | None = None  # last step: number, loss and parts, indices, norm
        window, window_start = 0, time.perf_counter()
        try:
            while progress() < 1 and not stop.requested:
                started = time.perf_counter()
                batch = next(loader)
                for group in optimizer.param_groups:
                    group["lr"] = peak_lr * lr_scale(progress(), config.optim.warmup)
                sums = torch.zeros(4, device=device)
                for i in range(config.accumulate):
                    part = slice(i * micro, (i + 1) * micro)
                    labels = batch.labels[part] if labelled else None
                    corruption = objective.corrupt(micro, derive_seed(config.seed, 2, step, i), device, labels)
                    with autocast(device, dtype):
                        loss, parts = objective(network, batch.x_start[part], corruption)
                    (loss / config.accumulate).backward()
                    sums += torch.cat([loss.detach()[None], parts]) / config.accumulate
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip or math.inf)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if ema is not None:
                    ema.rate = warm_rate(final_rate, step)
                    ema.update(model)

                # The step before is read now: a device works on this one meanwhile and is not kept waiting.
                check_finite(config, pending, saved)
                step += 1
                pending = (step, sums, batch.indices, norm)
                window += 1
                seconds += time.perf_counter() - started
                log.progress(progress())
                if step % config.log_every == 0 or progress() >= 1:
                    check_finite(config, pending, saved)
                    total, loss_eps, loss_x0, loss_clean = sums.tolist()
                    elapsed = time.perf_counter() - window_start
                    row = {"step": step, "images_seen": step * config.batch_size}
                    row |= {"epoch": step * config.batch_size / len(dataset), "seconds": seconds, "loss": total}
                    if noised:
                        row |= {"loss_noised_eps": loss_eps, "loss_noised_x0": loss_x0}
                    if clean:
                        row |= {"loss_clean": loss_clean}
                    row |= {"lr": optimizer.param_groups[0]["lr"], "grad_norm": float(norm)}
                    row |= {"images_per_second": window * config.batch_size / elapsed}
                    row |= {"mfu": window * flops / elapsed / peak}
                    log.row(row)
                    window, window_start = 0, time.perf_counter()
                paused = time.perf_counter()
                if step % config.save_every == 0:
                    check_finite(config, pending, saved)
                    saved = save()
                if config.draw_every and step % config.draw_every == 0 and progress() < 1:
                    draw()
                window_start += time.perf_counter() - paused
        finally:
            loader.close()
        check_finite(config, pending, saved)
        if saved is None or load_step(saved) != step:
            saved = save()
        if stop.requested:
            log.say(f"stopped by {stop.requested.name} at step {step}; saved {saved}; run the same command to go on")
            if stop.requested is signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + stop.requested)
        if config.draw_every and pending is not None:
            draw()
        log.progress(1.0)
        log.say(f"done: step {step}, {seconds / 60:.1f} min of training, saved {saved}")
    return saved


def load_step(path: Path) -> int:
    return load_checkpoint(path, parts=[]).step


def load_pretrained(model: UMD, init: Path) -> None:
    """Weights of another run into `model`; label embeddings may be new. Raises UserError saying what differs."""
    path = init / "checkpoints" if (init / "checkpoints").is_dir() else init
    saved = load_checkpoint(path, parts=["model"])
    check_same_network(saved, model.config, init, but=("num_classes",))
    load_model_state(
        model, saved.tensors["model"], allow_missing=("y_embedder.",),
        saved_config=saved.state.get("config", {}).get("model", {}), config=to_plain(model.config),
    )  # fmt: skip


def check_same_network(saved: Checkpoint, config: ModelConfig, folder: Path, but: tuple[str, ...] = ()) -> None:
    """Raise UserError naming the settings that differ, also those that change no shape, such as the heads."""
    before, now = saved.state.get("config", {}).get("model", {}), to_plain(config)
    differ = [
        f"{name} {before[name]}, not {now[name]}"
        for name in now
        if name not in but and name in before and before[name] != now[name]
    ]
    if differ:
        raise UserError(
            f"{folder} holds a network with {'; '.join(differ)}: "
            "give the settings it was trained with, or another folder"
        )


def resume(
    config: RunConfig, model: UMD, optimizer: torch.optim.Optimizer, ema: EMA | None, device: torch.device
) -> tuple[int, float]:
    """Put back the newest checkpoint of the run. Returns (step, seconds trained)."""
    parts = ["model", "optimizer"] + (["ema"] if ema is not None else [])
    saved = load_checkpoint(config.checkpoints, parts=parts, device=device)
    check_same_network(saved, config.model, config.out)
    load_model_state(model, saved.tensors["model"])
    load_optimizer_tensors(optimizer, model, saved.tensors["optimizer"])
    if ema is not None:
        ema.load_state_dict(saved.tensors["ema"])
    if saved.state["images_seen"] != saved.step * config.batch_size:
        raise UserError(
            f"{config.out} was trained with batch_size {saved.state['config']['batch_size']}, not {config.batch_size}; "
            "resume with the same batch, or start a new run from its weights with --init"
        )
    return saved.step, saved.state["seconds"]


def check_finite(config: RunConfig, pending: tuple[int, Tensor, Tensor, Tensor] | None, saved: Path | None) -> None:
    """Stop the run if the loss of a finished step is not a number; its weights are never saved."""
    if pending is None:
        return
    step, sums, indices, norm = pending
    values = sums.tolist()
    if all(math.isfinite(v) for v in values) and math.isfinite(float(norm)):
        return
    dump = config.out / "nan-dump.json"
    names = ("loss", "loss_noised_eps", "loss_noised_x0", "loss_clean")
    dump.write_text(
        json.dumps(
            {
                "step": step,
                "grad_norm": str(float(norm)),
                **{key: str(value) for key, value in zip(names, values, strict=True)},
                "batch_indices": indices.tolist(),
                "corruption_seeds": [derive_seed(config.seed, 2, step - 1, i) for i in range(config.accumulate)],
                "last_good_checkpoint": saved and str(saved),
            },
            indent=1,
        )
    )
    raise Diverged(
        f"the loss or its gradient is not finite at step {step} (loss {values[0]}, gradient norm {float(norm)}; images "
        f"{indices[:8].tolist()}...); {dump} has the batch, last good checkpoint: {saved or 'none'}; "
        "lower the lr or the batch"
    )


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


@contextmanager
def averaged(ema: EMA | None, model: UMD):
    if ema is None:
        yield model
    else:
        with ema.applied(model):
            yield model


def preview_images(config: RunConfig, device: torch.device) -> Tensor:
    """A few held-out images (of the training split where nothing is held out): [n, C, H, W]."""
    dataset = open_dataset(config.data, "test")
    if len(dataset) == 0:
        dataset = open_dataset(config.data, "train")
    chosen = np.linspace(0, len(dataset) - 1, min(PREVIEW_IMAGES, len(dataset))).astype(int)
    return center_view(dataset, chosen, config.data).to(device)


def previews(model: UMD, objective: Objective, x: Tensor, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """Sheets by name: masked input, reconstruction and original in three rows; with labels, a sample of each class."""
    sheets = {}
    T = objective.schedule.num_steps
    r0 = objective.config.no_noise_prob
    trained = ({"reconstruction": 0} if r0 > 0 else {}) | ({"denoising": T // 4} if r0 < 1 else {})
    for label, timestep in trained.items():
        triplets = reconstructions(model, objective, x, timestep, dtype=dtype)
        sheets[label] = grid(
            np.stack([picture for row in zip(*triplets, strict=True) for picture in row]), len(triplets)
        )
    classes = model.config.num_classes
    if classes:
        labels = torch.arange(min(classes, 16), device=x.device)

        def denoise(x_t: Tensor, t: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
            with autocast(x_t.device, dtype):
                return model.denoise(x_t, t, y)

        with torch.no_grad():
            samples = ddim_sample(
                denoise, (len(labels), *x.shape[1:]), objective.schedule, num_steps=25, labels=labels,
                null_label=classes, cfg_scale=2.0, device=x.device,
            )  # fmt: skip
        sheets["samples"] = grid(rgb(samples), columns=8)
    return sheets
