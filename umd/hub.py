"""The network with huggingface_hub's `save_pretrained`, `push_to_hub` and `from_pretrained`."""

from huggingface_hub import PyTorchModelHubMixin

from umd.config import ModelConfig
from umd.model import UMD


class UMDModel(
    UMD, PyTorchModelHubMixin, library_name="umd", tags=["unified-masked-diffusion"],
    paper_url="https://arxiv.org/abs/2406.17688",
):  # fmt: skip
    """A UMD, DiT, MAE or MaskDiT network of this package. config.json holds the fields of its `ModelConfig`."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)

    @classmethod
    def of(cls, network: UMD) -> "UMDModel":
        """A copy of a network, with its weights."""
        made = cls(config=network.config)
        made.load_state_dict(network.state_dict())
        return made.eval()
