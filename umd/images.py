"""Convert between model tensors ([B, C, H, W] in [-1, 1]) and images (uint8 [B, H, W, C]), and lay images out."""

from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from umd.errors import UserError
from umd.files import write_whole

OTHER_KINDS = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".pdf", ".svg")


def to_uint8(x: Tensor) -> np.ndarray:
    """Floats [B, C, H, W] in [-1, 1] (clipped) to uint8 [B, H, W, C]."""
    x = (x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5
    return x.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def from_uint8(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, C] to float32 [B, C, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def grid(images: np.ndarray, columns: int, pad: int = 2) -> np.ndarray:
    """Lay out images, uint8 [N, H, W, C], in rows of `columns` on a white sheet. Returns uint8 [H', W', 3]."""
    n, h, w, c = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (h + pad) + pad, columns * (w + pad) + pad, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = pad + (i // columns) * (h + pad), pad + (i % columns) * (w + pad)
        sheet[top : top + h, left : left + w] = image if c == 3 else image[..., :1]
    return sheet


def save_png(image: np.ndarray, path: Path | str, scale: int = 1) -> Path:
    """Write uint8 [H, W, 3] as a PNG, each pixel repeated `scale` times. Returns the path."""
    path, encoded = Path(path), BytesIO()
    Image.fromarray(image.repeat(scale, 0).repeat(scale, 1)).save(encoded, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, encoded.getvalue())
    return path


def png_path(out: Path, *others: str) -> Path:
    """`out` as the path of a PNG file. others: suffixes of files beside it that may stand for it.

    Raises UserError for the suffix of another kind of picture.
    """
    suffix = out.suffix.lower()
    if suffix in OTHER_KINDS:
        raise UserError(f"{out} would be no {suffix[1:].upper()}: pictures are written as PNG; give a name with .png")
    return out.with_suffix(".png") if suffix in (".png", *others) else out.with_name(f"{out.name}.png")


HIDDEN = 168  # the grey of a removed patch


def masked_view(image: np.ndarray, mask: np.ndarray, patch_size: int) -> np.ndarray:
    """Grey out the removed patches of an image.

    Args:
        image: uint8 [H, W, C].
        mask: [L] or [H/P, W/P], patches in row-major order; 0 keep, 1 remove.
        patch_size: P; must divide H and W.

    Returns:
        A new uint8 [H, W, C].

    Raises:
        ValueError: the mask does not fit.
    """
    h, w, _ = image.shape
    rows, columns = h // patch_size, w // patch_size
    if (rows * patch_size, columns * patch_size) != (h, w) or mask.size != rows * columns:
        raise ValueError(f"A mask of {mask.size} does not fit {h}x{w} pixels in {patch_size}x{patch_size} patches.")
    hidden = np.asarray(mask).reshape(rows, columns).astype(bool).repeat(patch_size, 0).repeat(patch_size, 1)
    return np.where(hidden[..., None], np.uint8(HIDDEN), image)
