"""The attribute loss: the definition slot by slot, and the fused form's bounds, memory, fakes, compilation, launches.

Under ``TRITON_INTERPRET=1`` the kernels run; else the references that are registered for the CPU."""

import pytest
import torch
from unit_fast_kernels import attribute_loss as module
from unit_fast_kernels.assembly import record as _record
from unit_fast_kernels.attribute_loss import attribute_loss_fused, attribute_loss_reference
from unit_fast_kernels.shared.registration import REGISTERED
from unit_fast_kernels.shared.triton import INTERPRETING

from tests.kernels.common import (
    assert_as_good_as_eager,
    assert_fake_is_real,
    guarded,
    poison_new_memory,
    values_and_gradients,
)
from tests.kernels.program_order import ORDERS, permute_programs
from tests.planted_kernels import needs_compiler
from unit_fast import ops

SIZES = {  # (L, B, N, A, M), objects of the images that have a query
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
}
DTYPES = [torch.float32, torch.bfloat16]
NORMALISATIONS = ["per_image", "per_process"]


@pytest.fixture(params=["default", "row"])
def blocks(request, monkeypatch):
    """The default blocks, or one of each object: many partial sums, added a few at a time."""
    if request.param == "row":
        monkeypatch.setattr(module, "SUM_BLOCKS", 4)
        monkeypatch.setattr(module, "launch_parameters", lambda *_: {"rows": 1, "block": 64, "warps": 1})
    return request.param


def problem(name, seed=3):
    """(logits, the other arguments, upstream): objects with none, some and all slots filled, one attribute twice."""
    (layers, images, objects, attributes, slots), matched = SIZES[name]
    rng = torch.Generator().manual_seed(seed)
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
    upstream = torch.rand(layers, generator=rng, dtype=torch.float64) - 0.5
    return logits.bfloat16().double(), {"query": query, "attributes": wanted}, upstream


def of(op, others, **settings):
    return lambda logits: op(logits, **others, **settings)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("name", SIZES)
def test_is_the_definition(name, normalisation):
    logits, others, _ = problem(name)
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


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_gradcheck(normalisation):
    logits, others, _ = problem("odd")
    function = of(attribute_loss_reference, others, normalisation=normalisation)
    assert torch.autograd.gradcheck(function, [logits.requires_grad_()], fast_mode=True)


def check(name, dtype, **settings):
    logits, others, upstream = problem(name)
    low = logits.to(dtype)
    exact = values_and_gradients(of(attribute_loss_reference, others, **settings), [logits], upstream)
    eager = values_and_gradients(of(attribute_loss_reference, others, **settings), [low], upstream)
    ours = values_and_gradients(of(attribute_loss_fused, others, **settings), [low], upstream)
    assert_as_good_as_eager(ours, eager, exact, torch.float32, dtype)
    return ours


@pytest.mark.parametrize(("name", "dtype"), [*((n, d) for n in SIZES for d in DTYPES), ("odd", torch.float16)], ids=str)
def test_is_as_good_as_eager(name, dtype):
    loss, dlogits = check(name, dtype)
    if name in ("empty", "no_slots", "all_padded"):
        assert torch.count_nonzero(loss) == torch.count_nonzero(dlogits) == 0


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("name", ["odd", "many", "all_padded"])
def test_every_setting(blocks, name, normalisation):
    check(name, torch.float32, normalisation=normalisation, weight=1.5)


