"""Which patches are visible, and the packing of a batch whose samples have different numbers of visible patches."""

from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from umd.config import ModelConfig
from umd.errors import UserError
from umd.ops import Packing, kept, pack


def num_keep(num_patches: int, mask_ratio: float) -> int:
    """K = int(L·(1 - m)), the number of visible patches of a sample, rounded as in MAE's and the authors' code.

    Raises:
        UserError: the ratio is outside [0, 1), leaves no visible patch, or is above 0 and still hides none.
    """
    if not 0 <= mask_ratio < 1:
        raise UserError(f"a mask ratio is the share of hidden patches, 0 <= m < 1; got {mask_ratio}")
    keep = int(num_patches * (1 - mask_ratio))
    if keep == 0:
        raise UserError(
            f"mask ratio {mask_ratio} leaves no patch of {num_patches} visible; use at most {1 - 1 / num_patches:.3f}"
        )
    if keep == num_patches and mask_ratio > 0:
        raise UserError(
            f"mask ratio {mask_ratio} hides none of {num_patches} patches; use 0, or at least {1 / num_patches:.3f}"
        )
    return keep


class Layout(NamedTuple):
    """The packings of one batch at each stage of the model. They are the same in every step."""

    patches: Packing  # K tokens per sample
    encoder: Packing  # num_cls + K tokens per sample
    decoder: Packing  # 1 + L tokens per sample; L without CLS tokens
    encoder_blocks: Packing  # as encoder; without adaLN with the condition token in front
    decoder_blocks: Packing  # as decoder, with the condition token too; in a cross decoder the predicted patches only


@kept(64)
def layout(
    config: ModelConfig,
    keep: tuple[int, ...],
    cond_index: tuple[int, ...] | None,
    device: torch.device,
    predict: tuple[int, ...] | None = None,
) -> Layout:
    """Make the packings of a batch; cached.

    Args:
        config: the network.
        keep: visible patches of each sample.
        cond_index: condition row of each sample; None: each sample has its own.
        device: where the tensors live.
        predict: patches of each sample that the cross decoder predicts; None: all L.
    """

    def packing(extra: int, lengths: tuple[int, ...]) -> Packing:
        return pack([extra + length for length in lengths], cond_index, device)

    whole, cond = (config.num_patches,) * len(keep), config.cond_tokens
    summary = min(config.num_cls, 1)  # the averaged CLS token in front of the decoder's patches
    encoder, decoder = packing(config.num_cls, keep), packing(summary, whole)
    encoder_blocks = packing(config.num_cls + cond, keep) if cond else encoder
    if config.decoder == "cross":
        return Layout(packing(0, keep), encoder, decoder, encoder_blocks, packing(0, predict or whole))
    decoder_blocks = packing(summary + cond, whole) if cond else decoder
    return Layout(packing(0, keep), encoder, decoder, encoder_blocks, decoder_blocks)


def random_ids_keep(keep: tuple[int, ...], num_patches: int, generator: torch.Generator) -> Tensor:
    """Draw `keep[s]` random patches of each sample s: int64 [N] indices into the S·L patches.

    The result is on the generator's device.
    """
    noise = torch.rand(len(keep), num_patches, generator=generator, device=generator.device)
    return ids_keep_from_noise(noise, keep)


def ids_keep_from_noise(noise: Tensor, keep: tuple[int, ...]) -> Tensor:
    """For each sample s the `keep[s]` patches with the smallest noise, in order of their noise (MAE's `ids_shuffle`).

    noise: [S, L], any real type; ties are in patch order. Returns int64 [N], indices into the S·L patches.
    """
    return ranked_ids(noise, (0,) * len(keep), keep)


def ranked_ids(noise: Tensor, first: tuple[int, ...], stop: tuple[int, ...]) -> Tensor:
    """For each sample s the patches at ranks `first[s]` to `stop[s] - 1` in the order of their noise [S, L].

    Returns int64, indices into the S·L patches, sample after sample.
    """
    S, L = noise.shape
    flat = noise.argsort(dim=1, stable=True) + torch.arange(S, device=noise.device)[:, None] * L  # [S, L]
    ids, start = [], 0
    for span, samples in groupby(zip(first, stop, strict=True)):  # one slice per run of equal spans; usually two runs
        end = start + len(list(samples))
        ids.append(flat[start:end, slice(*span)].flatten())
        start = end
    return torch.cat(ids)
