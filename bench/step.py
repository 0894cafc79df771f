"""`umd bench step`: time a training step of UMD and of its baselines.

Rows:

- UMD; on a GPU also as a CUDA graph, and under torch.compile,
- the same network without masking,
- UMD in two passes, one for noised and one for noise-free samples,
- diffusers' DiT and transformers' ViT-MAE of the same width and depth, run as in their users' scripts,
- "dit, our allocator": that DiT with the settings that `umd` makes for the allocator and waiting threads,
- only the matrix products of UMD's step: a lower bound of its time.

Each row runs in a process of its own, as in a training, and its steps alternate with UMD's. Read the ratios, not the
seconds.
"""

import itertools
import multiprocessing
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from umd import ops
from umd.bench.options import LoaderBench, StepBench
from umd.bench.training import Step, host_time, on_batch, our_optimizer, timed, train_step, with_modulation
from umd.config import ModelConfig, ObjectiveConfig
from umd.errors import UserError
from umd.files import write_json
from umd.machine.device import autocast, keep_freed_memory, pick_device, pick_dtype, side_stream, take_device
from umd.model import UMD
from umd.objective import Objective
from umd.schedule import NoiseSchedule
from umd.spans import span
from umd.train import step as training
from umd.train.optim import clipped_step
from umd.train.parallel import LossStep, static_compile

PredictEps = Callable[[Tensor, Tensor, Tensor], Tensor]  # x_t, timesteps and labels -> ε
WARMUP = 5  # rounds; before that, memory still grows, and a step's time includes touching new pages


@dataclass(frozen=True)
class Row:
    name: str
    batch: int
    dtype: str
    seconds: float  # median
    seconds_min: float
    seconds_max: float
    images_per_second: float
    flops: int
    peak_memory_bytes: int | None  # of the process, less what it held before the model was made
    time_ratio: float  # seconds over UMD's: median of the ratios within each round, so drift of the machine cancels
    host_seconds: float | None  # time of a step until all its launches are queued; None on a CPU


def images(bench: StepBench) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(bench.batch, 3, bench.image_size, bench.image_size, generator=generator) * 2 - 1
    return x.to(bench.device)


def network(bench: StepBench) -> UMD:
    with torch.device(bench.device):  # drawing the weights of a large network on the host takes seconds
        return with_modulation(UMD(bench.config()))


def umd_step(bench: StepBench, config: ObjectiveConfig, capture: bool = False, compiled: bool = False) -> Step:
    """Make a training step of UMD."""
    objective = Objective(bench.config(), config, NoiseSchedule("cosine"))
    step = train_step(network(bench), objective, bench.batch, bench.dtype, bench.device, capture, compiled)
    return on_batch(step, images(bench))


def two_pass_step(bench: StepBench) -> Step:
    """Make UMD's step with noised and noise-free samples in separate passes."""
    config, objective, schedule = bench.config(), ObjectiveConfig(), NoiseSchedule("cosine")
    model, x = network(bench), images(bench)
    optimizer = our_optimizer(model, narrow=False)  # not narrow, as two gradients are summed
    dtype = pick_dtype(bench.dtype, x.device)
    noised = Objective(config, objective, schedule).split(bench.batch)[0]
    passes = [
        (Objective(config, replace(objective, no_noise_prob=r0), schedule), batch)
        for r0, batch in ((0.0, x[:noised]), (1.0, x[noised:]))
    ]
    numbers = itertools.count()

    def step() -> None:
        number = next(numbers)
        for part, batch in passes:
            loss, _ = LossStep(model, part, dtype)(batch, part.corrupt(len(batch), 0, x.device, step=number))
            (loss * (len(batch) / len(x))).backward()
        clipped_step(optimizer, 1.0)
        optimizer.zero_grad(set_to_none=True)

    return step


