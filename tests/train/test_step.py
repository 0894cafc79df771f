"""A training step: the same whoever makes its parts, and nothing in it that a CUDA graph could not replay."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from umd import ops
from umd.config import ModelConfig, ObjectiveConfig
from umd.ema import EMA
from umd.errors import UserError
from umd.kernels import backend
from umd.layers import CastWeights, Linear
from umd.machine.device import side_stream
from umd.model import UMD
from umd.objective import Objective
from umd.schedule import NoiseSchedule
from umd.train.distributed import World
from umd.train.optim import adamw, lr_scale
from umd.train.parallel import DDP, Alone, LossStep
from umd.train.step import MetricsReader, TrainStep, captures

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TINY = ModelConfig(
    image_size=(8, 8), patch_size=2, hidden_size=32, depth=1, decoder_depth=1, num_heads=2, num_classes=3
)
B = 40


def make(
    device=CPU,
    dtype=torch.float32,
    autocast=torch.float32,
    r0=0.5,
    accumulate=1,
    ema=True,
    lr=1e-3,
    samples=B,
    spread=Alone,
    **options,
):
    """A TrainStep of one process on a network whose every weight matters."""
    generator = torch.Generator().manual_seed(0)
    model = UMD(TINY).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    model.to(device)
    objective = Objective(TINY, ObjectiveConfig(no_noise_prob=r0, class_dropout_prob=0.3), NoiseSchedule("cosine"))
    optimizer = adamw(model, 1e-3, (0.9, 0.95), 0.05)
    parallel = spread(model, LossStep(model, objective, autocast), optimizer, accumulate, 1.0)
    average = EMA(parallel.weights, 0.01) if ema else None
    world = World(0, 1, device)
    return TrainStep(parallel, objective, samples // accumulate, 5, world, average, 0.01, **options)


def batches(count, device=CPU, dtype=torch.float32, samples=B):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.rand(samples, 3, 8, 8, generator=generator, dtype=torch.float64) * 2 - 1
        labels = torch.randint(3, (samples,), generator=generator)
        yield x.to(device, dtype), labels.to(device), torch.arange(samples, device=device)


# Ranks and micro-batches

SETTINGS = [(dtype, r0) for dtype in (torch.float64, torch.float32) for r0 in (0.05, 0.3)]


def gradients(step: TrainStep) -> dict[str, Tensor]:
    """Of the first step: AdamW's average of them is the gradient times 1 - beta1."""
    names = {p: name for name, p in step.parallel.model.named_parameters()}
    return {names[p]: state["exp_avg"] / 0.1 for p, state in step.parallel.optimizer.state.items()}


