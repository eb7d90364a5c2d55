"""Networks with the names, shapes and conventions of the authors' code, to make checkpoints of: none can be downloaded.

In evaluation mode only. ``unbiased=True`` is the authors' variance over the pixels, False this project's.
"""

import torch
import torch.nn.functional as F
from torch import nn


class SN(nn.Module):
    """The formula as the paper has it, with weight and bias (1, C, 1, 1) and running statistics (1, C, 1)."""

    unbiased = False

    def __init__(self, channels, with_bn=True):
        super().__init__()
        size = 3 if with_bn else 2
        self.weight = nn.Parameter(torch.empty(1, channels, 1, 1).uniform_(0.5, 1.5))
        self.bias = nn.Parameter(torch.empty(1, channels, 1, 1).uniform_(-0.5, 0.5))
        self.mean_weight = nn.Parameter(torch.randn(size))
        self.var_weight = nn.Parameter(torch.randn(size))
        if with_bn:
            self.register_buffer('running_mean', torch.empty(1, channels, 1).uniform_(-0.2, 0.2))
            self.register_buffer('running_var', torch.empty(1, channels, 1).uniform_(0.5, 1.5))

    def forward(self, x):
        pixels = x.flatten(2)
        mean_in, var_in = pixels.mean(-1, keepdim=True), pixels.var(-1, keepdim=True, unbiased=self.unbiased)
        mean_ln = mean_in.mean(1, keepdim=True)
        var_ln = (var_in + mean_in**2).mean(1, keepdim=True) - mean_ln**2
        means, variances = [mean_in, mean_ln], [var_in, var_ln]
        if len(self.mean_weight) == 3:
            means.append(self.running_mean)
            variances.append(self.running_var)
        mean = sum(w * m for w, m in zip(self.mean_weight.softmax(0), means))
        var = sum(w * v for w, v in zip(self.var_weight.softmax(0), variances))
        return ((pixels - mean) / (var + 1e-5).sqrt()).view_as(x) * self.weight + self.bias


def conv(inputs, outputs, size, stride=1, bias=False):
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=bias)


def conv_sn(inputs, outputs, size, **kwargs):
    return nn.Sequential(conv(inputs, outputs, size), SN(outputs, **kwargs))


class Block(nn.Module):
    """Bottleneck, or with ``expansion=1`` two 3x3 convolutions; ``caffe``: stride in the first convolution."""

    def __init__(self, inputs, planes, stride, expansion, caffe=False, **sn):
        super().__init__()
        outputs = planes * expansion
        first, second = (stride, 1) if caffe or expansion == 1 else (1, stride)
        if expansion == 1:
            sizes = [(inputs, planes, 3, first), (planes, planes, 3, second)]
        else:
            sizes = [(inputs, planes, 1, first), (planes, planes, 3, second), (planes, outputs, 1, 1)]
        self.depth = len(sizes)
        for i, size in enumerate(sizes, 1):
            setattr(self, f'conv{i}', conv(*size))
            setattr(self, f'sn{i}', SN(size[1], **sn))
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(conv(inputs, outputs, 1, stride), SN(outputs, **sn))

    def forward(self, x):
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f'sn{i}')(getattr(self, f'conv{i}')(y))
            y = y.relu() if i < self.depth else y
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


BLOCKS = {18: (1, (2, 2, 2, 2)), 50: (4, (3, 4, 6, 3))}


def stages(depth, inputs=64, numbers=(1, 2, 3, 4), width=64, **kwargs):
    expansion, counts = BLOCKS[depth]
    for number in numbers:
        planes = width * 2 ** (number - 1)
        blocks = []
        for i in range(counts[number - 1]):
            blocks.append(Block(inputs, planes, 2 if i == 0 and number > 1 else 1, expansion, **kwargs))
            inputs = planes * expansion
        yield number, nn.Sequential(*blocks)