def baseline_step(
    bench: StepBench | LoaderBench, model: torch.nn.Module, loss: Callable[..., Tensor], our_clip: bool = False
) -> Callable[..., None]:
    """Make a step as users' scripts do: autocast, torch's clipping and fused AdamW. It hands its arguments to `loss`.

    our_clip: clip as `umd pretrain` does, with one pass less over the gradients.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    device = torch.device(bench.device)
    dtype = pick_dtype(bench.dtype, device)

    def step(*batch: Tensor) -> None:
        with autocast(device, dtype):
            value = loss(*batch)
        value.backward()
        if our_clip:
            clipped_step(optimizer, 1.0)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def dit_loss(predict: PredictEps, x_start: Tensor, schedule: NoiseSchedule, labels: Tensor) -> Tensor:
    """DiT's simple loss: the mean squared error of the predicted ε."""
    with span("corruption"):
        timesteps = torch.randint(1, 1001, (len(x_start),), device=x_start.device)
        eps = torch.randn_like(x_start)
        x_t = schedule.q_sample(x_start, timesteps, eps)
    with span("forward"):
        return F.mse_loss(predict(x_t, timesteps, labels).float(), eps)


def dit_baseline(bench: StepBench, model: torch.nn.Module, predict: PredictEps) -> Step:
    """Make a training step of a DiT on the benchmark's images."""
    x_start, schedule = images(bench), NoiseSchedule("cosine")
    labels = torch.zeros(bench.batch, dtype=torch.int64, device=bench.device)
    return baseline_step(bench, model, lambda: dit_loss(predict, x_start, schedule, labels))


def diffusers_dit(config: ModelConfig, depth: int, **more: Any) -> Any:
    """diffusers' DiT of a network's widths, with `depth` blocks. Raises ImportError."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=config.num_heads, attention_head_dim=config.hidden_size // config.num_heads,
        in_channels=config.channels, num_layers=depth, sample_size=config.image_size[0], patch_size=config.patch_size,
        **more,
    )  # fmt: skip


def diffusers_eps(model: Any) -> PredictEps:
    """ε as diffusers' DiT predicts it. Its times start at 0, ours at 1."""
    return lambda x_t, timesteps, labels: model(x_t, timestep=timesteps - 1, class_labels=labels).sample


def dit_step(bench: StepBench, compiled: bool = False) -> Step:
    """Make a training step of diffusers' DiT."""
    config = bench.config()
    model = diffusers_dit(config, config.depth).to(bench.device)
    model.train()
    return dit_baseline(bench, model, diffusers_eps(static_compile(model) if compiled else model))


def vit_mae_step(bench: StepBench) -> Step:
    """Make a step of transformers' ViT-MAE: 75 % masked, decoder 8 x 512 as published (narrower for narrow ones)."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = bench.config()
    model = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            intermediate_size=int(config.hidden_size * config.mlp_ratio),
            image_size=bench.image_size,
            patch_size=config.patch_size,
            decoder_hidden_size=min(512, config.hidden_size * 2 // 3),
            decoder_intermediate_size=4 * min(512, config.hidden_size * 2 // 3),
        )
    ).to(bench.device)
    model.train()
    x = images(bench)
    return baseline_step(bench, model, lambda: model(x).loss)


class MatmulRecorder(TorchDispatchMode):
    """Counts the matrix products that run, by shape and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            a, b = args[1:3] if name in ("addmm", "baddbmm") else args[:2]
            self.shapes[tuple(a.shape), tuple(b.shape), a.dtype] += 1
        return func(*args, **(kwargs or {}))


def count_flops(make: Callable[[], Step], device: str = "cpu") -> int:
    """Count the FLOPs of one call of the step that `make` makes.

    The counter does not see code compiled for the CPU, fused CPU attention, or varlen attention on a GPU. So on the CPU
    the step is made and run without the compiled paths and with attention written out. (It must also be made without
    them, as with them gradients have dtypes that no other optimizer takes.) On a GPU, attention is torch's own.
    """
    seen = sdpa_kernel(SDPBackend.MATH) if device == "cpu" else ops.attention("sdpa")
    with ops.cpu_paths(False), seen:
        call = make()
        with FlopCounterMode(display=False) as counter:
            call()
    return counter.get_total_flops()


