"""Checkpoints of a run: written atomically, read with weights_only; and the random state they hold."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

import parallel
from weights.layouts import read

NAME, PREVIOUS, BEST = "checkpoint.pth", "checkpoint_prev.pth", "checkpoint_best.pth"

NUMBERED = re.compile(r"checkpoint(\d+)\.pth")


def save(state: Mapping, path: str | os.PathLike) -> None:
    """Write a checkpoint so that a kill at any moment leaves a whole one under `path` or its `_prev` name.

    Temporary file in the same folder, fsync, keep the old one as *_prev, rename, fsync of the folder.

    Raises:
        OSError: the disk is full or the folder read-only; the old checkpoint is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        temporary.unlink(missing_ok=True)
        if parallel.worker_death(error):  # torch raises that wherever the process stands
            raise
        raise OSError(f"{path}: the checkpoint could not be written ({error}); the one before it is intact; "
                      "free space in --output_dir and start again to resume") from error
    if path.name == NAME and path.exists():
        previous = path.with_name(PREVIOUS)
        previous.unlink(missing_ok=True)
        os.link(path, previous)
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_numbered(folder: str | os.PathLike, keep: int) -> None:
    """Delete all but the newest `keep` of checkpoint0019.pth, checkpoint0039.pth ...; no other file is touched."""
    found = [p for p in Path(folder).iterdir() if NUMBERED.fullmatch(p.name)]
    for path in sorted(found, key=lambda p: int(NUMBERED.fullmatch(p.name)[1]))[:-keep]:
        path.unlink()


def remove_temporary(folder: str | os.PathLike) -> None:
    """Delete what a killed `save` left of files it had not finished."""
    for path in Path(folder).glob(".checkpoint*.tmp"):
        path.unlink(missing_ok=True)


def read_latest(folder: str | os.PathLike) -> tuple[dict, Path] | None:
    """Newest readable checkpoint of a run, and where it was; None where there is none.

    A corrupt newest one is named, and the one before it is used.
    """
    errors = []
    for name in (NAME, PREVIOUS):
        path = Path(folder) / name
        try:
            if path.exists():
                return read(path), path
        except (ValueError, OSError) as error:
            errors.append(error)
            parallel.say(f"{error}; trying the one before it")
    if errors:
        raise ValueError(f"--output_dir {folder}: {errors[0]}; no other checkpoint is left: choose another folder, or "
                         "move it away to start anew")
    return None


# ---- Random state ----


def rng_state(device: torch.device) -> dict:
    """Random state of this process, as plain types: Python, NumPy, torch's CPU and the device's generator."""
    version, internal, gauss = random.getstate()
    kind, keys, pos, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), pos, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping, device: torch.device) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, pos, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), pos, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