@pytest.mark.gpu
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("shape", module.SHAPES)
def test_real_shapes_on_a_gpu(shape, normalisation):
    torch.manual_seed(0)
    others = module.make(module.SHAPES[shape], torch.bfloat16, "cuda")
    low = others.pop("logits")
    upstream = torch.randn(len(low), device="cuda", dtype=torch.float64)
    settings = {"normalisation": normalisation}
    exact, eager = (
        values_and_gradients(of(attribute_loss_reference, others, **settings), [x], upstream)
        for x in (low.double(), low)
    )
    runs = [values_and_gradients(of(attribute_loss_fused, others, **settings), [low], upstream) for _ in range(2)]
    assert_as_good_as_eager(runs[0], eager, exact, torch.float32, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# --- Memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["odd", "many", "empty", "no_slots"])
def test_reads_inside_and_writes_everything(blocks, name, monkeypatch):
    logits, others, upstream = problem(name)
    low = logits.float()
    plain = values_and_gradients(of(attribute_loss_fused, others), [low], upstream)
    poison_new_memory(monkeypatch)
    leaf = guarded(low).requires_grad_()
    between = {k: guarded(v) for k, v in others.items()}
    out = attribute_loss_fused(leaf, **between)
    poisoned = [out, *torch.autograd.grad(out, [leaf], guarded(upstream.float()))]
    assert all(torch.equal(a, b) for a, b in zip(plain, poisoned, strict=True))
    assert torch.equal(leaf, low)
    assert all(torch.equal(between[k], v) for k, v in others.items())


def test_padding_may_hold_anything():
    logits, others, upstream = problem("odd")
    plain = values_and_gradients(of(attribute_loss_fused, others), [logits.float()], upstream)
    alone = others["query"] < 0
    spoilt = logits.float().masked_fill(alone[..., None], float("nan"))
    found = values_and_gradients(of(attribute_loss_fused, others), [spoilt], upstream)
    assert torch.count_nonzero(plain[1][alone]) == 0
    if INTERPRETING:  # PyTorch's own product of zero and NaN is NaN
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


@pytest.mark.skipif(not INTERPRETING, reason="PyTorch's gather raises")
def test_an_attribute_out_of_range_reads_nothing_and_shows():
    logits, others, upstream = problem("odd")
    others["attributes"] = torch.where(others["attributes"] >= 0, 10**6, -1)
    loss, dlogits = values_and_gradients(of(attribute_loss_fused, others), [guarded(logits.float())], upstream)
    assert bool(loss.isnan().all())
    assert bool(dlogits.isnan().any())


def _strided(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize(("dtype", "strided"), [(torch.float32, False), (torch.bfloat16, True)])
def test_registration(dtype, strided):
    logits, others, upstream = problem("odd")
    inputs = logits.to(dtype), others["query"], others["attributes"]
    if strided:
        inputs = tuple(map(_strided, inputs))
    forward = (*inputs, False, 1.0)
    _, lse = module._forward(*forward)
    for op, arguments in (
        (module._forward, forward),
        (module._backward, (upstream.float(), *inputs, lse, True, 2.0)),
    ):
        torch.library.opcheck(op, arguments)
        assert_fake_is_real(op, *arguments)


@pytest.mark.skipif(INTERPRETING, reason="the interpreter's launches are what the registration runs")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(attribute_loss_fused, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for name in ("odd", "tail") if dynamic else ("odd",):
        logits, others, upstream = problem(name)
        results = [
            values_and_gradients(of(op, others), [logits.float()], upstream) for op in (attribute_loss_fused, compiled)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- Launches ---------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("shape", module.SHAPES)
def test_one_launch_each(shape):
    found, recorded = [], []

    def both():
        for operator, arguments in module.launches(module.SHAPES[shape], torch.bfloat16, "cuda:0"):
            before = len(recorded)
            REGISTERED[operator].launch(*arguments)
            found.append([launch.name for launch in recorded[before:]])

    _record.record(both, "a100", into=recorded)
    assert found == [["_attribute_loss_fwd_kernel"], ["_attribute_loss_bwd_kernel"]]


def test_results_do_not_depend_on_launch_parameters(monkeypatch):
    logits, others, upstream = problem("many")
    first = values_and_gradients(of(attribute_loss_fused, others), [logits.float()], upstream)
    monkeypatch.setattr(module, "launch_parameters", lambda *_: {"rows": 16, "block": 4, "warps": 1})
    second = values_and_gradients(of(attribute_loss_fused, others), [logits.float()], upstream)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_two_runs_are_equal():
    logits, others, upstream = problem("tail")
    low = [logits.bfloat16()]
    runs = [values_and_gradients(of(attribute_loss_fused, others), low, upstream) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def forward_of(name):
    """Loss and log-sum-exps."""
    logits, others, _ = problem(name)
    return module._forward(logits.float(), others["query"], others["attributes"], False, 1.5)


@pytest.mark.parametrize("order", ORDERS)
def test_programs_in_any_order_give_the_same_bits(blocks, order, monkeypatch):
    """Other sizes in turn: a counter that were not back at 0 would give other sums, or none."""
    names = ["odd", "tail", "many_layers", "row", "all_padded", "empty", "odd"]
    plain = [forward_of(name) for name in names]
    poison_new_memory(monkeypatch)
    permute_programs(monkeypatch, order)
    for name, expected in zip(names, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(forward_of(name), expected, strict=True)), name


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


# --- What does not fit ------------------------------------------------------------------------------------------------

Z, QUERY, SLOTS = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4).long(), torch.zeros(3, 4, 6).long()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((Z[0], QUERY, SLOTS), r"logits is of shape \[3, 4, 5\]; it must be \[L,B,N,A\]"),
        ((Z, QUERY[:1], SLOTS), r"query is of shape .* \[L,B,N\] = \[2, 3, 4\]"),
        ((Z, QUERY, SLOTS[:2]), r"attributes is of shape .* \[B,N,M\] = \[3, 4, any\]"),
        ((Z.long(), QUERY, SLOTS), "logits is torch.int64; it must be floating point"),
        ((Z, QUERY.int(), SLOTS), "query is torch.int32; it must be int64"),
        ((Z, QUERY, SLOTS.float()), "attributes is torch.float32; it must be int64"),
        ((Z, QUERY.to("meta"), SLOTS), "query is on meta; move it to cpu"),
    ],
)
def test_refusals(arguments, text):
    with pytest.raises(ValueError, match=f"^attribute_loss: {text}"):
        ops.attribute_loss(*arguments)


@pytest.mark.parametrize(
    ("logits", "attributes", "text"),
    [
        (Z.double(), SLOTS, "logits is torch.float64: convert it to float32, bfloat16 or float16"),
        (Z, torch.zeros(3, 4, 65).long(), "there are 65 slots: kernels exist for up to 64"),
    ],
)
def test_unfit_arguments_are_told(logits, attributes, text):
    with ops.kernels("fused"), pytest.raises(ValueError, match=f"^attribute_loss: the mode is fused, but {text}"):
        ops.attribute_loss(logits, QUERY, attributes)
    with pytest.raises(ValueError, match="normalisation is 'image'; nearest: per_image"):
        ops.attribute_loss(Z, QUERY, SLOTS, normalisation="image")
