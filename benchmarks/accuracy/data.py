"""Where the data sets of the accuracy cells are."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def data_root(name: str) -> str:
    """The folder of a data set, with a slash at its end: ``$SN_DATA_ROOT/NAME/``, or ``../shared/data/NAME/``.

    Raises:
        FileNotFoundError: If it is not there.
    """
    folder = Path(os.environ.get('SN_DATA_ROOT') or ROOT.parent / 'shared/data') / name
    if not folder.is_dir():
        raise FileNotFoundError(
            f'no data set at {folder}; set SN_DATA_ROOT to the folder of {name}/ (docs/datasets.md)'
        )
    return f'{folder}/'
