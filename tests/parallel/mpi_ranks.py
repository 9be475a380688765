"""Tests on ranks that mpirun starts and MPI joins, with a torch that is built with MPI."""

from __future__ import annotations

import faulthandler
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.parallel.ranks import GRACE

ROOT = Path(__file__).parents[2]
# Open MPI starts no more ranks than there are cores, and none as root, unless it is told to.
_OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


def run_mpi_ranks(
    ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0
) -> list[Any]:
    """As :func:`tests.parallel.ranks.run_ranks`, in a group of the backend "mpi"; the ``timeout``
    is that of the whole job.

    Raises:
        AssertionError: with the traceback of every rank that raised, and what mpirun has printed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "call").write_bytes(pickle.dumps((function, args, timeout)))
        command = ["mpirun", "-n", str(ranks), sys.executable, "-m", __name__, name]
        job = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **_OPEN_MPI},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout + 60,
            check=False,
        )
        results = {}
        for rank in range(ranks):
            with suppress(FileNotFoundError):
                results[rank] = torch.load(folder / str(rank), weights_only=False)
    failures = [f"--- rank {rank}: {what}" for rank, (fine, what) in results.items() if not fine]
    if failures or len(results) < ranks or job.returncode != 0:
        output = job.stdout.decode(errors="replace")
        raise AssertionError("\n".join([*failures, f"mpirun: status {job.returncode}", output]))
    return [results[rank][1] for rank in range(ranks)]


def _main(folder: Path) -> None:
    function, args, timeout = pickle.loads((folder / "call").read_bytes())
    faulthandler.dump_traceback_later(timeout, exit=True)  # on which mpirun ends the others
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("mpi")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    try:
        result = True, function(rank, ranks, *args)
    except BaseException:
        result = False, traceback.format_exc()
    torch.save(result, folder / f"{rank}.part")
    (folder / f"{rank}.part").rename(folder / str(rank))
    if not result[0]:
        time.sleep(GRACE)
        os._exit(1)  # an ordinary end would wait for the others, which may wait for this rank
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
