"""CUDA implementations of the operators, one module each, imported at an operator's first call on CUDA tensors.

``forward`` and ``backward`` take and return what the CPU implementations in ``fwpkm/ops/<operator>.py`` do. They are
made of ATen calls that do not wait for the GPU, and of the kernels in ``fwpkm/ops/kernels``.
"""
