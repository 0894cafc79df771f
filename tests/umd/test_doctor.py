"""`umd doctor` tells the truth about this machine, and of packages that are missing, broken or impostors."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from umd import ops
from umd.machine import doctor
from umd.machine.device import pick_device, pick_dtype
from umd.machine.doctor import print_report, report
from umd.train.data import has_dali
from umd.train.loader_rate import loader_row


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder that Python searches first, like a site-packages."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def install(site, distribution, version, files):
    info = site / f"{distribution}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    for name, content in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(content)


@pytest.fixture(scope="module")
def rows():
    return report()


def test_every_row_says_something_and_nothing_is_broken_here(rows):
    assert len({row.name for row in rows}) == len(rows) == 13
    for name, value, hint in rows:
        assert value and "cannot be told" not in value, name
        assert "\n" not in value + hint


def test_the_machine_is_described_as_torch_and_the_kernel_see_it(rows):
    rows = {row.name: row.value for row in rows}
    assert f"torch {torch.__version__}" in rows["versions"] and sys.version.split()[0] in rows["versions"]
    if torch.cuda.is_available():
        assert torch.cuda.get_device_name(0) in rows["device"]
        return
    assert rows["device"].startswith(f"CPU, {torch.get_num_threads()} threads")
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    if flags:
        assert ("AMX" in rows["device"]) == ("amx_bf16" in flags)
        fast = "amx_bf16" in flags or "avx512_bf16" in flags
        assert rows["precision"].startswith("bf16 autocast" if fast else "fp32: without AMX")


def test_attention_and_kernels_are_those_that_run(rows):
    rows = {row.name: row for row in rows}
    device = pick_device()
    assert rows["GELU"].value.startswith("ours; ")  # and why Transformer Engine cannot run, or how to ask for it
    with ops.kernels("reference"):
        assert doctor._kernels().value.startswith("each op's definition in PyTorch")
    with ops.kernels("auto"):
        interpreted = device.type == "cpu" and ops.use_triton(torch.empty(0))
        assert doctor._kernels().value.startswith("Triton") == (device.type == "cuda" or interpreted)
        assert doctor._kernels().value.endswith("in its interpreter") == interpreted
    name, reason = ops.attention_backend(device, pick_dtype("auto", device), 64)
    assert rows["attention"].value == f"{name}: {reason}"
    with ops.attention("sdpa"):
        assert doctor._attention().value == "sdpa: was asked for"


@pytest.mark.slow
def test_where_compile_is_said_to_be_usable_it_is():
    if not doctor._compile().value.startswith("can be used"):
        pytest.skip(doctor._compile().value)
    x = torch.linspace(0, 1, 64)
    torch.testing.assert_close(torch.compile(lambda x: (x.sin() * 2).sum())(x), (x.sin() * 2).sum())


def test_compile_needs_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert doctor._compile().value.startswith("cannot be used: no g++")
    assert "apt install g++" in doctor._compile().hint


def test_the_apex_of_pypi_is_recognised_and_not_run(site):
    # Its layout on PyPI: a Pyramid toolkit, apex/__init__.py with modules beside it.
    run = site / "was-run"
    install(
        site,
        "apex",
        "0.9.10.dev0",
        {"apex/__init__.py": f"open({str(run)!r}, 'w')", "apex/lib/__init__.py": ""},
    )
    found = doctor._apex()
    assert found.value == "0.9.10.dev0, but not NVIDIA's; torch's fused AdamW is used"
    assert "pip uninstall apex" in found.hint
    assert not run.exists()


def test_nvidias_apex_is_recognised(site):
    install(site, "apex", "0.1", {"apex/__init__.py": "1/0", "apex/optimizers/__init__.py": ""})
    assert doctor._apex().value == "0.1, without its CUDA extensions; torch's fused AdamW is used"
    (site / "amp_C.py").write_text("1/0")
    used = "torch's fused AdamW is used, its own with --optim.fused apex"
    assert doctor._apex().value == f"0.1, with its CUDA extensions; {used}"


def test_a_flash_attn_without_its_extension_gives_the_reason(site):
    install(site, "flash_attn", "2.8.3", {"flash_attn/__init__.py": "import flash_attn_2_cuda"})
    found = doctor._flash_attention()
    assert "2.8.3, but it does not import: ModuleNotFoundError: No module named 'flash_attn_2_cuda'" in found.value
    assert "--no-build-isolation" in found.hint


def test_a_package_that_takes_python_down_is_a_row_too(site):
    install(site, "deepspeed", "0.19.8", {"deepspeed.py": "import os; os.abort()"})
    assert "0.19.8, but it does not import: killed by signal 6" in doctor._deepspeed().value


def test_dali_is_found_under_either_of_its_names(site, monkeypatch):
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    install(site, "nvidia_dali_cuda120", "2.4.0", {"nvidia/dali/__init__.py": ""})
    assert doctor._dali() == ("DALI", "2.4.0, imports; it reads JPEG files", "")


def test_a_package_that_imports_needs_no_hint(site):
    install(site, "deepspeed", "0.19.8", {"deepspeed.py": "print('banner'); import warnings; warnings.warn('x')"})
    assert doctor._deepspeed() == ("DeepSpeed", "0.19.8, imports; several processes train with ZeRO or DDP", "")


def test_what_is_absent_gets_a_hint(monkeypatch):
    for name in ("nvidia", "nvidia.dali"):  # another test may have imported it
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [])
    for found, command in (
        (doctor._dali(), "pip install nvidia-dali-cuda1"),
        (doctor._deepspeed(), "pip install deepspeed"),
    ):
        assert found.value.startswith("not installed") and found.hint.startswith(command)


def test_a_package_that_breaks_the_search_itself_is_a_row_too(site, monkeypatch):
    for name in ("nvidia", "nvidia.dali"):  # another test may have imported it
        monkeypatch.delitem(sys.modules, name, raising=False)
    install(site, "nvidia", "0", {"nvidia/__init__.py": "raise RuntimeError('no driver')"})
    assert ("dali", "cannot be told: RuntimeError: no driver", "") in report()


def test_the_table_shows_names_in_brackets_as_they_are(site):
    install(site, "deepspeed", "0.19.8", {"deepspeed.py": "raise ImportError('needs [red]that[/red]')"})
    console = Console(record=True, width=60, file=open(os.devnull, "w"))  # noqa: SIM115
    print_report(console)
    text = " ".join(console.export_text().split())
    assert "needs [red]that[/red]" in text and "→ pip install deepspeed" in text


def test_the_command_adds_what_the_loaders_manage():
    name, value, _ = report([loader_row])[-1]
    measured = dict(re.findall(r"(\w+) (\d+) images/s", value))
    assert name == "loader" and measured.keys() == ({"DALI", "Pillow"} if has_dali() else {"Pillow"})
    assert all(int(rate) > 0 for rate in measured.values())
