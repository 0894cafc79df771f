"""What a process sets for itself before its libraries load, each case in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from umd.environment import GPU_FILES

ROOT = Path(__file__).parents[2]
SHOW = """
import os, sys
print("begins", flush=True)
from umd.environment import prepare
prepare(restart={restart})
print(os.environ.get("GLIBC_TUNABLES"), os.environ.get("GOMP_SPINCOUNT"), sys.argv[1:], sys.flags.utf8_mode)
"""
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or any(map(os.path.exists, GPU_FILES)), reason="restarts only on Linux, without a GPU"
)


def shown(restart: bool, **env: str) -> list[str]:
    inherited = {
        k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    command = [sys.executable, "-X", "utf8", "-c", SHOW.format(restart=restart), "a b", "--c"]
    done = subprocess.run(
        command, env=inherited | env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_it_starts_again_once_with_the_same_arguments():
    lines = shown(restart=True)
    assert lines[:2] == ["begins", "begins"] and len(lines) == 3
    assert lines[2].startswith("glibc.malloc.tcache_count=0") and lines[2].endswith("['a b', '--c'] 1")


def test_what_is_set_stays():
    assert shown(restart=True, GLIBC_TUNABLES="glibc.malloc.perturb=0", GOMP_SPINCOUNT="7") == [
        "begins",
        "glibc.malloc.perturb=0 7 ['a b', '--c'] 1",
    ]


def test_called_from_python_it_does_not_start_again():
    begins, told = shown(restart=False)
    assert begins == "begins" and told.startswith("None 2")  # 2000 or 20000


def test_a_wait_policy_is_left_to_decide():
    assert shown(restart=False, OMP_WAIT_POLICY="passive")[1].startswith("None None")
