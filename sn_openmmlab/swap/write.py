"""Write a swapped config as a small file that inherits from the original and changes its norms."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config
from yapf.yapflib.yapf_api import FormatCode

from ..register import FOUND_AFTER_IMPORT
from .rewrite import PARTS, TARGETS, Swap


class Code(str):
    """Code as a string, to be written without quotes."""


def render_child(cfg: Config, swap: Swap, source: str, to: str, parts: tuple[str, ...], folder: Path) -> str:
    """Render a config that inherits from ``source`` and changes its norms, for a file in ``folder``.

    Args:
        cfg (Config): The config before the swap.
        swap (Swap): What :func:`plan_swap` made of it.
        source (str): The file of ``cfg``, or its name in a library (``mmdet::...``).
        to (str): The new norm.
        parts (tuple[str, ...]): The parts that were to get it.
        folder (Path): The folder of the new file; the path of the base is relative to it.

    Returns:
        str: The text.
    """
    old, new = to_plain(cfg), to_plain(swap.config)
    norms = [norm for _, _, norm in find_differences(old['model'], new['model']) if isinstance(norm, dict)]
    main_norm = max(norms, key=norms.count)
    # heads: mmdet's get_flops.py treats every config with a head_norm_cfg as one certain model
    name = name_parts(parts).replace('-', '_').replace('head', 'heads')
    variable = 'norm_cfg' if parts == PARTS else f'{name}_norm_cfg'
    changed = {
        key: express_change(old.get(key), value, main_norm, variable)
        for key, value in new.items()
        if value != old.get(key)
    }
    head = [
        f'# {Path(source).name} with {to} in {", ".join(parts)}; made by swap_norm.py',
        f'_base_ = {render_base(source, cfg.text, folder)}',
    ]
    lines = []
    if 'custom_imports' in changed:
        lines.append(f'custom_imports = {to_code(changed.pop("custom_imports"))}')
    lines.append(f'{variable} = {to_code(main_norm)}')
    outer = changed.pop(variable, None)
    lines += [f'{key} = {to_code(changed[key])}' for key in sorted(changed, key='model'.__eq__)]  # the model last
    if outer is not None and set(old.get(variable, {})) - set(main_norm):
        lines.append(f'{variable} = dict(_delete_=True, **{variable})')
    text, _ = FormatCode('\n'.join(lines), style_config=dict(based_on_style='pep8'))
    return '\n'.join([*head, '', text])


def check_child(cfg: Config, swap: Swap, path: Path) -> None:
    """Read the new config, and compare it with the swapped one.

    Raises:
        AssertionError: If they differ.
    """
    try:
        read, expected = to_plain(Config.fromfile(path)), to_plain(swap.config)
    except Exception as error:
        raise AssertionError(f'the new config cannot be read back: {type(error).__name__}: {error}') from error
    wrong = [key for key in ('model', 'custom_imports') if read.get(key) != expected.get(key)]
    wrong += [key for key in expected if 'norm' not in key and key not in wrong and read.get(key) != expected[key]]
    if wrong:
        raise AssertionError(f'the new config would read back as another one in {", ".join(wrong)}')


def name_parts(parts: tuple[str, ...]) -> str:
    """Name parts as names of configs do: ``all``, or ``backbone-neck``."""
    return 'all' if parts == PARTS else '-'.join(parts)


def render_base(config: str, text: str, folder: Path) -> str:
    """Render the right side of ``_base_ =``: a name in a library, or the path of a file relative to ``folder``.

    mmengine finds the configs of some libraries only once this package is imported (:mod:`~sn_openmmlab.register`). It
    evaluates the right side before it looks for the base, so the import can stand there.
    """
    name = config if '::' in config else Path(os.path.relpath(config, folder)).as_posix()
    hidden = set(re.findall(r'\b(\w+)::', f'{name}\n{text}')) & FOUND_AFTER_IMPORT
    return f"__import__('sn_openmmlab') and {name!r}" if hidden else repr(name)


def express_change(old: Any, new: Any, main_norm: dict, variable: str) -> Any:
    """Express ``new`` as what a config has to set that inherits ``old``."""
    if not isinstance(new, dict) or not isinstance(old, dict):
        return refer_to_norm(new, main_norm, variable)
    gone = old.keys() - new.keys()
    if new == main_norm:
        return Code(f'dict(_delete_=True, **{variable})' if gone else variable)
    if gone:
        return {'_delete_': True, **refer_to_norm(new, main_norm, variable)}
    if new.get('type') in TARGETS:
        return new
    return {
        k: express_change(old.get(k), v, main_norm, variable) for k, v in new.items() if k not in old or old[k] != v
    }


def refer_to_norm(value: Any, main_norm: dict, variable: str) -> Any:
    """Put the name of the variable in place of each norm that equals it."""
    if value == main_norm:
        return Code(variable)
    if isinstance(value, dict):
        return {k: refer_to_norm(v, main_norm, variable) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(refer_to_norm(v, main_norm, variable) for v in value)
    return value


def to_code(value: object) -> str:
    """Write ``value`` as Python code."""
    if isinstance(value, Code):
        return value
    if isinstance(value, dict):
        if all(isinstance(key, str) and key.isidentifier() for key in value):
            return f'dict({", ".join(f"{k}={to_code(v)}" for k, v in value.items())})'
        return f'{{{", ".join(f"{k!r}: {to_code(v)}" for k, v in value.items())}}}'
    if isinstance(value, list):
        return f'[{", ".join(map(to_code, value))}]'
    if isinstance(value, tuple):
        return f'({", ".join(map(to_code, value))}{"," * (len(value) == 1)})'
    return f"float('{value}')" if isinstance(value, float) and not math.isfinite(value) else repr(value)


def to_plain(value: Any) -> Any:
    """Copy ``value`` as plain dicts that can be compared, without the scopes that mmengine adds while it reads."""
    if isinstance(value, (dict, Config)):
        return {to_plain(key): to_plain(value[key]) for key in value if key != '_scope_'}
    if isinstance(value, (list, tuple)):
        return type(value)(map(to_plain, value))
    if isinstance(value, float) and math.isnan(value):
        return Code("float('nan')")  # NaN is not equal to itself
    if value is None or isinstance(value, (str, bytes, int, float, complex, type, set, frozenset)):
        return value
    # arrays, functions and the like, which a config that is read again holds anew: what they look like
    name = f'{value.__module__}.{value.__qualname__}' if callable(value) and hasattr(value, '__qualname__') else ''
    return Code(name or f'{type(value).__module__}.{re.sub(" at 0x[0-9a-f]+", "", repr(value))}')


def find_differences(old: Any, new: Any, place: str = '') -> Iterator[tuple[str, Any, Any]]:
    """List the places that differ, with their old and new values. A norm is one place."""
    if old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict) and new.get('type') not in TARGETS:
        for key in new:
            yield from find_differences(old.get(key), new[key], f'{place}.{key}'.lstrip('.'))
    elif isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new)):
            yield from find_differences(a, b, f'{place}.{i}')
    else:
        yield place, old, new
