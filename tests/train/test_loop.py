"""Training: resuming to the bit after kill -9, signals, divergence, what is logged, the clock, a full disk."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from umd.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from umd.config import ModelConfig, ObjectiveConfig, ScheduleConfig
from umd.errors import UserError
from umd.model import UMD
from umd.objective import Objective
from umd.ops import attention_backend
from umd.schedule import NoiseSchedule
from umd.train.data import open_dataset, train_loader
from umd.train.diverged import Diverged
from umd.train.log import read_metrics
from umd.train.loop import derive_seed, train
from umd.train.optim import lr_scale
from umd.train.run import RunConfig, to_plain
from umd.train.settings import DataConfig, OptimConfig, ParallelConfig
from umd.train.weights import load_model

ROOT = Path(__file__).parents[2]
TINY = ModelConfig(image_size=(8, 8), patch_size=2, hidden_size=32, depth=1, decoder_depth=1, num_heads=2)
QUIET = Console(quiet=True)


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """60 images of 3 classes, so that 40 steps of 8 cross the seams of epochs."""
    rng = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(file, images=rng.integers(0, 256, (60, 10, 10, 3), dtype=np.uint8), labels=np.arange(60) % 3)
    return file


@pytest.fixture
def tiny(tmp_path, source):
    """A run of 8 images a step that writes to `tmp_path / "run"`, with changes."""

    def make(out="run", model=TINY, data=None, optim=None, **changes) -> RunConfig:
        return RunConfig(
            **{
                "out": tmp_path / out,
                "model": model,
                "data": DataConfig(source=str(source), num_workers=0, **(data or {})),
                "optim": OptimConfig(lr=0.03, **(optim or {})),
                "batch_size": 8,
                "steps": 6,
                "precision": "fp32",
                "log_every": 1,
                "draw_every": 0,
                **changes,
            }
        )

    return make


def start(config: RunConfig, prefix: tuple[str, ...] = ("nice",)) -> subprocess.Popen:
    """`umd pretrain config.yaml` in a process group of its own, as in a terminal; niced, so tests see each step."""
    file = Path(f"{config.out}.yaml")
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(to_plain(config)))
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "umd.cli", "pretrain", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        start_new_session=True,
    )


def wait_for(process: subprocess.Popen, condition, seconds=240) -> None:
    """Until `condition()`, looked at as often as possible."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended before it could be stopped: {process.communicate()}"
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.0005)


