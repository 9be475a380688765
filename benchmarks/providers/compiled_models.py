"""Whole models under torch.compile, with each experts implementation."""

from __future__ import annotations

from benchmarks.models import decoding
from benchmarks.registry import Provider


def _provider(name: str, implementation: str) -> Provider:
    return Provider(
        f"{name}_compiled",
        {"model_decode": decoding(implementation, compiled=True)},
        requires=("transformers.integrations.moe",),
    )


our_compiled_model = _provider("moe_kernels", "moe_kernels")
compiled_models = tuple(_provider(f"transformers_{n}", n) for n in ("eager", "grouped_mm"))
