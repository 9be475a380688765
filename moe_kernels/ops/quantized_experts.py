"""Expert weights in 8 or 4 bits, for inference.

E experts, Kd contracted size, N columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_kernels.ops._checks import (
    FLOAT_DTYPES,
    check_choice,
    check_device,
    check_dtype,
    check_tensor,
    shape,
)
from moe_kernels.reference.quantized_experts import (
    FORMATS,
    GROUP,
    TILE,
    code_shapes,
    dequantize,
    has_group_scales,
    pack_codes,
    quantize_expert,
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
        return self.codes.device

    def to(self, device: torch.device | str) -> QuantizedExperts:
        """The same on another device."""
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [E, Kd, N] that it stands for, in ``dtype``."""
        _, inner, columns = self.shape
        return dequantize(self.codes, self.scales, self.format, inner, columns, dtype)


def check_quantized(op: str, name: str, value: object, layout: str) -> None:
    """Raise unless ``value`` is quantised weights whose parts fit each other."""
    if not isinstance(value, QuantizedExperts):
        raise TypeError(
            f"{op}: {name} must be QuantizedExperts {layout}, as quantize_experts makes them; got "
            f"{type(value).__name__}"
        )
    check_choice(op, f"{name}.format", value.format, FORMATS)
    codes, scales = code_shapes(value.format, *value.shape)
    for part, tensor, expected in (("codes", value.codes, codes), ("scales", value.scales, scales)):
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
        ValueError: an unknown format, an empty weight, or one that is not finite.
    """
    op = "quantize_experts"
    check_tensor(op, "weight", weight, 3, "[E, Kd, N]")
    check_dtype(op, "weight", weight, FLOAT_DTYPES)
    check_choice(op, "format", format, FORMATS)
    if weight.numel() == 0:
        raise ValueError(f"{op}: weight must not be empty; got {shape(weight)}")
    experts, inner, columns = weight.shape
    codes_shape, scales_shape = code_shapes(format, experts, inner, columns)
    codes = torch.empty(codes_shape, dtype=torch.uint8, device=weight.device)
    dtype = torch.bfloat16 if has_group_scales(format) else torch.float32
    scales = torch.empty(scales_shape, dtype=dtype, device=weight.device)
    with torch.no_grad():
        for e, expert in enumerate(weight.detach().unbind(0)):
            if not bool(expert.to(torch.float32).isfinite().all()):
                raise ValueError(f"{op}: weight must be finite in float32; expert {e} is not")
            codes[e], scales[e] = quantize_expert(expert, format)
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
    full = code_shapes("mxfp4", experts, groups * GROUP, columns)[0][1] * TILE
    codes = blocks.new_zeros(experts, full, groups, GROUP)
    codes[:, :columns, :, 0::2] = blocks & 15
    codes[:, :columns, :, 1::2] = blocks >> 4
    # The exponent's bits of bfloat16 are those of e8m0; its zero means a subnormal number.
    bits = scales.new_zeros(experts, full, groups, dtype=torch.int16)
    bits[:, :columns] = torch.where(scales == 0, 0x40, scales.to(torch.int16) << 7)
    tiled = bits.view(experts, full // TILE, TILE, groups).mT.contiguous()
    return QuantizedExperts(
        pack_codes(codes, "mxfp4"),
        tiled.view(torch.bfloat16),
        "mxfp4",
        (experts, groups * GROUP, columns),
    )
