"""Peak memory of a training step of MoE blocks in each mode of activation checkpointing.

B sequences of T tokens, L layers, H hidden size, I intermediate size, E experts, K experts a token.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from benchmarks.registry import DTYPES, Shape
from moe_parallel import MoE, MoEConfig
from moe_parallel.parallelizer import apply_ac

NAME = "activation_checkpointing"
SHAPES = {
    "cpu": Shape({"L": 4, "B": 2, "T": 1024, "H": 512, "I": 384, "E": 16, "K": 4}),
    "cuda": Shape({"L": 4, "B": 4, "T": 4096, "H": 2048, "I": 768, "E": 128, "K": 8}),
}
# options of apply_ac
MODES: Mapping[str, Mapping[str, bool] | None] = {
    "off": None,
    "selective": {"selective": True},
    "router-saving": {"ignore_router": True},
    "full": {"ignore_router": False},
}
_HEAD = 64


class _Block(nn.Module):
    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        size = config.dim
        self.heads = max(1, size // _HEAD)
        self.norms = nn.ModuleList(nn.RMSNorm(size, dtype=config.dtype) for _ in range(2))
        self.qkv = nn.Linear(size, 3 * size, bias=False, dtype=config.dtype)
        self.out = nn.Linear(size, size, bias=False, dtype=config.dtype)
        self.mlp = MoE(config)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        z: Tensor = x + self.mlp(self.norms[1](x))
        return z


class _Model(nn.Module):
    def __init__(self, config: MoEConfig, layers: int) -> None:
        super().__init__()
        self.moe_config = config
        self.config = type("Config", (), {"hidden_size": config.dim})()
        self.layers = nn.ModuleDict({str(i): _Block(config) for i in range(layers)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


def measure(
    device: torch.device, dtype: str, shape: Shape, seed: int = 0
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """One row a mode, and bytes of what all modes hold: parameters, with gradients of equal size.

    ``peak_bytes`` is what forward and backward need beside them: what PyTorch's allocators give
    out, which no other load of the machine changes.
    """
    config = MoEConfig(
        n_routed_experts=shape["E"],
        n_shared_experts=0,
        n_activated_experts=shape["K"],
        n_expert_groups=1,
        n_limited_groups=1,
        train_gate=True,
        gate_bias_update_factor=0.0,
        aux_loss_coeff=0.0,
        score_func="softmax",
        softmax_before_topk=True,
        route_scale=1.0,
        dim=shape["H"],
        inter_dim=shape["I"],
        moe_inter_dim=shape["I"],
        norm_topk_prob=True,
        dtype=DTYPES[dtype],
    )
    rows = []
    held = 0
    for mode, options in MODES.items():
        torch.manual_seed(seed)
        with device:
            model = _Model(config, shape["L"])
            x = torch.randn(shape["B"], shape["T"], shape["H"], dtype=DTYPES[dtype])
        if options is not None:
            apply_ac(model, **options)
        held = sum(p.nbytes for p in model.parameters())

        def step(model: nn.Module = model, x: Tensor = x) -> None:
            x = x.detach().requires_grad_()
            functional.mse_loss(model(x), x.detach()).backward()

        step()  # gradients are there from here on
        peak = peak_bytes(step, device)
        rows.append(
            {
                "op": NAME,
                "shape": str(shape),
                "sizes": dict(shape.sizes),
                "dtype": dtype,
                "routing": "its own",
                "direction": "forward+backward",
                "provider": mode,
                "ms": None,
                "ms_min": None,
                "rounds": 1,
                "peak_bytes": peak,
                "error": None,
                "void": "",
                "note": "",
                "tflops": None,
                "gbs": None,
                "floor_ms": None,
                "over_floor": None,
            }
        )
        del model, x, step
        gc.collect()
    return rows, {"parameter_bytes": held}


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """The most that ``work`` has allocated at a time, in bytes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    # events() counts what an operator allocates as that operator's; here is every allocation
    recorded: Any = profiler.profiler
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    changes = [(event.start_ns(), event.nbytes()) for event in events]
    held = most = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        held += change
        most = max(most, held)
    return most


def table(rows: list[dict[str, Any]], held: Mapping[str, int]) -> str:
    """The rows of one shape and dtype as markdown."""
    first = rows[0]
    lines = [
        f"{first['shape']} {first['dtype']}; parameters and gradients, "
        f"{2 * held['parameter_bytes'] / 2**20:,.0f} MiB, not counted",
        "",
        "| mode | peak MiB | of off |",
        "| --- | --- | --- |",
    ]
    for row in rows:
        share = row["peak_bytes"] / first["peak_bytes"]
        peak = row["peak_bytes"] / 2**20
        lines.append(f"| {row['provider']} | {peak:,.1f} | {share:.0%} |")
    return "\n".join(lines)
