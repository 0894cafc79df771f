"""A UMD for diffusers: the network as a component, and a pipeline that samples with diffusers' schedulers.

    pipeline = DiffusionPipeline.from_pretrained("exported", trust_remote_code=True)
    images = pipeline(class_labels=[207, 360], guidance_scale=4.0).images

The two code files in the exported folder import this module: umd must be installed where the pipeline is loaded.
"""

import inspect
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from diffusers import ConfigMixin, DDPMScheduler, DiffusionPipeline, ImagePipelineOutput, ModelMixin
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
            timestep: [B] or a single number, counted from 0 as in diffusers (model time - 1). Fractions are rounded.
            class_labels: int64 [B], or None.
            return_dict: return an output object, not a tuple.

        Returns:
            ε̂ [B, C, H, W]; a network with learned variance returns [B, 2·C, H, W], ε̂ then v.
        """
        indices = torch.as_tensor(timestep, device=hidden_states.device).double().round().long()
        timesteps = indices.expand(len(hidden_states)) + 1
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
            ValueError: labels for a network without labels, none for a network with labels, or labels out of range;
                pictures of a network on latents without a VAE.
        """
        config: ModelConfig = self.transformer.network.config
        class_labels = [int(label) for label in class_labels]
        if bool(class_labels) != bool(config.num_classes):
            raise ValueError("class_labels: give them to a network with labels, and to no other")
        if any(not 0 <= label < config.num_classes for label in class_labels):
            raise ValueError(f"class_labels must be in 0..{config.num_classes - 1}, got {class_labels}")
        if self.vae is None and config.channels not in (1, 3) and output_type != "latent":
            raise ValueError("this network makes latents: load the pipeline with vae=…, or use output_type='latent'")
        B, device = len(class_labels) or num_images, self._execution_device
        shape = (B, config.channels, *config.image_size)
        x = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        labels = torch.tensor(class_labels, device=device) if class_labels else None
        guided = labels is not None and guidance_scale != 1
        if guided and labels is not None:
            labels = torch.cat([labels, torch.full_like(labels, config.num_classes)])
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        x = x * self.scheduler.init_noise_sigma
        # Only DDPMScheduler uses a learned variance. DPM-Solver would take it to be all but the first 3 channels.
        learned = "learned" in str(getattr(self.scheduler.config, "variance_type", None))
        if learned and not isinstance(self.scheduler, DDPMScheduler):
            learned = False
            self.scheduler.register_to_config(variance_type=None)
        known = inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if "generator" in known else {}
        C = config.channels
        for t in self.progress_bar(self.scheduler.timesteps):
            seen = self.scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
            predicted = self.transformer(seen, t, labels).sample
            if guided:
                cond, uncond = predicted.chunk(2)
                eps = uncond[:, :C] + guidance_scale * (cond[:, :C] - uncond[:, :C])
                predicted = torch.cat([eps, cond[:, C:]], dim=1)  # the variance is not guided, as in DiT
            predicted = predicted if learned else predicted[:, :C]
            x = self.scheduler.step(predicted, t, x, **extra).prev_sample
        if output_type == "latent":
            return ImagePipelineOutput(images=x) if return_dict else (x,)
        if self.vae is not None:
            shift = getattr(self.vae.config, "shift_factor", None) or 0.0
            x = self.vae.decode(x / self.vae.config.scaling_factor + shift).sample
        images: Any = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().float().numpy()
        images = self.numpy_to_pil(images) if output_type == "pil" else images
        return ImagePipelineOutput(images=images) if return_dict else (images,)
