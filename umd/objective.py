"""Corruption and loss of UMD (the paper's Eqs. 4 to 6) and of DiffMAE.

With other mask ratios and noise shares, UMD's `Objective` is that of MAE, MaskDiT or DiT.

All random numbers of a sample are a pure function of (seed of the run, step, index of the sample in the whole batch).
A step is therefore the same for any number of ranks and micro-batches. `step` may be a tensor on the device, which CUDA
graphs need.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
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
from umd.pixel_stats import normalized
from umd.schedule import NoiseSchedule
from umd.spans import span


@dataclass(frozen=True)
class Part:
    """Part `index` of the `count` equal parts of a step's batch: one for each rank and micro-batch."""

    index: int = 0
    count: int = 1


WHOLE = Part()
WORD = 2**32  # random words are integers 0..WORD - 1
# Random words of a sample: time, label dropout, two for the seed of its noise, then one per patch for the mask.
FIRST_PATCH = 4


def seeds_from_words(high: Tensor, low: Tensor) -> Tensor:
    """Combine two random words into a Philox seed in [0, 2**63)."""
    return (high >> 1) << 32 | low


class Corruption(NamedTuple):
    """The noise, masks and labels drawn for a batch [B, C, H, W].

    The first `num_noised` samples are noised, the others are noise-free.
    """

    num_noised: int  # n
    num_visible_noised: int  # visible patches in all noised samples together
    ids_keep: Tensor  # int64 [N], indices of the visible patches among the B·L patches
    timesteps: Tensor  # int64 [R], model time of each distinct condition: one per noised sample, then a single 0
    labels: Tensor | None  # int64 [R]
    noise: Tensor  # int64 [n], the Philox seed of each noised sample's ε; or ε itself [n, C, H, W]
    layout: Layout
    ids_predict: Tensor | None = None  # int64 [Q], indices of the patches that a cross decoder predicts; None: all
    ids_ignored: Tensor | None = None  # int64, indices of the hidden patches left out of the loss; None: no patch
    num_ignored_noised: int = 0  # how many of ids_ignored are in noised samples


