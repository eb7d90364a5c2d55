from .batch_average import SNBatchAverageHook, average_statistics
from .ssn_radius import SSNRadiusHook

__all__ = ['SNBatchAverageHook', 'SSNRadiusHook', 'average_statistics']
