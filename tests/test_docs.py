"""Every command and Python snippet of README.md and docs/ is run; the book builds, and loads nothing from elsewhere.

Commands run as they stand, in a folder that has what they name (pictures, runs, latents), with a few options appended
that make them small. What cannot run here is listed with its reason, and at least parsed.
"""

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from umd import cli
from umd.bench import options as bench_options
from umd.train.options import Demo, Evaluate
from umd.train.presets import PRESETS
from umd.train.run import RunConfig
from umd.train.settings import DataConfig

ROOT = Path(__file__).parents[1]
SHORT = [ROOT / name for name in ("kernels/README.md", "launch/README.md", "bench/results/gpu/README.md")]
BOOK = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", *SHORT, *BOOK]

# Options appended to a command, by its name; later ones win. Of a run: 8x8 pictures, 16 wide, two steps.
NETWORK = "--model.image-size 8 8 --model.patch-size 2 --model.hidden-size 16 --model.depth 1 --model.num-heads 2 "
NETWORK += "--model.decoder-depth 1 --evaluate-count 16"
DIFFMAE = "--model.decoder-hidden-size 8 --model.decoder-num-heads 2"
LENGTH = "--steps 2 --batch-size 20 --accumulate 1 --data.num-workers 0 --device cpu --precision fp32 --out {out}"
SMALL = {
    "pretrain": f"{NETWORK} {LENGTH}",
    "finetune": LENGTH,
    "plan": f"{NETWORK} --disk 1",
    "sample": "--steps 2 --count 4 --out {out}",
    "inpaint": "--steps 2 --out {out}",
    "probe": "--shots 2 --l2 1 --seeds 0",
    "transfer": "--shots 2 --seeds 0",
    "evaluate": "--steps 2 --count 8 --few --shots 2 --errors 0",
    "encode-latents": "--image-size 16 16 --out {out}",
    "encode-pixels": "--size 12 12 --out {out}",
    "export": "--image-size 8 8 --out {out}",
    "import": "--num-heads 4 --decoder-num-heads 4 --out {out}",
    "check-data": "--workers 1 --min-side 8 --out {out}",
    "embed": "--out {out}",
}  # fmt: skip
STAND_FOR = {"PRESET": "umd-b4", "RUN": "runs/umd-b4-labels", "OTHER": "runs/umd-b4-labels", "FOLDER": "sets"}

# What a command needs that another makes first.
VAE = "--data.source imagenet --data.vae stabilityai/sd-vae-ft-ema"
MADE_BY = {
    "latents/imagenet": f"umd encode-latents {VAE}",
    "latents/imagenet-finetune": f"umd encode-latents --recipe finetune {VAE}",
    "pixels/imagenet": "umd encode-pixels --data.source imagenet",
    "runs/umd-l2": "umd pretrain umd-l2 --data.source latents/imagenet",
    "runs/umd-l2-labels": "umd finetune runs/umd-l2 --data.source latents/imagenet-finetune",
    "runs/dit-xl2": "umd import dit DiT-XL-2-256x256.pt",
    "runs/diffmae-tiny": "umd pretrain diffmae-tiny --data.source path/to/images",
    "runs/diffmae-video-l": "umd pretrain diffmae-video-l",
    "runs/mine-classify": "umd finetune runs/mine --task classify",
}

# What is not run: the beginning of the command, and why. Each must match one. They are parsed by `umd` and by bash.
NOT_RUN = {
    "make ": "installs",
    "pip install ": "network",
    ". .venv/bin/activate": "installed",
    "mkdir -p imagenet/": "ImageNet",
    "tar -xf ILSVRC2012": "ImageNet",
    "for f in imagenet/": "ImageNet",
    "tensorboard ": "serves",
    "sbatch ": "Slurm",
    "launch/torchrun.sh ": "GPUs",
    "HOSTFILE=launch/hostfile ": "hosts",
    "torchfrtrace ": "hang",
    "PYTHONPATH=. python bench/first_light.py": "GPU",
    "umd demo": "minutes",
    "umd doctor": "slow",
    "umd evaluate RUN --features ": "weights",
    "umd bench ": "minutes",
}


