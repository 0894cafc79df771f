"""Kernels in the variants that `umd bench audit` does not launch: each compiles, without fp64 or float atomics.

Triton's interpreter, in which the other tests run where there is no GPU, takes what the compiler does not.
"""

import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the audit compiles kernels: pip install triton")

from umd.bench.audit import compile_counted, count_call, run_apart  # noqa: E402

ROOT = Path(__file__).parents[2]


def zeros(dtype: str, *shape: int) -> str:
    return f"torch.zeros({', '.join(map(str, shape))}, dtype=torch.{dtype})"


def patches() -> list[tuple[str, str]]:
    """Noise given and from seeds; of patches whose neighbours share a Philox counter, all four, in pairs, or not."""
    calls = []
    for dtype, P in [("float32", 1), ("bfloat16", 2), ("float16", 4)]:
        x, L = zeros(dtype, 2, 3, 8, 8), (8 // P) ** 2
        for noise in (zeros(dtype, 2, 3, 8, 8), zeros("int64", 2)):
            calls.append(
                (
                    "patches:_gather_patches_kernel",
                    f"gather_patches_fwd({x}, torch.arange(4), *torch.ones(2, 2), {noise}, {P})",
                )
            )
            prediction, roles = zeros(dtype, 2 * L, 6 * P * P), zeros("uint8", 2 * L)
            numbers = f"{prediction}, {x}, {roles}, {noise}, {P}, 2, 1, 1, 1"
            calls.append(("loss:_masked_diffusion_loss_fwd_kernel", f"masked_diffusion_loss_fwd({numbers})"))
            calls.append(
                ("loss:_masked_diffusion_loss_bwd_kernel", f"masked_diffusion_loss_bwd(torch.zeros(4), {numbers})")
            )
    return calls


def norms() -> list[tuple[str, str]]:
    """Without a table, with some of them, with all: h, gate, shift, scale, weight, bias, h_bias. RMSNorm, and an fp32
    stream with 16-bit branches, gated and not; fixed gates."""
    D, calls = 256, []
    chunks = "torch.tensor([[0, 3, 0], [3, 6, 1]], dtype=torch.int32), torch.tensor([0, 1, 2], dtype=torch.int32)"
    h, rows, row = "h", zeros("float32", 2, D), zeros("float32", D)
    for which, dtype, narrow, rms in (
        ("", "bfloat16", "bfloat16", False),
        ("shift scale", "bfloat16", "bfloat16", False),
        ("weight bias", "float32", "float32", False),
        ("h", "bfloat16", "bfloat16", False),
        ("h gate", "float16", "float16", False),
        ("h gate shift scale h_bias", "bfloat16", "bfloat16", False),
        ("h gate fixed shift scale", "bfloat16", "bfloat16", False),
        ("shift scale", "bfloat16", "bfloat16", True),
        ("h gate shift scale weight", "float16", "float16", True),
        ("shift scale weight bias", "float32", "bfloat16", False),
        ("h", "float32", "bfloat16", False),
        ("h gate shift scale h_bias", "float32", "float16", True),
    ):
        x, y, stat = zeros(dtype, 6, D), zeros(narrow, 6, D), "torch.ones(6)"
        given = dict(h=y, gate=rows, shift=rows, scale=rows, weight=row, bias=row, h_bias=row)
        h, gate, *tables = (text if name in which.split() else "None" for name, text in given.items())
        forward = f"layer_norm_fwd({x}, {', '.join([h, gate, *tables])}, {chunks}, 1e-6, {rms}, torch.{narrow})"
        calls.append(("adaln:_layer_norm_fwd_kernel", forward))
        dr, kept, mean = (
            "None" if h == "None" else x,
            "None" if gate == "None" or "fixed" in which else h,
            "None" if rms else stat,
        )
        arguments = [y, dr, x, kept, gate, *tables, mean, stat]
        backward = f"layer_norm_bwd({', '.join(arguments)}, {chunks}, {h != 'None'})"
        calls.append(("adaln:_layer_norm_bwd_kernel", backward))
        if which not in ("", "h"):
            calls.append(("adaln:_layer_norm_bwd_sum_kernel", backward))
    return calls


def attention() -> list[tuple[str, str]]:
    calls = []
    for d, dtype in [(16, "bfloat16"), (32, "float16"), (64, "bfloat16")]:
        qkv, out, lse = zeros(dtype, 9, 3, 2, d), zeros(dtype, 9, 2, d), zeros("float32", 2, 9)
        cu_seqlens = "torch.tensor([0, 5, 9], dtype=torch.int32), 5"
        calls.append(("attention:_attention_fwd_kernel", f"short_attention_fwd({qkv}, {cu_seqlens})"))
        backward = f"short_attention_bwd({out}, {qkv}, {out}, {lse}, {cu_seqlens})"
        calls += [(f"attention:_attention_bwd_{which}_kernel", backward) for which in ("q", "kv")]
    return calls


def others() -> list[tuple[str, str]]:
    x, image = zeros("float32", 64, 512), zeros("float32", 2, 3, 8, 8)
    calls = [
        (
            "ddim:_ddim_step_kernel",
            f"ddim_step_fwd({image}, {image}, {uncond}, 1.5, torch.ones(5), {flag}, {flag}, {noise})",
        )
        for uncond, flag in (("None", False), (image, True))
        for noise in ("None, None, None", f"{image}, None, None", "None, torch.tensor(7), torch.arange(2)")
    ]
    for dtype in ("float16", "float32"):
        x = zeros(dtype, 64, 512)
        calls += [
            ("gelu:_gelu_fwd_kernel", f"gelu_fwd({x}, None)"),
            ("gelu:_gelu_bwd_kernel", f"gelu_bwd({x}, {x}, None, False)"),
            ("gelu:_gelu_bwd_kernel", f"gelu_bwd({x}, {x}, torch.{dtype}, True)"),
            ("column_sum:_column_sum_kernel", f"column_sum_fwd({x}, torch.float32, 128, 300)"),
            ("column_sum:_add_partials_kernel", f"column_sum_fwd({x}, torch.{dtype}, 0, 0)"),
        ]
        tables = f"{zeros(dtype, 256)}, {zeros(dtype, 4, 256)}"
        slots = "torch.zeros(4, 2, dtype=torch.int32)"
        places = f"{slots}, torch.tensor([0, 3, 6], dtype=torch.int32)"
        forward = f"scatter_tokens_fwd({zeros(dtype, 6, 256)}, {places}, {tables}, 1)"
        backward = f"scatter_tokens_bwd({zeros(dtype, 10, 256)}, {places}, {tables}, 6, 2)"
        calls += [
            ("tokens:_scatter_tokens_fwd_kernel", forward),
            ("tokens:_scatter_tokens_bwd_kernel", backward),
            ("tokens:_slots_kernel", "token_slots(torch.arange(6), 2, 4, 1)"),
            (
                "positions:_add_positions_fwd_kernel",
                f"add_positions_fwd({zeros(dtype, 6, 256)}, {slots}, {zeros(dtype, 4, 256)})",
            ),
            (
                "positions:_add_positions_bwd_kernel",
                f"add_positions_bwd({zeros(dtype, 6, 256)}, {slots}, torch.{dtype})",
            ),
        ]
    moments = ("float32", 2, 2, 3, 8, 8), ("bfloat16", 2, 2, 4, 32, 32), ("float16", 2, 2, 3, 5, 7)
    calls += [
        ("posterior:_sample_posterior_kernel", f"sample_posterior_fwd({zeros(*shape)}, {seed}, torch.arange(2))")
        for shape in moments
        for seed in (1, 7, 2**62 + 1)
    ]
    return [*calls, ("philox:_random_words_kernel", "random_words_fwd(3, torch.tensor(1), torch.arange(2), 9)")]


CALLS = [*patches(), *norms(), *attention(), *others()]


@pytest.mark.slow  # to be run before time on a GPU is spent, with the triton of that machine
def test_every_variant_compiles():
    sources = [(path.stem, path.read_text()) for path in (ROOT / "kernels" / "triton").glob("*.py")]
    kernels = {f"{stem}:{name}" for stem, text in sources for name in re.findall(r"^def (_\w+_kernel)\(", text, re.M)}
    assert {kernel for kernel, _ in CALLS} == kernels
    counted = run_apart(True, [(count_call, f"umd.kernels.triton.{kernel}", call) for kernel, call in CALLS])
    for (kernel, call), row in zip(CALLS, compile_counted([one for (one,) in counted], ("sm_90",)), strict=True):
        assert not row.note, f"{kernel}: {row.note}"
        assert (row.f64, row.atomics) == (0, 0), f"{kernel} by {call}: fp64, float atomics"
        assert row.spill_bytes == 0, f"{kernel} by {call}: spills"
        assert not row.serialized, f"{kernel} by {call}: matrix products that wait for each other"