class ResNet(nn.Module):
    """The authors' ResNet v1 for ImageNet, and with ``deep_stem`` MIT CSAIL's. Gives the features of all stages."""

    def __init__(self, depth=50, deep_stem=False, fc=True, width=64, **kwargs):
        super().__init__()
        sn = {key: value for key, value in kwargs.items() if key == 'with_bn'}
        self.deep_stem = deep_stem
        if deep_stem:
            for i, size in enumerate([(3, 64, 3, 2), (64, 64, 3), (64, 128, 3)], 1):
                setattr(self, f'conv{i}', conv(*size))
                setattr(self, f'sn{i}', SN(size[1], **sn))
        else:
            self.conv1, self.sn1 = conv(3, width, 7, 2), SN(width, **sn)
        for number, stage in stages(depth, 128 if deep_stem else width, width=width, **kwargs):
            setattr(self, f'layer{number}', stage)
        if fc:
            self.fc = nn.Linear(8 * width * BLOCKS[depth][0], 10)
        self.double().eval()

    def forward(self, x):
        for i in range(1, 4 if self.deep_stem else 2):
            x = getattr(self, f'sn{i}')(getattr(self, f'conv{i}')(x)).relu()
        x = F.max_pool2d(x, 3, 2, 1)
        features = []
        for number in range(1, 5):
            x = getattr(self, f'layer{number}')(x)
            features.append(x)
        return features


def dilate(resnet):
    """Stride 8 by dilation: the first block of a stage still with half of it."""
    for number, dilation in (3, 2), (4, 4):
        for module in getattr(resnet, f'layer{number}').modules():
            if isinstance(module, nn.Conv2d):
                d = dilation // 2 if module.stride == (2, 2) else dilation
                module.stride = (1, 1)
                if module.kernel_size == (3, 3):
                    module.dilation = module.padding = (d, d)
    return resnet


class C1(nn.Module):
    """The decoder of one convolution, with deep supervision."""

    def __init__(self, inputs, classes):
        super().__init__()
        self.cbr, self.cbr_deepsup = conv_sn(inputs, 32, 3), conv_sn(inputs // 2, 32, 3)
        self.conv_last, self.conv_last_deepsup = conv(32, classes, 1, bias=True), conv(32, classes, 1, bias=True)
        self.double().eval()

    def forward(self, features):
        return self.conv_last(self.cbr(features[3]).relu()), self.deepsup(features)

    def deepsup(self, features):
        return self.conv_last_deepsup(self.cbr_deepsup(features[2]).relu())


class PPM(C1):
    """The decoder of pyramid pooling, with deep supervision."""

    def __init__(self, inputs, classes):
        super().__init__(inputs, classes)
        del self.cbr
        self.ppm = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(n), *conv_sn(inputs, 16, 1)) for n in (1, 2, 3, 6))
        last = [*conv_sn(inputs + 64, 16, 3), nn.ReLU(), nn.Dropout2d(), conv(16, classes, 1, bias=True)]
        self.conv_last = nn.Sequential(*last)
        self.double().eval()

    def forward(self, features):
        x = features[3]
        pooled = [F.interpolate(ppm(x).relu(), x.shape[2:], mode='bilinear', align_corners=False) for ppm in self.ppm]
        return self.conv_last(torch.cat([x, *pooled], 1)), self.deepsup(features)


class Parts(nn.Module):
    """A module of the given parts."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


class DetectronResNet(nn.Module):
    """Detectron.pytorch's backbone: res1 is the stem, res2 to res5 the stages."""

    def __init__(self, last=5, **kwargs):
        super().__init__()
        sn = {key: value for key, value in kwargs.items() if key == 'with_bn'}
        self.res1 = Parts(conv1=conv(3, 64, 7, 2), sn1=SN(64, **sn))
        for number, stage in stages(50, numbers=range(1, last), **kwargs):
            setattr(self, f'res{number + 1}', stage)
        self.last = last

    def forward(self, x):
        x = F.max_pool2d(self.res1.sn1(self.res1.conv1(x)).relu(), 3, 2, 1)
        features = []
        for number in range(2, self.last + 1):
            x = getattr(self, f'res{number}')(x)
            features.append(x)
        return features


