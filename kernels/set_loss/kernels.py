"""The Triton kernels of ``set_loss``: rows are the queries of one image in one layer, R of them a block.

A row finds its object by comparing its number with ``query`` [L,B,N], 32 objects at a time, so that nothing is
scattered and nothing outside the tensors is read whatever ``query`` holds. Each row's cross-entropy has one factor,
which depends on matching and labels; forward and backward compute it alike. Classes come in blocks of BLOCK columns,
with the log-sum-exp carried from one to the next. Everything is float32.

A program of the forward adds the rows of one block, one more an image the boxes of its pairs, an object a thread. The
last of a layer's programs adds what all of them left, in a fixed order. The backward has the same programs; every
element is written by one: boxes without an object by that of their row.
"""

from unit_fast_kernels.shared.ticket import is_last
from unit_fast_kernels.shared.triton import jit, tl

OBJECTS = 32
"""Objects that a row is compared with at a time."""
SUM_IMAGES, SUM_BLOCKS = 8, 32
"""Partial sums that the last program of a layer loads at a time: of so many images so many blocks."""


@jit
def _object_of_rows(query_ptr, row, objects, R: tl.constexpr, NB: tl.constexpr):
    """Object [R] of each row of an image, or -1.

    ``query_ptr`` points at the image's [N]. Loaded once a row (from L1), which saves a change of layout.
    """
    found = tl.full([R], -1, tl.int32)
    for start in range(0, objects, NB):
        number = tl.broadcast_to(start + tl.arange(0, NB)[None, :], [R, NB])
        of_object = tl.load(query_ptr + number, mask=number < objects, other=-1)
        found = tl.maximum(found, tl.max(tl.where(of_object == row[:, None], number, -1), 1))
    return found


@jit
def _positives(query_ptr, labels_ptr, count, no_object, NB: tl.constexpr):
    """float32: how many of ``count`` objects have a query and another class than no-object."""
    found = tl.zeros([NB], tl.float32)
    for start in range(0, count, NB):
        number = start + tl.arange(0, NB)
        of_object = tl.load(query_ptr + number, mask=number < count, other=-1)
        label = tl.load(labels_ptr + number, mask=number < count, other=no_object)
        found += tl.where((of_object >= 0) & (label != no_object), 1.0, 0.0)
    return tl.sum(found, 0)


