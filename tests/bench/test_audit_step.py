"""`umd bench audit --step`: the whole step without data and without a host's look at the device, and its counts."""

import json
from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode

pytest.importorskip("triton", reason="a GPU's step has Triton's kernels: pip install triton")

from umd.bench.audit_step import (
    CARDS,
    GELU_CHOICES,
    LAUNCH_SECONDS,
    NETWORKS,
    Network,
    block_of,
    record_ours,
    rows_of,
    seconds,
)
from umd.bench.record_step import Call, multi_tensor_launches  # noqa: E402
from umd.cli import main  # noqa: E402
from umd.config import OBJECTIVES, DiffMAEConfig, DiffMAEObjectiveConfig, ModelConfig  # noqa: E402
from umd.methods import build_objective  # noqa: E402
from umd.objective import Objective  # noqa: E402
from umd.schedule import NoiseSchedule  # noqa: E402
from umd.train.run import RunConfig  # noqa: E402
from umd.train.settings import OptimConfig
from umd.train.step_counts import as_on_gpu, labels_of, make_step  # noqa: E402

B = 8
TINY = ModelConfig(image_size=(32, 32), hidden_size=64, depth=2, decoder_depth=1, num_heads=4)
LABELLED = replace(TINY, num_classes=5)
DIFFMAE = DiffMAEConfig(
    image_size=(32, 32), hidden_size=64, depth=1, num_heads=4, decoder_hidden_size=32, decoder_depth=1,
    decoder_num_heads=2,
)  # fmt: skip
STEPS = {
    "UMD with labels": (LABELLED, OBJECTIVES["umd"]),
    "MAE": (replace(TINY, adaLN=False), OBJECTIVES["mae"]),
    "DiT": (LABELLED, OBJECTIVES["dit"]),
    "cross decoder": (replace(TINY, decoder="cross"), replace(OBJECTIVES["umd"], predict_ratio=0.5)),
    "DiffMAE": (DIFFMAE, DiffMAEObjectiveConfig()),
    "fp32 residual": (replace(LABELLED, residual_in_fp32=True), OBJECTIVES["umd"]),
}
# What makes the host wait for the device, or copies from the host's pageable memory, which waits too.
SYNCHRONIZING = {
    "item", "tolist", "numpy", "cpu", "cuda", "nonzero", "equal", "unique", "masked_select", "tensor", "as_tensor",
    "from_numpy", "pin_memory", "__bool__", "__int__", "__float__", "__index__", "__contains__",
}  # fmt: skip


class HostWaits(Exception):
    pass


