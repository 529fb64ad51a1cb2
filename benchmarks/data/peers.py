"""Loaders as people write them with torchvision and Pillow.

Annotations, sizes, crops, flips and boxes come from our data sets and ``Geometry`` (so the peers have our cached
annotations and cheap boxes for free); how pixels are made and batches put together is their own.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unit_fast.data.images.transforms import MEAN, STD


def torchvision_v2(path: str):
    """torchvision's decoder and transforms v2 on uint8 tensors, laid out so that each kernel takes its fast path."""
    from torchvision.io import ImageReadMode, decode_image, read_file
    from torchvision.transforms.v2 import functional as F

    image = decode_image(read_file(path), mode=ImageReadMode.RGB)

    def change(g) -> Tensor:
        x = image
        if g.flip:
            x = F.horizontal_flip(x)
        if g.first is not None:
            x = F.resize(x, list(g.first), antialias=True)
        if g.crop is not None:
            x = F.crop(x, *g.crop)
        x = F.resize(x, list(g.size), antialias=True)
        # the resize is fast on channels last, what follows on the usual layout
        return F.normalize(F.to_dtype(x.contiguous(), torch.float32, scale=True), MEAN, STD, inplace=True)

    return (image.shape[1], image.shape[2]), change


def pil_detr(path: str):
    """Pillow and torchvision's functional transforms, as DETR's ``datasets/transforms.py`` has them."""
    from PIL import Image
    from torchvision.transforms import functional as F

    image = Image.open(path).convert("RGB")

    def change(g) -> Tensor:
        x = image
        if g.flip:
            x = F.hflip(x)
        if g.first is not None:
            x = F.resize(x, list(g.first))
        if g.crop is not None:
            x = F.crop(x, *g.crop)
        return F.normalize(F.to_tensor(F.resize(x, list(g.size))), MEAN, STD)

    return (image.height, image.width), change


PEERS = {"torchvision_v2": torchvision_v2, "pil_detr": pil_detr}
"""Provider -> path to ((height, width), function of the geometry to [3,h,w] float32)."""


class PeerData(torch.utils.data.Dataset):
    """Samples by (index, key), pixels made by a peer."""

    def __init__(self, dataset, peer: str):
        self.dataset, self.peer = dataset, peer

    def __getitem__(self, visit: tuple[int, int]) -> dict:
        index, key = visit
        path = self.dataset.image_path(index)
        size, change = PEERS[self.peer](str(path))
        return self.dataset.sample(index, key, path, size, lambda geometry: {"image": change(geometry)})


def pad_collate(samples: list[dict]) -> dict:
    """Images padded at the bottom and right with their mask, as DETR does it; texts and targets padded."""
    images = [sample["image"] for sample in samples]
    height, width = (max(x.shape[side] for x in images) for side in (1, 2))
    out = {
        "image": torch.zeros(len(images), 3, height, width),
        "pixel_mask": torch.ones(len(images), height, width, dtype=torch.bool),
        "orig_size": torch.tensor([sample["orig_size"] for sample in samples]),
    }
    for x, image, mask in zip(images, out["image"], out["pixel_mask"]):
        image[:, : x.shape[1], : x.shape[2]].copy_(x)
        mask[: x.shape[1], : x.shape[2]] = False
    for name, value in (("input_ids", 0), ("attention_mask", 0), ("token_type_ids", 0), ("labels", -1), ("boxes", 0)):
        if name in samples[0]:
            out[name] = pad_sequence([sample[name] for sample in samples], batch_first=True, padding_value=value)
    if "boxes" in samples[0]:
        out["counts"] = torch.tensor([len(sample["labels"]) for sample in samples], dtype=torch.int32)
    if "answer_scores" in samples[0]:
        out["answer_scores"] = torch.stack([sample["answer_scores"] for sample in samples])
    return out
