"""Checkpoints survive kills, full disks and damage, and give back the bytes that were saved."""

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from umd import files
from umd.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_model_state,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from umd.errors import UserError
from umd.files import again_if_lost, exit_status, sha256
from umd.tensor_files import SAFETENSORS_TYPES, write_safetensors

ROOT = Path(__file__).parents[2]


def save(root, step, keep=3, size=10):
    return save_checkpoint(root, step, {"model": {"w": torch.full((size,), float(step))}}, {"seed": step}, keep)


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8) if tensor.ndim else tensor[None].view(torch.uint8)


def refusal(path_or_root, **arguments):
    """The message of the CheckpointError that loading raises: one sentence, fit for a user."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path_or_root, **arguments)
    message = str(caught.value)
    assert isinstance(caught.value, UserError)
    assert message.endswith(".") and "\n" not in message and ". " not in message
    return message


def test_every_kind_of_tensor_comes_back_bit_for_bit(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 4, generator=generator)
    tied = torch.randn(5, generator=generator)
    saved = {
        "bf16": base.bfloat16(),
        "fp16": base.half(),
        "fp64": base.double(),
        "int64": torch.tensor([-(2**62), 3]),
        "uint8": torch.arange(256, dtype=torch.uint8),
        "bool": base > 0,
        "zero_dim": torch.tensor(3.25),
        "empty": torch.empty(0, 7),
        "transposed": base.T,
        "slice": base[1:3, ::2],
        "parameter": nn.Parameter(base.clone()),
        "channels_last": torch.randn(2, 3, 4, 4, generator=generator).to(memory_format=torch.channels_last),
        "tied_a": tied,
        "tied_b": tied,
        "tied_view": tied[1:],
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    path = save_checkpoint(tmp_path, 7, {"model": saved, "optimizer": {}}, {})
    loaded = load_checkpoint(path)
    assert loaded.step == 7 and loaded.path == path and loaded.tensors["optimizer"] == {}
    assert loaded.tensors["model"].keys() == saved.keys()
    for name, tensor in saved.items():
        back = loaded.tensors["model"][name]
        assert back.dtype == tensor.dtype and back.shape == tensor.shape, name
        assert torch.equal(bits(back), bits(tensor.detach())), name


def test_files_are_those_of_safetensors_and_their_sum_is_taken_on_the_way(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{i}.weight": torch.ones(i + 1, 3).to(dtype) for i, dtype in enumerate(SAFETENSORS_TYPES)}
    tensors |= {f"Bias {i}": torch.zeros(7).to(dtype) for i, dtype in enumerate(reversed(SAFETENSORS_TYPES))}
    tensors |= {'é "quoted"': torch.tensor(3.25), "empty": torch.empty(0, 7), "\U0001f642": torch.ones(2)}
    tensors |= {"large": torch.randn(3, 2**21, generator=generator)}  # more than is written at a time
    digest = write_safetensors(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert digest == sha256(tmp_path / "ours")


def test_state_comes_back_as_json_gives_it(tmp_path):
    state = {
        "lr": 0.1 + 0.2,
        "names": ["a", "é"],
        "nested": {"none": None, "big": 2**63},
        "order": {2: "b", 10: "a"},
    }
    save_checkpoint(tmp_path, 1, {}, state)
    assert load_checkpoint(tmp_path).state == {**state, "order": {"2": "b", "10": "a"}}


def test_state_that_json_cannot_hold_fails_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "new", 1, {}, {"tensor": torch.zeros(1)})
    assert not (tmp_path / "new").exists()


def test_a_folder_holds_only_safetensors_and_json_with_the_checksums(tmp_path):
    path = save_checkpoint(tmp_path, 3, {"model": {"w": torch.ones(4)}, "ema": {"w": torch.ones(4)}}, {})
    assert sorted(f.name for f in path.iterdir()) == ["ema.safetensors", "model.safetensors", "state.json"]
    files = json.loads((path / "state.json").read_text())["files"]
    content = (path / "ema.safetensors").read_bytes()
    assert files["ema.safetensors"] == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def test_a_change_to_a_loaded_tensor_stays_out_of_the_file(tmp_path):
    path = save(tmp_path, 1)
    load_checkpoint(path).tensors["model"]["w"].fill_(9.0)
    assert load_checkpoint(path).tensors["model"]["w"].eq(1.0).all()


def test_parts_limits_what_is_read_and_verified(tmp_path):
    path = save_checkpoint(tmp_path, 3, {"model": {"w": torch.ones(4)}, "optimizer": {"m": torch.ones(99)}}, {})
    flip_a_byte(path / "optimizer.safetensors")
    assert load_checkpoint(path, parts=["model"]).tensors.keys() == {"model"}
    assert "no part 'ema'" in refusal(path, parts=["ema"])


def test_the_newest_are_kept_and_the_one_just_written_always(tmp_path):
    for step in (10, 9, 1000000000, 30, 40):
        path = save(tmp_path, step, keep=2)
        assert path.exists()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000040", "step-1000000000"]
    assert latest_checkpoint(tmp_path).name == "step-1000000000"
    save(tmp_path, 5, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]
    with pytest.raises(ValueError, match="keep is 0"):
        save(tmp_path, 6, keep=0)


def test_the_same_step_can_be_saved_again(tmp_path):
    save(tmp_path, 5)
    path = save_checkpoint(tmp_path, 5, {"model": {"w": torch.zeros(2)}}, {"second": True})
    assert load_checkpoint(tmp_path).state == {"second": True}
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_between_the_two_renames_of_a_second_save_loses_nothing(tmp_path):
    path = save(tmp_path, 5)
    path.rename(replaced := tmp_path / f"{path.name}.replaced")
    (tmp_path / ".unfinished-step-00000005").mkdir()
    assert latest_checkpoint(tmp_path) == replaced and load_checkpoint(tmp_path).state == {"seed": 5}
    save(tmp_path, 5)
    assert list(tmp_path.iterdir()) == [path]
    save(tmp_path, 5).rename(replaced)  # both there: the kill came before the removal
    save(tmp_path, 5)
    assert list(tmp_path.iterdir()) == [path]


def flip_a_byte(file, offset=-1):
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)


def test_missing_folder(tmp_path):
    assert f"no folder {tmp_path}/nothing" in refusal(tmp_path / "nothing")
    assert latest_checkpoint(tmp_path / "nothing") is None


def test_no_checkpoint_inside(tmp_path):
    (tmp_path / "images").mkdir()
    assert f"no checkpoint in {tmp_path}" in refusal(tmp_path)


def test_truncated_file(tmp_path):
    path = save(tmp_path, 1, size=1000)
    os.truncate(path / "model.safetensors", 2000)
    assert "model.safetensors is damaged: it has 2000 bytes where 4104 were written" in refusal(path)


def test_missing_file(tmp_path):
    path = save(tmp_path, 1)
    (path / "model.safetensors").unlink()
    assert "lacks its file model.safetensors" in refusal(path)
    (path / "state.json").unlink()
    assert "has no state.json" in refusal(path)


@pytest.mark.parametrize("offset", [0, 20, -1])
def test_flipped_byte(tmp_path, offset):
    path = save(tmp_path, 1)
    flip_a_byte(path / "model.safetensors", offset)
    assert "model.safetensors is damaged: it differs from its checksum" in refusal(path)


def test_damaged_json(tmp_path):
    path = save(tmp_path, 1)
    good = (path / "state.json").read_bytes()
    for content in (good[:-20], b"", b"[1, 2]", b"{}", good.replace(b"{", b"\xff", 1)):
        (path / "state.json").write_bytes(content)
        assert "state.json is damaged: it is not what was written" in refusal(path)
    (path / "state.json").write_bytes(good.replace(b'"seed": 1', b'"seed": 3'))
    assert "state.json is damaged: it differs from its checksum" in refusal(path)


def test_unknown_format(tmp_path):
    path = save(tmp_path, 1)
    document = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**document, "format": 2}))
    assert "has format 2, and this version of umd reads format 1" in refusal(path)


def test_a_damaged_folder_is_skipped_with_a_warning(tmp_path):
    good = save(tmp_path, 1)
    os.truncate(save(tmp_path, 2, size=1000) / "model.safetensors", 100)
    with pytest.warns(UserWarning, match="step-00000002"):
        assert latest_checkpoint(tmp_path) == good


class Disk:
    """Fails `times` times, then answers."""

    def __init__(self, times: int, number: int = errno.ESTALE):
        self.times, self.number = times, number

    def answer(self, value):
        self.times -= 1
        if self.times >= 0:
            raise OSError(self.number, os.strerror(self.number))
        return value


def test_a_stale_handle_is_tried_again_and_then_told(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WAITS", (0, 0, 0))
    for times in range(4):
        disk = Disk(times)
        assert again_if_lost(lambda disk=disk: disk.answer("there"), tmp_path) == "there"
    with pytest.raises(UserError, match="handle stays stale .ESTALE.*mount it again on this host and repeat"):
        again_if_lost(lambda: Disk(1).answer("there"), tmp_path)
    disk = Disk(3, errno.EIO)  # as Lustre answers a host that it has dropped
    assert again_if_lost(lambda: disk.answer("there"), tmp_path) == "there"
    disk = Disk(2, errno.ENOSPC)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        again_if_lost(lambda: disk.answer("there"), tmp_path)
    assert disk.times == 1  # other errors are not tried again


def test_the_exit_status_tells_whether_a_repetition_may_succeed(tmp_path, monkeypatch):
    """Whatever sentence a lost disk is told in: 75 is what a scheduler may try again."""
    monkeypatch.setattr(files, "WAITS", (0,))
    for number, status in ((errno.EIO, 75), (errno.ESTALE, 75), (errno.ENOSPC, 2)):
        tensors = {"model": Weights(Disk(9, number), w=torch.ones(3))}
        with pytest.raises(UserError) as caught:
            save_checkpoint(tmp_path, 1, tensors, {})
        assert exit_status(caught.value) == status
    assert exit_status(UserError("a mistake")) == exit_status(ValueError()) == 2


class Weights(dict):
    """Tensors that come over a disk."""

    def __init__(self, disk: Disk, **tensors):
        super().__init__(tensors)
        self.disk = disk

    def items(self):
        return self.disk.answer(super().items())


def test_a_save_that_meets_a_stale_handle_begins_anew_or_leaves_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WAITS", (0, 0))
    save(tmp_path, 1)
    for times, step in ((2, 2), (3, 3)):
        tensors = {"ema": {"w": torch.ones(3)}, "model": Weights(Disk(times), w=torch.full((10,), float(step)))}
        if times == 2:
            save_checkpoint(tmp_path, step, tensors, {}, keep=3)
        else:
            with pytest.raises(UserError, match="step-00000003 is on a network disk whose handle stays stale"):
                save_checkpoint(tmp_path, step, tensors, {}, keep=3)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000001", "step-00000002"]
    saved = load_checkpoint(tmp_path)
    assert saved.step == 2 and saved.tensors["model"]["w"].tolist() == [2] * 10 and "ema" in saved.tensors


def test_the_newest_is_that_of_the_highest_step_whatever_the_clocks_of_hosts_say(tmp_path):
    """Host 2 is an hour behind host 1, and took up what that had saved."""
    for step in (10, 20, 30, 40):
        path = save(tmp_path, step)
        for file in [*path.iterdir(), path]:
            os.utime(file, (1e9 - 100 * step, 1e9 - 100 * step))
    assert latest_checkpoint(tmp_path).name == "step-00000040"
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000020", "step-00000030", "step-00000040"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Could not write .*: Not a directory; make room"):
        save(tmp_path / "file" / "checkpoints", 1)


def test_a_checkpoint_that_cannot_be_removed_is_told_and_the_new_one_stays(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".unfinished-removed-step-00000001").write_text("in the way of the name that it gets first")
    with pytest.warns(UserWarning, match="Earlier checkpoints could not be removed"):
        save(tmp_path, 2, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]


FILL_THE_DISK = """
import sys, torch
from umd.checkpoint import *
root = sys.argv[1]
small, large = ({"model": {"w": torch.ones(n)}} for n in (1000, 1_000_000))
save_checkpoint(root, 1, small, {})
if len(sys.argv) > 2:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
try:
    save_checkpoint(root, 2, large, {})
