"""What a start does not wait for."""

import os
import subprocess
import sys

import pytest

LINES = [
    ["--help"], ["pretrain", "--help"], ["pretrain", "umd-tiny", "--optim.lrr", "1"], ["pretrain", "umd-tinyy"],
    ["plan", "umd-l2", "--help"], ["finetune", "--help"], ["finetune", "nowhere"], ["sample", "--help"], ["sample"],
    ["inpaint", "--help"], ["probe", "nowhere"], ["evaluate", "--help"], ["embed", "nowhere", "x"],
    ["transfer", "--help"], ["encode-latents", "--help"], ["encode-pixels", "--help"], ["inspect", "--help"],
    ["import", "--help"], ["export", "timm", "nowhere"], ["check-data", "--help"], ["check-data", "nowhere"],
    ["demo", "--help"], ["sampel"], ["bench", "step", "--help"], ["bench", "kernels", "--ops", "norm"],
]  # fmt: skip


def loaded(code: str) -> set[str]:
    """Modules of a process of its own after this code."""
    code = f"import sys\n{code}\nprint('\\n' + ' '.join(sys.modules), file=sys.__stdout__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split("\n")[-2].split())


def test_help_and_mistakes_are_answered_without_torch():
    code = f"from umd import cli\nfor line in {LINES}:\n    try: cli.main(line)\n    except SystemExit: pass"
    assert not {"torch", "matplotlib"} & loaded(f"{code}\nimport umd.train.check")


def test_help_in_an_encoding_that_lacks_its_characters():
    env = os.environ | {"PYTHONIOENCODING": "latin-1"}
    line = [sys.executable, "-m", "umd.cli", "sample", "--help"]
    done = subprocess.run(line, capture_output=True, env=env, check=True)
    assert b"--per-class INT?1" in done.stdout


@pytest.mark.parametrize("module", ["umd.train.loop", "umd.train.sample"])
def test_a_run_starts_without_compilers_and_plots(module):
    assert not {"torch._dynamo", "torch._inductor", "sympy", "matplotlib", "diffusers"} & loaded(f"import {module}")