def rank_steps(out: str) -> None:
    """What each of several ranks does: the first step of every setting, on its places of the batch."""
    from umd.train.distributed import join
    from umd.train.settings import ParallelConfig

    world, results = join("cpu", ParallelConfig(), Path(out).parent), {}
    for dtype, r0 in SETTINGS:
        for accumulate in (1, 2):
            alone = make(dtype=dtype, r0=r0, ema=False)
            loss, optimizer = alone.parallel.loss, alone.parallel.optimizer
            parallel = DDP(alone.parallel.model, loss, optimizer, accumulate, 0.0, world, "fp32")
            micro = B // (world.size * accumulate)
            step = TrainStep(parallel, alone.objective, micro, 5, world)
            places = [place for part in step.parts for place in step.objective.places(micro, part)]
            x, labels, indices = next(batches(1, dtype=dtype))
            metrics = world.mean_(step(x[places], labels[places], indices[places], 1e-3).clone())
            results[f"{dtype} {r0} {accumulate}"] = {"metrics": metrics, **gradients(step)}
    if world.main:
        torch.save(results, out)


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_ranks_and_micro_batches_make_the_step_of_one_process(size, tmp_path):
    """Loss, its parts, and the gradient of every parameter; r0 = 0.05 of 40 samples leaves most parts without any."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(size)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command += [__file__, str(tmp_path / "results.pt")]  # `rank_steps`, as below
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    found = torch.load(tmp_path / "results.pt", weights_only=True)
    for dtype, r0 in SETTINGS:
        whole = make(dtype=dtype, r0=r0, ema=False)
        whole.parallel.clip = 0.0
        metrics = whole(*next(batches(1, dtype=dtype)), 1e-3)
        expected = {"metrics": metrics, **gradients(whole)}
        for accumulate in (1, 2):
            ours = found[f"{dtype} {r0} {accumulate}"]
            assert ours.keys() == expected.keys()
            for name, value in expected.items():
                error = (ours[name] - value).abs().max() / value.abs().max().clamp(min=1e-3)
                assert error <= (1e-10 if dtype == torch.float64 else 1e-5), (dtype, r0, accumulate, name, error)


# What a CUDA graph would record


class Recorder(TorchDispatchMode):
    """Each op with its numbers, and which tensors it takes that were there before the step."""

    WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item")

    def __init__(self):
        super().__init__()
        self.ops, self.made, self.kept = [], set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "profiler":  # names of what runs
            return func(*args, **(kwargs or {}))
        assert func.overloadpacket.__name__ not in self.WAITS, f"{func} asks the device for a number"
        flat, _ = tree_flatten((args, kwargs or {}))
        tensors = [x.untyped_storage()._cdata for x in flat if isinstance(x, Tensor)]
        numbers = [x for x in flat if not isinstance(x, Tensor)]
        self.ops.append((str(func), numbers, [x for x in tensors if x not in self.made]))
        out = func(*args, **(kwargs or {}))
        for x in tree_flatten(out)[0]:
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in tensors:
                self.made.add(x.untyped_storage()._cdata)
                self.kept.append(x)  # its memory is given to no other tensor while the step is recorded
        return out


def test_a_step_reads_no_number_that_changes_and_no_new_tensor():
    """On a GPU's path, in bf16, with labels, clipping, EMA and micro-batches: the ops of two steps, far apart in the
    run, are the same to the last number and the last tensor that they find. A graph of one is a graph of all."""
    with ops.cpu_paths(False), backend.kernels("triton"), ops.attention("sdpa"):
        step, recorded = make(autocast=torch.bfloat16, accumulate=2, cast=torch.bfloat16, samples=4), []
        for i, batch in enumerate(batches(4, samples=4)):
            step.load(*batch, 1e-3 * lr_scale(i / 4, 0.5))
            if i < 2:  # optimiser state and layouts are made on the way
                step.run()
                continue
            with Recorder() as recorder:
                step.run()
            recorded.append(recorder.ops)
            step.number += 50
    assert len(recorded[0]) == len(recorded[1]) > 200
    for one, other in zip(*recorded, strict=True):
        assert one == other
    assert step.step.item() == 4


def test_a_step_that_reads_a_new_tensor_is_noticed():
    """What the test above is worth: a learning rate made anew for each step, and a number that changes."""
    for spoil in ("tensor", "number"):
        with ops.cpu_paths(False), ops.attention("sdpa"):
            step, recorded = make(), []
            for i, batch in enumerate(batches(3)):
                step.load(*batch, 1e-3)
                for group in step.parallel.optimizer.param_groups:
                    group["lr"] = torch.full((), 1e-3) if spoil == "tensor" else 1e-3 * (1 + i)
                with Recorder() as recorder:
                    step.run()
                recorded.append((recorder.ops, [group["lr"] for group in step.parallel.optimizer.param_groups]))
        assert recorded[1][0] != recorded[2][0], spoil


def test_the_gpus_path_makes_the_cpus_steps():
    """Ten steps in fp32, with clipping, EMA and a rate on the device: the losses of the CPU's own path."""
    losses = {}
    for path in (True, False):
        with ops.cpu_paths(path), ops.attention("sdpa"):
            step = make()
            assert isinstance(step.parallel.optimizer.param_groups[0]["lr"], float) == path
            losses[path] = torch.stack(
                [step(*batch, 1e-2 * lr_scale(i / 10, 0.3)).clone() for i, batch in enumerate(batches(10))]
            )
            average = torch.cat([shadow.flatten() for shadow in step.ema.shadows.values()])
            losses[path] = losses[path], average
    for ours, theirs in zip(losses[False], losses[True], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


# Weights cast once


def test_cast_weights_are_those_of_now_and_gone_afterwards():
    model = UMD(TINY)
    cast = CastWeights(model, torch.bfloat16)
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    assert len(layers) == len(cast.layers) == 2 * 4 + 1
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        cast.refresh()
        with cast.used():
            for layer in layers:
                assert torch.equal(layer.cast[0], layer.weight.bfloat16())
                assert torch.equal(layer.cast[1], layer.bias.bfloat16())
        assert all(layer.cast is None for layer in layers)
    assert not any("cast" in name for name in model.state_dict())


def test_gradients_with_cast_weights_are_no_worse_than_autocasts():
    """Against fp64, of the whole step; fp32 out of the products rounds once less."""
    found = {}
    for name in ("exact", "autocast", "cast"):
        dtype = torch.float64 if name == "exact" else torch.float32
        with ops.cpu_paths(False), ops.attention("sdpa"):
            step = make(
                dtype=dtype, autocast=torch.float32 if name == "exact" else torch.bfloat16, ema=False,
                cast=torch.bfloat16 if name == "cast" else None,
            )  # fmt: skip
            step.parallel.clip = 0.0
            step(*next(batches(1, dtype=dtype)), 0.0)
        found[name] = gradients(step)
    error = {
        name: sum((found[name][p].double() - g).norm() ** 2 for p, g in found["exact"].items()) ** 0.5
        for name in ("autocast", "cast")
    }
    assert 0 < error["cast"] <= 1.1 * error["autocast"]


# On a GPU


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def nccl(tmp_path):
    """DDP of one process, whose gradients NCCL sends to nobody."""
    torch.cuda.set_device(0)
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path / 'nccl'}", rank=0, world_size=1)
    yield lambda *made: DDP(*made, World(0, 1, torch.device("cuda", 0)), "fp32")
    torch.distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("ddp", [False, True])
