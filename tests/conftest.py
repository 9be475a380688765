"""The implementations that the kernel tests run on.

Every test that takes ``impl`` runs on the C++ kernels and on the Triton ones: on the GPU where
there is one, where each call is also repeated as it was noted, else in Triton's interpreter, put
under the CPU key of the dispatcher so that public functions, autograd and checks are the same code.
Fresh memory holds NaN meanwhile.
"""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from tests.kernels.repeats import Repeats

HAS_GPU = torch.cuda.is_available()
REPEATS = Repeats()
if HAS_GPU:
    REPEATS.install()
else:
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are decorated, so before their import

OPS = (
    "sort_by_expert",
    "permute",
    "unpermute",
    "unpermute_backward",
    "chunk_permute",
    "expert_activation",
    "expert_activation_backward",
    "topk_router",
    "topk_router_backward",
    "round_tokens",
    "grouped_gemm",
    "grouped_gemm_wgrad",
    "grouped_gemm_wgrad_",
    "grouped_gemm_dbias",
    "fused_experts",
    "fused_experts_backward",
    "fused_experts_backward_",
    "fused_experts_wgrad_",
    "fused_experts_fp8",
    "fused_experts_fp8_backward",
    "fused_experts_fp8_backward_",
    "quantize_rows",
    "quantize_weights",
    "dequantize_rows",
    "permute_quantize",
    "scaled_grouped_gemm",
    "fp8_grouped_gemm",
)


@dataclass(frozen=True)
class Implementation:
    """Where a test's tensors live and which kernels answer there."""

    name: str
    device: torch.device

    @property
    def interpreted(self) -> bool:
        return self.name == "interpreter"


@contextmanager
def triton_under_cpu() -> Iterator[None]:
    """Put the Triton launchers under the CPU key for a while, in the mended interpreter."""
    from moe_kernels.ops._library import NAMESPACE, triton_op
    from tests.kernels.interpreter import mended_interpreter

    library = torch.library.Library(NAMESPACE, "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are overridden is the purpose
        for op in OPS:
            library.impl(op, triton_op(op).__call__, "CPU", allow_override=True)
    try:
        with mended_interpreter():
            yield
    finally:
        library._destroy()


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill fresh tensors with NaN, or the largest integer, for a while."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu", GPU if HAS_GPU else "interpreter"])
def impl(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    with poisoned_memory():
        if request.param == "interpreter":
            with triton_under_cpu():
                yield Implementation("interpreter", torch.device("cpu"))
        else:
            with REPEATS.checked():
                yield Implementation(request.param, torch.device(request.param))


TRITON = [GPU if HAS_GPU else "interpreter"]


def triton_alone() -> Iterator[Implementation]:
    """For ``pytest.fixture(params=TRITON)``: the Triton kernels, in memory as it comes."""
    if HAS_GPU:
        yield Implementation("cuda", torch.device("cuda"))
    else:
        with triton_under_cpu():
            yield Implementation("interpreter", torch.device("cpu"))


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Different data in every test, the same from run to run."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
