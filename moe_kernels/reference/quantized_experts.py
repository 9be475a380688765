"""Expert weights in 8 or 4 bits: what the codes mean, and how they are chosen.

E experts, Kd contracted size, N columns, G groups of 32 along Kd. Codes lie in tiles of 16 columns,
each in groups, so that a kernel reads an expert from its first byte to its last:

    int8, fp8     codes [E, N / 16, G, 8, 16, 4]  scales float32  [E, N / 16, 1, 16]
    int4, mxfp4   codes [E, N / 16, G, 4, 16, 4]  scales bfloat16 [E, N / 16, G, 16]

In a group, byte (i, n, j) of 8 bits is element 4 i + j of column n; of 4 bits its low half is
element 8 i + j, its high half element 8 i + 4 + j. Both sizes are filled up with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

FORMATS = ("int8", "fp8", "int4", "mxfp4")
GROUP, TILE = 32, 16

# The magnitudes of e2m1, by its three bits; the fourth is the sign.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LARGEST_FP8, _SMALLEST_FP8 = 448.0, 2.0**-6  # normal numbers of e4m3fn
# Shares of the largest value of a group that int4 tries to let its largest code stand for.
_SHARES = (1.0, 0.93, 0.86)


def has_group_scales(format: str) -> bool:
    return format in ("int4", "mxfp4")


def scales_dtype(format: str) -> torch.dtype:
    return torch.bfloat16 if has_group_scales(format) else torch.float32


def padded_sizes(inner: int, columns: int) -> tuple[int, int]:
    """Groups and tiles."""
    return -(-inner // GROUP), -(-columns // TILE)


def code_shapes(
    format: str, experts: int, inner: int, columns: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of codes and scales."""
    groups, tiles = padded_sizes(inner, columns)
    grouped = has_group_scales(format)
    codes = (experts, tiles, groups, 4 if grouped else 8, TILE, 4)
    return codes, (experts, tiles, groups if grouped else 1, TILE)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where that is not a finite number."""
    inverse = scale.reciprocal()
    return torch.where(inverse.isfinite(), inverse, 0)


def _sum_by_halves(values: Tensor) -> Tensor:
    """[..., 32] to [..., 1], each sum of two halves: an order that is the same everywhere."""
    while (half := values.shape[-1] // 2) > 0:
        values = values[..., :half] + values[..., half:]
    return values


def _int4(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes 0 to 15 of values [..., 32], 8 more than their integer, and scales [..., 1].

    The value of the largest magnitude, or a share of it, is -8 scales: of the shares the one with
    the least squared error.
    """
    extreme = values.gather(-1, values.abs().argmax(-1, keepdim=True))
    best_error, best_scale, best_codes = None, extreme, values
    for share in _SHARES:
        scale = (extreme * (share / -8)).bfloat16().float()
        codes = (values * _inverse(scale)).round_().clamp_(-8, 7)
        error = _sum_by_halves((codes * scale - values).square_())
        better = error < best_error if best_error is not None else torch.ones_like(error).bool()
        best_error = error if best_error is None else torch.minimum(error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_codes = torch.where(better, codes, best_codes)
    return (best_codes + 8).to(torch.uint8), best_scale.bfloat16()


def _mxfp4(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of e2m1 for values [..., 32], and scales [..., 1], powers of two.

    The scale is that of the OCP Microscaling Formats specification, version 1.0, section 6.3: two
    to the exponent of the largest magnitude, less 2, the largest exponent of e2m1.
    """
    largest = values.abs().amax(-1, keepdim=True)
    exponent = torch.frexp(largest).exponent - 1  # of 0: whatever, every code is 0
    scale = torch.exp2((exponent - 2).clamp(-126, 127).float())
    magnitudes = torch.tensor(_E2M1, device=values.device)
    between = (magnitudes[1:] + magnitudes[:-1]) / 2
    scaled = values * _inverse(scale)
    # halfway, the neighbour whose last bit is 0: the lower one, unless its number is odd
    up = torch.bucketize(scaled.abs(), between, right=True)
    down = torch.bucketize(scaled.abs(), between, right=False)
    code = torch.where(up % 2 == 0, up, down)
    return (code + 8 * (scaled < 0)).to(torch.uint8), scale.bfloat16()


def _columns(values: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Codes of values [..., Kd] with one scale [..., 1] each."""
    largest = values.abs().amax(-1, keepdim=True)
    if format == "int8":
        scale = largest / 127
        codes = (values * _inverse(scale)).round_().clamp_(-127, 127)
        return (codes + 128).to(torch.uint8), scale
    scale = largest / _LARGEST_FP8
    scaled = (values * _inverse(scale)).clamp_(-_LARGEST_FP8, _LARGEST_FP8)
    # No subnormal numbers: 2^-6 or 0, whichever is nearer.
    size = scaled.abs()
    least = torch.where(size < _SMALLEST_FP8 / 2, 0, _SMALLEST_FP8)
    scaled = torch.where(size < _SMALLEST_FP8, least.copysign(scaled), scaled)
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8), scale


def pack_codes(codes: Tensor, format: str) -> Tensor:
    """Codes in the order of the module's docstring, from [..., N, G, 32] of full sizes."""
    lead, (columns, groups) = codes.shape[:-3], codes.shape[-3:-1]
    if has_group_scales(format):
        codes = codes.view(*lead, columns, groups, 4, 2, 4)
        codes = codes[..., 0, :] | codes[..., 1, :] << 4
    codes = codes.reshape(*lead, columns // TILE, TILE, groups, -1, 4)
    return codes.movedim(-4, -2).contiguous()


def quantize_expert(weight: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of one expert's [Kd, N]: those of the module's docstring without E."""
    inner, columns = weight.shape
    groups, tiles = padded_sizes(inner, columns)
    values = weight.new_zeros(tiles * TILE, groups * GROUP, dtype=torch.float32)
    values[:columns, :inner] = weight.mT
    grouped = values.view(tiles * TILE, groups, GROUP)
    if has_group_scales(format):
        codes, scales = _int4(grouped) if format == "int4" else _mxfp4(grouped)
        scales = scales.view(tiles, TILE, groups).mT.contiguous()
    else:
        codes, scales = _columns(values, format)
        codes, scales = codes.view(grouped.shape), scales.view(tiles, 1, TILE)
    return pack_codes(codes, format), scales


def quantize_experts(weight: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of [E, Kd, N], which must be finite in float32."""
    codes_shape, scales_shape = code_shapes(format, *weight.shape)
    codes = weight.new_empty(codes_shape, dtype=torch.uint8)
    scales = weight.new_empty(scales_shape, dtype=scales_dtype(format))
    for e, expert in enumerate(weight.unbind(0)):
        if not bool(expert.float().isfinite().all()):
            raise ValueError(
                f"quantize_experts: weight must be finite in float32; expert {e} is not"
            )
        codes[e], scales[e] = quantize_expert(expert, format)
    return codes, scales


def experts_from_mxfp4(blocks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a checkpoint's blocks [E, N, G, 16] and scales [E, N, G]."""
    experts, columns, groups = scales.shape
    full = padded_sizes(GROUP, columns)[1] * TILE
    codes = blocks.new_zeros(experts, full, groups, GROUP)
    codes[:, :columns, :, 0::2] = blocks & 15
    codes[:, :columns, :, 1::2] = blocks >> 4
    # The exponent's bits of bfloat16 are those of e8m0; its zero means a subnormal number.
    bits = scales.new_zeros(experts, full, groups, dtype=torch.int16)
    bits[:, :columns] = torch.where(scales == 0, 0x40, scales.to(torch.int16) << 7)
    tiled = bits.view(experts, full // TILE, TILE, groups).mT.contiguous()
    return pack_codes(codes, "mxfp4"), tiled.view(torch.bfloat16)


def dequantize(
    codes: Tensor, scales: Tensor, format: str, inner: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """The weights [E, Kd, N] that codes and scales stand for."""
    experts, tiles, groups = codes.shape[:3]
    if has_group_scales(format):
        codes = torch.stack([codes & 15, codes >> 4], 4)  # [E, tiles, G, 4, 2, 16, 4]
        codes = codes.permute(0, 2, 3, 4, 6, 1, 5)
    else:
        codes = codes.permute(0, 2, 3, 5, 1, 4)
    scales = scales.permute(0, 2, 1, 3)[:, :, None]  # [E, G or 1, 1, tiles, 16]
    codes = codes.reshape(experts, groups, GROUP, tiles, TILE)
    if format == "int8":
        values = codes.to(dtype) - 128
    elif format == "fp8":
        values = codes.contiguous().view(torch.float8_e4m3fn).to(dtype)
    elif format == "int4":
        values = codes.to(dtype) - 8
    else:
        table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=codes.device)
        values = table.to(dtype)[codes.long()]
    values = (values * scales.to(dtype)).reshape(experts, groups * GROUP, tiles * TILE)
    return values[:, :inner, :columns]
