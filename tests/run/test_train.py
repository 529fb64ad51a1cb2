"""Training: one update, initial weights, frozen parts, what is logged, evaluated and saved."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import pytest
import torch

from tests.small_runs import ALL, log_of, rows, small_config
from unit_fast.config_check import check_config
from unit_fast.data import collate, open_dataset
from unit_fast.errors import UserError
from unit_fast.run.refusals import BrokenWeights
from unit_fast.run.setup import build, used_masks
from unit_fast.run.train import NonFinite, Trainer, train, train_step
from unit_fast.schedule import lr_multiplier
from unit_fast.tasks import TASKS
from unit_fast.weights import checkpoint

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def run(config, out, **options):
    return train(config, out, progress="none", **options)


def summary(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


def batch_of(config, name, count=2, start=0):
    dataset = open_dataset(name, "train", config.data, config.model.tasks[name], augment=False)
    return collate(name, [dataset.get(start + i, None) for i in range(count)])


# ---------------------------------------------------------------------------------------------------- one update


def without_dropout(config):
    model = config.model
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            model,
            encoder=dataclasses.replace(model.encoder, dropout=0.0),
            text=dataclasses.replace(model.text, dropout=0.0),
            decoder=dataclasses.replace(model.decoder, dropout=0.0, classifier_dropout=0.0),
        ),
    )


@pytest.mark.parametrize("name", TASKS)
def test_a_step_moves_what_the_task_uses_and_nothing_else(root, name):
    config = small_config(root, *ALL, optim={"warmup_steps": 0})
    model, optimizer, _ = build(config, CPU)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    used = used_masks(model, optimizer, [name])[name]
    update = train_step(model.train(), optimizer, name, batch_of(config, name), used=used)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    allowed = {n for n, u in model.used_parameters(name).items() if u}
    assert moved <= allowed
    # exactly zero gradients are the few analytic ones (first decoder layer, positions of a single key, ...)
    assert len(moved) > 0.75 * len(allowed)
    assert update.grad_norm.isfinite()
    assert not update.nonfinite
    assert len(update.names) == len(update.terms)


def test_accumulated_batches_are_the_mean_of_their_gradients(root):
    config = without_dropout(small_config(root, "sst2", optim={"max_norm": None}))
    parts = [batch_of(config, "glue_sst2", 2, 0), batch_of(config, "glue_sst2", 2, 2)]
    whole = batch_of(config, "glue_sst2", 4)
    grads, terms = [], []
    for batch in (parts, whole):
        model, optimizer, _ = build(config, CPU)
        update = train_step(model.train(), optimizer, "glue_sst2", batch)
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        terms.append(update.terms)
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], rtol=1e-3, atol=1e-6), name
    assert torch.allclose(terms[0], terms[1], rtol=1e-5)


def test_a_batch_of_another_task_is_refused(root):
    config = small_config(root)
    model, optimizer, _ = build(config, CPU)
    with pytest.raises(ValueError, match="task is 'vqa2'"):
        train_step(model, optimizer, "vqa2", batch_of(config, "glue_sst2"))


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_nothing(root, loss):
    """Also where its gradient is finite."""
    config = small_config(root, "sst2")
    model, optimizer, _ = build(config, CPU)
    train_step(model.train(), optimizer, "glue_sst2", batch_of(config, "glue_sst2"))
    before = {n: v.clone() for n, v in model.state_dict().items()}
    counts = optimizer.step_counts().clone()
    moments = {k: v["exp_avg"].clone() for k, v in optimizer.state_dict()["state"].items()}
    losses = model.losses
    model.losses = lambda *a, **k: {n: v + loss for n, v in losses(*a, **k).items()}
    update = train_step(model, optimizer, "glue_sst2", batch_of(config, "glue_sst2"))
    assert update.nonfinite
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert torch.equal(optimizer.step_counts(), counts)
    assert all(torch.equal(v["exp_avg"], moments[k]) for k, v in optimizer.state_dict()["state"].items())


@pytest.mark.parametrize("name", ["detection_coco", "vqa2", "glue_sst2"])
def test_bf16_trains_with_float32_losses(root, name):
    config = small_config(root, *ALL)
    model, optimizer, _ = build(config, CPU)
    seen = []
    losses = model.losses

    def spy(out, batch, *rest):
        seen.extend(v.dtype for v in vars(out).values() if isinstance(v, torch.Tensor))
        return losses(out, batch, *rest)

    model.losses = spy
    inner = []
    model.bert_projection.register_forward_hook(lambda m, i, o: inner.append(o.dtype))
    model.enc2dec_proj.register_forward_hook(lambda m, i, o: inner.append(o.dtype)) if name != "glue_sst2" else None
    update = train_step(model.train(), optimizer, name, batch_of(config, name), bf16=True)
    assert set(seen) == {torch.float32}
    if inner and not isinstance(model.enc2dec_proj, torch.nn.Identity):
        assert set(inner) == {torch.bfloat16}
    assert update.terms.dtype == torch.float32
    assert update.terms.isfinite().all()


def test_graph_policy_leaves_out_the_positions_on_glue(root):
    for unused, expected in (("graph", False), ("skip", True), ("update_all", True)):
        config = small_config(root, "vqa2", "sst2", optim={"unused": unused})
        model, optimizer, _ = build(config, CPU)
        names = {id(p): n for n, p in model.named_parameters()}
        members = [names[id(p)] for g in optimizer.param_groups for p in g["params"]]
        masks = used_masks(model, optimizer, ["vqa2", "glue_sst2"])
        at = members.index("bert_pos_projection.weight")
        assert bool(masks["glue_sst2"][at]) is expected
        assert bool(masks["vqa2"][at])


# --------------------------------------------------------------------------------------------- what does not train


def moved_by(config, out) -> set[str]:
    start, _, _ = build(config, CPU)
    model = run(config, out).model
    own = dict(start.named_parameters())
    return {n for n, p in model.named_parameters() if not torch.equal(p, own[n])}


def test_frozen_encoders_keep_their_weights(root, tmp_path):
    moved = moved_by(small_config(root, freeze=("image", "text")), tmp_path / "a")
    still = ("backbone.", "input_proj.", "image_encoder.layers.", "text_encoder.layers.", "text_encoder.word")
    assert not [n for n in moved if n.startswith(still)]
    assert "image_encoder.task_embedding.weight" in moved
    assert "text_encoder.task_embedding.weight" in moved
    assert [n for n in moved if n.startswith("decoder.")]
    assert [n for n in moved_by(small_config(root), tmp_path / "b") if n.startswith(still)]


def test_dropout_stays_active_in_frozen_parts(root):
    config = small_config(root, "sst2", freeze=("image", "text"))
    model, _, _ = build(config, CPU)
    batch, model = batch_of(config, "glue_sst2"), model.train()
    first, second = model(batch).scores, model(batch).scores
    assert not torch.equal(first, second)


def test_learning_rate_zero_freezes_the_backbone(root, tmp_path):
    moved = moved_by(small_config(root, optim={"lr_backbone": 0.0}), tmp_path / "a")
    assert not [n for n in moved if n.startswith("backbone.")]


def test_the_learning_rate_follows_warmup_and_cosine_in_both_groups(root, tmp_path):
    config = small_config(root, log_every=1, optim={"lr": 2e-3, "lr_backbone": 1e-4})
    folder = tmp_path / "run"
    result = run(config, folder)
    assert [r["lr"] for r in rows(folder)] == [2e-3 * lr_multiplier(k, 4, 20) for k in range(20)]
    assert rows(folder)[0]["lr"] == 0.0, "update 0 runs with lr 0"
    assert result.step == 20


# ------------------------------------------------------------------------------------------------ initial weights


def test_init_from_takes_all_that_fits_and_skips_what_it_is_told(root, tmp_path):
    first = run(small_config(root, "coco", "sst2", steps=3), tmp_path / "first")
    config = small_config(root, "coco", "vqa2", seed=8, init_from=str(tmp_path / "first"), skip_load=("class_embeds.",))
    model, _, filled = build(config, CPU)
    fresh, _, _ = build(dataclasses.replace(config, init_from=None, skip_load=()), CPU)
    source, own, random = first.model.state_dict(), model.state_dict(), fresh.state_dict()
    for name in own:
        if name in source and not name.startswith("class_embeds."):
            assert torch.equal(own[name], source[name]), name
        else:
            assert torch.equal(own[name], random[name]), name
    assert filled.started_from["model"].endswith("model.safetensors")


def test_what_a_run_started_from_is_kept(root, tmp_path):
    run(small_config(root, "sst2", steps=1), tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["started_from"] == {"backbone": "random", "text encoder": "random"}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"init_from": "nowhere"}, "--init-from nowhere: no such"),
        ({"skip_load": ("x",)}, "skip_load.*give --init-from too"),
        ({"require_weights": True}, "require_weights: the backbone has not the published size"),
    ],
)
def test_initial_weights_that_cannot_be(root, changes, text):
    with pytest.raises(UserError, match=text):
        build(small_config(root, "sst2", **changes), CPU)


def test_damaged_initial_weights_are_refused_through_every_door(root, tmp_path):
    config = small_config(root, "sst2", steps=1)
    run(config, tmp_path / "run")
    folder = (tmp_path / "run" / "checkpoints" / "last").resolve()
    weights = bytearray((folder / checkpoint.WEIGHTS).read_bytes())
    weights[-100] ^= 0x40
    (folder / checkpoint.WEIGHTS).write_bytes(weights)
    doors = [tmp_path / "run", folder, folder / checkpoint.WEIGHTS]
    for text in ("differs from the checksum in the manifest", "differ from the checksum inside it"):
        for door in doors:
            with pytest.raises(UserError, match=text):
                build(dataclasses.replace(config, init_from=str(door)), CPU)
            with pytest.raises(UserError, match=text):
                checkpoint.load_model(door)
        (folder / checkpoint.MANIFEST).unlink(missing_ok=True)


def test_an_unknown_prefix_to_skip(root, tmp_path):
    run(small_config(root, "sst2", steps=1), tmp_path / "run")
    config = small_config(root, "sst2", init_from=str(tmp_path / "run"), skip_load=("clasifiers",))
    with pytest.raises(UserError, match="clasifiers.*nearest: classifiers"):
        build(config, CPU)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"steps": 0}, "steps: is 0"), ({"accumulate": 0}, "accumulate: is 0"), ({"log_every": 0}, "log_every"),
        ({"optim": {"lr": -1.0}}, r"optim\.lr: is -1"), ({"optim": {"lr": math.nan}}, r"optim\.lr: is nan"),
        ({"optim": {"max_norm": 0.0}}, r"optim\.max_norm"), ({"data": {"workers": -1}}, r"data\.workers"),
        ({"freeze": ("imge",)}, "freeze: 'imge' is not an encoder; nearest: image"),
        ({"ratios": {"vqa": 1.0}}, "ratios: 'vqa' is not a data set key; nearest: vqa2"),
        ({"task_batch": {"vqa2": 0}}, r"task_batch\.vqa2: is 0"),
        ({"ema_decay": 1.0}, "ema_decay: 1.0"), ({"device": "gpu9"}, "device 'gpu9'"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(root, tmp_path, changes, text):
    with pytest.raises(UserError, match=text):
        run(small_config(root, "sst2", **changes), tmp_path / "run")


def test_check_config_takes_every_recipe():
    from unit_fast.recipes import RECIPES, recipe

    for name in RECIPES:
        check_config(recipe(name))


# ------------------------------------------------------------------------------------------------- the run folder


@pytest.fixture(scope="module")
def watched(root, tmp_path_factory):
    """A run of all tasks with evaluations, averaged weights and drawn examples."""
    out = tmp_path_factory.mktemp("runs") / "watched"
    drawn = []
    config = small_config(root, *ALL, eval_every=8, save_every=5, keep_checkpoints=2, eval_limit=6, ema_decay=0.5)
    result = run(config, out, drawn=lambda folder, step: drawn.append(step))
    return out, result, drawn


def test_run_folder(watched):
    out, result, drawn = watched
    names = {p.name for p in out.iterdir()}
    expected = {
        "config.json", "env.json", "command.txt", "log.txt", "metrics.jsonl", "metrics.csv", "summary.json",
        "checkpoints", "predictions", "examples.json", "labels.json", "vocab.txt",
    }  # fmt: skip
    assert expected <= names
    assert drawn == [8, 16, 20]
    assert result.status == "finished"
    assert result.exit_code == 0


def test_summary(watched):
    out, result, _ = watched
    found = summary(out)
    assert found["status"] == "finished"
    assert set(found["metrics"]) == set(ALL)
    for task, metrics in found["metrics"].items():
        assert metrics["chance"] is not None
        assert metrics["count"] > 0, task
    assert found["metrics"] == json.loads(json.dumps(result.metrics))
    assert (found["step"], found["seed"], found["threads"]) == (20, 3, 1)
    assert sum(found["samples"].values()) == 40
    assert found["bad_images"] == {"read": found["bad_images"]["read"], "by_task": {}}
    assert 0 < found["train_seconds"] < found["seconds"]
    assert found["environment"]["versions"]["torch"]


def test_metrics_rows(watched):
    out, _, _ = watched
    training = rows(out)
    assert {r["step"] for r in rows(out, "eval")} == {r["step"] for r in rows(out, "eval_ema")} == {8, 16, 20}
    assert len(rows(out, "eval")) == 3 * 8
    assert sum(r["updates"] for r in training) == 20
    for row in training:
        assert set(row) >= {"kind", "step", "task", "loss", "terms", "lr", "grad_norm", "samples_per_s", "data_wait"}
        assert row["loss"] == pytest.approx(sum(row["terms"].values()), rel=1e-5)
    vg = next(r for r in training if r["task"] == "detection_visual_genome")
    assert len(vg["terms"]) == 2 * 4
    table = (out / "metrics.csv").read_text().splitlines()
    assert table[0] == "kind,step,task,name,value"
    assert all(line.count(",") == 4 for line in table)


def test_log_has_no_control_characters(watched):
    out, _, _ = watched
    text = log_of(out)
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "effective batch 2 (2 x 1 accumulated), the paper's is 64" in text
    assert text.count("step 20/20") == 1


def test_checkpoints_kept(watched):
    out, _, _ = watched
    parent = out / "checkpoints"
    assert (parent / "last").resolve().name == "step_000020"
    best = summary(out)["best"]
    for link in ("best", "best_ema"):
        assert (parent / link).resolve().name == f"step_{best[link]['step']:06d}"
        found = [r for r in rows(out, "eval" if link == "best" else "eval_ema") if r["step"] == best[link]["step"]]
        values = [r["metrics"].get(TASKS[_key(r["task"])].metric) for r in found]
        assert best[link]["value"] == pytest.approx(sum(values) / len(values))
    steps = {int(p.name[5:]) for p in checkpoint.numbered(parent)}
    # The last two saves, and the best ones: an evaluation that improves saves too, so the one before 20 is 15 or 16.
    assert 20 in steps
    assert steps <= {15, 16, 20, best["best"]["step"], best["best_ema"]["step"]}
    assert steps & {15, 16}
    for folder in checkpoint.numbered(parent):
        checkpoint.verify(folder)


def _key(short):
    return next(t.name for t in TASKS.values() if t.short == short)


def test_averaged_weights_lag_behind(watched):
    out, result, _ = watched
    average = checkpoint.load_weights(out / "checkpoints" / "last" / checkpoint.EMA)
    own = result.model.state_dict()
    assert any(not torch.equal(average[n], own[n]) for n in own)
    name = "classifiers.vqa2.out.weight"
    assert (average[name] - own[name]).abs().max() < 0.1


def test_the_average_is_what_it_says(root):
    from unit_fast.run.setup import Ema

    model = torch.nn.Linear(3, 2)
    ema = Ema(model, 0.75)
    expected = model.weight.detach().clone()
    for refused in (0, 0, 1, 0):
        with torch.no_grad():
            model.weight += 1.0
        before = ema.model.weight.clone()
        ema.update(torch.tensor(refused, dtype=torch.int32))
        if refused:
            assert torch.equal(ema.model.weight, before)
        else:
            expected = 0.75 * expected + 0.25 * model.weight.detach()
    assert torch.allclose(ema.model.weight, expected)


@pytest.mark.parametrize("decay", [0.3, 0.5, 0.9, 0.9999])
def test_the_average_has_the_bits_of_a_weight_known_to_the_host(decay):
    from unit_fast.run.setup import Ema

    model = torch.nn.Linear(37, 29)
    ema = Ema(model, decay)
    with torch.no_grad():
        model.weight.normal_()
        expected = torch.lerp(ema.model.weight, model.weight, 1 - decay)
    ema.update(torch.zeros((), dtype=torch.int32))
    assert torch.equal(ema.model.weight, expected)


@pytest.mark.parametrize("decay", [0.51, 0.9, 0.9999])
def test_the_average_in_few_launches_is_the_same_to_a_rounding(decay):
    """torch's lerp multiplies and adds with one rounding, these with two."""
    from unit_fast.run.setup import lerp_in_few_launches

    torch.manual_seed(0)
    averages, weights = ([torch.randn(n) for n in (1, 7, 1025)] for _ in range(2))
    expected = [torch.lerp(a, w, 1 - decay) for a, w in zip(averages, weights)]
    before = [a.clone() for a in averages]
    lerp_in_few_launches(averages, weights, torch.zeros(()))
    assert all(torch.equal(a, b) for a, b in zip(averages, before))
    lerp_in_few_launches(averages, weights, torch.tensor(1 - decay))
    for average, weight, old, exact in zip(averages, weights, before, expected):
        assert ((average - exact).abs() <= 2**-23 * (old.abs() + weight.abs())).all()


