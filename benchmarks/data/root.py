"""A data root of generated photographs at COCO's sizes, with COCO's and VQA v2's annotation files.

The pixels are noise at several scales, smooth ones strongest: JPEGs of quality 90 have about as many bytes as COCO's
photographs (161 kB on average in a sample of 138), so decoding costs about the same.
"""

import io
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = (
    (640, 480, 34), (640, 427, 16), (640, 426, 12), (500, 375, 8), (480, 640, 8), (640, 428, 6), (427, 640, 6),
    (640, 360, 4), (426, 640, 3), (500, 333, 2), (612, 612, 1),
)  # fmt: skip
"""(width, height, weight): like 100 real COCO images, odd sizes joined to the nearest usual one."""
QUICK_SIZES = tuple((width // 4, height // 4, weight) for width, height, weight in SIZES)
_STRENGTHS = ((64, 70), (16, 30), (8, 14), (4, 10), (2, 8), (1, 9))
"""Side of the noise's cells in pixels, and its standard deviation."""
_WORDS = (
    "a", "and", "are", "at", "ball", "behind", "big", "bus", "car", "cat", "chair", "color", "dog", "eating", "front",
    "how", "in", "is", "left", "light", "man", "many", "of", "on", "person", "red", "right", "riding", "sign",
    "sitting", "street", "table", "the", "there", "they", "to", "train", "tree", "wearing", "what", "where", "woman",
)  # fmt: skip
ANSWERS = 3129


def photograph(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG of coloured noise."""
    pixels = np.full((height, width, 3), 118.0, dtype=np.float32)
    for cell, strength in _STRENGTHS:
        spots = rng.normal(0, strength, (height // cell + 2, width // cell + 2)).astype(np.float32)
        tint = rng.normal(0, 0.35 * strength, (*spots.shape, 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(spots + tint[..., channel])
            pixels[..., channel] += np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_root(root: Path, images: int, seed: int = 0, *, small: bool = False) -> None:
    """Write the root: ``images`` training photographs, 7 boxes an image on average, one question an image.

    small: a quarter of COCO's sides.
    """
    rng = np.random.default_rng(seed)
    sizes = QUICK_SIZES if small else SIZES
    weights = np.array([weight for *_, weight in sizes], dtype=float)
    for folder in ("coco/annotations", "coco/images/train2017", "coco/images/train2014", "vqa2", "bert"):
        (root / folder).mkdir(parents=True)
    records, annotations, questions, answers = [], [], [], []
    for number in range(1, images + 1):
        width, height, _ = sizes[rng.choice(len(sizes), p=weights / weights.sum())]
        name = f"{number:012d}.jpg"
        path = root / "coco/images/train2017" / name
        path.write_bytes(photograph(rng, width, height))
        os.link(path, root / "coco/images/train2014" / f"COCO_train2014_{name}")
        records.append({"id": number, "file_name": name, "width": width, "height": height})
        for _ in range(1 + rng.poisson(6)):
            w, h = (float(rng.uniform(0.05, 0.6) * side) for side in (width, height))
            x, y = float(rng.uniform(0, width - w)), float(rng.uniform(0, height - h))
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": number, "category_id": int(rng.integers(1, 91)),
                    "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0,
                }
            )  # fmt: skip
        words = rng.choice(_WORDS, int(rng.integers(4, 13)))
        key = {"image_id": number, "question_id": 1000 * number}
        questions.append({**key, "question": " ".join(words) + "?"})
        said = [f"answer {rng.integers(1, 40)}" for _ in range(3)]
        answers.append({**key, "answers": [{"answer": said[min(i // 4, 2)], "answer_id": i + 1} for i in range(10)]})
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, 91)]
    contents = {
        "coco/annotations/instances_train2017.json": {
            "images": records, "annotations": annotations, "categories": categories,
        },
        "vqa2/v2_OpenEnded_mscoco_train2014_questions.json": {"questions": questions},
        "vqa2/v2_mscoco_train2014_annotations.json": {"annotations": answers},
        "vqa2/trainval_label2ans.json": ["<unk>", *(f"answer {i}" for i in range(1, ANSWERS))],
    }  # fmt: skip
    for name, content in contents.items():
        (root / name).write_text(json.dumps(content), encoding="utf-8")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?", *_WORDS]
    (root / "bert/vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
