"""Images and boxes of a detection split in flat arrays."""

import numpy as np

from unit_fast.data.store.content import Content

ATTRIBUTES = 16
"""Attribute slots of an object (``attribute_ids_max16``)."""


class Objects:
    """Images and boxes of one split in flat arrays: image i has the rows ``starts[i] : starts[i + 1]``.

    Attributes:
        ids, sizes, file_names: int64 [n], int32 [n,2] height and width, n texts.
        starts: int64 [n + 1].
        labels, xywh, area, crowd, attributes: int32 [m], float64 [m,4] and [m] pixels, bool [m], int16 [m,16] with
            -1 in empty places.
        left: what is no target but counts when boxes are scored, objects without area inside the image: ``at`` int64,
            the row of ``labels`` before which one stands in the file, and ``images`` int64 ids, ``labels``, ``xywh``,
            ``area`` and ``crowd`` as above.
        names: class -> name.
        image_ids: the images' ids where some are texts, and ``ids`` are numbers given to them.
        category_ids: the category id of each class in the file, where classes are numbered by their order.
    """

    def __init__(self, content: Content):
        """content: from ``pack``, or the same from the cache."""
        arrays = content.arrays
        self.ids, self.sizes, self.file_names = arrays["ids"], arrays["sizes"], content.strings("files")
        self.starts, self.labels, self.xywh = arrays["starts"], arrays["labels"], arrays["xywh"]
        self.area, self.crowd = arrays["area"], arrays["crowd"]
        none = np.broadcast_to(np.int16(-1), (len(self.labels), ATTRIBUTES))
        self.attributes = arrays.get("attributes", none)
        self.left = {name: arrays[f"left.{name}"] for name in ("at", "images", "labels", "xywh", "area", "crowd")}
        self.names = {int(label): name for label, name in content.values["names"]}
        self.image_ids: list[int | str] = content.values.get("image_ids", [])
        self.category_ids: list[int] = content.values.get("category_ids", [])
        self.content = content

    def __len__(self) -> int:
        return len(self.ids)

    def targets(self) -> int:
        """Number of boxes that a model can be trained on: no crowd regions, with area inside their images."""
        height, width = np.repeat(self.sizes, np.diff(self.starts), axis=0).T
        x, y, w, h = self.xywh.T
        with np.errstate(over="ignore"):  # a box may reach as far as numbers go
            inside = (np.minimum(x + w, width) > np.maximum(x, 0)) & (np.minimum(y + h, height) > np.maximum(y, 0))
        return int((inside & ~self.crowd).sum())

    def rows(self, index: int) -> slice:
        """The objects of image ``index``."""
        return slice(int(self.starts[index]), int(self.starts[index + 1]))


def pack(
    images: list[tuple[int, str, int, int]],
    rows: dict[int, list[tuple]],
    names: dict[int, str],
    left: dict[int, list[tuple[int, tuple]]] | None = None,
) -> Content:
    """The arrays of ``Objects``; ``attributes`` only where an object has one.

    Args:
        images: (id, file name, height, width) of each image.
        rows: image id -> (class, x, y, w, h, area, iscrowd, attributes) of its objects.
        names: class -> name.
        left: image id -> (how many of its ``rows`` stand before it in the file, a row as above) of ``Objects.left``.
    """
    ids = [i for i, *_ in images]
    flat = [row for i in ids for row in rows.get(i, ())]
    starts = np.concatenate([[0], np.cumsum([len(rows.get(i, ())) for i in ids])]).astype(np.int64)
    aside = [(int(start) + n, i, row) for start, i in zip(starts, ids) for n, row in (left or {}).get(i, ())]
    content = Content(values={"names": list(names.items())})
    content.put_strings("files", [name for _, name, *_ in images])
    content.arrays |= {
        "ids": np.array(ids, dtype=np.int64),
        "sizes": np.array([(h, w) for *_, h, w in images], dtype=np.int32).reshape(-1, 2),
        "starts": starts,
        **_columns(flat),
        "left.at": np.array([at for at, *_ in aside], dtype=np.int64),
        "left.images": np.array([i for _, i, _ in aside], dtype=np.int64),
        **{f"left.{name}": array for name, array in _columns([row for *_, row in aside]).items()},
    }
    if any(row[7] for row in flat):
        attributes = np.full((len(flat), ATTRIBUTES), -1, dtype=np.int16)
        for i, row in enumerate(flat):
            attributes[i, : len(row[7])] = row[7]
        content.arrays["attributes"] = attributes
    return content


def _columns(rows: list[tuple]) -> dict[str, np.ndarray]:
    return {
        "labels": np.array([row[0] for row in rows], dtype=np.int32),
        "xywh": np.array([row[1:5] for row in rows], dtype=np.float64).reshape(-1, 4),
        "area": np.array([row[5] for row in rows], dtype=np.float64),
        "crowd": np.array([row[6] for row in rows], dtype=bool),
    }


def corners(xywh: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """[n,4] x1 y1 x2 y2 clamped to the image, and [n] bool: which have any area left (SPEC 4.2)."""
    with np.errstate(over="ignore"):
        boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    boxes = np.clip(boxes, 0, [width, height, width, height])
    return boxes, (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
