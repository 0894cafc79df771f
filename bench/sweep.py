#!/usr/bin/env python3
"""Time kernels in other tiles, warps and stages, on the streams of UMD-B/4 and UMD-L/2.

    PYTHONPATH=. python3 bench/sweep.py --warm          compile all settings; may run beside other work
    PYTHONPATH=. python3 bench/sweep.py [--json FILE]   time them, alone on a GPU: about a minute after --warm
    PYTHONPATH=. python3 bench/sweep.py --smoke         tiny sizes in Triton's interpreter, to test this script

To time another commit's kernels, put its checkout first on PYTHONPATH. Each line has the time of an op, and how far its
result is from that of the settings in use (norm of the difference over the norm). A row of BWD_Q or BWD_KV times both
kernels of the backward pass, one of `_sum_launch` the norm's whole backward pass: compare with the first of its kind.

Exit status 1: the settings in use failed, or another result differs from theirs by more than 1 %.
"""

# Import only the standard library before `main`: for a script, this folder comes first on sys.path, and its kernels.py
# and trace.py would shadow packages of these names.
import sys

sys.path.pop(0)

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402


def tile(M: int, N: int, num_warps: int, num_stages: int, **more: int) -> dict[str, int]:
    return dict(BLOCK_M=M, BLOCK_N=N, num_warps=num_warps, num_stages=num_stages, **more)


# Settings of attention's kernels, by the name of their constant in kernels/triton/attention.py.
FWD = [tile(64, 64, 4, 3), tile(64, 64, 4, 2), tile(64, 64, 4, 2, maxnreg=96), tile(64, 32, 4, 3), tile(128, 64, 8, 2)]
BWD_Q = [tile(64, 64, 4, 2), tile(64, 64, 4, 3), tile(64, 32, 4, 2), tile(128, 64, 8, 2)]
BWD_KV = [tile(64, 64, 4, 1), tile(64, 32, 4, 1), tile(64, 32, 4, 2), tile(64, 64, 4, 1, maxnreg=128)]
# Changes to `_fwd_launch` and `_sum_launch` of kernels/triton/adaln.py.
NORM_FWD = [
    {}, *(dict(BLOCK_M=m, SPLIT=split) for m in (4, 2, 1) for split in (2, 4, 8)), dict(BLOCK_M=2, SPLIT=2, STAGES=3),
    dict(num_warps=2), dict(num_warps=8),
]  # fmt: skip
NORM_SUM = [{}, dict(STAGES=1), dict(STAGES=3), dict(STAGES=6), dict(STAGES=2, BLOCK_C=64), dict(STAGES=1, BLOCK_C=128)]


def attention(device, model: str, batch: int) -> Iterator[tuple[str, dict, Callable]]:
    """(what, settings, call) for each stream, kernel and settings; the call returns what the op makes."""
    import torch

    from umd.bench.first_light_checks import setting_of
    from umd.kernels.triton import attention as kernels

    config, objective = setting_of(model, "umd")
    H, d = config.num_heads, config.hidden_size // config.num_heads
    layout = objective.corrupt(batch, 0, device).layout
    dtype = torch.float16 if device.type == "cpu" else torch.bfloat16  # the interpreter multiplies no bf16
    for where, packing in (("encoder", layout.encoder_blocks), ("decoder", layout.decoder_blocks)):
        qkv = torch.randn(packing.num_tokens, 3, H, d, device=device).to(dtype)
        dout = torch.randn(packing.num_tokens, H, d, device=device).to(dtype)
        lengths = packing.cu_seqlens, packing.max_seqlen
        out, lse = kernels.short_attention_fwd.launch(qkv, *lengths)
        forward = partial(kernels.short_attention_fwd.launch, qkv, *lengths)
        backward = partial(kernels.short_attention_bwd.launch, dout, qkv, out, lse, *lengths)
        for name, settings, call in (("FWD", FWD, forward), ("BWD_Q", BWD_Q, backward), ("BWD_KV", BWD_KV, backward)):
            used = getattr(kernels, name)
            for launch in (used, *(one for one in settings if one != used)):
                setattr(kernels, name, launch)
                yield f"attention {where} {name}", launch, call
            setattr(kernels, name, used)


def norms(device, model: str, batch: int) -> Iterator[tuple[str, dict, Callable]]:
    """As `attention`, of the norm with gate on the encoder's stream, forward and backward."""
    import torch

    from umd.bench.op_cases import OPS, Inputs
    from umd.kernels.triton import adaln as kernels

    side = OPS["gated_residual_layer_norm"](Inputs(model, batch, torch.bfloat16, str(device))).ours
    outputs = side.call()
    douts = tuple(torch.randn_like(y) for y in outputs)
    backward = partial(side.gradients, outputs, douts)
    for name, changes, call in (("_fwd_launch", NORM_FWD, side.call), ("_sum_launch", NORM_SUM, backward)):
        used = getattr(kernels, name)
        for change in changes:
            setattr(kernels, name, lambda *D, used=used, change=change, **k: used(*D, **k) | change)
            yield f"norm {name}", change, call
        setattr(kernels, name, used)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; runs without a GPU")
    parser.add_argument("--warm", action="store_true", help="only compile and compare")
    parser.add_argument("--json", type=Path, help="file for the rows")
    args = parser.parse_args(argv)
    if args.smoke:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from umd import ops
    from umd.bench.device_time import time_calls
    from umd.bench.first_light_checks import relative
    from umd.machine.device import side_stream

    if not args.smoke and not torch.cuda.is_available():
        parser.error("no CUDA GPU here: use --smoke")
    device = torch.device("cpu" if args.smoke else "cuda")
    cases = [("UMD-Ti/4", 2)] if args.smoke else [("UMD-B/4", 256), ("UMD-L/2", 256), ("UMD-B/4", 16)]
    rows: list[dict[str, Any]] = []
    with side_stream(device), ops.kernels("triton"):
        for model, batch in cases:
            for part in (attention, norms):
                wanted: dict[str, Any] = {}
                for what, settings, call in part(device, model, batch):
                    row: dict[str, Any] = dict(what=what, model=model, images=batch, settings=settings)
                    try:
                        made = call()
                        made = [x.detach() for x in ((made,) if isinstance(made, torch.Tensor) else made)]
                        truth = wanted.setdefault(what, made)
                        row["difference"] = max(relative(a, b) for a, b in zip(made, truth, strict=True) if b.numel())
                        row["bad"] = row["difference"] > 1e-2
                        row["us"] = None if args.smoke or args.warm else round(1e3 * time_calls([call]).ms, 1)
                    except Exception as error:  # settings that do not compile, or need too much of something
                        row["failed"] = f"{type(error).__name__}: {error}"[:200]
                        row["bad"] = what not in wanted  # the settings in use come first
                    rows.append(row)
                    result = row.get("failed") or f"{row['us']} µs, difference {row['difference']:.0e}"
                    print(f"{model} {batch} {what} {settings}: {result}", flush=True)
                    if args.json is not None:
                        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(row["bad"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
