"""Precision and determinism: what is set on a card, what is promised, and which operators of a step may not repeat."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models import random_batch
from tests.models import small_config as small_model
from tests.run.test_no_host_read import whole_step
from tests.small_runs import run, small_config
from unit_fast import numerics
from unit_fast.config import BackboneConfig
from unit_fast.errors import UserError
from unit_fast.model.unit import UniT
from unit_fast.numerics import arithmetic
from unit_fast.optim.masked_adamw import MaskedAdamW
from unit_fast.run.step import train_step

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)

NOT_REPEATABLE = {
    "convolution_backward", "scatter_add", "scatter_add_", "index_add", "index_add_", "index_put", "index_put_",
    "index_copy", "index_select_backward", "put_", "scatter", "scatter_", "scatter_reduce", "scatter_reduce_", "histc",
    "bincount", "median", "kthvalue", "cumsum", "nll_loss2d_forward", "_ctc_loss_backward", "_embedding_bag_backward",
    "grid_sampler_2d_backward", "max_unpool2d", "max_pool2d_with_indices_backward", "max_pool3d_with_indices_backward",
    "avg_pool3d_backward", "adaptive_max_pool2d_backward", "_adaptive_avg_pool2d_backward", "reflection_pad2d_backward",
    "replication_pad2d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward",
    "upsample_nearest2d_backward", "_scaled_dot_product_efficient_attention_backward",
    "_scaled_dot_product_flash_attention_backward", "_scaled_dot_product_cudnn_attention_backward",
}  # fmt: skip
"""Operators that may add in another order from run to run on CUDA (the documentation of
``torch.use_deterministic_algorithms``, and the attention backends)."""
KINDS = ("detection_coco", "detection_visual_genome", "vqa2", "visual_entailment", "glue_qnli")
"""A task of each kind: the others differ in their numbers."""
HANDLED = {
    "convolution_backward": "cuDNN's deterministic algorithms, with --deterministic on",
    "cumsum": "adds counts of cells in float32: whole numbers far below 2^24, exact in any order",
    "scatter_add": "of the attribute head's rows: a query has at most one object, the rows of padding are zeros",
}


def test_what_of_a_step_may_not_repeat_on_a_card():
    found = {op.partition("::")[2] for name in KINDS for op in whole_step(name).ops} & NOT_REPEATABLE
    assert found == set(HANDLED)


def test_the_gradients_of_padded_objects_are_zeros():
    """So that adding them in any order adds nothing: Visual Genome's rows are gathered by query, 0 for padding."""

    class Added(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket is torch.ops.aten.scatter_add and args[3].shape[-1] == width:
                seen.append(args[3].clone())
            return func(*args, **(kwargs or {}))

    torch.manual_seed(0)
    model, seen = UniT(small_model("vg")).train(), []
    batch, width = random_batch("vg", model.config), model.config.decoder.width
    with Added():
        sum(model.losses(model(batch), batch).values()).backward()
    (rows,) = seen  # [layers, images, objects, width]
    padded = torch.arange(batch.labels.shape[1]) >= batch.counts[:, None]
    assert padded.any()
    assert not rows[:, padded].count_nonzero()
    assert rows[:, ~padded].count_nonzero()


# ------------------------------------------------------------------------------------------------- settings


@pytest.fixture
def flags():
    """What torch has set, as a function; put back after the test."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul

    def now():
        return cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32

    before = now()
    yield now
    cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


@pytest.mark.parametrize(
    ("precision", "deterministic", "expected"),
    [
        ("auto", "auto", (False, True, True, False)),
        ("bf16", "on", (True, False, True, False)),
        ("fp32", "auto", (False, True, False, False)),
        ("fp32", "on", (True, False, False, False)),
        ("tf32", "off", (False, True, True, True)),
    ],
)
def test_what_is_set_on_a_card(precision, deterministic, expected, flags):
    torch.backends.cudnn.benchmark = True
    before = flags()
    with arithmetic(precision, deterministic, CARD):
        assert flags() == expected
    assert flags() == before
    with arithmetic(precision, deterministic, CPU):
        assert flags() == before


def test_it_is_put_back_after_an_error(flags):
    before = flags()
    with pytest.raises(KeyError), arithmetic("fp32", "on", CARD):
        raise KeyError
    assert flags() == before


def test_what_is_promised():
    assert "bit for bit, at one number of threads" in numerics.promise("off", CPU)
    assert "bit for bit, on the same kind of card" in numerics.promise("on", CARD)
    for setting in ("auto", "off"):
        assert numerics.promise(setting, CARD).startswith("not deterministic")
    assert [numerics.takes_bf16(p, CARD) for p in ("auto", "fp32", "tf32", "bf16")] == [True, False, False, True]
    assert [numerics.takes_bf16(p, CPU) for p in ("auto", "fp32", "bf16")] == [False, False, True]


def test_tf32_is_refused_on_a_cpu(root, tmp_path):
    with pytest.raises(UserError, match="--precision tf32: the run is on cpu.*take fp32"):
        run(small_config(root, "sst2", steps=1, precision="tf32", device="cpu"), tmp_path / "run")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["detection_coco", "detection_visual_genome", "vqa2", "glue_qnli"])
def test_two_runs_on_a_card_give_the_same_bits(name):
    """With ``deterministic`` on, forward, backward and optimiser, eagerly."""
    results = []
    with arithmetic("bf16", "on", CARD):
        for _ in range(2):
            torch.manual_seed(0)
            config = small_model(backbone=BackboneConfig(depth=50, width=16, norm="frozen"))
            model = UniT(config).train().to(CARD, memory_format=torch.channels_last)
            optimizer = MaskedAdamW(model.parameter_groups(1e-3, 1e-3), max_norm=0.5)
            torch.cuda.manual_seed(7)
            for i in range(4):
                train_step(model, optimizer, name, random_batch(name, config, batch=4, seed=i).to(CARD), bf16=True)
            results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))