def matmul_step(bench: StepBench) -> Step:
    """Make a step of only the matrix products of UMD's step, on contiguous operands made beforehand."""
    with ops.cpu_paths(False):
        step = STEPS["umd"](bench)
        with MatmulRecorder() as recorder:
            step()
    operands = [
        (count, torch.randn(a, dtype=dtype, device=bench.device), torch.randn(b, dtype=dtype, device=bench.device))
        for (a, b, dtype), count in recorder.shapes.items()
    ]

    def products() -> None:
        for count, a, b in operands:
            for _ in range(count):
                torch.matmul(a, b)

    return products


STEPS: dict[str, Callable[[StepBench], Step]] = {
    "umd": lambda b: umd_step(b, ObjectiveConfig()),
    "umd, captured": lambda b: umd_step(b, ObjectiveConfig(), capture=True),
    "umd, compiled": lambda b: umd_step(b, ObjectiveConfig(), compiled=True),
    "umd unmasked": lambda b: umd_step(b, ObjectiveConfig(no_noise_prob=0.0, mask_ratio=0.0)),
    "umd two passes": two_pass_step,
    "diffusers dit": dit_step,
    "dit, our allocator": dit_step,
    "transformers vit-mae": vit_mae_step,
    "matmuls alone": matmul_step,
}
# Rows for a GPU only. Their FLOPs are copied from the first row, as no counter sees into a graph or compiled code.
ON_A_GPU = ("umd, captured", "umd, compiled")
# Rows run as in their users' scripts: without the settings that `umd` makes for the allocator and waiting threads.
AS_THEIR_USERS = ("diffusers dit", "transformers vit-mae")


def machine(device: str) -> str:
    """Name of the machine, for the title of a table."""
    return f"CPU, {torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name(device)


def resident_bytes(key: str) -> int | None:
    """Bytes of VmRSS, or of VmHWM (its peak), of this process from Linux's /proc. None on other systems."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), None)


def warm_up(bench: StepBench, name: str) -> tuple[Step, int | None]:
    """Make and warm up a row's step. Returns it, and its peak memory less what the process held before, in bytes."""
    take_device(bench.device, bench.dtype)
    if bench.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    else:
        torch.randn(64, 64).bfloat16() @ torch.randn(64, 64).bfloat16()  # libraries allocate their memory here
    before = resident_bytes("VmRSS")
    step = STEPS[name](bench)
    for _ in range(training.WARMUP + 1 if name == "umd, captured" else WARMUP):
        step()
    if bench.device != "cpu":
        return step, torch.cuda.max_memory_allocated()
    peak = resident_bytes("VmHWM")
    return step, None if peak is None or before is None else peak - before


def serve(bench: StepBench, name: str, pipe: Connection) -> None:
    """Process of one row: send FLOPs, peak memory and host time (or the missing package), then one time per request."""
    if name not in AS_THEIR_USERS:
        keep_freed_memory()
    with side_stream(torch.device(bench.device)):
        try:
            step, peak = warm_up(bench, name)
        except ImportError as error:
            pipe.send(error)
            return
        flops = None
        if name not in ON_A_GPU:
            flops = count_flops(lambda: step if bench.device != "cpu" else STEPS[name](bench), bench.device)
        pipe.send((flops, peak, host_time(step, bench.device)))
        while pipe.recv():
            pipe.send(timed(step, bench.device))


@contextmanager
def own_process(serve: Callable[..., None], *arguments) -> Iterator[Connection]:
    """Start a process that runs `serve(*arguments, pipe)` until it is sent False. Yields our end of the pipe."""
    context = multiprocessing.get_context("spawn")
    pipe, its_end = context.Pipe()
    process = context.Process(target=serve, args=(*arguments, its_end))
    process.start()
    its_end.close()
    try:
        yield pipe
    except EOFError:
        raise UserError(
            "a process of the benchmark ended early, for lack of memory or of what stands above; try a smaller batch"
        ) from None
    finally:
        with suppress(OSError):  # the process may be gone
            pipe.send(False)
        process.join(30)
        process.kill()


