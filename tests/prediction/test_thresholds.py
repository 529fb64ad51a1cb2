"""The threshold of a run."""

import pytest

from tests.data_roots import write
from unit_fast.errors import UserError
from unit_fast.prediction.thresholds import FILE, read_thresholds


def test_a_run_without_one_has_none(tmp_path):
    assert read_thresholds(tmp_path) == {}


def test_the_threshold_of_each_data_set_is_read(tmp_path):
    write(tmp_path / FILE, {"detection_coco": {"threshold": 0.25, "f1": 0.6}})
    assert read_thresholds(tmp_path) == {"detection_coco": 0.25}


@pytest.mark.parametrize(
    "content", ["[]", '{"a": 0.5}', '{"a": {}}', '{"a": {"threshold": 2}}', "{", '{"a": {"threshold": null}}']
)
def test_a_bad_file_is_named(tmp_path, content):
    write(tmp_path / FILE, content)
    with pytest.raises(UserError, match=FILE):
        read_thresholds(tmp_path)
