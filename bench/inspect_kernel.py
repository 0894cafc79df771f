"""Compile a Triton kernel for a GPU that is not present, and read registers, spills and access widths.

A launch (see `count_bytes.py`) is compiled as Triton would on that GPU, with its specialisation of types, constants and
divisibility. Occupancy follows from the limits of the architecture.
"""

import functools
import importlib
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from umd.bench.count_bytes import Argument, Launch
from umd.errors import UserError


@dataclass(frozen=True)
class Limits:
    """Limits of one SM, from the CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""

    shared_bytes: int
    warps: int = 64
    blocks: int = 32
    registers: int = 65536
    # Allocation granularities, from the same guide and NVIDIA's occupancy calculator. CUDA takes 1 KiB per block.
    register_unit: int = 256  # per warp
    shared_unit: int = 128
    shared_of_cuda: int = 1024
    partitions: int = 4  # of the register file; a warp's registers are all in one


ARCHITECTURES = {"sm_80": Limits(164 * 1024), "sm_90": Limits(228 * 1024), "sm_100": Limits(228 * 1024)}


@dataclass(frozen=True)
class Access:
    """A load, store or atomic on global memory in the PTX. arguments: pointers that its address is computed from."""

    kind: str
    bits: int
    is_float: bool
    arguments: frozenset[str]


@dataclass(frozen=True)
class Compiled:
    """One launch, compiled for one architecture."""

    kernel: str
    arch: str
    num_warps: int
    registers: int  # per thread
    spill_bytes: int  # stack and local memory per thread
    shared_bytes: int  # per block
    occupancy: float  # resident warps over the maximum
    f64: int  # number of fp64 instructions
    atomics: int  # on floats
    serialized: bool  # whether ptxas lets each of Hopper's matrix products wait for the one before
    accesses: tuple[Access, ...]

    def access_bits(self) -> dict[str, int | None]:
        """Bits of the narrowest access to each pointer argument."""
        return {
            name: self.min_access_bits({name}) for name in sorted(set().union(*(a.arguments for a in self.accesses)))
        }

    def min_access_bits(self, arguments: set[str]) -> int | None:
        """Bits of the narrowest access to any of these pointer arguments. None if there is none.

        An access whose pointer is unknown counts as one to them.
        """
        if not arguments:
            return None
        return min((a.bits for a in self.accesses if not a.arguments or a.arguments & arguments), default=None)


class _Pointer:
    """Stands in for a tensor when Triton chooses a specialisation."""

    def __init__(self, argument: Argument):
        assert argument.dtype is not None, "a tensor's"
        self.dtype = getattr(torch, argument.dtype)
        self.shape = argument.shape
        self._address = 0 if argument.aligned else 8
        self._nbytes = argument.storage_bytes

    def data_ptr(self) -> int:
        return self._address

    def ptr_range(self) -> int:
        return self._nbytes


def import_kernel(path: str) -> JITFunction:
    """Import the kernel `package.module:name`.

    Raises:
        UserError: there is no such module or name, or it is not a `@triton.jit` function.
    """
    module, _, name = path.partition(":")
    try:
        kernel = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"no kernel {path!r}: {error}; give it as package.module:name") from error
    while not isinstance(kernel, JITFunction) and hasattr(kernel, "fn"):  # unwrap autotune and heuristics
        kernel = kernel.fn
    if not isinstance(kernel, JITFunction):
        raise UserError(f"{path} is no @triton.jit function, or TRITON_INTERPRET=1 is set: unset it to compile")
    return kernel


def compile_launch(launch: Launch, arch: str) -> Compiled:
    """Compile the kernel of `launch` for `arch` (a key of ARCHITECTURES). Needs no GPU."""
    kernel = import_kernel(launch.kernel)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    backend = make_backend(target)
    arguments = {a.name: a.value if a.dtype is None else _Pointer(a) for a in launch.arguments}
    floats = {name for name, value in arguments.items() if isinstance(value, float)}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(**arguments, **launch.options, debug=False)
    options, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    # A Python float argument is fp64 if Inductor compiles the kernel (fp32 if Triton launches it).
    signature = {n: "fp64" if n in floats and kind != "constexpr" else kind for n, kind in signature.items()}
    compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), target, options.__dict__)
    pointers = [name for name, kind in signature.items() if kind.startswith("*")]
    passed = [name for name, kind in signature.items() if kind != "constexpr"]
    ptx = compiled.asm["ptx"]
    accesses = tuple(global_accesses(ptx, passed, pointers))
    used = resource_usage(compiled.asm["cubin"])
    warps, shared = compiled.metadata.num_warps, max(used["SHARED"], compiled.metadata.shared)
    return Compiled(
        kernel=launch.kernel,
        arch=arch,
        num_warps=warps,
        registers=used["REG"],
        spill_bytes=used["STACK"] + used["LOCAL"],
        shared_bytes=shared,
        occupancy=occupancy(ARCHITECTURES[arch], used["REG"], shared, warps),
        f64=sum(".f64" in line for line in instructions(ptx)),
        atomics=sum(a.kind == "atomic" and a.is_float for a in accesses),
        serialized="wgmma" in ptx and serialized(ptx),
        accesses=accesses,
    )


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of the kernel in a cubin, read by cuobjdump from Triton's wheel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = next(line for line in text.splitlines() if "REG:" in line)
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", line)}


def serialized(ptx: str) -> bool:
    """Whether ptxas says that it serializes the asynchronous matrix products of a kernel for sm_90 (its note C7515)."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(tool), "-v", "--gpu-name=sm_90a", file.name, "-o", os.devnull]
        notes = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return "wgmma.mma_async instructions are serialized" in notes


