"""For every test: thread counts, no network, the data folder, and GPU tests skipped where there is none."""

import os
import signal
from pathlib import Path

# Before torch is imported. Tests that run side by side get a thread each, and so do the programs they start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses where bits must repeat

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# The same examples every time, and no limit on the clock: a busy machine is no fault of the code.
hypothesis.settings.register_profile("umd", derandomize=True, deadline=None)
hypothesis.settings.load_profile("umd")

# Without a GPU, kernels run in Triton's interpreter. Triton asks when a kernel is defined; programs that a test starts
# are left alone.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
import umd.ops  # noqa: E402, F401  (defines every kernel)
from umd.kernels import backend  # noqa: E402

if backend.INTERPRET:
    import triton.experimental.gluon  # noqa: E402, F401  (the first launch imports it, and it asks too)
    from triton.runtime import interpreter  # noqa: E402

    _convert_float = interpreter._convert_float

    def _convert_float_rounding(data, source, target, rounding_mode):
        """The interpreter cuts fp32 off to bf16, where GPUs round to nearest even."""
        if (source, target, rounding_mode) != (backend.tl.float32, backend.tl.bfloat16, None):
            return _convert_float(data, source, target, rounding_mode)
        return torch.from_numpy(data.copy()).bfloat16().view(torch.uint16).numpy()

    interpreter._convert_float = _convert_float_rounding
    # The interpreter is slow: tests ask for it with `backend.kernels("triton")`.
    backend.set_kernels("reference")
os.environ.pop("TRITON_INTERPRET", None)


def pytest_configure() -> None:
    """Stopped by SIGTERM, pytest ends as after Ctrl-C: it tells what failed until then."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The files that tests compare with."""
    return Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def vaes(tmp_path_factory):
    """Folders of tiny autoencoders as diffusers saves them; each makes images half as large."""
    diffusers = pytest.importorskip("diffusers", reason="VAEs are those of diffusers: pip install diffusers")
    blocks = dict(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1)
    blocks |= dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    root = tmp_path_factory.mktemp("vaes")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, make in {
            "kl": lambda: diffusers.AutoencoderKL(latent_channels=4, **blocks),
            "other": lambda: diffusers.AutoencoderKL(latent_channels=4, **blocks),
            "shifted": lambda: diffusers.AutoencoderKL(
                latent_channels=4, scaling_factor=0.5, shift_factor=0.25, **blocks
            ),
            "vq": lambda: diffusers.VQModel(latent_channels=3, **blocks),
        }.items():
            make().save_pretrained(root / name)
    return {folder.name: folder for folder in root.iterdir()}


@pytest.fixture(scope="session")
def make_run():
    """Makes a run in a folder whose network says something: random weights, nothing trained."""
    from dataclasses import replace

    import torch

    from umd.checkpoint import save_checkpoint
    from umd.config import ModelConfig
    from umd.methods import build_model
    from umd.train.run import RunConfig, to_plain, write_config
    from umd.train.settings import DataConfig

    tiny = ModelConfig(
        image_size=(8, 8), patch_size=4, hidden_size=16, depth=1, num_heads=2, decoder_depth=1, num_classes=3
    )

    def make(folder: Path, data: DataConfig | None = None, **changes) -> Path:
        torch.manual_seed(0)
        config = RunConfig(out=folder, model=replace(tiny, **changes), data=data or DataConfig())
        model = build_model(config.model)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        write_config(config)
        state = {"config": to_plain(config)}
        save_checkpoint(config.checkpoints, 1, {"model": dict(model.named_parameters())}, state)
        return folder

    return make


@pytest.fixture
def colours(monkeypatch) -> None:
    """`umd evaluate` has a feature network of few features: the mean colour, and that of the middle."""
    from umd.feature_networks import Outputs

    class Colours(torch.nn.Module):
        name, input, weights_sha256 = "Colours", "as it is", "0"
        num_features, num_spatial, num_logits = 6, 12, 3

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.eye(3), requires_grad=False)

        def outputs(self, x: torch.Tensor) -> Outputs:
            x = x.expand(-1, 3, -1, -1)  # grey pictures too, as the real networks do
            mean, middle = x.mean((2, 3)) @ self.weight, x[:, :, 3:5, 3:5].mean((2, 3))
            return Outputs(torch.cat([mean, middle], 1), x[:, :, 0:8:4, 0:8:4].flatten(1), 3 * mean)

    monkeypatch.setattr("umd.train.evaluate.open_features", lambda which, weights: Colours())
