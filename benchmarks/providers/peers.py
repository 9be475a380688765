"""Other libraries' expert layers, through their public functions, where they are installed.

T tokens, H hidden size, I intermediate size, E experts, K experts a token. What a library keeps in
a layout of its own is copied once, before anything is timed. What it needs from the routing it
computes in every call, as a layer that uses it must.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.ops.fused_experts import is_oai, matrices
from benchmarks.registry import Builder, Case, Implementation, Inputs, Output, Provider, Unsupported


def _only_swiglu(build: Builder) -> Builder:
    def checked(case: Case) -> Implementation:
        if is_oai(case):
            raise Unsupported("computes swiglu without biases only")
        return build(case)

    return checked


def _leaf(value: Tensor) -> Tensor:
    return value.detach().contiguous().requires_grad_()


# ------------------------------------------------------------------------------------- ScatterMoE


@_only_swiglu
def _scattermoe(case: Case) -> Implementation:
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    experts, top_k = case.shape["E"], case.shape["K"]
    gate_up, down = matrices(case)

    def run(inputs: Inputs) -> Output:
        order = flatten_sort_count(inputs["topk_ids"], num_experts=experts)
        h = parallel_linear(inputs["x"], gate_up, top_k, *order, grouped_out=True)
        gate, up = h.chunk(2, dim=-1)
        a, weights = functional.silu(gate) * up, inputs["topk_weights"]
        y: Tensor = parallel_linear(a, down, 1, *order, grouped_in=True, gates=weights)
        return y

    return Implementation(run)


# ------------------------------------------------------------------------------------------ Liger


@_only_swiglu
def _liger(case: Case) -> Implementation:
    from liger_kernel.ops import LigerFusedMoEFunction

    def run(inputs: Inputs) -> Output:
        y: Tensor = LigerFusedMoEFunction.apply(
            inputs["x"],
            case.weights["gate_up"],
            case.weights["down"],
            inputs["topk_ids"].int(),
            inputs["topk_weights"],
        )
        return y

    return Implementation(run)


# --------------------------------------------------------------------------------------- SonicMoE


@_only_swiglu
def _sonicmoe(case: Case) -> Implementation:
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    T, H, I, E, K = (case.shape[letter] for letter in "THIEK")  # noqa: E741
    # gate and up alternate: [E, 2I, H] of g0, u0, g1, u1, ...
    halves = case.weights["gate_up"].detach().view(E, 2, I, H)
    gate_up = _leaf(halves.transpose(1, 2).reshape(E, 2 * I, H))
    tokens = torch.arange(T, dtype=torch.int32, device=case.device).repeat_interleave(K)

    def apart(grad: Tensor) -> Tensor:
        return grad.view(E, I, 2, H).transpose(1, 2).reshape(E, 2 * I, H)

    def run(inputs: Inputs) -> Output:
        y: Tensor
        y, _ = moe_general_routing_inputs(
            inputs["x"],
            inputs["topk_weights"].flatten(),
            tokens,
            inputs["topk_ids"].flatten().int(),
            gate_up.permute(1, 2, 0),
            None,
            case.weights["down"].permute(1, 2, 0),
            None,
            E,
            torch.cuda.current_stream().cuda_stream,
            ActivationType.SWIGLU,
            not torch.is_grad_enabled(),
        )
        return y

    return Implementation(run, own_weights={"gate_up": ((gate_up,), apart)})


# -------------------------------------------------------------------------------------- MegaBlocks


@_only_swiglu
def _megablocks(case: Case) -> Implementation:
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import ParallelDroplessMLP

    H, I, E, K = (case.shape[letter] for letter in "HIEK")  # noqa: E741
    arguments = Arguments(
        hidden_size=H,
        ffn_hidden_size=I,
        moe_num_experts=E,
        moe_top_k=K,
        moe_loss_weight=0.0,
        mlp_type="glu",
        mlp_impl="grouped",
        activation_fn=functional.silu,
        bias=False,
        return_bias=False,
        fp16=case.dtype == torch.float16,
        bf16=case.dtype == torch.bfloat16,
        device=case.device,
    )
    experts = ParallelDroplessMLP(arguments)
    gate, up = case.weights["gate_up"].detach().chunk(2, dim=1)
    own = {
        "w1": torch.nn.Parameter(gate.reshape(E * I, H)),
        "v1": torch.nn.Parameter(up.reshape(E * I, H)),
        "w2": torch.nn.Parameter(case.weights["down"].detach().mT.reshape(E * I, H)),
    }
    for name, value in own.items():
        setattr(experts.mlp, name, value)

    def run(inputs: Inputs) -> Output:
        # no router, so no scores
        y: Tensor = experts(inputs["x"], None, inputs["topk_weights"], inputs["topk_ids"])
        return y

    def joined(*grads: Tensor) -> Tensor:
        return torch.cat([grad.view(E, I, H) for grad in grads], 1)

    return Implementation(
        run,
        own_weights={
            "gate_up": ((own["w1"], own["v1"]), joined),
            "down": ((own["w2"],), lambda grad: grad.view(E, I, H).mT),
        },
    )


# ------------------------------------------------------------------------------ Transformer Engine


@_only_swiglu
def _transformer_engine(case: Case) -> Implementation:
    import transformer_engine.pytorch as te

    H, I, E = (case.shape[letter] for letter in "HIE")  # noqa: E741

    def linear(inner: int, outer: int, weight: Tensor) -> tuple[Any, Sequence[Tensor]]:
        module = te.GroupedLinear(
            E, inner, outer, bias=False, params_dtype=case.dtype, device=case.device
        )
        leaves = [getattr(module, f"weight{expert}") for expert in range(E)]
        with torch.no_grad():
            for leaf, value in zip(leaves, weight, strict=True):
                leaf.copy_(value)
        return module, leaves

    up, up_leaves = linear(H, 2 * I, case.weights["gate_up"])
    down, down_leaves = linear(I, H, case.weights["down"])

    def run(inputs: Inputs) -> Output:
        ids = inputs["topk_ids"].int()
        counts = torch.bincount(ids.flatten(), minlength=E).tolist()  # it wants them on the host
        rows, places = te.moe_permute(inputs["x"], ids, map_type="index")
        gate, linear_part = up(rows, counts).chunk(2, dim=-1)
        out = down(functional.silu(gate) * linear_part, counts)
        weights = inputs["topk_weights"].float()
        y: Tensor = te.moe_unpermute(out, places, weights, map_type="index")
        return y

    def stacked(*grads: Tensor) -> Tensor:
        return torch.stack(grads)

    return Implementation(
        run, own_weights={"gate_up": (up_leaves, stacked), "down": (down_leaves, stacked)}
    )


def _te_permute(case: Case) -> Implementation:
    import transformer_engine.pytorch as te

    def run(inputs: Inputs) -> Output:
        ids = inputs["topk_ids"].int()
        rows: Tensor = te.moe_permute(inputs["x"], ids, map_type="index")[0]
        return rows

    return Implementation(run)


# ---------------------------------------------------------------------------------- triton_kernels


def _no_backward(outputs: Output, inputs: Inputs) -> None:
    raise Unsupported("has no backward")


def _triton_kernels(case: Case) -> Implementation:
    """The package beside Triton 3.6; beside later ones its functions have other names."""
    from triton_kernels.matmul_ogs import (
        FnSpecs,
        FusedActivation,
        GatherIndx,
        PrecisionConfig,
        RoutingData,
        ScatterIndx,
        matmul_ogs,
    )
    from triton_kernels.swiglu import swiglu_fn
    from triton_kernels.tensor import make_ragged_tensor_metadata
    from triton_kernels.topk import topk

    experts, top_k = case.shape["E"], case.shape["K"]
    if top_k & (top_k - 1):
        raise Unsupported("computes only powers of two of experts a token")
    gate_up, down = (weight.detach() for weight in matrices(case))
    biases = [
        case.weights[name].detach().float() if name in case.weights else None
        for name in ("gate_up_bias", "down_bias")
    ]
    precision = PrecisionConfig(out_dtype=case.dtype)
    fused = None
    if is_oai(case):
        specs = FnSpecs("swiglu", swiglu_fn, ("alpha", "limit"), reduction_n=2)
        fused = FusedActivation(specs, (1.702, 7.0))

    def logits_of(inputs: Inputs) -> Tensor:
        """Its routing starts with logits, whose softmax over the chosen are the weights."""
        logits = torch.zeros(case.shape["T"], experts, device=case.device)
        return logits.scatter_(1, inputs["topk_ids"], inputs["topk_weights"].detach().float().log())

    # by the tensor, which lives as long as the case
    prepared = {id(inputs["x"]): (logits_of(inputs), inputs["topk_ids"]) for inputs in case.inputs}

    def run(inputs: Inputs) -> Output:
        logits, ids = prepared[id(inputs["x"])]
        chosen = topk(logits, top_k, y_indx=ids.int())
        chosen_by = chosen.mask_metadata
        to_expert, to_slot = chosen_by.row_sorted_indx, chosen_by.col_sorted_indx
        ragged = make_ragged_tensor_metadata(chosen_by.col_sum, to_slot.shape[0])
        scales = chosen.vals.flatten()[to_slot]
        data = RoutingData(scales, ragged.slice_sizes, experts, top_k, ragged)
        h = matmul_ogs(
            inputs["x"].detach(), gate_up, biases[0], data,
            gather_indx=GatherIndx(to_slot, to_expert), precision_config=precision,
            fused_activation=fused,
        )  # fmt: skip
        if fused is None:
            gate, up = h.chunk(2, dim=-1)
            h = functional.silu(gate) * up
        y: Tensor = matmul_ogs(
            h, down, biases[1], data, scatter_indx=ScatterIndx(to_expert, to_slot),
            gammas=scales, precision_config=precision,
        )  # fmt: skip
        return y

    return Implementation(run, _no_backward)


def _peer(name: str, module: str, **builders: Callable[[Case], Implementation]) -> Provider:
    return Provider(name, builders, requires=(module,), devices=("cuda",))


PEERS = (
    _peer("scattermoe", "scattermoe", fused_experts=_scattermoe),
    _peer("liger", "liger_kernel", fused_experts=_liger),
    _peer("sonicmoe", "sonicmoe", fused_experts=_sonicmoe),
    _peer("megablocks", "megablocks", fused_experts=_megablocks),
    _peer(
        "transformer_engine",
        "transformer_engine.pytorch",
        fused_experts=_transformer_engine,
        permute=_te_permute,
    ),
    _peer("triton_kernels", "triton_kernels", fused_experts=_triton_kernels),
)
