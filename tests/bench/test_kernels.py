"""`umd bench kernels` on a CPU runs to the end and times nothing; the times of a GPU are plausible."""

import importlib.util
import json
import math

import pytest
import torch

pytest.importorskip("triton", reason="kernels run in Triton's interpreter: pip install triton")

from umd.bench.kernels import attention_case  # noqa: E402
from umd.bench.op_cases import Inputs  # noqa: E402
from umd.cli import main  # noqa: E402

SMALL = "--models UMD-Ti/4 --samples 2 --device cpu"


def test_a_smoke_run_has_every_row_and_no_time(tmp_path, capsys):
    file = tmp_path / "new" / "kernels.json"
    ops = "gated_residual_layer_norm ddim_step varlen_attention varlen_cross_attention mlp"
    main(["bench", "kernels", *SMALL.split(), "--ops", *ops.split(), "--streams", "mixed", "--json", str(file)])
    rows = json.loads(file.read_text())
    found = {(row["op"], row["direction"], row["implementation"]) for row in rows}
    directions = {"forward", "backward", "full"}
    expected = {("gated_residual_layer_norm", d, i) for d in directions for i in ("eager", "torch.compile", "triton")}
    expected |= {("ddim_step", "forward", i) for i in ("eager", "torch.compile", "triton")}
    for attention in ("varlen_attention", "varlen_cross_attention"):
        expected |= {(attention, d, i) for d in directions for i in ("sdpa", "matmul", "torch.compile")}
    mlps = ["eager", "triton", "recompute_gelu", "torch.compile"]
    mlps += ["transformer_engine"] if importlib.util.find_spec("transformer_engine") else []
    expected |= {("mlp", d, i) for d in directions for i in mlps}
    assert found == expected and len(rows) == len(expected)
    for row in rows:
        assert row["ms"] is row["gb_per_s"] is row["of_copy"] is row["tflop_per_s"] is row["replayed"] is None
        assert row["tokens"] == (10 + 1) + (4 + 1) and row["width"] == 192 and row["device"] == "cpu"
    printed = " ".join(capsys.readouterr().out.split())
    assert "Smoke run" in printed and "times none" in printed and "flash_attn" in printed
    assert "mlp: gelu: transformer_engine" in printed


@pytest.mark.slow
def test_a_smoke_run_of_every_op_and_stream(tmp_path):
    file = tmp_path / "kernels.json"
    main(["bench", "kernels", *SMALL.split(), "--json", str(file)])
    rows = json.loads(file.read_text())
    assert {row["stream"] for row in rows} == {"noised", "noise-free"} and len({row["op"] for row in rows}) == 14


def test_attention_counts_every_pair_once():
    inputs = Inputs("UMD-Ti/4", 2, torch.float32, "cpu")  # of 16 patches 10 and 4 are seen, beside one CLS token
    assert attention_case("varlen_attention", inputs)[1] == 4 * 192 * (11 * 11 + 5 * 5)
    assert attention_case("varlen_cross_attention", inputs)[1] == 4 * 192 * (6 * 11 + 12 * 5)


@pytest.mark.parametrize("option", ["--streams half", "--models UMD-B/16", "--samples 1", "--ops norm"])
def test_mistakes_name_the_option(option, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", "kernels", *option.split()])
    assert exit_info.value.code == 2 and option.split()[0][2:] in capsys.readouterr().err


@pytest.mark.gpu
def test_times_on_a_gpu(tmp_path):
    file = tmp_path / "kernels.json"
    options = "--models UMD-L/2 --samples 256 --device cuda --streams noised"
    main(["bench", "kernels", *options.split(), "--json", str(file)])
    rows = json.loads(file.read_text())
    assert {"eager", "torch.compile", "triton"} <= {row["implementation"] for row in rows}
    assert all(row["ms"] > 0 and math.isfinite(row["ms"]) for row in rows)
    # No kernel moves its compulsory bytes much faster than a copy: caches hold little of 80 MB a tensor.
    assert all(row["of_copy"] < 1.3 for row in rows if row["of_copy"] and row["op"].endswith("layer_norm"))
    assert {row["device"] for row in rows} == {torch.cuda.get_device_name()}
    assert all(row["replayed"] for row in rows if row["implementation"] == "triton")
