"""One training step of the whole model: ours against the authors' formulation (``baselines/unit_eager.py``).

``python -m benchmarks.bench_step`` runs both interleaved on the same weights and batches and prints their times by
phase, the ratios beside the aims, and, with ``--memory``, the peak memory of a process that runs each alone.

The gate compares the losses and the gradient of every parameter: the baseline's with dropout off, ours on the path that
is timed, dropout active but with a probability that rounds to dropping nothing.
"""

import argparse
import re
import sys

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import _run
from benchmarks.baselines.unit_eager import EagerConfig, UniTEager
from benchmarks.baselines.unit_eager_training import HFAdamW
from unit_fast.batch import Batch

SEED = 0
LR, LR_BACKBONE, MAX_NORM = 5e-5, 1e-5, 0.1
DROPS_NOTHING = 1e-6
"""A dropout probability that 16 random bits round to zero: the path with dropout, without its effect."""

QNLI_TOKENS = (28, 35, 41, 45, 50, 56, 65, 81)
"""Word pieces of a batch of eight: the octile midpoints of 1020 real QNLI pairs (mean 51.0; these 50.1). Their longest
is what the longest of eight random pairs is on average (81.3)."""
VQA_TOKENS = (8, 11)
"""Word pieces of two questions; real VQA v2 questions have 9.5 on average."""
COCO_OBJECTS = (7, 12)
"""Objects of two images; real COCO images with objects have 9.6 on average."""

CASES = {
    # name: (task, image (B, H, W) or None, tokens, objects, aim of ours / eager in time, in memory)
    "coco": ("detection_coco", (2, 320, 426), (), COCO_OBJECTS, 0.8, None),
    "coco_large": ("detection_coco", (1, 800, 1066), (), (9,), 0.6, 0.4),
    "vqa2": ("vqa2", (2, 320, 426), VQA_TOKENS, (), 0.7, None),
    "qnli": ("glue_qnli", None, QNLI_TOKENS, (), 0.4, None),
}
QUICK = {
    "coco": ("detection_coco", (2, 64, 96), (), (2, 3), 0.8, None),
    "vqa2": ("vqa2", (2, 64, 96), (5, 7), (), 0.7, None),
    "qnli": ("glue_qnli", None, (9, 14), (), 0.4, None),
}
TASKS = {  # task type, row of the task tables, queries, outputs, text padded to, [CLS] only
    "detection_coco": ("detection", 0, 100, 92, 0, False),
    "detection_visual_genome": ("detection", 1, 100, 1602, 0, False),
    "vqa2": ("vl", 3, 25, 3129, 25, False),
    "visual_entailment": ("vl", 9, 25, 3, 25, True),
    "glue_qnli": ("glue", 5, 25, 2, 128, True),
    "glue_qqp": ("glue", 8, 25, 2, 128, True),
    "glue_sst2": ("glue", 7, 25, 2, 128, True),
    "glue_mnli_mismatched": ("glue", 6, 25, 3, 128, True),
}

# Gradients that are zero but for rounding (no meaning in their relative error), by the tasks where they are.
NEGLIGIBLE = {
    "": r"\.attention\.self\.key\.bias$|decoder\.layers\.0\.self_attn\.in_proj_weight$",
    "detection": r"pos_embed_proj\.bias$",
    "glue": r"query_embeds\.|^bert_pos_projection\.",
}


def mmf_config(quick: bool) -> dict:
    """The published 8-dataset model (quick: a small one), in the authors' keys."""
    config = {
        "enc_layers": 6, "dec_layers": 6, "dim_feedforward": 2048, "encoder_hidden_dim": 256, "decoder_hidden_dim": 768,
        "nheads": 8, "share_decoders": True, "task_embedding_image": True, "task_embedding_text": True, "dropout": 0.1,
        "bert": {"hidden_size": 768, "layers": 12, "heads": 12, "intermediate_size": 3072, "vocab_size": 30522,
                 "max_position": 512},
        "frozen_bn_eps": 1e-5, "no_object_weight": 0.1, "attribute_outputs": 401,
        "datasets": {
            name: {"task_type": kind, "task_index": index, "queries": queries, "outputs": outputs}
            for name, (kind, index, queries, outputs, _, _) in TASKS.items()
        },
        "text_cls_only": {name: cls for name, (kind, *_, cls) in TASKS.items() if kind != "detection"},
    }  # fmt: skip
    if quick:
        config |= {"enc_layers": 2, "dec_layers": 2, "dim_feedforward": 64, "encoder_hidden_dim": 32}
        config |= {"decoder_hidden_dim": 48}
        config["bert"] = {"hidden_size": 48, "layers": 2, "heads": 4, "intermediate_size": 96, "vocab_size": 30522,
                          "max_position": 512}  # fmt: skip
    return config


