"""Expert weights in 8 or 4 bits, for inference.

E experts, Kd contracted size, N columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_kernels.ops._checks import (
    FLOAT_DTYPES,
    check_choice,
    check_count,
    check_device,
    check_dtype,
    check_tensor,
    shape,
)
from moe_kernels.ops._library import define
from moe_kernels.reference.quantized_experts import (
    FORMATS,
    GROUP,
    code_shapes,
    dequantize,
    scales_dtype,
)
from moe_kernels.reference.quantized_experts import (
    experts_from_mxfp4 as experts_from_mxfp4_reference,
)
from moe_kernels.reference.quantized_experts import quantize_experts as quantize_experts_reference


def _empty_codes(like: Tensor, format: str, *sizes: Any) -> tuple[Tensor, Tensor]:
    codes, scales = code_shapes(format, *sizes)
    return (
        like.new_empty(codes, dtype=torch.uint8),
        like.new_empty(scales, dtype=scales_dtype(format)),
    )


_quantize_op = define(
    "quantize_experts(Tensor weight, str format) -> (Tensor, Tensor)",
    reference=quantize_experts_reference,
    fake=lambda weight, format: _empty_codes(weight, format, *weight.shape),
    triton=False,
)
_mxfp4_op = define(
    "experts_from_mxfp4(Tensor blocks, Tensor scales) -> (Tensor, Tensor)",
    reference=experts_from_mxfp4_reference,
    fake=lambda blocks, scales: _empty_codes(
        blocks, "mxfp4", blocks.shape[0], blocks.shape[2] * GROUP, blocks.shape[1]
    ),
    triton=False,
)


@dataclass(frozen=True, eq=False)
class QuantizedExperts:
    """One quantised matrix for each expert, made by :func:`quantize_experts`.

    Attributes:
        codes: uint8, packed for streaming: tiles of 16 columns, in groups of 32 along Kd.
        scales: float32, one for each column, or bfloat16, one for each column of each group.
        format: as in :func:`quantize_experts`.
        shape: ``(E, Kd, N)`` of the weights that they stand for.
    """

    codes: Tensor
    scales: Tensor
    format: str
    shape: tuple[int, int, int]

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    @property
    def device(self) -> torch.device:
        """Of codes and scales."""
        return self.codes.device

    def to(self, device: torch.device | str) -> QuantizedExperts:
        """The same on another device."""
        if not isinstance(device, torch.device | str):
            raise TypeError(f"QuantizedExperts.to: device must be a device; got {device!r}")
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [E, Kd, N] that it stands for, in ``dtype``, which is floating point."""
        if dtype not in FLOAT_DTYPES:
            raise TypeError(
                "QuantizedExperts.dequantize: dtype must be one of bfloat16, float16, float32, "
                f"float64; got {dtype!r}"
            )
        _, inner, columns = self.shape
        return dequantize(self.codes, self.scales, self.format, inner, columns, dtype)


# no more than tensors, a name and sizes, so that torch.load takes it from a file by default
torch.serialization.add_safe_globals([QuantizedExperts])


def has_sizes(value: object) -> bool:
    """Whether ``value`` is quantised weights with a number of sizes that can be told apart."""
    sizes = value.shape if isinstance(value, QuantizedExperts) else None
    return isinstance(sizes, tuple | list) and len(sizes) == 3


def check_quantized(op: str, name: str, value: object, layout: str) -> None:
    """Raise unless ``value`` is quantised weights whose parts fit each other."""
    if not isinstance(value, QuantizedExperts):
        raise TypeError(
            f"{op}: {name} must be QuantizedExperts {layout}, as quantize_experts makes them; got "
            f"{type(value).__name__}"
        )
    check_choice(op, f"{name}.format", value.format, FORMATS)
    if not has_sizes(value):
        raise TypeError(f"{op}: {name}.shape must be (E, Kd, N); got {value.shape!r}")
    for size in value.shape:
        check_count(op, f"{name}.shape", size)
    codes, scales = code_shapes(value.format, *value.shape)
    for part, tensor, expected, dtype in (
        ("codes", value.codes, codes, torch.uint8),
        ("scales", value.scales, scales, scales_dtype(value.format)),
    ):
        check_tensor(op, f"{name}.{part}", tensor, len(expected), f"{list(expected)}")
        check_dtype(op, f"{name}.{part}", tensor, (dtype,))
        if tensor.shape != expected:
            raise ValueError(
                f"{op}: {name}.{part} must be {list(expected)} for {value.format} of "
                f"{list(value.shape)}; got {shape(tensor)}"
            )
    check_device(op, f"{name}.codes", value.codes, f"{name}.scales", value.scales)


