"""NVIDIA's architectures that kernels are compiled for, as compute capability times ten."""

from __future__ import annotations

ARCHITECTURES = (80, 86, 89, 90, 100, 120)


def shared_memory(arch: int) -> int:
    """Bytes that a block may have: fewest on GPUs that are not for servers."""
    if arch in (86, 89) or arch >= 120:
        return 99 * 1024
    return (227 if arch >= 90 else 163) * 1024
