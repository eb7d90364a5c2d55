"""SN in whole detectors and segmentors: training steps, and BatchNorm checkpoints by every path of OpenMMLab."""

from pathlib import Path

import mmseg
import pytest
import torch
from mmcv.cnn import build_norm_layer
from mmcv.ops import roi_align
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from support import CONFIGS, Said, foreign_norms

from sn_openmmlab import SwitchNorm

SN = dict(type='SN', requires_grad=True)


def detector(name):
    config = Config.fromfile(CONFIGS / f'mmdet/sn/{name}_r50_fpn_sn-all_2x_coco.py')
    config.model.backbone.init_cfg = None
    config.model.train_cfg.rpn_proposal.nms_pre = 100
    config.model.train_cfg.rpn_proposal.max_per_img = 50
    config.model.train_cfg.rcnn.sampler.num = 16
    return config


def fcn():
    # by its path: onedl-mmengine looks for `mmseg::` in a distribution called mmsegmentation, not onedl-mmsegmentation
    config = Config.fromfile(Path(mmseg.__file__).parent / '.mim/configs/fcn/fcn_r50-d8_4xb4-20k_voc12aug-512x512.py')
    model = config.model
    model.pretrained = None
    model.data_preprocessor.size = (64, 64)
    model.backbone.norm_cfg = model.decode_head.norm_cfg = model.auxiliary_head.norm_cfg = SN
    return config


def inputs(config):
    if config.default_scope == 'mmseg':
        samples = [SegDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64))) for _ in range(2)]
        for sample in samples:
            sample.gt_sem_seg = PixelData(data=torch.randint(0, 21, (1, 64, 64)))
        return dict(
            inputs=[torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in samples], data_samples=samples
        )
    return demo_mm_inputs(2, [[3, 64, 96], [3, 96, 64]], num_items=[2, 3], num_classes=80, with_mask=True)


@pytest.mark.parametrize('name', ['faster-rcnn', 'mask-rcnn', 'fcn'])
def test_one_training_step(name):
    torch.manual_seed(0)
    config = fcn() if name == 'fcn' else detector(name)
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    model.train()
    assert not foreign_norms(model)
    optim_wrapper = build_optim_wrapper(model, config.optim_wrapper)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SwitchNorm)}
    before = {n: (m.mean_weight.clone(), m.var_weight.clone(), m.bn.running_mean.clone()) for n, m in layers.items()}

    losses = model.train_step(inputs(config), optim_wrapper)

    assert all(torch.as_tensor(v).isfinite().all() for v in losses.values())
    assert all(p.isfinite().all() for p in model.parameters())
    for n, layer in layers.items():
        moved = [
            not torch.equal(a, b)
            for a, b in zip((layer.mean_weight, layer.var_weight, layer.bn.running_mean), before[n])
        ]
        frozen = name != 'fcn' and (n == 'backbone.bn1' or n.startswith('backbone.layer1'))
        if frozen:
            assert moved == [False] * 3, n
        else:
            assert moved == [True] * 3, n


# -- BatchNorm checkpoints ----------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def torchvision_resnet(tmp_path_factory):
    """A checkpoint with the keys of torchvision's ResNet-50, which are those of mmdet's with BN, and a classifier."""
    init_default_scope('mmdet')
    torch.manual_seed(1)
    net = MODELS.build(dict(type='mmdet.ResNet', depth=50, norm_cfg=dict(type='BN')))
    state = net.state_dict()
    for key, value in state.items():
        if key.endswith('num_batches_tracked'):
            value += 7
        elif value.dim() == 1:
            value.uniform_(0.5, 1.5)
    state.update({'fc.weight': torch.rand(10, 2048), 'fc.bias': torch.rand(10)})
    path = tmp_path_factory.mktemp('checkpoints') / 'resnet50.pth'
    torch.save(state, path)
    return path, state


