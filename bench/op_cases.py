"""The ops of `umd/ops.py` on the inputs of a training or sampling step, each with its equivalent in eager PyTorch.

Streams are packed as in pre-training: half of the samples noised, each with its own modulation row; half noise-free,
sharing one row. Eager gets the same number of tokens as dense samples of equal length. This favours eager, which needs
neither a gather of modulation tables nor padding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from umd import ops
from umd.config import ModelConfig, ObjectiveConfig, model_config
from umd.objective import Objective
from umd.schedule import NoiseSchedule
from umd.train.step_counts import tensor_bytes

# Models of the paper: pixels for B/4, latents for L/2 and XL/2. Each has 256 patches.
SHAPES: dict[str, dict] = {
    "UMD-B/4": dict(image_size=(64, 64), channels=3),
    "UMD-L/2": dict(image_size=(32, 32), channels=4),
    "UMD-XL/2": dict(image_size=(32, 32), channels=4),
    "UMD-Ti/4": dict(image_size=(16, 16), channels=3),  # small, for machines without a GPU
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def dtype_name(dtype: torch.dtype) -> str:
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Side:
    """One way to compute an op."""

    call: Callable[[], tuple[Tensor, ...]]  # returns the differentiable outputs, or all outputs if none is
    inputs: tuple[Tensor, ...] = ()  # tensors whose gradients are computed

    def gradients(self, outputs: tuple[Tensor, ...], douts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, self.inputs, douts, retain_graph=True, materialize_grads=True)

    def both(self, douts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run forward and backward. Returns the gradients."""
        return self.gradients(self.call(), douts)


@dataclass(frozen=True)
class OpCase:
    """An op on given inputs."""

    op: str
    dtype: torch.dtype  # dtype of the largest tensors
    ours: Side
    eager: Side | None  # under ops.kernels("reference")
    forward_bytes: int  # compulsory bytes: each input read once, each output written once
    backward_bytes: int | None = None
    eager_with: Callable[["LayerNorm"], Side] | None = None  # eager with another LayerNorm, for ops with one


LayerNorm = Callable[[Tensor, Tensor, Tensor], Tensor]  # x [..., D], weight [D], bias [D]


def torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, 1e-6)


