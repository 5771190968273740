"""Checkpoints of a run: written atomically, read with weights_only=True; and the random state that they hold."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import atomic
import parallel
from parallel import Refused
from weights.layouts import BadFile, read

NAME, PREVIOUS, BEST = "checkpoint.pth", "checkpoint_prev.pth", "checkpoint_best.pth"

NUMBERED = re.compile(r"checkpoint(\d+)\.pth")


class NotSaved(parallel.Stopped, OSError):
    """A checkpoint that could not be written."""


def save(state: Mapping, path: str | os.PathLike) -> None:
    """Write a checkpoint. A kill at any moment leaves a complete one under `path`.

    The `checkpoint.pth` that is replaced is kept as `checkpoint_prev.pth`.

    Raises:
        NotSaved: the disk is full or the folder is not writable; an old checkpoint is intact.
    """
    path = Path(path)
    before = any(other.exists() for other in (path, path.with_name(NAME), path.with_name(PREVIOUS)))
    try:
        previous = path.with_name(PREVIOUS) if path.name == NAME else None
        with atomic.replacing(path, previous) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        if parallel.worker_death(error):  # torch raises it at whatever line the main thread executes
            raise
        kept = "the one before it is intact" if before else "there is none before it"
        again = "to resume" if before else "from the beginning"
        raise NotSaved(f"{path}: the checkpoint could not be written ({write_error(error)}); {kept}; free space in "
                       f"--output_dir and start again {again}") from error


def write_error(error: BaseException) -> str:
    """The operating system's reason for a failed write, which torch's own message does not have."""
    while error is not None and not (isinstance(error, OSError) and error.strerror):
        error = error.__cause__ or error.__context__
    return error.strerror if error else "the disk is full, or the file too large for a limit of this process"


def remove_numbered(folder: str | os.PathLike, keep: int) -> None:
    """Delete all but the newest `keep` of checkpoint0019.pth, checkpoint0039.pth, ...; no other file is touched."""
    numbered = [p for p in Path(folder).iterdir() if NUMBERED.fullmatch(p.name)]
    for path in sorted(numbered, key=lambda p: int(NUMBERED.fullmatch(p.name)[1]))[:-keep]:
        path.unlink()


def remove_temporary(folder: str | os.PathLike) -> None:
    """Delete the temporary files that a killed `save` left behind."""
    for path in Path(folder).glob(".checkpoint*.tmp"):
        path.unlink(missing_ok=True)


@contextmanager
def refusing(prefix: str) -> Iterator[None]:
    """Turn what `weights.layouts` raises for a bad file into Refused; `prefix` is the flag that names the file."""
    try:
        yield
    except (BadFile, FileNotFoundError, ImportError) as error:
        raise Refused(f"{prefix} {error}") from error


def read_latest(folder: str | os.PathLike) -> tuple[dict, Path] | None:
    """The newest readable checkpoint of a run and its path; None if there is none.

    If `checkpoint.pth` is damaged, prints its name and reads `checkpoint_prev.pth`. The tensors are mapped
    (`layouts.read`), so copy what you keep. `save` replaces the file and never writes into it.

    Raises:
        Refused: there are checkpoints, but none is readable.
    """
    errors = []
    for name in (NAME, PREVIOUS):
        path = Path(folder) / name
        try:
            if path.exists():
                return read(path, mapped=True), path
        except (BadFile, OSError) as error:
            errors.append(error)
            parallel.say(f"{error}; trying the one before it")
    if errors:
        raise Refused(f"--output_dir {folder}: {errors[0]}; no other checkpoint is left: choose another folder, or "
                      "move the file away to start from scratch")
    return None


# ---- Random state ----


def rng_state(device: torch.device) -> dict:
    """Random state of this process in plain types: Python's, NumPy's, torch's on the CPU, and the CUDA device's."""
    version, internal, gauss = random.getstate()
    kind, keys, pos, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), pos, has_gauss, cached],
    } | torch_rng_state(device)


def set_rng_state(state: Mapping, device: torch.device) -> None:
    """Restore what `rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, pos, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), pos, has_gauss, cached))
    set_torch_rng_state(state, device)


def torch_rng_state(device: torch.device) -> dict[str, Tensor]:
    """torch's random state on the CPU and on this device, which determines stochastic depth and dropout."""
    state = {"torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_torch_rng_state(state: Mapping, device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
