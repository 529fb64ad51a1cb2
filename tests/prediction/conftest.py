"""A run folder without its data, and what it predicts with."""

import pytest

from tests.data_roots import picture
from tests.prediction.common import make_run
from unit_fast.prediction.predictor import load


@pytest.fixture(scope="package")
def made(tmp_path_factory):
    """(run folder, its configuration, its model); the data root is not part of the run."""
    folder = tmp_path_factory.mktemp("run")
    return folder, *make_run(folder, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="package")
def predictor(made):
    return load(made[0])


@pytest.fixture
def image(tmp_path):
    return picture(tmp_path / "x.jpg", 60, 40, seed=3)
