"""An alpha-beta model of the exchange of tokens between GPUs. Nothing here is measured.

T tokens a GPU, H hidden size, E experts, K experts a token, P GPUs, G of them in a node.

The assumptions, with their sources, and what the model leaves out are in docs/dispatch-model.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import comb
from typing import Any

FP8_BLOCK = 128  # values that share a float32 scale
INDEX_BYTES = 4  # of an expert's id, and of a weight in dispatch


@dataclass(frozen=True)
class Link:
    """What one GPU has of a network.

    Attributes:
        latency: seconds until the first byte arrives.
        bandwidth: usable bytes a second, one way.
    """

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Machine:
    """Assumptions about a cluster; docs/dispatch-model.md says where they come from.

    Attributes:
        gpus_per_node: that NVLink joins; each has a network card of its own.
        nvlink, rdma: within a node and between nodes.
        memory: bytes read and written a second in a GPU's memory.
        launch: seconds to start a kernel.
        sync: seconds that the host loses when it waits for a value.
        collective: seconds to start a collective of NCCL, beyond the launch.
        nvlink_peer, rdma_peer: seconds that a collective needs for each other rank.
        rdma_write: seconds that a network card needs for a message of a kernel of its own.
    """

    gpus_per_node: int = 8
    nvlink: Link = Link(3.3e-6, 360e9)
    rdma: Link = Link(3.7e-6, 46e9)
    memory: float = 3.0e12
    launch: float = 5e-6
    sync: float = 10e-6
    collective: float = 10e-6
    nvlink_peer: float = 0.5e-6
    rdma_peer: float = 1.0e-6
    rdma_write: float = 0.03e-6


@dataclass(frozen=True)
class Layer:
    """What is exchanged. K distinct experts a token, all equally likely; E / P experts a GPU."""

    tokens: int
    hidden: int
    experts: int
    top_k: int
    fp8_dispatch: bool = False

    def row_bytes(self, direction: str) -> float:
        """A token's row on the wire: with its ids and weights in dispatch, in bf16 in combine."""
        if direction == "combine":
            return 2.0 * self.hidden
        values = self.hidden * (1 + 4 / FP8_BLOCK) if self.fp8_dispatch else 2.0 * self.hidden
        return values + self.top_k * 2 * INDEX_BYTES

    def hit(self, groups: int) -> float:
        """The probability that a token has an expert in one of ``groups`` equal groups of them."""
        elsewhere = self.experts - self.experts // groups
        return 1 - comb(elsewhere, self.top_k) / comb(self.experts, self.top_k)


@dataclass(frozen=True)
class Traffic:
    """Rows that one GPU has to send, on average; as many arrive.

    Attributes:
        own: that stay on the GPU.
        nvlink: to GPUs of its node, and passed on within it for those of other nodes.
        rdma: to other nodes.
    """

    own: float
    nvlink: float
    rdma: float

    @property
    def all(self) -> float:
        return self.own + self.nvlink + self.rdma


def _in_node(machine: Machine, gpus: int) -> int:
    return min(machine.gpus_per_node, gpus)


def per_copy(layer: Layer, machine: Machine, gpus: int) -> Traffic:
    """A row for each expert of a token."""
    each = layer.tokens * layer.top_k / gpus
    near = _in_node(machine, gpus)
    return Traffic(each, (near - 1) * each, (gpus - near) * each)


def per_rank(layer: Layer, machine: Machine, gpus: int) -> Traffic:
    """A row for each GPU that has experts of a token."""
    each = layer.tokens * layer.hit(gpus)
    near = _in_node(machine, gpus)
    return Traffic(each, (near - 1) * each, (gpus - near) * each)


def per_node(layer: Layer, machine: Machine, gpus: int) -> Traffic:
    """A row for each node, passed on there to the GPUs but the one that it arrives at."""
    nodes = gpus // _in_node(machine, gpus)
    each = layer.tokens * layer.hit(gpus)
    across = (nodes - 1) * layer.tokens * layer.hit(nodes)
    return Traffic(each, (gpus - nodes) * each, across)


SENDINGS: Mapping[str, Callable[[Layer, Machine, int], Traffic]] = {
    "per copy": per_copy,
    "per rank": per_rank,
    "per node": per_node,
}


@dataclass(frozen=True)
class Software:
    """What a call costs beyond the links: seconds a call, and a row that is sent."""

    call: float
    row: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """Seconds of one direction, by what they go to; links that work side by side count once."""

    parts: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def bottleneck(self) -> str:
        """The largest part."""
        return max(self.parts, key=lambda name: self.parts[name])


