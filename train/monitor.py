"""What a training run looks at on its way: its rate, pictures, a classifier's scores, a Fréchet distance.

Every rank does its share of what takes time, so that none waits for another.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from umd.classifier import Classifier
from umd.config import ModelConfig
from umd.device import peak_flops, peak_memory
from umd.feature_networks import metric_names, open_features
from umd.images import from_uint8
from umd.metrics import FeatureStatistics
from umd.model import UMD
from umd.objective import Objective
from umd.train.classify import show_scores
from umd.train.data import open_dataset
from umd.train.distributed import World
from umd.train.features import CALL, read_ahead, spans
from umd.train.latents import tokenizer_of
from umd.train.log import NoLog, RunLog
from umd.train.preview import preview_rows, sheets
from umd.train.reference import real_pictures
from umd.train.sample import Drawer, clips, drawn_labels

if TYPE_CHECKING:
    from umd.train.loop import Run

STEPS = 50  # of DDIM; fewer than for published scores, as often enough for a curve
GUIDANCE = 1.5  # with labels: the paper's for scores


def draw(run: "Run", log: RunLog | NoLog) -> None:
    """Pictures of what the network makes of held-out ones; of a classifier its scores. All ranks call this together."""
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
    """The Fréchet distance of `config.evaluate_count` samples to the held-out pictures, by all ranks together.

    The pictures' statistics are made once and kept in the run's folder, under the name of all that they depend on.
    """

    def __init__(self, run: "Run"):
        config, self.world = run.config, run.world
        self.run, self.count, self.network = run, config.evaluate_count, open_features().to(run.world.device).eval()
        self.name = metric_names(self.network)["fd"]
        with self.world.main_first():
            dataset = open_dataset(config.data, "test")
            if len(dataset) == 0:
                dataset = open_dataset(config.data, "train")
        self.tokenizer = tokenizer_of(config.data, run.world.device)
        made, pictures = real_pictures(config.out, dataset, config.data, self.network, self.tokenizer)
        file = config.out / f"reference-{made.folder.name}.safetensors"
        if self.world.agree(file.exists()):
            self.reference = FeatureStatistics.load(file)
            return
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
        """The distance, on every rank."""
        config, world = self.run.config, self.world
        classes, objective = network.config.num_classes, self.run.objective
        assert isinstance(objective, Objective), "a UMD's"
        labels = drawn_labels(range(classes), self.count, False, 0) if classes else None
        drawer = Drawer(
            network, objective.schedule, labels, self.count, num_steps=min(STEPS, config.schedule.num_steps),
            cfg_scale=GUIDANCE if classes else 1.0, eta=1.0, seed=0, clip=clips(config, self.tokenizer),
            dtype=self.run.dtype, tokenizer=self.tokenizer, capture="off",  # a recording might fail, and end the run
        )  # fmt: skip
        statistics = FeatureStatistics(self.network.num_features, self.network.name)
        for first, last in spans(self.count, CALL)[world.rank :: world.size]:
            statistics.update(self.features(from_uint8(drawer.pictures(first, last))))
        return merged(statistics, world).distance(self.reference)


def merged(statistics: FeatureStatistics, world: World) -> FeatureStatistics:
    """The statistics of all ranks' features, on every rank."""
    count = world.sum(torch.tensor([float(statistics.count)], dtype=torch.float64))
    mean = world.sum(statistics.mean * statistics.count) / count
    offset = statistics.mean - mean
    whole = FeatureStatistics(len(mean), statistics.name)
    whole.count, whole.mean = int(count), mean
    whole.scatter = world.sum(statistics.scatter + statistics.count * torch.outer(offset, offset))
    return whole


def evaluate(run: "Run", log: RunLog | NoLog) -> None:
    """Log the Fréchet distance of the averaged network. All ranks call this together."""
    assert isinstance(run.config.model, ModelConfig), "RunConfig sees to it"
    if run.distance is None:
        run.distance = Distance(run)
    with run.parallel.averaged(run.ema) as network:
        assert isinstance(network, UMD)
        value = run.distance(network)
    log.scores({"step": run.number, run.distance.name: value, "evaluated_samples": run.distance.count})
    log.say(f"step {run.number}: {run.distance.name} {value:.2f} of {run.distance.count} samples in {STEPS} steps")


class Rate:
    """Images a second and MFU since the last line of the log, without the time for saving and drawing."""

    def __init__(self, run: "Run"):
        self.images, self.device = run.config.batch_size, run.world.device
        self.flops = run.flops()
        self.peak = run.world.size * peak_flops(self.device, run.dtype) if run.world.main else math.inf
        self.steps, self.since = 0, time.perf_counter()

    def read(self) -> dict[str, float]:
        """What the line of a step says; a new window begins."""
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