# ----------------------------------------------------------------------------------------------- weights and batches


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Move the default initialisation to a generic point: biases and batch-norm statistics that are not 0 or 1, image
    tokens and queries that differ. From the plain one, layer 0 of the decoder has no gradients at all."""
    generator = torch.Generator().manual_seed(SEED)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.uniform_(low, high, generator=generator)

    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        backbone = "backbone" in name
        if name.endswith("running_var"):
            uniform(tensor, 0.5, 1.5)
        elif backbone and tensor.dim() == 1:
            uniform(tensor, *((0.5, 1.0) if name.endswith("weight") else (-0.1, 0.1)))
        elif tensor.dim() == 1 and name.endswith("bias"):
            uniform(tensor, -0.1, 0.1)
        elif name.endswith("in_proj_weight"):
            tensor.mul_(2.0)
        elif name.endswith("input_proj.weight"):
            tensor.mul_(8.0)


def mmf_state(quick: bool) -> dict[str, Tensor]:
    """One set of random weights under the authors' names."""
    torch.manual_seed(SEED)
    model = UniTEager(EagerConfig.from_mmf(mmf_config(quick)))
    randomise(model)
    return model.state_dict()


def make_batch(task: str, image, tokens, objects) -> Batch:
    """A random batch: normalised images, word pieces, boxes inside the image, VQA soft scores of three answers."""
    generator = torch.Generator().manual_seed(SEED)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    outputs = TASKS[task][3]
    batch = Batch(task=task)
    count = image[0] if image else len(tokens)
    if image:
        _, height, width = image
        batch.image = torch.randn(count, 3, height, width, generator=generator)
        batch.pixel_mask = torch.zeros(count, height, width, dtype=torch.bool)
        batch.sizes = [(height, width)] * count
    if tokens:
        real = torch.arange(max(tokens)) < torch.tensor(tokens)[:, None]
        batch.input_ids = integers(1000, 30000, count, max(tokens)) * real
        batch.attention_mask, batch.token_type_ids = real.long(), torch.zeros_like(real, dtype=torch.long)
    if objects:
        batch.counts = torch.tensor(objects, dtype=torch.int32)
        real = torch.arange(max(objects)) < batch.counts[:, None]
        batch.labels = torch.where(real, integers(1, 91, count, max(objects)), -1)
        size = 0.05 + 0.4 * torch.rand(count, max(objects), 2, generator=generator)
        centre = size / 2 + (1 - size) * torch.rand(count, max(objects), 2, generator=generator)
        batch.boxes = torch.cat((centre, size), dim=-1) * real[..., None]
    elif task == "vqa2":
        batch.answer_scores = torch.zeros(count, outputs)
        batch.answer_scores.scatter_(1, integers(1, outputs, count, 3), torch.tensor([[1.0, 0.6, 0.3]] * count))
    else:
        batch.label = integers(0, outputs, count)
    return batch


def eager_inputs(batch: Batch) -> tuple[dict, object]:
    """(inputs, targets) of the baseline for ``batch``: text padded to its full length, objects as a list of dicts."""
    inputs, length = {}, TASKS[batch.task][4]
    if batch.image is not None:
        inputs.update(image=batch.image, mask=batch.pixel_mask)
    if batch.input_ids is not None:
        extra = length - batch.input_ids.shape[1]
        names = {"ids": batch.input_ids, "input_mask": batch.attention_mask, "segment_ids": batch.token_type_ids}
        inputs.update({name: nn.functional.pad(value, (0, extra)) for name, value in names.items()})
    if batch.labels is not None:
        counts = batch.counts.tolist()
        targets = [{"labels": batch.labels[i, :n], "boxes": batch.boxes[i, :n]} for i, n in enumerate(counts)]
    else:
        targets = batch.answer_scores if batch.answer_scores is not None else batch.label
    return inputs, targets


