"""`bench/sweep.py` in Triton's interpreter: every setting that it tries gives what the settings in use give."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="it launches kernels: pip install triton")

ROOT = Path(__file__).parents[2]


def test_a_smoke_run(tmp_path):
    command = [sys.executable, "bench/sweep.py", "--smoke", "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    kernels = {f"attention {where} {name}" for where in ("encoder", "decoder") for name in ("FWD", "BWD_Q", "BWD_KV")}
    assert {row["what"] for row in rows} == kernels | {"norm _fwd_launch", "norm _sum_launch"}
    assert all(row["difference"] < 0.01 for row in rows)
