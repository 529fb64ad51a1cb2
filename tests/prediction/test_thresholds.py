"""The threshold of a run."""

import pytest

from tests.data_roots import write
from unit_fast.errors import UserError
from unit_fast.evaluation.thresholds import FILE, write_thresholds
from unit_fast.prediction.thresholds import read_thresholds


def test_a_run_without_one_has_none(tmp_path):
    assert read_thresholds(tmp_path) == {}


def test_the_threshold_of_each_data_set_is_read(tmp_path):
    write_thresholds(tmp_path, {"coco": {"threshold": 0.25, "f1": 0.6}}, split="val")
    assert read_thresholds(tmp_path) == {"detection_coco": 0.25}


@pytest.mark.parametrize(
    "content", ["[]", '{"a": 0.5}', '{"a": {}}', '{"a": {"threshold": 2}}', "{", '{"a": {"threshold": null}}']
)
def test_a_bad_file_is_named(tmp_path, content):
    write(tmp_path / FILE, content)
    with pytest.raises(UserError, match=FILE):
        read_thresholds(tmp_path)
