"""Attention over shared sequences is that of one process; the parts are put together exactly.

B sequences, N heads, G key and value heads, L tokens, D size of a head, P ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moe_parallel.activation_checkpointing import make_selective_checkpoint_context_fn
from moe_parallel.context_parallel import (
    ContextParallelAttention,
    ring,
    sequence_positions,
    shard_batch,
    shard_sequence,
    unshard_sequence,
)
from moe_parallel.context_parallel.exchange import Ranks, Transfer
from moe_parallel.parallelizer import apply_cp
from tests.parallel.ranks import run_ranks

COMM_TYPES = ("p2p", "all_gather", "a2a")


@dataclass(frozen=True)
class Case:
    comm_type: str
    dtype: torch.dtype = torch.float64
    is_causal: bool = True
    balanced: bool = True
    window: int | None = None
    scale: float | None = None
    heads: tuple[int, int] = (8, 4)
    tokens: int = 24
    keys: int | None = None  # as many as tokens
    sizes: tuple[int, int] = (16, 16)

    def attention(self) -> ContextParallelAttention:
        return ContextParallelAttention(
            is_causal=self.is_causal, scale=self.scale, window=self.window, balanced=self.balanced
        )

    def inputs(self) -> list[Tensor]:
        """Whole q, k, v and the gradient of the output, as projections leave them: transposed."""
        generator = torch.Generator().manual_seed(5)
        (n, g), (d, dv) = self.heads, self.sizes
        keys = self.tokens if self.keys is None else self.keys
        shapes = [(self.tokens, n, d), (keys, g, d), (keys, g, dv), (self.tokens, n, dv)]
        return [
            torch.randn(2, *shape, generator=generator, dtype=torch.float64)
            .to(self.dtype)
            .transpose(1, 2)
            for shape in shapes
        ]


CASES = [
    *(Case(c, is_causal=causal, balanced=balanced)
      for c in COMM_TYPES for causal in (True, False) for balanced in (True, False)),
    *(Case(c, torch.float32, scale=0.5) for c in COMM_TYPES),
    *(Case(c, dtype, tokens=136, heads=(4, 4)) for c in COMM_TYPES
      for dtype in (torch.bfloat16, torch.float16)),
    *(Case(c, balanced=balanced, window=window) for c in ("all_gather", "a2a")
      for balanced in (True, False) for window in (2, 7, 100)),
    *(Case(c, sizes=(12, 7)) for c in COMM_TYPES),
    *(Case(c, torch.float32, is_causal=False, keys=48) for c in ("p2p", "all_gather")),
    *(Case(c, tokens=8) for c in COMM_TYPES),
    *(Case(c, tokens=4, balanced=False) for c in COMM_TYPES),  # one a rank, of 4 ranks
    Case("p2p", heads=(3, 1)),
    Case("all_gather", heads=(3, 3), window=5),
]  # fmt: skip


def share(attention: ContextParallelAttention, comm_type: str) -> ContextParallelAttention:
    group = dist.group.WORLD
    attention.set_context_parallel_group(
        group, dist.get_process_group_ranks(group), None, cp_comm_type=comm_type
    )
    return attention


def cut(tensor: Tensor, balanced: bool = True) -> Tensor:
    return shard_sequence(tensor, dist.group.WORLD, 2, balanced=balanced)


def whole(tensor: Tensor, balanced: bool = True) -> Tensor:
    return unshard_sequence(tensor, dist.group.WORLD, 2, balanced=balanced)


def run(attention: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Output and gradients, of a second backward through the same graph too."""
    *leaves, grad = (tensor.detach().clone() for tensor in inputs)
    for leaf in leaves:
        leaf.requires_grad_()
    out = attention(*leaves)
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    second = torch.autograd.grad(out, leaves, grad)
    for a, b in zip(first, second, strict=True):
        assert a.is_cuda or torch.equal(a, b)  # GPU kernels add in any order
    return [out.detach(), *second]


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def _errors(rank: int, ranks: int, cases: list[Case]) -> list[list[tuple[float, float]]]:
    """Of output and gradients: our relative error, and that of one process in the same dtype."""
    found = []
    for case in cases:
        inputs = case.inputs()
        truth = run(case.attention(), [tensor.double() for tensor in inputs])
        yardstick = run(case.attention(), inputs)
        shared = share(case.attention(), case.comm_type)
        parts = run(shared, [cut(tensor, case.balanced) for tensor in inputs])
        for tensor in parts:
            assert tensor.dtype == case.dtype
        ours = [whole(tensor, case.balanced) for tensor in parts]
        pairs = zip(ours, yardstick, truth, strict=True)
        found.append([(error(o, t), error(y, t)) for o, y, t in pairs])
    return found


