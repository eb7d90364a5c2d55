"""Make a small instance-segmentation set: textured shapes that overlap on textured backgrounds, in COCO format.

    OUT/annotations/instances_{train,val}.json    boxes and masks (RLE) of what is visible of each shape
    OUT/images/{train,val}/*.jpg
    OUT/semantic/{train,val}/*.png                one byte a pixel: 0 background, else the category's id
    OUT/settings.json                             what it was made with

The same settings give the same bytes. The class is the shape; colour and texture say nothing about it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask

CLASSES = ('circle', 'rectangle', 'triangle', 'star')
VERSION = 1  # raise it whenever the same settings give another set
MIN_VISIBLE = 0.6  # of each shape, or its class could not be told


def main() -> None:
    """Read the command line and make the set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', nargs='?', type=Path, default=Path('data/demo'), help='default: data/demo')
    parser.add_argument('--train', type=int, default=800, help='training images (default: 800)')
    parser.add_argument('--val', type=int, default=80, help='validation images (default: 80)')
    parser.add_argument('--size', type=_size, default=(256, 256), metavar='HxW', help='default: 256x256')
    parser.add_argument('--seed', type=int, default=0, help='default: 0')
    args = parser.parse_args()
    try:
        made = make_demo_data(args.out, args.train, args.val, args.size, args.seed)
    except (FileExistsError, ValueError) as error:
        parser.error(str(error))
    print(f'{args.out}: {"made" if made else "already there:"} {args.train} training and {args.val} validation images')


def make_demo_data(out, train: int = 800, val: int = 80, size=(256, 256), seed: int = 0) -> bool:
    """Make the set in the folder ``out``, unless it is there already.

    A set with other settings is replaced. The set is made beside ``out``, and renamed when it is complete.

    Args:
        out (str or Path): Folder to make.
        train (int): Number of training images. Defaults to 800.
        val (int): Number of validation images. Defaults to 80.
        size (tuple[int, int]): Height and width in pixels. Defaults to (256, 256).
        seed (int): Seed of everything drawn. Defaults to 0.

    Returns:
        bool: Whether anything had to be made.

    Raises:
        FileExistsError: If ``out`` exists and is no such set.
        ValueError: If a number is out of range.
    """
    out = Path(out)
    if train < 1 or val < 1 or min(size) < 32 or seed < 0:
        raise ValueError(
            'needs at least 1 training and 1 validation image of at least 32x32 pixels and a seed of at least 0, '
            f'got train={train}, val={val}, size={size[0]}x{size[1]}, seed={seed}'
        )
    settings = dict(generator='sn_openmmlab demo data', version=VERSION, train=train, val=val, size=[*size], seed=seed)
    if out.exists():
        found = _settings(out)
        if found == settings:
            return False
        if found.get('generator') != settings['generator'] and (not out.is_dir() or any(out.iterdir())):
            raise FileExistsError(f'{out} is there and is no demo data; remove it or name another folder')
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f'{out.name}.partial-{os.getpid()}')
    try:
        for split, (name, count) in enumerate(dict(train=train, val=val).items()):
            _make_split(partial, name, [np.random.default_rng([seed, split, i]) for i in range(count)], size)
        (partial / 'settings.json').write_text(json.dumps(settings))
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def _settings(out: Path) -> dict:
    """Read the settings of the set at ``out``; empty if it is no such set."""
    try:
        settings = json.loads((out / 'settings.json').read_text())
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _make_split(out: Path, name: str, rngs, size) -> None:
    images, annotations = [], []
    for folder in f'images/{name}', f'semantic/{name}', 'annotations':
        (out / folder).mkdir(parents=True, exist_ok=True)
    for i, rng in enumerate(rngs, 1):
        picture, instances, categories = draw(rng, size)
        semantic = np.zeros(size, np.uint8)
        images.append(dict(id=i, file_name=f'{i:06d}.jpg', height=size[0], width=size[1]))
        for mask, category in zip(instances, categories):
            semantic[mask] = category
            rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=i,
                    category_id=category,
                    segmentation=dict(size=[*size], counts=rle['counts'].decode()),
                    bbox=coco_mask.toBbox(rle).tolist(),
                    area=int(coco_mask.area(rle)),
                    iscrowd=0,
                )
            )
        _write(out / f'images/{name}/{i:06d}.jpg', picture, [cv2.IMWRITE_JPEG_QUALITY, 92])
        _write(out / f'semantic/{name}/{i:06d}.png', semantic)
    content = dict(
        info=dict(description=f'sn_openmmlab demo data, {name}'),
        licenses=[],
        images=images,
        annotations=annotations,
        categories=[dict(id=i, name=shape, supercategory='shape') for i, shape in enumerate(CLASSES, 1)],
    )
    (out / f'annotations/instances_{name}.json').write_text(json.dumps(content))


