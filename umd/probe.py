"""The few-shot probe: how well a linear classifier on frozen features separates classes, solved in closed form.

This is the recipe of the paper's 100-shot numbers: fewshot_lsr.py of https://github.com/google-research/big_vision.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
import torch.nn.functional as F
from torch import Tensor

from umd.errors import UserError

BLOCK = 8192  # test images that are scored at a time
MOST_CONFUSED = 2000  # classes of the largest confusion matrix that is kept; that of ImageNet-21k takes 3.8 GB
BIAS = 100.0  # value of the constant feature for the bias; so large that the regulariser hardly affects the bias


@dataclass(frozen=True)
class FewShotProbe:
    """A linear classifier on whitened features. Several l2 are a first axis of `weights` and of all results."""

    mean: Tensor  # [D]
    std: Tensor  # [D]
    weights: Tensor  # [D+1, classes] or [l2, D+1, classes], float64

    def scores(self, features: Tensor) -> Tensor:
        """Scores of features [N, D]: float64 [N, classes] or [l2, N, classes]. The training targets were 1 and -1."""
        return _whiten(features, self.mean, self.std) @ self.weights

    def predict(self, features: Tensor) -> Tensor:
        """The class of each of features [N, D]: int64 [N] or [l2, N]. Scores are computed for a block at a time."""
        return torch.cat([self.scores(block).argmax(-1) for block in features.split(BLOCK)], -1)


def fit_fewshot(
    features: Tensor, labels: Tensor, num_classes: int, l2: float | Sequence[float] = 1024.0
) -> FewShotProbe:
    """Fit a probe by ridge regression, `W = (XᵀX + l2·I)⁻¹ XᵀY`.

    Y has targets ±1. X holds the whitened features and one constant column. Computed in float64 on the device of
    `features`; in float32 the eigendecomposition alone would change predictions.

    Args:
        features: [N, D], any floating type.
        labels: integers [N] in [0, num_classes).
        num_classes: number of classes.
        l2: above 0; the paper uses 1024. Several values share one eigendecomposition, of XᵀX or XXᵀ, whichever is
            smaller.

    Raises:
        ValueError: shapes do not fit, a label is out of range, features are not finite, or l2 is not positive.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1] or len(labels) == 0:
        raise ValueError(
            f"Features are {list(features.shape)} and labels {list(labels.shape)}, expected [N, D] and [N] with N > 0."
        )
    if not features.isfinite().all():
        raise ValueError("Features hold NaN or infinity: check the model's weights.")
    check_labels(labels, num_classes)
    l2s = torch.as_tensor(l2, dtype=torch.float64, device=features.device)
    if (l2s <= 0).any():
        raise ValueError(f"l2 is {l2}, expected above 0.")

    N, D = features.shape
    x = torch.full((N, D + 1), BIAS, dtype=torch.float64, device=features.device)  # the only copy in float64
    x[:, :D] = features
    mean, std = x[:, :D].mean(0), x[:, :D].std(0, correction=0) + 1e-5
    x[:, :D].sub_(mean).div_(std)
    labels = labels.to(x.device, torch.int64)
    if N >= D + 1:
        eigenvalues, q = torch.linalg.eigh(x.T @ x)
        left, right = q, q.T @ _times_targets(x, labels, num_classes)
    else:  # (XᵀX + l2·I)⁻¹ Xᵀ = Xᵀ (XXᵀ + l2·I)⁻¹
        eigenvalues, q = torch.linalg.eigh(x @ x.T)
        left, right = x.T @ q, _times_targets(q, labels, num_classes)
    shrinkage = 1.0 / (eigenvalues + l2s[..., None])  # [rank] or [l2, rank]
    return FewShotProbe(mean, std, (left * shrinkage[..., None, :]) @ right)