def test_an_average_is_taken_in_pieces():
    from unit_fast.run.setup import _pieces

    pairs = [(torch.zeros(n), torch.ones(n)) for n in (3, 4, 9, 1, 1)]
    found = _pieces(pairs, 7)
    assert [[len(a) for a in averages] for averages, _ in found] == [[3, 4], [9], [1, 1]]
    assert [pair for piece in found for pair in zip(*piece)] == pairs
    assert len(_pieces(pairs, float("inf"))) == 1


def test_refused_updates_leave_the_average_alone(root, tmp_path, poisoned):
    """Were it moved on at the refused steps, it would come closer to weights that stand still."""
    config = small_config(root, "sst2", steps=2, ema_decay=0.5, log_every=1)
    run(config, tmp_path / "two")
    poisoned({3, 4})
    run(dataclasses.replace(config, steps=4), tmp_path / "two", resume="auto")
    folders = {f.name: f for f in checkpoint.numbered(tmp_path / "two" / "checkpoints")}
    two, four = (checkpoint.load_weights(folders[f"step_00000{n}"] / checkpoint.EMA) for n in (2, 4))
    assert all(torch.equal(two[name], four[name]) for name in two)


def test_the_best_by_one_task(root, tmp_path, monkeypatch):
    from unit_fast.run import state as run_state

    accuracies = iter([0.5, 0.9, 0.7, 0.8])

    def fake(*_, **__):
        return {"sst2": {"accuracy": next(accuracies), "chance": 0.5, "count": 1}, "coco": {"detection_mean_ap": 1.0}}

    monkeypatch.setattr(run_state, "evaluate", fake)
    config = small_config(root, "sst2", "coco", criterion="sst2", eval_every=5)
    run(config, tmp_path / "run")
    assert summary(tmp_path / "run")["best"]["best"] == {"step": 10, "value": 0.9, "criterion": "sst2"}
    assert (tmp_path / "run" / "checkpoints" / "best").resolve().name == "step_000010"
    assert (tmp_path / "run" / "checkpoints" / "last").resolve().name == "step_000020"