class NoSynchronization(TorchFunctionMode):
    """Raises where a call would make the host wait. What has no name here, fake tensors refuse: they have no data."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        # A device by name is another; one taken from a tensor (torch's AdamW asks so) is where everything is.
        moves = name == "to" and any(isinstance(x, str) for x in (*args, *(kwargs or {}).values()))
        if name in SYNCHRONIZING or moves:
            raise HostWaits(name)
        if name == "backward":  # one call, during which a mode is off: on again for what autograd calls
            loss = args[0]
            with self:
                return torch.autograd.graph._engine_run_backward(
                    (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
                )
        return func(*args, **(kwargs or {}))


def small_step(model, objective, after=None):
    """Make the second step of a small network as on a GPU; `after` is called with its TrainStep, within the step."""
    optim = OptimConfig(ema=1e-4)
    config = RunConfig(model=model, objective=objective, batch_size=B, optim=optim)
    with as_on_gpu():
        step = make_step(config, B, torch.bfloat16, torch.float32)
        x_start = torch.zeros(B, model.channels, *model.image_size)
        batch = x_start, labels_of(config, B), torch.arange(B), 1e-4
        step(*batch)
        step.load(*batch)
        with NoSynchronization():
            step.run()
            if after is not None:
                after(step)


@pytest.mark.parametrize("name", STEPS)
def test_the_host_never_waits_for_a_step(name):
    """0 host synchronisations from corruption to EMA, and nothing that depends on data."""
    small_step(*STEPS[name])


def test_a_step_that_waits_is_caught():
    waits = (
        lambda metrics: metrics[0].item(),
        lambda metrics: metrics.cpu(),
        lambda metrics: metrics.to("cpu"),
        lambda metrics: float(metrics[0]),
        lambda metrics: metrics.isfinite().all() and None,
        lambda metrics: torch.equal(metrics, metrics),
        lambda metrics: metrics.nonzero(),
        lambda metrics: metrics.copy_(torch.tensor([1.0] * len(metrics))),
    )

    def all_are_caught(step):
        for wait in waits:
            with pytest.raises(HostWaits):
                wait(step.metrics)

    small_step(*STEPS["UMD with labels"], after=all_are_caught)


class WaitingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return dx.cpu()


def test_a_backward_pass_that_waits_is_caught(monkeypatch):
    loss = Objective.loss
    monkeypatch.setattr(Objective, "loss", lambda self, y, *rest: loss(self, WaitingFunction.apply(y), *rest))
    with pytest.raises(HostWaits, match="cpu"):
        small_step(*STEPS["UMD with labels"])


@pytest.mark.parametrize("objective", ["umd", "dit"])
def test_a_block_launches_little_more_than_it_must(objective):
    """Kernels that one encoder block more takes, against the least there can be without fusing further:

                                forward         backward
        two norms               1 each          2 each: rows, then sums over samples
        each product, of five   1               2: dx, dW; adaLN's is one of them, and has a bias gradient of its own
        GELU                    1               2: rows, then the bias gradient's partial sums
        attention               1               2: dq; dk and dv
        qkv's bias gradient                     2

    Today 9 + 23; the least is 9 + 21.
    """
    block = block_of(Network(TINY, OBJECTIVES[objective]), B)
    products, _ = block.launches["products"]
    assert products == 5 and block.launches["norms"] == (2, 4)
    assert block.launches["GELU"] == (1, 2) and block.launches["attention"] == (1, 2)
    least = (2 + products + 1 + 1) + (4 + 2 * products + 1 + 2 + 2 + 2)
    taken = sum(a + b for a, b in block.launches.values())
    assert least <= taken <= 1.15 * least


def test_a_block_moves_what_the_yardstick_says():
    """Rows of D a token, outside of products and attention: norms 20, GELU 20, the bias gradients of queries and
    values 2, at any width but for tables and partial sums."""
    model = replace(TINY, image_size=(64, 64), hidden_size=256)
    block = block_of(Network(model, OBJECTIVES["umd"]), 256)
    rows = {kind: sum(both) for kind, both in block.rows.items()}
    assert 20 <= rows["norms"] <= 21.5
    # Forward 4·D read and written; backward two of them read and one written.
    assert block.rows["GELU"] == (8, pytest.approx(12, abs=0.5))
    assert rows["sums"] == pytest.approx(2, abs=0.3)
    assert rows["copies"] + rows["other"] == pytest.approx(0, abs=0.2)


def outside(block):
    """Rows of D a token, outside of products and attention."""
    return sum(sum(both) for kind, both in block.rows.items() if kind not in ("products", "attention"))


def test_what_else_can_be_done_about_gelu():
    """Its output kept: 43 rows at most, at 256 images. Made again: 4·D written once more, no launch. GELU in products:
    20·D less outside of them, while they move 8 more: GELU's input is written beside its output, and read beside the
    output's gradient."""
    network = NETWORKS["UMD-B/4"]
    kept = block_of(network, 256)
    again, fused = (block_of(replace(network, **changes), 256) for changes in GELU_CHOICES.values())
    assert outside(kept) <= 43 and outside(again) <= 47 and outside(fused) <= 23
    assert again.rows["GELU"] == (8, kept.rows["GELU"][1] + 4) and again.launches == kept.launches
    assert fused.rows["GELU"] == (0, 0) and fused.launches["products"] == kept.launches["products"]
    more = [b - a for a, b in zip(kept.rows["products"], fused.rows["products"], strict=True)]
    assert more == pytest.approx([4, 4], abs=0.3)
    assert all(again.rows[kind] == rows for kind, rows in kept.rows.items() if kind != "GELU")
    assert all(fused.rows[kind] == rows for kind, rows in kept.rows.items() if kind not in ("GELU", "products"))


@pytest.mark.parametrize("changes", GELU_CHOICES.values(), ids=str)
def test_gelus_choices_leave_the_flops(calls, changes):
    other = record_ours(replace(Network(TINY, OBJECTIVES["umd"]), **changes), B)
    assert sum(call.flops for call in other) == sum(call.flops for call in calls)


def test_an_fp32_residual_moves_ten_rows_more():
    """x and r forward, dr, r and dx backward, at each of two norms; no launch more."""
    narrow, wide = (
        block_of(Network(replace(TINY, residual_in_fp32=choice), OBJECTIVES["umd"]), B) for choice in (False, True)
    )
    more = {kind: sum(wide.rows[kind]) - sum(both) for kind, both in narrow.rows.items()}
    assert more.pop("norms") == pytest.approx(10, abs=0.01)
    assert max(map(abs, more.values())) < 0.01 and wide.launches == narrow.launches


@pytest.fixture(scope="module")
def calls() -> list[Call]:
    return record_ours(Network(TINY, OBJECTIVES["umd"]), B)


