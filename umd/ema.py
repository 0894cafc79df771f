"""An exponential moving average of a model's parameters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn


def ema_rate(batch_size: int, rate_at_256: float = 1e-4) -> float:
    """The EMA rate of a step, proportional to the batch size: the average spans the same number of images at any batch.

    The released code uses 1e-4 at batch 256 (the default); the paper's Table 5 gives 2.5e-4. The average spans about
    1/rate steps. For runs that are not much longer, use `warm_rate`.
    """
    return rate_at_256 * batch_size / 256


def warm_rate(rate: float, step: int) -> float:
    """The rate of update number `step` (from 0), larger at first so that a short run's average forgets its start.

    As in TensorFlow's ExponentialMovingAverage: decay = min(1 - rate, (1 + step)/(10 + step)).
    """
    return max(rate, 9 / (10 + step))


class HasParameters(Protocol):
    """A module, or one rank's shard of its parameters."""

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]: ...


class EMA:
    """Exponential moving average of every parameter, frozen ones included: `shadow += rate · (parameter - shadow)`.

    Shadows start as copies. They are at least float32, so that small steps of a bf16 model are not rounded away.
    Buffers are not averaged. Pass the plain module, not its DDP or torch.compile wrapper: wrappers rename parameters.
    """

    def __init__(self, model: HasParameters, rate: float):
        """rate: in (0, 1], see `ema_rate`; the default of `update`."""
        if not 0 < rate <= 1:
            raise ValueError(f"An EMA rate of {rate} was given, expected above 0 and at most 1.")
        self.rate = rate
        self.shadows = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in model.named_parameters()
        }

    @torch.no_grad()
    def update(self, model: HasParameters, rate: float | Tensor | None = None) -> None:
        """Move every shadow towards its parameter by `rate`.

        rate: a number, or float32 [] on the shadows' device, which a CUDA graph reads at each replay; None: the EMA's
        own rate.

        Raises ValueError if the model's parameter names or shapes changed.
        """
        shadows, parameters = self._pairs(model)
        rate = self.rate if rate is None else rate
        parameters = [p.to(s.dtype) for s, p in zip(shadows, parameters, strict=True)]
        if isinstance(rate, Tensor):
            # Gradient ascent along p with weight decay 1 is s - rate·(s - p). This is one kernel for many parameters;
            # _foreach_lerp_ with a rate on the device would launch one per parameter.
            torch._fused_sgd_(
                shadows, parameters, [], weight_decay=1.0, momentum=0.0, lr=rate, dampening=0.0, nesterov=False,
                maximize=True, is_first_step=False,
            )  # fmt: skip
        else:
            torch._foreach_lerp_(shadows, parameters, rate)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Within a with block `model` has the averaged parameters; afterwards exactly its own, also after an exception.

        Parameters are overwritten in place, so optimisers and wrappers keep their references. Meanwhile a copy holds
        the model's own values.
        """
        shadows, parameters = self._pairs(model)
        with torch.no_grad():
            own = [p.clone() for p in parameters]
        try:
            _copy(parameters, shadows)
            yield model
        finally:
            _copy(parameters, own)

    def state_dict(self) -> dict[str, Tensor]:
        """Shadows by parameter name, without the rate. They are not copies: the next `update` changes them."""
        return dict(self.shadows)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state` into the shadows. If names or shapes differ, raise ValueError and change nothing."""
        _check_same(self.shadows, state, "the saved EMA")
        for name, shadow in self.shadows.items():
            shadow.copy_(state[name])

    def _pairs(self, model: HasParameters) -> tuple[list[Tensor], list[Tensor]]:
        parameters = dict(model.named_parameters())
        _check_same(self.shadows, parameters, "the model")
        return list(self.shadows.values()), [parameters[name] for name in self.shadows]


@torch.no_grad()
def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def _check_same(shadows: Mapping[str, Tensor], other: Mapping[str, Tensor], what: str) -> None:
    if missing := shadows.keys() - other.keys():
        raise ValueError(f"{what} lacks {_some(missing)}, which the EMA averages: start the EMA from this model.")
    if extra := other.keys() - shadows.keys():
        raise ValueError(f"{what} has {_some(extra)}, which the EMA does not average: start the EMA from this model.")
    for name, shadow in shadows.items():
        if shadow.shape != other[name].shape:
            raise ValueError(
                f"{name} is {list(other[name].shape)} in {what} and {list(shadow.shape)} in the EMA: "
                "use the same architecture."
            )


def _some(names: set[str]) -> str:
    first, *rest = sorted(names)
    return f"{first} and {len(rest)} more" if rest else first
