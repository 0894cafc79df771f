"""The plan of `umd bench reproduce paper`: methods, sizes, and the pieces of each training."""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from umd.bench.paper_measures import Sizes, distance, floors, probe
from umd.checkpoint import load_checkpoint, save_checkpoint
from umd.config import OBJECTIVES, ModelConfig, ObjectiveConfig, Prediction, ScheduleConfig
from umd.flops import forward_flops
from umd.methods import build_objective
from umd.model import UMD
from umd.objective import Corruption, Objective
from umd.schedule import NoiseSchedule, schedule_of
from umd.train.data import open_dataset
from umd.train.heads import heads_of
from umd.train.loop import train
from umd.train.opened import open_run_of
from umd.train.pixels import Split
from umd.train.run import RunConfig, finetune_config, read_config, to_plain, write_config
from umd.train.settings import DataConfig, OptimConfig
from umd.train.sources import ImageDataset
from umd.train.weights import weights_identity

FASHION = Path("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz")
Name = Literal["fashion", "emoji"]
NAMES: tuple[Name, ...] = get_args(Name)
Head = Literal["both", "x0", "eps"]
SHIPPED_PICTURES: dict[Split, int] = {"train": 200, "test": 100}  # of each class
WARMUP = 0.5  # fraction of the steps up to the first mark
# Speeds of one core with AVX2; used only for the first estimate of the time left.
FLOPS, FEATURE_SECONDS, PROBE_SECONDS = 2.4e10, 0.043, 22.0


@dataclass(frozen=True)
class Method:
    """A row of Table 1, or a column of Table 2."""

    name: str
    objective: ObjectiveConfig
    adaLN: bool = True
    head: Head = "both"  # output that learns from noised samples, and that samples are drawn from
    ablation: bool = False

    @property
    def leads(self) -> Prediction:
        """The output that samples are drawn from."""
        return "x_start" if self.head == "x0" else "eps"

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


UMD_OBJECTIVE = OBJECTIVES["umd"]
METHODS = (
    Method("MAE", OBJECTIVES["mae"], adaLN=False),
    Method("DiT", OBJECTIVES["dit"]),
    Method("MaskDiT", OBJECTIVES["maskdit"]),
    Method("UMD", UMD_OBJECTIVE),
)
# Table 2. Two numbers are unreadable in our copy of the paper. The hours in the table's first row bound them, as time
# is proportional to (3 · visible + 256) tokens. With fewer noise-free samples the hours rise from 60 to 70: a share of
# 0.15 to 0.2. With more of the noised ones masked they fall to 48: a ratio of 0.7.
ABLATIONS = (
    Method("UMD, only x0", UMD_OBJECTIVE, head="x0", ablation=True),
    Method("UMD, only noise", UMD_OBJECTIVE, head="eps", ablation=True),
    Method("UMD, fewer noise-free", replace(UMD_OBJECTIVE, no_noise_prob=0.2), ablation=True),
    Method("UMD, noised 70 % masked", replace(UMD_OBJECTIVE, mask_ratio=0.7), ablation=True),
    Method("UMD, noised not masked", replace(UMD_OBJECTIVE, mask_ratio=0.0), ablation=True),
    Method("UMD, no adaLN", UMD_OBJECTIVE, adaLN=False, ablation=True),
)


@dataclass(frozen=True)
class Plan:
    """Sizes and lengths of all trainings."""

    width: int = 96
    depth: int = 4  # with one decoder block, the FLOPs of the methods have about the ratios of the paper's hours
    decoder_depth: int = 1
    heads: int = 6
    batch: int = 64
    lr: float = 1e-2  # for a batch of 256, as in the preset umd-tiny
    steps: int = 1000  # for equal images; UMD's FLOPs in them define equal compute
    marks: tuple[float, ...] = (1 / 4, 1 / 2)  # fractions of the steps at which the training is probed
    finetune_steps: int = 160
    finetune_marks: tuple[float, ...] = (1 / 4, 1 / 2)
    seeds: tuple[int, ...] = (0, 1, 2)
    cfg_scales: tuple[float, ...] = (1.0, 1.5)  # no guidance, and the paper's for scores
    rates: tuple[float, ...] = (0.5, 2.0)  # factors on the learning rate, with the first seed on Fashion-MNIST
    more_sampling_steps: int = 50  # with the first seed, to see what few steps cost each method
    longer: int = 8  # the UMD on Fashion-MNIST that is shipped trains and fine-tunes this many times as long
    sizes: Sizes = field(default_factory=Sizes)
    fashion: str = str(FASHION)
    save_every: int = 100
    device: str = "cpu"