def assert_loaded(backbone, state, prefix=''):
    """Every statistic in its place; near BatchNorm, weight and bias are its own but for the correction."""
    for key, value in state.items():
        if key.startswith('fc.'):
            continue
        module, _, name = key.rpartition('.')
        module = backbone.get_submodule(module)
        if isinstance(module, SwitchNorm) and name in ('weight', 'bias'):
            torch.testing.assert_close(getattr(module, name).detach(), value, rtol=0.01, atol=0.01)
            continue
        module = module.bn if isinstance(module, SwitchNorm) else module
        assert torch.equal(getattr(module, name).detach(), value), key
    layers = [m for m in backbone.modules() if isinstance(m, SwitchNorm)]
    assert len(layers) == 53
    for layer in layers:
        torch.testing.assert_close(layer.importance_ratios, torch.tensor([[0.001, 0.001, 0.998]] * 2))


@pytest.mark.parametrize('path', ['init_cfg', 'mmseg pretrained', 'native', 'load_from'])
def test_batch_norm_checkpoint_loads(path, torchvision_resnet, tmp_path):
    checkpoint, state = torchvision_resnet
    if path == 'mmseg pretrained':
        config = fcn()
        config.model.pretrained = str(checkpoint)
        config.model.backbone.type = 'ResNet'  # torchvision's stem, as the paper's
    else:
        config = detector('faster-rcnn')
    if path == 'init_cfg':
        config.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(checkpoint))
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    said = Said()
    if path in ('init_cfg', 'mmseg pretrained'):
        said.listen()
        model.init_weights()
    elif path == 'native':
        said.listen()
        result = model.backbone.load_state_dict(state, strict=False)
        assert not result.missing_keys and set(result.unexpected_keys) == {'fc.weight', 'fc.bias'}
    else:
        whole = tmp_path / 'detector.pth'
        torch.save({f'backbone.{k}': v for k, v in state.items()}, whole)
        runner = Runner(
            model=model,
            work_dir=str(tmp_path),
            load_from=str(whole),
            default_scope='mmdet',
            experiment_name=tmp_path.name,
        )
        said.listen()
        runner.load_or_resume()

    assert_loaded(model.backbone, state)
    model.train()  # the end of all loading
    said = '\n'.join(said.lines)
    assert said.count('53 layers near it (IN 0.001, LN 0.001, BN 0.998), weight and bias corrected') == 1
    assert said.count('statistics from BatchNorm') == 1
    assert 'missing' not in said


def test_a_detector_with_bn_and_its_sn_twin_are_one_function(torchvision_resnet):
    """With all importance on BN the loaded network computes what the BN network does."""
    _, state = torchvision_resnet
    x = torch.randn(1, 3, 64, 64)
    outputs = []
    for norm_cfg in dict(type='BN'), dict(type='SN', init_ratios=(0, 0, 1)):
        net = MODELS.build(dict(type='mmdet.ResNet', depth=50, norm_cfg=norm_cfg))
        net.load_state_dict(state, strict=False)
        net.eval()
        outputs.append(net(x))
    for a, b in zip(*outputs):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4 * a.abs().max().item())


def test_zero_init_residual_reaches_the_last_norm_of_each_block():
    net = MODELS.build(dict(type='mmdet.ResNet', depth=50, norm_cfg=SN, zero_init_residual=True))
    net.init_weights()
    assert all(not block.bn3.weight.any() and block.bn1.weight.eq(1).all() for block in net.layer1)


@pytest.mark.parametrize('norm', ['BN', 'SN'])
def test_mmcvs_roi_align_takes_channels_last_for_contiguous(norm):
    """With every norm; docs/troubleshooting.md warns of it. A mmcv in which it fails has no need of the warning."""
    features = build_norm_layer(dict(type=norm), 8)[1](torch.randn(2, 8, 16, 16))
    rois = torch.tensor([[0, 1, 1, 9, 9], [1, 2, 3, 12, 11.0]])
    contiguous, last = (
        roi_align(features.contiguous(memory_format=f), rois, 7) for f in (torch.contiguous_format, torch.channels_last)
    )
    assert (contiguous - last).norm() > 0.5 * contiguous.norm()