def set_dropout(model: nn.Module, p: float) -> dict[nn.Module, float]:
    """Set every dropout probability; the former ones by module."""
    before = {}
    for module in model.modules():
        key = "p" if isinstance(module, nn.Dropout) else "dropout"
        if isinstance(getattr(module, key, None), float):
            before[module] = getattr(module, key)
            setattr(module, key, p)
    return before


def restore_dropout(before: dict[nn.Module, float]) -> None:
    for module, p in before.items():
        setattr(module, "p" if isinstance(module, nn.Dropout) else "dropout", p)


def gate_outputs(losses: dict[str, Tensor], gradients: dict[str, Tensor | None], kind: str) -> dict[str, Tensor]:
    """Losses and gradients by name, without those that are zero but for rounding."""
    out = {f"loss/{name}": value.detach() for name, value in losses.items()}
    drop = re.compile("|".join(pattern for where, pattern in NEGLIGIBLE.items() if where in ("", kind)))
    for name, value in gradients.items():
        if value is not None and not drop.search(name):
            out[f"grad/{name}"] = value.detach().clone()
    return out


# ---------------------------------------------------------------------------------------------------------- providers


class Eager(_run.Provider):
    """The authors' formulation; ``library``: with the library's own fast paths switched on."""

    def __init__(self, case: tuple, config: dict, state: dict | None, library: bool = False):
        self.task, self.kind = case[0], TASKS[case[0]][0]
        self.model = UniTEager(EagerConfig.from_mmf(config, fused_attention=library))
        if state is not None:
            self.model.load_state_dict(state)
        self.inputs, self.targets = eager_inputs(make_batch(*case[:4]))
        self.model.train()
        groups = self.model.parameter_groups(LR, LR_BACKBONE)
        if library:
            self.model.to(memory_format=torch.channels_last)
            if "image" in self.inputs:
                self.inputs["image"] = self.inputs["image"].contiguous(memory_format=torch.channels_last)
            self.optimizer = torch.optim.AdamW(groups, weight_decay=1e-4, fused=True)
        else:
            self.optimizer = HFAdamW(groups)
        self.parameters = [p for group in groups for p in group["params"]]

    def step(self, marks: _run.Marks) -> None:
        hidden = self.model(self.task, self.inputs)
        outputs = self.model.heads(self.task, hidden)
        marks("forward")
        losses, _ = self.model.losses(self.task, hidden, outputs, self.targets)
        loss = sum(losses.values())
        marks("losses")
        loss.backward()
        marks("backward")
        nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        marks("optimiser")

    def outputs(self) -> dict[str, Tensor]:
        before = set_dropout(self.model, 0.0)
        hidden = self.model(self.task, self.inputs)
        losses, _ = self.model.losses(self.task, hidden, self.model.heads(self.task, hidden), self.targets)
        sum(losses.values()).backward()
        gradients = {name: p.grad for name, p in self.model.named_parameters()}
        out = gate_outputs(losses, gradients, self.kind)
        self.optimizer.zero_grad(set_to_none=True)
        restore_dropout(before)
        return out


class Ours(_run.Provider):
    """unit_fast as ``unit-fast train`` runs it."""

    def __init__(self, case: tuple, config: dict, state: dict | None):
        from unit_fast import convert
        from unit_fast.model import UniT
        from unit_fast.optim import MaskedAdamW

        self.to_mmf, self.kind = convert.to_mmf, TASKS[case[0]][0]
        if state is None:
            self.model = UniT(convert.model_config_from_mmf(config))
        else:  # the baseline's loss is a mean over the process
            self.model = convert.from_mmf(state, config, ce_normalisation="per_process")
        self.model.train()
        self.batch = make_batch(*case[:4])
        groups = self.model.parameter_groups(LR, LR_BACKBONE)
        self.optimizer = MaskedAdamW(groups, lr=LR, weight_decay=1e-4, unused="skip", max_norm=MAX_NORM)

    def step(self, marks: _run.Marks) -> None:
        out = self.model(self.batch)
        marks("forward")
        losses = self.model.losses(out, self.batch)
        loss = sum(losses.values())
        marks("losses")
        loss.backward()
        marks("backward")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        marks("optimiser")

    def outputs(self) -> dict[str, Tensor]:
        before = set_dropout(self.model, DROPS_NOTHING)
        losses = self.model.losses(self.model(self.batch), self.batch)
        sum(losses.values()).backward()
        out = gate_outputs(losses, self.to_mmf(self.model, "gradients"), self.kind)
        self.optimizer.zero_grad(set_to_none=True)
        restore_dropout(before)
        return out


