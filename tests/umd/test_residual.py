"""`residual_in_fp32`: under autocast the residual stream keeps fp32 in every network, and nothing else changes type."""

from dataclasses import replace

import pytest
import torch

from umd import ops
from umd.blocks import ModulatedLayerNorm
from umd.classifier import Classifier
from umd.config import (
    OBJECTIVES,
    ClassifierConfig,
    DiffMAEConfig,
    DiffMAEObjectiveConfig,
    ModelConfig,
    classifier_config,
)
from umd.kernels import backend
from umd.methods import build_model, build_objective
from umd.schedule import NoiseSchedule
from umd.train.run import from_plain, to_plain

UMD_TINY = ModelConfig(image_size=(8, 8), patch_size=2, hidden_size=16, depth=3, decoder_depth=2, num_heads=2)
DIFFMAE_TINY = DiffMAEConfig(
    image_size=(8, 8), patch_size=2, hidden_size=16, depth=3, num_heads=2, decoder_hidden_size=16, decoder_depth=2,
    decoder_num_heads=2,
)  # fmt: skip
NETWORKS = {
    "UMD": UMD_TINY,
    "MAE": replace(UMD_TINY, adaLN=False),
    "cross decoder": replace(UMD_TINY, decoder="cross"),
    "DiffMAE": DIFFMAE_TINY,
    "DiffMAE, joint": replace(DIFFMAE_TINY, decoder="joint"),
    "classifier": classifier_config(UMD_TINY, num_classes=3),
}


def network(config, residual_in_fp32):
    """No parameter at its initial 0 or 1."""
    config = replace(config, residual_in_fp32=residual_in_fp32)
    torch.manual_seed(0)
    model = Classifier(config) if isinstance(config, ClassifierConfig) else build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def loss_of(model, autocast, call=None):
    """A loss of one batch; call: stands for the model."""
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if isinstance(model, Classifier):
            return (model if call is None else call)(x).float().logsumexp(1).mean()
        kind = DiffMAEObjectiveConfig() if isinstance(model.config, DiffMAEConfig) else OBJECTIVES["umd"]
        objective = build_objective(model.config, kind, NoiseSchedule("cosine"))
        return objective(model if call is None else call, x, objective.corrupt(4, 0, torch.device("cpu")))[0]


def gradients(model, autocast):
    loss = loss_of(model, autocast)
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([loss.detach()[None], *(g.flatten() for g in found)])


def types(model):
    """Of the stream and of what branches see, at each norm of the stream, under autocast."""
    found = set()
    for path, module in model.named_modules():
        if isinstance(module, ModulatedLayerNorm) and not path.endswith(("attn.norm", "cross.norm")):  # of a context
            module.register_forward_hook(lambda module, inputs, out: found.add((out[0].dtype, out[1].dtype)))
    loss_of(model, autocast=True)
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_the_stream_is_fp32_and_what_branches_see_is_bf16(name):
    assert types(network(NETWORKS[name], False)) == {(torch.bfloat16, torch.bfloat16)}
    assert types(network(NETWORKS[name], True)) == {(torch.float32, torch.bfloat16)}


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_fp32_but_for_rounding(name):
    exact, also_exact = (gradients(network(NETWORKS[name], choice), autocast=False) for choice in (False, True))
    assert torch.equal(exact, also_exact)
    narrow, wide = (gradients(network(NETWORKS[name], choice), autocast=True) for choice in (False, True))
    assert not torch.equal(narrow, wide) and 0 < (wide - exact).norm() < 0.1 * exact.norm()


@pytest.mark.skipif(not backend.INTERPRET, reason="runs kernels on the CPU")
@pytest.mark.parametrize("name", ["MAE", "DiffMAE"])
def test_kernels_and_definitions_agree(name):
    found = []
    for choice in ("reference", "triton"):
        with ops.kernels(choice), ops.cpu_paths(False):
            found.append(gradients(network(NETWORKS[name], True), autocast=True))
    assert (found[0] - found[1]).norm() < 0.02 * found[0].norm()


@pytest.mark.parametrize("name", ["UMD", "DiffMAE"])
def test_compiles_whole(name):
    torch._dynamo.reset()
    model = network(replace(NETWORKS[name], depth=1, decoder_depth=1), True)
    compiled = loss_of(model, True, torch.compile(model, fullgraph=True, backend="eager"))
    torch.testing.assert_close(compiled, loss_of(model, True), rtol=1e-2, atol=0)


def test_settings_from_before_it_was_one_load():
    for config in NETWORKS.values():
        before = to_plain(replace(config, residual_in_fp32=True))
        del before["residual_in_fp32"]
        assert from_plain(type(config), before, "config.yaml") == config


def test_a_classifier_takes_it_from_the_network_it_starts_from():
    assert classifier_config(replace(UMD_TINY, residual_in_fp32=True)).residual_in_fp32
    assert not classifier_config(UMD_TINY).residual_in_fp32