@dataclass(frozen=True)
class Transport:
    """How one transport works, as far as its time goes.

    Attributes:
        sending: what travels, a key of SENDINGS.
        software: its own cost in "dispatch" and "combine" on a machine.
        round_trips: latencies that follow each other, in each direction.
        collective: NCCL's cost for each other rank is paid, in dispatch twice: counts go first.
        packs: rows are gathered into a buffer before they are sent.
        writes: each row that goes to another node is a message of its own.
        one_node: it needs NVLink between all GPUs.
    """

    name: str
    sending: str
    software: Callable[[Machine, str], Software]
    round_trips: Mapping[str, int]
    collective: bool = False
    packs: bool = False
    writes: bool = False
    one_node: bool = False

    def estimate(
        self,
        layer: Layer,
        machine: Machine,
        gpus: int,
        direction: str,
        software: Software | None = None,
    ) -> Estimate:
        """Time of "dispatch" or "combine" on ``gpus`` GPUs.

        Args:
            software: instead of the assumed one.
        """
        traffic = SENDINGS[self.sending](layer, machine, gpus)
        row = layer.row_bytes(direction)
        near, exchanges = _in_node(machine, gpus), 2 if direction == "dispatch" else 1
        far = gpus > near
        messages = {"nvlink": 0.0, "rdma": 0.0}
        if self.collective:
            messages["nvlink"] = exchanges * machine.nvlink_peer * (near - 1)
            messages["rdma"] = exchanges * machine.rdma_peer * (gpus - near)
        if self.writes:
            messages["rdma"] = machine.rdma_write * traffic.rdma
        carried = {
            "nvlink": traffic.nvlink * row / machine.nvlink.bandwidth,
            "rdma": traffic.rdma * row / machine.rdma.bandwidth,
        }
        slower = max(carried, key=lambda link: messages[link] + carried[link])
        latency = machine.rdma.latency if far else machine.nvlink.latency if gpus > 1 else 0.0
        own = software or self.software(machine, direction)
        # Packing reads and writes what is sent; combine reads every row and writes every token.
        moved = 2 * traffic.all * self.packs if direction == "dispatch" else 0.0
        if direction == "combine":
            moved = traffic.all + layer.tokens
        return Estimate(
            {
                "software": own.call + own.row * traffic.all,
                "latency": self.round_trips[direction] * latency,
                f"{slower} messages": messages[slower],
                f"{slower} bytes": carried[slower],
                "memory": moved * row / machine.memory,
            }
        )


def _collectives(machine: Machine, direction: str) -> Software:
    """Dispatch: layout, counts, a wait of the host for them, packing, rows; combine: rows, sum."""
    exchange = machine.collective + machine.launch
    if direction == "dispatch":
        return Software(2 * exchange + 2 * machine.launch + machine.sync)
    return Software(exchange + machine.launch)


def _three_kernels(machine: Machine, direction: str) -> Software:
    """One leaves rows and tells the others, one waits for them, one fetches."""
    return Software(3 * machine.launch)


def _one_kernel(machine: Machine, direction: str) -> Software:
    return Software(machine.launch)


def _two_kernels(machine: Machine, direction: str) -> Software:
    """Dispatch: layout and counts, a wait of the host for them, rows; combine: one kernel."""
    if direction == "dispatch":
        return Software(2 * machine.launch + machine.sync)
    return Software(machine.launch)


TRANSPORTS: Mapping[str, Transport] = {
    transport.name: transport
    for transport in (
        Transport(
            "process_group",
            "per rank",
            _collectives,
            {"dispatch": 2, "combine": 1},
            collective=True,
            packs=True,
        ),
        Transport(
            "torch_all_to_all",
            "per copy",
            _collectives,
            {"dispatch": 2, "combine": 1},
            collective=True,
            packs=True,
        ),
        Transport(
            "cuda_ipc", "per rank", _three_kernels, {"dispatch": 2, "combine": 1}, one_node=True
        ),
        Transport("deepep", "per node", _two_kernels, {"dispatch": 2, "combine": 1}),
        Transport(
            "deepep_low_latency",
            "per copy",
            _one_kernel,
            {"dispatch": 1, "combine": 1},
            writes=True,
        ),
    )
}


def expert_parallel(layer: Layer, gpus: int) -> int:
    """GPUs that share the experts: with more GPUs than experts, groups work side by side."""
    return min(gpus, layer.experts)


def possible(transport: Transport, layer: Layer, machine: Machine, gpus: int) -> bool:
    ranks = expert_parallel(layer, gpus)
    return not (transport.one_node and ranks > machine.gpus_per_node)


def with_settings(machine: Machine, settings: Mapping[str, float]) -> Machine:
    """The machine with other assumptions, such as {"rdma.bandwidth": 25e9, "gpus_per_node": 72}.

    Raises:
        ValueError: an unknown name, or a value that is not positive.
    """
    links = ("nvlink", "rdma")
    known = [name for name in Machine.__dataclass_fields__ if name not in links]
    known += [f"{link}.{field}" for link in links for field in Link.__dataclass_fields__]
    for name, value in settings.items():
        if name not in known:
            raise ValueError(f"--set must name one of {', '.join(sorted(known))}; got {name!r}")
        if not 0 < value < float("inf"):
            raise ValueError(f"--set {name} must be positive and finite; got {value}")
        first, _, second = name.partition(".")
        if first == "gpus_per_node" and value != int(value):
            raise ValueError(f"--set {name} must be a whole number; got {value}")
        new: Any = int(value) if first == "gpus_per_node" else value
        if second:
            new = replace(getattr(machine, first), **{second: value})
        machine = replace(machine, **{first: new})
    return machine
