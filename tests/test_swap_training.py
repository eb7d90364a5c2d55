"""Swapped configs train: one of each of 40 families of mmdet and mmseg, drawn at random, on two small images.

Drawn from the families that learn from single images, on the CPU, with nothing but mmdet and mmseg;
benchmarks/swap_training.py is about all families.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.swap_training import read, train_step  # noqa: E402
from sn_openmmlab import swap_norm  # noqa: E402

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
    assert train_step(swap_norm(read(name), statistics='train')) == ''
