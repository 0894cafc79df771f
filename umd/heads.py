"""Weights that combine a network's two predictions of one image, one weight for each model time.

From x_t the network predicts the image x̂0, and the noise ε̂, which gives a second image y = (x_t - √(1-ᾱ)·ε̂)/√ᾱ. The
weight w(t) minimises the squared error of w·x̂0 + (1-w)·y on given images.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from umd.errors import UserError
from umd.guidance import Denoise
from umd.noise import Noise
from umd.schedule import NoiseSchedule

SAME = 1e-8  # two heads are the same if Σ(x̂0 - y)² is at most this share of Σy²


def head_times(T: int) -> list[int]:
    """The model times at which the weights are measured: 1 and each tenth of T."""
    return sorted({1, *(max(1, T * k // 10) for k in range(1, 11))})


@torch.no_grad()
def head_products(
    denoise: Denoise, x_start: Tensor, schedule: NoiseSchedule, times: Sequence[int], labels: Tensor | None = None,
    first_sample: int = 0,
) -> Tensor:  # fmt: skip
    """The sums from which `head_weights` computes the weights, for images x_start [B, C, H, W] at n model times.

    Image i gets the noise of sample first_sample + i of seed 0, the same at every time.

    Returns:
        float64 [n, 3] on the CPU: the sums over all pixels of d·e, d² and y², where y is the image that ε̂ gives,
        d = x̂0 - y and e = x0 - y. Sums of several batches may be added.
    """
    eps = Noise(0, first_sample, x_start.shape, x_start.device).draw(0)
    found = []
    for time in times:
        t = torch.full((len(x_start),), time, device=x_start.device)
        x_t = schedule.q_sample(x_start, t, eps)
        prediction, predicted_eps, *_ = denoise(x_t, t, labels)
        y = schedule.xstart_from_eps(x_t, t, predicted_eps.to(x_t)).double()
        d, e = prediction.double() - y, x_start.double() - y
        found.append(torch.stack([(d * e).sum(), (d * d).sum(), (y * y).sum()]))
    return torch.stack(found).cpu()


def head_weights(products: Tensor) -> list[float]:
    """The weight of x̂0 in [0, 1] at each of n times, from the float64 [n, 3] of `head_products`.

    Raises UserError if both images are the same at all times.
    """
    de, dd, yy = products.unbind(1)
    if (dd <= SAME * yy).all():
        raise UserError("this network has one head: the image that it predicts is made of its noise; leave out both")
    return torch.where(dd > 0, de / dd.clamp(min=1e-300), 0).clamp(0, 1).tolist()


def between(times: Sequence[int], weights: Sequence[float], T: int) -> Tensor:
    """Weights at all model times 0..T, float64 [T + 1], linearly interpolated between the measured ones."""
    return torch.from_numpy(np.interp(np.arange(T + 1), times, weights))