def test_a_criterion_that_is_not_trained_is_replaced_and_said_so(root, tmp_path):
    result = run(small_config(root, "sst2", steps=2, criterion="vqa2"), tmp_path / "run")
    assert result.config.criterion == "mean"
    assert "criterion vqa2 is not trained" in log_of(tmp_path / "run")


def test_a_missing_validation_split_is_one_line(root, tmp_path):
    import shutil

    other = tmp_path / "world"
    shutil.copytree(root, other)
    (other / "snli_ve" / "snli_ve_dev.jsonl").unlink()
    config = small_config(other, "snli_ve", "sst2", eval_every=4, eval_limit=4, steps=8)
    result = run(config, tmp_path / "run")
    assert set(result.metrics) == {"sst2"}
    assert log_of(tmp_path / "run").count("will not be evaluated") == 1
    on_train = run(dataclasses.replace(config, eval_split="train"), tmp_path / "train")
    assert set(on_train.metrics) == {"snli_ve", "sst2"}


def test_a_failed_evaluation_does_not_end_training(root, tmp_path, monkeypatch):
    from unit_fast.run import state as run_state

    def fail(*_, **__):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(run_state, "evaluate", fail)
    config = small_config(root, "sst2", eval_every=5)
    with pytest.raises(RuntimeError, match="no such luck"):
        run(config, tmp_path / "run")
    found = summary(tmp_path / "run")
    assert (found["step"], found["status"]) == (20, "failed")
    assert log_of(tmp_path / "run").count("failed: no such luck") == 4
    assert checkpoint.load_state(tmp_path / "run" / "checkpoints" / "last")["step"] == 20


