"""A folder of checkpoints: complete before they have their name, old ones kept until then.

A checkpoint is written as ``step-N.partial`` and renamed to ``step-N`` when it is complete. One of
the same step makes place as ``step-N.replaced``, which counts until the new one has the name. What
is removed is called ``*.partial`` first.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moe_parallel.checkpoint.agreement import CheckpointError

ABOUT = "checkpoint.json"
PARTIAL = ".partial"
REPLACED = ".replaced"
FORMAT = 1
_NAME = re.compile(rf"step-(\d+)({re.escape(REPLACED)})?")


def step_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def checkpoints(folder: str | Path) -> list[Path]:
    """Complete checkpoints in ``folder``, in the order written.

    That is not always the order of their steps: a run that began anew may follow a longer one.
    """
    found: dict[str, tuple[int, Path]] = {}
    for path in sorted(Path(folder).glob("step-*")):
        match = _NAME.fullmatch(path.name)
        about = read_json(path) if match else None
        if match and about is not None:
            # "step-N" sorts before "step-N.replaced", which it replaces
            found.setdefault(match[1], (about["serial"], path))
    return [path for _, path in sorted(found.values())]


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The last complete checkpoint in ``folder``; None if there is none."""
    found = checkpoints(folder)
    return found[-1] if found else None


def read_json(checkpoint: Path) -> dict[str, Any] | None:
    """What a complete checkpoint says of itself; None for anything else."""
    try:
        about = json.loads((checkpoint / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    complete = isinstance(about, dict) and isinstance(about.get("serial"), int)
    return about if complete else None


def check_is_checkpoint(checkpoint: Path) -> None:
    """Raise a CheckpointError that says what ``checkpoint`` is instead."""
    about = read_json(checkpoint)
    if about is None:
        inside = latest_checkpoint(checkpoint)
        if inside is not None:
            hint = f"It is a folder of checkpoints; the last one is {inside}."
        elif checkpoint.name.endswith(PARTIAL):
            hint = "Its writing was interrupted."
        else:
            hint = "latest_checkpoint(folder) finds the last complete one."
        what = "there is no such folder" if not checkpoint.is_dir() else f"it has no {ABOUT}"
        raise CheckpointError(f"{checkpoint} is not a checkpoint: {what}. {hint}")
    if about.get("format") != FORMAT:
        raise CheckpointError(
            f"{checkpoint} must have format {FORMAT}; got {about.get('format')}. Read it with the "
            "version of this package that wrote it."
        )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Keep other runs from writing checkpoints in ``folder``, which is made if it is missing, until
    the end of this, or of the process. File systems that cannot lock let them.

    Raises:
        CheckpointError: another run is writing one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"{folder} must have one run that writes checkpoints; another is writing one now. "
                "Give each run a folder of its own."
            ) from error
        except OSError:
            pass
        yield
    finally:
        with suppress(OSError):  # not only closed: a process forked meanwhile has the lock too
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def begin(folder: Path, step: int) -> Path:
    """Make the folder to write a checkpoint in, and clear what interrupted saves have left."""
    for left in folder.glob(f"step-*{PARTIAL}"):
        _remove(left)
    for left in folder.glob(f"step-*{REPLACED}"):
        final = left.with_name(left.name.removesuffix(REPLACED))
        if final.exists():
            _remove(left)
        else:
            left.rename(final)
    path = step_path(folder, step)
    partial = path.with_name(path.name + PARTIAL)
    partial.mkdir()
    return partial


def commit(partial: Path, about: dict[str, Any]) -> Path:
    """Give a written checkpoint its name, for good."""
    folder = partial.parent
    serials = [found["serial"] for path in checkpoints(folder) if (found := read_json(path))]
    about = {"format": FORMAT, "serial": 1 + max(serials, default=0), **about}
    path = partial / ABOUT
    with path.open("w", encoding="utf-8") as file:
        json.dump(about, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(partial)
    final = partial.with_name(partial.name.removesuffix(PARTIAL))
    replaced = final.with_name(final.name + REPLACED)
    if os.path.lexists(final):
        final.rename(replaced)
    partial.rename(final)
    sync_folder(folder)
    if os.path.lexists(replaced):
        _remove(replaced)
    return final


def prune(folder: Path, keep: int) -> None:
    """Remove all but the last ``keep`` checkpoints."""
    for old in checkpoints(folder)[:-keep]:
        _remove(old)


def _remove(path: Path) -> None:
    """Remove a folder; of a link to one, or a file, no more than that."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    if not path.name.endswith(PARTIAL):
        # at once no checkpoint any more, and what the next save clears if this is interrupted
        path = path.rename(path.with_name(path.name + PARTIAL))
    shutil.rmtree(path)


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
