from .batch_average import SNBatchAverageHook, average_statistics

__all__ = ['SNBatchAverageHook', 'average_statistics']
