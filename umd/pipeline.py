"""A UMD for diffusers: the network as a component, and a pipeline that samples with any of diffusers' schedulers.

    pipeline = DiffusionPipeline.from_pretrained("exported", trust_remote_code=True)
    images = pipeline(class_labels=[207, 360], guidance_scale=4.0).images

The two code files in the exported folder import this module: umd must be installed where the pipeline is loaded.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from umd.config import ModelConfig
from umd.model import UMD


class UMDTransformer(ModelMixin, ConfigMixin):
    """The network as a diffusers model, which diffusers can save and load."""

    @register_to_config
    def __init__(self, fields: dict[str, Any]):
        """fields: the fields of a `ModelConfig`."""
        super().__init__()
        self.network = UMD(ModelConfig(**fields))

    @classmethod
    def of(cls, network: UMD) -> "UMDTransformer":
        """A component with a copy of a network's weights."""
        fields = asdict(network.config)
        made = cls(fields=fields | {"image_size": list(network.config.image_size)})
        made.network.load_state_dict(network.state_dict())
        return made.eval()

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict ε̂ from noisy images [B, C, H, W].

        Args:
            hidden_states: [B, C, H, W].
            timestep: [B] or a single number, counted from 0 as in diffusers (model time - 1).
            class_labels: int64 [B], or None.
            return_dict: return an output object, not a tuple.

        Returns:
            ε̂ [B, C, H, W]; a network with learned variance returns [B, 2·C, H, W], ε̂ then v.
        """
        timesteps = torch.as_tensor(timestep, device=hidden_states.device).long().expand(len(hidden_states)) + 1
        _, *predicted = self.network.denoise(hidden_states, timesteps, class_labels)
        sample = torch.cat(predicted, dim=1)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


class UMDPipeline(DiffusionPipeline):
    """Draws images of given classes, or unconditional images if the network has no labels."""

    _optional_components = ["vae"]
    model_cpu_offload_seq = "transformer->vae"

    def __init__(self, transformer: UMDTransformer, scheduler: Any, vae: Any = None):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)

    @torch.no_grad()
    def __call__(
        self, class_labels: Sequence[int] = (), num_images: int = 1, guidance_scale: float = 1.0,
        num_inference_steps: int = 125, generator: torch.Generator | None = None, output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:  # fmt: skip
        """Draw images.

        Args:
            class_labels: one image is drawn for each label. Leave out for a network without labels.
            num_images: number of images for a network without labels.
            guidance_scale: s in uncond + s·(cond - uncond); 1: no guidance.
            num_inference_steps: steps of the scheduler.
            generator: source of the noise.
            output_type: pil, np, or latent (the network's own output, not decoded).
            return_dict: return an output object, not a tuple.

        Raises:
            ValueError: labels for a network without labels, or none for a network with labels.
        """
        config: ModelConfig = self.transformer.network.config
        if bool(class_labels) != bool(config.num_classes):
            raise ValueError("class_labels: give them to a network with labels, and to no other")
        B, device = len(class_labels) or num_images, self._execution_device
        shape = (B, config.channels, *config.image_size)
        x = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        labels = torch.tensor(list(class_labels), device=device) if class_labels else None
        guided = labels is not None and guidance_scale != 1
        if guided and labels is not None:
            labels = torch.cat([labels, torch.full_like(labels, config.num_classes)])
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        x = x * self.scheduler.init_noise_sigma
        for t in self.progress_bar(self.scheduler.timesteps):
            seen = self.scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
            predicted = self.transformer(seen, t, labels).sample
            if guided:
                cond, uncond = predicted.chunk(2)
                predicted = uncond + guidance_scale * (cond - uncond)
            if getattr(self.scheduler.config, "variance_type", None) not in ("learned", "learned_range"):
                predicted = predicted[:, : config.channels]
            x = self.scheduler.step(predicted, t, x, generator=generator).prev_sample
        if output_type == "latent":
            return ImagePipelineOutput(images=x) if return_dict else (x,)
        if self.vae is not None:
            x = self.vae.decode(x / self.vae.config.scaling_factor).sample
        images: Any = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().float().numpy()
        images = self.numpy_to_pil(images) if output_type == "pil" else images
        return ImagePipelineOutput(images=images) if return_dict else (images,)
