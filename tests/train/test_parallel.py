"""What is done to a network before it trains."""

from dataclasses import replace

import torch

from umd.config import ObjectiveConfig, model_config
from umd.model import UMD
from umd.objective import Objective
from umd.schedule import NoiseSchedule
from umd.train.parallel import static_compile


def test_a_second_layout_is_compiled_with_lengths_of_its_own():
    """Batches of two sizes in one process: a graph each, into which nothing but tensors goes, and eager's loss."""
    inputs = []

    def backend(graph, examples):
        inputs.append(examples)
        return graph.forward

    torch._dynamo.reset()
    config = replace(model_config("UMD-Ti/4", image_size=(16, 16)), depth=1, decoder_depth=1)
    objective = Objective(config, ObjectiveConfig(), NoiseSchedule("cosine"))
    model = UMD(config)
    compiled = static_compile(model, backend)
    for batch in (2, 4, 2):
        x, corruption = torch.rand(batch, 3, 16, 16), objective.corrupt(batch, 0, torch.device("cpu"))
        loss, expected = (objective(network, x, corruption)[0] for network in (compiled, model))
        torch.testing.assert_close(loss, expected)
    assert len(inputs) == 2
    assert all(isinstance(x, torch.Tensor) for examples in inputs for x in examples)
