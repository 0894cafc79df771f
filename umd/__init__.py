"""Unified Masked Diffusion: one masked autoencoder that recognises and generates.

The folders `kernels/`, `train/` and `bench/` of the repository are the subpackages `umd.kernels`, `umd.train` and
`umd.bench`. An installed copy has them inside the package; a checkout has them beside it, and the next lines find them there.
"""

from pathlib import Path

_root = Path(__file__).resolve().parent.parent
if (_root / "kernels" / "README.md").exists() or (_root / "kernels" / "adaln.py").exists():
    __path__.append(str(_root))

__version__ = "0.1.0"
