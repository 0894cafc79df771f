"""The ops of the model; each chooses the implementation that suits this machine.

No other module of umd/ imports `umd.kernels`.
"""
# ruff: noqa: F401  (other modules take these names from here)

from umd.kernels.adaln import gated_residual_layer_norm, modulated_layer_norm
from umd.kernels.attention import Attention, attention, attention_backend, varlen_attention
from umd.kernels.backend import cpu_paths, kernels, products_dtype, use_cpu_path, use_triton
from umd.kernels.column_sum import column_sum
from umd.kernels.cpu.compiled import adamw_, compiler_lacks, square_sum
from umd.kernels.cpu.linear import forget
from umd.kernels.cross_attention import varlen_cross_attention
from umd.kernels.ddim import ddim_step
from umd.kernels.epilogues import Gelu, activated_linear, epilogues_refusal, gelu_by, gelu_in_products, linear_gelu
from umd.kernels.gelu import gelu
from umd.kernels.linear import bias_gradient, few_rows_linear, gelu_linear, linear, splits_bias
from umd.kernels.loss import masked_diffusion_loss
from umd.kernels.packing import Packing, kept, pack, per_token
from umd.kernels.patches import gather_patches, patchify, standard_noise, unpatchify
from umd.kernels.philox import philox_randn_rows, philox_randn_samples, random_words
from umd.kernels.positions import add_positions
from umd.kernels.posterior import sample_posterior
from umd.kernels.tokens import prepend_tokens, scatter_tokens, split_tokens
from umd.kernels.triton.op import launches
