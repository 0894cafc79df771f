"""Classification on a pre-trained encoder: load the encoder's weights, score the classifier on held-out pictures."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from umd.checkpoint import load_checkpoint, load_model_state
from umd.classifier import Classifier, encoder_weights
from umd.config import classifier_config
from umd.errors import UserError
from umd.machine.device import autocast
from umd.probe import MOST_CONFUSED, confusion
from umd.train.data import Dataset, center_view, open_dataset
from umd.train.distributed import World
from umd.train.latents import check_run_vae
from umd.train.log import NoLog, RunLog
from umd.train.run import RunConfig, differences, to_plain
from umd.train.settings import DataConfig
from umd.train.weights import load_model


class Scores(NamedTuple):
    top1: float
    top5: float
    loss: float
    confusion: Tensor | None  # int64 [classes, classes]: label, prediction; None beyond `MOST_CONFUSED` classes


def check_classes(dataset: Dataset) -> int:
    """The number of classes. Raises UserError if the data has no labels or fewer than 2 classes."""
    if not dataset.class_names:
        raise UserError(
            f"{dataset.name} has no labels to classify by; use one subfolder a class, or labels in the .npz"
        )
    if len(dataset.class_names) < 2:
        notes = "".join(f"; {note}" for note in getattr(dataset, "notes", ()))
        raise UserError(f"{dataset.name} has 1 class; a classifier needs 2 or more, a subfolder each{notes}")
    return len(dataset.class_names)


def open_held_out(config: RunConfig) -> Dataset:
    """Open the held-out pictures. Raises UserError if there are none, or if they have no labels."""
    dataset = open_dataset(config.data, "test")
    if len(dataset) == 0:
        raise UserError(
            f"{dataset.name} has no held-out pictures to score on; hold a share out, e.g. --data.holdout 0.2, or train "
            "without scores: --draw-every 0"
        )
    if dataset.labels is None:
        raise UserError(f"the held-out pictures of {dataset.name} have no labels; --draw-every 0 trains without scores")
    return dataset


def load_encoder(model: Classifier, path: Path, data: DataConfig) -> None:
    """Load the encoder of the run at `path` into `model`, folded at t = 0. Raises UserError if the two do not fit."""
    check_run_vae(load_checkpoint(path, parts=[]).state, data, path)
    source = load_model(path, ema=False, image_size=model.config.image_size)
    if isinstance(source, Classifier):
        raise UserError(f"{path} holds a classifier; start from the run whose encoder it took")
    free = {name: getattr(model.config, name) for name in ("num_classes", "pool", "linear", "residual_in_fp32")}
    before, now = (to_plain(c) for c in (classifier_config(source.config, **free), model.config))
    if differ := [f"{name} {a}, not {b}" for name, a, b in differences(before, now)]:
        raise UserError(f"the encoder in {path} has {'; '.join(differ)}: leave them as they are, or start from scratch")
    load_model_state(model, encoder_weights(source), allow_missing=("head.", "batch_norm."))


@torch.no_grad()
def score(
    model: Classifier, dataset: Dataset, data: DataConfig, dtype: torch.dtype, batch: int = 256,
    world: World | None = None,
) -> Scores:  # fmt: skip
    """Score a classifier on center-cropped pictures, one batch in memory at a time.

    Top-5 is top-K if there are K < 5 classes.
    world: if given, all ranks call this together. Each scores its share of the pictures; each gets the total scores.
    """
    device, K = model.pos_embed.device, model.config.num_classes
    training = model.training
    model.eval()
    assert dataset.labels is not None, "open_held_out asks for them"
    sums = torch.zeros(3, dtype=torch.float64)  # top-1, top-5, loss
    predicted = [torch.empty(0, dtype=torch.int64)]
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    mine = np.arange(len(dataset))[rank::size]
    for ids in np.array_split(mine, -(-len(mine) // batch)) if len(mine) else ():
        x, labels = center_view(dataset, ids, data).to(device), torch.from_numpy(dataset.labels[ids]).long()
        with autocast(device, dtype):
            logits = model(x).float().cpu()
        predicted.append(logits.argmax(1))
        sums[0] += (predicted[-1] == labels).sum()
        sums[1] += (logits.topk(min(5, K)).indices == labels[:, None]).sum()
        sums[2] += F.cross_entropy(logits, labels, reduction="sum")
    model.train(training)
    counts = None
    if K <= MOST_CONFUSED:
        counts = confusion(torch.cat(predicted), torch.from_numpy(dataset.labels[mine]), K)
    if world is not None:
        sums, counts = world.sum(sums), None if counts is None else world.sum(counts)
    top1, top5, loss = (sums / len(dataset)).tolist()
    return Scores(top1, top5, loss, counts)


def show_scores(
    model: Classifier, held_out: Dataset, config: RunConfig, dtype: torch.dtype, log: RunLog | NoLog, step: int,
    world: World,
) -> None:  # fmt: skip
    """Score the classifier and write the scores to the log, metrics.jsonl, a confusion plot and scores.json.

    All ranks call this together.
    """
    scores = score(model, held_out, config.data, dtype, world=world)
    if not world.main:
        return
    from umd.report.figures import confusion_sheet  # late: importing matplotlib takes a second

    log.scores({"step": step, "top-1": scores.top1, "top-5": scores.top5, "held_out_loss": scores.loss})
    if scores.confusion is not None:
        log.picture("confusion", confusion_sheet(scores.confusion.numpy(), held_out.class_names), step)
    log.say(scores_line(scores, held_out, step))
    log.file(config.out / "scores.json", scores_json(scores, held_out, step))


def scores_json(scores: Scores, dataset: Dataset, step: int) -> bytes:
    """The content of scores.json."""
    record = {
        "step": step, "top-1": scores.top1, "top-5": scores.top5, "images": len(dataset),
        "classes": list(dataset.class_names),
        "confusion": None if scores.confusion is None else scores.confusion.tolist(),
    }  # fmt: skip
    return json.dumps(record).encode()


def scores_line(scores: Scores, dataset: Dataset, step: int, split: str = "held-out") -> str:
    return f"step {step}: top-1 {scores.top1:.3f}, top-5 {scores.top5:.3f} on {len(dataset)} {split} pictures"