def test_captured_is_not_captured_to_the_bit(request, accumulate, ddp, deterministic):
    """20 steps with warm-up of the rate, clipping and EMA; and a run that is taken up after 16 of them."""
    spread = request.getfixturevalue("nccl") if ddp else Alone
    device = torch.device("cuda")

    def steps(capture, first=0, tensors=None):
        torch.manual_seed(0)
        with side_stream(device), backend.kernels("auto"):
            options = dict(autocast=torch.bfloat16, cast=torch.bfloat16, capture=capture, spread=spread)
            step = make(device, accumulate=accumulate, **options)
            if tensors is not None:
                model, optimizer, ema = tensors
                step.parallel.model.load_state_dict(model, strict=False)
                step.parallel.load({"optimizer": optimizer, "ema": ema}, step.ema)
                step.number = first
                step.step.fill_(first)
            rows, saved = [], None
            for i, batch in enumerate(batches(36, device)):
                if i < first:
                    continue
                rows.append(step(*batch, 1e-2 * lr_scale(i / 36, 0.3)).clone())
                if i == 15:
                    parts = step.parallel.tensors(step.ema)
                    names = ("model", "optimizer", "ema")
                    saved = [{n: t.detach().clone() for n, t in parts[name].items()} for name in names]
            weights = torch.cat([p.detach().flatten() for p in step.parallel.model.parameters()])
            average = torch.cat([shadow.flatten() for shadow in step.ema.shadows.values()])
            assert (step.captured.graph is not None) if capture else (step.captured is None)
            return torch.stack(rows), weights, average, saved

    eager, captured = steps(False), steps(True)
    for ours, theirs in zip(captured[:3], eager[:3], strict=True):
        assert torch.equal(ours, theirs)
    resumed = steps(True, 16, captured[3])
    assert torch.equal(resumed[0], captured[0][16:]) and torch.equal(resumed[1], captured[1])


@pytest.mark.gpu
def test_a_step_never_waits():
    device = torch.device("cuda")
    with backend.kernels("auto"):
        step = make(device, autocast=torch.bfloat16, cast=torch.bfloat16)
        told = MetricsReader(World(0, 1, device), len(step.metrics))
        everything = list(batches(6, device))
        for batch in everything[:3]:
            step(*batch, 1e-3)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in everything[3:]:
                turn = told.send(step(*batch, 1e-3), 0.5, False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert told.read(turn)[-2:] == [0.5, 0.0]


@pytest.mark.gpu
def test_a_side_stream_and_the_outer_one_wait_for_each_other():
    x = torch.zeros((), device="cuda")
    wait = 100_000_000  # ticks of the GPU's clock, some 50 ms
    torch.cuda._sleep(wait)
    x.fill_(1)
    with side_stream(x.device):
        seen = x.clone()
        torch.cuda._sleep(wait)
        x.fill_(2)
    assert torch.stack([seen, x]).tolist() == [1, 2]


# Choices


def test_what_is_captured():
    alone = make(ema=False).parallel
    assert captures("auto", "", alone, profiled=False) and captures("on", "", alone, profiled=True)
    assert not captures("off", "", alone, profiled=False) and not captures("auto", "", alone, profiled=True)
    assert not captures("auto", "needs a CUDA GPU", alone, profiled=False)
    with pytest.raises(UserError, match="^--capture on needs a CUDA GPU; leave it at auto"):
        captures("on", "needs a CUDA GPU", alone, profiled=False)


def test_told_gives_each_step_its_own_numbers():
    told = MetricsReader(World(0, 1, CPU), 2)
    first = told.send(torch.tensor([1.0, 2.0]), 0.25, True)
    second = told.send(torch.tensor([3.0, 4.0]), 0.5, False)
    assert told.read(first) == [1.0, 2.0, 0.25, 1.0] and told.read(second) == [3.0, 4.0, 0.5, 0.0]


if __name__ == "__main__":
    rank_steps(sys.argv[1])
