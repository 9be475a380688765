"""What the dispatchers are to those who make them, and their ops to PyTorch.

T tokens, H hidden size, K experts a token, E experts, P ranks.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad

from moe_parallel.dispatch import AllToAllDispatcher, LocalDispatcher, ops
from tests.parallel.ranks import run_ranks
from tests.parallel.test_dispatch import WAYS, dispatcher_of, make_case, raised


def _op_contract(rank: int, ranks: int, way: str) -> None:
    case = make_case(1, 0, 7, 5, 2, 4)
    x, weights = case.x.requires_grad_(), case.weights.requires_grad_()
    dispatcher = dispatcher_of(way, 4)
    name = dispatcher._name
    received = ops.dispatch(x, case.ids, weights, None, name)
    torch.library.opcheck(
        torch.ops.moe_kernels.dispatch,
        (x, case.ids, weights, None, name),
        # Not that a second run gives equal outputs: each dispatch has a number of its own.
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    y = received[0].detach().requires_grad_()
    handle = received[3:5]
    torch.library.opcheck(torch.ops.moe_kernels.combine, (y, *handle, name))
    grads = (received[0].detach(), received[2].detach())
    torch.library.opcheck(torch.ops.moe_kernels.dispatch_backward, (*grads, *handle, name))
    rows = received[0].shape[0]
    torch.library.opcheck(
        torch.ops.moe_kernels.combine_backward, (case.x.detach(), *handle, rows, name)
    )

    tokens = dispatcher.dispatch(x, case.ids, weights)
    out = dispatcher.combine(tokens.x.square(), tokens.handle)
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        dx.sum().backward()
    plain = [case.x.detach(), case.ids, case.weights.detach()]
    for i, name in ((0, "x"), (2, "topk_weights")):
        with forward_ad.dual_level():
            arguments = [*plain[:i], forward_ad.make_dual(plain[i], plain[i]), *plain[i + 1 :]]
            kind, message = raised(dispatcher.dispatch, *arguments)
        assert kind == "NotImplementedError"
        assert message.startswith(f"dispatch: {name} has a tangent")
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="combine: y has a"):
        dispatcher.combine(forward_ad.make_dual(y.detach(), y.detach()), tokens.handle)


@pytest.mark.parametrize("way", WAYS[:2])
def test_ops_keep_the_contract_of_custom_ops(way: str) -> None:
    run_ranks(1, _op_contract, way)


def _constructor(rank: int, ranks: int) -> list[tuple[str, str]]:
    group = dist.group.WORLD
    twin = copy.deepcopy(AllToAllDispatcher(group, 4, timeout=5))
    assert twin.transport == "shared_memory"
    assert twin.timeout == 5
    assert "num_experts=4" in repr(twin)
    assert copy.copy(twin) is twin
    kind, message = raised(pickle.dumps, twin)
    assert kind == "TypeError"
    assert message.startswith("AllToAllDispatcher: it cannot be pickled, for it is of this process")
    assert "all 2 ranks are processes of one machine" in twin.explain()
    plain = AllToAllDispatcher(group, 4, transport="process_group")
    assert plain.transport == "process_group"
    assert plain.explain() == "process_group carries tensors of the CPU: it was asked for"
    return [
        raised(lambda: AllToAllDispatcher(group, 4, transport="carrier_pigeon")),
        raised(lambda: AllToAllDispatcher(group, 5)),
        raised(lambda: AllToAllDispatcher(group, 4, timeout=0)),
        raised(lambda: AllToAllDispatcher(group, "4")),
        raised(lambda: AllToAllDispatcher(group, 2**31)),
        raised(lambda: AllToAllDispatcher(group, 4, timeout="x")),
        raised(lambda: AllToAllDispatcher(None, 4)),
        raised(lambda: AllToAllDispatcher(group, 4, max_tokens="x")),
        raised(lambda: AllToAllDispatcher(group, 4, timeout=float("inf"))),
    ]


def test_constructor_names_what_does_not_fit() -> None:
    results = run_ranks(2, _constructor)[0]
    assert [kind for kind, _ in results[:3]] == ["ValueError"] * 3
    assert results[3:] == [
        ("TypeError", "AllToAllDispatcher: num_experts must be an integer; got '4'"),
        (
            "ValueError",
            "AllToAllDispatcher: num_experts must be below 2**31, the range of int32 ids; got "
            "2147483648",
        ),
        ("TypeError", "AllToAllDispatcher: timeout must be a number; got 'x'"),
        ("TypeError", "AllToAllDispatcher: group must be a ProcessGroup; got NoneType"),
        ("TypeError", "AllToAllDispatcher: max_tokens must be an integer; got 'x'"),
        (
            "ValueError",
            "AllToAllDispatcher: timeout must be positive and at most 1e+09, in seconds; got inf. "
            "None is the group's own timeout.",
        ),
    ]
    assert (
        "must be one of auto, process_group, shared_memory, cuda_ipc; got 'carrier_pigeon'"
        in results[0][1]
    )
    assert "num_experts must be a positive multiple of the group's size 2; got 5" in results[1][1]
    assert "timeout must be positive and at most 1e+09, in seconds; got 0." in results[2][1]


def test_local_dispatcher_is_the_identity() -> None:
    case = make_case(1, 0, 7, 5, 2, 4)
    tokens = LocalDispatcher().dispatch(case.x, case.ids, case.weights)
    assert tokens.x is case.x
    assert tokens.topk_ids is case.ids
    assert tokens.topk_weights is case.weights
    assert LocalDispatcher().combine(case.x, tokens.handle) is case.x
    with pytest.raises(AttributeError):
        tokens.x = case.x
