"""Hooks of mmengine's Runner."""

from .ratios import SNRatioHook

__all__ = ['SNRatioHook']
