"""Read checkpoint files as data, and convert those of the authors' SN code and of BatchNorm models."""

from .convert import SCHEME, Report, convert_checkpoint, load_from_switchnorm
from .read import read_state_dict

__all__ = ['SCHEME', 'Report', 'convert_checkpoint', 'load_from_switchnorm', 'read_state_dict']
