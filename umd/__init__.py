"""Unified Masked Diffusion: one masked autoencoder that recognises and generates.

The repository's folders `kernels/`, `train/` and `bench/` are the subpackages `umd.kernels`, `umd.train` and
`umd.bench`. In an installed copy they lie inside `umd/`. In a checkout they lie beside it, and the next lines add that
folder to the search path.
"""

from pathlib import Path

_root = Path(__file__).resolve().parent.parent
if (_root / "kernels" / "adaln.py").exists():  # ours: in site-packages `kernels/` is Hugging Face's package
    __path__.append(str(_root))

__version__ = "0.1.0"