def test_never_evaluating(root, tmp_path):
    assert run(small_config(root, "sst2", eval_every=-1, steps=2), tmp_path / "run").metrics == {}


def test_losses_are_read_once_an_interval(root, tmp_path, monkeypatch):
    reads = []
    real = torch.Tensor.tolist
    from unit_fast.run import log as run_logging

    class Spy(run_logging.RunLog):
        def flush(self):
            reads.append(len(self.pending))
            return super().flush()

    from unit_fast.run import state as run_state

    monkeypatch.setattr(run_state, "RunLog", Spy)
    run(small_config(root, "sst2", log_every=7), tmp_path / "run")
    assert reads == [7, 7, 6]
    assert torch.Tensor.tolist is real


# ----------------------------------------------------------------------------------------------------- not finite


@pytest.fixture
def poisoned(monkeypatch):
    """Makes the loss of chosen steps NaN."""

    def arm(steps):
        real, done = Trainer._next, []

        def poison(self, batches):
            task, batch = real(self, batches)
            if self.step + 1 in steps:
                done.append(self.step + 1)
                for micro in batch:
                    if micro.image is not None:
                        micro.image = micro.image * math.nan
                    else:
                        self.model.losses = functools.partial(_once, self.model, self.model.losses)
            return task, batch

        monkeypatch.setattr(Trainer, "_next", poison)
        return done

    return arm


