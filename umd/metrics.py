"""Scores of sets of images, from features of a network (`umd/feature_networks.py`). Name the network with every number.

Fréchet distances are comparable only with the same network and the same number of images: with fewer images the
estimate is biased upwards. The kernel distance has no such bias.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from umd.errors import UserError
from umd.files import written_whole

BATCH = 32  # images per call of a feature network


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Squared 2-Wasserstein distance of two Gaussians, `|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½)`.

    The formula is Dowson and Landau's (1982). Computed in float64 on the inputs' device. The result is never negative;
    equal inputs give 0 up to about 1e-7 of the trace.

    torchmetrics' FID takes eigenvalues of the unsymmetric product C1 C2. It is not used here: its result may be
    negative and is rounded to float32, and it needs both sets of images, because it stores no statistics on disk.

    Args:
        mean1, mean2: [D].
        cov1, cov2: [D, D], symmetric; possibly singular (fewer images than features).
    """
    cov1, cov2 = cov1.double(), cov2.double()
    values, vectors = torch.linalg.eigh(cov1)
    factor = vectors * values.clamp_min(0).sqrt()  # A [D, D] with A Aᵀ = C1
    # C1 C2 and the symmetric Aᵀ C2 A have the same eigenvalues
    overlap = torch.linalg.eigvalsh(factor.T @ cov2 @ factor).clamp_min(0).sqrt().sum()
    distance = (mean1.double() - mean2.double()).square().sum() + cov1.trace() + cov2.trace() - 2 * overlap
    return max(distance.item(), 0.0)


def inception_score(logits: Tensor, split_size: int = 5000) -> float:
    """Inception Score (Salimans et al. 2016): the mean over splits of 5000 images, as in ADM's code.

    The score of a split is exp of the mean KL divergence between an image's class probabilities and their average over
    the split. It lies between 1 (all images alike) and K. The last split may be smaller and counts as much as others.

    logits: [N, K]. Raises ValueError if there is no image.
    """
    if logits.ndim != 2 or len(logits) == 0:
        raise ValueError(f"Logits are {list(logits.shape)}, expected [N, K] with N > 0.")
    scores = []
    for part in logits.double().split(split_size):
        log_p = part.log_softmax(1)
        p = log_p.exp()
        marginal = p.mean(0).clamp_min(torch.finfo(p.dtype).tiny).log()
        scores.append((p * (log_p - marginal)).sum(1).mean().exp())
    return torch.stack(scores).mean().item()


def kernel_distance(x: Tensor, y: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> float:
    """KID (Bińkowski et al. 2018): mean `squared_mmd` of subsets drawn without replacement, as in torch-fidelity.

    Args:
        x, y: features [N, D] and [M, D].
        subsets: number of subsets.
        subset_size: images per subset; at most min(N, M).
        seed: of the draws.

    Raises:
        ValueError: a set has fewer than 2 images.
    """
    size = min(subset_size, len(x), len(y))
    generator = torch.Generator().manual_seed(seed)

    def some(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=generator)[:size].to(features.device)]

    return torch.tensor([squared_mmd(some(x), some(y)) for _ in range(subsets)], dtype=torch.float64).mean().item()


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy under the kernel (x·y/D + 1)³, in float64.

    x: [N, D], y: [M, D]. For two sets from one distribution the result is near 0, negative as often as positive.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"A kernel distance needs at least 2 images of each set, got {len(x)} and {len(y)}.")
    x, y = x.double(), y.double().to(x.device)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def among(a: Tensor) -> Tensor:
        k = kernel(a, a)
        return (k.sum() - k.trace()) / (len(a) * (len(a) - 1))

    return (among(x) + among(y) - 2 * kernel(x, y).mean()).item()


def precision_recall(real: Tensor, fake: Tensor, k: int = 3, block: int = 1024) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019).

    Every image has a ball that reaches to its k-th neighbour in its own set. Precision is the share of `fake` that lies
    in a ball of `real`, recall the share of `real` that lies in a ball of `fake`.

    The authors' code and ADM's evaluator compute in float16 or float32. Here it is float64: differences of large norms
    lose the digits of near pairs, and float32 products may be TF32 on a GPU.

    Args:
        real, fake: features [N, D] and [M, D]. The work is done on the device of `real`.
        k: neighbour that sets the radius.
        block: rows compared at a time. This takes about 18 · block · max(N, M) bytes, besides both sets in float64.

    Returns:
        (precision, recall).

    Raises:
        ValueError: a set has k images or fewer.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"Balls to the neighbour {k} need more than {k} images, got {len(real)} and {len(fake)}.")
    real, fake = real.double(), fake.double().to(real.device)
    real_radii, fake_radii = (_radii(features, k, block) for features in (real, fake))
    in_real, in_fake = [], torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, radii in zip(fake.split(block), fake_radii.split(block), strict=True):
        distances = _squared_distances(rows, real)  # [block, N]
        in_real.append((distances <= real_radii).any(1))
        in_fake |= (distances <= radii[:, None]).any(0)
    return torch.cat(in_real).double().mean().item(), in_fake.double().mean().item()


