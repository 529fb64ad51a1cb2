"""What the tests of images share."""

import pytest

from tests.data.image_roots import faulty, photo_root


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A COCO root in which 10 of 200 images are faulty."""
    return photo_root(tmp_path_factory.mktemp("damaged") / "root", faulty(200))
