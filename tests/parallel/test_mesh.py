"""Meshes: who shares an axis with whom, and which requests are refused."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist

from moe_parallel import mesh
from moe_parallel.mesh import MeshError, build_meshes, get_submesh, parallel_axis_names
from moe_parallel.model_meshes import check_ep_shard_axes
from moe_parallel.refusals import refused_together
from tests.parallel.ranks import run_ranks


def _ranks_of(axis: Any) -> list[int]:
    return dist.get_process_group_ranks(axis.get_group())


def _groups(rank: int, ranks: int, sizes: dict[str, int]) -> dict[str, list[int]]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # slicing a root by a flattened axis is deprecated
        world_mesh, moe_mesh = build_meshes(**sizes)
        assert world_mesh.device_type == "cpu"
        axes = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "dp", "dp_shard_cp", "dp_cp")
        groups = {name: _ranks_of(get_submesh(world_mesh, name)) for name in axes}
        for name in axes:
            total = torch.full((), float(rank))
            dist.all_reduce(total, group=get_submesh(world_mesh, (name,)).get_group())
            assert total.item() == sum(groups[name]), name
        if moe_mesh is not None:
            assert moe_mesh.mesh_dim_names == ("ep_shard", "ep")
            assert moe_mesh._get_root_mesh() is world_mesh
            groups |= {name: _ranks_of(get_submesh(moe_mesh, name)) for name in ("ep_shard", "ep")}
            total = torch.full((), float(rank))
            dist.all_reduce(total, group=moe_mesh["ep"].get_group())
            assert total.item() == sum(groups["ep"])
        return groups


def test_neighbours_share_the_innermost_axes() -> None:
    results = run_ranks(8, _groups, {"pp": 2, "cp": 2, "ep": 2})
    assert results[5] == {
        "pp": [1, 5],
        "dp_replicate": [5],
        "dp_shard": [5, 7],
        "cp": [4, 5],
        "tp": [5],
        "dp": [5, 7],
        "dp_shard_cp": [4, 5, 6, 7],
        "dp_cp": [4, 5, 6, 7],
        "ep_shard": [5, 7],
        "ep": [4, 5],
    }
    replicated = run_ranks(8, _groups, {"dp_replicate": 2, "cp": 2, "ep": 4})
    assert replicated[6] == {
        "pp": [6],
        "dp_replicate": [2, 6],
        "dp_shard": [4, 6],
        "cp": [6, 7],
        "tp": [6],
        "dp": [0, 2, 4, 6],
        "dp_shard_cp": [4, 5, 6, 7],
        "dp_cp": list(range(8)),
        "ep_shard": [2, 6],
        "ep": [4, 5, 6, 7],
    }
    assert run_ranks(8, _groups, {"cp": 2, "tp": 2, "ep": 4})[6] == {
        "pp": [6],
        "dp_replicate": [6],
        "dp_shard": [2, 6],
        "cp": [4, 6],
        "tp": [6, 7],
        "dp": [2, 6],
        "dp_shard_cp": [0, 2, 4, 6],
        "dp_cp": [0, 2, 4, 6],
        "ep_shard": [2, 6],
        "ep": [4, 5, 6, 7],
    }
    assert "ep" not in run_ranks(2, _groups, {})[0]


def _submeshes(rank: int, ranks: int) -> tuple[Any, ...]:
    world_mesh, moe_mesh = build_meshes(dp_replicate=2, cp=2, ep=2)
    hybrid = get_submesh(world_mesh, ("dp_replicate", "dp_shard_cp"))
    assert hybrid.mesh_dim_names == ("dp_replicate", "dp_shard_cp")
    assert hybrid._get_root_mesh() is world_mesh
    total = torch.full((), float(rank))
    dist.all_reduce(total, group=hybrid["dp_replicate"].get_group())
    with pytest.raises(KeyError, match="no axis 'rows'; it has pp, dp_replicate, dp_shard, cp, tp"):
        get_submesh(world_mesh, "rows")
    with pytest.raises(KeyError, match=r"covers \('dp_shard_cp', 'dp_replicate'\) in this order"):
        get_submesh(world_mesh, ("dp_shard_cp", "dp_replicate"))
    with pytest.raises(KeyError, match="no flattened axis"):
        get_submesh(world_mesh, ("dp_shard_cp", "dp_shard"))
    for names in (("dp", "dp_shard"), ("dp_shard_cp", "cp")):  # one of the axes would fit
        with pytest.raises(KeyError, match="no flattened axis"):
            get_submesh(world_mesh, names)
    assert get_submesh(world_mesh, ("dp", "cp")).mesh_dim_names == ("dp", "cp")
    with pytest.raises(KeyError, match="no axis 'ep'"):
        get_submesh(world_mesh, "ep")
    with pytest.raises(KeyError, match="no axis 'dp_cp'; it has ep_shard, ep"):
        get_submesh(moe_mesh, "dp_cp")
    native = get_submesh(world_mesh, ("dp_shard", "cp"))
    assert native.mesh_dim_names == ("dp_shard", "cp")
    names = parallel_axis_names(world_mesh, moe_mesh)
    for key in ("dp_axis_names", "cp_axis_name", "tp_axis_name"):
        assert get_submesh(world_mesh, names[key]).size() > 0
    assert get_submesh(moe_mesh, names["ep_shard_axis_names"]).size() == 4
    return hybrid.mesh.tolist(), native.mesh.tolist(), total.item(), names


def test_flattened_axes_combine_where_a_larger_one_covers_them() -> None:
    for rank, (hybrid, native, total, names) in enumerate(run_ranks(8, _submeshes)):
        assert hybrid == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert native == ([[0, 1], [2, 3]] if rank < 4 else [[4, 5], [6, 7]])
        assert total == 2 * (rank % 4) + 4
        assert names == {
            "dp_axis_names": ("dp_replicate", "dp_shard_cp"),
            "cp_axis_name": "cp",
            "tp_axis_name": "tp",
            "ep_axis_name": "ep",
            "ep_shard_axis_names": ("ep_shard",),
        }


def _sharded_only(rank: int, ranks: int) -> dict[str, Any]:
    return parallel_axis_names(*build_meshes())


def test_names_without_replicas_and_experts() -> None:
    assert run_ranks(2, _sharded_only)[0] == {
        "dp_axis_names": ("dp_shard_cp",),
        "cp_axis_name": "cp",
        "tp_axis_name": "tp",
        "ep_axis_name": None,
        "ep_shard_axis_names": None,
    }


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"world_size": 8, "cp": 3}, r"multiple of tp \* cp \* pp = 1 \* 3 \* 1 = 3; got 8 ranks"),
        ({"world_size": 8, "tp": 3}, r"multiple of tp \* cp \* pp = 3 \* 1 \* 1 = 3; got 8 ranks"),
        ({"world_size": 8, "dp_replicate": 3}, r"dp_replicate must divide dp = 8 .*; got 3"),
        ({"world_size": 8, "dp_replicate": 8}, "dp_replicate must be smaller than dp = 8"),
        ({"world_size": 8, "pp": 2, "ep": 8}, r"ep must divide dp \* cp \* tp = 4 \* 1 \* 1 = 4"),
        ({"world_size": 8, "ep": 0}, "ep must be a positive integer; got 0"),
        ({"world_size": 8, "tp": 2.0}, "tp must be a positive integer; got 2.0"),
        ({}, "there is no process group"),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict[str, Any], message: str) -> None:
    assert issubclass(MeshError, ValueError)
    with pytest.raises(MeshError, match=message):
        build_meshes(**sizes)


def test_experts_may_be_spread_over_all_ranks_of_a_stage() -> None:
    sizes = {"dp_replicate": 1, "cp": 2, "tp": 2, "pp": 1, "ep": 8}
    assert mesh._data_parallel_size(sizes, 8) == 2


@pytest.mark.parametrize(
    ("backends", "gpus", "expected"),
    [
        ("cpu:gloo,cuda:nccl", True, "cuda"),
        ("cpu:gloo,cuda:nccl", False, "cpu"),
        ("cpu:gloo,cuda:gloo", True, "cpu"),
        (None, True, "cpu"),
    ],
)
def test_meshes_are_of_what_the_ranks_communicate_on(
    monkeypatch: pytest.MonkeyPatch, backends: str | None, gpus: bool, expected: str
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: backends is not None)
    monkeypatch.setattr(dist, "get_backend_config", lambda: backends)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    assert mesh._device_type() == expected


def test_axes_of_meshes_of_other_making_need_not_be_named() -> None:
    """Stages are no shards of experts, nor is what tells no size."""

    class Axes(dict[str, Any]):
        mesh_dim_names: Any = None

    ranks = SimpleNamespace(size=lambda: 2)
    staged = Axes(pp=ranks, ep=ranks)
    staged.mesh_dim_names = ("pp", "ep")
    sizeless = (object(), MagicMock(), SimpleNamespace(size={}.__getitem__))
    for other in (staged, *(Axes(ep=ranks, ep_shard=axis) for axis in sizeless)):
        check_ep_shard_axes(other, "ep", None)
    shards = SimpleNamespace(size=lambda: 2)
    with pytest.raises(MeshError, match=r"Pass ep_shard_axis_names=\('ep_shard',\)"):
        check_ep_shard_axes(Axes(ep=ranks, ep_shard=shards), "ep", None)


def _refused_in_a_stage(rank: int, ranks: int) -> None:
    def refuse(world_mesh: Any, refused: bool) -> None:
        with refused_together(world_mesh):
            if refused:
                raise OSError("no memory")

    with pytest.raises(MeshError, match=r"no memory \(in pipeline stage 1\)"):
        refuse(build_meshes(pp=2)[0], rank == 1)
    with pytest.raises(OSError, match=r"no memory$"):
        refuse(None, True)


def test_any_error_of_a_stage_reaches_the_others() -> None:
    run_ranks(2, _refused_in_a_stage)


def _other_world_size(rank: int, ranks: int) -> None:
    with pytest.raises(MeshError, match="must be that of the default process group, 2; got 4"):
        build_meshes(world_size=4)


def test_the_world_is_the_default_process_group() -> None:
    run_ranks(2, _other_world_size)
