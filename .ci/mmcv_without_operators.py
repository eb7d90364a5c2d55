"""In the place of mmcv's compiled operators, which mmcv-lite lacks and mmdet imports: each says so when called.

But for NMS, without which no detector predicts.
"""


def nms(boxes, scores, iou_threshold, offset):
    """Indices of the boxes that no better one overlaps by more than the threshold, the best first."""
    kept, left = [], scores.argsort(descending=True)
    area = (boxes[:, 2:] - boxes[:, :2] + offset).prod(1)
    while len(left):
        best, left = left[0], left[1:]
        kept.append(int(best))
        shared = boxes[left, 2:].minimum(boxes[best, 2:]) - boxes[left, :2].maximum(boxes[best, :2]) + offset
        shared = shared.clamp(min=0).prod(1)
        left = left[shared <= iou_threshold * (area[left] + area[best] - shared)]
    return left.new_tensor(kept)


def __getattr__(name):
    def lacking(*args, **kwargs):
        raise NotImplementedError(f'{name} is one of the operators that mmcv-lite does not have')

    return lacking