@jit
def _positives_beside(
    query_ptr, labels_ptr, layer, image, images, objects, no_object,
    PER_PROCESS: tl.constexpr, BALANCED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """float32: the positives that the class loss of an image is divided by: of the image, of the layer, or none."""
    if BALANCED:
        return 0.0
    elif PER_PROCESS:
        return _positives(query_ptr + layer * images * objects, labels_ptr, images * objects, no_object, NB)
    else:
        of_image = layer * images + image
        return _positives(query_ptr + of_image * objects, labels_ptr + image * objects, objects, no_object, NB)


@jit
def _factors(
    positive, positives, number, images, queries, weight,
    PER_PROCESS: tl.constexpr, BALANCED: tl.constexpr, POSITIVE: tl.constexpr, NEGATIVE: tl.constexpr,
):  # fmt: skip
    """float32 [R]: what the cross-entropy of each row is multiplied with. positive bool [R]: its class is not
    no-object; positives: see ``_positives_beside``."""
    if BALANCED:
        others = tl.maximum(images * queries - number, 1.0)
        return tl.where(positive, POSITIVE / number, NEGATIVE / others)
    else:
        own = tl.where(positive, 1.0, weight)
        if PER_PROCESS:
            return own / (positives + weight * (images * queries - positives))
        else:
            return own / ((positives + weight * (queries - positives)) * images)


@jit
def _box(ptr, offset, mask):
    """cx, cy, w, h of boxes at ``offset`` (in numbers); what is masked is the box 1, 1, 1, 1."""
    cx = tl.load(ptr + offset, mask=mask, other=1.0).to(tl.float32)
    cy = tl.load(ptr + offset + 1, mask=mask, other=1.0).to(tl.float32)
    w = tl.load(ptr + offset + 2, mask=mask, other=1.0).to(tl.float32)
    h = tl.load(ptr + offset + 3, mask=mask, other=1.0).to(tl.float32)
    return cx, cy, w, h


@jit
def _pairs(query_ptr, start, layer, of_image, images, queries, objects, PAIRS: tl.constexpr):
    """(rows of boxes, of target_boxes, which count) for the objects from ``start`` on of an image in a layer. The
    masks keep queries that do not exist out."""
    number = start + tl.arange(0, PAIRS)
    query = tl.load(query_ptr + of_image * objects + number, mask=number < objects, other=-1).to(tl.int64)
    valid = (query >= 0) & (query < queries)
    return of_image * queries + query, (of_image - layer * images) * objects + number, valid


@jit
def _overlap(a_low, a_high, b_low, b_high):
    """Lengths along one axis: (of the intersection, of the hull) before they are clamped at zero."""
    return tl.minimum(a_high, b_high) - tl.maximum(a_low, b_low), tl.maximum(a_high, b_high) - tl.minimum(a_low, b_low)


@jit
def _part(a, b):
    """The share of a in the gradient of max(a, b): equals share it evenly, as PyTorch's do."""
    return tl.where(a > b, 1.0, tl.where(a == b, 0.5, 0.0))


@jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@jit
def _box_terms(ax, ay, aw, ah, bx, by, bw, bh):
    """(L1 distance, 1 - GIoU) of boxes a and b."""
    distance = tl.abs(ax - bx) + tl.abs(ay - by) + tl.abs(aw - bw) + tl.abs(ah - bh)
    ax1, ax2, ay1, ay2 = ax - 0.5 * aw, ax + 0.5 * aw, ay - 0.5 * ah, ay + 0.5 * ah
    bx1, bx2, by1, by2 = bx - 0.5 * bw, bx + 0.5 * bw, by - 0.5 * bh, by + 0.5 * bh
    inner_w, hull_w = _overlap(ax1, ax2, bx1, bx2)
    inner_h, hull_h = _overlap(ay1, ay2, by1, by2)
    inner = tl.maximum(inner_w, 0.0) * tl.maximum(inner_h, 0.0)
    hull = tl.maximum(hull_w, 0.0) * tl.maximum(hull_h, 0.0)
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - inner
    return distance, 1.0 - (inner / union - (hull - union) / hull)


@jit
def _axis_gradient(a_low, a_high, b_low, b_high, other_inner, other_hull, other_side, by_inner, by_area, by_hull):
    """Gradient of the GIoU by the two corners of a along one axis, from that by the three areas."""
    inner, hull = _overlap(a_low, a_high, b_low, b_high)
    inner = tl.where(inner >= 0, by_inner * other_inner, 0.0)
    hull = tl.where(hull >= 0, by_hull * other_hull, 0.0)
    area = by_area * other_side
    high = inner * _part(b_high, a_high) + hull * _part(a_high, b_high) + area
    low = -inner * _part(a_low, b_low) - hull * _part(b_low, a_low) - area
    return low, high


@jit
def _giou_gradient(ax, ay, aw, ah, bx, by, bw, bh):
    """Gradient of the GIoU of a and b by cx, cy, w, h of a."""
    ax1, ax2, ay1, ay2 = ax - 0.5 * aw, ax + 0.5 * aw, ay - 0.5 * ah, ay + 0.5 * ah
    bx1, bx2, by1, by2 = bx - 0.5 * bw, bx + 0.5 * bw, by - 0.5 * bh, by + 0.5 * bh
    inner_w, hull_w = _overlap(ax1, ax2, bx1, bx2)
    inner_h, hull_h = _overlap(ay1, ay2, by1, by2)
    inner_w, inner_h = tl.maximum(inner_w, 0.0), tl.maximum(inner_h, 0.0)
    hull_w, hull_h = tl.maximum(hull_w, 0.0), tl.maximum(hull_h, 0.0)
    inner, hull = inner_w * inner_h, hull_w * hull_h
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - inner
    # GIoU = inner / union - 1 + union / hull, and union = areas - inner.
    by_area = 1.0 / hull - inner / (union * union)
    by_inner = 1.0 / union - by_area
    by_hull = -union / (hull * hull)
    x1, x2 = _axis_gradient(ax1, ax2, bx1, bx2, inner_h, hull_h, ay2 - ay1, by_inner, by_area, by_hull)
    y1, y2 = _axis_gradient(ay1, ay2, by1, by2, inner_w, hull_w, ax2 - ax1, by_inner, by_area, by_hull)
    return x1 + x2, y1 + y2, 0.5 * (x2 - x1), 0.5 * (y2 - y1)


@jit
def _layer_sums(partials_ptr, images, blocks, IB: tl.constexpr, SB: tl.constexpr):
    """(ce, bbox, giou) of a layer from its partials [2,B,S], in an order that only the sizes decide."""
    per_result = images * blocks
    ce = tl.zeros([IB, SB], tl.float32)
    bbox = tl.zeros([IB], tl.float32)
    giou = tl.zeros([IB], tl.float32)
    for first in range(0, images, IB):
        image = first + tl.arange(0, IB)
        of_image = image * blocks
        for start in range(0, blocks - 1, SB):
            block = start + tl.arange(0, SB)
            mask = (image < images)[:, None] & (block < blocks - 1)[None, :]
            place = of_image[:, None] + block[None, :]
            ce += tl.load(partials_ptr + place, mask=mask, other=0.0, cache_modifier=".cg")
        pairs_ptr = partials_ptr + blocks - 1
        bbox += tl.load(pairs_ptr + of_image, mask=image < images, other=0.0, cache_modifier=".cg")
        giou += tl.load(pairs_ptr + per_result + of_image, mask=image < images, other=0.0, cache_modifier=".cg")
    return tl.sum(tl.sum(ce, 1), 0), tl.sum(bbox, 0), tl.sum(giou, 0)


@jit
def _set_loss_fwd_kernel(
    logits_ptr,  # [L,B,Q,K]
    boxes_ptr,  # [L,B,Q,4]
    query_ptr,  # int64 [L,B,N]
    labels_ptr,  # int64 [B,N]
    target_boxes_ptr,  # [B,N,4]
    number_ptr,  # scalar: number of boxes
    lse_ptr,  # [L,B,Q] float32
    partials_ptr,  # [L,2,B,S] float32: of a block of rows ce; of the last bbox, giou
    counters_ptr,  # int32 [L], 0
    losses_ptr,  # [3,L] float32: ce, bbox, giou
    images,  # B
    queries,  # Q
    objects,  # N
    no_object,
    no_object_weight,
    weight_ce,
    weight_bbox,
    weight_giou,
    K: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    NB: tl.constexpr,
    PAIRS: tl.constexpr,
    PER_PROCESS: tl.constexpr,
    BALANCED: tl.constexpr,
    POSITIVE: tl.constexpr,
    NEGATIVE: tl.constexpr,
    IB: tl.constexpr,
    SB: tl.constexpr,
):
    layer, image, block = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.program_id(0)
    layers, blocks = tl.num_programs(2), tl.num_programs(0)
    of_image = layer * images + image
    number = tl.load(number_ptr).to(tl.float32)
    partials_ptr += layer * 2 * images * blocks
    place = partials_ptr + image.to(tl.int64) * blocks + block
    if block * R < queries:
        row = block * R + tl.arange(0, R)
        inside = row < queries
        object_ = _object_of_rows(query_ptr + of_image * objects, row, objects, R, NB)
        matched = inside & (object_ >= 0)
        target = tl.load(labels_ptr + image * objects + object_, mask=matched, other=0)
        target = tl.where(matched, target, no_object)
        at = of_image * queries + row
        known = inside & (target >= 0) & (target < K)
        # A label that is no class gives NaN, not another class's loss.
        of_target = tl.load(logits_ptr + at * K + target, mask=known, other=float("nan")).to(tl.float32)
        of_none = tl.load(logits_ptr + at * K + no_object, mask=inside, other=0.0).to(tl.float32)
        top = tl.maximum(of_none, -3.0e38)  # minus infinity less itself would be NaN
        total = tl.zeros([R], tl.float32)
        for first in range(0, K, BLOCK):
            column = first + tl.arange(0, BLOCK)
            mask = inside[:, None] & (column < K)[None, :]
            x = tl.load(logits_ptr + at[:, None] * K + column[None, :], mask=mask, other=float("-inf"))
            x = x.to(tl.float32)
            # No-object is in top; left out here, the rest takes fewer registers.
            of_objects = tl.where((column == no_object)[None, :], float("-inf"), x)
            above = tl.maximum(top, tl.max(of_objects, 1))
            total = total * tl.exp(top - above) + tl.sum(tl.exp(x - above[:, None]), 1)
            top = above
        lse = top + tl.log(tl.where(inside, total, 1.0))
        tl.store(lse_ptr + at, lse, mask=inside)
        positives = _positives_beside(
            query_ptr, labels_ptr, layer, image, images, objects, no_object, PER_PROCESS, BALANCED, NB
        )
        factor = _factors(
            matched & (target != no_object), positives, number, images, queries, no_object_weight,
            PER_PROCESS, BALANCED, POSITIVE, NEGATIVE,
        )  # fmt: skip
        ce = tl.where(inside, factor * (lse - of_target), 0.0)
        tl.store(place, tl.sum(ce, 0))
    else:
        bbox = tl.zeros([PAIRS], tl.float32)
        giou = tl.zeros([PAIRS], tl.float32)
        for start in range(0, objects, PAIRS):
            of_query, of_object, valid = _pairs(query_ptr, start, layer, of_image, images, queries, objects, PAIRS)
            ax, ay, aw, ah = _box(boxes_ptr, of_query * 4, valid)
            bx, by, bw, bh = _box(target_boxes_ptr, of_object * 4, valid)
            distance, dissimilarity = _box_terms(ax, ay, aw, ah, bx, by, bw, bh)
            bbox += tl.where(valid, distance, 0.0)
            giou += tl.where(valid, dissimilarity, 0.0)
        tl.store(place, tl.sum(bbox, 0))
        tl.store(place + images * blocks, tl.sum(giou, 0))
    if is_last(counters_ptr + layer, images * blocks):
        ce, bbox, giou = _layer_sums(partials_ptr, images, blocks, IB, SB)
        tl.store(losses_ptr + layer, ce * weight_ce)
        tl.store(losses_ptr + layers + layer, bbox / number * weight_bbox)
        tl.store(losses_ptr + 2 * layers + layer, giou / number * weight_giou)


@jit
def _set_loss_bwd_kernel(
    by_ce_ptr,  # [L] float32, or None
    by_bbox_ptr,  # [L] float32, or None
    by_giou_ptr,  # [L] float32, or None
    logits_ptr,  # [L,B,Q,K]
    boxes_ptr,  # [L,B,Q,4]
    query_ptr,  # int64 [L,B,N]
    labels_ptr,  # int64 [B,N]
    target_boxes_ptr,  # [B,N,4]
    number_ptr,  # scalar
    lse_ptr,  # [L,B,Q] float32
    dlogits_ptr,  # [L,B,Q,K]
    dboxes_ptr,  # [L,B,Q,4]
    images,  # B
    queries,  # Q
    objects,  # N
    no_object,
    no_object_weight,
    weight_ce,
    weight_bbox,
    weight_giou,
    K: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    NB: tl.constexpr,
    PAIRS: tl.constexpr,
    PER_PROCESS: tl.constexpr,
    BALANCED: tl.constexpr,
    POSITIVE: tl.constexpr,
    NEGATIVE: tl.constexpr,
):
    layer, image = tl.program_id(2).to(tl.int64), tl.program_id(1)
    of_image = layer * images + image
    number = tl.load(number_ptr).to(tl.float32)
    first_row = tl.program_id(0) * R
    if first_row < queries:
        row = first_row + tl.arange(0, R)
        inside = row < queries
        object_ = _object_of_rows(query_ptr + of_image * objects, row, objects, R, NB)
        matched = inside & (object_ >= 0)
        at = of_image * queries + row
        if by_ce_ptr is not None:
            positives = _positives_beside(
                query_ptr, labels_ptr, layer, image, images, objects, no_object, PER_PROCESS, BALANCED, NB
            )
            target = tl.load(labels_ptr + image * objects + object_, mask=matched, other=0)
            target = tl.where(matched, target, no_object)
            factor = _factors(
                matched & (target != no_object), positives, number, images, queries, no_object_weight,
                PER_PROCESS, BALANCED, POSITIVE, NEGATIVE,
            )  # fmt: skip
            factor *= tl.load(by_ce_ptr + layer) * weight_ce
            factor = tl.where((target >= 0) & (target < K), factor, float("nan"))
            lse = tl.load(lse_ptr + at, mask=inside, other=0.0)
            for first in range(0, K, BLOCK):
                column = first + tl.arange(0, BLOCK)
                mask = inside[:, None] & (column < K)[None, :]
                offset = at[:, None] * K + column[None, :]
                x = tl.load(logits_ptr + offset, mask=mask, other=0.0).to(tl.float32)
                p = tl.exp(x - lse[:, None]) - (column[None, :] == target[:, None]).to(tl.float32)
                tl.store(dlogits_ptr + offset, (factor[:, None] * p).to(dlogits_ptr.dtype.element_ty), mask=mask)
        else:
            for first in range(0, K, BLOCK):
                column = first + tl.arange(0, BLOCK)
                mask = inside[:, None] & (column < K)[None, :]
                zeros = tl.zeros([R, BLOCK], tl.float32).to(dlogits_ptr.dtype.element_ty)
                tl.store(dlogits_ptr + at[:, None] * K + column[None, :], zeros, mask=mask)
        # The boxes of matched rows are the last program's.
        coordinate = tl.arange(0, 4)
        zeros = tl.zeros([R, 4], tl.float32).to(dboxes_ptr.dtype.element_ty)
        mask = (inside & (object_ < 0))[:, None] & (coordinate < 4)[None, :]
        tl.store(dboxes_ptr + at[:, None] * 4 + coordinate[None, :], zeros, mask=mask)
    else:
        by_bbox, by_giou = 0.0, 0.0
        if by_bbox_ptr is not None:
            by_bbox = tl.load(by_bbox_ptr + layer) * weight_bbox / number
        if by_giou_ptr is not None:
            by_giou = tl.load(by_giou_ptr + layer) * weight_giou / number
        for start in range(0, objects, PAIRS):
            of_query, of_object, valid = _pairs(query_ptr, start, layer, of_image, images, queries, objects, PAIRS)
            ax, ay, aw, ah = _box(boxes_ptr, of_query * 4, valid)
            bx, by, bw, bh = _box(target_boxes_ptr, of_object * 4, valid)
            dx, dy, dw, dh = tl.zeros_like(ax), tl.zeros_like(ax), tl.zeros_like(ax), tl.zeros_like(ax)
            if by_bbox_ptr is not None:
                dx += by_bbox * _sign(ax - bx)
                dy += by_bbox * _sign(ay - by)
                dw += by_bbox * _sign(aw - bw)
                dh += by_bbox * _sign(ah - bh)
            if by_giou_ptr is not None:
                gx, gy, gw, gh = _giou_gradient(ax, ay, aw, ah, bx, by, bw, bh)
                dx -= by_giou * gx
                dy -= by_giou * gy
                dw -= by_giou * gw
                dh -= by_giou * gh
            place = dboxes_ptr + of_query * 4
            tl.store(place, dx.to(dboxes_ptr.dtype.element_ty), mask=valid)
            tl.store(place + 1, dy.to(dboxes_ptr.dtype.element_ty), mask=valid)
            tl.store(place + 2, dw.to(dboxes_ptr.dtype.element_ty), mask=valid)
            tl.store(place + 3, dh.to(dboxes_ptr.dtype.element_ty), mask=valid)
