"""Backbones from files of weights, whatever library wrote them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

import parallel
from method.photometric import IMAGENET_MEAN, IMAGENET_STD
from vision_transformer import VITS, XCITS, build_backbone
from weights.layouts import HEAD, STORED_OPTIONS, Weights, backbone_state, read, recognize, stored_args

MIN_MATCHED = 0.9  # share of the backbone's tensors that a file must hold to pass for its weights


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
