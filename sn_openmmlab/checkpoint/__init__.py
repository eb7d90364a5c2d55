"""Checkpoint files: read as data, and converted from the authors' and BatchNorm's names."""

from .convert import SCHEME, Report, convert_checkpoint, load_from_switchnorm
from .read import read_state_dict

__all__ = ['SCHEME', 'Report', 'convert_checkpoint', 'load_from_switchnorm', 'read_state_dict']
