"""torch.compile takes the whole model and the operators in one graph, with the results of the uncompiled ones."""

import pytest
import torch

from tests.models import random_batch, small_config
from unit_fast import UniT, ops
from unit_fast.config import BackboneConfig, DecoderConfig, EncoderConfig

CONFIG = small_config(
    "vg",
    "vqa2",
    "sst2",
    backbone=BackboneConfig(depth=14, width=8, stride=32),
    encoder=EncoderConfig(width=32, layers=1, heads=4, ffn_width=48),
    decoder=DecoderConfig(width=48, layers=1, heads=4, ffn_width=56),
)


def compiled(function, backend: str = "aot_eager"):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


@pytest.mark.parametrize(
    ("task", "train", "backend"), [("vg", False, "eager"), ("vqa2", True, "eager"), ("sst2", False, "aot_eager")]
)
def test_the_model_is_one_graph(task, train, backend):
    torch.manual_seed(0)
    model = UniT(CONFIG).train(train)
    batch = random_batch(task, CONFIG)
    found = []
    for call in (model, compiled(model, backend)):
        torch.manual_seed(1)  # the same dropout
        with torch.set_grad_enabled(train):
            out = call(batch)
        result = out.scores if out.logits is None else torch.cat((out.logits, out.boxes), -1)
        grad = torch.autograd.grad(result.sum(), model.decoder.norm.weight)[0] if train else result
        found.append((result, grad))
    for ours, theirs in zip(*found):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


SEED = torch.tensor([3, 4])
ROWS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
BOXES = torch.rand(1, 2, 6, 4, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.3
LOGITS = torch.randn(1, 2, 6, 5, generator=torch.Generator().manual_seed(0))
LABELS, COUNTS = torch.tensor([[1, 2, -1], [3, -1, -1]]), torch.tensor([2, 1], dtype=torch.int32)
QUERY = torch.tensor([[[0, 3, -1], [2, -1, -1]]])
CALLS = {
    "attention": lambda: ops.attention(*3 * [ROWS.unflatten(-1, (2, 4))], None, 0.1, SEED),
    "dropout": lambda: ops.dropout(ROWS, 0.3, SEED),
    "residual_norm": lambda: ops.residual_norm(ROWS, ROWS, torch.ones(8), torch.zeros(8), 1e-5, 0.1, None, SEED)[0],
    "bias_act_dropout": lambda: ops.bias_act_dropout(ROWS, torch.ones(8), "gelu", 0.1, SEED),
    "frozen_bn_act": lambda: ops.frozen_bn_act(ROWS.unsqueeze(-1), None, torch.ones(5), None),
    "match": lambda: ops.assignment(ops.match_cost(LOGITS, BOXES, LABELS, BOXES[0, :, :3], COUNTS), COUNTS)[0],
    "set_loss": lambda: torch.stack(
        ops.set_loss(LOGITS, BOXES, QUERY, LABELS, BOXES[0, :, :3], torch.tensor(3.0), no_object=4)
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_operator_is_part_of_a_graph(name):
    torch.testing.assert_close(compiled(CALLS[name])(), CALLS[name](), rtol=1e-5, atol=1e-6)


def test_the_mode_is_that_of_compilation():
    with ops.kernels("reference"):
        assert compiled(lambda x: ops.mode() == "reference" and x)(torch.ones(1)) is not False
