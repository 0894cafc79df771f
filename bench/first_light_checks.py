"""`first_light.py`, part `correct`: check every op at the shapes of a training step against fp64, and the whole step.

The truth is the op's reference definition in fp64, on inputs rounded to the tested dtype. There are two errors:

- the norm of the difference over the norm of the truth; its limit is about three times what an H200 showed;
- the same of the worst row, over the root mean square of the rows' norms. One wrong row has an error near 1, but would
  be lost in the norm of a whole tensor.
"""

import gc
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from umd import ops
from umd.bench.first_light import Part
from umd.bench.kernels import BACKENDS
from umd.bench.op_cases import SHAPES
from umd.bench.options import StepBench
from umd.bench.step import images, network
from umd.bench.training import on_batch, train_step, with_modulation
from umd.conditions import denoiser
from umd.config import OBJECTIVES, ModelConfig, model_config
from umd.layers import CastWeights, casts_weights
from umd.machine.device import autocast
from umd.model import UMD
from umd.objective import Objective
from umd.sampler import ddim_sample, model_times
from umd.schedule import NoiseSchedule
from umd.train.distributed import World
from umd.train.parallel import DDP, Alone
from umd.train.step import TrainStep

SETTINGS = ("umd", "mae", "maskdit", "dit")
Tensors = dict[str, Tensor]


def setting_of(name: str, setting: str) -> tuple[ModelConfig, Objective]:
    """The model config `name`, with the objective of one of `SETTINGS`."""
    config = model_config(name, adaLN=setting != "mae", **SHAPES[name])
    return config, Objective(config, OBJECTIVES[setting], NoiseSchedule("cosine"))


def relative(found: Tensor, truth: Tensor) -> float:
    difference = torch.linalg.vector_norm(found.double() - truth.double())
    error = float(difference / torch.linalg.vector_norm(truth.double()).clamp(min=1e-30))
    return error if math.isfinite(error) else math.inf


def worst_row(found: Tensor, truth: Tensor) -> float:
    """Largest norm of a row's difference over the root mean square of the rows' norms. A row is the last dimension."""
    difference, truth = (x.double().flatten(0, -2) if x.ndim > 1 else x[None] for x in (found - truth, truth))
    usual = torch.linalg.vector_norm(truth, dim=-1).square().mean().sqrt().clamp(min=1e-30)
    error = float(torch.linalg.vector_norm(difference, dim=-1).max() / usual)
    return error if math.isfinite(error) else math.inf


def correct(part: Part, device: torch.device) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    if not ops.use_triton(torch.empty(1, device=device)):
        part.note("correct", "no Triton kernels here: definitions are compared with themselves")
        part.check("all", "kernels", "Triton's kernels run here", part.smoke)
    batch = 4 if part.smoke else 256
    # Deterministic mode also fills uninitialised memory with NaN, so that unwritten outputs show.
    torch.use_deterministic_algorithms(True, warn_only=True)
    for model in ("UMD-Ti/4",) if part.smoke else ("UMD-B/4", "UMD-L/2"):
        for setting in ("umd",) if part.smoke else ("umd", "dit"):
            checks = part.attempt(f"{model} {setting}", OpChecks, part, model, setting, batch, device)
            for check in () if checks is None else (
                checks.norms, checks.tokens, checks.activations, checks.pictures,
            ):  # fmt: skip
                part.attempt(f"{model} {setting} {check.__name__}", check)
            gc.collect()
            torch.cuda.empty_cache()
        part.attempt(f"{model} attention", check_attention, part, model, batch, device)
    torch.use_deterministic_algorithms(False)
    for setting in SETTINGS:
        part.attempt(f"step {setting}", check_step, part, setting, device)
    model, size, batch = ("UMD-Ti/4", 16, 4) if part.smoke else ("UMD-B/4", 64, 16)
    bench = StepBench(model=model, image_size=size, batch=batch, device=str(device))
    if device.type == "cuda":
        part.attempt("a step that never waits", never_waits, part, bench)
    for ddp in (False, True):
        part.attempt(f"captured and eager{', DDP' * ddp}", captured_as_eager, part, bench, ddp)
    part.attempt("sampling", sampling, part, replace(bench, batch=4 * batch), 4 if part.smoke else 50)


