"""Routers: the trained one, and one that balances perfectly.

T tokens, H hidden size, K experts a token, E experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn import functional

from moe_kernels import round_tokens, topk_router
from moe_kernels.ops._checks import check_count, check_number, check_tensor
from moe_parallel.config import MoEConfig, check_attributes
from moe_parallel.routing_replay import RoutingReplay, is_recomputing
from moe_parallel.tensors import draw_normal, local_tensor
from moe_parallel.training import MoEAuxLossAutoScaler

NEEDED = (  # of a configuration
    "n_routed_experts",
    "n_activated_experts",
    "n_expert_groups",
    "n_limited_groups",
    "train_gate",
    "gate_bias_update_factor",
    "aux_loss_coeff",
    "score_func",
    "route_scale",
    "dim",
    "norm_topk_prob",
    "router_bias",
    "softmax_before_topk",
    "dtype",
    "force_e_score_correction_bias",
    "enable_routing_replay",
    "token_rounding",
    "token_rounding_tile",
    "rounding_candidates",
)


class _SumOverRanks(torch.autograd.Function):
    """Sum over a mesh, whose gradient stays local: each rank owes that of its own addend alone."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, mesh: DeviceMesh) -> Tensor:
        return all_reduce(value, "sum", mesh.get_group())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Gate(nn.Module):
    """The router: scores every expert, chooses K a token and weighs them.

    With a correction bias (arXiv:2408.15664) the choice is steered towards experts with less load
    by :meth:`update_bias`, once an optimizer step; the weights do not see the bias.

    Args:
        config: sizes, score function, groups, scaling.
        gate_precision: dtype of the projection; None for the dtype of the input.

    Raises:
        TypeError: no configuration, or no dtype.
        AssertionError: a frozen gate whose correction bias is to be updated.
    """

    def __init__(self, config: MoEConfig, gate_precision: torch.dtype | None = None) -> None:
        super().__init__()
        check_attributes("Gate", "config", config, MoEConfig, NEEDED)
        self.dim = config.dim
        self.n_experts = config.n_routed_experts
        self.topk = config.n_activated_experts
        self.softmax_before_topk = config.softmax_before_topk
        self.n_groups = config.n_expert_groups
        self.topk_groups = config.n_limited_groups
        self.score_func = config.score_func
        self.route_scale = config.route_scale
        self.train_gate = config.train_gate
        self.bias_update_factor = config.gate_bias_update_factor
        self.aux_loss_coeff = config.aux_loss_coeff
        self.norm_topk_prob = config.norm_topk_prob
        if not isinstance(gate_precision, torch.dtype | None):
            raise TypeError(
                f"Gate: gate_precision must be a torch.dtype or None; got {gate_precision!r}"
            )
        self.gate_precision = gate_precision
        self.token_rounding = config.token_rounding
        self.rounding_tile = config.token_rounding_tile
        self.rounding_candidates = config.rounding_candidates
        if self.bias_update_factor > 0:
            assert self.train_gate, (
                "Gate: gate_bias_update_factor > 0 needs train_gate; "
                f"got {self.bias_update_factor} with train_gate False"
            )

        def parameter(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*size, dtype=config.dtype), self.train_gate)

        self.weight = parameter(self.n_experts, self.dim)
        self.bias = parameter(self.n_experts) if config.router_bias else None
        corrected = self.bias_update_factor > 0 or config.force_e_score_correction_bias
        self.e_score_correction_bias: Tensor | None
        self.register_buffer(
            "e_score_correction_bias",
            torch.zeros(self.n_experts, dtype=torch.float32) if corrected else None,
        )
        self.e_score_correction_bias_master: Tensor | None = None
        self.routing_replay = RoutingReplay() if config.enable_routing_replay else None
        self._cumulative_expert_load: Tensor | None = None
        self._track_load_balance = False
        self._last_expert_load: Tensor | None = None
        self._last_aux_loss: Tensor | None = None
        nn.init.normal_(self.weight, std=0.02)

    def logits(self, x: Tensor) -> Tensor:
        """``x [T, H]`` projected to ``[T, E]``, in gate_precision, else in x's dtype.

        Under autocast too: rounded logits change which experts are chosen.
        """
        dtype = x.dtype if self.gate_precision is None else self.gate_precision
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            return functional.linear(x.to(dtype), self.weight.to(dtype), bias)

    def _router_options(self, bias: Tensor | None) -> dict[str, Any]:
        """What :attr:`score_func` means to :func:`moe_kernels.topk_router`."""
        if self.score_func == "softmax":
            return {"score_func": "softmax", "softmax_before_topk": self.softmax_before_topk}
        if self.score_func == "sqrtsoftplus":
            return {"score_func": "sqrtsoftplus", "correction_bias": bias}
        options: dict[str, Any] = {"score_func": "sigmoid", "correction_bias": bias}
        fill, group_score = 0.0, "max" if bias is None else "top2"
        if self.score_func == "softmax_with_bias":
            options["score_func"], group_score = "softmax", "top2"
        elif self.score_func == "sigmoid_with_bias":
            fill, group_score = -math.inf, "top2"
        if self.n_groups > 1:
            options |= {
                "num_groups": self.n_groups,
                "topk_groups": self.topk_groups,
                "group_score": group_score,
                "group_fill": fill,
            }
        return options

    def forward(
        self, x: Tensor, token_mask: Tensor, cp_mesh: DeviceMesh | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Route every token.

        Args:
            x: [T, H].
            token_mask: [T] bool, False for padding, which counts neither as load nor in the loss.
            cp_mesh: ranks that hold other parts of the same sequences; the auxiliary loss is that
                of the whole.

        Returns:
            ``(weights [T, K] in x.dtype, indices [T, K] int64, aux)``: aux is the unscaled
            auxiliary loss, a float32 scalar (None outside training or without a coefficient).
            ``aux_loss_coeff * aux`` is already part of the graph of ``weights``. With token
            rounding, in training, there are more columns, and -1 among the indices.

        Raises:
            TypeError: ``x`` or ``token_mask`` is no tensor.
            ValueError: ``x`` is not [T, H], or ``token_mask`` not [T].
        """
        check_tensor("Gate", "x", x, 2, "[T, H]")
        if x.shape[1] != self.dim:
            raise ValueError(f"Gate: x must be [T, H] with H = {self.dim}; got {list(x.shape)}")
        check_tensor("Gate", "token_mask", token_mask, 1, "[T]")
        logits = self.logits(x)
        correction = self.e_score_correction_bias
        with_aux = self.training and self.aux_loss_coeff > 0
        rounding = self.token_rounding if self.training else None
        routed = topk_router(
            logits,
            self.topk,
            renormalize=self.norm_topk_prob and self.topk > 1,
            route_scale=self.route_scale,
            token_mask=token_mask,
            given_ids=None if self.routing_replay is None else self.routing_replay.given_ids(),
            return_scores=with_aux,
            candidates=0 if rounding is None else self.rounding_candidates,
            **self._router_options(None if correction is None else local_tensor(correction)),
        )
        weights, indices = routed.topk_weights, routed.topk_ids
        if rounding is not None:
            weights, indices, _ = round_tokens(
                weights,
                indices,
                self.n_experts,
                top_k=self.topk,
                tile=self.rounding_tile,
                mode=rounding,
                token_mask=token_mask,
            )
        indices = indices.to(torch.int64)
        if self.routing_replay is not None:
            self.routing_replay.note(indices)
        aux = None
        if with_aux:
            aux = self._aux_loss(routed.scores, token_mask, routed.load, cp_mesh)
            weights = MoEAuxLossAutoScaler.apply(weights, self.aux_loss_coeff * aux)
        if not is_recomputing():
            self._record(routed.load, aux)
        return weights.to(x.dtype), indices, aux

    def _aux_loss(
        self, scores: Tensor, token_mask: Tensor, load: Tensor, cp_mesh: DeviceMesh | None
    ) -> Tensor:
        """``sum_e f_e P_e`` of the Switch Transformer (arXiv:2101.03961, equations 4 to 6).

        ``f_e = load_e * E / (K * N)`` is the expert's share of the N tokens' choices, 1 when
        balanced, and ``P_e`` the mean of its scores [T, E].
        """
        score_sums = torch.where(token_mask[:, None], scores, 0).sum(0).to(torch.float32)
        tokens = token_mask.sum().to(torch.float32).reshape(1)
        load = load.to(torch.float32)
        if cp_mesh is not None and cp_mesh.size() > 1:
            sums = _SumOverRanks.apply(torch.cat([score_sums, load, tokens]), cp_mesh)
            score_sums, load, tokens = sums.split([self.n_experts, self.n_experts, 1])
        tokens = tokens.clamp(min=1)
        fraction = load.detach() * self.n_experts / (self.topk * tokens.detach())
        return (fraction * score_sums / tokens.detach()).sum()

    def _record(self, load: Tensor, aux: Tensor | None) -> None:
        """Keep the load [E] of this forward for :meth:`update_bias` and for reports."""
        own = load = load.detach().to(torch.int64)
        if self.training and self.bias_update_factor > 0:
            total = self._cumulative_expert_load
            if total is not None and not total.is_meta:  # which holds no numbers
                load = load + total.to(load.device)
            self._cumulative_expert_load = load
        if self._track_load_balance:
            self._last_expert_load = own
            self._last_aux_loss = None if aux is None else aux.detach()

    @torch.no_grad()
    def update_bias(self) -> None:
        """Move the correction bias towards experts below the mean load; forget the load.

        ``bias_e += bias_update_factor * sign(mean_load - load_e)``, with the load since the last
        call, summed over the ranks of the buffer's mesh where it is a DTensor.

        Raises:
            AssertionError: the gate is frozen, has no bias to update, is in eval mode, or has not
                run since the last call.
        """
        assert self.train_gate, "Gate.update_bias: the gate is frozen (train_gate is False)"
        assert self.bias_update_factor > 0, "Gate.update_bias: gate_bias_update_factor is 0"
        assert self.training, "Gate.update_bias: the gate must be in training mode"
        load = self._cumulative_expert_load
        assert load is not None, "Gate.update_bias: no forward in training mode since the last call"
        self._cumulative_expert_load = None
        buffer = self.e_score_correction_bias
        assert buffer is not None
        if isinstance(buffer, DTensor):
            mesh = buffer.device_mesh
            load = DTensor.from_local(load, mesh, [Partial()] * mesh.ndim).full_tensor()
        bias = local_tensor(buffer)
        # The master copy keeps steps that the buffer's dtype would round away. An entry that is not
        # the master's rounded was written by somebody else, a checkpoint say, and holds.
        master = bias.to(torch.float32, copy=True)
        if self.e_score_correction_bias_master is not None:
            kept = self.e_score_correction_bias_master.to(bias.device)
            master = torch.where(kept.to(bias.dtype) == bias, kept, master)
        wide = load.to(torch.float32)
        master += self.bias_update_factor * torch.sign(wide.mean() - wide)
        self.e_score_correction_bias_master = master
        bias.copy_(master)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        name = prefix + "e_score_correction_bias"
        buffer, value = self.e_score_correction_bias, state_dict.get(name)
        if isinstance(buffer, DTensor) and isinstance(value, Tensor):
            if not isinstance(value, DTensor):
                mesh = buffer.device_mesh
                value = DTensor.from_local(
                    value.to(buffer.device), mesh, [Replicate()] * mesh.ndim, run_check=False
                )
            state_dict = {**state_dict, name: value}
        elif isinstance(value, DTensor):  # of a router that shared its bias, which is replicated
            state_dict = {**state_dict, name: local_tensor(value)}
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def init_weights(
        self, buffer_device: torch.device | str | None = None, init_std: float = 0.02
    ) -> None:
        """Draw the projection from N(0, init_std) and zero the biases."""
        draw_normal(self.weight, init_std)
        if self.bias is not None:
            local_tensor(self.bias).zero_()
        self.e_score_correction_bias_master = None
        self._cumulative_expert_load = None
        buffer = self.e_score_correction_bias
        if buffer is None:
            return
        if buffer_device is not None and buffer.device.type != torch.device(buffer_device).type:
            self.e_score_correction_bias = torch.zeros_like(buffer, device=buffer_device)
        else:
            local_tensor(buffer).zero_()


class FakeBalancedGate(nn.Module):
    """A router without parameters that spreads the tokens evenly, to measure everything else.

    Args:
        config: sizes.
        skip_first_n_experts: experts that get no tokens.
        noise: 0 for perfect balance and equal weights; up to 1 for random weights and a random
            choice. The random numbers depend on the input alone, so that a repeated forward repeats
            them.

    Raises:
        ValueError: fewer experts remain than a token needs, or noise outside [0, 1].
        TypeError: no configuration, or no numbers.
    """

    def __init__(
        self, config: MoEConfig, skip_first_n_experts: int = 0, noise: float = 0.0
    ) -> None:
        super().__init__()
        needed = ("n_routed_experts", "n_activated_experts")
        check_attributes("FakeBalancedGate", "config", config, MoEConfig, needed)
        check_count("FakeBalancedGate", "skip_first_n_experts", skip_first_n_experts)
        check_number("FakeBalancedGate", "noise", noise)
        self.n_routed_experts = config.n_routed_experts
        self.n_activated_experts = config.n_activated_experts
        self.skip_first_n_experts = skip_first_n_experts
        self.noise = noise
        self.bias_update_factor = 0.0
        if not 0 <= skip_first_n_experts <= self.n_routed_experts - self.n_activated_experts:
            raise ValueError(
                "FakeBalancedGate: skip_first_n_experts must be in [0, "
                f"{self.n_routed_experts - self.n_activated_experts}] (n_routed_experts - "
                f"n_activated_experts); got {skip_first_n_experts}"
            )
        if not 0 <= noise <= 1:
            raise ValueError(f"FakeBalancedGate: noise must be in [0, 1]; got {noise}")

    def forward(
        self, x: Tensor, token_mask: Tensor, cp_mesh: DeviceMesh | None
    ) -> tuple[Tensor, Tensor, None]:
        """``(weights [T, K] in x.dtype, indices [T, K] int64, None)`` for ``x [T, H]``."""
        check_tensor("FakeBalancedGate", "x", x, 2, "[T, H]")
        tokens, top_k = x.shape[0], self.n_activated_experts
        available = self.n_routed_experts - self.skip_first_n_experts
        if self.noise == 0:
            weights = x.new_full((tokens, top_k), 1 / top_k)
            slots = torch.arange(tokens * top_k, device=x.device)
            indices = (slots % available).view(tokens, top_k)
        else:
            generator = torch.Generator(x.device).manual_seed(_content_seed(x))
            random: dict[str, Any] = {"generator": generator, "device": x.device}
            share = torch.rand(tokens, top_k, **random)
            share = share / share.sum(-1, keepdim=True).clamp(min=1e-20)
            weights = (1 - self.noise) / top_k + self.noise * share
            preference = self.noise * 0.1 * torch.randn(available, **random)
            scores = torch.rand(tokens, available, **random) + preference
            indices = scores.topk(top_k, dim=-1).indices
        return weights.to(x.dtype), indices + self.skip_first_n_experts, None

    def update_bias(self) -> None:
        """Nothing to update."""

    def init_weights(
        self, buffer_device: torch.device | str | None = None, init_std: float = 0.02
    ) -> None:
        """Nothing to initialise."""


def _content_seed(x: Tensor) -> int:
    """A seed that equal contents share: the sum of the elements' bits, free of rounding."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(x.detach().contiguous().view(integers[x.element_size()]).sum()) % 2**63
