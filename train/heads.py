"""How to weigh a run's two heads (x̂0 and ε̂): measured on held-out pictures, kept in the run for each checkpoint."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor

from umd.conditions import denoiser
from umd.errors import UserError
from umd.files import write_whole
from umd.heads import between, head_products, head_times, head_weights
from umd.model import UMD
from umd.objective import Objective
from umd.schedule import NoiseSchedule, schedule_of
from umd.train.console import say
from umd.train.data import center_view, evenly, open_held_out_or_train
from umd.train.fingerprint import check_trained_on
from umd.train.log import NoLog, RunLog
from umd.train.preview import share_of
from umd.train.run import RunConfig
from umd.train.weights import weights_identity

if TYPE_CHECKING:
    from umd.train.loop import Run

PICTURES = 128
CALL = 32  # pictures per network call


@dataclass(frozen=True)
class Heads:
    """The weight of the x̂0 head at some timesteps."""

    times: list[int]
    weights: list[float]

    @staticmethod
    def of(products: Tensor, schedule: NoiseSchedule) -> "Heads":
        """Compute the weights from `head_products`, rounded to three digits so that all ranks agree."""
        return Heads(head_times(schedule.num_steps), [round(weight, 3) for weight in head_weights(products)])

    def at_all_times(self, schedule: NoiseSchedule) -> Tensor:
        """The weights interpolated to all timesteps: float64 [T + 1]."""
        return between(self.times, self.weights, schedule.num_steps)


def heads_file(run: Path, weights: dict[str, Any]) -> Path:
    """The file that keeps the heads of a checkpoint's weights (see `weights_identity`)."""
    return run / f"heads-{weights['sha256'][:12]}.json"


def read_heads(file: Path) -> Heads | None:
    """Read measured heads, None if there are none. Raises UserError if the file is damaged."""
    try:
        values = json.loads(file.read_text("utf-8"))
        return Heads(list(map(int, values["times"])), list(map(float, values["x_start"])))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}); remove it, and the heads are measured again") from error


def heads_json(weights: dict[str, Any], heads: Heads, about: dict[str, Any]) -> bytes:
    values = {"weights": weights, **about, "times": heads.times, "x_start": heads.weights}
    return json.dumps(values, indent=1).encode()


def measured(
    network: UMD, config: RunConfig, schedule: NoiseSchedule, dtype: torch.dtype, rank: int = 0, size: int = 1
) -> tuple[Tensor, dict[str, Any]]:
    """Measure one rank's share of `head_products` on up to 128 pictures, held-out ones if there are any.

    Returns the products, float64 [times, 3], and {pictures, split}. Raises UserError if a picture cannot be read.
    """
    dataset = open_held_out_or_train(config.data)
    device = next(network.parameters()).device
    chosen = evenly(len(dataset), PICTURES)
    known = dataset.labels if network.config.num_classes > 0 else None
    times = head_times(schedule.num_steps)
    share = share_of(len(chosen), rank, size)
    products = torch.zeros(len(times), 3, dtype=torch.float64)
    denoise = denoiser(network, dtype)
    for first in range(share.start, share.stop, CALL):
        indices = chosen[first : min(first + CALL, share.stop)]
        x = center_view(dataset, indices, config.data).to(device)
        labels = None if known is None else torch.from_numpy(known[indices]).long().to(device)
        products += head_products(denoise, x, schedule, times, labels, first_sample=first)
    return products, {"pictures": len(chosen), "split": dataset.split}


def heads_of(config: RunConfig, weights: dict[str, Any], network: UMD, dtype: torch.dtype, console: Console) -> Heads:
    """The heads of a finished run's weights; measured now if they were not before.

    Raises UserError if that is impossible: no pictures, or a network with one head.
    """
    check_two_heads(network)
    file = heads_file(config.out, weights)
    if (heads := read_heads(file)) is not None:
        return heads
    check_trained_on(config.out, config, "leave out --predict both", partial(say, console))
    schedule = schedule_of(config.schedule)
    products, about = measured(network, config, schedule, dtype)
    heads = Heads.of(products, schedule)
    try:
        write_whole(file, heads_json(weights, heads, about))  # every rank writes the same
        where = f"kept in {file}"
    except OSError as error:  # a read-only run
        where = f"not kept ({error.strerror or error})"
    say(console, f"the heads of these weights were not measured yet: done on {about['pictures']} pictures, {where}")
    return heads


def check_two_heads(network: UMD) -> None:
    """Raise UserError if the network does not have separate heads for x̂0 and ε̂."""
    if network.config.outputs != "x_start_eps":
        raise UserError(f"this network predicts {network.config.outputs} alone; leave out --predict both")


def keep_heads(run: "Run", log: RunLog | NoLog) -> None:
    """Measure the heads at the end of a run and keep them in its folder. All ranks call this together."""
    config, world, objective = run.config, run.world, run.objective
    if not isinstance(objective, Objective) or objective.config.no_noise_prob == 1:
        return  # a classifier or DiffMAE, or a network that never saw noise
    if objective.model.outputs != "x_start_eps":
        return  # a network with one head
    reason, products = "", None
    about: dict[str, Any] = {}
    with run.parallel.averaged(run.ema) as network:
        assert isinstance(network, UMD), "an Objective's network"
        try:
            products, about = measured(network, config, objective.schedule, run.dtype, world.rank, world.size)
        except UserError as error:
            reason = str(error)
    if reasons := [reason for reason in world.agree(world.collect(reason)) if reason]:
        log.say(f"the network's two heads are not weighed: {reasons[0]}")
        return
    assert products is not None, "there would be a reason"
    products = world.sum(products)
    if not world.main:
        return
    try:
        heads = Heads.of(products, objective.schedule)
    except UserError:
        return  # a network with one head
    weights = weights_identity(config.out)
    file = heads_file(config.out, weights)
    log.file(file, heads_json(weights, heads, about))
    shown = ", ".join(f"{weight:.2f} at {time}" for time, weight in zip(heads.times, heads.weights, strict=True))
    log.say(f"how much x̂0 counts beside ε̂, kept in {file}: {shown}")
