"""How far two boxes overlap, as plain numbers; boxes are (x, y, width, height)."""

from collections.abc import Sequence


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union; 0 where both are empty."""
    shared = _shared(a, b)
    union = a[2] * a[3] + b[2] * b[3] - shared
    return shared / union if union > 0 else 0.0


def share_inside(a: Sequence[float], b: Sequence[float]) -> float:
    """Share of the area of ``a`` that lies in ``b``: COCO's overlap with a crowd region."""
    area = a[2] * a[3]
    return _shared(a, b) / area if area > 0 else 0.0


def _shared(a, b) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)