def draw(rng: np.random.Generator, size) -> tuple[np.ndarray, list[np.ndarray], list[int]]:
    """Draw one picture.

    Returns:
        tuple: The picture (H, W, 3) in uint8, the visible part (H, W) of each shape as a boolean mask, and each
        shape's category, from 1.
    """
    picture = _texture(rng, *size)
    masks, areas, categories = [], [], []
    wanted = int(rng.integers(3, 8))
    for _ in range(4 * wanted):  # a shape that would cover too much is dropped
        category = int(rng.integers(1, len(CLASSES) + 1))
        diameter = min(size) * np.exp(rng.uniform(np.log(0.15), np.log(0.5)))
        mask = _shape(rng, CLASSES[category - 1], diameter, size)
        left = [old & ~mask for old in masks]
        if any(old.sum() < MIN_VISIBLE * area for old, area in zip(left, areas)):
            continue
        y, x = (slice(at.min(), at.max() + 1) for at in np.nonzero(mask))
        below, inside = picture[y, x], mask[y, x]
        texture = _texture(rng, *inside.shape)
        if np.abs(texture[inside].mean(0) - below[inside].mean(0)).max() < 60:  # could hardly be seen
            continue
        below[inside] = texture[inside]
        masks, areas, categories = [*left, mask], [*areas, mask.sum()], [*categories, category]
        if len(masks) == wanted:
            break
    picture += rng.normal(0, 6, picture.shape).astype(np.float32)
    return picture.clip(0, 255).astype(np.uint8), masks, categories


def _shape(rng, name: str, diameter: float, size) -> np.ndarray:
    """Draw a mask (H, W) of one shape, anywhere in the picture, tilted by up to 20 degrees."""
    corners = dict(circle=64, rectangle=4, triangle=3, star=10)[name]
    angles = np.arange(corners) * 2 * np.pi / corners - np.pi / 2  # the first one is on top
    radius = np.ones(corners)
    if name == 'star':
        radius[1::2] = 0.45
    if name == 'rectangle':
        half = rng.uniform(0.4, np.pi / 2 - 0.4)  # half the angle that its height fills, seen from the middle
        angles = np.array([-half, half, np.pi - half, np.pi + half])
    angles = angles + np.radians(rng.uniform(-20, 20))
    corners = diameter / 2 * radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
    low, high = corners.min(0), corners.max(0)
    corners += rng.uniform(-low, np.maximum(np.array(size)[::-1] - 1 - high, -low))
    mask = np.zeros(size, np.uint8)
    cv2.fillPoly(mask, [np.round(corners * 16).astype(np.int32)], 1, shift=4)
    return mask.astype(bool)


def _texture(rng, height: int, width: int) -> np.ndarray:
    """Draw a texture (H, W, 3) in float32: two colours blended by a gradient, by stripes or by smooth noise."""
    first, second = rng.uniform(10, 245, (2, 3)).astype(np.float32)
    kind = rng.integers(3)
    if kind == 2:
        grid = rng.uniform(0, 1, (height // 12 + 2, width // 12 + 2)).astype(np.float32)
        blend = cv2.resize(grid, (width, height), interpolation=cv2.INTER_LINEAR)
    else:
        angle = rng.uniform(0, 2 * np.pi)
        y, x = np.ogrid[:height, :width]
        along = (np.cos(angle) * x + np.sin(angle) * y).astype(np.float32)
        if kind == 0:
            blend = (along - along.min()) / max(np.ptp(along), 1)
        else:
            blend = 0.5 + 0.5 * np.sin(along * np.float32(2 * np.pi / rng.uniform(6, 24)))
    second = first + rng.uniform(0.3, 0.8) * (second - first)
    return (first + blend[..., None] * (second - first)).astype(np.float32)


def _write(path: Path, picture: np.ndarray, options=()) -> None:
    if not cv2.imwrite(str(path), picture, options):
        raise OSError(f'could not write {path}')


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = map(int, text.lower().split('x'))
    except ValueError:
        raise argparse.ArgumentTypeError(f'expected HEIGHTxWIDTH such as 256x256, got {text!r}') from None
    return height, width


if __name__ == '__main__':
    main()