@pytest.mark.parametrize("ranks", [2, 4, pytest.param(3, marks=pytest.mark.slow)])
def test_equals_one_process(ranks: int) -> None:
    """Of 3 ranks a2a needs heads for them: the others are enough."""
    cases = [c for c in CASES if c.tokens % (2 * ranks if c.balanced else ranks) == 0]
    cases = [c for c in cases if c.comm_type != "a2a" or c.heads[1] % ranks == 0]
    assert len(cases) >= (30 if ranks != 3 else 15)
    for found in run_ranks(ranks, _errors, cases):
        for case, errors in zip(cases, found, strict=True):
            for ours, yardstick in errors:
                limit = {torch.float64: 1e-12, torch.float32: 1e-6}.get(case.dtype)
                assert ours <= (1.5 * yardstick if limit is None else limit), (case, errors)


def _partial_gradients(rank: int, ranks: int) -> None:
    q, k, v, grad = (cut(tensor) for tensor in Case("p2p").inputs())
    for comm_type in COMM_TYPES:
        attention = share(ContextParallelAttention(), comm_type)
        expected = run(attention, [q, k, v, grad])
        for wanted in ((True, False, False), (False, True, False), (False, False, True)):
            leaves = [t.clone().requires_grad_(w) for t, w in zip((q, k, v), wanted, strict=True)]
            out = attention(*leaves)
            out.backward(grad)
            assert torch.equal(out.detach(), expected[0])
            for leaf, want, full in zip(leaves, wanted, expected[1:], strict=True):
                assert torch.equal(leaf.grad, full) if want else leaf.grad is None
        with torch.no_grad():
            assert torch.equal(attention(q, k, v), expected[0])
        with torch.inference_mode():
            assert torch.equal(attention(q, k, v), expected[0])
        strided = torch.stack([q, q], -1)[..., 0]
        assert strided.stride(-1) == 2
        assert torch.equal(attention(strided, k, v), expected[0])
        one = k[:, :, :1].expand_as(k)
        torch.testing.assert_close(attention(q, one, v), attention(q, one.contiguous(), v))
        with torch.autocast("cpu", torch.bfloat16):
            mixed = attention(q.float(), k.bfloat16(), v.float())
        low = attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
        assert torch.equal(mixed, low)
        empty = attention(q[:0], k[:0], v[:0])
        assert empty.shape == (0, *q.shape[1:])
        copied = copy.deepcopy(attention)
        assert torch.equal(copied(q, k, v), expected[0])
        assert comm_type in repr(copied)


def test_gradients_that_some_inputs_do_not_want() -> None:
    run_ranks(2, _partial_gradients)


