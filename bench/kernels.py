"""`umd bench kernels`: time each op on a GPU as eager PyTorch, under torch.compile and as our Triton kernels.

- Times are of the GPU alone, by graph replay (`device_time.py`), on inputs that are not in the cache.
- Speeds are compulsory bytes (each input read once, each output written once) over time, next to the speed of a copy
  on the same GPU.
- Without a GPU, every row runs once at a tiny size, kernels in Triton's interpreter. This smoke run times nothing.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch._functorch.config
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from umd.bench.count_bytes import interpreted
from umd.bench.device_time import Timing, copies_beyond, time_calls
from umd.bench.options import ATTENTION, KernelBench
from umd.files import write_json
from umd.machine.device import side_stream, take_device
from umd.train.step_counts import tensor_bytes

with interpreted(not torch.cuda.is_available()):  # Triton reads the variable when a kernel is defined
    from umd import ops
    from umd.bench.op_cases import DTYPES, OPS, Inputs, LayerNorm, OpCase, Side, dtype_name
    from umd.train.parallel import static_compile

# Share of noise-free samples in a packed batch. Of 256 patches, 160 are visible if noised and 64 if noise-free.
STREAMS = {"noised": 0.0, "noise-free": 1.0, "mixed": 0.5}
BACKENDS: tuple[ops.Attention, ...] = ("triton", "flash_attn", "varlen_attn", "sdpa", "matmul")
# Both layers of an MLP: PyTorch; our GELU, its output kept or recomputed; GELU fused into the products.
MLPS = ("eager", "triton", "recompute_gelu", "transformer_engine")


@dataclass(frozen=True)
class Row:
    """One implementation of one op in one direction. `ms` is None in a smoke run."""

    op: str
    direction: str
    implementation: str
    model: str
    width: int
    stream: str
    tokens: int
    dtype: str
    device: str
    ms: float | None
    gb_per_s: float | None = None
    of_copy: float | None = None  # gb_per_s over that of a copy
    tflop_per_s: float | None = None  # attention and mlp only
    replayed: bool | None = None  # False: could not be recorded as a CUDA graph; a short time is then the host's


def median_time(calls: Sequence[Callable[[], Tensor | tuple[Tensor, ...]]]) -> Timing | None:
    """Median time of calls that do the same on different memory. On a CPU: run the first once and return None."""
    result = calls[0]()
    if (result if isinstance(result, Tensor) else result[0]).device.type == "cpu":
        return None
    return time_calls(calls)


def cache_bytes(device: str) -> int:
    return 0 if device == "cpu" else torch.cuda.get_device_properties(device).L2_cache_size


def copy_speed(device: str, numbers: int = 2**29) -> float | None:
    """Bytes per second, read plus written, of an elementwise kernel over `numbers` bf16 numbers. None on a CPU.

    (On an H200 a cudaMemcpy in a graph reaches 2.8 TB/s and kernels 4.2, so a kernel is the fair yardstick.)
    """
    source = torch.ones(numbers, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    timing = median_time([lambda: torch.neg(source, out=target)])
    return None if timing is None else 4 * numbers / (timing.ms / 1e3)


def other_layer_norms() -> tuple[dict[str, LayerNorm], list[str]]:
    """LayerNorm of apex and of liger-kernel, if installed, and a note on each that is not."""
    found: dict[str, LayerNorm] = {}
    notes = []
    if torch.cuda.is_available():
        try:
            import fused_layer_norm_cuda  # noqa: F401  in NVIDIA's apex, not in the package that PyPI calls apex
            from apex.normalization.fused_layer_norm import fused_layer_norm_affine

            found["apex"] = lambda x, weight, bias: fused_layer_norm_affine(x, weight, bias, weight.shape, 1e-6)
        except ImportError as error:
            notes.append(f"apex left out: {error}; NVIDIA's is at github.com/NVIDIA/apex, the one on PyPI is not it")
        try:
            from liger_kernel.ops.layer_norm import LigerLayerNormFunction

            found["liger"] = lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, 1e-6)
        except ImportError as error:
            notes.append(f"liger left out: {error}; pip install liger-kernel")
    else:
        notes.append("apex and liger left out: their kernels need a GPU")
    return found, notes


def compiled(side: Side, device: str) -> Side:
    """The side under torch.compile. Without a GPU: traced and split into forward and backward, but not compiled."""
    return Side(static_compile(side.call, "inductor" if device == "cuda" else "aot_eager"), side.inputs)


def implementations(
    case: OpCase, norms: dict[str, LayerNorm], device: str, with_triton: bool
) -> Iterator[tuple[str, Literal["reference", "triton"], Side]]:
    """Yield (name, choice of kernels, side) for each implementation of the op."""
    if case.eager is not None:
        yield "eager", "reference", case.eager
        yield "torch.compile", "reference", compiled(case.eager, device)
    if with_triton:
        yield "triton", "triton", case.ours
    if case.eager_with is not None:
        for name, layer_norm in norms.items():
            yield name, "reference", case.eager_with(layer_norm)


def time_side(sides: Sequence[Side], backward: bool) -> dict[str, Timing | None]:
    """Time forward, backward (on one forward pass), and full (both). sides: the same work on different memory."""
    torch._dynamo.reset()  # all sides of an op share code, and dynamo compiles it for eight shapes at most
    with torch.set_grad_enabled(backward):
        found = {"forward": median_time([side.call for side in sides])}
        if backward:
            outputs = [side.call() for side in sides]
            douts = [tuple(torch.randn_like(y) for y in ys) for ys in outputs]
            made = list(zip(sides, outputs, douts, strict=True))
            found["backward"] = median_time([partial(side.gradients, ys, dys) for side, ys, dys in made])
            found["full"] = median_time([partial(side.both, dys) for side, _, dys in made])
    return found


def beyond_the_cache(op: str, make: Callable[[], Inputs]) -> list[OpCase]:
    """Make enough copies of the op, each with inputs of its own, that a call finds none of its inputs in the cache."""
    inputs = make()
    case = OPS[op](inputs)
    copies = copies_beyond(cache_bytes(inputs.device), case.forward_bytes)
    return [case, *(OPS[op](make()) for _ in range(copies - 1))]


def time_op(cases: Sequence[OpCase], sides: Sequence[Iterator], copy: float | None, **shape) -> list[Row]:
    """Time every implementation of an op. cases: the op on different memory. sides: `implementations` of each case."""
    case = cases[0]
    needed = {"forward": case.forward_bytes, "backward": case.backward_bytes}
    needed["full"] = None if case.backward_bytes is None else case.forward_bytes + case.backward_bytes
    rows = []
    for same in zip(*sides, strict=True):
        implementation, choice, _ = same[0]
        with ops.kernels(choice):
            timed = time_side([side for _, _, side in same], case.backward_bytes is not None)
        for direction, timing in timed.items():
            row = row_of(case.op, direction, implementation, case.dtype, timing, shape)
            size = needed[direction]
            if timing is not None and size is not None and copy is not None:
                speed = size / (timing.ms / 1e3)
                row = replace(row, gb_per_s=speed / 1e9, of_copy=speed / copy)
            rows.append(row)
    return rows


def row_of(op: str, direction: str, implementation: str, dtype: torch.dtype, timing: Timing | None, shape: dict) -> Row:
    ms, replayed = (None, None) if timing is None else timing
    return Row(op, direction, implementation, dtype=dtype_name(dtype), ms=ms, replayed=replayed, **shape)


def attention_case(op: str, inputs: Inputs) -> tuple[Callable[[ops.Attention], Side], int]:
    """What makes the op on a given backend, and its forward FLOPs.

    In cross-attention the queries are the hidden patches; keys and values are the encoder's tokens.
    """
    H, D, stream = inputs.config.num_heads, inputs.D, inputs.stream
    lengths = [length for samples, length in stream.runs for _ in range(samples)]
    if op == "varlen_attention":
        qkv = inputs.randn(inputs.tokens, 3, H, D // H)
        flops = 4 * D * sum(length**2 for length in lengths)
        return lambda backend: Side(lambda: (ops.varlen_attention(qkv, stream, backend),), (qkv,)), flops
    hidden = [inputs.config.num_patches + inputs.config.num_cls - length for length in lengths]
    queries = ops.pack(hidden, device=inputs.device)
    q, kv = inputs.randn(queries.num_tokens, H, D // H), inputs.randn(inputs.tokens, 2, H, D // H)
    flops = 4 * D * sum(asking * keys for asking, keys in zip(hidden, lengths, strict=True))
    return lambda backend: Side(lambda: (ops.varlen_cross_attention(q, kv, queries, stream, backend),), (q, kv)), flops


def mlp_case(op: str, inputs: Inputs) -> tuple[Callable[[str], Side], int]:
    """What makes both layers of an MLP in one of the ways of `MLPS`, and their forward FLOPs.

    Weights have the dtypes of a training step.
    """
    D, x = inputs.D, inputs.randn(inputs.tokens, inputs.D)
    weights = [inputs.randn(*shape, dtype=torch.float32) for shape in ((4 * D, D), (4 * D,), (D, 4 * D), (D,))]
    w1, b1, w2, b2 = weights
    casts = [weight.detach().to(x.dtype) for weight in weights]

    def mlp(how: str) -> tuple[Tensor]:
        if how == "eager":
            c1, d1, c2, d2 = (weight.to(x.dtype) for weight in weights)
            return (F.linear(F.gelu(F.linear(x, c1, d1), approximate="tanh"), c2, d2),)
        first, second = (casts[0], casts[1]), (casts[2], casts[3])
        if how == "transformer_engine":
            h, a = ops.linear_gelu(x, w1, b1, first)
            return (ops.activated_linear(h, a, w2, b2, second),)
        h = ops.linear(x, w1, b1.detach(), first)
        return (ops.gelu_linear(h, w2, b2, second, b1, recompute=how == "recompute_gelu"),)

    return lambda how: Side(partial(mlp, how), (x, *weights)), 16 * D * D * inputs.tokens


def time_backends(op: str, make: Callable[[], Inputs], notes: list[str], **shape) -> list[Row]:
    """Time every backend that accepts the tensors. Under torch.compile: attention with `auto`, the MLP with eager."""
    case: Callable = mlp_case if op == "mlp" else attention_case
    backends, plain, ratio = (
        (MLPS, "eager", 2) if op == "mlp" else (BACKENDS, "auto", 2.5)
    )  # attention: 5 products backward for 2 forward
    first = make()
    side, flops = case(op, first)
    copies = copies_beyond(cache_bytes(first.device), tensor_bytes(*side(plain).inputs))
    makers = [side, *(case(op, make())[0] for _ in range(copies - 1))]
    sides: dict[str, list[Side]] = {backend: [maker(backend) for maker in makers] for backend in backends}
    sides["torch.compile"] = [compiled(maker(plain), first.device) for maker in makers]
    rows = []
    for implementation, same in sides.items():
        try:
            timed = time_side(same, True)
        except ValueError as error:  # says why this backend cannot run
            notes.append(f"{op}: {error}")
            continue
        for direction, timing in timed.items():
            work = flops * {"forward": 1, "backward": ratio, "full": 1 + ratio}[direction]
            row = row_of(op, direction, implementation, first.dtype, timing, shape)
            rows.append(row if timing is None else replace(row, tflop_per_s=work / timing.ms / 1e9))
    return rows


def run(bench: KernelBench, console: Console) -> list[Row]:
    """Time all ops, print a table of the ops and one of attention, write the JSON. Returns the rows."""
    device, _ = take_device(bench.device, "fp32")
    gpu = device.type == "cuda"
    models = bench.models or (("UMD-B/4", "UMD-L/2", "UMD-XL/2") if gpu else ("UMD-Ti/4",))
    bench = replace(bench, device=device.type, models=models, samples=bench.samples or (256 if gpu else 2))
    with side_stream(device):  # CUDA graphs cannot be recorded on the default stream
        rows, copy, notes = measure(bench, console)
    if copy is None:
        title = "Smoke run on a CPU, kernels in Triton's interpreter: it shows that every row runs, and times none."
    else:
        title = f"{torch.cuda.get_device_name()}, where a copy reaches {copy / 1e9:.0f} GB/s"
    console.print(title, highlight=False)
    print_rows(rows, console)
    if any(row.replayed is False for row in rows):
        notes.append("*: could not be recorded as a CUDA graph; launched one by one, a short call has the host's time")
    for note in dict.fromkeys(notes):
        console.print(note, highlight=False, markup=False)
    return rows


def measure(bench: KernelBench, console: Console) -> tuple[list[Row], float | None, list[str]]:
    """Time all ops, and write the JSON after each, as the run may be cut off.

    Returns rows, the bytes per second of a copy (None on a CPU), and notes on what was left out.
    """
    torch._functorch.config.donated_buffer = False  # a compiled backward pass runs many times on one forward pass
    copy = copy_speed(bench.device)
    device = torch.cuda.get_device_name() if bench.device == "cuda" else "cpu"
    norms, notes = other_layer_norms()
    try:
        with ops.kernels("triton"):
            with_triton = True
    except ValueError as error:
        with_triton = False
        notes.append(f"Triton left out: {error}")
    rows: list[Row] = []
    for model, stream in itertools.product(bench.models, bench.streams):
        for name in bench.ops or (*OPS, *ATTENTION, "mlp"):
            console.print(f"{model} {stream} {name}", style="dim", highlight=False)
            make = partial(Inputs, model, bench.samples, DTYPES[bench.dtype], bench.device, STREAMS[stream])
            with interpreted(bench.device == "cpu"):  # Triton imports parts late and asks again
                inputs = make()
                shape = dict(model=model, width=inputs.D, stream=stream, tokens=inputs.tokens, device=device)
                if name in OPS:
                    cases = beyond_the_cache(name, make)
                    sides = [implementations(case, norms, bench.device, with_triton) for case in cases]
                    rows += time_op(cases, sides, copy, **shape)
                else:
                    rows += time_backends(name, make, notes, **shape)
            if bench.json is not None:
                write_json(bench.json, [asdict(row) for row in rows])
    return rows, copy, notes


def print_rows(rows: list[Row], console: Console) -> None:
    """Print one line per op, direction and shape. A cell has ms and GB/s as share of a copy's, or TFLOP/s."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault("" if row.op in OPS else "mlp" if row.op == "mlp" else "attention", []).append(row)
    for kind, group in groups.items():
        table = Table(title=f"{kind}: ms, TFLOP/s" if kind else "ms, GB/s, share of a copy's speed")
        columns = list(dict.fromkeys(row.implementation for row in group))
        for column in ("op", "", "model", "stream", "tokens", *columns):
            table.add_column(column, no_wrap=column == "op", overflow="fold")
        lines: dict[tuple, dict[str, Row]] = {}
        for row in group:
            key = (row.op, row.direction, row.model, row.stream, str(row.tokens))
            lines.setdefault(key, {})[row.implementation] = row
        for key, cells in lines.items():
            table.add_row(*key, *(_cell(cells.get(column)) for column in columns))
        console.print(table)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row.ms is None:
        return "ran"
    ms = f"{row.ms:.3f}" + "*" * (row.replayed is False)
    if row.tflop_per_s is not None:
        return f"{ms}  {row.tflop_per_s:.0f}"
    return f"{ms}  {row.gb_per_s:.0f}  {row.of_copy:.0%}"
