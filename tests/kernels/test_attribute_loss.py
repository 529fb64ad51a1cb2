"""The attribute loss: its cases, the definition slot by slot, padding, attributes out of range, launches."""

import pytest
import torch
from unit_fast_kernels import attribute_loss as module
from unit_fast_kernels.attribute_loss import attribute_loss_fused, attribute_loss_reference
from unit_fast_kernels.shared.triton import INTERPRETING

from tests.kernels.cases import Call, Cases, Problem, as_it_is, both, launched, patched
from tests.kernels.common import assert_same_in_any_order, guarded, kernels_launched
from tests.kernels.program_order import ORDERS
from tests.planted_kernels import needs_compiler


def make(size, **settings):
    """Objects with none, some and all slots filled, one attribute twice."""
    (layers, images, objects, attributes, slots), matched = size
    rng = torch.Generator().manual_seed(3)
    logits = (6 * torch.rand(layers, images, objects, attributes, generator=rng, dtype=torch.float64) - 3).relu()
    wanted = torch.randint(0, attributes, (images, objects, slots), generator=rng)
    for b in range(images):
        for n in range(objects):
            wanted[b, n, (0, slots, 1, 3)[(n + b + 1) % 4] :] = -1
    wanted = wanted.flip(-1)  # empty slots first: their place does not matter
    query = torch.full((layers, images, objects), -1)
    for b, count in enumerate(matched):
        for l in range(layers):
            query[l, b, torch.randperm(objects, generator=rng)[:count]] = torch.arange(count)
    return Problem({"logits": logits.bfloat16().half().double()}, {"query": query, "attributes": wanted, **settings})


def also(arguments, found):
    counted = (arguments["query"] >= 0) & (arguments["attributes"] >= 0).any(-1)
    if not counted.any():
        assert not found[0].any()
    assert not found[1][~counted].any()


Z, QUERY, SLOTS = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4).long(), torch.zeros(3, 4, 6).long()
ONE_ROW = both(patched(module, SUM_BLOCKS=4), launched(rows=1, block=64, warps=1))  # many sums, added a few at a time
CASES = Cases(
    op="attribute_loss",
    sizes={  # (L, B, N, A, M), objects of the images that have a query
        "row": ((1, 1, 1, 3, 1), (1,)),
        "odd": ((2, 3, 5, 7, 3), (4, 0, 3)),
        "tail": ((2, 2, 9, 401, 16), (9, 5)),
        "many": ((1, 2, 70, 6, 5), (70, 35)),
        "wide": ((1, 1, 3, 1100, 4), (2,)),
        "two_attributes": ((1, 2, 4, 2, 2), (3, 4)),
        "empty": ((2, 2, 0, 5, 16), (0, 0)),
        "no_slots": ((2, 2, 3, 5, 0), (1, 3)),
        "many_layers": ((40, 1, 2, 3, 2), (2,)),
        "all_padded": ((2, 3, 6, 4, 5), (0, 0, 0)),
    },
    make=make,
    settings={
        "per_image": {},
        "per_process": {"normalisation": "per_process", "weight": 2.0},
        "weight": {"weight": 1.5},
    },
    main=("per_image", "per_process"),
    gives=torch.float32,
    ways={"fused": {"as_it_is": as_it_is, "one_row": ONE_ROW, "rows": launched(rows=16, block=4, warps=1)}},
    skip=lambda way, size, setting, dtype: (
        (dtype == torch.float16 and size != "odd")
        or ((setting != "per_image" or way == "one_row") and size not in ("odd", "many", "all_padded"))
        or ((setting != "per_image" or way != "as_it_is") and dtype != torch.float32)
        or (way == "rows" and (size != "many" or setting != "per_image"))
    ),
    also=also,
    memory=("odd", "many", "empty", "no_slots"),
    card={name: (shape, [(7 * b) % (shape[2] + 1) for b in range(shape[1])]) for name, shape in module.SHAPES.items()},
    valid=lambda: {"logits": Z, "query": QUERY, "attributes": SLOTS},
    refusals=[
        ({"logits": Z[0]}, r"logits is of shape \[3, 4, 5\]; it must be \[L,B,N,A\]"),
        ({"query": QUERY[:1]}, r"query is of shape .* \[L,B,N\] = \[2, 3, 4\]"),
        ({"attributes": SLOTS[:2]}, r"attributes is of shape .* \[B,N,M\] = \[3, 4, any\]"),
        ({"logits": Z.long()}, "logits is torch.int64; it must be floating point"),
        ({"query": QUERY.int()}, "query is torch.int32; it must be int64"),
        ({"attributes": SLOTS.float()}, "attributes is torch.float32; it must be int64"),
        ({"query": QUERY.to("meta")}, "query is on meta; move it to cpu"),
        ({"normalisation": "image"}, "normalisation is 'image'; nearest: per_image"),
    ],
    unfit=[
        ({"logits": Z.double()}, "logits is torch.float64: convert it to float32, bfloat16 or float16"),
        ({"attributes": torch.zeros(3, 4, 65).long()}, "there are 65 slots: kernels exist for up to 64"),
    ],
)


