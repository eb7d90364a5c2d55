"""Triton kernels, for CUDA: the four big passes, and the algebra between them."""