def _times_targets(rows: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """`rowsᵀ Y` [K, classes] for rows [N, K], where Y [N, classes] is 1 at each row's label and -1 elsewhere."""
    sums = rows.new_zeros(num_classes, rows.shape[1]).index_add_(0, labels, rows)
    return (2 * sums - rows.sum(0)).T


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise ValueError if a label is outside [0, num_classes)."""
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"Labels are {labels.min()} to {labels.max()}, expected 0 to {num_classes - 1}.")


def _whiten(features: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return F.pad((features.double() - mean) / std, (0, 1), value=BIAS)


def confusion(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Counts, int64 [classes, classes]: row = label, column = prediction. Both inputs: integers [N]."""
    flat = labels.long() * num_classes + predictions.long()
    return torch.bincount(flat, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_averaged_accuracy(predictions: Tensor, labels: Tensor, num_classes: int) -> float:
    """Mean of the accuracies on each class that occurs in `labels`: every class counts the same, whatever its size."""
    per_class = per_class_accuracy(predictions, labels, num_classes)
    return per_class[~per_class.isnan()].mean().item()


def per_class_accuracy(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Accuracy on each class, float64 [classes]; NaN for classes that `labels`, integers [N], does not contain."""
    right = torch.bincount(labels.long()[predictions == labels], minlength=num_classes).double()
    return right / torch.bincount(labels.long(), minlength=num_classes)


@dataclass(frozen=True)
class ProbeResult:
    """The measurements of `fewshot_accuracy`, as plain numbers: `dataclasses.asdict` gives a JSON record."""

    mean: float  # class-averaged test accuracy, mean over seeds
    std: float  # sample standard deviation over seeds; 0 for one seed
    per_seed: list[float]
    seeds: list[int]
    shots: int  # requested shots per class
    shots_per_class: list[int]  # shots used; below `shots` if a class had fewer and `allow_fewer` was set
    l2: list[float]  # the l2 used for the numbers above, per seed
    accuracy_by_l2: dict[str, float]  # for every l2 tried: class-averaged test accuracy, mean over seeds
    per_class: list[float | None]  # accuracy on each class over all seeds; None for a class without test images
    confusion: list[list[int]] | None  # [label][prediction], summed over seeds; None beyond `MOST_CONFUSED` classes


def fewshot_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    shots: int,
    num_classes: int,
    seeds: Sequence[int] = (0, 1, 2),
    l2: float | Sequence[float] = 1024.0,
    allow_fewer: bool = False,
    class_names: Sequence[str] | None = None,
    draws: Sequence[list[Tensor]] | None = None,
) -> ProbeResult:
    """Class-averaged test accuracy of a probe fitted on `shots` training examples of each class.

    Args:
        train_features, test_features: floats [N, D].
        train_labels, test_labels: integers [N].
        shots: training examples per class.
        num_classes: number of classes.
        seeds: each draws its own shots, see `draw_shots`.
        l2: regulariser. Of several values, each seed chooses the best on a held-out fifth of its own shots (the first
            if several are equal) and refits on all shots. The test set plays no part in the choice.
        allow_fewer, class_names: as in `draw_shots`.
        draws: shots already drawn: for each seed and class int64 indices into the training features.

    Raises:
        UserError: a set is empty, a class has too few shots, or there are too few shots to choose an l2.
    """
    train_labels, test_labels = train_labels.cpu().long(), test_labels.cpu().long()
    l2s = [float(value) for value in ([l2] if isinstance(l2, int | float) else l2)]
    if len(train_labels) == 0 or len(test_labels) == 0:
        raise UserError(f"The probe has {len(train_labels)} training and {len(test_labels)} test images: give it both.")
    check_labels(test_labels, num_classes)
    if draws is None:
        draws = draw_shots(train_labels, shots, num_classes, seeds, 0, allow_fewer, class_names)
    if len(l2s) > 1 and shots < 2:
        raise UserError("Choosing among several l2 holds out a shot of each class: ask for 2 or more, or give one l2.")

    per_l2, chosen, predicted = [], [], []
    for drawn in draws:
        choice = _choose_l2(train_features, train_labels, drawn, num_classes, l2s) if len(l2s) > 1 else 0
        index = torch.cat(list(drawn))
        probe = fit_fewshot(train_features[index], train_labels[index], num_classes, l2s)
        predictions = probe.predict(test_features).cpu()  # [l2, N]
        per_l2.append([class_averaged_accuracy(p, test_labels, num_classes) for p in predictions])
        predicted.append(predictions[choice])
        chosen.append(choice)
    every, truth = torch.cat(predicted), test_labels.repeat(len(predicted))

    per_seed = [accuracies[choice] for accuracies, choice in zip(per_l2, chosen, strict=True)]
    return ProbeResult(
        mean=fmean(per_seed),
        std=stdev(per_seed) if len(per_seed) > 1 else 0.0,
        per_seed=per_seed,
        seeds=list(seeds),
        shots=shots,
        shots_per_class=[len(of_class) for of_class in draws[0]],
        l2=[l2s[choice] for choice in chosen],
        accuracy_by_l2={str(value): fmean(a[i] for a in per_l2) for i, value in enumerate(l2s)},
        per_class=[None if x != x else x for x in per_class_accuracy(every, truth, num_classes).tolist()],
        confusion=confusion(every, truth, num_classes).tolist() if num_classes <= MOST_CONFUSED else None,
    )


def draw_shots(
    labels: Tensor,
    shots: int,
    num_classes: int,
    seeds: Sequence[int] = (0, 1, 2),
    pool: int = 0,
    allow_fewer: bool = False,
    class_names: Sequence[str] | None = None,
) -> list[list[Tensor]]:
    """Draw the training examples that are the shots, from the labels alone.

    Args:
        labels: integers [N].
        shots: examples per class.
        num_classes: number of classes.
        seeds: each takes the first `shots` of every class in its own permutation. Fewer shots are a subset of more.
        pool: draw only from this many examples, the first of a fixed random permutation; a class gives as many as the
            pool has. The published recipe uses the first 100,000 of a shuffled training set. 0: draw from all.
        allow_fewer: a class with fewer than `shots` examples gives all it has; else this is an error.
        class_names: names of the classes for error messages.

    Returns:
        For each seed and class up to `shots` indices into `labels`.

    Raises:
        UserError: there are no examples, a class has too few, or the pool has none of a class.
    """
    if shots < 1:
        raise UserError(f"{shots} shots a class were asked for: ask for at least 1.")
    labels = labels.cpu().long()
    if len(labels) == 0:
        raise UserError("The probe has 0 training images: give it some.")
    check_labels(labels, num_classes)
    names = class_names if class_names is not None else [str(c) for c in range(num_classes)]
    available = torch.bincount(labels, minlength=num_classes)
    if not allow_fewer and (available < shots).any():
        least = int(available.argmin())
        mend = f"ask for at most {int(available[least])}" if available[least] else "add some, or take the class out"
        raise UserError(
            f"{shots} shots a class were asked for, but class {names[least]} has {int(available[least])} training "
            f"images: {mend}, or let a class with fewer give all it has (--allow-fewer)"
        )
    in_pool = torch.ones(len(labels), dtype=torch.bool)
    if 0 < pool < len(labels):
        in_pool = torch.zeros(len(labels), dtype=torch.bool)
        in_pool[_permutation(len(labels), 0)[:pool]] = True
        left = torch.bincount(labels[in_pool], minlength=num_classes)
        if (empty := (left == 0) & (available > 0)).any():
            raise UserError(
                f"the pool of {pool} training images has none of class {names[int(empty.int().argmax())]}: draw from a "
                "larger one, or from all (umd probe --pool 0)"
            )
    draws = []
    for seed in seeds:
        order = _permutation(len(labels), seed)
        order = order[in_pool[order]]
        order = order[labels[order].argsort(stable=True)]  # class after class, each in the order of the permutation
        of_class = order.split(torch.bincount(labels[order], minlength=num_classes).tolist())
        draws.append([indices[:shots] for indices in of_class])
    return draws


def _permutation(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def _choose_l2(features: Tensor, labels: Tensor, drawn: Sequence[Tensor], num_classes: int, l2s: list[float]) -> int:
    """Index of the best l2 on held-out shots: a fifth of each class's shots, at least one if a class has two."""
    sizes = [max(len(d) // 5, 1) if len(d) > 1 else 0 for d in drawn]
    fit = torch.cat([d[: len(d) - size] for d, size in zip(drawn, sizes, strict=True)])
    held_out = torch.cat([d[len(d) - size :] for d, size in zip(drawn, sizes, strict=True)])
    if len(held_out) == 0:
        raise UserError("No class has two images to choose an l2 with: give one l2, or more images.")
    probe = fit_fewshot(features[fit], labels[fit], num_classes, l2s)
    predictions = probe.predict(features[held_out]).cpu()  # [l2, N]
    scores = [class_averaged_accuracy(p, labels[held_out], num_classes) for p in predictions]
    return scores.index(max(scores))
