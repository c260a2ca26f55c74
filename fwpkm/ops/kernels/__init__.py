"""Triton kernels, one a file: the kernel, a function that launches it on tensors, and the forms to look at.

Nothing here knows ``torch.library``; the operators' CUDA implementations, ``fwpkm/ops/cuda``, are made of these.
"""
