"""The routed experts, on one device and on many.

T tokens, D hidden size of the experts, I intermediate size, E experts, K experts a token,
W = 2 * I columns for gated activations, else I.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moe_kernels import fused_experts, reference, rounded_rows
from moe_kernels.ops._checks import INDEX_DTYPES, check_dtype, check_tensor, shape
from moe_parallel.config import EXPERT_ACTIVATIONS, BackendConfig, MoEConfig, check_attributes
from moe_parallel.dispatch import Dispatched, LocalDispatcher, TokenDispatcher, build_dispatcher
from moe_parallel.tensors import draw_normal, local_tensor

NEEDED = ("n_routed_experts", "expert_dim", "moe_inter_dim", "expert_activation", "dtype")
NEEDED_OF_BACKEND = ("experts", "experts_precision")


def _activation_options(config: MoEConfig) -> tuple[dict[str, Any], bool]:
    """The options of :func:`moe_kernels.fused_experts`, and whether the activation has a gate."""
    kind = config.expert_activation
    if kind == "swiglu":
        limit = {"limit": config.swiglu_limit} if config.swiglu_limit > 0 else {}
        return {"activation": kind, **limit}, True
    if kind in ("swigluoai", "quick_geglu"):
        # One formula; quick_geglu's gate and up columns alternate.
        return {
            "activation": "swigluoai",
            "interleaved": kind == "quick_geglu",
            "alpha": config.activation_alpha,
            "limit": config.activation_limit,
        }, True
    if kind in ("geglu", "relu2"):
        return {"activation": kind}, kind == "geglu"
    raise ValueError(
        f"GroupedExperts: expert_activation must be one of {', '.join(EXPERT_ACTIVATIONS)}; "
        f"got {kind!r}"
    )


def _check_tokens(x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> None:
    op = "GroupedExperts"
    check_tensor(op, "x", x, 2, "[T, D]")
    check_tensor(op, "token_mask", token_mask, 1, "[T]")
    check_dtype(op, "token_mask", token_mask, (torch.bool,))
    check_tensor(op, "indices", indices, 2, "[T, K]")
    check_dtype(op, "indices", indices, INDEX_DTYPES)
    check_tensor(op, "weights", weights, 2, "[T, K]")
    if weights.shape != indices.shape:
        raise ValueError(f"{op}: weights must be {shape(indices)} as indices; got {shape(weights)}")
    for name, value in (("token_mask", token_mask), ("indices", indices)):
        if value.shape[0] != x.shape[0]:
            raise ValueError(
                f"{op}: {name} must have T = {x.shape[0]} rows (x.shape[0]); got {shape(value)}"
            )


class GroupedExperts(nn.Module):
    """The experts' weights, and the way of the tokens to them.

    Parameters, with the expert in dimension 0: ``gate_and_up_projs [E, D, W]`` and ``down_projs
    [E, I, D]``; with ``expert_bias`` also ``gate_up_proj_bias [E, W]`` and ``down_proj_bias
    [E, D]``, else None. Under Expert Parallelism they are DTensors ``Shard(0)``.

    Args:
        config: sizes and activation.
        backend: dispatcher and implementation.

    Raises:
        ValueError: an unknown activation.
        TypeError: no configuration, or none of a backend.
    """

    def __init__(self, config: MoEConfig, backend: BackendConfig | None = None) -> None:
        super().__init__()
        check_attributes("GroupedExperts", "config", config, MoEConfig, NEEDED)
        self.config = config
        self.backend = BackendConfig() if backend is None else backend
        check_attributes(
            "GroupedExperts", "backend", self.backend, BackendConfig, NEEDED_OF_BACKEND
        )
        self.n_routed_experts = config.n_routed_experts
        self.token_dispatcher: TokenDispatcher = LocalDispatcher()
        self._options, gated = _activation_options(config)
        experts, dim, inner = config.n_routed_experts, config.expert_dim, config.moe_inter_dim
        width = 2 * inner if gated else inner

        def parameter(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(experts, *size, dtype=config.dtype))

        self.gate_and_up_projs = parameter(dim, width)
        self.down_projs = parameter(inner, dim)
        self.gate_up_proj_bias = parameter(width) if config.expert_bias else None
        self.down_proj_bias = parameter(dim) if config.expert_bias else None
        nn.init.normal_(self.gate_and_up_projs, std=0.02)
        nn.init.normal_(self.down_projs, std=0.02)

    @property
    def dispatcher_settings(self) -> dict[str, Any]:
        """What :func:`build_dispatcher` is asked for, beside the group."""
        return {
            "num_experts": self.n_routed_experts,
            "transport": self.backend.dispatcher,
            "timeout": self.backend.dispatcher_timeout,
            "max_tokens": self.backend.dispatcher_max_tokens,
            "capacity": self.backend.dispatcher_capacity,
            "slot_capacity": self.backend.dispatcher_slot_capacity,
        }

    def build_token_dispatcher(self, ep_mesh: DeviceMesh) -> TokenDispatcher:
        """What :meth:`init_token_dispatcher` would have these experts use; they do not yet.

        Raises:
            ValueError: E is not a multiple of the mesh's size, or its ranks cannot use the
                transport.
            ImportError: the transport is "deepep", and DeepEP is not installed.
        """
        return build_dispatcher(ep_mesh.get_group(), **self.dispatcher_settings)

    def init_token_dispatcher(self, ep_mesh: DeviceMesh) -> None:
        """Send tokens to the ranks of the 1-D ``ep_mesh``, each of which owns E / size experts.

        Raises:
            ValueError, ImportError: see :meth:`build_token_dispatcher`.
        """
        self.token_dispatcher = self.build_token_dispatcher(ep_mesh)

    @property
    def overlaps(self) -> bool:
        """Whether forward has something to do for the caller while tokens travel."""
        return hasattr(self.token_dispatcher, "dispatch_async")

    def forward(
        self,
        x: Tensor,
        token_mask: Tensor,
        weights: Tensor,
        indices: Tensor,
        meanwhile: Callable[[], None] | None = None,
    ) -> Tensor:
        """The weighted sum of each token's experts.

        Args:
            x: [T, D]; T may differ between the ranks, and be 0.
            token_mask: [T] bool; the experts see nothing of tokens that are False.
            weights: [T, K] routing weights, any float dtype.
            indices: [T, K] expert ids, int32 or int64; -1 and E mean "no expert".
            meanwhile: called once, while the tokens travel if :attr:`overlaps`.

        Returns:
            [T, D] in x.dtype; zero for masked tokens.

        Raises:
            TypeError, ValueError: arguments that do not fit; of other ranks, a RuntimeError that
                names the rank.
        """
        try:
            _check_tokens(x, token_mask, weights, indices)
        except (TypeError, ValueError):
            self.tell_refused(x)
            raise
        ids = torch.where(token_mask[:, None], indices, -1)
        start: Any = getattr(self.token_dispatcher, "dispatch_async", None)
        if meanwhile is not None and start is not None:
            pending = start(x, ids, weights)
            meanwhile()
            dispatched = pending.wait()
        else:
            dispatched = self.token_dispatcher.dispatch(x, ids, weights)
            if meanwhile is not None:
                meanwhile()
        y = self._compute(dispatched)
        return self.token_dispatcher.combine(y.to(x.dtype), dispatched.handle)

    def tell_refused(self, x: Any) -> None:
        """What a rank does whose arguments do not fit: a call that has nothing right, of which the
        others learn instead of waiting for this rank's tokens. By ``x`` the dispatcher chooses the
        way that it takes, as they do."""
        nothing: Any = None
        with suppress(Exception):
            tokens = x.new_empty(0, self.config.expert_dim) if isinstance(x, Tensor) else nothing
            self.token_dispatcher.dispatch(tokens, nothing, nothing)

    def _compute(self, tokens: Dispatched) -> Tensor:
        def weight(parameter: Tensor) -> Tensor:
            return local_tensor(parameter).to(tokens.x.dtype)

        def bias(parameter: Tensor | None) -> Tensor | None:
            return None if parameter is None else weight(parameter)

        arguments = (
            tokens.x,
            weight(self.gate_and_up_projs),
            weight(self.down_projs),
            tokens.topk_ids,
            tokens.topk_weights,
        )
        options = {
            **self._options,
            "gate_up_bias": bias(self.gate_up_proj_bias),
            "down_bias": bias(self.down_proj_bias),
        }
        if self.backend.experts == "reference":
            return reference.fused_experts(*arguments, **options)
        return fused_experts(
            *arguments,
            **options,
            num_rows=self._num_rows(tokens),
            precision=self.backend.experts_precision,
        )

    def _num_rows(self, tokens: Dispatched) -> int | None:
        """The dispatcher's bound of the slots in use, or that of token rounding without one."""
        config = self.config
        rounded = tokens.topk_ids.shape[1] > config.n_activated_experts
        if tokens.num_rows is not None or not rounded or config.token_rounding is None:
            return tokens.num_rows
        return rounded_rows(
            tokens.topk_ids.shape[0],
            config.n_activated_experts,
            config.n_routed_experts,
            tile=config.token_rounding_tile,
            mode=config.token_rounding,
        )

    @torch.no_grad()
    def init_weights(
        self, buffer_device: torch.device | str | None = None, init_std: float = 0.02
    ) -> None:
        """Draw the matrices from N(0, init_std) and zero the biases."""
        for matrix in (self.gate_and_up_projs, self.down_projs):
            draw_normal(matrix, init_std)
        for bias in (self.gate_up_proj_bias, self.down_proj_bias):
            if bias is not None:
                local_tensor(bias).zero_()