except CheckpointError as error:
    print(error)
import os
print(os.listdir(root), load_checkpoint(root).step)
save_checkpoint(root, 3, small, {})
print(load_checkpoint(root).step)
"""


def run_python(*command, prefix=()):
    return subprocess.run(
        [*prefix, sys.executable, "-c", *map(str, command)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_full_disk_by_limit(tmp_path):
    result = run_python(FILL_THE_DISK, tmp_path, "limit")
    message, listing, step = result.stdout.splitlines()
    assert message.startswith(f"Could not write checkpoint {tmp_path}/step-00000002") and "File too large" in message
    assert listing == "['step-00000001'] 1" and step == "3", result.stderr


def test_full_disk_for_real(tmp_path):
    mount = f"mount -t tmpfs -o size=2m none {tmp_path} && exec"
    namespace = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*namespace, f"{mount} true"]).returncode:
        pytest.skip("mounting a small file system needs user namespaces")
    result = run_python(FILL_THE_DISK, tmp_path, prefix=[*namespace, f'{mount} "$@"', "sh"])
    message, listing, step = result.stdout.splitlines()
    assert "No space left on device" in message and "earlier checkpoints are untouched" in message
    assert listing == "['step-00000001'] 1" and step == "3", result.stderr


# A server that imports torch once and forks a saver for each kill: 25 interpreters would take a minute.
SAVER = """
import os, sys, torch
from umd.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
torch.set_num_threads(1)
root = sys.argv[1]
for _ in sys.stdin:
    if (child := os.fork()) == 0:
        os.write(1, f"pid {os.getpid()}\\n".encode())
        newest = latest_checkpoint(root)
        step = load_checkpoint(newest).step if newest else 0
        while True:
            step += 1
            tensors = {"w": torch.full((1_000_000,), float(step))}
            parts = dict.fromkeys(("model", "optimizer", "ema"), tensors)
            save_checkpoint(root, step, parts, {"step": step}, keep=2)
            os.write(1, f"saved {step}\\n".encode())
    os.waitpid(child, 0)
    os.write(1, b"dead\\n")
