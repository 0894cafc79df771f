"""The package works installed and as a checkout, with Hugging Face's package `kernels` beside it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHECK = """
import sys
from pathlib import Path
import umd, umd.train, umd.bench, umd.kernels.adaln, kernels
assert Path(umd.__file__).is_relative_to(sys.argv[1]), umd.__file__
assert Path(umd.kernels.adaln.__file__).is_relative_to(sys.argv[1]), umd.kernels.adaln.__file__
assert kernels.of_hugging_face
"""


def check(where, site, folder):
    """Import in `folder` with `where` on the path, and `site` holding Hugging Face's package."""
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text("of_hugging_face = True")
    path = os.pathsep.join(map(str, [where, site]))
    command = [sys.executable, "-c", CHECK, str(where)]
    subprocess.run(command, check=True, cwd=folder, env={**os.environ, "PYTHONPATH": path})


def test_a_checkout_imports_from_any_folder(tmp_path):
    check(ROOT, tmp_path / "site", tmp_path)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Where pip has installed a copy of this checkout."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("install")
    source = folder / "source"
    for name in ("umd", "kernels", "train", "bench"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    install = "-m pip install --quiet --no-deps --no-build-isolation --no-compile --no-index --target"
    subprocess.run([sys.executable, *install.split(), folder / "site", source], check=True)
    return folder / "site"


def test_an_installed_copy_is_complete(site):
    """Every file that the repository has of them, but for records, pages and shell scripts."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs the repository")
    for folder, name in {"umd": "umd", "kernels": "umd/kernels", "train": "umd/train", "bench": "umd/bench"}.items():
        tracked = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True)
        wanted = {str(Path(file).relative_to(folder)) for file in tracked.stdout.splitlines()}
        assert not {
            file
            for file in wanted
            if not re.match(r"results/|.*\.(md|sh)$", file) and not (site / name / file).exists()
        }


def test_an_installed_copy_imports_beside_hugging_faces_kernels(site, tmp_path):
    check(site, site, tmp_path)