@contextmanager
def row_process(bench: StepBench, name: str) -> Iterator[Connection]:
    """Start the process of a row. Yields the pipe to it."""
    ours = ("GOMP_SPINCOUNT", "GLIBC_TUNABLES") if name in AS_THEIR_USERS else ()
    kept = {key: os.environ.pop(key) for key in ours if key in os.environ}
    try:
        with own_process(serve, bench, name) as pipe:
            yield pipe
    finally:
        os.environ |= kept


def measure(bench: StepBench, console: Console) -> list[Row]:
    """Measure all rows. UMD's process stays; each other row's process runs next to it, with steps in turn."""

    def ask(pipe: Connection) -> float:
        pipe.send(True)
        return pipe.recv()

    first, *others = (name for name in STEPS if bench.device != "cpu" or name not in ON_A_GPU)
    with row_process(bench, first) as ours:
        counts = {first: ours.recv()}
        seconds: dict[str, list[float]] = {first: []}
        ratios = {first: 1.0}
        for name in track(others, "rows", console=console, transient=True):
            with row_process(bench, name) as pipe:
                made = pipe.recv()
                if isinstance(made, ImportError):
                    console.print(f"{name} left out: {made}; pip install diffusers transformers")
                    continue
                pairs = [(ask(ours), ask(pipe)) for _ in range(bench.repeats)]
            counts[name], seconds[name] = made, [b for _, b in pairs]
            seconds[first] += [a for a, _ in pairs]
            ratios[name] = statistics.median(b / a for a, b in pairs)
    rows = []
    for name, (flops, peak, host) in counts.items():
        median, least, most = statistics.median(seconds[name]), min(seconds[name]), max(seconds[name])
        speed, flops = bench.batch / median, flops or counts[first][0]
        rows.append(Row(name, bench.batch, bench.dtype, median, least, most, speed, flops, peak, ratios[name], host))
    return rows


def run(bench: StepBench, console: Console) -> list[Row]:
    """Measure all rows, print the table and the ratios, write the JSON. Returns the rows."""
    device = pick_device(bench.device)
    bench = replace(bench, device="cpu" if device.type == "cpu" else str(device))
    bench.config()
    rows = measure(bench, console)
    print_rows(bench, rows, console)
    if bench.json is not None:
        write_json(bench.json, [asdict(row) for row in rows])
    return rows


def print_rows(bench: StepBench, rows: list[Row], console: Console) -> None:
    where, on_gpu = machine(bench.device), bench.device != "cpu"
    caption = "ratio: the row's time over UMD's, in the same round"
    table = Table(
        title=f"{bench.model} {bench.image_size}x{bench.image_size}, batch {bench.batch}, {bench.dtype}, {where}",
        caption=caption + "; host: until a step's launches are queued" * on_gpu,
        box=box.SIMPLE,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    unit, digits = (1e3, 1) if on_gpu else (1.0, 2)
    time = "ms (min-max)" if on_gpu else "seconds (min-max)"
    for column in ("step", time, *["host ms"] * on_gpu, "img/s", "TFLOP", "peak GiB", "ratio", "FLOPs"):
        table.add_column(column, justify="left" if column == "step" else "right", no_wrap=True)
    for row in rows:
        median, least, most = (f"{unit * s:.{digits}f}" for s in (row.seconds, row.seconds_min, row.seconds_max))
        table.add_row(
            row.name,
            f"{median} ({least}-{most})",
            *([] if row.host_seconds is None else [f"{1e3 * row.host_seconds:.1f}"]),
            f"{row.images_per_second:.2f}",
            f"{row.flops / 1e12:.2f}",
            "" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**30:.2f}",
            f"{row.time_ratio:.2f}x",
            f"{row.flops / rows[0].flops:.2f}x",
        )
    console.print(table)