class Inputs:
    """Random tensors with the shapes of one model.

    Args:
        samples: images in the batch; even if no_noise_prob is 0.5.
        no_noise_prob: share of noise-free samples.
        own_rows: for the norms: instead of the training stream, use samples of this many tokens, each with its own
            modulation row. 0: the training stream.
        like: cut the stream into chunks as for this number of samples. 0: as for `samples`.
    """

    def __init__(
        self,
        model: str,
        samples: int,
        dtype: torch.dtype,
        device: str,
        no_noise_prob: float = 0.5,
        own_rows: int = 0,
        like: int = 0,
    ):
        self.config: ModelConfig = model_config(model, **SHAPES[model])
        self.samples, self.dtype, self.device = samples, dtype, device
        self.D = self.config.hidden_size
        self.generator = torch.Generator(device).manual_seed(0)
        objective = Objective(self.config, ObjectiveConfig(no_noise_prob=no_noise_prob), NoiseSchedule("cosine"))
        self.corruption = objective.corrupt(samples, seed=0, device=torch.device(device))
        timesteps = self.corruption.timesteps[: self.corruption.num_noised]
        self.coefficients = objective.schedule.coefficients(timesteps, dtype=torch.float32)
        self.stream = ops.pack([own_rows] * samples, device=device) if own_rows else self.corruption.layout.encoder
        if like:
            larger = Inputs(model, like, dtype, "cpu", no_noise_prob, own_rows).stream.chunks
            lengths = [length for count, length in self.stream.runs for _ in range(count)]
            chunk = int((larger[:, 1] - larger[:, 0]).max())
            self.stream = ops.pack(lengths, self.stream.cond_index.tolist(), device, chunk)
        self.tokens = self.stream.num_tokens

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(shape, generator=self.generator, device=self.device)
        return x.to(dtype or self.dtype).requires_grad_()

    def tables(self, count: int) -> tuple[Tensor, ...]:
        """Modulation tables [R, D] as in the model: fp32 views of one projection's output."""
        projection = self.randn(self.stream.num_rows, 6 * self.D, dtype=torch.float32).detach()
        return tuple(table.requires_grad_() for table in projection.split(self.D, dim=1)[:count])

    def images(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.randn(self.samples, self.config.channels, *self.config.image_size, dtype=dtype).detach()


def modulated_layer_norm(i: Inputs) -> OpCase:
    x, (shift, scale) = i.randn(i.tokens, i.D), i.tables(2)
    weight, bias = i.randn(i.D, dtype=torch.float32), i.randn(i.D, dtype=torch.float32)
    tables = (shift, scale, weight, bias)
    dense = i.randn(i.samples, i.tokens // i.samples, i.D)
    shift_, scale_, weight_, bias_ = (i.randn(*shape) for shape in ((i.samples, i.D),) * 2 + ((i.D,),) * 2)

    def eager(layer_norm: LayerNorm) -> Side:
        def call():
            return (layer_norm(dense, weight_, bias_) * (1 + scale_[:, None]) + shift_[:, None],)

        return Side(call, (dense, shift_, scale_, weight_, bias_))

    return OpCase(
        "modulated_layer_norm",
        i.dtype,
        Side(lambda: (ops.modulated_layer_norm(x, i.stream, *tables),), (x, *tables)),
        eager(torch_layer_norm),
        forward_bytes=2 * tensor_bytes(x) + tensor_bytes(*tables),  # x; y
        backward_bytes=3 * tensor_bytes(x) + tensor_bytes(scale, weight, bias, *tables),  # dy, x; dx, tables' gradients
        eager_with=eager,
    )


FP32_RESIDUAL = "gated_residual_layer_norm, x fp32"  # r is fp32 too; h and y stay narrow


def gated_residual_layer_norm(i: Inputs, residual: torch.dtype | None = None) -> OpCase:
    """residual: dtype of x. None: the dtype of h."""
    x, h, (gate, shift, scale) = i.randn(i.tokens, i.D, dtype=residual), i.randn(i.tokens, i.D), i.tables(3)
    weight, bias = i.randn(i.D, dtype=torch.float32), i.randn(i.D, dtype=torch.float32)
    tables = (gate, shift, scale, weight, bias)
    x_, h_ = (i.randn(i.samples, i.tokens // i.samples, i.D, dtype=dtype) for dtype in (residual, None))
    gate_, shift_, scale_ = (i.randn(i.samples, i.D, dtype=residual) for _ in range(3))
    weight_, bias_ = (i.randn(i.D, dtype=residual) for _ in range(2))

    def eager(layer_norm: LayerNorm) -> Side:
        def call():
            r = x_ + gate_[:, None] * h_
            return r, (layer_norm(r, weight_, bias_) * (1 + scale_[:, None]) + shift_[:, None]).to(h_.dtype)

        return Side(call, (x_, h_, gate_, shift_, scale_, weight_, bias_))

    return OpCase(
        "gated_residual_layer_norm" if residual is None else FP32_RESIDUAL,
        i.dtype,
        Side(lambda: ops.gated_residual_layer_norm(x, h, i.stream, *tables), (x, h, *tables)),
        eager(torch_layer_norm),
        forward_bytes=2 * tensor_bytes(x, h) + tensor_bytes(*tables),  # x, h; r, y
        # dr, dy, r, h; dx, dh, the tables' gradients
        backward_bytes=3 * tensor_bytes(x, h) + tensor_bytes(gate, scale, weight, bias, *tables),
        eager_with=eager,
    )


def gather_patches(i: Inputs) -> OpCase:
    x, c, P = i.images(), i.corruption, i.config.patch_size
    n = c.num_noised

    def eager():
        eps = torch.randn(x[:n].shape, device=x.device)
        return (ops.gather_patches(x, c.ids_keep, *i.coefficients, eps, P),)

    visible = len(c.ids_keep) * i.config.channels * P**2 * x.element_size()
    return OpCase(
        "gather_patches",
        x.dtype,
        Side(lambda: (ops.gather_patches(x, c.ids_keep, *i.coefficients, c.noise, P),)),
        Side(eager),
        forward_bytes=2 * visible + tensor_bytes(c.ids_keep, *i.coefficients),
    )


def add_positions(i: Inputs) -> OpCase:
    L, ids_keep = i.config.num_patches, i.corruption.ids_keep
    x, pos_embed = i.randn(len(ids_keep), i.D), i.randn(L, i.D, dtype=torch.float32)
    return OpCase(
        "add_positions",
        i.dtype,
        Side(lambda: (ops.add_positions(x, ids_keep, pos_embed, i.samples),), (x, pos_embed)),
        Side(lambda: (x + F.embedding(ids_keep % L, pos_embed).to(x.dtype),), (x, pos_embed)),
        forward_bytes=2 * tensor_bytes(x) + tensor_bytes(pos_embed, ids_keep),
        backward_bytes=tensor_bytes(x, pos_embed),  # dy is dx
    )


def scatter_tokens(i: Inputs) -> OpCase:
    L, ids_keep, num_cls = i.config.num_patches, i.corruption.ids_keep, i.config.num_cls
    tokens, mask_token = i.randn(i.tokens, i.D), i.randn(i.D, dtype=torch.float32)
    pos_embed = i.randn(L, i.D, dtype=torch.float32)
    arguments = (tokens, i.stream, ids_keep, num_cls, mask_token, pos_embed)
    inputs = (tokens, mask_token, pos_embed)
    out = i.samples * (1 + L) * i.D * tokens.element_size()
    return OpCase(
        "scatter_tokens",
        i.dtype,
        Side(lambda: (ops.scatter_tokens(*arguments),), inputs),
        Side(lambda: (ops.scatter_tokens(*arguments),), inputs),
        forward_bytes=tensor_bytes(*inputs, ids_keep) + out,
        backward_bytes=tensor_bytes(*inputs, ids_keep) + out,
    )


def masked_diffusion_loss(i: Inputs) -> OpCase:
    x, c, P = i.images(), i.corruption, i.config.patch_size
    n, patches, patch = c.num_noised, i.samples * i.config.num_patches, i.config.channels * P**2
    prediction = i.randn(patches, 2 * patch)
    eps = i.randn(*x[:n].shape, dtype=x.dtype).detach()

    def arguments(noise: Tensor):
        return prediction, x, c.ids_keep, c.num_visible_noised, n, noise, P

    hidden = patches - len(c.ids_keep)
    # The loss reads the second half (noise) on visible noised patches, and the first half and x_start on hidden ones.
    scored = patch * (prediction.element_size() * (c.num_visible_noised + hidden) + x.element_size() * hidden)
    return OpCase(
        "masked_diffusion_loss",
        i.dtype,
        Side(lambda: ops.masked_diffusion_loss(*arguments(c.noise))[:1], (prediction,)),
        Side(lambda: ops.masked_diffusion_loss(*arguments(eps))[:1], (prediction,)),
        forward_bytes=scored + tensor_bytes(c.ids_keep),
        backward_bytes=scored + tensor_bytes(prediction),  # the gradient is zero elsewhere but still written
    )


def ddim_step(i: Inputs) -> OpCase:
    x_t, cond, uncond = (i.images() for _ in range(3))
    coefficients = torch.tensor([0.8, 0.6, 0.9, 0.4, 0.15], device=i.device)
    seed = torch.tensor(7, device=i.device)
    offsets = torch.arange(i.samples, device=i.device) * x_t[0].numel()
    step = partial(ops.ddim_step, x_t, cond, uncond, 1.5, coefficients, from_xstart=False, clip=True)

    def eager():
        noise = torch.randn(x_t.shape, device=x_t.device)
        return step(noise=noise)

    def ours():
        return step(seed=seed, offsets=offsets)

    return OpCase(
        "ddim_step",
        x_t.dtype,
        Side(ours),
        Side(eager),
        forward_bytes=5 * tensor_bytes(x_t) + tensor_bytes(coefficients, offsets),
    )


def sample_posterior(i: Inputs) -> OpCase:
    C, (height, width) = i.config.channels, i.config.image_size
    moments = i.randn(i.samples, 2, C, height, width).detach()
    draws = torch.arange(i.samples, device=i.device)
    out = torch.empty(i.samples, C, height, width, device=i.device)

    def eager():
        mean, std = moments.float().unbind(1)
        return (mean + std * torch.randn(mean.shape, device=mean.device),)

    return OpCase(
        "sample_posterior",
        i.dtype,
        Side(lambda: (ops.sample_posterior(moments, 7, draws),)),
        Side(eager),
        forward_bytes=tensor_bytes(moments, draws, out),
    )


class _BiasOf(torch.autograd.Function):
    """Identity on h that also sends h's gradient to the bias, as h includes it (cuBLAS adds it to the product)."""

    @staticmethod
    def forward(ctx, h: Tensor, bias: Tensor) -> Tensor:
        ctx.bias_dtype = bias.dtype
        return h.view_as(h)

    @staticmethod
    def backward(ctx, dh: Tensor) -> tuple[Tensor, Tensor]:
        return dh, dh.sum(0, dtype=ctx.bias_dtype)


def gelu(i: Inputs) -> OpCase:
    h, bias = i.randn(i.tokens, 4 * i.D), i.randn(4 * i.D, dtype=torch.float32)
    return OpCase(
        "gelu",
        i.dtype,
        Side(lambda: (ops.gelu(h, bias),), (h, bias)),
        Side(lambda: (F.gelu(_BiasOf.apply(h, bias), approximate="tanh"),), (h, bias)),
        forward_bytes=2 * tensor_bytes(h),
        backward_bytes=3 * tensor_bytes(h) + tensor_bytes(bias),  # dy, h; dh, dbias
    )


def column_sum(i: Inputs) -> OpCase:
    x = i.randn(i.tokens, 3 * i.D).detach()  # gradient of queries, keys and values; the keys' column sum is 0
    out = torch.empty(3 * i.D, device=i.device)
    return OpCase(
        "column_sum",
        i.dtype,
        Side(lambda: (ops.column_sum(x, torch.float32, (i.D, 2 * i.D)),)),
        Side(lambda: (x.sum(0, dtype=torch.float32),)),
        forward_bytes=2 * tensor_bytes(x) // 3 + tensor_bytes(out),
    )


OPS: dict[str, Callable[[Inputs], OpCase]] = {
    "modulated_layer_norm": modulated_layer_norm,
    "gated_residual_layer_norm": gated_residual_layer_norm,
    FP32_RESIDUAL: partial(gated_residual_layer_norm, residual=torch.float32),
    "gather_patches": gather_patches,
    "add_positions": add_positions,
    "scatter_tokens": scatter_tokens,
    "masked_diffusion_loss": masked_diffusion_loss,
    "ddim_step": ddim_step,
    "sample_posterior": sample_posterior,
    "gelu": gelu,
    "column_sum": column_sum,
}
