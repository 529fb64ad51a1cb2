"""The eight data sets from their files to batches.

``open_dataset`` gives one split of one data set; ``collate`` makes a batch of its samples; ``check`` looks a whole data
root over.
"""

import logging

from unit_fast.config import DataConfig, TaskConfig
from unit_fast.data.collate import collate
from unit_fast.data.errors import BadImage, Findings, MissingSplit
from unit_fast.tasks import Task, get_task

_log = logging.getLogger("unit_fast.data.readers")

__all__ = ["BadImage", "MissingSplit", "collate", "open_dataset"]


def open_dataset(
    task_name: str,
    split: str,
    data: DataConfig,
    task: TaskConfig,
    *,
    augment: bool,
    vocab_size: int | None = None,
    attribute_outputs: int = 401,
    findings: Findings | None = None,
):
    """One split of one data set, annotations read and checked.

    Args:
        task_name: data set key or short name.
        split: ``train``, ``val`` or ``test``. Test has labels only where they are published (SNLI-VE, Visual Genome,
            whose test split is val).
        data: where the files are and how images are made.
        task: what the model has for the data set: labels and the answer list must fit ``outputs`` (0: the data say how
            many, see ``outputs.resolved``), texts are cut to ``text_length``.
        augment: use the training transform for visits with a key (detection; the other data sets have none).
        vocab_size: rows of the model's word table, compared with the vocabulary file.
        attribute_outputs: attribute logits of the model (Visual Genome).
        findings: collects what is odd instead of raising at the first error; for ``check``. Without it what the reader
            leaves out or tolerates is logged, a line a kind with its count.

    Returns:
        A ``dataset.Dataset``: ``len``, ``get(index, key)``, ``sample_id(index)``; detection also has
        ``coco_ground_truth()`` and ``class_names``, VQA v2 has ``answers``.

    Raises:
        MissingSplit: there are no files for the split.
        UserError: something in the files cannot be used; names file, key, value and remedy.
    """
    found = get_task(task_name)
    if task.outputs == 0:
        from unit_fast.data.outputs import resolved_task

        task, _ = resolved_task(found.name, data, task)
    dataset = reader_of(found)(
        found, split, data, task, augment=augment, vocab_size=vocab_size, attribute_outputs=attribute_outputs,
        findings=findings,
    )  # fmt: skip
    if findings is None:  # nobody else tells what the reader left out
        for line in dataset.remarks():
            _log.warning("%s", line)
    return dataset


def reader_of(task: Task) -> type:
    """The ``dataset.Dataset`` that reads the files of ``task``."""
    from unit_fast.data.readers.coco import Coco
    from unit_fast.data.readers.coco_folder import CocoFolder
    from unit_fast.data.readers.glue import Glue
    from unit_fast.data.readers.own import Answer, Classify, Entail
    from unit_fast.data.readers.snli_ve import SnliVe
    from unit_fast.data.readers.visual_genome import VisualGenome
    from unit_fast.data.readers.vqa2 import Vqa2

    readers = {"coco": Coco, "vg": VisualGenome, "vqa2": Vqa2, "snli_ve": SnliVe, "detect": CocoFolder}
    readers |= {reader.of.short: reader for reader in (Answer, Entail, Classify)}
    return readers.get(task.short, Glue)
