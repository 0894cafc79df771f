"""Two predictions of one image: how much each of a network's heads should count at each time.

From x_t the network predicts the image, x̂0, and the noise, which gives another image, (x_t - √(1-ᾱ)·ε̂)/√ᾱ. Of all
w·x̂0 + (1-w)·that, the weight w(t) of least squared error on pictures is the best estimate there.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from umd.errors import UserError
from umd.guidance import Denoise
from umd.noise import Noise
from umd.schedule import NoiseSchedule

SAME = 1e-8  # share of the squares in which two images of two heads would not differ less


def head_times(T: int) -> list[int]:
    """The model times at which the weights are measured: 1 and each tenth of T."""
    return sorted({1, *(max(1, T * k // 10) for k in range(1, 11))})


@torch.no_grad()
def head_products(
    denoise: Denoise, x_start: Tensor, schedule: NoiseSchedule, times: Sequence[int], labels: Tensor | None = None,
    first_sample: int = 0, seed: int = 0,
) -> Tensor:  # fmt: skip
    """What the weights are made of, float64 [n, 3] on the CPU, of pictures [B, C, H, W] at n model times: the sums over
    all pixels of d·e, d² and y², with y the image that ε̂ gives, d = x̂0 - y, e = x0 - y. Sums of more pictures add up.

    Picture i has the noise of sample first_sample + i of the seed, at every time the same.
    """
    eps = Noise(seed, first_sample, x_start.shape, x_start.device).draw(0)
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
    """x̂0's weight in [0, 1] at each of n times, from `head_products` float64 [n, 3].

    Raises UserError where both images are the same at all times.
    """
    de, dd, yy = products.unbind(1)
    if (dd <= SAME * yy).all():
        raise UserError("this network has one head: the image that it predicts is made of its noise; leave out both")
    return torch.where(dd > 0, de / dd.clamp(min=1e-300), 0).clamp(0, 1).tolist()


def between(times: Sequence[int], weights: Sequence[float], T: int) -> Tensor:
    """The weights at all model times, float64 [T + 1], on straight lines between those that were measured."""
    return torch.from_numpy(np.interp(np.arange(T + 1), times, weights))
