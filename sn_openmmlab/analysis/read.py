"""Read the importance ratios of a trained network, without building it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.read import find_oddity, read_state_dict
from ..hooks.ratios import FILE, KINDS
from ..norms import part_name
from ..ops import NORMALIZERS, sparsestmax

TAG = re.compile(rf'sn_(?!parts/)[^/]+/(.+)/({"|".join(KINDS)})_({"|".join(NORMALIZERS)})')
NO_SN = "it has no SN layer (norm_cfg=dict(type='SN') makes a model with some)"


@dataclass(frozen=True)
class Run:
    """Importance ratios of one trained network.

    Ratios are arrays (2, 3): of the means and of the variances, for IN, LN and BN. A normalizer that the layer does not
    have is NaN.

    Attributes:
        label (str): What figures call it.
        layers (dict[str, ndarray]): Ratios by layer, in the network's order.
        course (dict[int, dict[str, ndarray]]): Ratios by layer during training, by the number of iterations done; empty
            without a log of :class:`SNRatioHook`.
    """

    label: str
    layers: dict[str, np.ndarray]
    course: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, list[str]]:
        """The names of the layers in each part."""
        parts: dict[str, list[str]] = {}
        for layer in self.layers:
            parts.setdefault(part_name(layer), []).append(layer)
        return parts

    def select(self, pattern: str) -> Run:
        """Select the layers whose names match the regular expression ``pattern`` somewhere."""
        layers = {name: ratios for name, ratios in self.layers.items() if re.search(pattern, name)}
        course = {step: {n: r for n, r in ratios.items() if n in layers} for step, ratios in self.course.items()}
        return replace(self, layers=layers, course=course)


def read_ratios(path: str | Path, label: str | None = None) -> Run:
    """Read the importance ratios of a trained network.

    Args:
        path (str | Path): A checkpoint file; a work directory, with its last checkpoint, a log of :class:`SNRatioHook`,
            or both; or a result of ``benchmarks/accuracy`` (``.json``).
        label (str, optional): What figures call it. Defaults to None: the name of the work directory or ``.json`` file,
            or directory and name of the checkpoint.

    Returns:
        Run: The ratios.

    Raises:
        OSError: If there is no such file.
        ValueError: If it cannot be read, has no SN layer, or does not tell which normalizers a layer has.
    """
    path = Path(path)
    name = path.resolve()
    if path.is_dir():
        return _make_run(label or name.name, *_read_work_dir(path))
    if path.suffix == '.json':
        return _make_run(label or name.stem, _read_result(path))
    return _make_run(label or f'{name.parent.name}/{name.stem}', _read_checkpoint(path, {}))


def _make_run(label: str, layers: dict[str, np.ndarray], course: dict[int, dict[str, np.ndarray]] | None = None) -> Run:
    """Make a run whose names can be printed, whatever a path or a foreign file holds."""
    for layer in layers:
        if not layer.isprintable():
            raise ValueError(f'it has the name {layer!r}, which cannot be printed')
    label = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in label)
    return Run(label, layers, course or {})


def mean_ratios(ratios: Iterable[np.ndarray]) -> np.ndarray:
    """Mean of several layers' ratios (2, 3). A normalizer that a layer lacks counts as 0; if all lack it, it is NaN."""
    stacked = np.stack(list(ratios))
    return np.where(np.isnan(stacked).all(0), np.nan, np.nan_to_num(stacked).mean(0))


