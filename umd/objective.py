"""Corruption and loss of UMD, and with other numbers of MAE, MaskDiT and DiT (the paper's Eqs. 4 to 6); of DiffMAE.

Everything random of a step comes from one seed, so a step is a pure function of (weights, batch, seed).
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from umd import diffmae, ops
from umd.config import DiffMAEConfig, DiffMAEObjectiveConfig, ModelConfig, ObjectiveConfig
from umd.errors import UserError
from umd.flops import diffmae_flops, step_flops
from umd.masking import Layout, ids_keep_from_noise, layout, num_keep, ranked_ids
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
    ids_predict: Tensor | None = None  # int64 [Q], places that a cross decoder predicts; None: all
    ids_ignored: Tensor | None = None  # int64, hidden patches that are not scored; None: every one is
    num_ignored_noised: int = 0  # how many of them are in noised samples


class Objective:
    """Corrupts batches and scores predictions.

    Args:
        model: the network's configuration: patches, CLS tokens, number of classes.
        config: shares and mask ratios.
        schedule: noise schedule.

    Raises:
        UserError: a mask ratio leaves no visible or no hidden patch, or predict_ratio none to predict; a subset to
            predict where the decoder reads all patches, or where none is hidden.
    """

    def __init__(self, model: ModelConfig, config: ObjectiveConfig, schedule: NoiseSchedule):
        self.model, self.config, self.schedule = model, config, schedule
        L = model.num_patches
        self.keep_noised = num_keep(L, config.mask_ratio)
        self.keep_clean = num_keep(L, config.mask_ratio_no_noise)
        if config.no_noise_prob > 0 and self.keep_clean == L:
            raise UserError("mask_ratio_no_noise is 0: noise-free samples would have nothing to predict; use e.g. 0.75")
        if config.predict_ratio < 1 and model.decoder != "cross":
            raise UserError(
                f"predict_ratio is {config.predict_ratio}, but the published decoder reads and predicts every patch: "
                "use --model.decoder cross, or predict_ratio 1"
            )
        self.spare_noised = self._spare(L - self.keep_noised) if config.no_noise_prob < 1 else 0
        self.spare_clean = self._spare(L - self.keep_clean) if config.no_noise_prob > 0 else 0
        if config.predict_ratio < 1 and self.spare_noised + self.spare_clean == 0:
            raise UserError(
                f"predict_ratio is {config.predict_ratio}, but of the patches that these mask ratios hide none can be "
                "left out: hide more, or use predict_ratio 1"
            )

    def split(self, batch_size: int) -> tuple[int, int]:
        """(noised, noise-free) samples of a batch: the first B - int(B·r0), and the rest."""
        clean = int(batch_size * self.config.no_noise_prob)
        return batch_size - clean, clean

    def part_names(self, batch_size: int) -> tuple[str | None, ...]:
        """What the parts of the loss are called in logs; None for that of an absent group."""
        noised, clean = self.split(batch_size)
        return ("loss_noised_eps" if noised else None, "loss_noised_x0" if noised else None) + (
            "loss_clean" if clean else None,
        )

    def step_flops(self, batch_size: int) -> int:
        """FLOPs of forward and backward of a batch."""
        noised, clean = self.split(batch_size)
        predict = self._predict(noised, clean) if self.model.decoder == "cross" else None
        return step_flops(self.model, self._keep(noised, clean), noised + min(clean, 1), predict)

    def corrupt(
        self,
        batch_size: int,
        seed: int,
        device: torch.device,
        labels: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> Corruption:
        """Draw noise levels, masks and label dropout for a batch.

        labels: int64 [B] of the batch, used for its noised samples; noise-free ones always get the null class.
        indices: not used; other objectives look up what belongs to the pictures.
        """
        generator = torch.Generator(device).manual_seed(seed)
        noised, clean = self.split(batch_size)
        t = torch.randint(1, self.schedule.num_steps + 1, (noised,), generator=generator, device=device)
        rows = None
        if labels is not None:
            null = self.model.num_classes
            drop = torch.rand(noised, generator=generator, device=device) < self.config.class_dropout_prob
            rows = torch.where(drop, null, labels[:noised])
        L, keep = self.model.num_patches, self._keep(noised, clean)
        order = torch.rand(batch_size, L, generator=generator, device=device)
        c = self.corruption(
            timesteps=t,
            ids_keep=ids_keep_from_noise(order, keep),
            noise=torch.randint(2**62, (), generator=generator, device=device),
            clean=clean,
            labels=rows,
        )
        if self.model.decoder != "cross":
            return c
        predict = self._predict(noised, clean)
        first = (0,) * noised + (self.keep_clean,) * clean  # nothing is asked of noise-free visible patches
        stop = tuple(a + n for a, n in zip(first, predict, strict=True))
        rows_of = (*range(noised), *(noised for _ in range(clean)))
        return c._replace(
            layout=layout(self.model, keep, rows_of, device, predict),
            ids_predict=ranked_ids(order, first, stop),
            ids_ignored=ranked_ids(order, stop, (L,) * batch_size) if self.config.predict_ratio < 1 else None,
            num_ignored_noised=noised * self.spare_noised,
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
            c.ids_ignored,
            c.num_ignored_noised,
        )

    def __call__(self, model, x_start: Tensor, c: Corruption) -> tuple[Tensor, Tensor]:
        """One forward pass of the whole batch: (total loss, its parts)."""
        patches = self.visible_patches(x_start, c)
        prediction = model(patches, c.ids_keep, c.layout, c.timesteps, c.labels, c.ids_predict)
        return self.loss(prediction, x_start, c)

    def _keep(self, noised: int, clean: int) -> tuple[int, ...]:
        return (self.keep_noised,) * noised + (self.keep_clean,) * clean

    def _predict(self, noised: int, clean: int) -> tuple[int, ...]:
        """Patches of each sample that a cross decoder predicts: of noised ones the visible too, whose ε is scored."""
        L = self.model.num_patches
        return (L - self.spare_noised,) * noised + (L - self.keep_clean - self.spare_clean,) * clean

    def _spare(self, hidden: int) -> int:
        """How many of a sample's hidden patches are not predicted."""
        predicted = int(hidden * self.config.predict_ratio)
        if hidden and not predicted:
            raise UserError(
                f"predict_ratio {self.config.predict_ratio} leaves none of {hidden} hidden patches to predict; "
                f"use at least {1 / hidden:.3f}"
            )
        return hidden - predicted


