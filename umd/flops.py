"""Matrix-product FLOPs of the network, from its configuration; a multiply-add is two, as in torch's flop counter."""

from umd.config import ModelConfig


def forward_flops(config: ModelConfig, keep: tuple[int, ...], num_conditions: int) -> int:
    """FLOPs of one forward pass over samples with `keep[s]` visible patches and so many distinct conditions."""
    D, P = config.hidden_size, config.patch_size
    hidden, pixels = int(D * config.mlp_ratio), config.channels * P * P
    extra = 0 if config.adaLN else 1
    encoder = [extra + config.num_cls + k for k in keep]
    decoder = [extra + 1 + config.num_patches] * len(keep)

    def blocks(depth: int, lengths: list[int]) -> int:
        linear = sum(lengths) * (4 * D * D + 2 * D * hidden)
        attention = sum(2 * length * length * D for length in lengths)
        return 2 * depth * (linear + attention)

    features, t_hidden = (256, D) if config.embedding == "paper" else (D, 2 * D)
    condition = features * t_hidden + t_hidden * D + (D * config.num_modulations * D if config.adaLN else 0)
    if config.num_classes and config.embedding == "released":
        condition += 4 * D * D
    ends = sum(keep) * pixels * D + config.num_patches * len(keep) * D * 2 * pixels
    return (
        blocks(config.depth, encoder) + blocks(config.decoder_depth, decoder) + 2 * (num_conditions * condition + ends)
    )


def step_flops(config: ModelConfig, keep: tuple[int, ...], num_conditions: int) -> int:
    """FLOPs of forward and backward: three times the forward pass, the convention of MFU."""
    return 3 * forward_flops(config, keep, num_conditions)