def logged_step(config: RunConfig) -> int:
    rows = read_metrics(config.out / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def losses(config: RunConfig) -> list[tuple]:
    keys = (
        "step",
        "images_seen",
        "epoch",
        "loss",
        "loss_noised_eps",
        "loss_noised_x0",
        "loss_clean",
        "grad_norm",
        "lr",
    )
    return [tuple(row[key] for key in keys) for row in read_metrics(config.out / "metrics.jsonl")]


def assert_same_run(a: RunConfig, b: RunConfig, parts: set[str]) -> None:
    """The same bytes in the last checkpoints, the same rows in the logs."""
    one, other = (list_checkpoints(config.checkpoints)[-1] for config in (a, b))
    assert one.name == other.name
    assert {file.name for file in one.iterdir()} == {f"{part}.safetensors" for part in parts} | {"state.json"}
    for part in parts:
        assert (one / f"{part}.safetensors").read_bytes() == (other / f"{part}.safetensors").read_bytes(), part
    assert losses(a) == losses(b)


# Resuming


@pytest.mark.slow  # two ranks are killed in test_distributed
def test_kill_9_between_saves_then_resume_is_the_run_never_stopped(tiny):
    """Workers, one micro-batch; killed some steps after the last save, which are done again."""
    straight = tiny("straight", steps=40, data={"area_min": 0.3}, save_every=5)
    straight = replace(straight, data=replace(straight.data, num_workers=2))
    train(straight, QUIET)
    assert [row[0] for row in losses(straight)] == list(range(1, 41))

    killed = replace(straight, out=straight.out.with_name("killed"))
    process = start(killed)
    wait_for(process, lambda: logged_step(killed) >= 17)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    reached, saved = logged_step(killed), load_checkpoint(killed.checkpoints, parts=[]).step
    assert saved >= 15 and saved % 5 == 0 and reached - saved <= 6  # one more may be done and not yet saved
    train(killed, QUIET)
    assert_same_run(straight, killed, {"model", "optimizer"})


def test_kill_9_during_a_save_then_resume_is_the_run_never_stopped(tiny):
    """Fine-tuning on labels, EMA, two micro-batches, bf16; stopped twice, each time half-way through a checkpoint."""
    straight = tiny(
        "straight", steps=20, model=replace(TINY, num_classes=3), accumulate=2, optim={"ema": 0.1}, precision="bf16",
        objective=ObjectiveConfig(no_noise_prob=0.25, class_dropout_prob=0.3), save_every=1, keep=2,
    )  # fmt: skip
    train(straight, QUIET)

    killed = replace(straight, out=straight.out.with_name("killed"))
    interrupted = 0
    for step in (7, 13):
        process = start(killed)
        wait_for(process, lambda step=step: any(killed.checkpoints.glob(f"step-{step:08d}")))
        wait_for(process, lambda: any(killed.checkpoints.glob(".unfinished-step-*")))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.communicate()
        interrupted += any(killed.checkpoints.glob(".unfinished-step-*"))
        assert load_checkpoint(killed.checkpoints).step >= step  # whole, checksums and all
    assert interrupted, "no kill came in the middle of a save"
    train(killed, QUIET)
    assert_same_run(straight, killed, {"model", "optimizer", "ema"})
    assert sorted(path.name for path in killed.checkpoints.iterdir()) == ["step-00000019", "step-00000020"]


def test_workers_change_nothing(tiny):
    runs = [tiny(f"workers{n}") for n in (0, 2)]
    runs[1] = replace(runs[1], data=replace(runs[1].data, num_workers=2))
    for config in runs:
        train(config, QUIET)
    assert_same_run(*runs, {"model", "optimizer"})


def test_a_finished_run_started_again_is_left_as_it_is(tiny):
    config = tiny()
    path = train(config, QUIET)
    before = {file: file.read_bytes() for file in path.iterdir()}
    assert train(config, QUIET) == path
    assert before == {file: file.read_bytes() for file in path.iterdir()}
    assert [row[0] for row in losses(config)] == [1, 2, 3, 4, 5, 6]


def test_the_last_checkpoints_are_kept(tiny):
    config = tiny(steps=7, save_every=2, keep=2)
    train(config, QUIET)
    assert [path.name for path in list_checkpoints(config.checkpoints)] == ["step-00000006", "step-00000007"]
    train(
        replace(config, steps=13, keep_hours=1e-9), QUIET
    )  # each save is in another of such hours than the one before
    assert [load_checkpoint(path, parts=[]).step for path in list_checkpoints(config.checkpoints)] == [7, 8, 10, 12, 13]


def test_a_closed_pipe_ends_no_run(tiny):
    """`umd pretrain … | tee log`, and tee is killed."""
    config = tiny(steps=3)
    process = start(config)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 0 and load_checkpoint(config.checkpoints, parts=[]).step == 3


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)]
)
def test_a_signal_saves_says_how_to_go_on_and_ends(tiny, number, code):
    """Also where it comes to every process, as from Slurm: first those that prepare pictures, then the group."""
    config = tiny(steps=100_000)
    config = replace(config, data=replace(config.data, num_workers=2))
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the run would inherit that it is ignored, as under nohup
    process = start(config)
    signal.signal(signal.SIGHUP, before)
    wait_for(process, lambda: logged_step(config) >= 3)
    for worker in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(worker), number)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    saved = load_checkpoint(config.checkpoints)
    assert saved.step == logged_step(config) >= 3
    assert f"stopped by {number.name} at step {saved.step}; saved {saved.path}; run the same command to go on" in out
    assert err == ""
    longer = replace(config, steps=saved.step + 2, data=replace(config.data, num_workers=0))
    train(longer, QUIET)
    assert [row[0] for row in losses(config)] == list(range(1, saved.step + 3))


