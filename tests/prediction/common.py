"""A run folder of all eight tasks with a small untrained model."""

from pathlib import Path

import torch

from tests.data_roots import whole_root
from tests.evaluation.common import save_run, whole_config
from unit_fast.data import open_dataset
from unit_fast.evaluation.labels import write_labels
from unit_fast.model import UniT


def make_run(folder: Path, root: Path):
    """Write the run into ``folder``, its data into ``root``; (the run's configuration, its model)."""
    config = whole_config(whole_root(root), data={"short_side": 48, "max_side": 80})
    torch.manual_seed(0)
    model = UniT(config.model).eval()
    save_run(folder, model.state_dict(), config)
    datasets = {n: open_dataset(n, "train", config.data, t, augment=False) for n, t in config.model.tasks.items()}
    write_labels(folder, config, datasets)
    return config, model