def blocks(text: str, *languages: str) -> list[str]:
    """The fenced blocks of some languages, and for sh the indented ones too."""
    fenced = re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", text, re.M | re.S)
    plain = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    if "sh" in languages:
        fenced += [re.sub("^    ", "", block, flags=re.M) for block in re.findall(r"\n\n((?:    .*\n)+)", plain)]
    return fenced


def commands(page: Path) -> Iterator[str]:
    """Command lines of a page: of its blocks, and `umd …` between backticks in its text."""
    text = page.read_text()
    for block in blocks(text, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield line.strip() if line.startswith(("for ", ". ")) else shlex.join(words)
    prose = re.sub(r"^```.*?^```|^    .*?$", "", text, flags=re.M | re.S)
    for line in re.findall(r"`(umd\s[^`]+)`", prose):
        yield shlex.join(shlex.split(line))


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands(page)))


def words_of(command: str) -> list[str]:
    """`umd NAME ...` of a command that starts it on several GPUs; here one process runs it."""
    words = shlex.split(command)
    if words[0] in ("torchrun", "srun"):
        start = words.index("umd") if "umd" in words else words.index("umd.cli")
        words = ["umd", *words[start + 1 :]]
    return [STAND_FOR.get(word, word).replace("RUN/", "runs/umd-b4-labels/") for word in words]


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory, vaes, make_run):
    """A folder with everything the commands name. All of it is tiny and says nothing."""
    root = tmp_path_factory.mktemp("sandbox")
    rng = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)

        def pictures(folder: str, count: int, side: int = 12) -> None:
            Path(folder).mkdir(parents=True)
            for i in range(count):
                values = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(values).save(f"{folder}/{i}.jpg", quality=95)

        for label in ("cat", "dog", "owl"):
            pictures(f"path/to/images/{label}", 24)
            pictures(f"imagenet/train/{label}", 12, 16)
            pictures(f"imagenet/val/{label}", 6, 16)
            pictures(f"sets/cifar100/train/{label}", 3)
            pictures(f"sets/cifar100/test/{label}", 2)
        pictures("photos", 3)
        for clip in range(10):
            pictures(f"clips/{clip}", 64, 8)
        Image.new("RGB", (20, 16), "teal").save("photo.png")
        shutil.copytree(ROOT / "docs" / "results" / "paper-umd", "docs/results/paper-umd")
        Path("stabilityai").mkdir()
        Path("stabilityai/sd-vae-ft-ema").symlink_to(vaes["kl"])
        Path("path/to/vae").symlink_to(vaes["kl"])
        published_weights()
        data = DataConfig(source="path/to/images")
        for name, classes in {"mine": 0, "demo/pretrain": 0, "umd-tiny": 0, "umd-b4": 0, "mae-b4": 0}.items():
            make_run(Path("runs") / name, data, num_classes=classes, patch_size=4 if name == "mae-b4" else 2)
        for name in ("mine-labels", "umd-b4-labels"):
            make_run(Path("runs") / name, data, patch_size=2)
    return root


def published_weights() -> None:
    """Networks with the names and shapes of those of tests/data, under the names of the published files."""
    data = ROOT / "tests" / "data"
    for name, made in {
        "published_dit_sigma1": "DiT-XL-2-256x256.pt",
        "published_mae_normpix0": "mae_pretrain_vit_base_full.pth",
        "published_maskdit": "2000000.pt",
    }.items():
        with np.load(data / f"{name}.npz") as arrays:
            shapes = json.loads(str(arrays["shapes"]))
            state = {name: 0.1 * torch.randn(*shape) for name, shape in shapes.items()}
            state |= {n[7:]: torch.from_numpy(arrays[n]) for n in arrays.files if n.startswith("param::")}
        torch.save({"model": state} if "mae" in name else state, made)
    Path("weights.npz").symlink_to(data / "umd_adaln.npz")