def test_flops_are_those_of_mfu_but_for_what_it_leaves_out(calls):
    """MFU's three forward passes also count gradients of pictures and of the times' features, which nobody takes; they
    do not count what attention's backward makes again: scores in both of its kernels, and their gradients once more."""
    objective = build_objective(TINY, OBJECTIVES["umd"], NoiseSchedule("cosine"))
    keep = [objective.keep_noised] * (B // 2) + [objective.keep_clean] * (B // 2)
    D, pixels, conditions = TINY.hidden_size, TINY.channels * TINY.patch_size**2, B // 2 + 1
    encoder, decoder = [TINY.num_cls + k for k in keep], [1 + TINY.num_patches] * B
    again = 3 * 2 * D * (TINY.depth * sum(n * n for n in encoder) + TINY.decoder_depth * sum(n * n for n in decoder))
    nobodys = 2 * sum(keep) * pixels * D + 2 * conditions * 256 * D
    assert sum(call.flops for call in calls) == objective.step_flops(B) + again - nobodys


def test_bytes_of_a_product_and_a_norm(calls):
    objective = build_objective(TINY, OBJECTIVES["umd"], NoiseSchedule("cosine"))
    packing = objective.corrupt(B, 0, torch.device("cpu")).layout.encoder
    N, D, rows = packing.num_tokens, TINY.hidden_size, packing.num_rows
    encoder = [call for call in calls if call.part == "encoder" and not call.backward]
    products = [call for call in encoder if call.kind == "products" and not call.fp32]
    qkv, fc1 = products[1], products[3]
    assert qkv.bytes == 2 * (N * D + 3 * D * D + 3 * D + N * 3 * D) and qkv.flops == 2 * N * D * 3 * D
    assert fc1.bytes == 2 * (N * D + 4 * D * D + 4 * D + N * 4 * D) and fc1.flops == 2 * N * D * 4 * D
    norm = [call for call in encoder if call.kind == "norms"][1]  # adds the attention's branch
    tables = 4 * (3 * rows * D + 2 * D)  # gate, shift, scale, and LayerNorm's own affine, in fp32
    statistics, work = 4 * 2 * N, 4 * packing.chunks.numel()
    assert norm.bytes == 2 * 4 * N * D + tables + statistics + work  # x, h, r, y
    assert norm.launches == 1


def test_the_backward_pass_is_told_by_part(calls):
    """Of each part's products the backward pass has two, but of x_embedder's, which has no gradient of the pictures."""
    for part in ("encoder", "decoder", "head"):
        forward, backward = (
            [c for c in calls if c.part == part and c.kind == "products" and c.backward == way] for way in (False, True)
        )
        assert len(backward) == 2 * len(forward) - (part == "encoder")
    names = {c.part for c in calls if not c.backward}
    assert names >= {"corruption", "adaLN", "encoder", "decoder", "head", "loss", "clip", "optimizer", "rest"}
    assert all(c.kind == "update" for c in calls if c.op == "aten._fused_adamw_")


def test_the_roofline_is_the_slowest_of_arithmetic_memory_and_launch():
    gpu = CARDS["a100"]
    call = Call("aten.mm", "products", "encoder", False, 1, 10**6, 10**12, False)
    assert seconds(call, gpu) == 10**12 / gpu.bf16
    assert seconds(call._replace(fp32=True), gpu) == 2 * 10**12 / gpu.bf16  # TF32
    assert seconds(call._replace(flops=0, bytes=10**9), gpu) == 10**9 / gpu.bandwidth
    assert seconds(call._replace(flops=0, bytes=8, launches=3), gpu) == 3 * LAUNCH_SECONDS
    (row,) = rows_of([call, call])
    assert (row.launches, row.bytes, row.flops) == (2, 2 * 10**6, 2 * 10**12)


def test_launches_on_lists_go_by_their_chunks():
    def some(count, size):
        return [torch.empty(size, device="meta") for _ in range(count)]

    def copies(count, size):
        return multi_tensor_launches("_foreach_copy_", (some(count, size), some(count, size)))

    assert copies(1, 320 * 65536) == 1 and copies(1, 320 * 65536 + 1) == 2  # blocks of a launch
    assert copies(64, 8) == 1 and copies(65, 8) == 2  # tensors of a launch, in two lists
    steps = some(37, ())
    assert multi_tensor_launches("_fused_adamw_", (*(some(37, 8) for _ in range(4)), [], steps)) == 2  # in four: 36
    assert multi_tensor_launches("_foreach_lerp_", (some(9, 8), some(9, 8), some(9, ()))) == 9  # shapes differ


def test_the_command_writes_table_rows_and_chart(tmp_path, capsys):
    main(["bench", "audit", "--step", "--models", "UMD-B/4", "--batch", "4", "--json", str(tmp_path / "a.json"),
          "--chart", str(tmp_path / "a.png")])  # fmt: skip
    (step,) = json.loads((tmp_path / "a.json").read_text())
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert {"op", "part", "launches", "bytes", "flops", "us"} <= step["rows"][0].keys()
    assert step["rows"][0]["us"].keys() == CARDS.keys()
    assert step["launches"] == sum(row["launches"] for row in step["rows"])
    assert step["ms"]["a100"] == pytest.approx(sum(row["us"]["a100"] for row in step["rows"]) / 1e3)
    assert 0 < step["mfu"]["h100"] < step["mfu"]["a100"] < 1
    printed = capsys.readouterr().out
    assert "UMD-B/4" in printed and step["other_blocks"].keys() == set(GELU_CHOICES)
    assert "GELU made again" in printed and "GELU in products" in printed


def test_wrong_options_are_a_sentence(capsys):
    for wrong, told in (
        (["--models", "UMD-B4"], "models must be of UMD-B/4, UMD-L/2, DiT-L/2, eager DiT-L/2; got 'UMD-B4'"),
        (["--batch", "1"], "batch 1: must be at least 2"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(["bench", "audit", "--step", *wrong])
        assert exit_.value.code == 2
        assert told in " ".join(capsys.readouterr().err.split())
