"""Linear probe and nearest neighbours on features of a frozen network, at ImageNet's size.

The linear probe follows He et al. 2021, "Masked autoencoders are scalable vision learners", appendix A.1, and
main_linprobe.py of facebookresearch/mae. Differences:

- MAE crops every image at random in each epoch. Here features are computed once, from one centre crop per image.
- Batch norm uses mean and variance over all training images, which MAE estimates by running averages.
- SGD replaces LARS, which torch does not have.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umd.errors import UserError
from umd.probe import check_labels, class_averaged_accuracy

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)  # learning rates for a batch of 256
BATCH = 16384
STEPS_AN_EPOCH = 16  # least steps per epoch: small sets get a smaller batch
HELD_OUT = 10_000  # most training images that are held out to choose the learning rate
BLOCK = 4096  # images that are scored at a time
KEPT = 4 << 30  # bytes; up to this size all training features move to the device at once, else a batch at a time
KEYS = 1 << 17  # training images with which queries are compared at a time


@dataclass(frozen=True)
class LinearProbeResult:
    """The measurements of `linear_probe`, as plain numbers."""

    top1: float  # test accuracy with the chosen learning rate
    top5: float  # test accuracy among the 5 best classes; with K < 5 classes, among K
    class_averaged: float  # mean over classes of the test accuracy on each class
    rate: float  # chosen learning rate, for a batch of 256
    accuracy_by_rate: dict[str, float | None]  # on held-out training images; None: training diverged
    batch: int
    epochs: int
    images: int  # images trained on
    held_out: int  # training images held out to choose the rate
    augmentation: str = "none: one centre crop an image, where MAE crops at random in each epoch"


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    num_classes: int,
    *,
    rates: Sequence[float] = RATES,
    epochs: int = 90,
    warmup: int = 10,
    batch: int = BATCH,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> LinearProbeResult:
    """Test accuracy of a linear layer on normalised features, trained by SGD with several learning rates at once.

    Each learning rate trains its own layer, all on the same batches. A tenth of the training images, 10,000 at most, is
    held out to choose the rate with the best accuracy; these images are not trained on.

    Args:
        train_features, test_features: floats [N, D], on any device; they are moved to `device`.
        train_labels, test_labels: integers [N].
        num_classes: number of classes.
        rates: learning rates for a batch of 256, scaled to the batch. Momentum is 0.9, without weight decay. Each rate
            rises linearly and then falls to 0 along a cosine.
        epochs: passes over the training images.
        warmup: epochs of linear rise.
        batch: images per step, as in MAE; at most a sixteenth of the set. Images left over at the end of an epoch are
            dropped, as in MAE: the rate suits whole batches, and a step on a few images at that rate undoes many steps.
        seed: of the held-out choice, the order of images and the initial weights.
        device: where to train.

    Raises:
        UserError: there are no test images or fewer than 2 training images, or every rate diverges.
        ValueError: a label is out of range, or features are not finite.
    """
    train_labels, test_labels = train_labels.cpu().long(), test_labels.cpu().long()
    N = len(train_labels)
    if N < 2 or len(test_labels) == 0:
        raise UserError(f"the linear probe has {N} training and {len(test_labels)} test images: give it both")
    check_labels(train_labels, num_classes)
    check_labels(test_labels, num_classes)
    if train_features.nbytes <= KEPT:
        train_features = train_features.to(device)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    chooses = min(max(N // 10, 1), HELD_OUT)
    choosing, training = order[:chooses], order[chooses:]
    batch = min(batch, max(len(training) // STEPS_AN_EPOCH, 1))
    whiten = BatchNorm(train_features, training, device)
    heads = [linear_layer(train_features.shape[1], num_classes, seed).to(device) for _ in rates]
    optimizer = torch.optim.SGD([{"params": head.parameters(), "lr": 0.0} for head in heads], momentum=0.9)
    steps = len(training) // batch
    for epoch in range(epochs):
        shuffled = training[torch.randperm(len(training), generator=torch.Generator().manual_seed(seed + 1 + epoch))]
        for step, ids in enumerate(shuffled[: steps * batch].split(batch)):
            scale = rate_scale(epoch + step / steps, epochs, warmup) * batch / 256
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * scale
            x, y = whiten(train_features[ids]), train_labels[ids].to(device)
            for head in heads:
                F.cross_entropy(head(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    found: dict[str, float | None] = {}
    for rate, head in zip(rates, heads, strict=True):
        finite = all(bool(p.isfinite().all()) for p in head.parameters())
        top = ranked(head, whiten, train_features, choosing, 1)
        found[f"{rate:g}"] = float((top[:, 0] == train_labels[choosing]).double().mean()) if finite else None
    scores = [-1.0 if accuracy is None else accuracy for accuracy in found.values()]
    if max(scores) < 0:
        raise UserError("the linear probe diverged at every learning rate: give smaller ones")
    best = scores.index(max(scores))
    top = ranked(heads[best], whiten, test_features, torch.arange(len(test_labels)), min(5, num_classes))
    hits = top == test_labels[:, None]
    return LinearProbeResult(
        top1=float(hits[:, 0].double().mean()),
        top5=float(hits.any(1).double().mean()),
        class_averaged=class_averaged_accuracy(top[:, 0], test_labels, num_classes),
        rate=rates[best],
        accuracy_by_rate=found,
        batch=batch,
        epochs=epochs,
        images=len(training),
        held_out=chooses,
    )


class BatchNorm:
    """MAE's batch norm without scale and bias, with the statistics of all training images."""

    def __init__(self, features: Tensor, ids: Tensor, device: torch.device | str, eps: float = 1e-6):
        total = square = torch.zeros((), dtype=torch.float64)
        for block in ids.split(1 << 16):
            x = features[block].double()
            total, square = total + x.sum(0).cpu(), square + x.square().sum(0).cpu()
        if not square.isfinite().all():
            raise ValueError("Features hold NaN or infinity: check the model's weights.")
        mean = total / len(ids)
        variance = (square / len(ids) - mean.square()).clamp(min=0)
        self.mean = mean.float().to(device)  # [D]
        self.scale = (variance + eps).rsqrt().float().to(device)

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise features [B, D]: float32 on the device."""
        return (x.to(self.mean.device, torch.float32) - self.mean) * self.scale


def linear_layer(inputs: int, outputs: int, seed: int) -> nn.Linear:
    """A linear layer initialised as in MAE: weights N(0, 0.01²), biases 0."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(layer.bias)
    return layer