@dataclass(frozen=True)
class Chain:
    """A training and everything that depends on it. Without a method: the noise floors of a dataset."""

    data: Name
    method: Method | None
    seed: int = 0
    longer: int = 1  # factor on all numbers of steps
    rate: float = 1.0  # factor on the learning rate

    @property
    def id(self) -> str:
        other = f"-{self.longer}-times" if self.longer > 1 else ""
        other += f"-rate-{self.rate:g}" if self.rate != 1 else ""
        return f"{self.data}-{self.method.slug if self.method else 'floors'}-{self.seed}{other}"

    @property
    def usual(self) -> bool:
        """Whether it is a row of a table, and no check."""
        return self.longer == 1 and self.rate == 1


@dataclass(frozen=True)
class Piece:
    name: str
    kind: str
    expected: float  # seconds
    make: Callable[[], dict[str, Any]]


# What runs


def run_config(plan: Plan, chain: Chain, out: Path) -> RunConfig:
    method = chain.method or METHODS[-1]
    fashion = chain.data == "fashion"
    return RunConfig(
        out=out / chain.id / "pretrain",
        model=ModelConfig(
            image_size=(28, 28) if fashion else (32, 32), channels=1 if fashion else 3, patch_size=4,
            hidden_size=plan.width, depth=plan.depth, decoder_depth=plan.decoder_depth, num_heads=plan.heads,
            num_cls=4, adaLN=method.adaLN,
        ),
        objective=method.objective,
        schedule=ScheduleConfig("cosine"),
        data=DataConfig(plan.fashion if fashion else "emoji", num_workers=0),
        optim=OptimConfig(lr=plan.lr * chain.rate, warmup=WARMUP, decay="none", ema=1e-4),
        batch_size=plan.batch,
        steps=plan.steps * chain.longer,
        seed=chain.seed,
        save_minutes=0,
        save_every=plan.save_every,
        keep=1,
        draw_every=0,
        device=plan.device,
    )  # fmt: skip


def step_flops(plan: Plan, chain: Chain) -> int:
    config = run_config(plan, chain, Path())
    return build_objective(config.model, config.objective, schedule_of(config.schedule)).step_flops(plan.batch)


def ends(plan: Plan, chain: Chain) -> dict[str, int]:
    """Steps after which a method has seen as many images, or used as many FLOPs, as UMD at its end."""
    ours, steps = step_flops(plan, replace(chain, method=METHODS[-1])), plan.steps * chain.longer
    equal = {"images": steps, "compute": round(steps * ours / step_flops(plan, chain))}
    return {"images": steps} if chain.method and (chain.method.ablation or chain.rate != 1) else equal


def chains(plan: Plan, names: tuple[Name, ...]) -> list[Chain]:
    """All chains in the order of work, such that a meaningful table appears early."""
    found = []
    for name in names:
        found.append(Chain(name, None))
        found += [Chain(name, method, seed) for seed in plan.seeds for method in METHODS]
        found += [Chain(name, method, seed) for seed in plan.seeds for method in ABLATIONS]
        if name == "fashion":
            found.append(shipped(plan))
            found += [Chain(name, method, plan.seeds[0], rate=rate) for rate in plan.rates for method in METHODS]
    return found


def shipped(plan: Plan) -> Chain:
    """The training whose network is in docs/results/paper-umd."""
    return Chain("fashion", METHODS[-1], plan.seeds[0], plan.longer)


