"""What a step is measured on: the published model, its tasks, random weights and batches of known shape.

A problem is a tuple ``(task, image (B, H, W) or None, word pieces of each text, objects of each image, ...)``; those of
a CPU go on with the shares of eager's time and memory that are aimed at.
"""

import re

import torch
from torch import Tensor, nn

from benchmarks.baselines.unit_eager import EagerConfig, UniTEager
from unit_fast.batch import Batch

SEED = 0
LR, LR_BACKBONE, MAX_NORM = 5e-5, 1e-5, 0.1
DROPS_NOTHING = 1e-6
"""A dropout probability that 16 random bits round to zero: the path with dropout, without its effect."""

# Word pieces of a batch of eight are the octile midpoints of real samples; their longest is about what the longest of
# eight random ones is.
QNLI_TOKENS = (28, 35, 41, 45, 50, 56, 65, 81)
"""1020 QNLI pairs (mean 51.0; these 50.1)."""
SST2_TOKENS = (4, 5, 7, 9, 11, 14, 20, 30)
"""1000 SST-2 training sentences (mean 12.8; these 12.5)."""
SNLI_VE_TOKENS = (8, 9, 10, 11, 11, 13, 14, 16)
"""16 SNLI-VE hypotheses (mean 11.1; these 11.5)."""
VQA2_TOKENS = (7, 8, 9, 10, 10, 10, 11, 13)
"""53 VQA v2 questions (mean 9.6; these 9.8)."""
VQA_TOKENS = (8, 11)
"""Word pieces of two questions; real VQA v2 questions have 9.5 on average."""
COCO_OBJECTS = (7, 12)
"""Objects of two images; real COCO images with objects have 9.6 on average."""
OBJECTS = (7, 12, 3, 1, 20, 9, 5, 4)
"""Objects of eight images."""

CASES = {
    # name: (task, image (B, H, W) or None, tokens, objects, aimed share of eager's time, of its memory)
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

# A card's problems: (task, image side lengths, word pieces of eight, whether there are objects), in the order of what
# they decide.
_CARD_TASKS = {
    "coco": ("detection_coco", (800, 1344), (), True),
    "vg": ("detection_visual_genome", (800, 1344), (), True),
    "vqa2": ("vqa2", (800, 1184), VQA2_TOKENS, False),
    "snli_ve": ("visual_entailment", (800, 1184), SNLI_VE_TOKENS, False),
    "qnli": ("glue_qnli", None, QNLI_TOKENS, False),
    "sst2": ("glue_sst2", None, SST2_TOKENS, False),
}
BATCHES = (2, 8, 16, 1)
"""Samples a batch, in the order of what they decide."""


def _of(eight: tuple[int, ...], batch: int) -> tuple[int, ...]:
    """``batch`` sizes that stand for the eight: the middle ones of fewer, the eight again and again for more."""
    if batch >= len(eight) or not eight:
        return (eight * -(-batch // max(len(eight), 1)))[:batch]
    ordered, low = sorted(eight), (len(eight) - batch) // 2
    return tuple(ordered[low : low + batch])


def _card_cases() -> dict[str, tuple]:
    found = {}
    for name, (task, sides, tokens, objects) in _CARD_TASKS.items():
        for batch in BATCHES:
            # One and two images as on a CPU, so that figures of the same problem can be laid side by side.
            counts = {1: (9,), 2: COCO_OBJECTS}.get(batch, _of(OBJECTS, batch)) if objects else ()
            image = (batch, *sides) if sides else None
            found[f"{name}_b{batch}"] = (task, image, _of(tokens, batch), counts)
    return found


CARD = _card_cases()
QUICK_CARD = {
    "coco_b2": ("detection_coco", (2, 64, 96), (), (2, 3)),
    "vqa2_b2": ("vqa2", (2, 64, 96), (5, 7), ()),
    "qnli_b2": ("glue_qnli", None, (9, 14), ()),
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
_NEGLIGIBLE = {
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
    """A random batch: normalised images, word pieces, boxes inside the image, VQA soft scores of three answers, up to
    two attributes an object in Visual Genome."""
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
        if task == "detection_visual_genome":
            several = torch.arange(16) < integers(0, 3, count, max(objects))[..., None]
            given = torch.where(several, integers(1, 400, count, max(objects), 16), -1)
            batch.attributes = torch.where(real[..., None], given, -1)
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
        fields = {"labels": batch.labels, "boxes": batch.boxes}
        if batch.attributes is not None:
            fields["attributes"] = batch.attributes
        counts = batch.counts.tolist()
        targets = [{name: value[i, :n] for name, value in fields.items()} for i, n in enumerate(counts)]
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
    drop = re.compile("|".join(pattern for where, pattern in _NEGLIGIBLE.items() if where in ("", kind)))
    for name, value in gradients.items():
        if value is not None and not drop.search(name):
            out[f"grad/{name}"] = value.detach().clone()
    return out


def shape_of(case: tuple) -> str:
    """The problem in words."""
    return _described(case, "+".join(map(str, case[3])), "+".join(map(str, case[2])))


def brief(case: tuple) -> str:
    """The problem in a few words, for tables."""
    tokens = sorted(set(case[2]))
    length = f"{tokens[0]} to {tokens[-1]}" if len(tokens) > 1 else "".join(map(str, tokens))
    return _described(case, f"{sum(case[3])}", f"{len(case[2])} x {length}")


def _described(case: tuple, objects: str, tokens: str) -> str:
    task, image = case[:2]
    parts = [task]
    if image:
        parts.append(f"{image[0]} x {image[1]}x{image[2]}")
    if case[3]:
        parts.append(f"{objects} objects")
    if case[2]:
        parts.append(f"{tokens} tokens (baseline padded to {TASKS[task][4]})")
    return ", ".join(parts)


def samples(case: tuple) -> int:
    """Samples of a batch."""
    return case[1][0] if case[1] else len(case[2])
