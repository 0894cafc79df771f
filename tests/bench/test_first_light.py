"""`bench/first_light.py` where there is no GPU: it runs to its end, and what hangs or fails stops nothing else."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from umd.bench.first_light import PARTS, grouped, is_bad, read_rows, run_limited, summary
from umd.bench.first_light_checks import relative, worst_row

ROOT = Path(__file__).parents[2]


def first_light(out: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "bench" / "first_light.py"), *options]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"OUT": str(out)}, capture_output=True, text=True)


def test_a_smoke_run_of_one_part(tmp_path):
    done = first_light(tmp_path, "--smoke", "--parts", "timing")
    assert done.returncode == 0, done.stdout
    part = json.loads((tmp_path / "first_light.json").read_text())["parts"]["timing"]
    assert part["status"] == "ok" and {row["kind"] for row in part["rows"]} == {"op", "attention", "refused"}
    assert {row["lengths"] for row in part["rows"] if row["kind"] == "attention"} == {"1 x 11 and 1 x 5", "2 x 17"}
    assert {"gated_residual_layer_norm", "masked_diffusion_loss"} <= {row.get("op") for row in part["rows"]}
    assert "gated_residual_layer_norm backward" in done.stdout and (tmp_path / "first_light.log").exists()


@pytest.mark.slow
def test_a_smoke_run_of_every_part(tmp_path):
    done = first_light(tmp_path, "--smoke", "--budget", "1200")
    assert done.returncode == 0, done.stdout
    parts = json.loads((tmp_path / "first_light.json").read_text())["parts"]
    kinds = {name: {row["kind"] for row in part["rows"]} for name, part in parts.items()}
    assert "ceiling" in kinds["env"] and "check" in kinds["correct"] and {"step", "profile"} <= kinds["step"]
    assert "curve" in kinds["cli"] and "tests" in kinds["tests"] and (tmp_path / "profile.txt").exists()


def test_what_hangs_is_ended_with_what_it_started(tmp_path, capsys):
    """The part's child would hold the log open and outlive it."""
    script = "import subprocess, sys, time\nprint('|shown'); print('kept')\n"
    script += "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    script += f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\ntime.sleep(600)"
    with open(tmp_path / "log", "a") as log:
        assert run_limited([sys.executable, "-c", script], 5, log) == "cut off after 5 s"
        assert run_limited([sys.executable, "-c", "raise SystemExit(3)"], 60, log) == "exit status 3"
    assert capsys.readouterr().out == "shown\n" and "kept" in (tmp_path / "log").read_text()
    child = Path("/proc", (tmp_path / "child").read_text(), "stat")
    assert not child.exists() or child.read_text().split()[2] == "Z"  # ended, whether or not somebody has noticed


def test_a_wrong_row_is_not_lost_in_the_norm_of_a_tensor():
    truth = torch.randn(4096, 2, 64, generator=torch.Generator().manual_seed(0))
    found = truth.clone()
    found[17, 1] = 0
    assert relative(found, truth) < 0.015 and 0.5 < worst_row(found, truth) < 2
    found[17, 1, 0] = torch.nan
    assert relative(found, truth) == worst_row(found, truth) == math.inf
    assert worst_row(truth[0, 0] * 1.01, truth[0, 0]) == pytest.approx(0.01, rel=1e-4)  # a vector is one row


def test_parts_that_time_nothing_run_beside_one_another():
    names = list(PARTS)
    assert grouped(names, True) == [["env"], ["correct", "cli", "tests"], ["step"], ["sample"], ["timing"], ["compile"]]
    assert grouped(names, False) == [[name] for name in names]
    assert grouped(["tests", "step", "correct"], True) == [["tests"], ["step"], ["correct"]]


@pytest.mark.parametrize(
    ("row", "bad"),
    [
        ({"kind": "tests", "ok": False}, True),
        ({"kind": "skipped"}, True),
        ({"kind": "failed"}, True),
        ({"kind": "check", "ok": True}, False),
        ({"kind": "note"}, False),
    ],
)
def test_what_was_wrong_or_left_out_is_not_passed_over(row, bad):
    assert is_bad({"rows": [{"kind": "note"}, row]}) == bad


def test_a_row_cut_in_the_middle_is_left_out(tmp_path):
    (tmp_path / "rows").write_text('{"kind": "note"}\n{"kind": "st')
    assert read_rows(tmp_path / "rows") == [{"kind": "note"}] and read_rows(tmp_path / "none") == []


def test_the_summary_begins_with_what_is_wrong():
    check = {"kind": "check", "model": "UMD-B/4 umd", "op": "scatter_tokens", "what": "float32 dtokens"}
    rows = [check | {"ok": True, "error": 1e-7}, check | {"ok": False, "error": 0.5}]
    text = summary({"correct": {"status": "ok", "seconds": 3, "rows": rows}})
    assert "1 of 2 checks right" in text and "WRONG UMD-B/4 umd scatter_tokens, float32 dtokens: 5.0e-01" in text


def test_an_unknown_part_is_named(tmp_path):
    done = first_light(tmp_path, "--parts", "env,speed")
    assert done.returncode == 2 and "unknown part 'speed'; expected of env,correct" in done.stderr
