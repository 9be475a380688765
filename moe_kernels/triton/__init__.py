"""Triton kernels: one file an op, each a shape legend, the kernels and the launcher.

A launcher has its op's name and exactly its schema's arguments. It never synchronises with the
host (but under ``MOE_KERNELS_CHECK=1``), can be captured in a CUDA graph, and reads and writes in
bounds whatever the values of ids, orders and offsets. Its modules import Triton; ``ops`` imports
them at the first call on a CUDA tensor. With ``TRITON_INTERPRET=1`` launchers take CPU tensors.
"""
