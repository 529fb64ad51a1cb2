"""Fixtures of the tests that train, and a cache folder of the tests' own."""

import pytest
import torch

from tests.data_roots import whole_root
from tests.small_runs import make_world
from unit_fast.data.readers import sources


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Where caches go in these tests, in processes they start too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("data") / "world")


@pytest.fixture
def small_files_too(monkeypatch):
    """Caches keep small sources as well."""
    monkeypatch.setattr(sources, "SMALL", 0)


@pytest.fixture
def world(tmp_path):
    """A small root of all data sets."""
    return whole_root(tmp_path / "world")


@pytest.fixture
def one_thread():
    """One thread within the test: the bits of a run depend on the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