def _read_checkpoint(path: Path, known: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Read the ratios by layer; ``known`` are ratios of the same network, which tell the normalizers of its layers."""
    state = read_state_dict(str(path))
    suffix = '.mean_weight'
    layers = {}
    for prefix in (key[: -len(suffix)] for key in state if key.endswith(suffix)):
        logits = [state.get(f'{prefix}.{kind}_weight') for kind in KINDS]
        has_bn = f'{prefix}.bn.running_mean' in state or f'{prefix}.running_mean' in state
        name = re.sub(r'^module\.', '', prefix)
        layers[name] = _compute_ratios(name, logits, state.get(f'{prefix}.radius'), has_bn, known.get(name))
    if not layers:
        raise ValueError(NO_SN)
    return layers


def _compute_ratios(
    layer: str, logits: list[Tensor | None], radius: Tensor | None, has_bn: bool, known: np.ndarray | None
) -> np.ndarray:
    """Compute softmax of the logits, or sparsestmax for an SSN layer, which has a radius."""
    if any(values is not None and (find_oddity(values) or not values.is_floating_point()) for values in logits):
        raise ValueError(f'{layer}: its logits are no tensors that hold numbers one by one')
    vectors = [values for values in logits if values is not None and values.dim() == 1]
    if len(vectors) < len(logits) or any(len(values) != len(vectors[0]) for values in vectors):
        shapes = ' and '.join('none' if values is None else str(tuple(values.shape)) for values in logits)
        raise ValueError(f'{layer}: mean_weight and var_weight must be two vectors of one length, got {shapes}')
    if not all(values.isfinite().all() for values in vectors):
        raise ValueError(f'{layer}: its logits are no finite numbers, the training has diverged')
    if radius is not None and (find_oddity(radius) or radius.numel() != 1 or not 0 <= radius.double().item() <= 1):
        raise ValueError(f'{layer}: its radius must be one number from 0 to 1, got {radius}')
    count, both = len(vectors[0]), torch.stack(vectors).float()
    ratios = (both.softmax(1) if radius is None else sparsestmax(both, radius)).tolist()
    if known is not None and (~np.isnan(known[0])).sum() == count:
        return _fill_array(ratios, ~np.isnan(known[0]))
    if count != 3 and (count != 2 or has_bn):
        raise ValueError(
            f'{layer}: {count} logits {"with" if has_bn else "without"} batch statistics do not tell their '
            'normalizers, but a log of SNRatioHook does: give a work directory that has one'
        )
    return _fill_array(ratios)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized


def _fill_array(ratios: list[list[float]], places: np.ndarray | None = None) -> np.ndarray:
    """Put ratios into an array (2, 3), at ``places``; by default the first ones, since a pair is IN and LN."""
    array = np.full((2, 3), np.nan)
    array[:, slice(len(ratios[0])) if places is None else places] = ratios
    return array


def _read_result(path: Path) -> dict[str, np.ndarray]:
    try:
        layers = json.loads(path.read_text(encoding='utf-8'))['importance_ratios']
        if not all(math.isfinite(ratio) for ratios in layers.values() for kind in ratios for ratio in kind):
            raise ValueError('not finite')
        layers = {name: _fill_array(ratios) for name, ratios in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise ValueError('no JSON with importance_ratios, by layer two triples or pairs of numbers') from error
    if not layers:
        raise ValueError(NO_SN)
    return layers


def _read_work_dir(folder: Path) -> tuple[dict[str, np.ndarray], dict[int, dict[str, np.ndarray]]]:
    course: dict[int, dict[str, np.ndarray]] = {}
    for log in sorted(folder.glob(f'*/vis_data/{FILE}')):  # folders are named by date and time
        records = _read_log(log)
        # a resumed training starts from its checkpoint: drop what was logged after that before
        start = min(records, default=float('inf'))  # a log without a whole record drops nothing
        course = {step: ratios for step, ratios in course.items() if step < start}
        course.update(records)
    newest = course[max(course)] if course else {}
    last = folder / 'last_checkpoint'
    checkpoint = Path(last.read_text(encoding='utf-8').strip() if last.is_file() else '')
    if checkpoint.name:  # empty if the disk was full
        beside = folder / checkpoint.name  # if the whole directory was moved
        return _read_checkpoint(beside if beside.is_file() else checkpoint, newest), course
    if not newest:
        raise ValueError(f'neither last_checkpoint nor TIMESTAMP/vis_data/{FILE} of SNRatioHook is in it')
    return newest, course


def _read_log(path: Path) -> dict[int, dict[str, np.ndarray]]:
    text = path.read_text(encoding='utf-8')
    records: dict[int, dict[str, np.ndarray]] = {}
    for line in text[: text.rfind('\n') + 1].splitlines():  # without a line that is being written
        try:
            record = json.loads(line)
            if type(record['step']) is not int:
                raise TypeError
            ratios: dict[str, np.ndarray] = {}
            for tag, value in record.items():
                found = TAG.fullmatch(tag)
                if found:
                    layer, kind, normalizer = found.groups()
                    array = ratios.setdefault(layer, np.full((2, 3), np.nan))
                    array[KINDS.index(kind), NORMALIZERS.index(normalizer)] = value
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f'{path} is no log of SNRatioHook ({line[:60]!r})') from error
        records[record['step']] = ratios
    return records