def small(words: list[str], out: str) -> list[str]:
    """The command with the options that make it small."""
    options = [SMALL.get(words[1], "")]
    if words[1] == "pretrain":
        options += [DIFFMAE] * ("diffmae" in words[2])
        if words[2] in PRESETS and PRESETS[words[2]][1].data.source == "emoji" and "--data.source" not in words:
            options += ["--data.source path/to/images"]
    return [*words, *shlex.split(" ".join(options).format(out=out))]


def make(words: list[str], out: str) -> None:
    """Run a command in its small form, after those that make what it needs."""
    for name in words[2:]:
        if name in MADE_BY and name != out and not Path(name).exists():
            make(shlex.split(MADE_BY[name]), name)
    umd(small(words, out))


def umd(words: list[str]) -> str:
    """Run `umd ...` in this process; what it printed. Fails where it ends with another code than 0."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            cli.main(words[1:])
    except SystemExit as end:
        assert not end.code, f"{shlex.join(words)}\n{out.getvalue()}"
    return out.getvalue()


def parse(words: list[str]) -> None:
    """Options of a `umd` command that is not run: by its own parser."""
    _, name, *rest = words
    if name == "bench" and rest:
        cli.parse(getattr(bench_options, cli.BENCHES[rest[0]][0]), "bench", rest[1:])
    elif name == "demo":
        cli.parse(Demo, name, rest)
    elif name == "evaluate":
        cli.parse(Evaluate, name, rest[1:])
    elif name == "pretrain":
        cli.parse(RunConfig, name, rest[1:], cli.with_length(PRESETS[rest[0]][1], rest))
    else:
        assert name in cli.COMMANDS


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith(tuple(NOT_RUN))])
def test_a_command_runs(command, sandbox, colours, tmp_path, monkeypatch):
    """Scores are of a feature network of six numbers, for speed."""
    monkeypatch.chdir(sandbox)
    words = words_of(command)
    assert words[0] == "umd", f"{command}: neither a umd command nor listed in NOT_RUN"
    if len(words) == 2 or "--help" in words:
        umd([*words, "--help"])
    else:
        make(words, str(tmp_path / "out"))


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(tuple(NOT_RUN))])
def test_a_command_that_cannot_run_here_parses(command):
    words = shlex.split(command)
    if words[0] == "umd":
        (umd if "--help" in words else parse)(words)
    for i, word in enumerate(words):
        if re.fullmatch(r"launch/\w+\.(sh|sbatch)", word):
            assert (ROOT / word).exists()
            parse(["umd", "pretrain", *words[i + 1 :]])
    subprocess.run(["bash", "-n", "-c", command], check=True)


def test_what_is_not_run_is_in_the_book():
    for beginning in NOT_RUN:
        assert any(command.startswith(beginning) for command in COMMANDS), f"no page has {beginning!r} any more"


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p.read_text(), "python")], ids=lambda p: p.stem)
def test_the_python_of_a_page_runs(page, sandbox, monkeypatch):
    monkeypatch.chdir(sandbox)
    names: dict = {"__name__": "__main__", "images": torch.rand(2, 3, 8, 8) * 2 - 1}
    for block in blocks(page.read_text(), "python"):
        for run in re.findall(r"runs/[\w-]+", block):
            if run in MADE_BY and not Path(run).exists():
                make(shlex.split(MADE_BY[run]), run)
        exec(compile(block, page.name, "exec"), names)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [ROOT / "README.md", *SHORT], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_outside_of_the_book_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{page}: {link}"
            assert not anchor or anchor in anchors(target), f"{page}: {link}"


def test_the_book_builds_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("sphinx", reason="the book is made by Sphinx: pip install -e '.[dev]'")
    build = [sys.executable, "-m", "sphinx", "-q", "-n", "-W", "--keep-going", "-b", "html", "docs", str(tmp_path)]
    made = subprocess.run([*build, "-d", str(tmp_path / ".doctrees")], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "index.html").exists() and (tmp_path / "searchindex.js").exists()
    for file in tmp_path.rglob("*.html"):
        for tag in re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", file.read_text()):
            loaded = re.search(r'(?:src|href)="((?:https?:)?//[^"]*)"', tag)
            assert not loaded or 'rel="canonical"' in tag, f"{file.name} loads {loaded[1]}"
    for file in tmp_path.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", file.read_text()), file.name
