"""Rules that turn the names of modules in other code bases into those of OpenMMLab.

A rule is a pair: a pattern for the whole name of a module, and the new name as a template or a function of the match.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Callable, Dict, List, Tuple, Union

import torch
from torch import Tensor

Modules = Dict[str, Dict[str, Tensor]]  # tensors by name, by the name of the module that owns them
Rules = List[Tuple[str, Union[str, Callable[[re.Match], str]]]]

SKIP = 'skip: '  # in place of a new name, followed by the reason why there is none
DECODER = r'(?:cbr|cbr_deepsup|conv_last|conv_last_deepsup|ppm)(?:\..*)?'
_CONV_OR_NORM = {'0': 'conv', '1': 'bn'}

OF_TORCH = r'(?:module\.|_orig_mod\.)*'  # what torch's wrappers put in front

# what other code around a model calls it; real models have an encoder, too, but not with all their norms in it
WRAPPERS = {
    'base_model', 'encoder', 'feature_extractor', 'model', 'module', 'net', 'network', '_forward_module',
    '_fsdp_wrapped_module',
}  # fmt: skip
# and what training with copies of a model calls these
COPIES = {
    'base_encoder', 'ema', 'ema_model', 'encoder_k', 'encoder_q', 'key_encoder', 'model_ema', 'momentum_encoder',
    'momentum_network', 'online_encoder', 'online_net', 'online_network', 'query_encoder', 'student', 'target_encoder',
    'target_net', 'target_network', 'teacher',
}  # fmt: skip
# how the names of norms in OpenMMLab's models begin, with which those of ResNets and timm's models are at home
_USUAL = (
    r'(?:\w+_)?backbone\.|image_encoder\.|timm_model\.|bn1(?:\.|$)|layer1\.|features\.|stem\.|body\.|patch_embed\w*\.'
)


def rename(module: str, rules: Rules) -> str | None:
    """The new name of a module by the first rule that fits; None if none does."""
    for pattern, new in rules:
        match = re.fullmatch(pattern, module)
        if match:
            return new(match) if callable(new) else match.expand(new)
    return None


def has_decoder(modules: Modules) -> bool:
    """Whether there is a decoder with the names of MIT CSAIL's code."""
    return any(re.fullmatch(DECODER, module) for module in modules)


def strip_wrappers(key: str) -> str:
    """Remove from a key what DistributedDataParallel and torch.compile put into it."""
    return re.sub(rf'^{OF_TORCH}|(?<=\.)_orig_mod\.', '', key)


def find_foreign_prefixes(norms: Iterable[str]) -> list[str]:
    """Find what stands in front of the names of all norms and is in no model of OpenMMLab.

    Each is the front of a whole model. There are several where a checkpoint holds copies of one: teacher, student.
    """
    norms = list(norms)
    if any(re.match(_USUAL, norm) for norm in norms):
        return []
    firsts = list(dict.fromkeys(norm.partition('.')[0] for norm in norms if '.' in norm))
    fronts = [f'{first}.' for first in firsts if first in COPIES]
    if not fronts:
        candidates = [f'{first}.' for first in firsts if first in WRAPPERS]
        matches = (re.match(rf'((?:\w+\.)+?)(?:{_USUAL})', norm) for norm in norms)
        candidates += dict.fromkeys(match[1] for match in matches if match)
        fronts = [front for front in candidates if all(norm.startswith(front) for norm in norms)][:1]
    found = []
    for front in fronts:
        inside = [norm[len(front) :] for norm in norms if norm.startswith(front)]
        found += [front + deeper for deeper in find_foreign_prefixes(inside) or ['']]
    return found


def batch_norm(modules: Modules, target: str) -> Rules:
    """Rules for names of torchvision and OpenMMLab, which stay."""
    if any(module.startswith('backbone.') for module in modules):
        return [('.*', r'\g<0>')]
    prefix = 'backbone.' if target == 'mmpretrain' else ''
    return [_classifier_rule(target), ('.*', rf'{prefix}\g<0>')]


def switch_norm(modules: Modules, target: str) -> Rules:
    """Rules for the authors' ResNets (torchvision's names with ``sn`` for ``bn``) and segmentation decoders.

    The stem may have three convolutions, as in MIT CSAIL's ResNets.
    """
    prefix = 'backbone.' if target == 'mmpretrain' or has_decoder(modules) else ''

    def deep_stem(match: re.Match) -> str:
        i = int(match[2]) - 1
        if target == 'mmpretrain':
            return f'{prefix}stem.{i}.{"conv" if match[1] == "conv" else "bn"}'
        return f'{prefix}stem.{3 * i + (match[1] == "sn")}'

    stem = [('conv1', f'{prefix}conv1'), ('sn1', f'{prefix}bn1')]
    return [
        *([('(conv|sn)([123])', deep_stem)] if 'conv2' in modules else stem),
        (r'(layer\d+\.\d+\.)sn(\d)', rf'{prefix}\1bn\2'),
        (r'layer\d+\.\d+\.(?:conv\d|downsample\.[01])', rf'{prefix}\g<0>'),
        _classifier_rule(target),
        *_decoder_rules(modules),
    ]


def _classifier_rule(target: str) -> tuple[str, str]:
    return 'fc', 'head.fc' if target == 'mmpretrain' else SKIP + f'the classifier, which no backbone of {target} has'