def _once(model, losses, *a, **k):
    model.losses = losses
    return {n: v * math.nan for n, v in losses(*a, **k).items()}


def test_one_bad_update_is_reported_and_skipped(root, tmp_path, poisoned):
    done = poisoned({6})
    result = run(small_config(root), tmp_path / "run")
    assert done == [6]
    assert result.status == "finished"
    text = log_of(tmp_path / "run")
    assert "not finite, nothing was changed: step 6, " in text
    dumped = json.loads((tmp_path / "run" / "nonfinite" / "step_000006.json").read_text())
    assert dumped["sample_ids"]
    assert dumped["request"]["micro"][0][0]["index"] >= 0
    assert str(dumped["sample_ids"][0]) in text
    assert summary(tmp_path / "run")["nonfinite_steps"] == 1
    assert sum(r["nonfinite"] for r in rows(tmp_path / "run")) == 1
    assert all(v is not None for r in rows(tmp_path / "run") for v in r["terms"].values() if r["updates"] > 1)


def test_three_in_a_row_end_the_run(root, tmp_path, poisoned):
    poisoned({8, 9, 10, 11, 12})
    with pytest.raises(NonFinite, match=r"3 updates in a row were not finite, the last: step 10, \w+, samples .*"):
        run(small_config(root), tmp_path / "run")
    found = summary(tmp_path / "run")
    assert (found["status"], found["exit_code"]) == ("nonfinite", 3)
    for folder in checkpoint.numbered(tmp_path / "run" / "checkpoints"):
        for name, value in checkpoint.load_weights(folder / checkpoint.WEIGHTS).items():
            assert value.isfinite().all(), name


