"""The demonstration: its data are what they say, byte for byte, and its model trains."""

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS, init_default_scope
from pycocotools.coco import COCO
from torch.nn.modules.batchnorm import _NormBase

from sn_openmmlab import SwitchNorm
from sn_openmmlab.norms import part_name

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / 'tools'))

import demo  # noqa: E402
import make_demo_data  # noqa: E402

SMALL = dict(train=8, val=4, size=(96, 128), seed=3)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp('data') / 'demo'
    assert make_demo_data.make_demo_data(out, **SMALL)
    return out


def digest(folder):
    files = sorted(p for p in folder.rglob('*') if p.is_file())
    return hashlib.sha256(b''.join(str(p.relative_to(folder)).encode() + p.read_bytes() for p in files)).hexdigest()


@pytest.fixture(params=['train', 'val'])
def split(request, data):
    """Per image: its entry, its annotations, their masks, the semantic map and the picture."""
    coco = COCO(data / f'annotations/instances_{request.param}.json')
    assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == list(make_demo_data.CLASSES)
    assert len(coco.imgs) == SMALL[request.param]
    return [
        (
            image,
            annotations := coco.imgToAnns[image['id']],
            [coco.annToMask(annotation).astype(bool) for annotation in annotations],
            cv2.imread(data / f'semantic/{request.param}' / f'{Path(image["file_name"]).stem}.png', -1),
            cv2.imread(data / f'images/{request.param}' / image['file_name']),
        )
        for image in coco.imgs.values()
    ]


def test_the_same_settings_give_the_same_bytes(data, tmp_path):
    make_demo_data.make_demo_data(tmp_path / 'again', **SMALL)
    make_demo_data.make_demo_data(tmp_path / 'other', **{**SMALL, 'seed': 4})
    assert digest(tmp_path / 'again') == digest(data) != digest(tmp_path / 'other')
    train, val = (json.loads((data / f'annotations/instances_{s}.json').read_text()) for s in ('train', 'val'))
    assert train['annotations'][:5] != val['annotations'][:5]


def test_annotations_agree_with_masks_and_semantic_map(split):
    for image, annotations, masks, semantic, picture in split:
        height, width = image['height'], image['width']
        assert picture.shape == (height, width, 3) and semantic.shape == (height, width) == SMALL['size']
        assert semantic.dtype == np.uint8
        expected = np.zeros_like(semantic)
        for annotation, mask in zip(annotations, masks):
            assert annotation['area'] == mask.sum() > 0 and annotation['iscrowd'] == 0
            x, y, w, h = annotation['bbox']
            ys, xs = np.nonzero(mask)
            assert (x, y, x + w, y + h) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert x >= 0 and y >= 0 and x + w <= width and y + h <= height
            expected[mask] = annotation['category_id']
        assert np.sum(masks, 0).max() <= 1  # the visible parts are disjoint
        assert np.array_equal(semantic, expected)


def test_shapes_overlap_and_every_class_and_size_is_there(data):
    coco = COCO(data / 'annotations/instances_train.json')
    assert {a['category_id'] for a in coco.anns.values()} == {1, 2, 3, 4}
    areas = [a['area'] for a in coco.anns.values()]
    assert max(areas) > 8 * min(areas)
    covered = 0
    for annotations in coco.imgToAnns.values():
        for a, b in ((a, b) for a in annotations for b in annotations if a is not b):
            (ax, ay, aw, ah), (bx, by, bw, bh) = a['bbox'], b['bbox']
            covered += ax < bx + bw and bx < ax + aw and ay < by + bh and by < ay + ah
    assert covered >= 2


def test_colour_does_not_tell_the_class(split):
    by_class = {}
    for _, annotations, masks, _, picture in split:
        for annotation, mask in zip(annotations, masks):
            by_class.setdefault(annotation['category_id'], []).append(picture[mask].mean(0))
    assert all(np.ptp(colours, axis=0).max() > 40 for colours in by_class.values() if len(colours) > 2)


def test_what_is_there_is_kept_and_only_demo_data_are_replaced(tmp_path):
    out = tmp_path / 'demo'
    tiny = dict(train=1, val=1, size=(32, 32))
    assert make_demo_data.make_demo_data(out, **tiny)
    stamp = (out / 'settings.json').stat().st_mtime_ns
    assert not make_demo_data.make_demo_data(out, **tiny)
    assert (out / 'settings.json').stat().st_mtime_ns == stamp
    assert make_demo_data.make_demo_data(out, **{**tiny, 'val': 2})
    assert len(list((out / 'images/val').iterdir())) == 2

    foreign = tmp_path / 'mine'
    foreign.mkdir()
    (foreign / 'notes.txt').write_text('keep')
    with pytest.raises(FileExistsError, match='mine.*no demo data'):
        make_demo_data.make_demo_data(foreign, **tiny)
    assert (foreign / 'notes.txt').read_text() == 'keep'
    with pytest.raises(ValueError, match='train=0'):
        make_demo_data.make_demo_data(tmp_path / 'none', train=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['demo', 'mine']  # and nothing half made


def test_a_set_that_fails_half_way_leaves_the_old_one(tmp_path, monkeypatch):
    out = tmp_path / 'demo'
    make_demo_data.make_demo_data(out, 1, 1, (32, 32))
    before = digest(out)
    monkeypatch.setattr(make_demo_data, '_write', lambda *_: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError, match='disk full'):
        make_demo_data.make_demo_data(out, 2, 1, (32, 32))
    assert digest(out) == before and [p.name for p in tmp_path.iterdir()] == ['demo']


def test_the_model_has_sn_everywhere_and_trains_a_step(data):
    torch.manual_seed(0)
    config = Config.fromfile(demo.CONFIG)
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    own = [m.bn for m in model.modules() if isinstance(m, SwitchNorm)]
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and not isinstance(m, SwitchNorm)]
    assert {*map(id, own)} == {*map(id, norms)}
    counts = Counter(part_name(name) for name, m in model.named_modules() if isinstance(m, SwitchNorm))
    convs = config.model.roi_head.mask_head.num_convs
    assert counts == {'backbone': 20, 'neck': 8, 'box head': 4, 'mask head': convs}
    assert sum(counts.values()) == len(own)

    config.train_dataloader.dataset.data_root = str(data)
    dataset = DATASETS.build(config.train_dataloader.dataset)
    model.init_weights()
    model.train()
    batch = model.data_preprocessor(pseudo_collate([dataset[i] for i in range(2)]), training=True)
    losses, _ = model.parse_losses(model(**batch, mode='loss'))
    losses.backward()
    assert torch.isfinite(losses)
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
