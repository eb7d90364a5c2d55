"""Swapped configs train: one of each of 40 families of mmdet and mmseg, drawn at random, on two small images.

Drawn from the families that learn from single images, on the CPU, with nothing but mmdet and mmseg.
"""

from pathlib import Path

import pytest
import torch
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from mmengine.utils import get_installed_path
from mmseg.structures import SegDataSample

from sn_openmmlab import SwitchNorm, swap_norm

QUICK = [
    'mmdet::dyhead/atss_r50_fpn_dyhead_1x_coco.py',
    'mmdet::fsaf/fsaf_r50_fpn_1x_coco.py',
    'mmdet::grid_rcnn/grid-rcnn_r50_fpn_gn-head_1x_coco.py',
    'mmdet::solov2/solov2-light_r18_fpn_ms-3x_coco.py',
    'mmseg::encnet/encnet_r50-d8_4xb4-80k_ade20k-512x512.py',
    'mmseg::icnet/icnet_r18-d8_4xb2-80k_cityscapes-832x832.py',
    'mmseg::ocrnet/ocrnet_hr18_4xb4-80k_ade20k-512x512.py',
    'mmseg::unet/unet-s5-d16_fcn_4xb4-40k_drive-64x64.py',
]
OTHERS = [
    'mmdet::centripetalnet/centripetalnet_hourglass104_16xb6-crop511-210e-mstest_coco.py',
    'mmdet::cityscapes/mask-rcnn_r50_fpn_1x_cityscapes.py',
    'mmdet::conditional_detr/conditional-detr_r50_8xb2-50e_coco.py',
    'mmdet::cornernet/cornernet_hourglass104_8xb6-210e-mstest_coco.py',
    'mmdet::double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py',
    'mmdet::dsdl/coco.py',
    'mmdet::groie/mask-rcnn_r50_fpn_groie_1x_coco.py',
    'mmdet::instaboost/mask-rcnn_r50_fpn_instaboost-4x_coco.py',
    'mmdet::legacy_1.x/mask-rcnn_r50_fpn_1x_coco_v1.py',
    'mmdet::nas_fcos/nas-fcos_r50-caffe_fpn_nashead-gn-head_4xb4-1x_coco.py',
    'mmdet::openimages/retinanet_r50_fpn_32xb2-1x_openimages.py',
    'mmdet::pafpn/faster-rcnn_r50_pafpn_1x_coco.py',
    'mmdet::pascal_voc/retinanet_r50_fpn_1x_voc0712.py',
    'mmdet::point_rend/point-rend_r50-caffe_fpn_ms-1x_coco.py',
    'mmdet::resnest/mask-rcnn_s50_fpn_syncbn-backbone+head_ms-1x_coco.py',
    'mmdet::sabl/sabl-retinanet_r50_fpn_1x_coco.py',
    'mmdet::scnet/scnet_r50_fpn_1x_coco.py',
    'mmdet::selfsup_pretrain/mask-rcnn_r50-swav-pre_fpn_1x_coco.py',
    'mmdet::solo/solo_r18_fpn_8xb8-lsj-200e_coco.py',
    'mmdet::strong_baselines/mask-rcnn_r50_fpn_rpn-2conv_4conv1fc_syncbn-all_lsj-50e_coco.py',
    'mmseg::ccnet/ccnet_r50-d8_4xb4-80k_ade20k-512x512.py',
    'mmseg::danet/danet_r50-d8_4xb4-80k_ade20k-512x512.py',
    'mmseg::emanet/emanet_r50-d8_4xb2-80k_cityscapes-769x769.py',
    'mmseg::fastfcn/fastfcn_r50-d32_jpu_enc_4xb4-80k_ade20k-512x512.py',
    'mmseg::fcn/fcn_r18-d8_4xb2-80k_cityscapes-769x769.py',
    'mmseg::gcnet/gcnet_r50-d8_4xb4-80k_ade20k-512x512.py',
    'mmseg::hrnet/fcn_hr18_4xb4-80k_isaid-896x896.py',
    'mmseg::psanet/psanet_r50-d8_4xb4-80k_ade20k-512x512.py',
    'mmseg::pspnet/pspnet_r18-d8_4xb4-80k_isaid-896x896.py',
    'mmseg::segnext/segnext_mscan-b_1xb16-adamw-160k_ade20k-512x512.py',
    'mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py',
    'mmseg::vit/vit_deit-b16_upernet_8xb2-80k_ade20k-512x512.py',
]


@pytest.mark.parametrize('name', QUICK + [pytest.param(name, marks=pytest.mark.slow) for name in OTHERS])
def test_one_training_step(name):
    library, _, path = name.partition('::')
    cfg = swap_norm(Config.fromfile(Path(get_installed_path(library), '.mim/configs', path)))
    shrink(cfg.model)
    torch.manual_seed(0)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    model.init_weights()
    model.train()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SwitchNorm)}
    before = {name: m.bn.running_mean.clone() for name, m in layers.items()}

    # train_step in its parts, which would clear the gradients
    losses = model(**model.data_preprocessor(inputs(library), True), mode='loss')
    loss, _ = model.parse_losses(losses)
    loss.backward()
    torch.optim.SGD(model.parameters(), 1e-4).step()

    assert layers and loss.isfinite()
    assert all(p.isfinite().all() for p in model.parameters())
    trained = {name for name, m in layers.items() if m.weight.requires_grad}
    reached = {name for name in trained if layers[name].mean_weight.grad is not None}
    assert reached and all(layers[name].mean_weight.grad.isfinite().all() for name in reached)
    moved = {name for name, m in layers.items() if not torch.equal(m.bn.running_mean, before[name])}
    assert reached <= moved <= trained  # frozen stages keep their statistics
    assert len(reached) > 0.8 * len(trained)


def shrink(node):
    """No checkpoints, no padding to the training size, few proposals."""
    if isinstance(node, (list, tuple)):
        for item in node:
            shrink(item)
    if not isinstance(node, dict):
        return
    small = dict(nms_pre=100, max_per_img=50) if 'rpn_proposal' in node else {}
    node.get('rpn_proposal', {}).update(small)
    for key, value in node.items():
        if key == 'pretrained' or key == 'init_cfg' and 'Pretrained' in str(value):
            node[key] = None
        elif key == 'batch_augments':
            node[key] = None
        elif key == 'sampler' and 'num' in value:
            value.num = 16
        elif key == 'data_preprocessor' and 'size' in value:
            value.size = (128, 128)
        shrink(node[key])


def inputs(library):
    if library == 'mmdet':
        sizes = [[3, 96, 128], [3, 128, 96]]
        return demo_mm_inputs(2, sizes, num_items=[2, 3], num_classes=2, with_mask=True, with_semantic=True)
    samples = [SegDataSample(metainfo=dict(img_shape=(128, 128), ori_shape=(128, 128))) for _ in range(2)]
    for sample in samples:
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 2, (1, 128, 128)))
    return dict(inputs=[torch.randint(0, 256, (3, 128, 128), dtype=torch.uint8) for _ in samples], data_samples=samples)