class Objective:
    """UMD's objective: corrupts batches and computes the loss of predictions.

    Args:
        model: the network's configuration; gives patches, CLS tokens and number of classes.
        config: share of noise-free samples and mask ratios.
        schedule: noise schedule.

    Raises:
        UserError: a mask ratio leaves no visible or no hidden patch, predict_ratio leaves no patch to predict or no
            patch to leave out, or predict_ratio is below 1 without a cross decoder. Without a decoder: any patch is
            hidden.
    """

    def __init__(self, model: ModelConfig, config: ObjectiveConfig, schedule: NoiseSchedule):
        self.model, self.config, self.schedule = model, config, schedule
        self._places: dict[tuple[int, Part, torch.device], Tensor] = {}
        L = model.num_patches
        self.keep_noised = num_keep(L, config.mask_ratio)
        self.keep_clean = num_keep(L, config.mask_ratio_no_noise)
        if not model.decoder_depth and (config.no_noise_prob > 0 or self.keep_noised < L):
            raise UserError(
                "without a decoder nothing hidden can be predicted: use no_noise_prob 0 and mask_ratio 0, or a "
                "decoder_depth above 0"
            )
        if config.no_noise_prob > 0 and self.keep_clean == L:
            raise UserError("mask_ratio_no_noise is 0: noise-free samples would have nothing to predict; use e.g. 0.75")
        if config.norm_pix and model.outputs != "x_start":
            raise UserError("norm_pix is the target of a network whose output is x_start (MAE's); leave it off")
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

    def split(self, batch_size: int, part: Part = WHOLE) -> tuple[int, int]:
        """Numbers of (noised, noise-free) samples in one part of `batch_size` samples.

        In the whole batch of B samples the first B - int(B·r0) are noised. Each part gets its share of both groups, to
        within one sample. Its noised samples come first.

        Raises:
            UserError: r0 is above 0, but the whole batch is too small for a single noise-free sample.
        """
        noised, before, after = self._noised(batch_size, part)
        return after - before, batch_size - (after - before)

    def places(self, batch_size: int, part: Part = WHOLE) -> list[int]:
        """Indices in the whole batch of the samples of one part: the noised samples, then the noise-free ones."""
        noised, before, after = self._noised(batch_size, part)
        first_clean = noised + part.index * batch_size - before
        return [*range(before, after), *range(first_clean, first_clean + batch_size - (after - before))]

    def _noised(self, batch_size: int, part: Part) -> tuple[int, int, int]:
        """(number of noised samples in the whole batch; first and last + 1 of the part's noised samples)."""
        whole, r0 = batch_size * part.count, self.config.no_noise_prob
        clean = int(whole * r0)
        if r0 > 0 and clean == 0:
            raise UserError(
                f"no_noise_prob is {r0}, and int({whole} x {r0}) = 0 of the {whole} samples of a batch would be "
                f"noise-free; use a batch_size of at least {math.ceil(1 / r0)}, or no_noise_prob 0"
            )
        noised = whole - clean
        return noised, noised * part.index // part.count, noised * (part.index + 1) // part.count

    def part_names(self) -> tuple[str | None, ...]:
        """Names of the three parts of the loss in logs; None for a part whose group of samples is empty."""
        r0 = self.config.no_noise_prob
        noised = ("loss_noised_eps", "loss_noised_x0") if r0 < 1 else (None, None)
        return *noised, "loss_clean" if r0 > 0 else None

    def part_weights(self, batch_size: int, part: Part) -> tuple[float, ...]:
        """Weights of one micro-batch's loss parts in the mean over all ranks and micro-batches.

        A weight is proportional to the micro-batch's samples in that group: the mean is then that of the whole batch.
        """
        samples, whole = self.split(batch_size, part), self.split(batch_size * part.count)
        noised, clean = (part.count * a / max(b, 1) for a, b in zip(samples, whole, strict=True))
        return noised, noised, clean

    def step_flops(self, batch_size: int, part: Part = WHOLE) -> int:
        """FLOPs of the forward and backward pass of one part of `batch_size` samples."""
        counts = noised, clean = self.split(batch_size, part)
        return step_flops(self.model, self._keep(*counts), noised + min(clean, 1), self._predict(*counts))

    on_device = True  # nothing is drawn on the host: `step` may be a tensor

    def corrupt(
        self,
        batch_size: int,
        seed: int,
        device: torch.device,
        labels: Tensor | None = None,
        indices: Tensor | None = None,
        step: int | Tensor = 0,
        part: Part = WHOLE,
    ) -> Corruption:
        """Draw noise levels, masks and label dropout for one part of a step's batch.

        Args:
            batch_size: samples in this part; `places(batch_size, part)` are their indices in the whole batch.
            seed: seed of the run, 0 <= seed < 2**63.
            device: where the tensors of the result are made.
            labels: int64 [batch_size]. Noised samples use them; noise-free samples always get the null class.
            indices: ignored here; other objectives take the images' indices in the dataset.
            step: number of the step, an int or an int64 [] tensor on `device`.
        """
        noised, clean = self.split(batch_size, part)
        L, keep = self.model.num_patches, self._keep(noised, clean)
        samples = self._samples(batch_size, part, device)
        words = ops.random_words(seed, as_step(step, device), samples, FIRST_PATCH + L)  # [B, 4 + L]
        drawn, order = words[:noised], words[:, FIRST_PATCH:]  # [n, 4 + L], [B, L]
        noised_labels = None  # int64 [n]
        if labels is not None:
            drop = drawn[:, 1] < int(self.config.class_dropout_prob * WORD)
            noised_labels = torch.where(drop, self.model.num_classes, labels[:noised])
        predict = self._predict(noised, clean)
        c = self.corruption(
            timesteps=self.times(drawn[:, 0]),
            ids_keep=ids_keep_from_noise(order, keep),
            noise=seeds_from_words(drawn[:, 2], drawn[:, 3]),
            clean=clean,
            labels=noised_labels,
            predict=predict,
        )
        if predict is None:
            return c
        first = (0,) * noised + (self.keep_clean,) * clean  # visible patches of noise-free samples are not predicted
        stop = tuple(a + n for a, n in zip(first, predict, strict=True))
        return c._replace(
            ids_predict=ranked_ids(order, first, stop),
            ids_ignored=ranked_ids(order, stop, (L,) * batch_size) if self.config.predict_ratio < 1 else None,
            num_ignored_noised=noised * self.spare_noised,
        )

    def _samples(self, batch_size: int, part: Part, device: torch.device) -> Tensor:
        """`places` as int64 [batch_size] on the device; copied there once, then kept."""
        key = batch_size, part, device
        if key not in self._places:
            self._places[key] = torch.tensor(self.places(batch_size, part), device=device)
        return self._places[key]

    def corruption(
        self, timesteps: Tensor, ids_keep: Tensor, noise: Tensor, clean: int, labels: Tensor | None = None,
        predict: tuple[int, ...] | None = None,
    ) -> Corruption:  # fmt: skip
        """Build the corruption from given draws; the tensors are as in `Corruption`.

        timesteps, labels: int64 [n], of the noised samples. clean: number of noise-free samples behind them.
        predict: patches of each sample that a cross decoder predicts; None: all.
        """
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
            layout=layout(self.model, self._keep(n, clean), cond_index, ids_keep.device, predict),
        )

    def times(self, words: Tensor) -> Tensor:
        """Map random words [n] to model times 1..T."""
        return 1 + (words * self.schedule.num_steps >> 32)

    def coefficients(self, c: Corruption, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Coefficients of image and noise in the x_t of the noised samples: (√ᾱ, √(1-ᾱ)), [n] each."""
        return self.schedule.coefficients(c.timesteps[: c.num_noised], dtype=dtype)

    def visible_patches(self, x_start: Tensor, c: Corruption) -> Tensor:
        """The visible patches of x_t, from images x_start [B, C, H, W]: [N, C·P·P]."""
        coefficients = self.coefficients(c, x_start.dtype)
        return ops.gather_patches(x_start, c.ids_keep, *coefficients, c.noise, self.model.patch_size)

    def loss(self, prediction: Tensor, x_start: Tensor, c: Corruption) -> tuple[Tensor, Tensor]:
        """Loss of a prediction [B·L, 2·C·P·P] for images x_start [B, C, H, W]: (total, parts [3]).

        The parts are errors of ε̂ on visible patches and of x̂0 on hidden patches of noised samples, then of x̂0 on
        hidden patches of noise-free samples. If noised samples hide nothing, both their errors are over all patches.
        """
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
        """Run the network on images x_start [B, C, H, W] under the corruption c: (total loss, its parts [3])."""
        with span("corruption"):
            patches = self.visible_patches(x_start, c)
        prediction = model(patches, c.ids_keep, c.layout, c.timesteps, c.labels, c.ids_predict)
        with span("loss"):
            return self.loss(prediction, x_start, c)

    def _keep(self, noised: int, clean: int) -> tuple[int, ...]:
        return (self.keep_noised,) * noised + (self.keep_clean,) * clean

    def _predict(self, noised: int, clean: int) -> tuple[int, ...] | None:
        """Patches per sample that a cross decoder predicts; in noised samples also the visible, for ε. None: all."""
        if self.model.decoder != "cross":
            return None
        L = self.model.num_patches
        return (L - self.spare_noised,) * noised + (L - self.keep_clean - self.spare_clean,) * clean

    def _spare(self, hidden: int) -> int:
        """How many of a sample's `hidden` patches are left unpredicted."""
        predicted = int(hidden * self.config.predict_ratio)
        if hidden and not predicted:
            raise UserError(
                f"predict_ratio {self.config.predict_ratio} leaves none of {hidden} hidden patches to predict; "
                f"use at least {1 / hidden:.3f}"
            )
        return hidden - predicted


def as_step(step: int | Tensor, device: torch.device) -> Tensor:
    """The step number as an int64 [] tensor on the device."""
    return step if isinstance(step, Tensor) else torch.full((), step, device=device)


class DiffMAECorruption(NamedTuple):
    """The noise and masks drawn for a batch of B images or clips."""

    ids_keep: Tensor  # int64 [B·K], indices of the visible patches among the B·L patches
    ids_masked: Tensor  # int64 [B·M], indices of the masked patches
    timesteps: Tensor  # int64 [B], model times
    noise: Tensor  # int64 [B·f], Philox seeds of ε for the B·f images of `diffmae.to_images`; or ε itself
    layout: diffmae.Layout
    indices: Tensor | None  # int64 [B], the images' indices in the dataset


class DiffMAEObjective:
    """DiffMAE's objective: noises the masked patches. The loss is the mean over masked patches of (target - x̂0)².

    Args:
        model: the network's configuration.
        config: mask ratio, times and target.
        schedule: noise schedule.
        num_images: images in the dataset. A file of features must hold as many rows; None: not checked.

    Raises:
        UserError: the mask ratio leaves no visible or no masked patch, min_time is beyond the schedule, or the file of
            features cannot be read or does not fit the model or the dataset.
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

    @property
    def on_device(self) -> bool:
        """Whether nothing is drawn or read on the host. False with a file of features, which the host reads."""
        return self.features is None

    def places(self, batch_size: int, part: Part = WHOLE) -> list[int]:
        """Indices in the whole batch of the samples of one part, which are consecutive."""
        return list(range(part.index * batch_size, (part.index + 1) * batch_size))

    def part_names(self) -> tuple[str | None, ...]:
        return ()

    def part_weights(self, batch_size: int, part: Part) -> tuple[float, ...]:
        return ()

    def step_flops(self, batch_size: int, part: Part = WHOLE) -> int:
        """FLOPs of the forward and backward pass of a batch: by MFU's convention three times the forward pass."""
        return 3 * diffmae_flops(self.model, (self.keep,) * batch_size)

    def corrupt(
        self,
        batch_size: int,
        seed: int,
        device: torch.device,
        labels: Tensor | None = None,
        indices: Tensor | None = None,
        step: int | Tensor = 0,
        part: Part = WHOLE,
    ) -> DiffMAECorruption:
        """Draw noise levels and masks for one part of a step's batch; arguments as in `Objective.corrupt`.

        indices: int64 [batch_size], the images' indices in the dataset; needed with a file of features.
        labels: ignored.
        """
        L, T = self.model.num_patches, self.schedule.num_steps
        frames = self.model.num_frames // self.model.tubelet_size
        samples = torch.arange(batch_size, device=device) + part.index * batch_size
        words = ops.random_words(seed, as_step(step, device), samples, FIRST_PATCH + L + 2 * frames)
        order = words[:, FIRST_PATCH : FIRST_PATCH + L].argsort(dim=1, stable=True)  # [B, L]
        order = order + torch.arange(batch_size, device=device)[:, None] * L
        high, low = words[:, FIRST_PATCH + L :].chunk(2, dim=1)  # [B, f]
        return DiffMAECorruption(
            ids_keep=order[:, : self.keep].flatten(),
            ids_masked=order[:, self.keep :].flatten(),
            timesteps=self.config.min_time + (words[:, 0] * (T + 1 - self.config.min_time) >> 32),
            noise=seeds_from_words(high, low).flatten(),
            layout=diffmae.layout(self.model, (self.keep,) * batch_size, device),
            indices=indices,
        )

    def __call__(self, model, x_start: Tensor, c: DiffMAECorruption) -> tuple[Tensor, Tensor]:
        """Run the network on images [B, C, H, W] or clips [B, C, F, H, W]: (loss, an empty tensor of parts [0])."""
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
        """The target of the masked patches, [B·M, C·p·P·P or target_size], from images [B·f, C·p, H, W]."""
        if self.features is not None:
            if c.indices is None:
                raise ValueError("indices: expected int64 [B], the pictures whose features are the target, got None")
            return self.features(c.indices).flatten(0, 1).index_select(0, c.ids_masked)
        target = self.clean_patches(images, c.ids_masked)
        return normalized(target) if self.config.target == "normalized" else target

    def clean_patches(self, images: Tensor, ids: Tensor) -> Tensor:
        """Patches `ids` of images, without noise."""
        none, no_seeds = images.new_empty(0), ids.new_empty(0)  # no image is noised
        return ops.gather_patches(images, ids, none, none, no_seeds, self.model.patch_size)


class FeatureFile:
    """Features of every image, made beforehand by another network (CLIP, DINO).

    The file is a .npy of floats [images, L, target_size] in the order of the training split; it is memory-mapped.
    Called with image indices int64 [B], this returns float32 [B, L, target_size] on their device.
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
