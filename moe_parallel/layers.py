"""The MoE layer and its dense companion.

T tokens, H hidden size, K experts a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

from moe_kernels.ops._checks import check_choice, check_count, check_flag, check_number
from moe_parallel.config import MLP_ACTIVATIONS, BackendConfig, MoEConfig, check_attributes
from moe_parallel.experts import GroupedExperts
from moe_parallel.gate import FakeBalancedGate, Gate
from moe_parallel.tensors import draw_normal, local_tensor

__all__ = ["MLP", "FakeBalancedGate", "Gate", "MoE"]

NEEDED = ("dim", "n_routed_experts", "n_activated_experts", "n_shared_experts", "moe_latent_size")
NEEDED_OF_BACKEND = ("fake_balanced_gate", "fake_gate_noise", "gate_precision")


class MLP(nn.Module):
    """A dense feed-forward layer; the shared experts of an MoE layer are one.

    Args:
        dim, inter_dim: hidden and intermediate size.
        dtype: of the parameters.
        activation: "swiglu", ``down(silu(gate(x)) * up(x))``, or "relu2", ``down(relu(up(x))**2)``
            without a gate.
        bias: whether the projections have biases.
        swiglu_limit: above 0, clamps the gate's factor above and the other to +-swiglu_limit, in
            float32.

    Raises:
        ValueError: another activation, or a negative size or limit.
        TypeError: a size, dtype, flag or limit of another kind.
    """

    def __init__(
        self,
        dim: int,
        inter_dim: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        activation: str = "swiglu",
        bias: bool = False,
        swiglu_limit: float = 0.0,
    ) -> None:
        super().__init__()
        check_count("MLP", "dim", dim)
        check_count("MLP", "inter_dim", inter_dim)
        if not isinstance(dtype, torch.dtype | None):
            raise TypeError(f"MLP: dtype must be a torch.dtype; got {dtype!r}")
        check_flag("MLP", "bias", bias)
        check_number("MLP", "swiglu_limit", swiglu_limit)
        if not swiglu_limit >= 0:
            raise ValueError(f"MLP: swiglu_limit must be at least 0; got {swiglu_limit}")
        check_choice("MLP", "activation", activation, MLP_ACTIVATIONS)
        self.activation = activation
        self.swiglu_limit = swiglu_limit
        options: dict[str, Any] = {"bias": bias, "dtype": dtype}
        self.up_proj = nn.Linear(dim, inter_dim, **options)
        self.down_proj = nn.Linear(inter_dim, dim, **options)
        gated = activation == "swiglu"
        self.gate_proj = nn.Linear(dim, inter_dim, **options) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., dim]`` of ``x [..., dim]``.

        Raises:
            TypeError: ``x`` is no tensor.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"MLP: x must be a tensor [..., dim]; got {type(x).__name__}")
        up = self.up_proj(x)
        if self.gate_proj is None:
            return self.down_proj(functional.relu(up).square())
        gate = self.gate_proj(x)
        if self.swiglu_limit > 0:
            wide, limit = torch.promote_types(x.dtype, torch.float32), self.swiglu_limit
            gate, up = gate.to(wide).clamp(max=limit), up.to(wide).clamp(-limit, limit)
            return self.down_proj((functional.silu(gate) * up).to(x.dtype))
        return self.down_proj(functional.silu(gate) * up)

    @torch.no_grad()
    def init_weights(
        self, buffer_device: torch.device | str | None = None, init_std: float = 0.02
    ) -> None:
        """Draw the matrices from N(0, init_std) and zero the biases."""
        for linear in (self.gate_proj, self.up_proj, self.down_proj):
            if linear is not None:
                _init_linear(linear, init_std)


class MoE(nn.Module):
    """A Mixture-of-Experts layer: router, routed experts and, where configured, shared experts.

    ``y = experts(x) + sigmoid(shared_expert_gate(x)) * shared_experts(x)``; with a
    ``moe_latent_size`` the routed path runs between ``fc1_latent_proj`` and ``fc2_latent_proj``.

    Attributes:
        cp_mesh: ranks with other parts of the same sequences, used where forward is given none.

    Raises:
        ValueError: an activation that there is not.
        TypeError: no configuration, or none of a backend.
    """

    def __init__(self, config: MoEConfig, backend: BackendConfig | None = None) -> None:
        super().__init__()
        check_attributes("MoE", "config", config, MoEConfig, NEEDED)
        self.backend = BackendConfig() if backend is None else backend
        check_attributes("MoE", "backend", self.backend, BackendConfig, NEEDED_OF_BACKEND)
        self.dim = config.dim
        self.n_routed_experts = config.n_routed_experts
        self.n_activated_experts = config.n_activated_experts
        self.cp_mesh: DeviceMesh | None = None
        self.gate: Gate | FakeBalancedGate
        if self.backend.fake_balanced_gate:
            self.gate = FakeBalancedGate(config, noise=self.backend.fake_gate_noise)
        else:
            self.gate = Gate(config, gate_precision=self.backend.gate_precision)
        self.experts = GroupedExperts(config, self.backend)

        self.shared_experts: MLP | None = None
        self.shared_expert_gate: nn.Linear | None = None
        if config.n_shared_experts > 0:
            width = config.shared_expert_inter_dim or config.moe_inter_dim
            self.shared_experts = MLP(
                config.dim,
                config.n_shared_experts * width,
                dtype=config.dtype,
                activation=config.shared_expert_activation,
                swiglu_limit=config.swiglu_limit,
            )
            if config.shared_expert_gate:
                self.shared_expert_gate = self._linear(config.dim, 1, config)

        self.fc1_latent_proj: nn.Linear | None = None
        self.fc2_latent_proj: nn.Linear | None = None
        if config.moe_latent_size is not None:
            self.fc1_latent_proj = self._linear(config.dim, config.moe_latent_size, config)
            self.fc2_latent_proj = self._linear(config.moe_latent_size, config.dim, config)

    @staticmethod
    def _linear(inputs: int, outputs: int, config: MoEConfig) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=False, dtype=config.dtype)

    def forward(
        self,
        x: Tensor,
        padding_mask: Tensor | None = None,
        cp_mesh: DeviceMesh | None = None,
    ) -> Tensor:
        """Route, compute and combine.

        Args:
            x: [..., H].
            padding_mask: [...] or flat, True (of integers, not 0) for padding, which no routed
                expert sees. Of an attention mask, which is 1 for tokens: ``attention_mask == 0``.
            cp_mesh: see :attr:`cp_mesh`.

        Returns:
            A new tensor shaped like ``x``.

        Raises:
            TypeError: ``x`` or ``padding_mask`` is no tensor, ``x`` not dense and floating point.
            ValueError: ``x`` has another hidden size, ``padding_mask`` another shape.
            RuntimeError: arguments of another rank do not fit; it names the rank.
        """
        try:
            self._check(x, padding_mask)
        except (TypeError, ValueError):
            tell = getattr(self.experts, "tell_refused", None)
            if tell is not None:
                tell(x)
            raise
        cp_mesh = self.cp_mesh if cp_mesh is None else cp_mesh
        tokens = x.reshape(-1, x.shape[-1])
        if padding_mask is None:
            token_mask = torch.ones(tokens.shape[0], dtype=torch.bool, device=x.device)
        else:
            token_mask = ~padding_mask.reshape(-1).to(torch.bool)

        weights, indices, _ = self.gate(tokens, token_mask, cp_mesh)
        latent = tokens if self.fc1_latent_proj is None else self.fc1_latent_proj(tokens)
        shared: Tensor | None = None
        if self.shared_experts is not None and getattr(self.experts, "overlaps", False) is True:

            def compute_shared() -> None:
                nonlocal shared
                shared = self._shared(tokens)

            y = self.experts(latent, token_mask, weights, indices, meanwhile=compute_shared)
        else:
            y = self.experts(latent, token_mask, weights, indices)
            # Not before them: gradients of x are then added in the same order as with overlap.
            shared = self._shared(tokens)
        if self.fc2_latent_proj is not None:
            y = self.fc2_latent_proj(y)
        if shared is not None:
            y = y + shared
        # Not a view: hooks that FSDP hangs on the output would be lost by an update in place.
        return torch.ops.aten._unsafe_view.default(y, x.shape)

    def _check(self, x: Any, padding_mask: Any) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"MoE: x must be a tensor [..., H]; got {type(x).__name__}")
        if x.layout != torch.strided or x.is_nested or not x.is_floating_point():
            found = "that is nested" if x.is_nested else f"{x.dtype} of layout {x.layout}"
            raise TypeError(
                f"MoE: x must be dense and floating point; got a tensor that is {found}"
            )
        if x.dim() == 0 or x.shape[-1] != self.dim:
            raise ValueError(f"MoE: x must be [..., H] with H = {self.dim}; got {list(x.shape)}")
        if padding_mask is None:
            return
        if not isinstance(padding_mask, Tensor):
            raise TypeError(
                f"MoE: padding_mask must be a tensor of bool; got {type(padding_mask).__name__}"
            )
        if list(padding_mask.shape) not in (list(x.shape[:-1]), [x.numel() // x.shape[-1]]):
            raise ValueError(
                f"MoE: padding_mask must be {list(x.shape[:-1])} for x {list(x.shape)}, or flat; "
                f"got {list(padding_mask.shape)}"
            )

    def _shared(self, tokens: Tensor) -> Tensor | None:
        if self.shared_experts is None:
            return None
        shared = self.shared_experts(tokens)
        if self.shared_expert_gate is not None:
            shared = torch.sigmoid(self.shared_expert_gate(tokens)) * shared
        return shared

    @torch.no_grad()
    def init_weights(
        self, buffer_device: torch.device | str | None = None, init_std: float = 0.02
    ) -> None:
        """Draw every matrix from N(0, init_std); zero the biases and the correction bias.

        Each rank draws its own part of a sharded matrix; seed all ranks of a pipeline stage alike,
        and stages differently.
        """
        self.gate.init_weights(buffer_device, init_std)
        self.experts.init_weights(buffer_device, init_std)
        if self.shared_experts is not None:
            self.shared_experts.init_weights(buffer_device, init_std)
        for linear in (self.shared_expert_gate, self.fc1_latent_proj, self.fc2_latent_proj):
            if linear is not None:
                _init_linear(linear, init_std)


def _init_linear(linear: nn.Linear, init_std: float) -> None:
    draw_normal(linear.weight, init_std)
    if linear.bias is not None:
        local_tensor(linear.bias).zero_()
