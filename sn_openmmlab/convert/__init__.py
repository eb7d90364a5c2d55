"""Change built models: their norms to SN and back, and fold norms into convolutions."""

from .fold import fold_batch_norm
from .layers import convert_switch_norm

__all__ = ['convert_switch_norm', 'fold_batch_norm']