def _decoder_rules(modules: Modules) -> Rules:
    """Rules for MIT CSAIL's decoders: one convolution (C1) or pyramid pooling (PPM), deeply supervised or not."""
    last = 'bottleneck' if any(module.startswith('ppm.') for module in modules) else 'convs.0'
    return [
        (r'cbr\.([01])', lambda match: f'decode_head.convs.0.{_CONV_OR_NORM[match[1]]}'),
        (r'cbr_deepsup\.([01])', lambda match: f'auxiliary_head.convs.0.{_CONV_OR_NORM[match[1]]}'),
        (r'ppm\.(\d)\.1', r'decode_head.psp_modules.\1.1.conv'),
        (r'ppm\.(\d)\.2', r'decode_head.psp_modules.\1.1.bn'),
        (r'conv_last\.([01])', lambda match: f'decode_head.{last}.{_CONV_OR_NORM[match[1]]}'),
        (r'conv_last(?:\.\d)?', 'decode_head.conv_seg'),
        ('conv_last_deepsup', 'auxiliary_head.conv_seg'),
    ]


def detectron(modules: Modules, target: str) -> Rules:
    """The detectors of Detectron.pytorch, with ``sn`` in the residual blocks."""
    body, box, mask = r'Conv_Body\.(?:conv_body\.)?', 'roi_head.bbox_head.', 'roi_head.mask_head.'
    block = r'res(\d)\.(\d+)\.((?:conv|sn|bn)\d|downsample\.[01])'
    part = r'(?:\.([01]))?'
    return [
        (body + r'res1\.conv1', 'backbone.conv1'),
        (body + r'res1\.[sb]n1', 'backbone.bn1'),
        (body + block, _rename_stage('backbone.')),
        (rf'Conv_Body\.conv_top(){part}', _rename_level(modules, 'lateral_convs', 0)),
        (rf'Conv_Body\.topdown_lateral_modules\.(\d)\.conv_lateral{part}', _rename_level(modules, 'lateral_convs', 1)),
        (rf'Conv_Body\.posthoc_modules\.(\d){part}', _rename_level(modules, 'fpn_convs', 0)),
        (r'RPN\.(?:FPN_)?RPN_conv', 'rpn_head.rpn_conv'),
        (r'RPN\.(?:FPN_)?RPN_cls_score', 'rpn_head.rpn_cls'),
        (r'RPN\.(?:FPN_)?RPN_bbox_pred', 'rpn_head.rpn_reg'),
        (r'Box_Head\.fc1?', f'{box}shared_fcs.0'),
        (r'Box_Head\.fc2', f'{box}shared_fcs.1'),
        (r'(Box_Head\.convs\.)(\d+)', _rename_sequence(modules, f'{box}shared_convs')),
        (r'Box_Head\.' + block, _rename_stage('roi_head.shared_head.')),
        (r'Box_Outs\.cls_score', f'{box}fc_cls'),
        (r'Box_Outs\.bbox_pred', f'{box}fc_reg'),
        (r'(Mask_Head\.conv_fcn\.)(\d+)', _rename_sequence(modules, f'{mask}convs')),
        (r'Mask_Head\.upconv5?', f'{mask}upsample'),
        (r'Mask_Head\.res5\..*', _check_shared_stage(modules)),
        (r'Mask_Outs\.classify', f'{mask}conv_logits'),
        (r'Keypoint_(?:Head|Outs)\..*', SKIP + 'a keypoint head, which mmdet has not'),
    ]


def _rename_stage(prefix: str) -> Callable[[re.Match], str]:
    return lambda match: f'{prefix}layer{int(match[1]) - 1}.{match[2]}.{match[3].replace("sn", "bn")}'


def _rename_level(modules: Modules, new: str, first: int) -> Callable[[re.Match], str]:
    """Rename a level of the pyramid: Detectron counts from the coarsest, mmdet from the finest."""
    levels = len({module.split('.')[2] for module in modules if module.startswith('Conv_Body.posthoc_modules.')})
    return lambda match: f'neck.{new}.{levels - 1 - first - int(match[1] or 0)}.{_CONV_OR_NORM[match[2] or "0"]}'


def _rename_sequence(modules: Modules, new: str) -> Callable[[re.Match], str]:
    """Rename an entry of a sequence of convolutions, norms and ReLUs: mmcv has a ConvModule for each convolution."""

    def name(match: re.Match) -> str:
        prefix, number = match[1], int(match[2])
        earlier = [f'{prefix}{i}' for i in range(number + 1) if f'{prefix}{i}' in modules]
        convolutions = [module for module in earlier if 'mean_weight' not in modules[module]]
        return f'{new}.{len(convolutions) - 1}.{"conv" if match[0] in convolutions else "bn"}'

    return name


def _check_shared_stage(modules: Modules) -> Callable[[re.Match], str]:
    """Skip the mask head's res5 if it equals the box head's, which mmdet uses for both; refuse it otherwise."""

    def reason(match: re.Match) -> str:
        own, box = modules[match[0]], modules.get(match[0].replace('Mask_Head', 'Box_Head'), {})
        if not all(name in box and torch.equal(value, box[name]) for name, value in own.items()):
            raise ValueError(f"{match[0]} is not the box head's: mmdet has one res5 for boxes and masks")
        return SKIP + "the box head's res5 again, which mmdet has once"

    return reason
