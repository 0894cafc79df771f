"""Monitoring during training: speed, pictures, a classifier's scores, a Fréchet distance.

All ranks share the slow work, so that none waits for another.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from umd.classifier import Classifier
from umd.errors import UserError
from umd.feature_networks import metric_names, open_features
from umd.images import from_uint8
from umd.machine.device import peak_flops, peak_memory
from umd.metrics import FeatureStatistics
from umd.model import UMD
from umd.objective import Objective
from umd.train.classify import show_scores
from umd.train.curves import reference_curve
from umd.train.data import open_held_out_or_train
from umd.train.distributed import World
from umd.train.features import read_ahead, spans
from umd.train.fingerprint import difference
from umd.train.latents import tokenizer_of
from umd.train.log import NoLog, RunLog
from umd.train.preview import has_share, picture_maker, preview_rows, rgb, sheets
from umd.train.reference import real_pictures
from umd.train.sample import Drawer, drawn_labels
from umd.train.sampling import GROUP, clips

if TYPE_CHECKING:
    from umd.train.loop import Run

STEPS = 50  # DDIM steps; fewer than for published scores, but enough for a curve
GUIDANCE = 1.5  # cfg_scale with labels: the paper's for scores


def announce(run: "Run", log: RunLog | NoLog) -> None:
    """Log network and device and, for a resumed run, what differs from before."""
    config, dataset, device = run.config, run.dataset, run.world.device
    weights = sum(p.numel() for p in run.model.parameters())
    log.say(
        f"{weights / 1e6:.1f} M parameters on {run.parallel.place(device)}, "
        f"{'bf16' if run.dtype == torch.bfloat16 else 'fp32'}, "
        f"{run.flops() / config.batch_size / 1e9:.2f} GFLOP an image"
        + (", the step a CUDA graph" if run.captured else "")
        + (f"; goes on at step {run.number}" if run.number else "")
    )
    if (curve := reference_curve(config)) is not None:
        log.say(f"a reference run of this recipe was made here: {curve.name}, {curve.made['device']}")
    if not run.saved:
        return
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


def shower(run: "Run", log: RunLog | NoLog) -> Callable[[Tensor], np.ndarray]:
    """A function that turns tensors into pictures on this rank. All ranks call this together.

    If one rank that draws lacks the VAE, all do without, so that their pictures fit into one sheet.
    """
    world, data = run.world, run.config.data
    assert run.preview is not None, "only for runs that draw"
    show: Callable[[Tensor], np.ndarray] = rgb
    reason = ""
    if has_share(world.rank, world.size, len(run.preview), run.config.model.num_classes):
        try:
            show = picture_maker(data, world.device)
        except UserError as error:
            reason = str(error)
    reasons = [reason for reason in world.agree(world.collect(reason)) if reason]
    if not reasons:
        return show
    log.say(f"pictures show the first channel of latents: {reasons[0]}")
    return rgb


def draw(run: "Run", log: RunLog | NoLog) -> None:
    """Draw the network's reconstructions of held-out pictures; score a classifier. All ranks call this together."""
    world = run.world
    with run.parallel.averaged(run.ema) as network:
        if isinstance(network, Classifier):
            if run.held_out is not None:
                show_scores(network, run.held_out, run.config, run.dtype, log, run.number, world)
            return
        assert run.preview is not None, "every run but a classifier's has some"
        clip = not run.config.data.vae_hash
        rows = preview_rows(
            network, run.objective, run.preview, run.dtype, run.show, clip, world.rank, world.size
        )  # fmt: skip
    for label, sheet in sheets(world.collect(rows)).items():
        log.picture(label, sheet, run.number)


