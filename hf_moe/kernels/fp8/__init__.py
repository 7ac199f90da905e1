"""Experts and linear layers whose products are computed in FP8, as DeepSeek-V3 was trained.

https://arxiv.org/abs/2412.19437, 3.3. `eager` is the definition, in PyTorch; the kernels have to agree with it.
"""
