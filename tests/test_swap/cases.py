"""What tests of swapping share."""

import sys
from pathlib import Path

from mmengine.config import Config
from mmengine.utils import get_installed_path
from support import call


def config(name):
    library, _, path = name.partition('::')
    return Config.fromfile(Path(get_installed_path(library), '.mim/configs', path))


FCOS = 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'
FCN = 'mmseg::fcn/fcn_r18-d8_4xb2-80k_cityscapes-769x769.py'
SCRATCH = 'mmdet::scratch/faster-rcnn_r50-scratch_fpn_gn-all_6x_coco.py'
MASK = 'mmdet::gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py'
SN_VARIABLE = "norm_cfg = dict(type='SN', requires_grad=True)"


def fresh(*lines):
    """What a process prints that has not imported sn_openmmlab."""
    code = '\n'.join(['from mmengine.config import Config', *lines])
    return call(Path.cwd(), sys.executable, '-c', code)