def gradients_of(
    op: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Tensors, douts: list[Tensor] | None = None
) -> tuple[Tensors, list[Tensor]]:
    """Run op(**inputs) forward and backward. Returns outputs and gradients by name, and the upstream gradients.

    douts: upstream gradients. None: random ones.
    """
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    made = op(**leaves)
    outputs = made if isinstance(made, tuple) else (made,)
    if douts is None:
        generator = torch.Generator(outputs[0].device).manual_seed(3)
        douts = [torch.randn(y.shape, generator=generator, device=y.device).bfloat16() for y in outputs]
    upstream = [dout.to(y.dtype) for dout, y in zip(douts, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return found | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}, douts


def check_close(part: Part, model: str, op: str, what: str, found: Tensor, exact: Tensor, limit: float) -> None:
    """Check a tensor against the truth: its norm to within `limit`, its worst row to within ten times that."""
    error, row = relative(found, exact), worst_row(found, exact)
    part.check(model, op, what, error <= limit, error)
    part.check(model, op, f"{what}, worst row", row <= 10 * limit, row)


LIMITS = (torch.bfloat16, 6e-3), (torch.float32, 2e-6)  # of the relative error


class OpChecks:
    """Checks of the ops at the shapes of one model under one setting."""

    def __init__(self, part: Part, model: str, setting: str, batch: int, device: torch.device):
        self.part, self.name, self.device, self.batch = part, f"{model} {setting}", device, batch
        self.config, self.objective = setting_of(model, setting)
        self.c = self.objective.corrupt(batch, 0, device)
        self.generator = torch.Generator(device).manual_seed(1)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype)

    def compare(self, op: str, call, inputs: Tensors, dtype: torch.dtype, limit: float) -> None:
        """Compare outputs and gradients with fp64, and check that two more runs give the same bits."""
        name = str(dtype).removeprefix("torch.")
        found, douts = gradients_of(call, inputs)
        for _ in range(2):
            again, _ = gradients_of(call, inputs, douts)
            same = all(torch.equal(found[key], again[key]) for key in found)
            self.part.check(self.name, op, f"{name} same bits", same)
        exact, _ = gradients_of(call, {key: x.double() for key, x in inputs.items()}, douts)
        for key in found:
            check_close(self.part, self.name, op, f"{name} {key}", found[key], exact[key], limit)

    def norms(self) -> None:
        D, layout = self.config.hidden_size, self.c.layout
        for where, packing in (("encoder", layout.encoder_blocks), ("decoder", layout.decoder_blocks)):
            for dtype, limit in LIMITS:
                # Strided views of one projection's output, as in the model.
                shift, scale, gate = self.randn(packing.num_rows, 6 * D).split(D, 1)[:3]
                tables = dict(shift=shift, scale=scale, weight=1 + self.randn(D), bias=self.randn(D))
                x, h = (self.randn(packing.num_tokens, D, dtype=dtype) for _ in range(2))

                def modulated(x, packing=packing, **tables):
                    return ops.modulated_layer_norm(x, packing, **tables)

                def gated(x, h, packing=packing, **tables):
                    return ops.gated_residual_layer_norm(x, h, packing, **tables)

                self.compare(f"modulated_layer_norm {where}", modulated, dict(x=x, **tables), dtype, limit)
                inputs = dict(x=x, h=h, gate=gate, h_bias=self.randn(D), **tables)
                self.compare(f"gated_residual_layer_norm {where}", gated, inputs, dtype, limit)

    def tokens(self) -> None:
        config, c, D = self.config, self.c, self.config.hidden_size

        def scatter(tokens, mask_token, pos_embed):
            return ops.scatter_tokens(tokens, c.layout.encoder, c.ids_keep, config.num_cls, mask_token, pos_embed)

        def positions(x, pos_embed):
            return ops.add_positions(x, c.ids_keep, pos_embed, self.batch)

        for dtype, limit in LIMITS:
            tokens, pos_embed = (
                self.randn(c.layout.encoder.num_tokens, D, dtype=dtype),
                self.randn(config.num_patches, D),
            )
            inputs = dict(tokens=tokens, mask_token=self.randn(D), pos_embed=pos_embed)
            self.compare("scatter_tokens", scatter, inputs, dtype, limit)
            inputs = dict(x=self.randn(len(c.ids_keep), D, dtype=dtype), pos_embed=pos_embed)
            self.compare("add_positions", positions, inputs, dtype, limit)

    def activations(self) -> None:
        """Check GELU and the sums that are gradients of biases."""
        N, D = self.c.layout.encoder.num_tokens, self.config.hidden_size
        for dtype, limit in LIMITS:
            self.compare(
                "gelu", ops.gelu, dict(h=self.randn(N, 4 * D, dtype=dtype), bias=self.randn(4 * D)), dtype, limit
            )
            x = self.randn(N, 3 * D, dtype=dtype)
            found, again, exact = (
                ops.column_sum(y, wide, (D, 2 * D))
                for y, wide in ((x, torch.float32), (x, torch.float32), (x.double(), torch.float64))
            )
            what = str(dtype).removeprefix("torch.")
            check_close(self.part, self.name, "column_sum", what, found, exact, 2e-6)
            self.part.check(self.name, "column_sum", f"{what} same bits", torch.equal(found, again))

    def pictures(self) -> None:
        """Check patches, loss, and a step of sampling."""
        config, c, P = self.config, self.c, self.config.patch_size
        x = self.randn(self.batch, config.channels, *config.image_size)
        coefficients = self.objective.schedule.coefficients(c.timesteps[: c.num_noised], dtype=torch.float32)

        def patches(dtype: torch.dtype) -> Tensor:
            signal, noise = (k.to(dtype) for k in coefficients)
            return ops.gather_patches(x.to(dtype), c.ids_keep, signal, noise, c.noise, P)

        def loss(prediction):  # only the total, as its parts have no gradient
            wide = x.to(torch.promote_types(prediction.dtype, torch.float32))
            arguments = c.ids_keep, c.num_visible_noised, c.num_noised, c.noise, P
            return ops.masked_diffusion_loss(prediction, wide, *arguments)[0]

        visible, again = patches(torch.float32), patches(torch.float32)
        check_close(self.part, self.name, "gather_patches", "float32", visible, patches(torch.float64), 2e-6)
        self.part.check(self.name, "gather_patches", "same bits", torch.equal(visible, again))
        for dtype, limit in LIMITS:
            width = 2 * config.channels * P * P
            prediction = self.randn(self.batch * config.num_patches, width, dtype=dtype)
            self.compare("masked_diffusion_loss", loss, dict(prediction=prediction), dtype, limit)

        numbers = torch.tensor([0.8, 0.6, 0.9, 0.4, 0.15], device=self.device)
        seed = torch.tensor(7, device=self.device)
        offsets = torch.arange(self.batch, device=self.device) * x[0].numel()

        def ddim(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            inputs = (x.to(dtype), x.to(dtype) * 0.5, x.to(dtype) * 0.3, 1.5, numbers.to(dtype))
            return ops.ddim_step(*inputs, from_xstart=False, clip=True, seed=seed, offsets=offsets)

        for name, found, exact in zip(("x_next", "x_start"), ddim(torch.float32), ddim(torch.float64), strict=True):
            check_close(self.part, self.name, "ddim_step", name, found, exact, 2e-6)

        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            moments, draws = torch.stack([x, x.square()], 1).to(dtype), offsets // x[0].numel()
            found = ops.sample_posterior(moments, 7, draws)
            exact = ops.sample_posterior(moments.double(), 7, draws)
            what = str(dtype).removeprefix("torch.")
            check_close(self.part, self.name, "sample_posterior", what, found, exact, 2e-6)


def check_attention(part: Part, model: str, batch: int, device: torch.device) -> None:
    """Check every attention backend that runs here, in bf16 against fp64."""
    config, objective = setting_of(model, "umd")
    H, d = config.num_heads, config.hidden_size // config.num_heads
    layout, generator = objective.corrupt(batch, 0, device).layout, torch.Generator(device).manual_seed(1)
    for where in ("encoder_blocks", "decoder_blocks"):
        packing = getattr(layout, where)
        qkv = torch.randn(packing.num_tokens, 3, H, d, generator=generator, device=device).bfloat16()
        part.note(f"{model} {where}", "auto is {}: it {}".format(*ops.attention_backend(device, qkv.dtype, d, packing)))
        exact, douts = gradients_of(lambda qkv, p=packing: ops.varlen_attention(qkv, p, "sdpa"), dict(qkv=qkv.double()))
        for backend in BACKENDS:

            def call(qkv, packing=packing, backend=backend):
                return ops.varlen_attention(qkv, packing, backend)

            try:
                found, _ = gradients_of(call, dict(qkv=qkv), douts)
                again, _ = gradients_of(call, dict(qkv=qkv), douts)
            except ValueError as refusal:  # says why the backend cannot run
                part.row("refused", backend=backend, why=str(refusal))
                part.check(model, f"attention {backend} {where}", "runs here", backend != "triton" or part.smoke)
                continue
            op = f"attention {backend} {where}"
            limit = 1.5e-2 if backend == "matmul" else 6e-3  # matmul rounds the weights too
            check_close(part, model, op, "output", found["output 0"], exact["output 0"], limit)
            for name, gradient, truth in zip("qkv", found["dqkv"].unbind(1), exact["dqkv"].unbind(1), strict=True):
                check_close(part, model, op, f"d{name}", gradient, truth, limit)
            if backend == "triton":
                part.check(model, op, "same bits", same_bits(found, again))


def check_step(part: Part, setting: str, device: torch.device) -> None:
    """Check loss and gradient of a step: kernels against reference ops in fp32, bf16 against fp32, and equal bits.

    The bf16 step has the linear layers' weights cast beforehand, as in training.
    """
    name, batch = ("UMD-Ti/4", 4) if part.smoke else ("UMD-B/4", 16)
    config, objective = setting_of(name, setting)
    torch.manual_seed(0)
    model = with_modulation(UMD(config)).to(device)
    x = torch.rand(batch, config.channels, *config.image_size, device=device) * 2 - 1

    def step(kernels, bf16: bool) -> Tensors:
        """Loss and gradients, by name."""
        model.zero_grad(set_to_none=True)
        dtype = torch.bfloat16 if bf16 else torch.float32
        cast = CastWeights(model, dtype) if casts_weights(model, dtype) else None
        if cast is not None:
            cast.refresh()
        with nullcontext() if cast is None else cast.used():
            with ops.kernels(kernels), autocast(device, dtype):
                loss, _ = objective(model, x, objective.corrupt(batch, 5, device))
            loss.backward()
        gradients = {key: p.grad.double() for key, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach(), **gradients}

    def whole(found: Tensors) -> Tensor:
        return torch.cat([x.flatten() for key, x in found.items() if key != "loss"])

    truth = step("reference", False)
    weighty = [
        key for key in truth if truth[key].norm() > 1e-6 * whole(truth).norm()
    ]  # others are zero but for rounding
    for bf16, limits in ((False, (1e-6, 2e-6, 1e-3)), (True, (6e-3, 3e-2, 0.2))):
        found, kind = step("auto", bf16), "bf16" if bf16 else "fp32"
        errors = {key: relative(found[key], truth[key]) for key in weighty}
        worst = max((key for key in weighty if key != "loss"), key=lambda key: errors[key])
        total = relative(whole(found), whole(truth))
        checked = ("loss", errors["loss"]), ("gradient", total), (f"gradient of {worst}, the worst", errors[worst])
        for (what, error), limit in zip(checked, limits, strict=True):
            part.check(name, f"step {setting}", f"{kind} {what}", error <= limit, error)
    part.note(f"step {setting}, bf16, as torch's flags are: same bits", str(same_bits(found, step("auto", True))))
    torch.use_deterministic_algorithms(True)
    try:
        same = same_bits(step("auto", True), step("auto", True))
    finally:
        torch.use_deterministic_algorithms(False)
    part.check(name, f"step {setting}", "deterministic: same bits", same)


def same_bits(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def umd_training(bench: StepBench, capture: bool = False) -> TrainStep:
    """Make a step that starts from the same weights each time."""
    torch.manual_seed(0)
    objective = Objective(bench.config(), OBJECTIVES["umd"], NoiseSchedule("cosine"))
    return train_step(network(bench), objective, bench.batch, bench.dtype, bench.device, capture)


def never_waits(part: Part, bench: StepBench) -> None:
    """Check that a step never waits for the GPU, from the batch on the device to metrics on the device."""
    call = on_batch(umd_training(bench), images(bench))
    for _ in range(3):
        call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    part.check(bench.model, "step", "never waits", True)


def captured_as_eager(part: Part, bench: StepBench, ddp: bool) -> None:
    """Check that 20 captured steps give the same bits as eager ones: metrics and weights. ddp: in a group of one.

    Batches and learning rates differ from step to step, as a graph might keep those that it was recorded with.
    """
    found = []
    backend = "nccl" if bench.device != "cpu" else "gloo"
    torch.use_deterministic_algorithms(True)
    try:
        if ddp:
            dist.init_process_group(backend, init_method=f"file://{part.scratch}/meeting", rank=0, world_size=1)
        for capture in (False, bench.device != "cpu"):
            made = umd_training(replace(bench, dtype="fp32" if bench.device == "cpu" else bench.dtype), capture)
            alone = made.parallel
            assert isinstance(alone, Alone)
            if ddp:
                world = World(0, 1, made.device)
                made.parallel = DDP(alone.model, alone.loss, alone.optimizer, 1, alone.clip, world, "fp32")
            batches, rates = (images(bench), images(bench).flip(0) / 2), (1e-4, 3e-4, 2e-4)
            indices = torch.arange(bench.batch, device=made.device)
            metrics = torch.stack([made(batches[i % 2], None, indices, rates[i % 3]).clone() for i in range(20)])
            if capture:
                recorded = made.captured is not None and made.captured.graph is not None
                part.check(bench.model, "step", f"a graph was recorded{', DDP' * ddp}", recorded)
            found.append((metrics, torch.cat([p.detach().flatten() for p in alone.model.parameters()])))
    finally:
        torch.use_deterministic_algorithms(False)
        if dist.is_initialized():
            dist.destroy_process_group()
    for name, eager, captured in zip(("metrics", "weights"), *found, strict=True):
        what = f"captured is eager: {name}{', DDP' * ddp}"
        part.check(bench.model, "step", what, torch.equal(eager, captured))


def sampling(part: Part, bench: StepBench, num_steps: int) -> None:
    """Check that DDIM sampling gives the same images with steps launched and steps replayed."""
    on_gpu = bench.device != "cpu"
    denoise = denoiser(network(bench).eval(), torch.bfloat16, model_times(num_steps))
    shape = (bench.batch, 3, bench.image_size, bench.image_size)
    found, seconds = [], []
    for capture in ("off", "on" if on_gpu else "off"):
        draw = partial(ddim_sample, denoise, shape, NoiseSchedule("cosine"), num_steps=num_steps, device=bench.device)
        draw(capture=capture)
        synchronize()
        began = time.perf_counter()
        found.append(draw(capture=capture))
        synchronize()
        seconds.append(time.perf_counter() - began)
    part.check(bench.model, "sampling", "captured is eager", torch.equal(*found))
    eager, captured = seconds
    part.note(f"{bench.batch} images in {num_steps} steps", f"{eager:.2f} s, captured {captured:.2f} s")
