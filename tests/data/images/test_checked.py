"""What is remembered of images: across processes, and when it is of no use."""

import contextlib
import dataclasses
import logging
import sqlite3

import pytest

from unit_fast.config import DataConfig
from unit_fast.data import BadImage
from unit_fast.data.check import check
from unit_fast.data.images.checked import FILE, CheckedImages
from unit_fast.data.store.cache import open_cache

MAX = 50_000_000


def test_what_is_known_of_images_outlives_the_process(tmp_path, damaged):
    folder = damaged / "coco/images/train2017"
    paths = sorted(folder.iterdir())
    first = CheckedImages(tmp_path / "cache", MAX)

    def outcome(checked):
        found = []
        for path in paths:
            try:
                found.append(dataclasses.replace(checked.facts(path), stamp=None))
            except BadImage as error:
                found.append(error.reason)
        return found

    expected = outcome(first)
    assert sum(isinstance(e, str) for e in expected) == 8  # the 1 x 1 image is an image
    first.close()
    second = CheckedImages(tmp_path / "cache", MAX)
    assert outcome(second) == expected
    assert second.decoded == 0
    copy = tmp_path / "changed.jpg"
    copy.write_bytes(paths[0].read_bytes())
    assert second.facts(copy).plain
    copy.write_bytes(paths[0].read_bytes()[:500])
    with pytest.raises(BadImage):
        second.facts(copy)


def test_a_data_check_spares_training_its_own(damaged):
    check(damaged, decode=True)
    known = CheckedImages(open_cache(DataConfig(root=str(damaged))).folder, MAX)
    for path in sorted((damaged / "coco/images/train2017").iterdir()):
        with contextlib.suppress(BadImage):
            known.facts(path)
    assert known.decoded == 0


@pytest.mark.parametrize("content", [b"", b"not a database" * 100])
def test_a_damaged_record_is_no_obstacle(tmp_path, damaged, caplog, content):
    (tmp_path / FILE).write_bytes(content)
    path = sorted((damaged / "coco/images/train2017").iterdir())[0]
    with caplog.at_level(logging.WARNING, "unit_fast.data"):
        assert CheckedImages(tmp_path, MAX).facts(path).plain
    assert ("not usable" in caplog.text) == bool(content)


def test_the_pixel_limit_holds_for_images_known_from_before(tmp_path, damaged):
    path = sorted((damaged / "coco/images/train2017").iterdir())[0]
    first = CheckedImages(tmp_path, MAX)
    first.facts(path)
    first.close()
    with pytest.raises(BadImage, match="the limit is 100"):
        CheckedImages(tmp_path, 100).facts(path)


def test_a_record_made_before_orientations_were_looked_at_still_serves(tmp_path, damaged):
    path = sorted((damaged / "coco/images/train2017").iterdir())[0]
    first = CheckedImages(tmp_path, MAX)
    expected = first.facts(path)
    first.close()
    with contextlib.closing(sqlite3.connect(tmp_path / FILE)) as store:
        store.execute("alter table images drop column turned")
        store.commit()
    second = CheckedImages(tmp_path, MAX)
    assert second.facts(path) == expected
    assert second.decoded == 0
    other = sorted((damaged / "coco/images/train2017").iterdir())[1]
    second.facts(other)
    second.close()
    third = CheckedImages(tmp_path, MAX)
    third.facts(other)
    assert third.decoded == 0, "what is found out is still written"
