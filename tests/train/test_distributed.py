"""Several ranks are one: DDP and ZeRO against one process, resuming over world sizes, a rank that dies, errors."""

import json
import mmap
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from PIL import Image
from rich.console import Console

from umd.checkpoint import CheckpointError, list_checkpoints, load_checkpoint, save_checkpoint
from umd.config import ClassifierConfig, ClassifierObjectiveConfig, ModelConfig
from umd.errors import TemporaryError, UserError
from umd.methods import build_model
from umd.metrics import FeatureStatistics
from umd.train.classify import open_held_out, score
from umd.train.data import open_dataset
from umd.train.distributed import Watch, World, trace_exchanges
from umd.train.log import NoLog, read_metrics
from umd.train.loop import set_up, train
from umd.train.parallel import DDP, strategy
from umd.train.run import RunConfig, to_plain
from umd.train.saves import BackgroundSave, finished, save_last
from umd.train.settings import DataConfig, OptimConfig, ParallelConfig
from umd.train.spread import spread
from umd.train.weights import load_model

ROOT = Path(__file__).parents[2]
TINY = ModelConfig(image_size=(8, 8), patch_size=2, hidden_size=32, depth=2, decoder_depth=1, num_heads=2)
CLASSIFIER = ClassifierConfig(image_size=(8, 8), patch_size=2, hidden_size=32, depth=2, num_heads=2, num_classes=3)
QUIET = Console(quiet=True)

# What a launcher starts, for several runs one after another in the same processes.
TRAIN_ALL = """
import sys
from pathlib import Path
from rich.console import Console
from umd.train.loop import train
from umd.train.run import read_config
for file in sys.argv[1:]:
    train(read_config(Path(file)), Console(quiet=True))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 images of 3 classes: 20 steps of 16 cross the seams of epochs."""
    folder = tmp_path_factory.mktemp("ranks")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 10, 10, 3), dtype=np.uint8)
    np.savez(folder / "tiny.npz", images=images, labels=np.arange(60) % 3)
    return folder


def tiny(folder: Path, out: str, strategy="auto", stage=2, **changes) -> RunConfig:
    """4 micro-batches of 4 images a step, on labels, with EMA: `accumulate` is for two ranks."""
    return RunConfig(
        **{
            "out": folder / out,
            "model": replace(TINY, num_classes=3),
            "data": DataConfig(source=str(folder / "tiny.npz"), num_workers=0),
            "optim": OptimConfig(lr=0.03, ema=0.9),
            "parallel": ParallelConfig(strategy, stage),
            "batch_size": 16,
            "accumulate": 2,
            "steps": 20,
            "precision": "fp32",
            "device": "cpu",
            "log_every": 1,
            "draw_every": 0,
            **changes,
        }
    )


def as_file(config: RunConfig) -> str:
    file = Path(f"{config.out}.yaml")
    file.write_text(yaml.safe_dump(to_plain(config)))
    return str(file)