def _raised(attention: ContextParallelAttention, inputs: list[Tensor]) -> tuple[str, str]:
    try:
        attention(*inputs)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def _wrong_calls(rank: int, ranks: int) -> dict[str, tuple[str, str]]:
    """Each is wrong on the last rank, or on all."""
    last = rank == ranks - 1
    q, k, v, _ = (cut(tensor) for tensor in Case("p2p").inputs())
    attention = share(ContextParallelAttention(), "p2p")
    found = {
        "dtypes": _raised(attention, [q, k.float() if last else k, v]),
        "dimensions": _raised(attention, [q[0] if last else q, k, v]),
        "heads": _raised(attention, [q, k[:, :3], v[:, :3]] if last else [q, k, v]),
        "lengths": _raised(attention, [t[:, :, :-2] if last else t for t in (q, k, v)]),
        "batch": _raised(attention, [t[:1] if last else t for t in (q, k, v)]),
        "all dtypes": _raised(attention, [t.float() if last else t for t in (q, k, v)]),
        "keys": _raised(attention, [q, k[:, :, :-1], v[:, :, :-1]]),
        "odd": _raised(attention, [t[:, :, 1:] for t in (q, k, v)]),
        "a2a": _raised(share(ContextParallelAttention(), "a2a"), [q, k[:, :1], v[:, :1]]),
        "scales": _raised(share(ContextParallelAttention(scale=rank + 1.0), "p2p"), [q, k, v]),
        "directions": _raised(
            share(ContextParallelAttention(is_causal=last), "all_gather"), [q, k, v]
        ),
    }
    try:
        unshard_sequence(q[:, :, 2 * rank :], dist.group.WORLD, 2)
    except ValueError as error:
        found["unshard"] = (type(error).__name__, str(error))
    assert attention(q, k, v).shape == q.shape  # the ranks are still in step
    return found


def test_wrong_calls_are_errors_on_every_rank() -> None:
    first, second = run_ranks(2, _wrong_calls)
    theirs = ("RuntimeError", "ContextParallelAttention: the arguments of rank 1 of the group are")
    for name, kind, message in (
        ("dtypes", "TypeError", "must all be bfloat16, float16, float32 or float64; got torch.f"),
        ("dimensions", "ValueError", r"must be [B, heads, tokens, size]; got [[8, 12, 16], ["),
        ("heads", "ValueError", "heads that divide its 8"),
    ):
        assert (first[name][0], first[name][1][: len(theirs[1])]) == theirs
        assert second[name][0] == kind
        assert message in second[name][1]
    for name, message in (
        ("lengths", "query.shape[2] must be equal on all ranks of the context parallel group"),
        ("batch", "query.shape[0] must be equal on all ranks"),
        ("all dtypes", "the dtype must be equal on all ranks"),
        ("keys", "needs as many keys as queries; got 12 queries and 11 keys"),
        ("odd", "got 11 tokens. Pad the sequence to a multiple of 4, or shard it with balanced="),
        ("a2a", "the 2 context parallel ranks divide; got 8 of query and 1 of key and value. Use"),
        ("scales", "scale must be equal on all ranks"),
        ("directions", "is_causal must be equal on all ranks"),
        ("unshard", "unshard_sequence: the length must be equal on all ranks"),
    ):
        for found in (first, second):
            assert found[name][0] == "ValueError", (name, found[name])
            assert message in found[name][1]


