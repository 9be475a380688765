"""Every function of moe_kernels, called with one argument of another kind than it takes."""

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import moe_kernels
from moe_kernels import ExpertOrder, QuantizedExperts

T, K, E, H, W = 6, 2, 4, 64, 64


def calls() -> dict[str, dict[str, Any]]:
    """Arguments that are right, by function."""
    x, h, up, down = (torch.randn(*size) for size in ((T, H), (5, 8), (E, H, W), (E, W // 2, H)))
    ids, weights = torch.arange(T * K).view(T, K) % E, torch.rand(T, K)
    order = moe_kernels.sort_by_expert(ids, E)
    rows, mask = torch.randn(T * K, H), torch.ones(T, dtype=torch.bool)
    values, scales = moe_kernels.quantize_rows(rows)
    up8, up_scales = moe_kernels.quantize_weights(up)
    routed = {"topk_ids": ids, "topk_weights": weights}
    biases = {"gate_up_bias": torch.randn(E, W), "down_bias": torch.randn(E, H)}
    activation = {"activation": "swiglu", "interleaved": False, "limit": 5.0}
    product = {"b": up, "offsets": order.offsets, "bias": torch.randn(E, W)}
    quantised = {
        name: moe_kernels.quantize_experts(w) for name, w in (("gate_up", up), ("down", down))
    }
    rounding = {"dtype": torch.float8_e4m3fn, "block": 128, "power_of_two": False}
    byte = torch.randint(0, 255, (2, 19, 3, 16), dtype=torch.uint8)
    return {
        "sort_by_expert": {"topk_ids": ids, "num_experts": E},
        "permute": {"x": x, "order": order, "num_rows": T * K},
        "unpermute": {"rows": rows, "order": order, "weights": weights},
        "chunk_permute": {
            "rows": rows,
            "sizes": torch.tensor([3, 4, 5]),
            "order": torch.tensor([2, 0, 1]),
        },
        "expert_activation": {
            "h": h,
            "kind": "swigluoai",
            "row_weights": torch.rand(5),
            "interleaved": False,
            "alpha": 1.7,
            "limit": 7.0,
        },
        "topk_router": {
            "logits": torch.randn(T, 8),
            "top_k": K,
            "score_func": "softmax",
            "softmax_before_topk": True,
            "renormalize": False,
            "correction_bias": torch.zeros(8),
            "num_groups": 2,
            "topk_groups": 1,
            "group_score": "max",
            "group_fill": 0.0,
            "route_scale": 1.0,
            "token_mask": mask,
            "given_ids": ids,
            "return_scores": False,
            "candidates": 0,
        },
        "round_tokens": {
            **routed,
            "num_experts": E,
            "top_k": K,
            "tile": 3,
            "mode": "up",
            "token_mask": mask,
        },
        "rounded_rows": {"tokens": T, "top_k": K, "num_experts": E, "tile": 3, "mode": "up"},
        "grouped_gemm": {"a": rows, **product, "out_dtype": torch.float32},
        "grouped_gemm_wgrad": {
            "a": rows,
            "grad": rows,
            "offsets": order.offsets,
            "out": torch.zeros(E, H, H),
        },
        "fp8_grouped_gemm": {
            "a": rows,
            **product,
            "out_dtype": torch.float32,
            "power_of_two": False,
            "save_float8": True,
        },
        "scaled_grouped_gemm": {
            "a": values,
            **product,
            "b": up8,
            "scales_a": scales,
            "scales_b": up_scales,
            "out_dtype": torch.float32,
        },
        "quantize_rows": {"x": x, **rounding},
        "permute_quantize": {"x": x, "order": order, "num_rows": T * K, **rounding},
        "quantize_weights": {"w": up, **rounding, "transposed": True},
        "dequantize_rows": {
            "values": values,
            "scales": scales,
            "dtype": torch.float32,
            "block": 128,
        },
        "fused_experts": {
            "x": x,
            "gate_up": up,
            "down": down,
            **routed,
            **activation,
            **biases,
            "num_rows": T * K,
        },
        "fused_experts_quantized": {"x": x, **quantised, **routed, **activation, **biases},
        "fused_moe": {"x": x, "w13": up.mT, "w2": down.mT, **routed},
        "quantize_experts": {"weight": up, "format": "int4"},
        "experts_from_mxfp4": {"blocks": byte, "scales": byte[..., 0]},
        "use_large_pages": {"weights": h},
    }


FUNCTIONS = tuple(calls())


def wrong_values(value: Any) -> Iterator[Any]:
    """What cannot stand for ``value``, whatever argument that is of."""
    if isinstance(value, Tensor):
        # not None, which may mean that an argument is left out
        yield from (3, "abc", value.tolist() if value.dtype != torch.float8_e4m3fn else [1.0])
        yield value.float().numpy()
        yield value.float().to_sparse()
        yield torch.nested.nested_tensor([value.float()])
    elif isinstance(value, bool):
        yield from (None, 2, 1.0, "yes", [True])
    elif isinstance(value, int):
        yield from (-1, 2**63, 2**70, 1.5, float("nan"), "3", [2], torch.tensor(2))
    elif isinstance(value, float):
        yield from (float("nan"), "x", [1.0], 1j, 10**400, torch.tensor(1.0))
    elif isinstance(value, str):
        yield from (None, 3, "bogus", ["swiglu"])
    elif isinstance(value, torch.dtype):
        yield from (3, "float32", torch.int32, torch.complex64)
    elif isinstance(value, ExpertOrder):
        yield from (None, 3, tuple(value), value._replace(offsets=value.offsets[:0]))
        for name, part in zip(value._fields, value, strict=True):
            for wrong in (None, part.long(), part[:-1], part.to("meta"), part.to_sparse()):
                if name == "offsets" and isinstance(wrong, Tensor) and wrong.shape != part.shape:
                    continue  # as of fewer experts
                yield value._replace(**{name: wrong})
    elif isinstance(value, QuantizedExperts):
        yield from (None, 3, value.dequantize())
        for name, wrongs in {
            "codes": (None, 3, value.codes.int(), value.codes[:1], value.codes.to("meta")),
            "scales": (None, 3, value.scales.half(), value.scales[..., :1]),
            "format": (None, 3, "int8", "bogus"),
            "shape": (None, 3, "abc", value.shape[:2], (4, 64, float("nan")), (-4, 64, 64)),
        }.items():
            yield from (dataclasses.replace(value, **{name: wrong}) for wrong in wrongs)
    else:
        yield from (None, 3, torch.ones(2))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_refused_by_name(function: str) -> None:
    call = getattr(moe_kernels, function)
    arguments = calls()[function]
    call(**arguments)
    with pytest.raises(TypeError, match="bogus"):
        call(**arguments, bogus=1)
    tried = 0
    for name, right in arguments.items():
        before = {k: v.clone() for k, v in arguments.items() if isinstance(v, Tensor)}
        for wrong in wrong_values(right):
            if function == "use_large_pages" and isinstance(wrong, Tensor):
                assert call(wrong) == 0  # left alone, as in a module
                continue
            with pytest.raises((TypeError, ValueError, IndexError)) as caught:
                call(**{**arguments, name: wrong})
            message = str(caught.value)
            part = {"w13": "gate_up", "w2": "down"}.get(name, name)
            assert name in message or part in message, (name, wrong, message)
            assert "\n" not in message
            assert function in message or function == "fused_moe", (name, wrong, message)
            tried += 1
        for key, value in before.items():
            assert torch.equal(arguments[key].float(), value.float()), key
    assert tried >= 2 * len(arguments)


def test_rows_beyond_the_range_of_their_numbers_are_refused() -> None:
    for function in ("permute", "permute_quantize"):
        with pytest.raises(ValueError, match=rf"{function}: num_rows must be below 2\*\*31"):
            getattr(moe_kernels, function)(**{**calls()[function], "num_rows": 2**31})


def test_quantised_weights_are_moved_and_written_out_as_what_they_may_be() -> None:
    weights = calls()["fused_experts_quantized"]["down"]
    for wrong in (3, None, torch.int32, "float32", torch.float8_e4m3fn):
        with pytest.raises(TypeError, match=r"QuantizedExperts.dequantize: dtype must be .*; got"):
            weights.dequantize(wrong)
    for wrong in (3, None, torch.int32):
        with pytest.raises(TypeError, match=r"QuantizedExperts.to: device must be .*; got"):
            weights.to(wrong)
    assert torch.equal(weights.to("cpu").dequantize(), weights.dequantize(torch.float32))


def test_tensors_that_are_spread_over_ranks_are_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for function in FUNCTIONS:
            call, arguments = getattr(moe_kernels, function), calls()[function]
            for name, right in arguments.items():
                if not isinstance(right, Tensor):
                    continue
                wrong = DTensor.from_local(right, mesh)
                if function == "use_large_pages":
                    assert call(wrong) == call(right)
                    continue
                with pytest.raises(TypeError, match=rf"{name} must be .*; got a DTensor.*to_local"):
                    call(**{**arguments, name: wrong})
    finally:
        dist.destroy_process_group()


def test_every_function_is_tried() -> None:
    public = {
        name
        for name in moe_kernels.__all__
        if inspect.isfunction(getattr(moe_kernels, name)) and name != "free_kept_buffers"
    }
    assert set(FUNCTIONS) == public