class DetectronFPN(nn.Module):
    """Detectron.pytorch's pyramid around the backbone: everything counted from the coarsest level."""

    def __init__(self, make):
        super().__init__()
        self.conv_top = make(2048, 256, 1)
        self.topdown_lateral_modules = nn.ModuleList(Parts(conv_lateral=make(n, 256, 1)) for n in (1024, 512, 256))
        self.posthoc_modules = nn.ModuleList(make(256, 256, 3) for _ in range(4))
        self.conv_body = DetectronResNet()

    def forward(self, x):
        features = self.conv_body(x)[::-1]
        inner = [self.conv_top(features[0])]
        for module, lateral in zip(self.topdown_lateral_modules, features[1:]):
            inner.append(module.conv_lateral(lateral) + F.interpolate(inner[-1], scale_factor=2, mode='nearest'))
        outputs = [module(x) for module, x in zip(self.posthoc_modules, inner)]
        return [F.max_pool2d(outputs[0], 1, 2), *outputs]


class MaskRCNN(nn.Module):
    """Detectron.pytorch's Mask R-CNN with SN everywhere, or its Faster R-CNN with two plain layers in the box head."""

    def __init__(self, classes=81, sn=True):
        super().__init__()
        self.Conv_Body = DetectronFPN(conv_sn if sn else lambda *size: conv(*size, bias=True))
        self.RPN = Parts(
            FPN_RPN_conv=conv(256, 256, 3, bias=True),
            FPN_RPN_cls_score=conv(256, 3, 1, bias=True),
            FPN_RPN_bbox_pred=conv(256, 12, 1, bias=True),
        )
        if sn:
            self.Box_Head = Parts(convs=stacked(4), fc=nn.Linear(256 * 49, 1024))
            self.Mask_Head = Parts(conv_fcn=stacked(4), upconv=nn.ConvTranspose2d(256, 256, 2, 2))
            self.Mask_Outs = Parts(classify=conv(256, classes, 1, bias=True))
        else:
            self.Box_Head = Parts(fc1=nn.Linear(256 * 49, 1024), fc2=nn.Linear(1024, 1024))
        self.Box_Outs = Parts(cls_score=nn.Linear(1024, classes), bbox_pred=nn.Linear(1024, 4 * classes))
        self.double().eval()

    def rpn(self, x):
        x = self.RPN.FPN_RPN_conv(x).relu()
        return self.RPN.FPN_RPN_cls_score(x), self.RPN.FPN_RPN_bbox_pred(x)

    def boxes(self, rois):
        head = self.Box_Head
        if hasattr(head, 'fc'):
            x = head.fc(head.convs(rois).flatten(1)).relu()
        else:
            x = head.fc2(head.fc1(rois.flatten(1)).relu()).relu()
        return self.Box_Outs.cls_score(x), self.Box_Outs.bbox_pred(x)

    def masks(self, rois):
        return self.Mask_Outs.classify(self.Mask_Head.upconv(self.Mask_Head.conv_fcn(rois)).relu())


class FasterRCNNC4(nn.Module):
    """Detectron.pytorch's detector without pyramid: res5 is the box head. Objectness by softmax."""

    def __init__(self, classes=81, anchors=15):
        super().__init__()
        self.Conv_Body = DetectronResNet(last=4, caffe=True)
        self.RPN = Parts(
            RPN_conv=conv(1024, 1024, 3, bias=True),
            RPN_cls_score=conv(1024, 2 * anchors, 1, bias=True),
            RPN_bbox_pred=conv(1024, 4 * anchors, 1, bias=True),
        )
        self.Box_Head = Parts(res5=dict(stages(50, 1024, (4,), caffe=True))[4])
        self.Box_Outs = Parts(cls_score=nn.Linear(2048, classes), bbox_pred=nn.Linear(2048, 4 * classes))
        self.double().eval()

    def objectness(self, x):
        scores = self.RPN.RPN_cls_score(self.RPN.RPN_conv(x).relu())
        return scores.unflatten(1, (2, -1)).softmax(1)[:, 1]

    def boxes(self, rois):
        x = self.Box_Head.res5(rois).mean((2, 3))
        return self.Box_Outs.cls_score(x), self.Box_Outs.bbox_pred(x)


def stacked(count):
    return nn.Sequential(*(layer for _ in range(count) for layer in (*conv_sn(256, 256, 3), nn.ReLU())))