def test_two_and_two_do_not(root, tmp_path, poisoned):
    poisoned({4, 5, 7, 8})
    assert run(small_config(root), tmp_path / "run").status == "finished"
    assert summary(tmp_path / "run")["nonfinite_steps"] == 4


@pytest.fixture
def untrainable(monkeypatch):
    """Makes every loss of a task NaN."""

    def arm(name):
        real = Trainer._next

        def poison(self, batches):
            task, batch = real(self, batches)
            if task == name:
                self.model.losses = functools.partial(_once, self.model, self.model.losses)
            return task, batch

        monkeypatch.setattr(Trainer, "_next", poison)

    return arm


def test_a_task_that_cannot_be_trained_ends_the_run(root, tmp_path, untrainable):
    """Also where updates of another task, which are fine, lie between."""
    untrainable("glue_qqp")
    ratios = {"glue_sst2": 0.8, "glue_qqp": 0.2}
    with pytest.raises(
        NonFinite, match=r"3 updates of glue_qqp in a row were not finite, the last: step \d+, glue_qqp"
    ):
        run(small_config(root, "sst2", "qqp", steps=60, ratios=ratios, log_every=1), tmp_path / "run")
    found = summary(tmp_path / "run")
    assert (found["status"], found["exit_code"], found["nonfinite_steps"]) == ("nonfinite", 3, 3)
    assert (tmp_path / "run" / "checkpoints" / "last").exists()
    refused = [r for r in rows(tmp_path / "run") if r["nonfinite"]]
    assert refused[-1]["step"] - refused[0]["step"] > 2, "armed: they did not follow each other"


