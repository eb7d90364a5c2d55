from .sparse import SparseSwitchNorm
from .switch_norm import SwitchNorm, SwitchNorm1d, SwitchNorm2d, SwitchNorm3d
from .sync import SyncSN

__all__ = ['SparseSwitchNorm', 'SwitchNorm', 'SwitchNorm1d', 'SwitchNorm2d', 'SwitchNorm3d', 'SyncSN']