def quantize_experts(weight: Tensor, format: str = "int4") -> QuantizedExperts:
    """Round weights to 8 or 4 bits, one expert after the other, and pack them for reading.

    ``int8``
        Integers of +-127 times a float32 scale for each column of each expert, the largest
        magnitude of the column over 127. 1 byte a weight.
    ``fp8``
        e4m3fn times a float32 scale for each column, the largest magnitude over 448. Magnitudes
        below 2^-6 scales, which are subnormal in e4m3, become 0 or 2^-6 scales. 1 byte a weight.
    ``int4``
        Integers of -8 to 7 times a bfloat16 scale for each 32 consecutive elements of a column. Of
        a few scales the one with the least squared error. 0.5625 bytes a weight.
    ``mxfp4``
        e2m1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign) times a power of two for each 32 consecutive
        elements of a column, chosen as the OCP Microscaling Formats specification says (version
        1.0, section 6.3). The power is kept as a bfloat16, and is at least 2^-126. 0.5625 bytes a
        weight.

    The sizes need no alignment. A last group of less than 32 elements has a scale of its own; it
    and a last tile of less than 16 columns take the memory of full ones.

    Args:
        weight: [E, Kd, N], any float dtype and strides, finite in float32: a checkpoint's
            [E, N, Kd] comes in as ``w.mT``.
        format: one of the above.

    Returns:
        Codes and scales on weight's device. They carry no gradient.

    Raises:
        ValueError: an unknown format, an empty weight, or one that is not finite in float32.
        TypeError: weight is not floating point.
    """
    op = "quantize_experts"
    check_tensor(op, "weight", weight, 3, "[E, Kd, N]")
    check_dtype(op, "weight", weight, FLOAT_DTYPES)
    check_choice(op, "format", format, FORMATS)
    if weight.numel() == 0:
        raise ValueError(f"{op}: weight must not be empty; got {shape(weight)}")
    experts, inner, columns = weight.shape
    codes, scales = _quantize_op(weight.detach(), format)
    return QuantizedExperts(codes, scales, format, (experts, inner, columns))


def experts_from_mxfp4(blocks: Tensor, scales: Tensor) -> QuantizedExperts:
    """The mxfp4 weights of a checkpoint, as they are: nothing is rounded.

    The layout is that of gpt-oss' checkpoints: ``gate_up_proj_blocks`` and ``gate_up_proj_scales``
    give [E, H, 2*I] with interleaved columns, ``down_proj_blocks`` and ``down_proj_scales``
    [E, I, H].

    Args:
        blocks: [E, N, G, 16], uint8: two e2m1 codes a byte, the lower index in the low bits.
        scales: [E, N, G], uint8: e8m0, which means two to its value less 127.

    Returns:
        Weights [E, 32 * G, N] in the format "mxfp4".

    Raises:
        ValueError: shapes that do not fit, or a scale of 255, which is not a number.
        TypeError: blocks or scales are not uint8.
    """
    op = "experts_from_mxfp4"
    check_tensor(op, "blocks", blocks, 4, "[E, N, G, 16]")
    check_dtype(op, "blocks", blocks, (torch.uint8,))
    check_tensor(op, "scales", scales, 3, "[E, N, G]")
    check_dtype(op, "scales", scales, (torch.uint8,))
    check_device(op, "blocks", blocks, "scales", scales)
    experts, columns, groups = blocks.shape[:3]
    if blocks.shape[3] != GROUP // 2 or blocks.numel() == 0:
        raise ValueError(f"{op}: blocks must be [E, N, G, 16] and not empty; got {shape(blocks)}")
    if scales.shape != blocks.shape[:3]:
        raise ValueError(
            f"{op}: scales must be {list(blocks.shape[:3])} as blocks; got {shape(scales)}"
        )
    if bool((scales == 255).any()):
        raise ValueError(f"{op}: scales must be numbers; got 255, which is NaN")
    codes, powers = _mxfp4_op(blocks, scales)
    return QuantizedExperts(codes, powers, "mxfp4", (experts, groups * GROUP, columns))
