"""Corruption and loss of UMD, and with other numbers of MAE, MaskDiT and DiT (the paper's Eqs. 4 to 6).

Everything random of a step comes from one seed, so a step is a pure function of (weights, batch, seed).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from umd import ops
from umd.config import ModelConfig, ObjectiveConfig
from umd.errors import UserError
from umd.masking import Layout, layout, num_keep, random_ids_keep
from umd.schedule import NoiseSchedule


class Corruption(NamedTuple):
    """What was done to a batch [B, C, H, W]; its first `num_noised` samples are noised, the others noise-free."""

    num_noised: int
    num_visible_noised: int  # visible patches of the noised samples together
    ids_keep: Tensor  # int64 [N], visible patches among the B·L
    timesteps: Tensor  # int64 [R], model time of each distinct condition: the noised samples', then one 0
    labels: Tensor | None  # int64 [R]
    noise: Tensor  # int64 [], the Philox seed of ε; or ε itself [n, C, H, W]
    layout: Layout


class Objective:
    """Corrupts batches and scores predictions.

    Args:
        model: the network's configuration: patches, CLS tokens, number of classes.
        config: shares and mask ratios.
        schedule: noise schedule.

    Raises:
        UserError: a mask ratio leaves no visible or no hidden patch.
    """

    def __init__(self, model: ModelConfig, config: ObjectiveConfig, schedule: NoiseSchedule):
        self.model, self.config, self.schedule = model, config, schedule
        L = model.num_patches
        self.keep_noised = num_keep(L, config.mask_ratio)
        self.keep_clean = num_keep(L, config.mask_ratio_no_noise)
        if config.no_noise_prob > 0 and self.keep_clean == L:
            raise UserError("mask_ratio_no_noise is 0: noise-free samples would have nothing to predict; use e.g. 0.75")

    def split(self, batch_size: int) -> tuple[int, int]:
        """(noised, noise-free) samples of a batch: the first B - int(B·r0), and the rest."""
        clean = int(batch_size * self.config.no_noise_prob)
        return batch_size - clean, clean

    def corrupt(self, batch_size: int, seed: int, device: torch.device, labels: Tensor | None = None) -> Corruption:
        """Draw noise levels, masks and label dropout for a batch.

        labels: int64 [B] of the batch, used for its noised samples; noise-free ones always get the null class.
        """
        generator = torch.Generator(device).manual_seed(seed)
        noised, clean = self.split(batch_size)
        t = torch.randint(1, self.schedule.num_steps + 1, (noised,), generator=generator, device=device)
        rows = None
        if labels is not None:
            null = self.model.num_classes
            drop = torch.rand(noised, generator=generator, device=device) < self.config.class_dropout_prob
            rows = torch.where(drop, null, labels[:noised])
        return self.corruption(
            timesteps=t,
            ids_keep=random_ids_keep(self._keep(noised, clean), self.model.num_patches, generator),
            noise=torch.randint(2**62, (), generator=generator, device=device),
            clean=clean,
            labels=rows,
        )

    def corruption(
        self, timesteps: Tensor, ids_keep: Tensor, noise: Tensor, clean: int, labels: Tensor | None = None
    ) -> Corruption:
        """The corruption with given draws: timesteps, labels int64 [n] of the noised samples; `clean` others behind."""
        n = len(timesteps)
        cond_index = (*range(n), *(n for _ in range(clean)))  # the noise-free samples share one condition
        if clean:
            timesteps = torch.cat([timesteps, timesteps.new_zeros(1)])
            labels = None if labels is None else torch.cat([labels, labels.new_full((1,), self.model.num_classes)])
        return Corruption(
            num_noised=n,
            num_visible_noised=n * self.keep_noised,
            ids_keep=ids_keep,
            timesteps=timesteps,
            labels=labels,
            noise=noise,
            layout=layout(self.model, self._keep(n, clean), cond_index, ids_keep.device),
        )

    def visible_patches(self, x_start: Tensor, c: Corruption) -> Tensor:
        """The visible patches of x_t: [N, C·P·P]."""
        coefficients = self.schedule.coefficients(c.timesteps[: c.num_noised], dtype=x_start.dtype)
        return ops.gather_patches(x_start, c.ids_keep, *coefficients, c.noise, self.model.patch_size)

    def loss(self, prediction: Tensor, x_start: Tensor, c: Corruption) -> tuple[Tensor, Tensor]:
        """(total, parts [3]: ε on visible, x0 on hidden patches of noised samples; x0 on hidden of noise-free ones)."""
        return ops.masked_diffusion_loss(
            prediction,
            x_start,
            c.ids_keep,
            c.num_visible_noised,
            c.num_noised,
            c.noise,
            self.model.patch_size,
        )

    def __call__(self, model, x_start: Tensor, c: Corruption) -> tuple[Tensor, Tensor]:
        """One forward pass of the whole batch: (total loss, its parts)."""
        patches = self.visible_patches(x_start, c)
        prediction = model(patches, c.ids_keep, c.layout, c.timesteps, c.labels)
        return self.loss(prediction, x_start, c)

    def _keep(self, noised: int, clean: int) -> tuple[int, ...]:
        return (self.keep_noised,) * noised + (self.keep_clean,) * clean