def start_ranks(command: list[str], size: int, ranks=None, **options) -> list[subprocess.Popen]:
    """The processes that a launcher would start; `cwd` may be one folder or one a rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    base |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | options.get("env", {})
    cwd = options.get("cwd", ROOT)
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={**base, "RANK": str(rank), "LOCAL_RANK": str(options.get("local", rank))},
            cwd=cwd[rank] if isinstance(cwd, list) else cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (range(size) if ranks is None else ranks)
    ]


def ends(processes: list[subprocess.Popen], timeout=240) -> tuple[list[int], list[str], list[str]]:
    """(exit codes, what each wrote to stdout, to stderr)."""
    try:
        written = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], [out for out, _ in written], [err for _, err in written]


def train_on(size: int, configs: list[RunConfig], **options) -> None:
    codes, _, errors = ends(start_ranks(["-c", TRAIN_ALL, *map(as_file, configs)], size, **options))
    assert codes == [0] * size, errors
    assert "differ from rank 0" not in "".join(errors)  # each save compares the ranks' weights


def column(config: RunConfig, key: str) -> np.ndarray:
    return np.array([row[key] for row in read_metrics(config.out / "metrics.jsonl")])


def wait_for(condition, process: subprocess.Popen, seconds=120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


# Two ranks are one

CASES = {
    "ddp": {"strategy": "ddp"},
    "zero1": {"strategy": "zero", "stage": 1},
    "zero2": {"strategy": "zero", "stage": 2},
    "zero3": {"strategy": "zero", "stage": 3, "checkpointing": True},
}
# In bf16 stage 1 is left out: it does nothing that stage 2 does not do too.
RUNS = [(name, "fp32") for name in CASES] + [(name, "bf16") for name in ("ddp", "zero2", "zero3")]


@pytest.fixture(scope="module")
def runs(folder):
    """Each case on two ranks, and one process with as many micro-batches, in fp32 and bf16."""
    runs = {("one", p): tiny(folder, f"one-{p}", precision=p, accumulate=4) for p in ("fp32", "bf16")}
    for name, precision in RUNS:
        runs[name, precision] = tiny(folder, f"{name}-{precision}", precision=precision, **CASES[name])
    train_on(1, [runs["one", "fp32"], runs["one", "bf16"]])
    builds = folder / "extensions"
    two = [config for (name, _), config in runs.items() if name != "one"]
    train_on(2, two, env={"TORCH_EXTENSIONS_DIR": str(builds)})
    assert not builds.exists(), "DeepSpeed compiled something, which takes a minute"
    return runs


@pytest.mark.parametrize(("name", "precision"), RUNS)
def test_two_ranks_make_the_steps_of_one_process(runs, name, precision):
    one, two = runs["one", precision], runs[name, precision]
    loss, other = column(one, "loss"), column(two, "loss")
    assert len(loss) == 20 and loss[-5:].mean() < loss[:5].mean() - 0.03  # it learns: other weights would show
    assert np.abs(loss - other).max() <= (1e-5 if precision == "fp32" else 2e-3)
    norms, others = column(one, "grad_norm"), column(two, "grad_norm")  # of the whole gradient, before clipping
    assert np.abs(others / norms - 1).max() <= (1e-5 if precision == "fp32" else 2e-2)
    for key in ("step", "images_seen", "lr"):
        assert np.array_equal(column(one, key), column(two, key))

    saved, others = (load_checkpoint(config.checkpoints).tensors for config in (one, two))
    for part in ("model", "ema", "optimizer"):
        assert saved[part].keys() == others[part].keys()
        for key, tensor in saved[part].items():
            assert tensor.shape == others[part][key].shape and tensor.dtype == others[part][key].dtype, key
    for part in ("model", "ema"):
        if precision == "fp32":
            for key, tensor in saved[part].items():
                torch.testing.assert_close(others[part][key], tensor, atol=1e-5, rtol=0, msg=key)
        else:
            flat, other = (torch.cat([t[part][key].flatten() for key in saved[part]]) for t in (saved, others))
            assert (flat - other).norm() <= 1e-2 * flat.norm()


def test_zero_keeps_fixed_positions(folder):
    """Those of MAE, MaskDiT and DiT, which the optimizer has no state for."""
    fixed = replace(TINY, num_classes=3, positions="sincos")
    one = tiny(folder, "one-fixed", model=fixed, steps=8, accumulate=4)
    two = [tiny(folder, f"zero{n}-fixed", "zero", n, model=fixed, steps=8, save_every=4) for n in (2, 3)]
    train(one, QUIET)
    train_on(2, two)
    for config in two:
        shutil.rmtree(config.checkpoints / "step-00000008")
    train_on(2, two)
    whole = load_checkpoint(one.checkpoints).tensors
    for config in two:
        saved = load_checkpoint(config.checkpoints).tensors
        assert torch.equal(saved["model"]["pos_embed"], whole["model"]["pos_embed"])
        assert {part: saved[part].keys() for part in saved} == {part: whole[part].keys() for part in whole}
        assert np.abs(column(one, "loss") - column(config, "loss")).max() <= 1e-5


@pytest.mark.gpu
def test_gradients_sent_in_bf16_are_those_rounded():
    """Of one rank, whose mean is its own gradient."""
    world = World(0, 1, torch.device("cuda"))
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = torch.nn.Linear(8, 8, device="cuda")
        for wire, expected in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            parallel = DDP(model, model, None, 1, 0.0, world, wire)  # held: its hooks go when it goes
            parallel.loss(torch.full((1, 8), 1 / 3, device="cuda")).sum().backward()
            third = torch.full((8, 8), 1 / 3, device="cuda")
            assert torch.equal(model.weight.grad, third.to(expected).float())
            model.zero_grad(set_to_none=True)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("strategy", "message"), [("zero", "parallel.wire bf16 is DDP's"), ("ddp", "is sent by NCCL, between GPUs")]
)
def test_where_gradients_are_not_sent_in_bf16(strategy, message):
    config = RunConfig(parallel=ParallelConfig(strategy, wire="bf16"), device="cpu")
    with pytest.raises(UserError, match=message):
        spread(config, World(0, 2, torch.device("cpu")), build_model(TINY), None, 1e-3, torch.float32)


@pytest.mark.parametrize(("name", "precision"), RUNS)
def test_no_optimizer_step_is_taken_in_secret(runs, name, precision):
    """DeepSpeed's own stage 0 in bf16 takes one before the first, on zero gradients; stage 0 is DDP here."""
    saved = load_checkpoint(runs[name, precision].checkpoints, parts=["optimizer"]).tensors["optimizer"]
    steps = {tensor.item() for key, tensor in saved.items() if key.startswith("step::")}
    assert steps == {20.0}


def test_other_micro_batches_are_the_same_run(folder, runs):
    """And another seed makes another: so the comparisons would notice ranks that drew other noise."""
    other, seeded = tiny(folder, "two-micro-batches", accumulate=2), tiny(folder, "another-seed", seed=1)
    for config, differ in ((other, False), (seeded, True)):
        train(config, QUIET)
        error = np.abs(column(config, "loss") - column(runs["one", "fp32"], "loss")).max()
        assert (error > 1e-3) if differ else (error <= 1e-5)