class OneHead(Objective):
    """Objective in which noised samples train only one of the two outputs.

    The other output learns from noise-free samples, if at all. The logged loss still has both parts. The gradient has
    the one part, with its weight of one half as in the full loss.
    """

    def __init__(self, model: ModelConfig, config: ObjectiveConfig, schedule: NoiseSchedule, head: Head):
        super().__init__(model, config, schedule)
        self.head = head

    def loss(self, prediction: Tensor, x_start: Tensor, c: Corruption) -> tuple[Tensor, Tensor]:
        half = prediction.shape[1] // 2  # first x̂0, then ε̂
        silent = torch.zeros_like(prediction, dtype=torch.bool)
        silent[: c.num_noised * self.model.num_patches, slice(half) if self.head == "eps" else slice(half, None)] = True
        return super().loss(torch.where(silent, prediction.detach(), prediction), x_start, c)


def one_head(head: Head, model: Any, config: Any, schedule: NoiseSchedule, num_images: int | None = None) -> OneHead:
    return OneHead(model, config, schedule, head)


def trained(config: RunConfig, method: Method) -> dict[str, Any]:
    build = build_objective if method.head == "both" else partial(one_head, method.head)
    train(config, Console(quiet=True), build=build)
    flops = build_objective(config.model, config.objective, schedule_of(config.schedule)).step_flops(config.batch_size)
    return {"steps": config.steps, "images": config.steps * config.batch_size, "flops": config.steps * flops}


def pieces(plan: Plan, chain: Chain, out: Path) -> list[Piece]:
    """The pieces of a chain, each after the pieces that it needs.

    A training keeps only its last checkpoint, so the pieces that need a checkpoint come before the training goes on.
    """
    method, pretrain = chain.method, run_config(plan, chain, out)
    sizes, reference = plan.sizes, out / f"{chain.data}-reference.safetensors"
    features = FEATURE_SECONDS * sizes.samples
    if method is None:
        count = sizes.samples + sizes.reference
        return [Piece("floors", "floors", FEATURE_SECONDS * count, partial(floors, pretrain, reference, sizes))]
    cost = step_flops(plan, chain)
    last, found, before = ends(plan, chain), [], 0
    # All chains stop at the first mark: the warm-up is a share of the steps until there.
    stops = {max(round(pretrain.steps * mark), 1) for mark in plan.marks} | set(last.values())
    length = plan.finetune_steps * chain.longer
    for step in sorted(stops):
        config = replace(pretrain, steps=step)
        make: Callable[[], dict[str, Any]] = partial(trained, config, method)
        found.append(Piece(f"pretrain-{step}", "pretrain", (step - before) * cost / FLOPS, make))
        before = step
        if chain.rate == 1 or step in last.values():
            make = partial(probe, config, pretrain, step, sizes)
            found.append(Piece(f"probe-{step}", "probe", PROBE_SECONDS, make))
        if step not in last.values():
            continue
        images = step == last["images"]
        curve = chain.seed == plan.seeds[0] and chain.usual and not method.ablation and images
        marks = [round(length * mark) for mark in plan.finetune_marks] if curve else []
        tuned = tuning(plan, config, sizes.classes[chain.data], length, marks)
        flops = build_objective(tuned.model, tuned.objective, schedule_of(tuned.schedule)).step_flops(plan.batch)
        make = partial(trained, tuned, method)
        found.append(Piece(f"finetune-{step}", "finetune", tuned.steps * flops / FLOPS, make))
        for mark in marks:
            make = partial(probe, tuned, pretrain, mark, sizes)
            found.append(Piece(f"finetune-{step}-probe-{mark}", "probe", PROBE_SECONDS, make))
        if curve:
            make = partial(probe, tuned, pretrain, tuned.steps, sizes)
            found.append(Piece(f"finetune-{step}-probe-{tuned.steps}", "probe", PROBE_SECONDS, make))
        calls = sizes.samples * (sizes.sampling_steps + 1)
        assert isinstance(tuned.model, ModelConfig)
        forward = forward_flops(tuned.model, (tuned.model.num_patches,), 0)
        drawn: list[tuple[int, float, Prediction]] = [(mark, 1.0, method.leads) for mark in marks]
        guided = not method.ablation and images and chain.rate == 1  # guidance doubles the calls, so only here
        drawn += [(tuned.steps, scale, method.leads) for scale in plan.cfg_scales if scale == 1 or guided]
        if images and chain.rate == 1 and method.objective.no_noise_prob not in (0, 1) and method.head == "both":
            drawn.append((tuned.steps, 1.0, "x_start"))  # Table 2 has both
        for at, scale, predict in drawn:
            name = f"finetune-{step}-distance-{at}-guidance-{scale:g}-{predict}"
            make = partial(
                distance, tuned, at, scale, predict, chain.seed, reference, sizes, out / chain.id / f"{name}.npz"
            )
            seconds = features + calls * forward * (1 if scale == 1 else 2) / FLOPS
            found.append(Piece(name, "distance", seconds, make))
        if curve:
            more = replace(sizes, sampling_steps=plan.more_sampling_steps)
            name = f"finetune-{step}-distance-{tuned.steps}-guidance-1-{method.leads}-steps-{more.sampling_steps}"
            make = partial(
                distance, tuned, tuned.steps, 1.0, method.leads, chain.seed, reference, more,
                out / chain.id / f"{name}.npz",
            )  # fmt: skip
            seconds = features + sizes.samples * (more.sampling_steps + 1) * forward / FLOPS
            found.append(Piece(name, "distance", seconds, make))
    return found


