"""What PyTorch asks of the ops in float8, where opcheck does not reach: compile, meta, flops."""

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import moe_kernels
from tests.conftest import Implementation
from tests.kernels.test_fused_experts import make_case
from tests.kernels.test_op_contract import leaves_of


def test_compiles_whole(impl: Implementation) -> None:
    inputs, _ = make_case("dropped", torch.float32)
    ids, down = inputs["topk_ids"].to(impl.device), inputs["down"].to(impl.device)

    def layer(x: Tensor, gate_up: Tensor) -> Tensor:
        order = moe_kernels.sort_by_expert(ids, 6)
        rows = moe_kernels.permute(x, order)
        h = moe_kernels.fp8_grouped_gemm(rows, gate_up, order.offsets)
        with torch.no_grad():
            values, scales = moe_kernels.permute_quantize(x, order)
            copied = moe_kernels.permute(*moe_kernels.quantize_rows(x)[:1], order)
            w, w_scales = moe_kernels.quantize_weights(down.mT)
            back = moe_kernels.scaled_grouped_gemm(
                values, w, scales, w_scales, order.offsets, out_dtype=torch.float32
            )
            back += moe_kernels.dequantize_rows(copied, scales, dtype=torch.float32).sum()
        a = moe_kernels.expert_activation(h, "swiglu") * back
        return moe_kernels.unpermute(a @ down[0], order)

    results = []
    dynamic = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager"), dynamic):
        leaves = leaves_of({name: inputs[name].clone() for name in ("x", "gate_up")}, impl)
        y = function(**leaves)
        y.sum().backward()
        results.append([y, leaves["x"].grad, leaves["gate_up"].grad])
    for compiled in results[1:]:
        for eager, other in zip(results[0], compiled, strict=True):
            torch.testing.assert_close(eager, other)


def test_meta_tensors_give_shapes() -> None:
    rows = torch.empty(9, 40, device="meta", requires_grad=True)
    offsets = torch.empty(9, dtype=torch.int32, device="meta")
    w = torch.empty(8, 40, 24, device="meta")
    out = moe_kernels.fp8_grouped_gemm(rows, w, offsets)
    assert out.shape == (9, 24)
    out.sum().backward()
    assert rows.grad is not None
    values, scales = moe_kernels.quantize_rows(rows.detach())
    w, w_scales = moe_kernels.quantize_weights(w)
    parts = moe_kernels.scaled_grouped_gemm(values, w, scales, w_scales, offsets)
    assert parts.is_meta
    assert parts.dtype == torch.bfloat16


def test_flops_are_counted(impl: Implementation) -> None:
    offsets = torch.tensor([0, 3, 9], dtype=torch.int32, device=impl.device)
    a = torch.randn(9, 40, device=impl.device, requires_grad=True)
    b = torch.randn(2, 40, 24, device=impl.device, requires_grad=True)
    with torch.no_grad():
        operands = zip(moe_kernels.quantize_rows(a), moe_kernels.quantize_weights(b), strict=True)
        pairs = [value for pair in operands for value in pair]
    product = 2 * 9 * 40 * 24
    with FlopCounterMode(display=False) as counter:
        moe_kernels.scaled_grouped_gemm(*pairs, offsets)
    assert counter.get_total_flops() == product
    with FlopCounterMode(display=False) as counter:
        out = moe_kernels.fp8_grouped_gemm(a, b, offsets)
    assert counter.get_total_flops() == product
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * product