class Distance:
    """The Fréchet distance of `config.evaluate_count` samples to the held-out pictures, computed by all ranks.

    The pictures' statistics are computed once and kept in the run's folder, keyed by everything they depend on.
    """

    def __init__(self, run: "Run", log: RunLog | NoLog):
        """All ranks call this together. Raises UserError before training starts if something is missing."""
        config, self.world = run.config, run.world
        self.run, self.count = run, config.evaluate_count
        with self.world.main_first():
            self.network = open_features().to(run.world.device).eval()
            self.tokenizer = tokenizer_of(config.data, run.world.device)
            dataset = open_held_out_or_train(config.data)
        if len(dataset) < 2:
            raise UserError(
                f"{dataset.name} holds out {len(dataset)} picture, and a Fréchet distance needs 2 or more; hold more "
                "out (--data.holdout), or leave evaluate_minutes at 0"
            )
        self.name = metric_names(self.network)["fd"]
        self.few = min(self.count, len(dataset)) < self.network.num_features
        self.steps = min(STEPS, config.schedule.num_steps)
        self.cfg_scale = GUIDANCE if config.model.num_classes else 1.0
        made, pictures = real_pictures(config.out, dataset, config.data, self.network, self.tokenizer)
        file = config.out / f"reference-{made.folder.name}.safetensors"
        if self.world.agree(file.exists()):
            self.reference = FeatureStatistics.load(file)
            return
        log.say(f"{self.name}: features of {len(dataset)} {dataset.split} pictures, kept in {file}")
        statistics = FeatureStatistics(self.network.num_features, self.network.name)
        mine = np.arange(len(dataset))[self.world.rank :: self.world.size]
        for _, x in read_ahead(mine, pictures) if len(mine) else ():
            statistics.update(self.features(x))
        self.reference = merged(statistics, self.world)
        if self.world.main:
            self.reference.save(file)

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        return self.network.outputs(x.to(self.world.device)).pooled

    def __call__(self, network: UMD) -> float:
        """Draw samples from `network` and return their distance, on every rank."""
        config, world = self.run.config, self.world
        classes, objective = network.config.num_classes, self.run.objective
        assert isinstance(objective, Objective), "a UMD's"
        labels = drawn_labels(range(classes), self.count, False, 0) if classes else None
        drawer = Drawer(
            network, objective.schedule, labels, self.count, num_steps=self.steps,
            cfg_scale=self.cfg_scale, eta=1.0, seed=0, clip=clips(config, self.tokenizer), dtype=self.run.dtype,
            batch=GROUP, tokenizer=self.tokenizer, capture="off",  # a failed recording would end the run
        )  # fmt: skip
        statistics = FeatureStatistics(self.network.num_features, self.network.name)
        for first, last in spans(self.count, GROUP)[world.rank :: world.size]:  # one network call each
            statistics.update(self.features(from_uint8(drawer.pictures(first, last))))
        return merged(statistics, world).distance(self.reference)


def merged(statistics: FeatureStatistics, world: World) -> FeatureStatistics:
    """Merge the feature statistics of all ranks. Returns them on every rank."""
    count = world.sum(torch.tensor([float(statistics.count)], dtype=torch.float64))
    mean = world.sum(statistics.mean * statistics.count) / count
    offset = statistics.mean - mean
    whole = FeatureStatistics(len(mean), statistics.name)
    whole.count, whole.mean = int(count), mean
    whole.scatter = world.sum(statistics.scatter + statistics.count * torch.outer(offset, offset))
    return whole


def evaluate(run: "Run", log: RunLog | NoLog) -> None:
    """Log the Fréchet distance of the EMA network (without an EMA, of the network). All ranks call this together."""
    made = run.distance
    assert made is not None, "made at the start of every run that has some"
    with run.parallel.averaged(run.ema) as network:
        assert isinstance(network, UMD), "RunConfig sees to it"
        value = made(network)
    log.scores(
        {"step": run.number, made.name: value},
        samples=made.count, ddim_steps=made.steps, cfg_scale=made.cfg_scale, few=made.few,
    )  # fmt: skip
    guided = f", guidance {made.cfg_scale}" if made.cfg_scale != 1 else ""
    few = " (fewer pictures than features: compares at these counts only)" if made.few else ""
    log.say(f"step {run.number}: {made.name} {value:.2f} of {made.count} samples, {made.steps} DDIM steps{guided}{few}")


class Rate:
    """Images per second and MFU since the last log line, without the time for saving and drawing."""

    def __init__(self, run: "Run"):
        self.images, self.device = run.config.batch_size, run.world.device
        self.flops = run.flops()
        self.peak = run.world.size * peak_flops(self.device, run.dtype) if run.world.main else math.inf
        self.steps, self.since = 0, time.perf_counter()

    def read(self) -> dict[str, float]:
        """The values for a log line. Starts a new window."""
        took, steps = time.perf_counter() - self.since, self.steps
        self.steps, self.since = 0, time.perf_counter()
        mfu = steps * self.flops / took / self.peak
        return {
            "images_per_second": steps * self.images / took,
            "mfu": mfu,
            "peak_memory_bytes": peak_memory(self.device),
        }

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start