# Divergence


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tiny):
    good = tiny(steps=5, save_every=5)
    kept = train(good, QUIET)
    # As if the run had this rate from its start: resuming with another is refused.
    saved = load_checkpoint(kept)
    saved.state["config"]["optim"]["lr"] = 1e30
    save_checkpoint(good.checkpoints, 5, saved.tensors, saved.state)
    before = {file.name: file.read_bytes() for file in kept.iterdir()}
    with pytest.raises(Diverged) as caught:
        # Step 7 is a save, and not logged: its weights must be looked at before they are written.
        train(replace(good, steps=20, optim=replace(good.optim, lr=1e30), save_every=7, log_every=100), QUIET)
    dump = json.loads((good.out / "nan-dump.json").read_text())
    assert dump["step"] == 7  # the update of step 6 ruined the weights
    assert f"not finite at step {dump['step']}" in str(caught.value) and str(kept) in str(caught.value)
    assert dump["last_good_checkpoint"] == str(kept)
    assert {file.name: file.read_bytes() for file in kept.iterdir()} == before
    assert list_checkpoints(good.checkpoints) == [kept]
    assert load_checkpoint(kept).step == 5 and load_model(good.out)
    assert not any(math.isnan(row["loss"]) for row in read_metrics(good.out / "metrics.jsonl"))

    (good.out / "nan-dump.json").unlink()
    (good.out / "nan-dump.json").mkdir()  # a disk that does not take it
    with pytest.raises(Diverged, match="not finite at step 7 .*nan-dump.json, the record of the batch, could not be"):
        train(replace(good, steps=20, optim=replace(good.optim, lr=1e30), save_every=7, log_every=100), QUIET)

    # The dump tells which images and which noise: what the loader and the objective give for them.
    seed = derive_seed(good.seed, 1)
    loader = train_loader(open_dataset(good.data, "train"), good.data, batch_size=8, seed=seed, start=6 * 8)
    assert dump["batch_indices"] == next(loader).indices.tolist()
    assert dump["draws"] == {"seed": derive_seed(good.seed, 2), "step": 6, "parts": 1}


def test_weights_that_the_last_step_ruined_are_not_saved(tiny):
    config = tiny(steps=2)
    config = replace(config, optim=replace(config.optim, lr=1e300))
    with pytest.raises(Diverged, match="weights are not finite after step 2 and are not saved"):
        train(config, QUIET)
    assert list_checkpoints(config.checkpoints) == []
    model = UMD(TINY)
    with torch.no_grad():
        model.head.weight[0, 0] = math.nan
    path = save_checkpoint(
        config.checkpoints, 1, {"model": dict(model.named_parameters())}, {"config": {"model": to_plain(TINY)}}
    )
    with pytest.raises(UserError, match=f"{path.name} holds weights that are NaN or infinite"):
        load_model(config.out)


def test_infinite_weights_stop_at_the_first_step(tiny, tmp_path):
    model = UMD(TINY)
    with torch.no_grad():
        model.head.weight[0, 0] = math.inf
    tensors = {"model": dict(model.named_parameters())}
    init = save_checkpoint(tmp_path / "init", 0, tensors, {"config": {"model": to_plain(TINY)}})
    config = tiny(init=init, accumulate=2)
    with pytest.raises(Diverged, match="at step 1 .*last good checkpoint: none"):
        train(config, QUIET)
    dump = json.loads((config.out / "nan-dump.json").read_text())
    assert len(dump["batch_indices"]) == 8 and dump["draws"]["parts"] == 2
    assert dump["last_good_checkpoint"] is None and list_checkpoints(config.checkpoints) == []


