"""All parts of `first_light.py` except `correct`. Its docstring describes them."""

import gc
import importlib.util
import itertools
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch._functorch.config
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from umd import ops
from umd.bench import kernels
from umd.bench.device_time import copies_beyond, time_calls, watched_clocks
from umd.bench.first_light import Part, Row, read_rows
from umd.bench.first_light_checks import setting_of, synchronize
from umd.bench.op_cases import OPS, Inputs, Side
from umd.bench.options import StepBench
from umd.bench.plain_dit import plain_dit_step
from umd.bench.step import count_flops, diffusers_dit, dit_step, umd_step
from umd.bench.training import Step, host_time, timed, with_modulation
from umd.conditions import denoiser
from umd.config import OBJECTIVES, Capture, ModelConfig
from umd.errors import UserError
from umd.machine.device import peak_flops, take_device
from umd.model import UMD
from umd.objective import Objective
from umd.sampler import ddim_sample, model_times
from umd.schedule import NoiseSchedule
from umd.spans import spans_on
from umd.train.step import WARMUP
from umd.train.step_counts import tensor_bytes

# env


def env(part: Part, device: torch.device) -> None:
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda}
    for name in ("triton", "numpy", "tyro", "simplejpeg", "diffusers", "transformers", "flash_attn"):
        try:
            versions[name] = getattr(__import__(name), "__version__", "there")
        except Exception as error:  # a package built for another torch may raise anything
            versions[name] = f"no ({type(error).__name__})"
    part.note("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        part.row("device", name=p.name, sms=p.multi_processor_count, gib=p.total_memory / 2**30, l2=p.L2_cache_size)
        query = "nvidia-smi --query-gpu=driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu --format=csv"
        part.attempt("nvidia-smi", lambda: part.note("nvidia-smi", said(query.split())))
    part.attempt("ceilings", ceilings, part, device)
    for line in said([sys.executable, "-m", "umd.cli", "doctor"]).splitlines():
        print(line)
        if re.match(r"\s*(attention|kernels|precision|torch\.compile)\b", line):
            part.note("doctor", line.strip())


def said(command: list[str]) -> str:
    """Everything that a command prints."""
    environment = os.environ | {"COLUMNS": "160"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    return (done.stdout + done.stderr).strip()


def ceilings(part: Part, device: torch.device) -> None:
    """Measure the ceilings: GB/s (read plus written) of a copy, TFLOP/s of products of random matrices."""
    n = 256 if part.smoke else 8192
    speed = kernels.copy_speed(device.type, 2**20 if part.smoke else 2**29)
    found = {} if speed is None else {"copy_gb_per_s": speed / 1e9}
    products = (("bf16", torch.bfloat16, False, n), ("tf32", torch.float32, True, n // 2))
    for name, dtype, tf32, m in (*products, ("fp32", torch.float32, False, n // 2)):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(m, m, device=device).to(dtype) for _ in range(2))
        found[f"{name}_tflops"] = 2 * m**3 / milliseconds(partial(torch.mm, a, b), device) / 1e9
    torch.backends.cuda.matmul.allow_tf32 = False
    part.row("ceiling", **found)
    print("|   " + ", ".join(f"{name} {value:.3g}" for name, value in found.items()))


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Time of a call on the device, in ms. On the CPU: of one call, after a warm-up call."""
    if device.type == "cuda":
        return time_calls([call]).ms
    call()
    return 1e3 * timed(call, "cpu")


# step


def step(part: Part, device: torch.device) -> None:
    peak = peak_flops(device, torch.bfloat16)
    take_device(str(device), "bf16")
    big, small = ((("UMD-Ti/4", 16),) * 2) if part.smoke else (("UMD-B/4", 64), ("UMD-L/2", 32))
    full, less = (4, 2) if part.smoke else (256, 64)

    def row(what: str, kind: Kind, size: tuple[str, int] = big, batch: int = full, profiled: bool = False) -> None:
        bench = StepBench(model=size[0], image_size=size[1], batch=batch, device=str(device))
        part.attempt(f"{what}, {batch}", time_step, part, f"{size[0]} {what}", kind, bench, peak, profiled)

    if device.type == "cuda":  # captured, to measure the GPU without the host; first what other rows are compared with
        captured = umd("umd", capture=True)
        row("umd, captured", captured, profiled=True)
        row("umd, captured", captured, small, profiled=True)
        for batch in (full, 32):
            row("dit, captured", umd("dit", capture=True), batch=batch)
        for batch in (32, 16, 64, 128):
            row("umd, captured", captured, batch=batch)
        row("umd", umd("umd"), batch=16)
        for setting in ("mae", "maskdit"):
            row(f"{setting}, captured", umd(setting, capture=True))
        with ops.attention("sdpa"):
            row("umd, sdpa, captured", captured)
    row("umd", umd("umd"))
    row("plain DiT", plain_dit(), profiled=True)
    row("diffusers DiT", dit_of_diffusers())
    row("plain DiT", plain_dit(), small, less)
    with ops.kernels("reference"):
        row("umd, definitions", umd("umd"))


Kind = tuple[Callable[[StepBench], Step], Callable[[StepBench], int]]  # makes the step; counts its FLOPs


def umd(setting: str, capture: bool = False, compiled: bool = False) -> Kind:
    """UMD's training step under the objective of one of the settings."""

    def flops(bench: StepBench) -> int:
        return Objective(bench.config(), OBJECTIVES[setting], NoiseSchedule("cosine")).step_flops(bench.batch)

    return lambda bench: umd_step(bench, OBJECTIVES[setting], capture, compiled), flops


def plain_dit(compiled: bool = False) -> Kind:
    """A plain DiT's step. FLOPs are counted without the compiler, as no counter sees into compiled code."""
    return (
        lambda bench: plain_dit_step(bench, compiled),
        lambda bench: count_flops(lambda: plain_dit_step(bench), bench.device),
    )


def dit_of_diffusers(compiled: bool = False) -> Kind:
    return lambda b: dit_step(b, compiled), lambda b: count_flops(lambda: dit_step(b), b.device)


def time_step(part: Part, what: str, kind: Kind, bench: StepBench, peak: float, profiled: bool = False) -> None:
    """Time a step and write a row. If memory is short, halve the batch until it fits."""
    make, flops_of = kind
    on_gpu = bench.device != "cpu"
    call: Step | None
    while True:
        try:
            flops = flops_of(bench)  # some are counted by making a step
            gc.collect()
            torch.cuda.empty_cache()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            call = make(bench)
            for _ in range(1 if part.smoke else WARMUP + 1):  # if the step is captured, the last one records it
                call()
            synchronize()
            break
        except (torch.cuda.OutOfMemoryError, UserError) as error:
            if "out of memory" not in str(error):  # a UserError: while a graph was recorded
                raise
            call = None
            gc.collect()
            part.note(what, f"out of memory at batch {bench.batch}")
            bench = replace(bench, batch=bench.batch // 2)
            if bench.batch < 8:
                raise
    warm_up = time.perf_counter() - began
    with watched_clocks(on_gpu) as clocks:
        windows = [timed(call, bench.device, in_a_row=10) for _ in range(1 if part.smoke else 3)]
    seconds = statistics.median(windows)
    host = host_time(call, bench.device)
    began, repeats = time.perf_counter(), 1 if part.smoke else 5
    for _ in range(repeats):
        call()
        synchronize()
    synced = (time.perf_counter() - began) / repeats
    gib = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    speed, rate = bench.batch / seconds, flops / seconds
    part.row(
        "step", what=what, batch=bench.batch, images_per_second=speed, ms=1e3 * seconds,
        ms_of_windows=[round(1e3 * window, 2) for window in windows], **clocks, ms_synced=1e3 * synced,
        ms_host=None if host is None else 1e3 * host, tflops=rate / 1e12, mfu=rate / peak, gib=gib, warm_up_s=warm_up,
    )  # fmt: skip
    print(f"|   {what}, {bench.batch}: {speed:.0f} img/s, {1e3 * seconds:.1f} ms, {rate / peak:.1%}, {clocks}")
    if profiled:
        part.attempt(f"profile {what}", profile_step, part, f"{what}, {bench.batch}", call, on_gpu)


def profile_step(part: Part, what: str, call: Step, on_gpu: bool) -> None:
    """Write kernels by time to profile.txt, and their number and time per step to a row."""
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    with spans_on(), profile(activities=activities) as recorded:
        for _ in range(2):
            call()
        synchronize()
    recorded.export_chrome_trace(str(part.scratch / f"trace-{re.sub('[^a-z0-9]+', '-', what.lower())}.json.gz"))
    averages = recorded.key_averages()
    with open(part.scratch / "profile.txt", "a") as file:
        for key in ("self_cuda_time_total",) * on_gpu + ("self_cpu_time_total",):
            text = averages.table(sort_by=key, row_limit=25, max_name_column_width=70)
            file.write(f"\n##### {what}: two steps, by {key}\n{text}\n")
    place = DeviceType.CUDA if on_gpu else DeviceType.CPU
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    found = [
        (getattr(e, time_of) / 2e3, e.count / 2, e.key)
        for e in averages
        if e.device_type == place and not e.is_user_annotation
    ]
    total, launches = sum(ms for ms, _, _ in found), sum(calls for _, calls, _ in found)
    top = sorted(found, reverse=True)
    part.row("profile", what=what, device_ms=total, launches=launches, top=top)
    print(f"|   profile of {what}: {total:.1f} ms a step in {launches:.0f} {'kernels' if on_gpu else 'ops'}")
    for ms, calls, name in top[:14]:
        print(f"|     {ms:8.2f} ms {ms / total:6.1%} {calls:6.0f}x {name[:90]}")


# sample


def sample(part: Part, device: torch.device) -> None:
    """Time guided sampling of latents: UMD, and diffusers' pipeline with a DiT of as many blocks, both in bf16."""
    name, batch, num_steps = ("UMD-Ti/4", 2, 3) if part.smoke else ("UMD-L/2", 64, 250)
    config = replace(setting_of(name, "umd")[0], num_classes=1000)
    take_device(str(device), "bf16")
    with torch.device(device):
        labels = torch.arange(batch) % 1000
        model = with_modulation(UMD(config)).eval()

    def ours(steps: int = num_steps, capture: Capture = "auto") -> Tensor:
        asked = torch.cat([labels, labels.new_tensor([1000])])
        return ddim_sample(
            denoiser(model, torch.bfloat16, model_times(steps), asked), (batch, config.channels, *config.image_size),
            NoiseSchedule("cosine"), labels=labels, num_steps=steps, null_label=1000, cfg_scale=4.0, clip=False,
            device=device, capture=capture,
        )  # fmt: skip

    sides: dict[str, Callable] = {"umd": ours}
    part.attempt("diffusers' pipeline", lambda: sides.update({"diffusers": dit_pipeline(config, labels, num_steps)}))
    sides["umd, launched one by one"] = partial(ours, capture="off")

    def time_side(what: str, draw: Callable) -> None:
        draw(steps=3)
        synchronize()
        began = time.perf_counter()
        draw()
        synchronize()
        seconds = time.perf_counter() - began
        part.row("sampling", what=f"{name} {what}", batch=batch, steps=num_steps, seconds=seconds)
        part.note(f"{name} {what}", f"{batch} images in {num_steps} guided steps: {seconds:.2f} s")

    for what, draw in sides.items():
        part.attempt(f"sampling, {what}", time_side, what, draw)


def dit_pipeline(config: ModelConfig, labels: Tensor, num_steps: int) -> Callable[..., object]:
    """diffusers' DiTPipeline with a small VAE, run as its users do: bf16, DDIM, one step per call."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    with labels.device:
        transformer = diffusers_dit(config, config.depth + config.decoder_depth, out_channels=2 * config.channels)
    vae = AutoencoderKL(latent_channels=config.channels, block_out_channels=(32,), norm_num_groups=8)
    pipeline = DiTPipeline(transformer, vae, DDIMScheduler()).to(labels.device, torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    classes = labels.tolist()
    return lambda steps=num_steps: pipeline(classes, guidance_scale=4.0, num_inference_steps=steps, output_type="pt")


# compile


def compile_(part: Part, device: torch.device) -> None:
    if part.smoke:
        part.note("compile", "left out of a smoke run, where it would take minutes")
        return
    peak = peak_flops(device, torch.bfloat16)
    take_device(str(device), "bf16")
    ours = umd("umd", compiled=True)
    rows = [("plain DiT", plain_dit(compiled=True), 256), ("diffusers DiT", dit_of_diffusers(compiled=True), 256)]
    rows += [("umd", ours, 256), ("umd", ours, 16)]
    for what, kind, batch in rows:
        bench = StepBench(batch=batch, device=str(device))
        part.attempt(
            f"{what}, compiled, {batch}", time_step, part, f"{bench.model} {what}, compiled", kind, bench, peak
        )


# timing


def timing(part: Part, device: torch.device) -> None:
    """Time our kernels and eager for every op, then the attention backends, then the ops under torch.compile."""
    torch._functorch.config.donated_buffer = False  # a compiled backward pass runs many times on one forward pass
    copy = kernels.copy_speed(device.type)
    models, batches = (("UMD-Ti/4",), (2,)) if part.smoke else (("UMD-B/4", "UMD-L/2"), (256, 64, 16))
    for compiled in (False,) if part.smoke else (False, True):
        for model, batch, op in itertools.product(models, batches[:1] if compiled else batches, OPS):
            arguments = part, op, model, batch, device.type, copy, compiled
            part.attempt(f"{op} {model} {batch}{', compiled' * compiled}", time_op, *arguments)
        for model, batch in () if compiled else itertools.product(models, batches):
            part.attempt(f"attention {model} {batch}", time_attention, part, model, batch, device)


def time_op(part: Part, op: str, model: str, batch: int, device: str, copy: float | None, compiled: bool) -> None:
    cases = kernels.beyond_the_cache(op, partial(Inputs, model, batch, torch.bfloat16, device))
    with_triton = ops.use_triton(torch.empty(1, device=device))
    every = [kernels.implementations(case, {}, device, with_triton) for case in cases]
    sides = [(side for side in found if (side[0] == "torch.compile") == compiled) for found in every]
    shape = dict(model=model, width=0, stream="mixed", tokens=0, device=device)
    for row in kernels.time_op(cases, sides, copy, **shape):
        us = None if row.ms is None else 1e3 * row.ms
        numbers = dict(us=us, gb_per_s=row.gb_per_s, of_copy=row.of_copy, replayed=row.replayed)
        names = dict(op=op, direction=row.direction, implementation=row.implementation)
        part.row("op", **names, model=model, batch=batch, **numbers)


def attend(qkv: Tensor, packing: ops.Packing, backend: ops.Attention) -> tuple[Tensor]:
    return (ops.varlen_attention(qkv, packing, backend),)


def time_attention(part: Part, model: str, batch: int, device: torch.device) -> None:
    """Time the attention backends on the encoder's stream (two sample lengths) and the decoder's (one length)."""
    config, objective = setting_of(model, "umd")
    H, d = config.num_heads, config.hidden_size // config.num_heads
    layout = objective.corrupt(batch, 0, device).layout
    for where, packing in (("encoder", layout.encoder_blocks), ("decoder", layout.decoder_blocks)):
        qkvs = [torch.randn(packing.num_tokens, 3, H, d, device=device).bfloat16().requires_grad_()]
        for _ in range(copies_beyond(kernels.cache_bytes(str(device)), tensor_bytes(*qkvs)) - 1):
            qkvs.append(qkvs[0].detach().clone().requires_grad_())
        lengths = " and ".join(f"{samples} x {length}" for samples, length in packing.runs)
        for backend in kernels.BACKENDS:
            sides = [Side(partial(attend, qkv, packing, backend), (qkv,)) for qkv in qkvs]
            try:
                found = kernels.time_side(sides, backward=True)
            except ValueError as refusal:  # says why the backend cannot run
                part.row("refused", backend=backend, why=str(refusal))
                continue
            us = {name: None if timing is None else round(1e3 * timing.ms) for name, timing in found.items()}
            part.row("attention", model=model, batch=batch, where=where, lengths=lengths, backend=backend, us=us)
            print(f"|   {model} {where} {lengths} tokens, {backend}: {us} µs")


# tests


def tests(part: Part, device: torch.device) -> None:
    """Run the project's own tests for a GPU, and show failures on the screen."""
    chosen = ["tests/umd/test_device.py", "-m", "not slow and not gpu"] if part.smoke else ["-m", "gpu and not slow"]
    command = [sys.executable, "-m", "pytest", *chosen, "-q", "-p", "no:cacheprovider", "--timeout", "100", "-rfE"]
    command += ["--tb", "short", "--maxfail", "40", "--deselect", "tests/bench/test_kernels.py::test_times_on_a_gpu"]
    if importlib.util.find_spec("xdist") is not None and not part.smoke:
        command += ["-n", str(max(1, min(12, (os.cpu_count() or 2) - 2))), "--dist", "worksteal"]
    file = part.scratch / "tests.log"
    with open(file, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            process.wait(max(5, part.left() - 3))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest then reports the failures so far
            try:
                process.wait(6)
            except subprocess.TimeoutExpired:
                process.kill()
    lines = file.read_text(errors="replace").splitlines()
    last = next((line for line in reversed(lines) if re.search(r"\d+ (passed|failed|error)", line)), "no result")
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    part.row("tests", ok=process.returncode == 0, status=process.returncode, last=last, failures=failures)
    for line in (last, *failures[:20], *list(dict.fromkeys(line for line in lines if line.startswith("E  ")))[:12]):
        print(f"|   {line[:200]}")


# cli


def cli(part: Part, device: torch.device) -> None:
    """Train on gratings, stop it by SIGTERM, resume with the same command."""
    count, size = (64, 32) if part.smoke else (8192, 64)
    pictures, run, log = part.scratch / "pictures.npy", part.scratch / "run", part.scratch / "cli.log"
    np.save(pictures, gratings(count, size))
    if part.smoke:
        preset, steps, stop_at, options = "umd-tiny", 8, 3, "--batch-size 8 --data.num-workers 0 --log-every 1"
    else:
        preset, steps, stop_at, options = "umd-b4", 100, 40, "--batch-size 256 --data.num-workers 8 --log-every 5"
    command = [sys.executable, "-m", "umd.cli", "pretrain", preset, *options.split()]
    command += f"--data.source {pictures} --out {run} --device {device.type} --steps {steps}".split()
    command += ["--optim.lr", "3e-4", "--optim.ema", "1e-4", "--save-every", "1000", "--draw-every", "0"]

    def logged() -> list[Row]:
        return [row for row in read_rows(run / "metrics.jsonl") if "loss" in row]

    def go(stop: int | None) -> int:
        """Run the command and return its exit status. stop: send SIGTERM once this step is logged; None: never."""
        with open(log, "a") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None and part.left() > 2:
            if stop is not None and (rows := logged()) and rows[-1]["step"] >= stop:
                process.send_signal(signal.SIGTERM)
                stop = None
            time.sleep(0.1)
        if process.poll() is None:
            process.kill()
            process.wait()
            raise TimeoutError(f"`umd pretrain` was cut off at {rows[-1] if (rows := logged()) else 'its start'}")
        return process.wait()

    ends = ("stopped by SIGTERM", stop_at, 128 + signal.SIGTERM), ("resumed to the end", None, 0)
    for what, stop, expected in ends:
        status = go(stop)
        print(text := log.read_text(errors="replace"))
        part.check("umd pretrain", "cli", f"{what}: exit status {status}", status == expected)
        if status != expected:
            raise RuntimeError(text[-1500:])
    part.check("umd pretrain", "cli", "goes on where it was stopped", "goes on at step" in text)
    rows = logged()
    every = int(options.split()[-1])
    logs = [row["step"] for row in rows] == list(range(every, steps + 1, every))
    part.check("umd pretrain", "cli", "each logged step stands once", logs)
    losses, rates = ([row[key] for row in rows] for key in ("loss", "images_per_second"))
    part.row("curve", rows=rows)
    fall = f"{losses[0]:.3f} to {losses[-1]:.3f}"
    part.check("umd pretrain", "cli", f"the loss falls, {fall}", losses[-1] < (losses[0] if part.smoke else 0.4))
    part.note("umd pretrain", f"median {statistics.median(rates):.0f} img/s, MFU {rows[-1]['mfu']:.1%}")


def gratings(count: int, size: int) -> np.ndarray:
    """Synthetic pictures that can be learned: coloured waves, uint8 [count, size, size, 3]."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:size, 0:size] / size * 2 * np.pi
    angle, frequency = rng.uniform(0, np.pi, count), rng.uniform(0.5, 4, count)
    phase = rng.uniform(0, 6, (count, 1, 1, 3)).astype(np.float32)
    wave = np.stack([(x * np.cos(a) + y * np.sin(a)) * f for a, f in zip(angle, frequency, strict=True)])
    return (127.5 + 120 * np.sin(wave[..., None].astype(np.float32) + phase)).astype(np.uint8)
