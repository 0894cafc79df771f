"""Unified Masked Diffusion: one masked autoencoder that recognises and generates.

The folders `kernels/`, `train/` and `bench/` of the repository are the subpackages `umd.kernels`, `umd.train`
and `umd.bench`. An installed copy has them inside; a checkout has them beside it, where the next lines look.
"""

from pathlib import Path

_root = Path(__file__).resolve().parent.parent
if (_root / "kernels" / "adaln.py").exists():  # ours: in site-packages `kernels/` is Hugging Face's package
    __path__.append(str(_root))

__version__ = "0.1.0"