def rate_scale(epoch: float, epochs: int, warmup: int) -> float:
    """Factor on the learning rate after `epoch` epochs: a linear rise, then half a cosine down to 0."""
    warmup = min(warmup, epochs // 2)
    if epoch < warmup:
        return epoch / warmup
    return 0.5 * (1 + np.cos(np.pi * (epoch - warmup) / (epochs - warmup)))


@torch.no_grad()
def ranked(head: nn.Linear, whiten: BatchNorm, features: Tensor, ids: Tensor, k: int) -> Tensor:
    """The k classes with the highest scores for the features `ids`: int64 [n, k] on the CPU."""
    return torch.cat([head(whiten(features[block])).topk(k).indices.cpu() for block in ids.split(BLOCK)])


@dataclass(frozen=True)
class NeighboursResult:
    """The measurements of `knn_accuracy`, as plain numbers."""

    top1: float
    class_averaged: float
    k: int
    temperature: float


@torch.no_grad()
def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> NeighboursResult:
    """Test accuracy of a weighted vote of the k nearest training images (Wu et al. 2018; Caron et al. 2021, DINO).

    Neighbours are nearest by cosine similarity s. The weight of a vote is exp(s / temperature).

    Args:
        train_features, test_features: floats [N, D]; the comparison runs on the device of `train_features`.
        train_labels, test_labels: integers [N].
        num_classes: number of classes.
        k: neighbours; at most the number of training images.
        temperature: of the weights.
    """
    device, k = train_features.device, min(k, len(train_labels))
    keys, labels = F.normalize(train_features.float(), dim=1), train_labels.to(device).long()
    found = []
    for queries in test_features.split(512):
        similarity, nearest = nearest_of(F.normalize(queries.float().to(device), dim=1), keys, k)  # [B, k]
        votes = torch.zeros(len(queries), num_classes, device=device)
        votes.scatter_add_(1, labels[nearest], (similarity / temperature).exp())
        found.append(votes.argmax(1).cpu())
    predictions, test_labels = torch.cat(found), test_labels.cpu().long()
    return NeighboursResult(
        top1=float((predictions == test_labels).double().mean()),
        class_averaged=class_averaged_accuracy(predictions, test_labels, num_classes),
        k=k,
        temperature=temperature,
    )


def nearest_of(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest products of each query [B, D] with the keys [N, D]: (products [B, k], indices of keys [B, k]).

    Works on a block of keys at a time.
    """
    best: tuple[Tensor, Tensor] | None = None
    for first in range(0, len(keys), KEYS):
        products = queries @ keys[first : first + KEYS].T
        values, places = products.topk(min(k, products.shape[1]))
        places += first
        if best is not None:
            values, chosen = torch.cat([best[0], values], 1).topk(min(k, best[0].shape[1] + values.shape[1]))
            places = torch.cat([best[1], places], 1).gather(1, chosen)
        best = values, places
    assert best is not None
    return best
