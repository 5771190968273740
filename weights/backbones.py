"""Load backbones from files of weights, whichever library wrote them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

import parallel
from method.photometric import IMAGENET_MEAN, IMAGENET_STD
from parallel import Refused
from vision_transformer import VITS, XCITS, build_backbone
from weights.checkpoints import refusing
from weights.layouts import HEAD, STORED_OPTIONS, Weights, backbone_state, read, recognize, stored_args

MIN_MATCHED = 0.9  # share of the backbone's tensors that a file must contain


def load_matching(model: nn.Module, state: Mapping[str, Tensor], path: str, flag: str = "--pretrained_weights") -> None:
    """Copy the tensors whose name and shape match into the model, and print `N of M tensors matched`.

    Position embeddings are not resized: build the network for the image size of the file.

    Args:
        path: the file, for messages.
        flag: the flag that names the file, for messages.

    Raises:
        Refused: the file contains less than MIN_MATCHED of the model's tensors.
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
    if len(fitting) < MIN_MATCHED * len(own):
        raise Refused(f"{flag} {report}; does --arch match the file?")
    model.load_state_dict(fitting, strict=False)
    if parallel.is_main():
        print(report, flush=True)


def load_weights_into(
    model: nn.Module, path: str, checkpoint_key: str = "teacher", flag: str = "--pretrained_weights"
) -> None:
    """Copy the weights in a file into a backbone, whose names they must have; see `load_matching`.

    Raises:
        Refused: no such file, not a checkpoint, no such part in it, or weights of another architecture.
    """
    with refusing(flag):
        state = backbone_state(read(path), checkpoint_key, path)
    load_matching(model, state, path, flag=flag)


def load_backbone(
    weights: str, arch: str | None = None, patch_size: int | None = None, checkpoint_key: str = "teacher",
    flag: str = "--pretrained_weights",
) -> tuple[nn.Module, dict]:
    """A frozen backbone in eval mode from a file of weights, and how its input images are made.

    Args:
        weights: a checkpoint of this project, a published full checkpoint, or the state dict of a backbone in any
            layout that `weights.layouts` knows. "" gives random weights and prints a note.
        arch, patch_size: used where the file does not say; their own defaults are vit_small and 16.
        checkpoint_key: part of a full checkpoint, teacher or student.
        flag: the flag that names the file, for messages.

    Returns:
        The network, and {arch, patch_size, embed_dim, in_chans, mean, std, global_crops_size}.

    Raises:
        Refused (a ValueError): no such file, not a checkpoint, no such part in it, unknown or wrong architecture.
    """
    args, state = {}, {}
    if weights:
        with refusing(flag):
            loaded = read(weights)
        args = stored_args(loaded)
        with refusing(f"--checkpoint_key {checkpoint_key}:"):
            state = backbone_state(loaded, checkpoint_key, weights)
    # Networks of timm and torchvision keep the tensor names that these libraries give them.
    recognized = Weights("", None, {}, state)
    if args.get("arch") in (None, *VITS, *XCITS):
        with refusing(f"{flag} {weights}:"):
            recognized = recognize(state)
    info = {
        "arch": args.get("arch") or recognized.arch or arch or "vit_small",
        "patch_size": recognized.options.get("patch_size") or args.get("patch_size") or patch_size or 16,
        "in_chans": recognized.options.get("in_chans") or args.get("in_chans", 3),
        "mean": tuple(args.get("mean", IMAGENET_MEAN)),
        "std": tuple(args.get("std", IMAGENET_STD)),
        "global_crops_size": args.get("global_crops_size", 224),
    }
    options = {"img_size": args["global_crops_size"]} if "global_crops_size" in args else {}
    options |= recognized.options | {k: args[k] for k in STORED_OPTIONS if k in args}
    options |= {k: info[k] for k in ("patch_size", "in_chans")}
    try:
        model, info["embed_dim"] = build_backbone(info["arch"], **options)
    except ValueError as error:  # it names --arch; vision_transformer.py imports nothing of the project
        raise Refused(error) from error
    if weights:
        layout = f", {recognized.layout} names" if recognized.layout else ""
        load_matching(model, recognized.state, f"{weights} ({info['arch']}{layout})", flag=flag)
    elif parallel.is_main():
        print(f"no {flag}: the network has random weights", flush=True)
    return model.eval().requires_grad_(False), info
