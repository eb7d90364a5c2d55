"""A swapped config as a small file that inherits from the one it was made of, and changes its norms."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config
from yapf.yapflib.yapf_api import FormatCode

from ..register import NEED_HELP
from .rewrite import PARTS, TARGETS, Swap


class Code(str):
    """A string that is written as it is, not quoted."""


def child_config(cfg: Config, swap: Swap, source: str, to: str, parts: tuple[str, ...], folder: Path) -> str:
    """The text of a config that inherits from ``source`` and changes its norms, for a file in ``folder``.

    Args:
        cfg (Config): The config before the swap.
        swap (Swap): What :func:`plan_swap` made of it.
        source (str): The file of ``cfg``, or its name in a library (``mmdet::...``).
        to (str): The new norm.
        parts (tuple[str, ...]): Where it was asked for.
        folder (Path): The file's folder, which the base is written relative to.
    """
    old, new = plain(cfg), plain(swap.config)
    norms = [norm for _, _, norm in differences(old['model'], new['model']) if isinstance(norm, dict)]
    main_norm = max(norms, key=norms.count)
    # heads: mmdet's get_flops.py takes what has a head_norm_cfg for one certain model
    name = name_of(parts).replace('-', '_').replace('head', 'heads')
    variable = 'norm_cfg' if parts == PARTS else f'{name}_norm_cfg'
    said = {key: change(old.get(key), value, main_norm, variable) for key, value in new.items()}
    said = {key: said[key] for key in new if new[key] != old.get(key)}
    head = [
        f'# {Path(source).name} with {to} in {", ".join(parts)}; made by swap_norm.py',
        f'_base_ = {base(source, cfg.text, folder)}',
    ]
    lines = []
    if 'custom_imports' in said:
        lines.append(f'custom_imports = {code(said.pop("custom_imports"))}')
    lines.append(f'{variable} = {code(main_norm)}')
    outer = said.pop(variable, None)
    lines += [f'{key} = {code(said[key])}' for key in sorted(said, key='model'.__eq__)]
    if outer is not None and set(old.get(variable, {})) - set(main_norm):
        lines.append(f'{variable} = dict(_delete_=True, **{variable})')
    text, _ = FormatCode('\n'.join(lines), style_config=dict(based_on_style='pep8'))
    return '\n'.join([*head, '', text])


def check_child(cfg: Config, swap: Swap, path: Path) -> None:
    """Read the new config, and compare it with what it is to say."""
    read, meant = plain(Config.fromfile(path)), plain(swap.config)
    wrong = [key for key in ('model', 'custom_imports') if read.get(key) != meant.get(key)]
    wrong += [key for key in meant if 'norm' not in key and key not in wrong and read.get(key) != meant[key]]
    if wrong:
        raise AssertionError(f'{path} reads back as another config in {", ".join(wrong)}; this is a bug of this tool')


def name_of(parts: tuple[str, ...]) -> str:
    """As config names have it: sn-all, sn-backbone-neck."""
    return 'all' if parts == PARTS else '-'.join(parts)


def base(config: str, text: str, folder: Path) -> str:
    """The right side of ``_base_ =``: relative to the file for files.

    mmengine evaluates it before it looks for the base, so that this package can be imported in it, and enter the
    libraries that mmengine would not find by itself.
    """
    name = config if '::' in config else Path(os.path.relpath(config, folder)).as_posix()
    helped = set(re.findall(r'\b(\w+)::', f'{name}\n{text}')) & NEED_HELP
    return f"__import__('sn_openmmlab') and {name!r}" if helped else repr(name)


def change(old: Any, new: Any, main_norm: dict, variable: str) -> Any:
    """What a child of ``old`` has to say to become ``new``."""
    if not isinstance(new, dict) or not isinstance(old, dict):
        return refer(new, main_norm, variable)
    gone = old.keys() - new.keys()
    if new == main_norm:
        return Code(f'dict(_delete_=True, **{variable})' if gone else variable)
    if gone:
        return {'_delete_': True, **refer(new, main_norm, variable)}
    if new.get('type') in TARGETS:
        return new
    return {k: change(old.get(k), v, main_norm, variable) for k, v in new.items() if k not in old or old[k] != v}


def refer(value: Any, main_norm: dict, variable: str) -> Any:
    """``value`` with the variable's name where its norm stands."""
    if value == main_norm:
        return Code(variable)
    if isinstance(value, dict):
        return {k: refer(v, main_norm, variable) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(refer(v, main_norm, variable) for v in value)
    return value


def code(value: object) -> str:
    """Python that makes ``value``."""
    if isinstance(value, Code):
        return value
    if isinstance(value, dict):
        if all(isinstance(key, str) and key.isidentifier() for key in value):
            return f'dict({", ".join(f"{k}={code(v)}" for k, v in value.items())})'
        return f'{{{", ".join(f"{k!r}: {code(v)}" for k, v in value.items())}}}'
    if isinstance(value, list):
        return f'[{", ".join(map(code, value))}]'
    if isinstance(value, tuple):
        return f'({", ".join(map(code, value))}{"," * (len(value) == 1)})'
    return f"float('{value}')" if isinstance(value, float) and not math.isfinite(value) else repr(value)


def plain(value: Any) -> Any:
    """``value`` in dicts of Python, without the scopes that mmengine enters while reading, to be compared."""
    if isinstance(value, (dict, Config)):
        return {key: plain(value[key]) for key in value if key != '_scope_'}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value))
    return (
        Code("float('nan')") if isinstance(value, float) and math.isnan(value) else value
    )  # which is equal to itself, as NaN is not


def differences(old: Any, new: Any, place: str = '') -> Iterator[tuple[str, Any, Any]]:
    """Places that differ, with what was there and what is: norms as a whole."""
    if old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict) and new.get('type') not in TARGETS:
        for key in new:
            yield from differences(old.get(key), new[key], f'{place}.{key}'.lstrip('.'))
    elif isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new)):
            yield from differences(a, b, f'{place}.{i}')
    else:
        yield place, old, new