def problem(name):
    """(logits, the other arguments)"""
    made = CASES.problem(name, "per_image")
    return made.inputs["logits"], made.others


@pytest.mark.parametrize("normalisation", ["per_image", "per_process"])
@pytest.mark.parametrize("name", CASES.sizes)
def test_is_the_definition(name, normalisation):
    logits, others = problem(name)
    query, attributes = others.values()
    expected = []
    for l in range(len(logits)):
        sums, counts = [], []
        for b in range(logits.shape[1]):
            total, counted = torch.zeros((), dtype=torch.float64), 0
            for n in range(logits.shape[2]):
                wanted = [a for a in attributes[b, n].tolist() if a >= 0]
                if query[l, b, n] < 0 or not wanted:
                    continue
                log_p = logits[l, b, n].log_softmax(0)
                total, counted = total - 0.5 * sum(log_p[a] for a in wanted) / len(wanted), counted + 1
            sums.append(total)
            counts.append(counted)
        if normalisation == "per_process":
            expected.append(sum(sums) / max(1, sum(counts)))
        else:
            expected.append(sum(s / max(1, c) for s, c in zip(sums, counts)) / len(sums))
    found = attribute_loss_reference(logits, **others, normalisation=normalisation, weight=3.0)
    torch.testing.assert_close(found, 3 * torch.stack(expected), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("normalisation", ["per_image", "per_process"])
def test_gradcheck(normalisation):
    logits, others = problem("odd")
    assert torch.autograd.gradcheck(
        lambda x: attribute_loss_reference(x, **others, normalisation=normalisation),
        [logits.requires_grad_()],
        fast_mode=True,
    )


def test_padding_may_hold_anything():
    plain, spoilt = (CASES.problem("odd", "per_image") for _ in range(2))
    alone = plain.others["query"] < 0
    spoilt.inputs["logits"].masked_fill_(alone[..., None], float("nan"))
    plain, found = (Call(CASES, p, torch.float32)(attribute_loss_fused) for p in (plain, spoilt))
    assert torch.count_nonzero(plain[1][alone]) == 0
    if INTERPRETING:  # PyTorch's own product of zero and NaN is NaN
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


@pytest.mark.skipif(not INTERPRETING, reason="PyTorch's gather raises")
def test_an_attribute_out_of_range_reads_nothing_and_shows():
    odd = CASES.problem("odd", "per_image")
    odd.others["attributes"] = torch.where(odd.others["attributes"] >= 0, 10**6, -1)
    loss, dlogits = Call(CASES, odd, torch.float32, guarded)(attribute_loss_fused)
    assert bool(loss.isnan().all())
    assert bool(dlogits.isnan().any())


@needs_compiler
@pytest.mark.parametrize("shape", module.SHAPES)
def test_one_launch_each(shape):
    assert kernels_launched(module, module.SHAPES[shape]) == [
        ["_attribute_loss_fwd_kernel"],
        ["_attribute_loss_bwd_kernel"],
    ]


def forward_of(name):
    """Loss and log-sum-exps."""
    logits, others = problem(name)
    return module._forward(logits.float(), others["query"], others["attributes"], False, 1.5)


@pytest.mark.parametrize("way", [as_it_is, ONE_ROW], ids=["as_it_is", "one_row"])
@pytest.mark.parametrize("order", ORDERS)
def test_programs_in_any_order_give_the_same_bits(way, order, monkeypatch):
    """Other sizes in turn: a counter that were not back at 0 would give other sums, or none."""
    names = ["odd", "tail", "many_layers", "row", "all_padded", "empty", "odd"]
    with way(None):
        assert_same_in_any_order(forward_of, names, order, monkeypatch)


def test_candidates_are_looked_up(monkeypatch):
    """Tuning would find every entry, the default first."""
    asked = []
    monkeypatch.setattr(
        module, "launch_parameters", lambda op, bucket, default, device: asked.append((op, bucket, default))
    )
    for shape in module.SHAPES.values():
        tried = module.candidates(shape)
        for op in ("attribute_loss_fwd", "attribute_loss_bwd"):
            module._parameters(op, torch.empty(shape[:4], device="meta"))
            first = next(c for c in tried if c["op"] == op)
            assert asked.pop() == (first["op"], first["bucket"], first["parameters"])
