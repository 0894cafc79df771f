"""How samples of different lengths lie in one packed stream of tokens `[N, D]`.

A `Packing` is made once per run, because shapes never change from step to step, and is passed to every op. It holds the
tensors that kernels need, and the same facts as Python numbers. No op therefore waits for a device to learn a length.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, wraps
from itertools import accumulate, groupby
from operator import index
from typing import NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import fake_mode, multiprocessors, sees_dispatch, untraced

P = ParamSpec("P")
T = TypeVar("T")

# For the norm's backward pass, the heaviest user of chunks. RESIDENT: programs that run on a multiprocessor at a time.
# ENOUGH: programs per multiprocessor that saturate its share of the memory bandwidth.
RESIDENT, ENOUGH = 4, 2
# Cost of a chunk besides its tokens, in tokens: it reads the tables, and its partial sums are written and read.
OVERHEAD = 4
# Allowed tokens per chunk. Short chunks keep all multiprocessors busy in a small batch; beyond 256 nothing is saved.
CHUNKS = range(12, 257)


class Packing(NamedTuple):
    """Lengths and modulation rows of S samples. Sample s is rows `cu_seqlens[s] : cu_seqlens[s + 1]` of the stream."""

    cu_seqlens: Tensor  # int32 [S + 1], start of each sample; the last entry is N
    cond_index: Tensor  # int64 [S], the row of the modulation tables that each sample uses
    num_tokens: int  # N
    max_seqlen: int  # tokens of the longest sample
    num_rows: int  # rows that a modulation table must have: 1 + max(cond_index)
    runs: tuple[tuple[int, int], ...]  # (samples, length): consecutive samples of equal length
    segments: tuple[tuple[int, int, int], ...]  # (start, stop, row): consecutive tokens with the same modulation row
    chunks: Tensor  # int32 [C, 3], pieces (start, stop, row) of the segments, ordered by row; a program works on one
    row_chunks: Tensor  # int32 [num_rows + 1]: chunks row_chunks[r] : row_chunks[r + 1] use modulation row r

    @property
    def num_samples(self) -> int:
        return self.cu_seqlens.shape[0] - 1


def pack(
    lengths: Sequence[int],
    cond_index: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    chunk: int | None = None,
) -> Packing:
    """Describe a stream of `len(lengths)` samples.

    Args:
        lengths: tokens of each sample, in stream order; 0 is allowed.
        cond_index: modulation row of each sample; default: each sample has its own.
        device: where the tensors live.
        chunk: most tokens per chunk; default: chosen for the device.

    Raises:
        ValueError: there is no sample, a length is negative, `cond_index` has a negative entry or another size than
            `lengths`, or `chunk` is below 1.
    """
    rows = range(len(lengths)) if cond_index is None else cond_index
    if len(lengths) == 0 or min(lengths) < 0:
        raise ValueError(f"lengths: expected at least one length, all >= 0, got {list(lengths)}")
    if len(rows) != len(lengths) or min(rows) < 0:
        raise ValueError(f"cond_index: expected a row >= 0 for each of {len(lengths)} samples, got {list(rows)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: expected 1 token or more, got {chunk}")
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    segments: list[tuple[int, int, int]] = []
    for start, stop, row in zip(offsets, offsets[1:], rows, strict=False):
        if segments and segments[-1][2] == row:
            segments[-1] = (segments[-1][0], stop, row)
        elif stop > start:
            segments.append((start, stop, row))
    chunk = chunk or _chunk([stop - start for start, stop, _ in segments], multiprocessors(torch.device(device)))
    chunks = sorted((row, *piece) for start, stop, row in segments for piece in _cut(start, stop, chunk))
    row_chunks = [0] * (2 + max(rows))
    for row, *_ in chunks:
        row_chunks[row + 1] += 1
    return Packing(
        cu_seqlens=torch.tensor(offsets, dtype=torch.int32, device=device),
        cond_index=torch.tensor(list(rows), dtype=torch.int64, device=device),
        num_tokens=offsets[-1],
        max_seqlen=max(lengths),
        num_rows=1 + max(rows),
        runs=tuple((len(list(group)), length) for length, group in groupby(lengths)),
        segments=tuple(segments),
        chunks=torch.tensor([(*piece, row) for row, *piece in chunks], dtype=torch.int32, device=device).view(-1, 3),
        row_chunks=torch.tensor(list(accumulate(row_chunks)), dtype=torch.int32, device=device),
    )


def kept(maxsize: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Keep the packings that a function makes, for its last `maxsize` arguments.

    The same tensors serve inference, training and CUDA graphs. A FakeTensorMode has packings of its own.
    """

    def decorate(make: Callable[P, T]) -> Callable[P, T]:
        @lru_cache(maxsize)
        def cached(mode: object | None, *args: P.args, **kwargs: P.kwargs) -> T:
            with torch.inference_mode(False):
                return make(*args, **kwargs)

        @wraps(make)
        def get(*args: P.args, **kwargs: P.kwargs) -> T:
            if torch.compiler.is_compiling():
                return make(*args, **kwargs)
            return _keep_if_recorded(cached(fake_mode(), *args, **kwargs))  # type: ignore[arg-type]  # hashable

        return get

    return decorate


