"""What a whole sampling run computes once, as its times and weights are known beforehand.

Conditions, modulation tables, and the weights in the type of the products.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from umd.guidance import Denoise
from umd.layers import computing_in
from umd.model import UMD

MOST_BYTES = 2**29  # for the tables: about the size of the adaLN weights, which a step then need not read


@dataclass(frozen=True, eq=False)
class ConditionTable:
    """Conditions and modulation tables of n times and m labels: all that a sampler will need."""

    cond: Tensor  # [n·m, D]
    tables: Tensor  # [n·m, M·D], M tables: 6 per block, 2 per modulated final norm
    time_rows: Tensor  # int64, indexed by model time: the first of its m rows
    label_rows: Tensor  # int64 [num_classes + 1], indexed by label: its place among the m rows

    def __call__(self, timesteps: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """(cond [R, D], tables [R, M·D]) for times int64 [R] and labels int64 [R]; None: the null class.

        A time or label that was not precomputed raises IndexError on the CPU; on a GPU the lookup fails on the device.
        """
        labels = torch.full_like(timesteps, len(self.label_rows) - 1) if labels is None else labels
        rows = self.time_rows.index_select(0, timesteps) + self.label_rows.index_select(0, labels)
        return self.cond.index_select(0, rows), self.tables.index_select(0, rows)


@torch.no_grad()
def make_conditions(model: UMD, times: Sequence[int], labels: Tensor | None = None) -> ConditionTable | None:
    """Precompute the conditions of `model.denoise` at model times `times`, for the given labels and the null class.

    This needs one product per block in all, instead of one per block and step.

    Args:
        model: the network.
        times: model times.
        labels: int64 [n], or None: the null class only.

    Returns:
        The conditions; None for a model without adaLN, or if the tables would take more than half a GiB. Each step
        then computes its own.
    """
    config, device = model.config, model.pos_embed.device
    known = torch.full((1,), config.num_classes, device=device)
    if labels is not None:
        known = torch.cat([labels.to(device), known]).unique()
    n, m = len(times), len(known)
    size = n * m * sum(config.modulation_widths) * model.pos_embed.element_size()
    if not config.adaLN or size > MOST_BYTES:
        return None
    of_times = torch.tensor(times, device=device)
    cond, *modulation = model.condition(of_times.repeat_interleave(m), known.repeat(n))
    tables = torch.cat([table for block in chain(*modulation) for table in block], dim=1)
    time_rows = torch.full((1 + max(times),), -n * m, device=device)  # a negative row for times that are not held
    label_rows = torch.full((1 + config.num_classes,), -n * m, device=device)
    time_rows[of_times] = m * torch.arange(n, device=device)
    label_rows[known] = torch.arange(m, device=device)
    return ConditionTable(cond, tables, time_rows, label_rows)


def denoiser(model: UMD, dtype: torch.dtype, times: Sequence[int] = (), labels: Tensor | None = None) -> Denoise:
    """`model.denoise` in `dtype`, as the samplers call it. The model's weights must stay as they are.

    times, labels: all that will occur, if known.
    """
    conditions = make_conditions(model, times, labels) if times else None
    context = computing_in(model, dtype)

    def denoise(x_t: Tensor, timesteps: Tensor, labels: Tensor | None) -> tuple[Tensor, ...]:
        with context():
            return model.denoise(x_t, timesteps, labels, conditions)

    return denoise
