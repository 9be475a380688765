"""An MoE layer with shared experts under Expert Parallelism: what it gains by computing these while
tokens travel.

T tokens a rank, H hidden size, I intermediate size, E experts, K a token, P ranks, S intermediate
size of the shared expert. Weights go by their names in :class:`moe_parallel.MoE`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.functional import linear, silu

from benchmarks.ops._shapes import LAYERS
from benchmarks.registry import (
    Case,
    Cost,
    Implementation,
    Inputs,
    Op,
    Output,
    Shape,
    Truth,
)
from benchmarks.routing import make_topk_ids
from moe_parallel import BackendConfig, ExpertParallel, MoE, MoEConfig

INPUT_SETS = 2  # the weights that a call reads do not fit into a cache
CHECKED = 4  # tokens of each compared with float64
CHOSEN = 6.0  # what the router says of a chosen expert, at least; of the others about 0
GATE_UP, DOWN = "experts.gate_and_up_projs", "experts.down_projs"


def _shapes(
    hidden: int, inner: int, experts: int, top_k: int, shared: int, tokens: Sequence[int]
) -> list[Shape]:
    rest = {"H": hidden, "I": inner, "E": experts, "K": top_k, "S": shared}
    return [Shape({"T": t, **rest}) for t in tokens]


def _make_case(
    shape: Shape, dtype: torch.dtype, device: torch.device, routing: str, seed: int
) -> Case:
    """All ranks have the same weights, and each tokens of its own.

    Tokens are such that the router chooses the experts of the routing, and is not in doubt:
    rounding would else decide which experts run.
    """
    T, H, I, E, K, S, P = (shape[letter] for letter in "THIEKSP")  # noqa: E741
    if E > H:
        raise ValueError(f"moe_overlap: E must be at most H; got {shape}")
    rank = dist.get_rank() if P > 1 else 0
    generator = torch.Generator().manual_seed(seed)
    on_device = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        values = torch.empty(size, dtype=dtype, device=device)
        return values.normal_(std=scale, generator=on_device)

    router = torch.linalg.qr(torch.randn(H, E, generator=generator)).Q.T.contiguous()  # [E, H]
    weights = {
        "gate.weight": router.to(device, dtype),
        GATE_UP: normal(E, H, 2 * I, scale=H**-0.5),
        DOWN: normal(E, I, H, scale=I**-0.5),
        "shared_experts.gate_proj.weight": normal(S, H, scale=H**-0.5),
        "shared_experts.up_proj.weight": normal(S, H, scale=H**-0.5),
        "shared_experts.down_proj.weight": normal(H, S, scale=S**-0.5),
    }
    inputs: list[Inputs] = []
    for _ in range(INPUT_SETS):
        ids = make_topk_ids(P * T, E, K, routing, generator)
        wanted = torch.zeros(P * T, E).scatter_(
            1, ids, CHOSEN + torch.rand(P * T, K, generator=generator)
        )
        noise = torch.randn(P * T, H, generator=generator)
        x = noise + (wanted - noise @ router.T) @ router
        mine = slice(rank * T, (rank + 1) * T)
        hit = ids.unique().numel() / P  # experts that a rank computes, on average
        inputs.append(
            {
                "x": x[mine].to(device, dtype).requires_grad_(),
                "grad": torch.randn(T, H, generator=generator).to(device, dtype),
                "topk_ids": ids[mine].to(device),
                "experts_hit": torch.tensor(hit),
            }
        )
    # further inputs of the checked call: that it is one
    checked = {"checked": torch.tensor(True)}
    return Case(shape, dtype, device, inputs, weights, differentiable=("x",), check=checked)


def _cost(case: Case) -> Mapping[str, Cost]:
    """Products of the experts and the shared one; bytes of the weights that are needed, x and y.

    Backward reads these weights and x again and dy, and writes dx and the gradients of all weights
    that the rank has.
    """
    T, H, I, E, K, S, P = (case.shape[letter] for letter in "THIEKSP")  # noqa: E741
    size = case.dtype.itemsize
    hit = sum(float(inputs["experts_hit"]) for inputs in case.inputs) / len(case.inputs)
    dense = 3 * H * S + E * H
    weights, owned = hit * 3 * H * I + dense, E / P * 3 * H * I + dense
    flops = 6.0 * T * H * (K * I + S)
    return {
        "forward": Cost(flops, size * (weights + 2.0 * T * H)),
        "backward": Cost(2 * flops, size * (weights + owned + 3.0 * T * H)),
    }


def layer_in_plain_pytorch(case: Case, x: Tensor, ids: Tensor) -> Tensor:
    """The layer on one process, in the dtype of ``x`` [T, H], with the experts ``ids`` [T, K].

    Each expert's row is weighted and added in float32; in float64 where x is.
    """
    of = case.weights
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = linear(x.to(wide), of["gate.weight"].to(wide)).gather(1, ids)
    scores = logits.softmax(1).to(x.dtype)
    y = torch.zeros(x.shape, dtype=wide, device=x.device)
    for expert in ids.unique().tolist():
        token, slot = torch.where(ids == expert)
        gate, up = (x[token] @ of[GATE_UP][expert].to(x.dtype)).chunk(2, dim=1)
        rows = (silu(gate) * up) @ of[DOWN][expert].to(x.dtype)
        y.index_add_(0, token, scores[token, slot, None].to(wide) * rows.to(wide))
    gate, up, down = (
        of[f"shared_experts.{name}_proj.weight"].to(x.dtype) for name in ("gate", "up", "down")
    )
    return y.to(x.dtype) + linear(silu(linear(x, gate)) * linear(x, up), down)


def _truth(case: Case, index: int, gradients: bool) -> Mapping[str, Truth]:
    inputs, T = case.inputs[index], case.shape["T"]
    rows = torch.linspace(0, T - 1, min(T, CHECKED), device=case.device).round().long().unique()
    with torch.set_grad_enabled(gradients):
        x = inputs["x"].detach()[rows].double().requires_grad_(gradients)
        y = layer_in_plain_pytorch(case, x, inputs["topk_ids"][rows])
    found = {"y": Truth(rows, y.detach())}
    if gradients:
        (dx,) = torch.autograd.grad(y, x, inputs["grad"][rows].double())
        found["x"] = Truth(rows, dx)
    return found


def _yardstick(case: Case) -> Implementation:
    def run(inputs: Inputs) -> Output:
        return layer_in_plain_pytorch(case, inputs["x"], inputs["topk_ids"])

    return Implementation(run)


def build_layer(case: Case, transport: str) -> MoE:
    """The package's layer with the case's weights, which it shares, its experts spread over the
    ranks of the case's group."""
    H, I, E, K, S = (case.shape[letter] for letter in "HIEKS")  # noqa: E741
    config = MoEConfig(
        n_routed_experts=E,
        n_shared_experts=1,
        n_activated_experts=K,
        n_expert_groups=1,
        n_limited_groups=1,
        train_gate=True,
        gate_bias_update_factor=0.0,
        aux_loss_coeff=0.0,
        score_func="softmax",
        softmax_before_topk=True,
        norm_topk_prob=True,
        route_scale=1.0,
        dim=H,
        inter_dim=I,
        moe_inter_dim=I,
        shared_expert_inter_dim=S,
        dtype=case.dtype,
    )
    backend = BackendConfig(
        dispatcher=transport,
        dispatcher_max_tokens=case.shape["T"] if transport == "cuda_ipc" else None,
        gate_precision=torch.float32,
    )
    with torch.device("meta"):
        layer = MoE(config, backend)
    mesh = DeviceMesh.from_group(case.group, case.device.type, mesh_dim_names=("ep",))
    parallelize_module(layer.experts, mesh, ExpertParallel())
    of = dict(case.weights)
    here = E // case.shape["P"]
    first = mesh.get_local_rank() * here
    for name in (GATE_UP, DOWN):
        of[name] = DTensor.from_local(of[name][first : first + here], mesh, [Shard(0)])
    layer.load_state_dict(of, strict=True, assign=True)
    return layer.train()


_QWEN = LAYERS["qwen3-30b-a3b"]

moe_overlap = Op(
    name="moe_overlap",
    outputs=("y",),
    shape_sets={
        # a fourth of Qwen3's experts, and a shared expert of two of them
        "cpu": _shapes(*_QWEN[:2], 32, 4, 2 * _QWEN[1], (16, 256, 2048)),
        # with the shared expert that the model has
        "deepseek-v3": _shapes(*LAYERS["deepseek-v3"], LAYERS["deepseek-v3"][1], (16, 256, 4096)),
    },
    defaults={"cpu": ("cpu",), "cuda": ("deepseek-v3",)},
    dtypes={"cpu": ("bf16",), "cuda": ("bf16",)},
    directions=dict.fromkeys(("cpu", "cuda"), ("forward", "forward+backward")),
    make_case=_make_case,
    cost=_cost,
    truth=_truth,
    routings=lambda shape: ("balanced",),
    yardstick=_yardstick,
    on_ranks=True,
)
