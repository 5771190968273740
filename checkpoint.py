"""Checkpoints: written atomically, read with weights_only, resumed strictly; backbones from any published layout."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import flags
import parallel
from layouts import HEAD, STORED_OPTIONS, Weights, backbone_state, read, recognize, stored_args
from utils import IMAGENET_MEAN, IMAGENET_STD
from vision_transformer import VITS, XCITS, build_backbone

NAME, PREVIOUS, BEST = "checkpoint.pth", "checkpoint_prev.pth", "checkpoint_best.pth"

NUMBERED = re.compile(r"checkpoint(\d+)\.pth")

MIN_MATCHED = 0.9  # share of the backbone's tensors that a file must hold to pass for its weights


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
        if flags.worker_death(error):  # torch raises that wherever the process stands
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


# ---- Backbones ----


def load_matching(model: nn.Module, state: Mapping[str, Tensor], path: str, min_matched: float = MIN_MATCHED) -> None:
    """Copy the tensors whose name and shape fit into the model, and print `N of M tensors matched`.

    Position embeddings of another picture size are refused, not resized: build the network for the file's size.

    Raises:
        ValueError: fewer than `min_matched` of the model's tensors are in the file.
    """
    own = model.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    missing = sorted(own.keys() - fitting.keys())
    wrong = [f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}" for k in missing if k in state]
    unused = sorted(k for k in state if k not in own and not HEAD.match(k))
    report = f"{path}: {len(fitting)} of {len(own)} tensors matched"
    absent = [k for k in missing if k not in state]
    for what, names in (("missing", absent), ("wrong shape", wrong), ("unused", unused)):
        if names:
            report += f"; {what}: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    if len(fitting) < min_matched * len(own):
        raise ValueError(f"--pretrained_weights {report}; does --arch fit the file?")
    model.load_state_dict(fitting, strict=False)
    if parallel.is_main():
        print(report, flush=True)


def load_backbone(
    weights: str, arch: str | None = None, patch_size: int | None = None, checkpoint_key: str = "teacher"
) -> tuple[nn.Module, dict]:
    """A frozen backbone in eval mode from a file of weights, and how its images are made.

    Args:
        weights: a checkpoint of this project, a published full checkpoint or a plain state dict; "" gives random
            weights, and says so.
        arch, patch_size: of the network; what the file itself says comes first, then these, then vit_small and 16.

    Returns:
        The network, and {arch, patch_size, embed_dim, in_chans, mean, std, global_crops_size}.

    Raises:
        FileNotFoundError, ValueError: no such file, not a checkpoint, or not this architecture's.
    """
    try:
        loaded = read(weights) if weights else {}
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"--pretrained_weights {error}") from error
    args = stored_args(loaded)
    state = backbone_state(loaded, checkpoint_key, weights) if weights else {}
    known = args.get("arch") in (None, *VITS, *XCITS)  # tensors of other networks have the names that these give them
    found = recognize(state) if known else Weights("", None, {}, state)
    info = {
        "arch": args.get("arch") or found.arch or arch or "vit_small",
        "patch_size": found.options.get("patch_size") or args.get("patch_size") or patch_size or 16,
        "in_chans": found.options.get("in_chans") or args.get("in_chans", 3),
        "mean": tuple(args.get("mean", IMAGENET_MEAN)),
        "std": tuple(args.get("std", IMAGENET_STD)),
        "global_crops_size": args.get("global_crops_size", 224),
    }
    options = {"img_size": args["global_crops_size"]} if "global_crops_size" in args else {}
    options |= found.options | {k: args[k] for k in STORED_OPTIONS if k in args}
    options |= {k: info[k] for k in ("patch_size", "in_chans")}
    model, embed_dim = build_backbone(info["arch"], **options)
    info["embed_dim"] = embed_dim
    if weights:
        layout = f", {found.layout} names" if found.layout else ""
        load_matching(model, found.state, f"{weights} ({info['arch']}{layout})")
    elif parallel.is_main():
        print("no --pretrained_weights: the network has random weights", flush=True)
    return model.eval().requires_grad_(False), info
