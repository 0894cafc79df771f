"""DeepSpeed's private fields: the version that has them, and that they mean what train/zero.py takes them for."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from umd.train.zero import DEEPSPEED_VERSION

ROOT = Path(__file__).parents[2]

# ZeRO of one process: what it holds is the whole network.
ENGINES = """
import deepspeed, torch, torch.distributed as dist
from unittest import mock
from umd.config import ModelConfig, ObjectiveConfig, ScheduleConfig
from umd.errors import UserError
from umd.methods import build_model, build_objective
from umd.schedule import NoiseSchedule
from umd.train.distributed import World
from umd.train.optim import adamw
from umd.train.parallel import LossStep
from umd.train.zero import Zero, flat_tensors, views

dist.init_process_group("gloo")
world = World(0, 1, torch.device("cpu"))
FP32, BF16 = torch.float32, torch.bfloat16
for stage, dtype in ((1, BF16), (2, FP32), (2, BF16), (3, FP32), (3, BF16)):
    torch.manual_seed(0)
    config = ModelConfig(image_size=(8, 8), patch_size=2, hidden_size=32, depth=2, decoder_depth=1, num_heads=2)
    model = build_model(config)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    objective = build_objective(config, ObjectiveConfig(), NoiseSchedule("cosine"), 8)
    optimizer = adamw(model, 1e-3, (0.9, 0.95), 0.05, 1.0, "auto")
    zero = Zero(model, LossStep(model, objective, dtype), optimizer, 1, 1.0, world, stage, 4, dtype)

    taken = [torch.zeros_like(flat) for flat, _ in zero.flats]
    for (flat, places), used in zip(zero.flats, taken):
        for name, piece in views(flat, places).items():
            assert torch.equal(piece, weights[name].flatten()), name  # exact in bf16 too: they are put back
        for piece in views(used, places).values():
            piece += 1
    assert sum(used.sum() for used in taken) == sum(w.numel() for w in weights.values())
    assert all(used.max() == 1 for used in taken)  # no place is two parameters'

    x = torch.rand(4, 3, 8, 8).to(dtype) * 2 - 1
    zero.forward_backward(x, objective.corrupt(4, 0, x.device), last=True)
    zero.update()
    tensors = zero.tensors(None)
    moved = [name for name, w in weights.items() if not torch.equal(tensors["model"][name], w)]
    assert moved, "the places are not those that the optimiser steps"
    if stage < 3:  # the network computes with what lies there
        for name, p in model.named_parameters():
            assert torch.equal(p.detach().float(), tensors["model"][name].to(dtype).float()), name
    print(stage, dtype, len(moved), flush=True)

    # From its third step on, DeepSpeed's throughput timer would wait for the device twice a micro-batch.
    waits = []
    with mock.patch.object(deepspeed.accelerator.get_accelerator(), "synchronize", lambda *_: waits.append(1)):
        for _ in range(3):
            zero.forward_backward(x, objective.corrupt(4, 0, x.device), last=True)
            zero.update()
    assert not waits

    parameter = next(iter(model.parameters()))
    if stage < 3:
        del parameter._hp_mapping
    else:
        del zero.engine.optimizer.grad_position
    try:
        flat_tensors(zero.engine, optimizer, model, world, stage)
    except UserError as error:
        print(error, flush=True)
"""


def python(code: str, path: str = "") -> subprocess.CompletedProcess:
    env = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{path}{os.pathsep}{ROOT}"}
    return subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_every_file_names_the_one_version():
    names = [line for line in (ROOT / "setup.py").read_text().splitlines() if '"deepspeed==' in line.replace(" ", "")]
    assert len(names) == 2 and all(f"deepspeed=={DEEPSPEED_VERSION}" in line for line in names)
    assert f"\ndeepspeed=={DEEPSPEED_VERSION} " in (ROOT / "constraints.txt").read_text()
    assert f"pip install deepspeed=={DEEPSPEED_VERSION}" in (ROOT / "umd" / "machine" / "doctor.py").read_text()


def test_the_installed_version_has_the_fields_and_they_mean_what_we_think():
    pytest.importorskip("deepspeed")
    assert importlib.metadata.version("deepspeed") == DEEPSPEED_VERSION
    done = python(ENGINES)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    refused = [line for line in said if line.startswith(f"DeepSpeed {DEEPSPEED_VERSION} does not tell where")]
    assert len(refused) == 5 and all(f"pip install deepspeed=={DEEPSPEED_VERSION}" in line for line in refused)
    assert "_hp_mapping" in refused[0] and "grad_position" in refused[-1]


def test_another_version_is_told(tmp_path):
    (tmp_path / "deepspeed.py").write_text(
        "from types import SimpleNamespace\n__version__ = '0.20.1'\nops = SimpleNamespace(__compatible_ops__={})\n"
    )
    done = python(
        "import torch; from umd.train.zero import import_deepspeed as f; f(torch.device('cpu'))", str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert f"found DeepSpeed 0.20.1, expected {DEEPSPEED_VERSION}" in done.stderr
