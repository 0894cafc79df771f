"""kernels/ → umd/ → train/ → bench/: an arrow points at who may import. Read from the source, not run."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"kernels": "umd.kernels", "umd": "umd", "train": "umd.train", "bench": "umd.bench"}
LONGEST_FILE = 450

# What each folder may not import.
FORBIDDEN = {
    "kernels": ("umd",),
    "umd": ("umd.kernels", "umd.train", "umd.bench"),
    "train": ("umd.kernels", "umd.bench", "umd.cli"),
    "bench": ("umd.kernels", "umd.cli"),
}
ALLOWED = {
    ("umd/ops.py", "umd.kernels"),  # the one switch between Triton and the definitions
    ("umd/cli.py", "umd.train"),  # the front door
    ("umd/cli.py", "umd.bench"),
    ("bench/sweep.py", "umd.kernels"),  # changes how kernels are launched
}

# Not rglob: links to the other folders may lie in umd/ for the editor's sake.
FILES = [
    file.relative_to(ROOT)
    for folder in FOLDERS
    for pattern in ("*.py", "*/*.py")
    for file in sorted((ROOT / folder).glob(pattern))
    if not any(parent.is_symlink() for parent in file.parents)
]
pytestmark = pytest.mark.parametrize("file", FILES, ids=str)


def imports(file: Path) -> set[str]:
    """Absolute dotted names of all that a file imports anywhere in it: `from a import b` gives `a.b`."""
    package = [*FOLDERS[file.parts[0]].split("."), *file.parts[1:-1]]
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            found |= {".".join([*base, alias.name]) for alias in node.names}
    return found


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_imports_follow_the_arrows(file):
    for name in imports(file):
        for package in FORBIDDEN[file.parts[0]]:
            own = file.parts[0] == "kernels" and within(name, "umd.kernels")
            allowed = own or (file.as_posix(), package) in ALLOWED
            assert allowed or not within(name, package), f"{file} imports {name}"


def test_nobody_imports_the_folders_by_their_own_names(file):
    """`kernels` is Hugging Face's package; the others have a name of their own only at the root."""
    for name in imports(file):
        assert name.split(".")[0] not in ("kernels", "train", "bench", "tests"), f"{file} imports {name}"


def test_kernels_import_torch_triton_and_the_standard_library_only(file):
    if file.parts[0] == "kernels":
        packages = ["torch", "triton", "umd"]
        if file.name in ("attention.py", "cross_attention.py"):
            packages.append("flash_attn")  # where it is installed: one of the backends
        if file.name == "epilogues.py":
            packages.append("transformer_engine")  # where it is installed, and asked for
        outside = {name for name in imports(file) if name.split(".")[0] not in sys.stdlib_module_names}
        assert all(name.split(".")[0] in packages for name in outside), outside


def test_files_stay_short_enough_to_read(file):
    lines = len((ROOT / file).read_text().splitlines())
    assert lines <= LONGEST_FILE, f"{file} has {lines} lines: split it by meaning"


def test_no_init_file_outside_umd(file):
    """With one, `kernels/` would hide Hugging Face's package from diffusers at the root of the repository."""
    assert file.name != "__init__.py" or file == Path("umd/__init__.py")
