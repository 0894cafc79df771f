"""Encode images to latents and decode them, by a frozen VAE or VQ autoencoder of diffusers.

Latents are scaled as diffusion models use them: z = (the autoencoder's latent - shift) · scale.
"""

import hashlib
import json
import re
import socket
import urllib.parse
import urllib.request
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from umd.errors import UserError

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
KINDS = ("AutoencoderKL", "VQModel")
CHUNK = 32 * 256**2  # pixels encoded at a time, for which an encoder of Stable Diffusion's size needs some GiB


@dataclass(frozen=True)
class VAE:
    """Identity of an autoencoder, and the numbers that its latents need."""

    name: str
    """Hub id, or absolute path of a local folder."""
    kind: str
    """Class in diffusers."""
    sha256: str
    """Checksum of the weights and of the settings that affect the output. Equal for a hub id and a local copy."""
    channels: int
    """Channels of a latent."""
    factor: int
    """Image pixels per latent pixel, along one side."""
    scale: float
    shift: float


class Tokenizer:
    """A loaded autoencoder. `load_tokenizer` makes it."""

    def __init__(self, network: Any, vae: VAE):
        self.network, self.vae = network, vae

    @property
    def stochastic(self) -> bool:
        """Whether an image has a posterior distribution (VAE) instead of one latent (VQ)."""
        return self.vae.kind == "AutoencoderKL"

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latent of an image. Raises UserError if height or width is not divisible by the factor."""
        factor = self.vae.factor
        if height % factor or width % factor:
            raise UserError(
                f"images of {height}x{width} are not divisible by {factor}, by which {self.vae.name} makes them "
                f"smaller; use {max(height - height % factor, factor)}x{max(width - width % factor, factor)}"
            )
        return self.vae.channels, height // factor, width // factor

    @torch.no_grad()
    def moments(self, x: Tensor) -> Tensor:
        """Encode images [B, 3, H, W] in [-1, 1], in the precision of the surrounding autocast.

        Returns mean and standard deviation of the posteriors, fp32 [B, 2, C, h, w]; for VQ the latents [B, 1, C, h, w].
        """
        self.latent_shape(*x.shape[2:])
        chunk = max(CHUNK // (x.shape[2] * x.shape[3]), 1)
        return torch.cat([self._moments(part.to(self.device)) for part in x.split(chunk)])

    def _moments(self, x: Tensor) -> Tensor:
        vae = self.vae
        encoded = self.network.encode(x)
        if not self.stochastic:
            return ((encoded.latents.float() - vae.shift) * vae.scale)[:, None]
        posterior = encoded.latent_dist
        mean, std = posterior.mean.float(), torch.exp(0.5 * posterior.logvar.float())
        return torch.stack([(mean - vae.shift) * vae.scale, std * vae.scale], dim=1)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Decode latents [B, C, h, w] to images, fp32 [B, 3, H, W], approximately in [-1, 1]."""
        chunk = max(CHUNK // (z.shape[2] * z.shape[3] * self.vae.factor**2), 1)
        parts = (part.to(self.device, torch.float32) / self.vae.scale + self.vae.shift for part in z.split(chunk))
        return torch.cat([self.network.decode(part).sample.float() for part in parts])


@lru_cache(maxsize=1)
def load_tokenizer(name: str, device: torch.device | str = "cpu") -> Tokenizer:
    """Load an autoencoder. The last one loaded is kept.

    Args:
        name: hub id, or local folder: of the autoencoder itself, or of a pipeline with a subfolder `vae/` or `vqvae/`.
        device: where to put it.

    Raises:
        UserError: diffusers is not installed, there is no autoencoder, it is of another class, or its weights are
            missing or damaged.
    """
    try:
        import diffusers
    except ImportError as error:
        raise UserError("a VAE needs diffusers: pip install diffusers") from error
    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)  # the errors below replace its log
    local = Path(name).expanduser()
    if not local.exists() and not HUB_ID.fullmatch(name):
        raise UserError(f"there is no VAE at {name}: there is no such folder")
    if not local.exists():
        check_hub(name)
    path = str(local.resolve()) if local.exists() else name
    config, subfolder = find_config(path)
    kind = config.get("_class_name")
    if kind not in KINDS:
        raise UserError(f"{name} is a {kind or 'model of no known class'}; expected one of {' and '.join(KINDS)}")
    try:
        # Pickled weights are refused: loading a pickle can run code.
        network, found = getattr(diffusers, kind).from_pretrained(
            path, subfolder=subfolder, use_safetensors=True, output_loading_info=True, low_cpu_mem_usage=False
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"cannot load the VAE {name}: {first_line(error)}") from error
    if absent := [*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])]:
        raise UserError(
            f"the weights of the VAE {name} do not fit its config.json; the first that lacks is {absent[0]}"
        )
    network = network.to(device).eval().requires_grad_(False)
    return Tokenizer(network, identity(path, kind, network))


def check_hub(name: str) -> None:
    """Raise UserError if a hub id is not cached and the hub has no address here. Its library would try for minutes."""
    from huggingface_hub import constants, try_to_load_from_cache

    places = ("config.json", "vae/config.json", "vqvae/config.json")
    cached = any(isinstance(try_to_load_from_cache(name, place), str) for place in places)
    if cached or constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return
    host = urllib.parse.urlparse(constants.ENDPOINT).hostname
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise UserError(
            f"there is no VAE at {name}: no such folder, it is not in the cache of the Hugging Face hub, and {host} "
            f"cannot be reached ({error.strerror})"
        ) from error


def find_config(path: str) -> tuple[dict, str | None]:
    """(config.json of an autoencoder, the subfolder that holds it or None). Raises UserError if there is none."""
    from diffusers import AutoencoderKL

    reasons = []
    for subfolder in (None, "vae", "vqvae"):
        try:
            return AutoencoderKL.load_config(path, subfolder=subfolder), subfolder
        except (OSError, ValueError) as error:
            reasons.append(first_line(error))
    raise UserError(
        f"there is no VAE at {path}: expected a folder with config.json and weights as diffusers saves them, "
        f"or a hub id ({reasons[0]})"
    )


def identity(name: str, kind: str, network: Any) -> VAE:
    """The `VAE` record of an AutoencoderKL or VQModel of diffusers."""
    config = network.config
    scale = float(config.scaling_factor)
    shift = float(getattr(config, "shift_factor", None) or 0.0)
    # Hash only settings that affect the output: other entries come and go with versions of diffusers.
    digest = hashlib.sha256(json.dumps([kind, scale, shift, config.act_fn, config.norm_num_groups]).encode())
    for key, tensor in sorted(network.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return VAE(
        name=name,
        kind=kind,
        sha256=digest.hexdigest(),
        channels=(config.get("vq_embed_dim") if kind == "VQModel" else None) or config.latent_channels,
        factor=2 ** (len(config.block_out_channels) - 1),
        scale=scale,
        shift=shift,
    )


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