# Other settings in the same folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": replace(TINY, depth=2)}, "model.depth 1, not 2"),
        ({"model": replace(TINY, num_heads=4)}, "model.num_heads 2, not 4"),  # changes no shape
        ({"model": replace(TINY, image_size=(4, 16))}, r"image_size \[8, 8\], not \[4, 16\]"),  # neither does this
        ({"model": replace(TINY, hidden_size=48, adaLN=False)}, "hidden_size 32, not 48; model.adaLN True, not False"),
        ({"model": replace(TINY, num_classes=3)}, "model.num_classes 0, not 3"),
        ({"objective": ObjectiveConfig(no_noise_prob=0.25)}, "objective.no_noise_prob 0.5, not 0.25"),
        ({"schedule": ScheduleConfig("linear")}, "schedule.name cosine, not linear"),
        ({"optim": OptimConfig(lr=0.01)}, "optim.lr 0.03, not 0.01"),
        ({"optim": OptimConfig(lr=0.03, ema=1e-3)}, "optim.ema 0.0, not 0.001"),
        ({"batch_size": 16, "seed": 4}, "batch_size 8, not 16; seed 0, not 4"),
        ({"init": Path("another/run")}, "init None, not another/run"),
    ],
)
def test_resuming_with_settings_of_another_run_is_refused_by_name(tiny, changes, said):
    config = tiny(steps=1)
    path = train(config, QUIET)
    before = {file: file.read_bytes() for file in (config.out / "config.yaml", config.out / "metrics.jsonl")}
    with pytest.raises(UserError, match=said) as caught:
        train(replace(config, steps=2, **changes), QUIET)
    assert str(caught.value).startswith(f"{config.out} holds a run with ") and "\n" not in str(caught.value)
    assert f"another --out for a new run (--init {config.out} starts that from its weights)" in str(caught.value)
    assert before == {file: file.read_bytes() for file in before}
    assert list_checkpoints(config.checkpoints) == [path] and load_model(config.out).config == TINY
    train(replace(config, steps=2), QUIET)  # nothing was changed


def test_an_ema_left_open_is_that_of_the_run(tiny):
    """A run with labels that began without an EMA, when that was the default."""
    config = tiny(steps=1, model=replace(TINY, num_classes=3), optim={"ema": 0.0})
    train(config, QUIET)
    left_open = replace(config, steps=2, optim=replace(config.optim, ema=None))
    assert left_open.ema > 0
    assert not (train(left_open, QUIET) / "ema.safetensors").exists()
    assert (train(replace(left_open, out=config.out / "new"), QUIET) / "ema.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"area_min": 0.5}, "data.area_min 0.8, not 0.5"),
        ({"hflip": False, "holdout": 0.3}, "data.hflip True, not False; data.holdout 0.2, not 0.3"),
        ({"source": "other.npz"}, "data.source .*tiny.npz, not .*other.npz, which holds other pictures"),
    ],
)
def test_resuming_with_other_data_is_refused_by_name(tiny, tmp_path, changes, said):
    with np.load(tiny().data.source) as arrays:
        np.savez(tmp_path / "other.npz", images=arrays["images"], labels=arrays["labels"][::-1])
    if "source" in changes:
        changes = {"source": str(tmp_path / changes["source"])}
    config = tiny(steps=1)
    train(config, QUIET)
    with pytest.raises(UserError, match=said):
        train(replace(config, steps=2, data=replace(config.data, **changes)), QUIET)