def test_strikes_of_a_task_are_counted_across_a_resume(root, tmp_path, untrainable):
    untrainable("glue_qqp")
    config = small_config(root, "sst2", "qqp", steps=60, ratios={"glue_sst2": 0.8, "glue_qqp": 0.2}, log_every=1)
    with pytest.raises(NonFinite):
        run(config, tmp_path / "whole")
    last = summary(tmp_path / "whole")["step"]
    run(config, tmp_path / "parts", stop_at=last - 1)
    with pytest.raises(NonFinite, match="3 updates of glue_qqp in a row"):
        run(config, tmp_path / "parts", resume="auto")
    assert summary(tmp_path / "parts")["step"] == last


def test_a_run_does_not_finish_with_a_task_that_was_never_trained(root, tmp_path, untrainable):
    """Too few updates for three in a row."""
    untrainable("glue_qqp")
    config = small_config(root, "sst2", "qqp", steps=9, ratios={"glue_sst2": 0.8, "glue_qqp": 0.2})
    with pytest.raises(NonFinite, match=r"not one update of glue_qqp \([12]\) was finite"):
        run(config, tmp_path / "run")
    assert summary(tmp_path / "run")["exit_code"] == 3
    assert checkpoint.load_state(tmp_path / "run" / "checkpoints" / "last")["step"] == 9