def _keep_if_recorded(packings: T) -> T:
    """Keep packings for good if a CUDA graph is being recorded: its replays read their memory."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        _recorded[id(packings)] = packings
    return packings


_recorded: dict[int, object] = {}


def equal_lengths(samples: int, length: int, device: torch.device) -> Packing:
    """The packing of [samples, length, D] with one modulation row per sample; made once, then kept."""
    # Tensors made under a dispatch mode serve that mode only: they are not kept.
    if not torch.compiler.is_compiling() and sees_dispatch():
        return pack([length] * samples, device=device)
    # index() makes sizes plain numbers for torch.compile: it recompiles for other values, with no symbolic size.
    return Packing(*_equal_lengths(index(samples), index(length), device))


@untraced  # torch.compile keeps the plain tuple of tensors as a constant
def _equal_lengths(samples: int, length: int, device: torch.device) -> tuple:
    return tuple(_keep_if_recorded(_pack_once(samples, length, device)))


@lru_cache(maxsize=64)
def _pack_once(samples: int, length: int, device: torch.device) -> Packing:
    with torch.inference_mode(False):  # kept tensors serve training too
        return pack([length] * samples, device=device)


def per_token(rows: Tensor, packing: Packing) -> Tensor:
    """Repeat each sample's row for its tokens: rows [R, D] to [N, D]."""
    index = packing.cond_index.repeat_interleave(packing.cu_seqlens.diff(), output_size=packing.num_tokens)
    return F.embedding(index, rows)  # index_select's backward adds with atomics on a GPU, in any order; this one sorts


def unit_columns(table: Tensor | None) -> Tensor | None:
    """The table [R, D] with neighbouring columns side by side in memory; views of one projection stay as they are."""
    return table if table is None or table.stride(-1) == 1 else table.contiguous()


def paired_runs(packing: Packing, kv_packing: Packing) -> list[tuple[int, int, int]]:
    """Runs (samples, query length, key length): consecutive samples that are equal in both lengths.

    Samples with neither queries nor keys are left out.
    """
    queries, keys = list(packing.runs), list(kv_packing.runs)
    runs, i, j = [], 0, 0
    while i < len(queries) and j < len(keys):
        (q_samples, q_length), (k_samples, k_length) = queries[i], keys[j]
        samples = min(q_samples, k_samples)
        if q_length + k_length > 0:
            runs.append((samples, q_length, k_length))
        queries[i], keys[j] = (q_samples - samples, q_length), (k_samples - samples, k_length)
        i, j = i + (q_samples == samples), j + (k_samples == samples)
    return runs


def _chunk(segments: list[int], multiprocessors: int) -> int:
    """Choose the most tokens per chunk so that work on segments of these lengths should end soonest.

    The model of time: all chunks together take as long as the memory needs for their bytes, but no less than the
    longest chunk takes alone. If not all chunks run at the same time, the longest may start last: both times add up.
    """
    lengths = Counter(segments)

    def cost(chunk: int) -> int:  # in tokens
        chunks = sum(-(-length // chunk) * count for length, count in lengths.items())
        longest = max((-(-length // -(-length // chunk)) for length in lengths), default=0)
        memory, alone = sum(segments) + OVERHEAD * chunks, ENOUGH * multiprocessors * (longest + OVERHEAD)
        return max(memory, alone) if chunks <= RESIDENT * multiprocessors else memory + alone

    return min(CHUNKS, key=cost)


def _cut(start: int, stop: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Pieces of nearly equal size, at most `chunk` tokens each."""
    pieces = -(-(stop - start) // chunk)
    bounds = [start + (stop - start) * i // pieces for i in range(pieces + 1)]
    return zip(bounds, bounds[1:], strict=False)