class DiffMAECorruption(NamedTuple):
    """What was done to a batch of B pictures."""

    ids_keep: Tensor  # int64 [B·K], visible patches among the B·L
    ids_masked: Tensor  # int64 [B·M], the others
    timesteps: Tensor  # int64 [B]
    noise: Tensor  # int64 [], the Philox seed of ε; or ε itself, as `diffmae.to_images` has the pictures
    layout: diffmae.Layout
    indices: Tensor | None  # int64 [B], which pictures of the dataset they are


class DiffMAEObjective:
    """Noises masked patches and scores what the network makes of them: mean over masked patches of (target - x̂0)².

    Args:
        model: the network's configuration.
        config: mask ratio, times and target.
        schedule: noise schedule.
        num_images: pictures in the dataset, as many as a file of features must have; None: not checked.

    Raises:
        UserError: a mask ratio that leaves no visible or no masked patch, times outside the schedule, a file of
            features that cannot be read or does not fit model and dataset.
    """

    def __init__(
        self,
        model: DiffMAEConfig,
        config: DiffMAEObjectiveConfig,
        schedule: NoiseSchedule,
        num_images: int | None = None,
    ):
        self.model, self.config, self.schedule = model, config, schedule
        self.keep = num_keep(model.num_patches, config.mask_ratio)
        if config.min_time > schedule.num_steps:
            raise UserError(f"min_time is {config.min_time}, but the noise schedule ends at {schedule.num_steps}")
        self.features: Callable[[Tensor], Tensor] | None = None
        if config.target not in ("pixels", "normalized"):
            self.features = FeatureFile(Path(config.target), model, num_images)
        elif model.target_size:
            raise UserError(f"target_size is {model.target_size}, but the target is {config.target}; use 0")

    def part_names(self, batch_size: int) -> tuple[str | None, ...]:
        return ()

    def step_flops(self, batch_size: int) -> int:
        """FLOPs of forward and backward of a batch: three times the forward pass, the convention of MFU."""
        return 3 * diffmae_flops(self.model, (self.keep,) * batch_size)

    def corrupt(
        self,
        batch_size: int,
        seed: int,
        device: torch.device,
        labels: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> DiffMAECorruption:
        """Draw noise levels and masks for a batch; indices: int64 [B], for a file of features. Labels are not used."""
        L = self.model.num_patches
        generator = torch.Generator(device).manual_seed(seed)
        order = torch.rand(batch_size, L, generator=generator, device=device).argsort(dim=1)  # [B, L]
        order = order + torch.arange(batch_size, device=device)[:, None] * L
        timesteps = torch.randint(
            self.config.min_time, self.schedule.num_steps + 1, (batch_size,), generator=generator, device=device
        )
        return DiffMAECorruption(
            ids_keep=order[:, : self.keep].flatten(),
            ids_masked=order[:, self.keep :].flatten(),
            timesteps=timesteps,
            noise=torch.randint(2**62, (), generator=generator, device=device),
            layout=diffmae.layout(self.model, (self.keep,) * batch_size, device),
            indices=indices,
        )

    def __call__(self, model, x_start: Tensor, c: DiffMAECorruption) -> tuple[Tensor, Tensor]:
        """One forward pass of images [B, C, H, W] or clips [B, C, F, H, W]: (loss, no parts [0])."""
        images, P = diffmae.to_images(x_start, self.model), self.model.patch_size  # [B·f, C·p, H, W]
        visible = self.clean_patches(images, c.ids_keep)  # [B·K, C·p·P·P]
        times = c.timesteps.repeat_interleave(len(images) // len(x_start))  # [B·f]
        coefficients = self.schedule.coefficients(times, dtype=images.dtype)
        masked = ops.gather_patches(images, c.ids_masked, *coefficients, c.noise, P)  # [B·M, C·p·P·P]
        prediction = model(visible, c.ids_keep, masked, c.ids_masked, c.layout, c.timesteps)
        target = self.target(images, c).to(torch.promote_types(prediction.dtype, torch.float32))
        loss = (prediction.to(target.dtype) - target).square().mean()
        return loss, loss.detach().new_empty(0)

    def target(self, images: Tensor, c: DiffMAECorruption) -> Tensor:
        """What is to be predicted of the masked patches: [B·M, C·p·P·P or target_size]."""
        if self.features is not None:
            if c.indices is None:
                raise ValueError("indices: expected int64 [B], the pictures whose features are the target, got None")
            return self.features(c.indices).flatten(0, 1).index_select(0, c.ids_masked)
        target = self.clean_patches(images, c.ids_masked)
        if self.config.target == "normalized":  # MAE's constants
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) * torch.rsqrt(variance + 1e-6)
        return target

    def clean_patches(self, images: Tensor, ids: Tensor) -> Tensor:
        none, seed = images.new_empty(0), ids.new_zeros(())  # no coefficients: no picture is noised
        return ops.gather_patches(images, ids, none, none, seed, self.model.patch_size)


class FeatureFile:
    """Features of every picture, made once by another network (CLIP, DINO): a .npy [images, L, target_size] of floats.

    Called with picture indices int64 [B] it returns float32 [B, L, target_size] on their device. The rows follow the
    order of the training split; the file is mapped, not read whole.
    """

    def __init__(self, path: Path, model: DiffMAEConfig, num_images: int | None = None):
        try:
            self.array = np.load(path, mmap_mode="r", allow_pickle=False)
            shape, kind = tuple(self.array.shape), self.array.dtype.kind
        except (OSError, ValueError, AttributeError) as error:  # AttributeError: an .npz
            raise UserError(
                f"target {path} cannot be read ({error}); expected pixels, normalized, or a .npy file of features"
            ) from error
        expected = (num_images or shape[0], model.num_patches, model.target_size)
        if kind != "f" or shape != expected:
            raise UserError(
                f"the features in {path} are {self.array.dtype} {list(shape)}; expected floats {list(expected)}: "
                "training images, patches, and model.target_size"
            )

    def __call__(self, indices: Tensor) -> Tensor:
        rows = np.asarray(self.array[indices.cpu().numpy()], dtype=np.float32)
        return torch.from_numpy(rows).to(indices.device)
