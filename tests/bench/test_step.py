"""`umd bench step`: what it writes, and that its numbers are those of the networks it names."""

import io
import json

import pytest
import torch
from rich.console import Console

pytest.importorskip("diffusers", reason="the baseline DiT comes from diffusers: pip install diffusers")
pytest.importorskip("transformers", reason="the baseline MAE comes from transformers: pip install transformers")

from umd.bench.options import StepBench  # noqa: E402
from umd.bench.step import count_flops, run, umd_step  # noqa: E402
from umd.config import ObjectiveConfig, model_config  # noqa: E402
from umd.flops import step_flops  # noqa: E402
from umd.kernels.linear import linear  # noqa: E402
from umd.objective import Objective  # noqa: E402
from umd.schedule import NoiseSchedule  # noqa: E402

NAMES = [
    "umd", "umd unmasked", "umd two passes", "diffusers dit", "dit, our allocator", "transformers vit-mae",
    "matmuls alone",
]  # fmt: skip
KEYS = {"name", "batch", "dtype", "seconds", "images_per_second", "flops", "peak_memory_bytes", "time_ratio"}
KEYS |= {"host_seconds"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Three rounds at a size where a round takes a second: the rows of the file, and what was printed."""
    file = tmp_path_factory.mktemp("bench") / "new" / "step.json"
    console = Console(width=200, file=io.StringIO())
    options = dict(model="UMD-Ti/4", image_size=16, batch=4, repeats=3, dtype="fp32", device="cpu")
    run(StepBench(**options, json=file), console)
    return {row["name"]: row for row in json.loads(file.read_text())}, console.file.getvalue()


@pytest.fixture
def rows(measured):
    return measured[0]


def expected_flops(config: ObjectiveConfig, batch: int) -> int:
    """Forward and backward of UMD-Ti/4 at 16x16 under an objective."""
    model = model_config("UMD-Ti/4", image_size=(16, 16))
    objective = Objective(model, config, NoiseSchedule("cosine"))
    noised, clean = objective.split(batch)
    keep = (objective.keep_noised,) * noised + (objective.keep_clean,) * clean
    return step_flops(model, keep, noised + min(clean, 1))


@pytest.mark.slow
def test_a_row_for_each_step_with_the_documented_keys(rows):
    assert list(rows) == NAMES
    for row in rows.values():
        assert row.keys() >= KEYS
        assert row["batch"] == 4 and row["dtype"] == "fp32" and row["time_ratio"] > 0
        assert row["peak_memory_bytes"] > 1e6  # Linux; elsewhere it is None
        assert row["host_seconds"] is None  # the CPU has no queue
        assert 0 < row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert row["images_per_second"] == pytest.approx(4 / row["seconds"])


@pytest.mark.slow
def test_flops_are_those_of_the_networks(rows):
    whole = ObjectiveConfig(no_noise_prob=0.0, mask_ratio=0.0)
    assert rows["umd"]["flops"] == pytest.approx(expected_flops(ObjectiveConfig(), 4), rel=0.01)
    assert rows["umd unmasked"]["flops"] == pytest.approx(expected_flops(whole, 4), rel=0.01)
    assert rows["umd two passes"]["flops"] == rows["umd"]["flops"] == rows["matmuls alone"]["flops"]


def test_flops_are_counted_where_the_cpu_keeps_gradients_in_bf16():
    bench = StepBench(model="UMD-Ti/4", image_size=16, batch=4, dtype="bf16", device="cpu")
    counted = count_flops(lambda: umd_step(bench, ObjectiveConfig()))
    assert counted == pytest.approx(expected_flops(ObjectiveConfig(), 4), rel=0.01)


@pytest.mark.gpu
@pytest.mark.timeout(300)  # Inductor compiles three networks
def test_on_a_gpu_the_step_is_timed_captured_and_compiled_too():
    rows = run(StepBench(model="UMD-Ti/4", image_size=16, batch=16, repeats=2, device="cuda"), Console(quiet=True))
    assert [row.name for row in rows] == ["umd", "umd, captured", "umd, compiled", *NAMES[1:]]
    assert all(row.host_seconds > 0 for row in rows) and rows[0].flops == rows[1].flops == rows[2].flops


@pytest.mark.slow
def test_the_baselines_have_the_size_of_the_encoder(rows):
    """DiT: 6 blocks of 192 on 16 tokens and adaLN in each; MAE: 6 on 5 tokens, then 8 of 128 on 17. By hand."""

    def blocks(depth: int, tokens: int, dim: int) -> int:  # multiply-adds are two, the backward pass counts twice
        return 3 * 4 * 2 * depth * (12 * dim * dim * tokens + 2 * tokens * tokens * dim)

    dit = blocks(6, 16, 192) + 3 * 4 * 2 * 6 * (6 * 192 * 192)
    mae = blocks(6, 5, 192) + blocks(8, 17, 128)
    for name, by_hand in (("diffusers dit", dit), ("transformers vit-mae", mae)):
        # patches and embeddings on top; attention may be missing where torch's counter does not see it
        assert 0.98 * by_hand < rows[name]["flops"] < 1.2 * by_hand, name


@pytest.mark.slow
def test_the_table_names_every_row(measured):
    printed = measured[1]
    assert all(name in printed for name in NAMES)
    assert "fp32" in printed and f"{torch.get_num_threads()} threads" in printed


def test_only_a_linear_layers_three_products_are_work():
    """Forward, dx and dW of a linear layer: 6·N·I·O, however the gradients are made."""
    x = torch.randn(10, 16, dtype=torch.bfloat16, requires_grad=True)
    for outputs in (48, 16, 8):
        weight = torch.randn(outputs, 16, dtype=torch.bfloat16, requires_grad=True)
        bias = torch.zeros(outputs, dtype=torch.bfloat16, requires_grad=True)

        def step(w=weight, b=bias):
            linear(x, w, b).square().sum().backward()

        assert count_flops(lambda step=step: step) == 6 * 10 * 16 * outputs
