"""The conditions of a whole sampling with their modulation, made once: a sampler's times are known beforehand."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from umd.model import UMD

MOST_BYTES = 2**29  # of the tables; the projections that they spare a sampler at each step are of this size


@dataclass(frozen=True, eq=False)
class Conditions:
    """Every condition that a sampler will ask for with its modulation, made at once: n times m labels."""

    cond: Tensor  # [n·m, D]
    tables: Tensor  # [n·m, M·D], M tables: 6 a block, 2 of a final norm
    time_rows: Tensor  # int64 [T], where a time's rows begin
    label_rows: Tensor  # int64 [num_classes + 1], a label's place among them

    def __call__(self, timesteps: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """(cond [R, D], tables [R, M·D]) of times int64 [R] and labels int64 [R], or None: the null class. Those that
        are not held raise IndexError, and on a GPU fail there."""
        labels = torch.full_like(timesteps, len(self.label_rows) - 1) if labels is None else labels
        rows = self.time_rows.index_select(0, timesteps) + self.label_rows.index_select(0, labels)
        return self.cond.index_select(0, rows), self.tables.index_select(0, rows)


@torch.no_grad()
def make_conditions(model: UMD, times: Sequence[int], labels: Tensor | None = None) -> Conditions | None:
    """For `model.denoise` at model times `times` with labels int64 [n] and the null class.

    One product a block for all of them, in place of one at each time. None, and each step makes its own, for a model
    without adaLN or where the tables would take more than half a GiB.
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
    time_rows = torch.full((1 + max(times),), -n * m, device=device)  # not held: no row, whatever the label
    label_rows = torch.full((1 + config.num_classes,), -n * m, device=device)
    time_rows[of_times] = m * torch.arange(n, device=device)
    label_rows[known] = torch.arange(m, device=device)
    return Conditions(cond, tables, time_rows, label_rows)