# ------------------------------------------------------------------------------------------------------------- report


def shape_of(case: tuple) -> str:
    task, image, tokens, objects, *_ = case
    parts = [task]
    if image:
        parts.append(f"{image[0]} x {image[1]}x{image[2]}")
    if objects:
        parts.append(f"{'+'.join(map(str, objects))} objects")
    if tokens:
        parts.append(f"{'+'.join(map(str, tokens))} tokens (baseline padded to {TASKS[task][4]})")
    return ", ".join(parts)


def ratios(rows: list[dict], console: Console, cases: dict) -> None:
    """Ours over the authors' formulation, by phase, beside the aims."""
    table = Table(title="ours / eager (below 1: ours is faster or smaller)", title_justify="left", box=box.SIMPLE)
    table.add_column("case")
    for title in ("forward", "losses", "backward", "optimiser", "step", "aim", "library / eager", "memory", "aim"):
        table.add_column(title, justify="right")
    for name, case in cases.items():
        by = {row["provider"]: row for row in rows if row["case"] == name}
        if "ours" not in by or "eager" not in by:
            continue
        ours, eager, library = by["ours"], by["eager"], by.get("library")
        memory = (ours["peak_memory_gib"], eager["peak_memory_gib"])
        table.add_row(
            name,
            *(f"{ours['phases_ms'][p] / eager['phases_ms'][p]:.2f}" for p in ours["phases_ms"]),
            f"{ours['time_ms'] / eager['time_ms']:.3f}",
            f"{case[4]}",
            "-" if library is None else f"{library['time_ms'] / eager['time_ms']:.3f}",
            "-" if None in memory else f"{memory[0] / memory[1]:.2f}",
            "-" if case[5] is None else f"{case[5]}",
        )
    console.print(table)


def build(args: argparse.Namespace) -> _run.Benchmark:
    shapes, config = (QUICK if args.quick else CASES), mmf_config(args.quick)
    # The memory runs hold one model; all others share one set of weights.
    state = None if args.memory_child else mmf_state(args.quick)
    cases = []
    for name, shape in shapes.items():
        providers = {
            "eager": lambda shape=shape: Eager(shape, config, state),
            "library": lambda shape=shape: Eager(shape, config, state, library=True),
            "ours": lambda shape=shape: Ours(shape, config, state),
        }
        case = _run.Case(
            name=name,
            shape=shape_of(shape),
            providers=providers,
            reference="eager",
            tolerances={"loss/": 1e-4, "grad/": 1e-2},
            error="l2",
        )
        cases.append(case)
    return _run.Benchmark(
        name="bench_step",
        module="benchmarks.bench_step",
        title="One training step of the 8-dataset model" + (" (quick: a small model)" if args.quick else ""),
        method=[
            "eager: the authors' formulation. library: the same with SDPA, channels_last, torch's fused AdamW.",
            "Training mode, dropout 0.1, float32, the same weights and samples. Text: ours padded to the longest of "
            "the batch, the others to the full length.",
            "Phases: forward with heads; matching and losses; backward; clip, AdamW (eager and ours skip tensors "
            "whose gradient is zero), zero_grad.",
            "Gate: every loss to 1e-4, every gradient to 1e-2 of its norm.",
        ],
        excluded="data loading, batch to device, learning-rate schedule, logging",
        cases=cases,
        summary=lambda rows, console: ratios(rows, console, shapes),
    )


def main(arguments: list[str] | None = None) -> int:
    return _run.main(build, arguments, options=_run.parser(__doc__.splitlines()[0]))


if __name__ == "__main__":
    sys.exit(main())