def test_weights_that_an_update_broke_are_not_saved(root, tmp_path):
    """Loss and gradient were finite, the update was not: the last checkpoint stays the last good one."""
    config = small_config(root, "sst2", steps=4, save_every=2, optim={"warmup_steps": 0})
    run(config, tmp_path / "run", stop_at=2)
    wild = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=1e38, lr_backbone=1e38))
    with pytest.raises(BrokenWeights, match=r"tensors of the weights are not finite after step \d \(first: "):
        run(wild, tmp_path / "run", resume="auto", allow_changed=["optim"])
    assert summary(tmp_path / "run")["exit_code"] == 3
    parent = tmp_path / "run" / "checkpoints"
    assert (parent / "last").resolve().name == "step_000002"
    assert [f.name for f in checkpoint.numbered(parent)] == ["step_000002"]


def test_weights_that_were_not_finite_before_are_told(root, tmp_path):
    config = small_config(root, "sst2", "qqp", steps=1, ratios={"glue_sst2": 1.0, "glue_qqp": 0.0})
    model, _, _ = build(config, CPU)
    with torch.no_grad():
        model.classifiers["glue_qqp"].out.weight[0, 0] = math.nan
    checkpoint.save_weights(tmp_path / "weights", model, config)
    run(dataclasses.replace(config, init_from=str(tmp_path / "weights")), tmp_path / "run")
    text = log_of(tmp_path / "run")
    assert "1 tensors of the weights hold NaN or infinity: classifiers.glue_qqp.out.weight" in text


# ------------------------------------------------------------------------------------------------- it does train


def test_the_loss_goes_down(root, tmp_path):
    config = small_config(root, "vqa2", steps=80, batch_per_process=4, optim={"lr": 3e-3, "max_norm": 1.0})
    run(config, tmp_path / "run")
    losses = [r["loss"] for r in rows(tmp_path / "run")]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


def test_more_than_one_process_is_refused(root, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="more than one process is not supported yet"):
        run(small_config(root), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------------- real samples

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "realdata"


@pytest.mark.skipif(not REAL.is_dir(), reason="the real samples are not here")
def test_all_eight_tasks_train_on_real_samples(tmp_path):
    from unit_fast.config import default_tasks

    base = small_config_for_real(default_tasks(*ALL))
    result = run(base, tmp_path / "run")
    assert result.status == "finished"
    assert {r["task"] for r in rows(tmp_path / "run")} == set(TASKS)
    assert all(r["loss"] is not None for r in rows(tmp_path / "run"))
    assert set(result.metrics) >= {"coco", "qnli", "mnli", "qqp", "sst2"}


def small_config_for_real(tasks):
    from unit_fast.config import (
        BackboneConfig,
        DataConfig,
        DecoderConfig,
        EncoderConfig,
        ModelConfig,
        RunConfig,
        TextConfig,
    )

    layer = {"heads": 2, "ffn_width": 32, "layers": 1}
    return RunConfig(
        model=ModelConfig(
            backbone=BackboneConfig(depth=14, width=8, norm="group", stride=32),
            encoder=EncoderConfig(width=16, **layer),
            text=TextConfig(width=16, **layer),
            decoder=DecoderConfig(width=16, **layer),
            tasks=tasks,
        ),
        data=DataConfig(
            root=str(REAL), short_side=64, max_side=96, train_short_sides=(48, 64), crop_short_sides=(64,), crop_min=32,
            crop_max=64,
        ),
        steps=40, eval_every=0, eval_limit=4, log_every=5, batch_per_process=2, criterion="mean",
    )  # fmt: skip