def test_strategy():
    two, alone = World(0, 2, torch.device("cpu")), World(0, 1, torch.device("cpu"))
    for config, world, weights, expected in (
        (ParallelConfig(), two, 999_999_999, "ddp"),
        (ParallelConfig(), two, 1_000_000_000, "zero"),
        (ParallelConfig("zero"), two, 1, "zero"),
        (ParallelConfig("ddp"), two, 10**10, "ddp"),
        (ParallelConfig("zero", 0), two, 10**10, "ddp"),
        (ParallelConfig("zero", 3), alone, 10**10, "alone"),
    ):
        assert strategy(config, world, weights) == expected


# Checkpoints across world sizes


@pytest.mark.parametrize(
    "places",
    [
        (("zero", 2), ("zero", 3)),
        pytest.param((("ddp", 2), ("zero", 1)), marks=pytest.mark.slow),
        pytest.param((("zero", 3), ("ddp", 2)), marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_two_one_and_four_ranks(folder, runs, places):
    """Steps 1-8 on two ranks, 9-16 on one, 17-20 on four of another stage: the losses of one process throughout."""
    name = "moved-" + "-".join(f"{how}{stage}" for how, stage in places)
    (first, stage), (last, last_stage) = places
    moved = tiny(folder, name, first, stage, save_every=8)

    def forget_after(step: int) -> None:
        for path in list_checkpoints(moved.checkpoints):
            if int(path.name[5:]) > step:
                shutil.rmtree(path)
        assert load_checkpoint(moved.checkpoints, parts=[]).step == step

    train_on(2, [moved])
    forget_after(8)
    train(replace(moved, accumulate=4), QUIET)
    forget_after(16)
    train_on(4, [replace(moved, accumulate=1, parallel=ParallelConfig(last, last_stage))])
    assert column(moved, "step").tolist() == list(range(1, 21))
    assert np.abs(column(moved, "loss") - column(runs["one", "fp32"], "loss")).max() <= 1e-5
    saved, other = (load_checkpoint(c.checkpoints).tensors["ema"] for c in (moved, runs["one", "fp32"]))
    for key, tensor in other.items():
        torch.testing.assert_close(saved[key], tensor, atol=1e-5, rtol=0, msg=key)


def test_ranks_draw_and_score_together(folder):
    """Pictures, a classifier's scores and the Fréchet distance of two ranks, each of which does a share, are those of
    one process: so every rank has the averaged network, whole."""
    changes = dict(steps=6, draw_every=3, accumulate=1)
    cases = [
        tiny(folder, f"draws-{name}", strategy, stage, **changes)
        for name, strategy, stage in (("ddp", "ddp", 0), ("zero-2", "zero", 2), ("zero-3", "zero", 3))
    ]
    cases[0] = replace(cases[0], evaluate_minutes=1e6, evaluate_count=34)  # the end has one
    classifier = tiny(
        folder, "draws-classifier", "ddp", model=CLASSIFIER, optim=OptimConfig(lr=0.03),
        objective=ClassifierObjectiveConfig(), **changes,
    )  # fmt: skip
    linear = replace(classifier, out=folder / "draws-linear", model=replace(CLASSIFIER, linear=True))
    train_on(2, [*cases, classifier, linear])
    alone = replace(cases[0], out=folder / "draws-alone", accumulate=2)
    train(alone, QUIET)
    for config in cases:
        for step in (3, 6):
            for name in ("reconstruction", "denoising", "samples"):
                ours, theirs = (
                    np.asarray(Image.open(c.out / "images" / f"{name}-{step:08d}.png")).astype(int)
                    for c in (config, alone)
                )
                assert ours.shape == theirs.shape and np.abs(ours - theirs).mean() < 0.5, (config.out, name)
    theirs = json.loads(next(alone.out.glob("heads-*.json")).read_text())
    for config in cases:
        ours = json.loads(next(config.out.glob("heads-*.json")).read_text())
        assert ours["pictures"] == theirs["pictures"] and ours["x_start"] == pytest.approx(theirs["x_start"], abs=0.02)
    (distance,) = {name for name in read_metrics(alone.out / "metrics.jsonl")[-1] if name.startswith(("FD", "FID"))}
    ours, theirs = (read_metrics(c.out / "metrics.jsonl")[-1] for c in (cases[0], alone))
    assert ours[distance] == pytest.approx(theirs[distance], rel=1e-2)
    assert (ours["samples"], ours["ddim_steps"], ours["cfg_scale"]) == (34, 50, 1.5)
    (ours,), (theirs,) = (list(c.out.glob("reference-*.safetensors")) for c in (cases[0], alone))
    assert ours.name == theirs.name  # the same pictures, whoever made them
    ours, theirs = FeatureStatistics.load(ours), FeatureStatistics.load(theirs)
    assert ours.count == theirs.count == len(open_dataset(alone.data, "test"))
    torch.testing.assert_close(ours.mean, theirs.mean, atol=1e-4, rtol=1e-4)

    one = replace(classifier, out=folder / "classifier-alone", accumulate=2)
    train(one, QUIET)
    ours, theirs = (json.loads((c.out / "scores.json").read_text()) for c in (classifier, one))
    assert ours["confusion"] == theirs["confusion"] and ours["top-1"] == theirs["top-1"]
    assert np.sum(ours["confusion"]) == ours["images"] > 0

    logged = json.loads((linear.out / "scores.json").read_text())["confusion"]
    saved = score(load_model(linear.out, ema=False), open_held_out(linear), linear.data, torch.float32)
    assert logged == saved.confusion.tolist()  # with the batch norm's moments of both ranks


def test_every_rank_has_the_averaged_network_whole(runs):
    """The EMA of the checkpoint, bit for bit; afterwards the weights are their own again, where they were."""
    code = """
import sys, torch
from pathlib import Path
from umd.checkpoint import load_checkpoint, split
from umd.train.distributed import join
from umd.train.loop import set_up
from umd.train.run import read_config
for file in sys.argv[1:]:
    config = read_config(Path(file))
    world = join("cpu", config.parallel, config.out)
    run = set_up(config, world)
    saved = load_checkpoint(config.checkpoints).tensors
    places = {name: p.data_ptr() for name, p in run.model.named_parameters()}
    for average, part in ((run.ema, "ema"), (None, "model")):
        with run.parallel.averaged(average) as network:
            whole = split(saved[part], network)
            for name, p in network.named_parameters():
                assert torch.equal(p, whole[name]), (file, part, name)
            if config.parallel.strategy == "ddp":  # of a recorded step too
                assert network is run.model
    assert places == {name: p.data_ptr() for name, p in run.model.named_parameters()}
    if config.parallel.strategy == "ddp":
        assert all(torch.equal(p, split(saved["model"], run.model)[name]) for name, p in run.model.named_parameters())
"""
    files = [f"{runs[name, 'fp32'].out}.yaml" for name in ("ddp", "zero2", "zero3")]
    codes, _, errors = ends(start_ranks(["-c", code, *files], 2))
    assert codes == [0, 0], errors


def test_ranks_show_pictures_alike_if_one_lacks_the_vae(vaes, tmp_path):
    """Rank 1 does: its pictures would have another size than those of rank 0, beside which they stand."""
    code = """
import sys, torch
from pathlib import Path
from types import SimpleNamespace
from umd.tokenizer import load_tokenizer
from umd.train.settings import DataConfig
from umd.train.distributed import ParallelConfig, join
from umd.train.monitor import shower
world = join("cpu", ParallelConfig(), Path("unused"))
vae = sys.argv[1]
for missing in (False, True):
    where = "gone" if missing and world.rank == 1 else vae
    data = DataConfig(vae=where, vae_hash=load_tokenizer(vae).vae.sha256, channels=4)
    config = SimpleNamespace(data=data, model=SimpleNamespace(num_classes=0))
    run = SimpleNamespace(world=world, config=config, preview=torch.zeros(8, 4, 6, 6))
    said = []
    shown = shower(run, SimpleNamespace(say=said.append))(torch.zeros(4, 4, 6, 6)).shape
    assert shown == ((4, 6, 6, 3) if missing else (4, 12, 12, 3)), shown
    assert len(said) == missing, said
"""
    codes, _, errors = ends(start_ranks(["-c", code, str(vaes["kl"])], 2))
    assert codes == [0, 0], errors


def test_the_clock_decides_the_same_on_every_rank(folder):
    """Saved and drawn every so many minutes of training."""
    config = tiny(
        folder, "clock", "ddp", steps=12, accumulate=1, save_minutes=1e-6, draw_minutes=1e-6, draw_every=None, keep=99
    )
    train_on(2, [config])
    saved = sorted(path.name for path in (config.out / "checkpoints").iterdir())
    assert len(saved) >= 10 and saved[-1] == "step-00000012"
    assert len(list((config.out / "images").glob("samples-*.png"))) >= 10
    never = replace(config, out=folder / "never", save_minutes=0, draw_minutes=0)
    train(replace(never, accumulate=2), QUIET)
    assert len(list((never.out / "checkpoints").iterdir())) == 1 and not list(never.out.glob("images/*.png"))


def test_the_clock_goes_on_where_a_run_was_stopped(folder):
    """Pictures of every hour of training are drawn, though the run never goes on for one without a stop."""
    config = tiny(folder, "hours", steps=2, accumulate=4, draw_minutes=60, draw_every=None)
    for seconds in (3599.9999, 5000.0, 7199.9999):
        saved = load_checkpoint(train(config, QUIET))
        save_checkpoint(config.checkpoints, saved.step, saved.tensors, saved.state | {"seconds": seconds})
        config = replace(config, steps=config.steps + 2)
    train(config, QUIET)
    drawn = sorted(int(path.stem[-8:]) for path in (config.out / "images").glob("samples-*.png"))
    assert drawn == [2, 3, 4, 6, 7, 8]  # at each end, and where an hour was full


def test_deepspeeds_own_checkpoint_is_refused_by_name(tmp_path):
    (tmp_path / "global_step10").mkdir()
    (tmp_path / "global_step10" / "mp_rank_00_model_states.pt").touch()
    with pytest.raises(CheckpointError, match="DeepSpeed's own files, which fit one number of ranks"):
        load_checkpoint(tmp_path)


# Saving in the background


def test_what_is_saved_in_the_background_is_as_it_was_at_the_call(tmp_path):
    tensor = torch.zeros(1000)
    saves = BackgroundSave()
    for step in range(1, 6):
        tensor += 1
        path = saves.save(tmp_path, step, {"model": {"w": tensor}}, {}, keep=9)
        tensor += 1000  # training goes on at once
        tensor -= 1000
        saves.wait()
        assert torch.equal(load_checkpoint(path).tensors["model"]["w"], torch.full((1000,), float(step)))
    slow = BackgroundSave()
    slow.save(tmp_path, 6, {"model": {"w": tensor}}, {}, keep=9)
    tensor.fill_(-1)
    slow.wait()
    assert load_checkpoint(tmp_path).tensors["model"]["w"][0] == 5


def test_what_a_save_in_the_background_meets_is_raised_by_the_next_call(tmp_path):
    (tmp_path / "file").touch()
    saves = BackgroundSave()
    saves.save(tmp_path / "file", 1, {"model": {"w": torch.zeros(3)}}, {}, keep=1)
    with pytest.raises(CheckpointError, match="Could not write checkpoint"):
        saves.wait()
    saves.check()  # told once
    saves.save(tmp_path / "good", 1, {"model": {"w": torch.zeros(3)}}, {}, keep=1)
    saves.wait()
    assert load_checkpoint(tmp_path / "good").step == 1


def test_one_lost_save_is_told_and_a_second_in_a_row_is_raised(tmp_path):
    (tmp_path / "file").touch()
    saves = BackgroundSave()

    def save(name: str) -> str:
        saves.save(tmp_path / name, 1, {"model": {"w": torch.zeros(3)}}, {}, keep=1)
        return saves.check(wait=True)

    assert saves.check() == "" == save("good")
    saves.save(tmp_path / "last", 1, {"model": {"w": torch.zeros(1 << 20)}}, {}, keep=1)
    saves.linger()
    assert load_checkpoint(tmp_path / "last").step == 1 and saves.check() == ""
    for _ in range(2):
        assert "Could not write checkpoint" in save("file") and save("good") == ""
    assert save("file")
    with pytest.raises(CheckpointError, match="Could not write checkpoint"):
        save("file")


def test_a_rank_that_must_end_waits_for_a_save_that_its_main_thread_waits_for(tmp_path):
    saves = BackgroundSave()
    saves.save(tmp_path, 1, {"model": {"w": torch.zeros(1 << 24)}}, {}, keep=1)
    waiting = threading.Thread(target=saves.wait)
    waiting.start()
    while waiting.is_alive() and not any(tmp_path.iterdir()):
        time.sleep(0.001)
    saves.linger()
    assert load_checkpoint(tmp_path).step == 1
    waiting.join()


def test_a_lost_save_does_not_hide_why_the_run_ends(tmp_path):
    (tmp_path / "file").touch()
    told: list[str] = []

    def ends(error: Exception | None) -> None:
        saves = BackgroundSave()
        with finished(saves, told.append):
            saves.save(tmp_path / "file", 1, {"model": {"w": torch.zeros(3)}}, {}, keep=1)
            if error is not None:
                raise error

    with pytest.raises(KeyError):
        ends(KeyError("another"))
    assert len(told) == 1 and "Could not write checkpoint" in told[0]
    with pytest.raises(CheckpointError, match="Could not write checkpoint"):
        ends(None)


def test_after_a_lost_save_the_last_step_is_still_saved(folder):
    config = tiny(folder, "lost")
    run = set_up(config, World(0, 1, torch.device("cpu")))
    run.background = BackgroundSave()
    run.number = 1
    run.save()
    good = run.saved_path
    run.written()
    away = config.checkpoints.rename(config.out / "away")
    config.checkpoints.touch()  # a file in the folder's place: this save fails
    run.number = 2
    run.save()
    assert "Could not write checkpoint" in run.settle_save() and run.saved_path == good
    run.number = 3
    run.save()
    run.background.linger()
    config.checkpoints.unlink()
    away.rename(config.checkpoints)
    save_last(run, NoLog())
    assert [path.name for path in list_checkpoints(config.checkpoints)] == ["step-00000001", "step-00000003"]


# Ranks that end


def rank_of(launcher: subprocess.Popen, rank: int) -> int:
    """The process id of a rank that `launcher` started."""
    for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
            return int(pid)
    raise AssertionError(f"no rank {rank}")


def test_after_kill_9_of_a_rank_all_end_and_the_run_goes_on(folder):
    straight = tiny(folder, "straight", steps=200)
    train(straight, QUIET)
    killed = replace(straight, out=folder / "killed", accumulate=1, save_every=5)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.Popen(
        [*command, "-m", "umd.cli", "pretrain", as_file(killed)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    wait_for(lambda: len(read_metrics(killed.out / "metrics.jsonl")) >= 12, process)
    os.kill(rank_of(process, 1), signal.SIGKILL)
    out, err = process.communicate(timeout=60)  # within a minute
    assert process.returncode != 0
    told = [line for line in err.splitlines() if line.startswith("umd: ")]
    assert len(told) == 1 and "The same command goes on from the last checkpoint" in told[0], err
    assert out.count("tiny.npz train") == 1  # one rank speaks
    assert load_checkpoint(killed.checkpoints).step >= 5
    for path in list_checkpoints(killed.checkpoints):  # whatever was kept is whole
        load_checkpoint(path)
    train(replace(killed, accumulate=2), QUIET)
    assert column(killed, "step").tolist() == list(range(1, 201))
    assert np.abs(column(killed, "loss") - column(straight, "loss")).max() <= 1e-5


MEET = """
import time
from pathlib import Path
import umd.train.distributed as distributed
from umd.train.distributed import ParallelConfig, join
distributed.BEAT_SECONDS, distributed.GONE_SECONDS = 0.5, 4.0
world = join("cpu", ParallelConfig(), Path("unused"))
world.watch.farewell = lambda: print("finished", flush=True)
print("met", flush=True)
time.sleep(300)
"""


def test_a_rank_that_is_gone_is_noticed_without_an_exchange(folder):
    """As with NCCL, where an exchange with a dead rank waits: rank 0 sleeps while rank 1 is killed."""
    first, second = start_ranks(["-c", MEET], 2)
    assert first.stdout.readline() == second.stdout.readline() == "met\n"
    second.kill()
    codes, out, errors = ends([first], timeout=60)
    assert codes == [1] and out == ["finished\n"]  # what it was writing
    assert f"rank 1 on {socket.gethostname()} is gone; every rank stops" in errors[0]


@pytest.mark.slow
def test_a_host_of_the_store_that_does_not_answer_is_noticed(folder):
    """As after a power cut: nothing closes the connection, and each question to the store waits for its answer."""
    first, second = start_ranks(["-c", MEET], 2)
    assert first.stdout.readline() == second.stdout.readline() == "met\n"
    first.send_signal(signal.SIGSTOP)
    try:
        codes, _, errors = ends([second], timeout=60)
    finally:
        first.kill()
    assert codes == [1] and "rank 1: the host that the ranks met at does not answer" in errors[0]


@pytest.mark.slow
def test_a_pause_of_all_ranks_is_no_missing_heartbeat(folder):
    """As of a suspended job: longer than a rank may be without a heartbeat."""
    ranks = start_ranks(["-c", MEET], 2)
    assert [rank.stdout.readline() for rank in ranks] == ["met\n"] * 2
    try:
        for pause in (signal.SIGSTOP, signal.SIGCONT):
            for rank in ranks:
                rank.send_signal(pause)
            time.sleep(6)
        assert [rank.poll() for rank in ranks] == [None, None]
    finally:
        for rank in ranks:
            rank.kill()


# The ranks have imported everything before they meet, as meeting is an exchange with a short time-out too.
READY = """
import os, time
from pathlib import Path
import umd.train.distributed
def ready(size):
    here = Path(os.environ["MEETING"])
    (here / os.environ["RANK"]).touch()
    while len(list(here.iterdir())) < size:
        time.sleep(0.01)
"""


def test_an_exchange_of_gloo_that_takes_too_long_is_told(tmp_path):
    """Rank 1 sleeps instead."""
    code = (
        READY
        + """
import time, torch
from pathlib import Path
from umd.errors import TemporaryError, UserError
from umd.train.distributed import ParallelConfig, end_all, join
ready(2)
world = join("cpu", ParallelConfig(timeout=3), Path("unused"))
if world.rank == 1:
    time.sleep(300)
try:
    with world.explained():
        world.mean_(torch.ones(3))
except UserError as error:
    end_all(str(error), error.code)
"""
    )
    codes, _, errors = ends(start_ranks(["-c", code], 2, env={"MEETING": str(tmp_path)}), timeout=60)
    assert codes == [75, 1]
    assert (
        errors[0].startswith(f"umd: rank 0 on {socket.gethostname()} lost the others (")
        and "one of them ended or hangs" in errors[0]
    )


NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, {}, NCCL version 2.28.9\n{}\nLast error:\n{}"
)


@pytest.mark.parametrize(
    ("text", "error", "code", "kept"),
    [
        (
            ("invalid usage", "ncclInvalidUsage: usually a mistake", "Duplicate GPU detected : rank 1 and 0"),
            UserError, 1, "NCCL failed (",
        ),
        (
            ("remote process exited", "ncclRemoteError: A call failed", "socketProgress: Connection closed by peer"),
            TemporaryError, 75, "lost the others (",
        ),
        (("unhandled cuda error", "ncclUnhandledCudaError", "Cuda failure 2 'out of memory'"), RuntimeError, None, ""),
    ],
)  # fmt: skip
def test_an_error_of_nccl_keeps_its_reason(text, error, code, kept):
    """The texts are those of C10D_NCCL_CHECK in torch's NCCLUtils.hpp, around what NCCL says."""
    with pytest.raises(error) as caught, World(0, 2, torch.device("cpu")).explained():
        raise dist.DistBackendError(NCCL.format(*text))
    assert kept in str(caught.value) and text[2] in str(caught.value) and getattr(caught.value, "code", None) == code


def test_before_the_ranks_have_met_one_process_of_a_host_tells_its_error(folder):
    command = ["-m", "umd.cli", "pretrain", str(folder / "missing")]
    codes, out, errors = [], [], []
    for rank, local in ((8, 0), (9, 1)):
        [process] = start_ranks(command, 16, ranks=[rank], env={"LOCAL_WORLD_SIZE": "8"}, local=local)
        for known, more in zip((codes, out, errors), ends([process]), strict=True):
            known.extend(more)
    assert codes == [78, 78] and errors[0].startswith(f"umd: on {socket.gethostname()}: ") and not errors[1]


def test_ranks_whose_weights_differ_are_told():
    code = """
from pathlib import Path
import torch
from umd.train.distributed import ParallelConfig, join
from umd.train.parallel import DDP
world = join("cpu", ParallelConfig(timeout=60), Path("unused"))
model = torch.nn.Linear(4, 4)
parallel = DDP(model, model, None, 1, 0.0, world, "fp32")
parallel.check_replicas()
print("equal", flush=True)
if world.rank == 1:
    model.weight.data[2, 3] += 1e-3
parallel.check_replicas()
"""
    codes, out, errors = ends(start_ranks(["-c", code], 2), timeout=120)
    assert codes == [0, 0] and out == ["equal\n"] * 2 and errors[0].count("the weights of ranks 1 differ") == 1


def test_ranks_wait_longer_for_what_one_does_alone_but_not_for_one_that_is_gone(tmp_path):
    """Rank 1 takes twice as long as an exchange of a step may, and is killed the second time."""
    code = (
        READY
        + """
import os, signal, time
from pathlib import Path
from umd.errors import TemporaryError, UserError
from umd.train.distributed import ParallelConfig, end_all, join
ready(2)
world = join("cpu", ParallelConfig(timeout=3), Path("unused"))
try:
    with world.explained():
        for turn in range(2):
            if world.rank == 1:
                time.sleep(6)
                if turn == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
            print(world.collect({"rank": world.rank}), flush=True)
except UserError as error:
    end_all(str(error), error.code)
"""
    )
    codes, out, errors = ends(start_ranks(["-c", code], 2, env={"MEETING": str(tmp_path)}), timeout=60)
    assert codes == [75, -signal.SIGKILL]
    assert out == ["[{'rank': 0}, {'rank': 1}]\n", "[]\n"]
    assert errors[0].startswith(f"umd: rank 0 on {socket.gethostname()} lost the others (")


@pytest.mark.timeout(60)
def test_what_a_time_out_of_nccl_leaves_is_told_once(tmp_path, capfd):
    """Its file appears while the process still lives; one of an earlier time-out says nothing."""
    store = dist.HashStore()
    (tmp_path / "rank_0").write_text("earlier")
    watches = [Watch(store, rank, 2, tmp_path / f"rank_{rank}") for rank in (0, 1)]
    for watch in watches:
        watch.start()
    counts = dist.PrefixStore("umd", store)
    while min(counts.add("beat/0", 0), counts.add("beat/1", 0)) < 1:
        time.sleep(0.01)
    assert capfd.readouterr().err == ""
    (tmp_path / "rank_1").write_text("now")
    while counts.add("told", 0) < 1:
        time.sleep(0.01)
    for watch in watches:
        watch.leaving.set()
        watch.join()
    told = capfd.readouterr().err
    assert told.startswith(f"umd: rank 1 on {socket.gethostname()}: an exchange between GPUs failed or took longer")
    assert told.count("umd: ") == 1 and f"`torchfrtrace {tmp_path}`" in told
    assert Path(sys.executable).with_name("torchfrtrace").exists()  # comes with torch


def test_torch_knows_the_settings_of_its_flight_recorder(tmp_path, monkeypatch):
    environment = {"TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
    monkeypatch.setattr(os, "environ", environment)
    assert trace_exchanges(tmp_path / "nccl", 3, timeout=1800) == tmp_path / "nccl" / "rank_3"
    assert environment["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/nccl/rank_"  # torch appends the rank
    assert environment["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0"  # the user's
    assert environment["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == "1800"
    torch_files = Path(torch.__file__).parent
    headers = torch_files / "include/torch/csrc/distributed/c10d"
    known = (headers / "ProcessGroupNCCL.hpp").read_bytes() + (headers / "FlightRecorder.hpp").read_bytes()
    with open(torch_files / "lib/libtorch_cpu.so", "rb") as file:
        library = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for name in environment:
            assert f'"{name}"'.encode() in known or library.find(f"{name}\0".encode()) >= 0, name


def test_a_file_that_the_user_names_is_the_one_watched(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", {"TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/scratch/trace_"})
    assert trace_exchanges(tmp_path / "nccl", 0, timeout=600) == Path("/scratch/trace_0")
    assert "TORCH_FR_DUMP_TEMP_FILE" not in os.environ and list(tmp_path.iterdir()) == []


def test_the_traces_of_an_earlier_time_out_stay_and_do_not_mix(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    trace_exchanges(tmp_path / "nccl", 0, timeout=600)
    (tmp_path / "nccl" / "rank_7").write_text("of eight ranks")
    monkeypatch.setattr(os, "environ", {})
    trace_exchanges(tmp_path / "nccl", 0, timeout=600)
    (earlier,) = tmp_path.glob("nccl-*")
    assert (earlier / "rank_7").read_text() == "of eight ranks" and list((tmp_path / "nccl").iterdir()) == []


def test_a_signal_to_one_rank_stops_all_at_one_step(folder):
    config = tiny(folder, "stopped", "zero", 2, steps=100_000)
    ranks = start_ranks(["-m", "umd.cli", "pretrain", as_file(config)], 2)
    wait_for(lambda: len(read_metrics(config.out / "metrics.jsonl")) >= 3, ranks[0])
    ranks[1].send_signal(signal.SIGTERM)
    codes, out, errors = ends(ranks)
    assert codes == [143, 143], errors
    saved = load_checkpoint(config.checkpoints)
    assert saved.step == len(read_metrics(config.out / "metrics.jsonl"))
    assert f"stopped by SIGTERM at step {saved.step}; saved {saved.path}" in out[0]
    assert out[1] == "" and errors == ["", ""]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="FIFOs")
def test_ranks_asked_to_stop_while_the_disk_stalls_end_all_and_one_tells(folder, tmp_path):
    """The one that is told to waits for a batch, or in a step for the other."""
    (tmp_path / "source").mkdir()
    for number in range(64):
        picture = np.random.default_rng(number).integers(0, 256, (10, 10, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "source" / f"{number}.png")
    data = DataConfig(source=str(tmp_path / "source"), num_workers=1)
    config = tiny(folder, "stalled", "ddp", data=data, model=TINY, optim=OptimConfig(), steps=100_000)
    ranks = start_ranks(["-m", "umd.cli", "pretrain", as_file(config)], 2)
    wait_for(lambda: len(read_metrics(config.out / "metrics.jsonl")) >= 3, ranks[0])
    for file in (tmp_path / "source").iterdir():
        os.mkfifo(file.with_suffix(".fifo"))
        file.with_suffix(".fifo").rename(file)
    time.sleep(5)
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    codes, _, errors = ends(ranks, timeout=60)
    assert max(codes) == 143 and min(codes) > 0
    assert errors[0] + errors[1] != "" and (errors[0] + errors[1]).count("umd:") == 1
    assert "was asked to stop by SIGTERM, and no batch for" in errors[0] + errors[1]


def test_a_loss_that_is_not_finite_is_told_once_with_the_whole_batch(folder):
    config = tiny(folder, "diverged", optim=OptimConfig(lr=1e30, warmup=0.0), steps=50)
    codes, _, errors = ends(start_ranks(["-m", "umd.cli", "pretrain", as_file(config)], 2))
    assert 0 not in codes
    told = [line for error in errors for line in error.splitlines() if line.startswith("umd: ")]
    assert len(told) == 1 and "not finite at step" in told[0], errors
    dump = json.loads((config.out / "nan-dump.json").read_text())
    assert len(dump["batch_indices"]) == 16 and dump["draws"]["parts"] == 4
    assert list_checkpoints(config.checkpoints) == []


# Mistakes


def test_a_batch_that_does_not_divide_is_told_once(folder):
    command = ["-m", "umd.cli", "pretrain", as_file(tiny(folder, "odd")), "--accumulate", "8"]
    codes, _, errors = ends(start_ranks([*command, "--batch-size", "24"], 2))
    assert codes == [2, 2]
    said = "umd: batch_size 24 is not divisible by 2 ranks x accumulate 8; use a multiple of 16\n"
    assert sorted(errors) == ["", said]


def test_a_mistake_on_one_rank_ends_all_and_is_told_once(folder, tmp_path):
    """The data lie in the first rank's folder only."""
    config = replace(tiny(folder, "here"), data=DataConfig(source="tiny.npz", num_workers=0))
    command = ["-m", "umd.cli", "--local_rank=0", "pretrain", as_file(config)]  # as the deepspeed launcher has it
    codes, _, errors = ends(start_ranks(command, 2, cwd=[folder, tmp_path]))
    assert 0 not in codes and 75 not in codes  # the others lose a rank whose mistake stays
    told = [line for error in errors for line in error.splitlines() if line.startswith("umd: ")]
    assert len(told) == 1 and "data source tiny.npz does not exist" in told[0], errors


def test_an_unknown_option_is_told_once(folder):
    command = ["-m", "umd.cli", "pretrain", as_file(tiny(folder, "option")), "--parallel.strategy", "fsdp"]
    codes, out, errors = ends(start_ranks(command, 2))
    assert codes == [2, 2]
    assert "fsdp" in out[0] + errors[0] and out[1] + errors[1] == ""


def test_a_host_that_does_not_come_is_told(folder):
    config = tiny(folder, "dead-host")
    config = replace(config, parallel=ParallelConfig(timeout=3))
    codes, _, errors = ends(start_ranks(["-m", "umd.cli", "pretrain", as_file(config)], 2, ranks=[0]))
    assert codes == [75]
    assert errors[0].startswith("umd: rank 0 on ") and "not all 2 ranks came" in errors[0]
    assert "a host is down" in errors[0]


def test_a_port_that_is_taken_is_told(folder):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        command = ["-m", "umd.cli", "pretrain", as_file(tiny(folder, "port"))]
        codes, _, errors = ends(start_ranks(command, 2, ranks=[0], env={"MASTER_PORT": port}))
    assert codes == [78]
    assert errors[0].startswith(f"umd: rank 0 cannot wait for the others at 127.0.0.1:{port}, a port that another")