def occupancy(limits: Limits, registers: int, shared_bytes: int, num_warps: int) -> float:
    """Resident warps of an SM over the maximum."""

    def up(value: int, unit: int) -> int:
        return -(-value // unit) * unit

    of_warp = up(registers * 32, limits.register_unit)
    warps = limits.registers // limits.partitions // of_warp * limits.partitions
    shared = up(shared_bytes + limits.shared_of_cuda, limits.shared_unit)
    blocks = min(limits.blocks, limits.warps // num_warps, warps // num_warps, limits.shared_bytes // shared)
    return blocks * num_warps / limits.warps


def instructions(ptx: str) -> list[str]:
    """Split PTX text into statements, without comments and declarations."""
    text = re.sub(r"//[^\n]*", "", ptx)
    text = text[: text.find(".section")] if ".section" in text else text
    lines = (line.strip() for line in re.split(r"[;\n]", text))
    return [line for line in lines if line and not line.startswith((".", "$", "{", "}", ")"))]


_ACCESS = re.compile(r"\b(ld|st|atom|red)\.(\S*?global\S*)\s")
_ASYNC = re.compile(r"\bcp\.async\.\S*shared\S*global\S*\s+\[[^]]*\],\s*\[([^]]*)\],\s*(\w+)")
_REGISTER = re.compile(r"%[a-z]+\d+")
_COPIES = re.compile(r"(?:@\S+\s+)?(mov|add|sub|mad|selp|cvta|cvt|or|max|min)\.\S+")


def global_accesses(ptx: str, passed: list[str], pointers: list[str]) -> list[Access]:
    """Find each access to global memory, and the pointer arguments that its address can come from.

    passed: names of the kernel's arguments, in order of its PTX parameters. pointers: names of the pointers among them.
    """
    lines = instructions(ptx)
    sources: dict[str, set[str]] = {}
    moves = []
    for line in lines:
        registers = _REGISTER.findall(line)
        if match := re.search(r"ld\.param\.\S+\s+(?:\{)?(%\w+).*\[\w+_param_(\d+)\]", line):
            index = int(match[2])
            if index < len(passed) and passed[index] in pointers:
                sources.setdefault(match[1], set()).add(passed[index])
        elif _COPIES.match(line) and len(registers) > 1:
            moves.append((registers[0], registers[1:]))
    changed = True
    while changed:  # until stable, as registers at the head of a loop have several origins
        changed = False
        for target, origins in moves:
            found = set().union(*(sources.get(origin, ()) for origin in origins))
            if not found <= sources.get(target, set()):
                sources.setdefault(target, set()).update(found)
                changed = True

    def origin(address: str) -> frozenset[str]:
        return frozenset().union(*(sources.get(register, ()) for register in _REGISTER.findall(address)))

    accesses = []
    for line in lines:
        if match := _ASYNC.search(line):
            accesses.append(Access("load", int(match[2], 0) * 8, False, origin(match[1])))
        elif match := _ACCESS.search(line):
            kind = {"ld": "load", "st": "store"}.get(match[1], "atomic")
            modifiers = match[2].split(".")
            base, bits, pair = re.findall(r"^([a-z]+?)(\d+)(x2)?$", modifiers[-1])[0]
            lanes = next((int(m[1:]) for m in modifiers if re.fullmatch(r"v\d", m)), 1)
            address = line.partition("[")[2].partition("]")[0]
            width = int(bits) * lanes * (2 if pair else 1)
            accesses.append(Access(kind, width, base in ("f", "bf"), origin(address)))
    return accesses