def _radii(features: Tensor, k: int, block: int) -> Tensor:
    """Squared distance of each row of [N, D] to its k-th neighbour among the others: [N]."""
    found = []
    for start, rows in zip(range(0, len(features), block), features.split(block), strict=True):
        distances = _squared_distances(rows, features)
        own = torch.arange(len(rows), device=rows.device)
        distances[own, start + own] = torch.inf  # no image is its own neighbour
        found.append(distances.topk(k, largest=False).values[:, -1])
    return torch.cat(found)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances [N, M] between the rows of [N, D] and [M, D], float64.

    Exactly 0 for copies, so that even a ball of radius 0 contains them.
    """
    a_norms, b_norms = (torch.linalg.vector_norm(features, dim=1).square() for features in (a, b))
    distances = torch.addmm(b_norms, a, b.T, alpha=-2).add_(a_norms[:, None])
    # Rounding leaves up to about D · 1e-16 of the norms; float32 features this close are indistinguishable.
    return distances.masked_fill_(distances < 1e-12 * a_norms[:, None], 0)


class FeatureStatistics:
    """Running mean and covariance of features [N, D], updated batch by batch, in float64 on the CPU.

    The centred second moment is kept, and batches are merged by Chan, Golub and LeVeque's update: a large common offset
    costs no digits. `name` is the network that made the features; statistics of different networks do not mix.
    """

    def __init__(self, num_features: int, name: str):
        self.name = name
        self.count = 0
        self.mean = torch.zeros(num_features, dtype=torch.float64)  # [D]
        # [D, D] sum of (f - mean)(f - mean)ᵀ
        self.scatter = torch.zeros(num_features, num_features, dtype=torch.float64)

    @property
    def cov(self) -> Tensor:
        """Unbiased covariance [D, D]. Raises ValueError if fewer than two images were added."""
        if self.count < 2:
            raise ValueError(f"A covariance needs at least 2 images, {self.count} were given: give more.")
        return self.scatter / (self.count - 1)

    def update(self, features: Tensor) -> None:
        """Add features [B, D] of any floating type and device. Raises ValueError for another shape, NaN or infinity."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"Features are {list(features.shape)}, expected [B, {len(self.mean)}].")
        if len(features) == 0:
            return
        features = features.detach().double()
        if not features.isfinite().all():
            raise ValueError("Features hold NaN or infinity: check that the images are finite.")
        mean = features.mean(0)
        centred = features - mean
        total = self.count + len(features)
        offset = mean.cpu() - self.mean
        self.scatter += (centred.T @ centred).cpu() + torch.outer(offset, offset) * (self.count * len(features) / total)
        self.mean += offset * (len(features) / total)
        self.count = total

    def distance(self, other: "FeatureStatistics") -> float:
        """Fréchet distance to `other`. Raises UserError if the two came from different networks."""
        if (self.name, len(self.mean)) != (other.name, len(other.mean)):
            raise UserError(
                f"Statistics of {self.name} ({len(self.mean)} features) and {other.name} ({len(other.mean)}) "
                "do not mix: compute both with the same network."
            )
        return frechet_distance(self.mean, self.cov, other.mean, other.cov)

    def save(self, path: Path | str) -> None:
        """Write a safetensors file. An older file is replaced only when the new one is complete."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"name": self.name, "count": str(self.count)}
        with written_whole(path) as unfinished:
            save_file({"mean": self.mean, "scatter": self.scatter}, unfinished, metadata)

    @classmethod
    def load(cls, path: Path | str) -> "FeatureStatistics":
        """Read a file of `save`. Raises UserError if it is missing, damaged or holds something else."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                mean, scatter = file.get_tensor("mean"), file.get_tensor("scatter")
            if mean.ndim != 1 or scatter.shape != (len(mean), len(mean)):
                raise ValueError(f"mean is {list(mean.shape)} and scatter {list(scatter.shape)}")
            statistics = cls(len(mean), metadata["name"])
            statistics.count = int(metadata["count"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            message = f"{path} holds no feature statistics ({error}): delete it and compute them again."
            raise UserError(message) from error
        statistics.mean, statistics.scatter = mean, scatter
        return statistics


def feature_statistics(
    images: Tensor,
    features: nn.Module,
    name: str,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> FeatureStatistics:
    """Statistics of the features of images.

    Args:
        images: floats [N, C, H, W] in [-1, 1].
        features: a module [B, C, H, W] to [B, D] with the attribute `num_features`, e.g. from `default_features`.
        name: of the network.
        device: where to compute features.
        progress: called after each batch with the number of images done so far.
    """
    features = features.to(device).eval()
    statistics = FeatureStatistics(int(features.num_features), name)  # type: ignore[arg-type]
    with torch.inference_mode():
        for batch in images.split(BATCH):
            statistics.update(features(batch.to(device)))
            if progress is not None:
                progress(statistics.count)
    return statistics
