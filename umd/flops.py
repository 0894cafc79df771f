"""FLOPs of a network's matrix products, from its configuration. A multiply-add is two FLOPs, as in torch's counter."""

from collections.abc import Sequence

from umd.config import ClassifierConfig, DiffMAEConfig, ModelConfig


def forward_flops(
    config: ModelConfig, keep: tuple[int, ...], num_conditions: int, predict: tuple[int, ...] | None = None
) -> int:
    """FLOPs of one forward pass.

    Args:
        config: the network.
        keep: visible patches of each sample.
        num_conditions: number of distinct conditions (time and label).
        predict: patches of each sample that a cross decoder predicts; None: all.
    """
    D, width, area = config.hidden_size, config.decoder_width, config.patch_size**2
    hidden, wide_hidden = int(D * config.mlp_ratio), int(width * config.mlp_ratio)
    extra = config.cond_tokens
    encoder = [extra + config.num_cls + k for k in keep]
    whole = (config.num_patches,) * len(keep)
    predict = predict or (whole if config.decoder_depth else keep)
    if config.decoder == "cross":
        decoder = cross_attention_products(D, D, predict, encoder) + sum(predict) * 2 * D * hidden
    else:
        decoder = vit_block(width, wide_hidden, [extra + min(config.num_cls, 1) + length for length in whole])

    features, t_hidden = (D, 2 * D) if config.embedding == "released" else (256, D)
    condition = features * t_hidden + t_hidden * D if config.embedding != "none" else 0
    if config.adaLN:
        tables, rank = sum(config.modulation_widths), config.adaLN_rank
        condition += {"per_block": D * tables, "single": D * 6 * D, "low_rank": rank * (D + tables)}[
            config.adaLN_projection
        ]
    if config.num_classes and config.embedding == "released":
        condition += 4 * D * D
    ends = sum(keep) * config.channels * area * D + sum(predict) * width * config.out_channels * area
    if config.decoder_hidden_size:
        ends += sum(config.num_cls + k for k in keep) * D * width
    blocks = config.depth * vit_block(D, hidden, encoder) + config.decoder_depth * decoder
    return 2 * (blocks + num_conditions * condition + ends)


def step_flops(
    config: ModelConfig, keep: tuple[int, ...], num_conditions: int, predict: tuple[int, ...] | None = None
) -> int:
    """FLOPs of the forward and backward pass: by MFU's convention three times `forward_flops`."""
    return 3 * forward_flops(config, keep, num_conditions, predict)


def diffmae_encoder_flops(config: DiffMAEConfig, keep: tuple[int, ...]) -> int:
    """FLOPs of DiffMAE's encoder on images with `keep[b]` visible patches, including the decoder's keys and values."""
    D, width = config.hidden_size, config.decoder_hidden_size
    lengths = [config.num_cls + k for k in keep]
    context = D * width if config.decoder == "joint" else config.decoder_depth * 2 * D * width
    products = sum(keep) * config.patch_dim * D + sum(lengths) * context
    return 2 * (products + config.depth * vit_block(D, int(D * config.mlp_ratio), lengths))


def diffmae_decoder_flops(config: DiffMAEConfig, keep: tuple[int, ...]) -> int:
    """FLOPs of one pass of DiffMAE's decoder, i.e. of one inpainting step."""
    D, hidden = config.decoder_hidden_size, int(config.decoder_hidden_size * config.mlp_ratio)
    seen, masked = [config.num_cls + k for k in keep], [config.num_patches - k for k in keep]
    cross = cross_attention_products(D, 0, masked, seen)  # keys and values are counted with the encoder
    block = {
        "joint": vit_block(D, hidden, [m + s for m, s in zip(masked, seen, strict=True)]),
        "cross": cross + sum(masked) * 2 * D * hidden,
        "cross_self": cross + vit_block(D, hidden, masked),
    }[config.decoder]
    features, t_hidden = (D, 2 * D) if config.embedding == "released" else (256, D)
    time = len(keep) * (features * t_hidden + t_hidden * D)
    ends = sum(masked) * D * (config.patch_dim + (config.target_size or config.patch_dim))
    return 2 * (time + ends + config.decoder_depth * block)


def diffmae_flops(config: DiffMAEConfig, keep: tuple[int, ...]) -> int:
    """FLOPs of one forward pass of DiffMAE, with a separate time for each image."""
    return diffmae_encoder_flops(config, keep) + diffmae_decoder_flops(config, keep)


def vit_block(D: int, hidden: int, lengths: list[int]) -> int:
    """Multiply-adds of one block (self-attention and MLP) on samples of these lengths."""
    return sum(length * (4 * D * D + 2 * D * hidden) + 2 * length * length * D for length in lengths)


def classifier_flops(config: ClassifierConfig, batch_size: int) -> int:
    """FLOPs of one forward pass of a classifier on whole images."""
    D, L = config.hidden_size, config.num_patches
    length = config.num_cls + L + config.cond_token
    block = vit_block(D, int(D * config.mlp_ratio), [length])
    return 2 * batch_size * (config.depth * block + L * config.patch_dim * D + D * config.num_classes)


def cross_attention_products(D: int, context: int, queries: Sequence[int], keys: Sequence[int]) -> int:
    """Multiply-adds of one cross-attention of width D: q and output projections, scores, weighted sum, k and v.

    context: width of the tokens from which k and v are computed; 0: leave k and v out.
    """
    pairs = sum(q * k for q, k in zip(queries, keys, strict=True))
    return sum(queries) * 2 * D * D + 2 * pairs * D + sum(keys) * context * 2 * D