"""


def test_kill_9_at_any_moment_loses_at_most_the_save_being_written(tmp_path):
    delays = random.Random(0)
    server = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    confirmed, interrupted, duration = 0, 0, 0.1
    try:
        for kill in range(25):
            server.stdin.write("go\n")
            server.stdin.flush()
            child = int(server.stdout.readline().split()[1])
            if kill == 0:  # learn how long a save takes here
                confirmed = int(server.stdout.readline().split()[1])
                begin = time.monotonic()
                confirmed = int(server.stdout.readline().split()[1])
                duration = time.monotonic() - begin
            time.sleep(delays.uniform(0, 3) * duration)
            os.kill(child, 9)
            while (line := server.stdout.readline()) != "dead\n":
                confirmed = int(line.split()[1])
            interrupted += any(name.startswith(".unfinished") for name in os.listdir(tmp_path))
            newest = load_checkpoint(tmp_path)
            assert confirmed <= newest.step <= confirmed + 1
            assert newest.state == {"step": newest.step} and newest.tensors.keys() == {
                "model",
                "optimizer",
                "ema",
            }
            assert all(t["w"].eq(newest.step).all() for t in newest.tensors.values())
            confirmed = newest.step
    finally:
        server.kill()
        server.wait()
    assert interrupted >= 5, "too few kills came in the middle of a save for the test to mean anything"
    save(tmp_path, confirmed + 1, keep=1)
    assert os.listdir(tmp_path) == [f"step-{confirmed + 1:08d}"]


def network(width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.GELU(), nn.Linear(width, 2))


def train(model, optimizer, steps):
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()


def adamw(model, reverse=False, **options):
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups[::-1] if reverse else groups, lr=1e-2, **options)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"amsgrad": True}])
def test_the_optimiser_continues_bit_for_bit_whatever_the_order_of_its_groups(tmp_path, options):
    straight = network()
    train(straight, optimizer := adamw(straight, **options), 5)
    tensors = {"model": straight.state_dict(), "optimizer": optimizer_tensors(optimizer, straight)}
    assert tensors["optimizer"]["step::0.weight"] == 5 and "exp_avg_sq::2.bias" in tensors["optimizer"]
    save_checkpoint(tmp_path, 5, tensors, {})
    train(straight, optimizer, 5)

    resumed = network()
    nn.init.zeros_(resumed[0].weight)
    optimizer = adamw(resumed, reverse=True, **options)
    loaded = load_checkpoint(tmp_path)
    load_model_state(resumed, loaded.tensors["model"])
    load_optimizer_tensors(optimizer, resumed, loaded.tensors["optimizer"])
    train(resumed, optimizer, 5)
    for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_fp32_moments_of_bf16_parameters_are_not_rounded():
    model = network().bfloat16()
    optimizer = adamw(model)
    moment = torch.full((8, 4), 1 / 3)
    load_optimizer_tensors(optimizer, model, {"exp_avg::0.weight": moment})
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], moment)


def test_optimiser_state_of_another_model_is_refused():
    model = network()
    for tensors in ({"exp_avg::5.weight": torch.ones(2)}, {"exp_avg::0.weight": torch.ones(3, 3)}):
        with pytest.raises(CheckpointError, match="fits no parameter trained here"):
            load_optimizer_tensors(adamw(model), model, tensors)


def test_another_architecture_is_refused_with_what_differs():
    model = network(width=8)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    saved = network(width=6).state_dict()
    saved["3.weight"] = saved.pop("2.bias")
    with pytest.raises(CheckpointError) as caught:
        load_model_state(model, saved)
    assert str(caught.value) == (
        "The checkpoint is of another architecture (1 missing from the checkpoint: 2.bias; "
        "1 only in the checkpoint: 3.weight; 3 of another shape: 0.weight ([6, 4] saved, [8, 4] here), "
        "0.bias ([6] saved, [8] here), 2.weight ([2, 6] saved, [2, 8] here)); "
        "use the settings it was trained with, or start a new run folder."
    )
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_new_layers_may_be_missing():
    model = network()
    nn.init.ones_(model[2].weight)
    saved = {name: t * 0 for name, t in model.state_dict().items() if name.startswith("0.")}
    load_model_state(model, saved, allow_missing=("2.",))
    assert model[0].weight.eq(0).all() and model[2].weight.eq(1).all()
    with pytest.raises(CheckpointError, match=r"1 missing from the checkpoint: 2\.bias"):
        load_model_state(model, saved, allow_missing=("2.weight",))


def test_tied_parameters_stay_tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    load_model_state(model, {name: torch.ones_like(t) for name, t in model.state_dict().items()})
    assert model[1].weight is model[0].weight and model[0].weight.eq(1).all()