def _wrong_setups(rank: int, ranks: int) -> None:
    group, names = dist.group.WORLD, dist.get_process_group_ranks(dist.group.WORLD)
    with pytest.raises(ValueError, match=r"must be one of p2p, all_gather, a2a; got 'a2a.p2p'"):
        share(ContextParallelAttention(), "a2a+p2p")
    with pytest.raises(ValueError, match=r"global_ranks must be those of the group, \[0, 1\]"):
        ContextParallelAttention().set_context_parallel_group(group, [1, 0], None)
    with pytest.raises(ValueError, match="dropout_p must be 0 with a context parallel group"):
        share(ContextParallelAttention(dropout_p=0.1), "p2p")
    with pytest.raises(ValueError, match=r"'p2p' does not support a window; got 3. Use"):
        share(ContextParallelAttention(window=3), "p2p")
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([nn.Module()])
    block = model.model.layers[0]
    block.self_attn = nn.Module()
    block.self_attn.attn_module = ContextParallelAttention()
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("cp",))
    with pytest.raises(ValueError, match=r"cp_comm_type must be one of p2p, .*; got 'ring'"):
        apply_cp(model, mesh, "ring")
    assert not hasattr(model, "_cp_enabled")
    attention = share(ContextParallelAttention(), "p2p")
    attention.set_context_parallel_group(None, None, None)
    q, k, v, _ = Case("p2p").inputs()
    assert torch.equal(attention(q, k, v), ContextParallelAttention()(q, k, v))
    attention.set_context_parallel_group(group, names, None)
    leaf = cut(q).requires_grad_()
    (grad,) = torch.autograd.grad(attention(leaf, cut(k), cut(v)).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


def test_wrong_setups() -> None:
    run_ranks(2, _wrong_setups)
    for window, is_causal in ((0, True), (3, False)):
        with pytest.raises(ValueError, match="window must be at least 1, with is_causal=True"):
            ContextParallelAttention(window=window, is_causal=is_causal)
    for scale in (0.0, -0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale must be positive and finite"):
            ContextParallelAttention(scale=scale)


def test_without_a_group_it_is_plain_attention() -> None:
    q, k, v, _ = Case("p2p", dtype=torch.float32).inputs()
    expected = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(ContextParallelAttention()(q, k, v), expected)
    assert torch.equal(ContextParallelAttention(dropout_p=0.9).eval()(q, k, v), expected)
    assert not torch.equal(ContextParallelAttention(dropout_p=0.9)(q, k, v), expected)
    rows = ContextParallelAttention(window=1)(q, k, v)
    torch.testing.assert_close(rows, v.repeat_interleave(2, 1))


def _events_of_a_ring(rank: int, ranks: int) -> tuple[list[str], list[str], int, int]:
    events: list[str] = []
    shift, wait, attend, backward = Ranks.shift, Transfer.wait, ring.attend, ring.attend_backward

    def record(name: str, function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            events.append(name)
            return function(*args, **kwargs)

        return wrapped

    Ranks.shift, Transfer.wait = record("send", shift), record("wait", wait)  # type: ignore
    ring.attend = record("compute", attend)
    ring.attend_backward = record("compute", backward)
    q, k, v, grad = (cut(tensor) for tensor in Case("p2p").inputs())
    q.requires_grad_()
    kept = []
    attention = share(ContextParallelAttention(), "p2p")
    events.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = attention(q, k, v)
    forward = [event for event in events if event]
    events.clear()
    out.backward(grad)
    own = sum(tensor.numel() for tensor in (q, k, v, out)) + out[..., 0].numel()
    return forward[1:], events, sum(tensor.numel() for tensor in kept), own


def test_a_ring_sends_while_it_computes_and_keeps_its_own_alone() -> None:
    for forward, backward, kept, own in run_ranks(4, _events_of_a_ring):
        assert forward == ["send", "compute", "wait"] * 3 + ["compute"]
        # keys, then the gradients that follow them one step behind
        middle = ["send", "compute", "wait", "send", "wait"]
        assert backward == [
            *("send", "compute", "send", "wait"),
            *middle,
            *middle,
            *("compute", "wait", "send", "wait"),
        ]
        assert kept == own


def _sharding(rank: int, ranks: int) -> None:
    group = dist.group.WORLD
    ids = torch.arange(3 * 16).view(3, 16)
    for balanced in (True, False):
        options = {"balanced": balanced}
        part = shard_sequence(ids, group, **options)
        positions = sequence_positions(16, group, **options)
        assert torch.equal(part, ids[:, positions])
        assert torch.equal(unshard_sequence(part, group, **options), ids)
        assert part.untyped_storage().data_ptr() != ids.untyped_storage().data_ptr()
        for dim in (0, -1):
            y = torch.randn(16, 2, 8, generator=torch.Generator().manual_seed(1))
            assert torch.equal(
                unshard_sequence(cut_dim(y, dim, balanced), group, dim, **options), y
            )
        batch = shard_batch({"ids": ids, "labels": ids + 1}, group, **options)
        assert torch.equal(batch["labels"], part + 1)
        assert torch.equal(batch["position_ids"], positions[None])
        given = shard_batch({"ids": ids, "position_ids": ids}, group, **options)
        assert torch.equal(given["position_ids"], part)

        # The gradient of the sum of the ranks' losses, each of which weighs the whole differently.
        whole_weights = torch.arange(16.0) + 1
        x = shard_sequence(torch.randn(2, 16, dtype=torch.float64), group, **options)
        x.requires_grad_()
        (unshard_sequence(x, group, **options) * whole_weights * (rank + 1)).sum().backward()
        factor = sum(range(1, ranks + 1))
        assert torch.equal(x.grad, (whole_weights[positions] * factor).double().expand(2, -1))
        y = torch.zeros(16, requires_grad=True)
        shard_sequence(y, group, 0, **options).sum().backward()
        assert torch.equal(y.grad.nonzero().flatten(), positions.sort().values)

    with pytest.raises(ValueError, match=r"positive multiple of 8, 2 . 4 in the balanced order; "):
        shard_sequence(ids[:, :12], group)
    with pytest.raises(ValueError, match="or shard with balanced=False, or choose another"):
        shard_sequence(ids[:, :4], group)
    with pytest.raises(ValueError, match=r"positive multiple of 4, the number of ranks; got 2\. P"):
        shard_sequence(ids[:, :2], group, balanced=False)
    with pytest.raises(ValueError, match="got 0"):
        sequence_positions(0, group)
    with pytest.raises(IndexError, match=r"one of the 2 dimensions of \[3, 16\]; got 2"):
        shard_sequence(ids, group, 2)
    with pytest.raises(ValueError, match=r"all tensors must have one length along dim 1; got \{'a"):
        shard_batch({"a": ids, "b": ids[:, :8]}, group)
    with pytest.raises(ValueError, match="all tensors must have one length"):
        shard_batch({}, group)
    with pytest.raises(TypeError, match=r"must hold tensors; got NoneType as 'mask'. Leave it"):
        shard_batch({"ids": ids, "mask": None}, group)


def cut_dim(tensor: Tensor, dim: int, balanced: bool) -> Tensor:
    return shard_sequence(tensor, dist.group.WORLD, dim, balanced=balanced)


def test_shards_and_what_they_come_from() -> None:
    run_ranks(4, _sharding)


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(func.name())
        return func(*args, **(kwargs or {}))


def _as_ops(rank: int, ranks: int) -> None:
    q, k, v, grad = (cut(tensor) for tensor in Case("p2p").inputs())
    context_fn = make_selective_checkpoint_context_fn()
    for comm_type in COMM_TYPES:
        attention = share(ContextParallelAttention(), comm_type)
        expected = run(attention, [q, k, v, grad])
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]

        def block(*inputs: Tensor, attention: Any = attention) -> Tensor:
            return attention(*(t * 1 for t in inputs)).sin()

        with _Count() as count:
            out = checkpoint(block, *leaves, use_reentrant=False, context_fn=context_fn)
            out.backward(grad / expected[0].cos())
        names = ("context_attention", "whole_sequences", "flash_attention_for_cpu")
        forward = [call for call in count.calls if call.endswith(names)]
        assert len(forward) == (2 if comm_type == "a2a" else 1), forward
        for leaf, wanted in zip(leaves, expected[1:], strict=True):
            torch.testing.assert_close(leaf.grad, wanted, rtol=1e-10, atol=1e-10)

        compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
        for a, b in zip(run(compiled, [q, k, v, grad]), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        torch._dynamo.reset()
        compiled = torch.compile(attention, backend="aot_eager", fullgraph=True, dynamic=True)
        torch.testing.assert_close(compiled(q, k, v), expected[0], rtol=1e-12, atol=1e-12)


def test_checkpoints_and_compilation_see_ops() -> None:
    """Selective checkpointing keeps attention: forward runs once. Compiled it is one graph."""
    run_ranks(2, _as_ops, timeout=120)