def test_what_leaves_the_run_as_it_is_may_change(tiny, tmp_path):
    """Its length, what it keeps and shows, who computes and reads, and where the same pictures lie."""
    straight = tiny("straight", steps=6)
    train(straight, QUIET)
    config = tiny(steps=6, save_every=3, optim={"fused": "torch"})
    train(config, QUIET)
    shutil.rmtree(list_checkpoints(config.checkpoints)[-1])
    moved = tmp_path / "moved" / "tiny.npz"
    moved.parent.mkdir()
    shutil.copy(config.data.source, moved)
    data = replace(config.data, source=str(moved), num_workers=1, skip_broken=True, loader="python")
    changed = replace(
        config, data=data, save_every=2, keep=1, log_every=3, draw_every=4, device="cpu", checkpointing=True,
        attention="matmul", parallel=ParallelConfig("zero", 3), optim=replace(config.optim, fused="auto"),
    )  # fmt: skip
    train(changed, QUIET)
    ours, theirs = (load_checkpoint(c.checkpoints).tensors["model"] for c in (changed, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for length in ({"steps": 7}, {"steps": 0, "epochs": 1.5}, {"steps": 0, "minutes": 5e-3}):
        before = load_checkpoint(config.checkpoints, parts=[])
        longer = load_checkpoint(train(replace(changed, **length), QUIET), parts=[])
        assert longer.step > before.step or longer.state["seconds"] >= 60 * 5e-3


def test_a_run_by_the_clock_goes_on_when_it_gets_more_time(tiny):
    config = tiny(steps=0, minutes=0.01)
    train(config, QUIET)
    first = load_checkpoint(config.checkpoints, parts=[])
    more = first.state["seconds"] / 60 + 0.01  # a single step may have outlasted any fixed time
    train(replace(config, minutes=more), QUIET)
    second = load_checkpoint(config.checkpoints, parts=[])
    assert second.step > first.step and 0.6 <= first.state["seconds"] < 60 * more <= second.state["seconds"]


def test_pictures_that_came_to_the_source_are_told(tiny, tmp_path, capsys):
    source = tmp_path / "pictures.npy"
    images = np.random.default_rng(0).integers(0, 256, (40, 10, 10, 3), dtype=np.uint8)
    np.save(source, images)
    config = tiny(steps=1)
    config = replace(config, data=replace(config.data, source=str(source), holdout=0.0))
    train(config, QUIET)
    np.save(source, images[:30])
    train(replace(config, steps=2), Console(width=200))
    assert "pictures.npy changed: the run had 40 pictures there and now has 30" in capsys.readouterr().out


def test_a_started_run_no_longer_needs_what_it_started_from(tiny):
    first = tiny("first", steps=1)
    train(first, QUIET)
    second = tiny("second", steps=1, init=first.out)
    train(second, QUIET)
    shutil.rmtree(first.out)
    assert train(replace(second, steps=2), QUIET).name == "step-00000002"


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(tiny):
    config = tiny(steps=4, save_every=2)
    train(config, QUIET)
    first, second = list_checkpoints(config.checkpoints)
    (second / "model.safetensors").write_bytes(b"half")
    with pytest.warns(UserWarning, match="Skipped: .*has 4 bytes where"):
        train(config, QUIET)  # from the one before, which makes the second again
    weights = (second / "model.safetensors").read_bytes()
    (second / "model.safetensors").write_bytes(bytes(reversed(weights)))
    with pytest.warns(UserWarning, match="Skipped: .*step-00000004.* differs from its checksum"):
        train(config, QUIET)
    assert (second / "model.safetensors").read_bytes() == weights
    for path in (first, second):
        (path / "state.json").unlink()
    log = (config.out / "metrics.jsonl").read_bytes()
    with pytest.warns(UserWarning, match="has no state.json"), pytest.raises(UserError, match="gone on from") as caught:
        train(config, QUIET)
    assert "another --out to train from the start" in str(caught.value) and "\n" not in str(caught.value)
    shutil.rmtree(config.checkpoints)
    (config.checkpoints / "global_step10").mkdir(parents=True)
    (config.checkpoints / "global_step10" / "mp_rank_00_model_states.pt").touch()
    with pytest.raises(UserError, match="DeepSpeed's own files, which fit one number of ranks"):
        train(config, QUIET)
    assert (config.out / "metrics.jsonl").read_bytes() == log


def test_starting_from_another_network_is_refused_by_name(tiny):
    first = tiny("first", steps=1)
    train(first, QUIET)
    for model, said in (
        (replace(TINY, num_heads=4), "num_heads 2, not 4"),
        (replace(TINY, num_cls=2), "num_cls 1, not 2"),
    ):
        with pytest.raises(UserError, match=said):
            train(tiny("second", model=model, init=first.out), QUIET)


def test_fine_tuning_starts_from_the_weights_and_adds_label_embeddings(tiny):
    first = tiny("first", steps=2)
    train(first, QUIET)
    second = tiny("second", steps=1, model=replace(TINY, num_classes=3), init=first.out, optim={"warmup": 0.5})
    train(second, QUIET)  # one step, at a rate of 0: the weights stay
    before, after = load_model(first.out).state_dict(), load_model(second.out).state_dict()
    assert {name for name in after if name not in before} == {"y_embedder.embedding_table.weight"}
    assert after["y_embedder.embedding_table.weight"].shape == (4, 32)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_as_many_classes_as_the_data_have(tiny):
    with pytest.raises(UserError, match="the model has 5 classes but tiny.npz has 3"):
        train(tiny(model=replace(TINY, num_classes=5)), QUIET)


# What a step is


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_loss_and_gradient_are_those_of_the_whole_batch(tiny, accumulate):
    """Whatever the micro-batches. At the first two steps the weights are the initial ones: the rate starts at 0."""
    share = ObjectiveConfig(no_noise_prob=0.4)  # 3 of 8 samples: micro-batches differ
    config = tiny(steps=2, accumulate=accumulate, optim={"warmup": 0.5, "clip": 0.0}, seed=3, objective=share)
    train(config, QUIET)
    torch.manual_seed(derive_seed(3, 0))
    model = UMD(TINY)
    objective = Objective(TINY, config.objective, NoiseSchedule("cosine"))
    loader = train_loader(open_dataset(config.data, "train"), config.data, batch_size=8, seed=derive_seed(3, 1))
    for step, row in enumerate(read_metrics(config.out / "metrics.jsonl")):
        x = next(loader).x_start
        total, parts = objective(model, x, objective.corrupt(8, derive_seed(3, 2), x.device, step=step))
        gradients = torch.autograd.grad(total, list(model.parameters()))
        norm = torch.stack([g.norm() for g in gradients]).norm()
        assert row["loss"] == pytest.approx(total.item(), rel=1e-5)
        names = ("loss_noised_eps", "loss_noised_x0", "loss_clean")
        assert [row[name] for name in names] == pytest.approx(parts.tolist(), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_the_same_settings_give_the_same_run_and_another_seed_another(tiny):
    a, b, c = tiny("a"), tiny("b"), tiny("c", seed=1)
    for config in (a, b, c):
        train(config, QUIET)
    assert_same_run(a, b, {"model", "optimizer"})
    assert losses(a) != losses(c)


def test_recomputed_activations_change_nothing(tiny):
    plain, recomputed = tiny("plain", accumulate=2), tiny("recomputed", accumulate=2, checkpointing=True)
    for config in (plain, recomputed):
        train(config, QUIET)
    assert_same_run(plain, recomputed, {"model", "optimizer"})


@pytest.mark.slow
def test_the_attention_backend_is_the_one_asked_for(tiny):
    """SDPA's losses are those of the CPU's own path; a backend that cannot run here is one sentence."""
    for attention in ("auto", "sdpa"):
        train(tiny(out=attention, attention=attention), QUIET)
    ours, sdpa = ([row[3] for row in losses(tiny(out=name))] for name in ("auto", "sdpa"))
    assert sdpa == pytest.approx(ours, rel=1e-4) and len(ours) > 0
    with pytest.raises(UserError, match="^attention backend: varlen_attn takes bf16 and fp16, not float32"):
        train(tiny(attention="varlen_attn"), QUIET)
    with pytest.raises(UserError, match="attention triton is for self-attention, which decoder cross goes beyond"):
        train(tiny(model=replace(TINY, decoder="cross"), attention="triton"), QUIET)
    assert attention_backend(torch.device("cpu"), torch.float32, 16).name == "matmul"  # of this process, as before


def test_gelu_in_the_products_is_refused_at_the_start_where_it_cannot_be(tiny):
    with pytest.raises(UserError, match="^gelu: transformer_engine takes bf16 and fp16, not float32; 'ours' runs"):
        train(tiny(gelu="transformer_engine"), QUIET)
    with pytest.raises(
        UserError, match="^recompute_gelu goes with gelu ours; transformer_engine keeps what GELU gives"
    ):
        tiny(gelu="transformer_engine", recompute_gelu=True)


@pytest.mark.parametrize("precision, tolerance", [pytest.param("fp32", 1e-3, marks=pytest.mark.slow), ("bf16", 2e-2)])
def test_compiled_training_gives_the_same_losses(tiny, precision, tolerance):
    plain, compiled = tiny("plain", precision=precision), tiny("compiled", precision=precision, compile=True)
    for config in (plain, compiled):
        train(config, QUIET)
    for a, b in zip(losses(plain), losses(compiled), strict=True):
        assert a == pytest.approx(b, rel=tolerance)
    assert load_model(compiled.out)  # the names in the checkpoint are the plain network's


def test_clipping_bounds_the_update(tiny):
    """With a huge gradient scale AdamW's first moment still sees a norm of `clip`: (1 - b1)·g after one step."""
    config = tiny(steps=1, optim={"clip": 1e-3})
    saved = load_checkpoint(train(config, QUIET))
    assert read_metrics(config.out / "metrics.jsonl")[0]["grad_norm"] > 0.1  # before clipping
    moments = [t for name, t in saved.tensors["optimizer"].items() if name.startswith("exp_avg::")]
    norm = torch.stack([m.norm() for m in moments]).norm() / (1 - config.optim.betas[0])
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_the_average_is_saved_drawn_and_loaded(tiny):
    config = tiny(steps=3, optim={"ema": 0.99, "warmup": 0.0})
    saved = load_checkpoint(train(config, QUIET))
    assert saved.tensors["ema"].keys() == saved.tensors["model"].keys()
    assert torch.equal(load_model(config.out).head.weight, saved.tensors["ema"]["head.weight"])
    assert torch.equal(load_model(config.out, ema=False).head.weight, saved.tensors["model"]["head.weight"])
    assert not torch.equal(saved.tensors["ema"]["head.weight"], saved.tensors["model"]["head.weight"])


# What is written


def test_rows_and_tensorboard_say_the_same(tiny):
    config = tiny(steps=6, log_every=2, accumulate=2, seed=5)
    train(config, QUIET)
    rows = read_metrics(config.out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6]
    keys = {"step", "images_seen", "epoch", "seconds", "loss", "loss_noised_eps", "loss_noised_x0", "loss_clean"}
    keys |= {"lr", "grad_norm", "images_per_second", "mfu", "peak_memory_bytes"}
    count = len(open_dataset(config.data, "train"))
    for row in rows:
        assert row.keys() == keys and all(math.isfinite(value) for value in row.values())
        assert row["images_seen"] == 8 * row["step"] and row["epoch"] == 8 * row["step"] / count
        # Half of the batch noised, where the loss is the mean of its two parts; the other half noise-free.
        noised = (row["loss_noised_eps"] + row["loss_noised_x0"]) / 2
        assert row["loss"] == pytest.approx((noised + row["loss_clean"]) / 2, rel=1e-5)
        assert row["images_per_second"] > 0 and row["mfu"] > 0
        assert row["lr"] == pytest.approx(0.03 * 8 / 256 * lr_scale((row["step"] - 1) / 6, 0.05))
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)

    board = EventAccumulator(str(config.out / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == keys - {"step", "seconds"}
    for key in ("loss", "lr", "grad_norm"):
        assert [(event.step, event.value) for event in board.Scalars(key)] == [
            (row["step"], pytest.approx(row[key], rel=1e-6)) for row in rows
        ]


def test_wandb_has_one_run_a_folder(tiny, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for steps in (2, 4):
        train(tiny(wandb="umd-tests", steps=steps), QUIET)
    runs = list((tiny().out / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == 2 and len({run.name for run in runs}) == 1 and wandb.run is None


def test_wandb_that_is_not_there_is_named(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb, or leave out --wandb"):
        train(tiny(wandb="umd-tests"), QUIET)


def test_tensorboard_of_a_resumed_run_has_each_step_once(tiny):
    config = tiny(steps=6, save_every=4)
    train(config, QUIET)
    for path in list_checkpoints(config.checkpoints)[1:]:  # as if killed after step 6 and before its save
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    train(config, QUIET)
    board = EventAccumulator(str(config.out / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [row[0] for row in losses(config)] == [1, 2, 3, 4, 5, 6]


def test_a_line_cut_short_by_a_kill_is_dropped(tiny):
    config = tiny(steps=3)
    train(config, QUIET)
    with (config.out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    train(replace(config, steps=5), QUIET)
    assert [row[0] for row in losses(config)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("r0", "classes", "names"),
    [
        (0.5, 0, {"reconstruction", "denoising"}),
        (1.0, 0, {"reconstruction"}),  # never saw noise
        (0.0, 0, {"denoising"}),  # never saw an image without
        (0.5, 3, {"reconstruction", "denoising", "samples"}),
    ],
)
def test_pictures_are_drawn_during_the_run_and_at_its_end(tiny, r0, classes, names):
    config = tiny(
        steps=3, draw_every=2, objective=ObjectiveConfig(no_noise_prob=r0), model=replace(TINY, num_classes=classes)
    )
    train(config, QUIET)
    pictures = {file.name for file in (config.out / "images").iterdir()}
    assert pictures == {f"{name}-{step:08d}.png" for name in names for step in (2, 3)}
    for name in names - {"samples"}:  # masked, predicted, original: 8 columns, 3 rows of 8x8 pixels, padded by 2
        assert Image.open(config.out / "images" / f"{name}-00000003.png").size == (8 * 10 + 2, 3 * 10 + 2)
    board = EventAccumulator(str(config.out / "tensorboard")).Reload()
    assert set(board.Tags()["images"]) == names


def test_drawing_does_not_touch_the_run(tiny):
    quiet, drawn = tiny("quiet", optim={"ema": 0.9}), tiny("drawn", optim={"ema": 0.9}, draw_every=1)
    for config in (quiet, drawn):
        train(config, QUIET)
    assert_same_run(quiet, drawn, {"model", "optimizer", "ema"})


def test_what_is_printed_where_there_is_no_terminal(tiny, capsys):
    config = tiny(steps=3, precision="bf16")
    path = train(config, Console(), "pretrain")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("pretrain: tiny.npz train:")
    assert "M parameters on cpu, bf16" in lines[1]
    assert "step 1 " in lines[2] and "img/s" in lines[2] and "MFU" in lines[2]
    assert lines[-1].startswith("pretrain: done: step 3") and lines[-1].endswith(f"saved {path}")


# The clock


def test_a_run_by_the_clock_ends_in_time_with_the_rate_at_zero(tiny):
    config = tiny(steps=0, minutes=0.04)
    train(config, QUIET)
    rows = read_metrics(config.out / "metrics.jsonl")
    longest = max(b["seconds"] - a["seconds"] for a, b in zip(rows, rows[1:], strict=False))
    assert 2.4 <= rows[-1]["seconds"] <= 2.4 + longest + 0.05
    peak = 0.03 * 8 / 256
    assert rows[-1]["lr"] <= peak * lr_scale(1 - longest / 2.4 - 0.02, 0.05)
    assert max(row["lr"] for row in rows) > 0.9 * peak
    saved = load_checkpoint(config.checkpoints, parts=[])
    assert saved.step == rows[-1]["step"] and saved.state["seconds"] == rows[-1]["seconds"]
    assert train(config, QUIET) == saved.path  # the budget is of the run, not of each start


def test_epochs_count_passes_over_the_data(tiny):
    config = tiny(steps=0, epochs=1.5)
    count = len(open_dataset(config.data, "train"))
    saved = load_checkpoint(train(config, QUIET), parts=[])
    assert saved.step == math.ceil(1.5 * count / 8)


# The disk


def test_a_full_disk_is_one_sentence_and_the_checkpoint_before_stays(tiny):
    """A limit on the size of files stands in for the disk: larger than the logs, smaller than a checkpoint."""
    config = tiny(steps=4)
    kept = train(config, QUIET)
    process = start(
        replace(config, steps=40, save_every=1), prefix=("sh", "-c", 'ulimit -f 200 && exec "$@"', "sh")
    )  # 100 KiB
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err.startswith(f"umd: Could not write checkpoint {config.out}/checkpoints/step-00000005")
    assert "File too large" in err and "earlier checkpoints are untouched" in err and err.count("\n") == 1
    assert list_checkpoints(config.checkpoints) == [kept] == [load_checkpoint(config.checkpoints).path]