def tuning(plan: Plan, pretrained: RunConfig, classes: int, steps: int, marks: list[int]) -> RunConfig:
    """The paper's fine-tuning with labels, from the weights at the last step of pre-training.

    marks: steps whose checkpoints are kept.
    """
    out = pretrained.out.with_name(f"finetune-{pretrained.steps}")
    config = finetune_config(pretrained, pretrained.out, classes, out)
    every = min(marks) if marks else plan.save_every
    keep = -(-steps // every) if marks else 1
    return replace(config, steps=steps, save_every=every, keep=keep)


def ship(plan: Plan, out: Path, folder: Path) -> None:
    """Export the fine-tuned network of `shipped` as a run folder with only its EMA weights, and some of its pictures.

    `umd sample` and `umd probe` work on it where the data themselves are not at hand. Does nothing if it is not trained
    yet, or is in the folder already.
    """
    chain = shipped(plan)
    pretrained = run_config(plan, chain, out)
    done = out / chain.id / f"finetune-{pretrained.steps}.json"
    if not done.exists():
        return
    tuned = tuning(plan, pretrained, plan.sizes.classes["fashion"], plan.finetune_steps * chain.longer, [])
    pictures = folder / "fashion-mnist.npz"
    config = replace(
        tuned, out=Path(folder.name), init=None, data=replace(tuned.data, source=os.path.relpath(pictures))
    )
    if (folder / "config.yaml").exists() and read_config(folder) == replace(config, out=folder):
        return
    shutil.rmtree(folder, ignore_errors=True)  # of another plan, or left unfinished
    saved = load_checkpoint(tuned.checkpoints, parts=["ema"])
    state = {"config": to_plain(config), "images_seen": saved.state["images_seen"]}
    save_checkpoint(folder / "checkpoints", saved.step, {"model": saved.tensors["ema"]}, state, keep=1)
    kept: dict[str, Any] = {}
    for split, count in SHIPPED_PICTURES.items():
        dataset = open_dataset(tuned.data, split)
        assert isinstance(dataset, ImageDataset) and dataset.labels is not None
        ids = np.sort(np.concatenate([np.flatnonzero(dataset.labels == c)[:count] for c in np.unique(dataset.labels)]))
        kept |= {
            f"{split}_images": np.stack([dataset.read(i)[1].pixels for i in ids.tolist()]),
            f"{split}_labels": dataset.labels[ids],
        }
    np.savez_compressed(pictures, **kept)
    write_config(replace(config, out=folder))
    model, _, dtype = open_run_of(UMD, config := read_config(folder))
    heads_of(config, weights_identity(folder), model, dtype, Console(quiet=True))  # measures and keeps them
