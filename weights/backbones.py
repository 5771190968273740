"""Load backbones from files of weights, whichever library wrote them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace

from torch import Tensor, nn

import parallel
from method.photometric import IMAGENET_MEAN, IMAGENET_STD
from parallel import Refused
from vision_transformer import VITS, XCITS, VisionTransformer, build_backbone
from weights.checkpoints import refusing
from weights.layouts import STORED_OPTIONS, Weights, backbone_state, misfit, read, recognize, stored_args


def load_matching(model: nn.Module, state: Mapping[str, Tensor], path: str, flag: str = "--pretrained_weights") -> None:
    """Copy a file's tensors into the model, and print `N of N tensors matched`.

    Args:
        path: the file, for messages.
        flag: the flag that names the file, for messages.

    Raises:
        Refused: the file does not hold exactly the tensors of the model; see `layouts.misfit`.
    """
    own = model.state_dict()
    expected = [k for k in own if k in state or not k.endswith("num_batches_tracked")]  # missing in older files
    fitting = {k: state[k] for k in expected if k in state and own[k].shape == state[k].shape}
    report = f"{path}: {len(fitting)} of {len(expected)} tensors matched"
    if problems := misfit(own, state):
        raise Refused(f"{flag} {report}; {problems}; give the --arch and --patch_size of its network, or another file")
    model.load_state_dict(fitting, strict=False)
    if parallel.is_main():
        print(report, flush=True)


def load_weights_into(
    model: nn.Module, path: str, checkpoint_key: str = "teacher", flag: str = "--pretrained_weights"
) -> None:
    """Copy the weights in a file, in any layout of `weights.layouts`, into a backbone.

    Position embeddings for another image size are interpolated to the backbone's grid, which is printed.

    Raises:
        Refused: no such file, not a checkpoint, no such part in it, or weights of another network.
    """
    with refusing(flag):
        state = backbone_state(read(path), checkpoint_key, path)
    with refusing(f"{flag} {path}:"):
        recognized = recognize(state)
    if isinstance(model, VisionTransformer) or misfit(model.state_dict(), state):  # else names of the model's library
        state = recognized.state
    positions = state.get("pos_embed")
    if isinstance(model, VisionTransformer) and positions is not None:
        state = state | {"pos_embed": resized_positions(model, positions)}
    size = f", patch size {recognized.options['patch_size']}" if "patch_size" in recognized.options else ""
    load_matching(model, state, f"{path} ({recognized.arch}{size})" if recognized.arch else path, flag)
    if positions is not None and positions.shape != state["pos_embed"].shape:
        grids = (f"{math.isqrt(p.shape[1] - 1)} x {math.isqrt(p.shape[1] - 1)}" for p in (positions, model.pos_embed))
        parallel.say(f"{path}: position embeddings interpolated from {' to '.join(grids)} patches")


def resized_positions(model: VisionTransformer, positions: Tensor) -> Tensor:
    """Position embeddings (1, 1 + patches, D) for the model's image size; unchanged unless made for a square image."""
    own = model.pos_embed
    side = math.isqrt(max(positions.shape[1] - 1, 0)) if positions.ndim == 3 else 0
    if positions.shape == own.shape or positions.shape != (1, side**2 + 1, own.shape[2]):
        return positions
    size = model.patch_embed.img_size
    source = SimpleNamespace(pos_embed=positions, patch_embed=model.patch_embed,
                             interpolate_offset=model.interpolate_offset,
                             interpolate_antialias=model.interpolate_antialias)
    return VisionTransformer.interpolate_pos_encoding(source, own, size, size)


def check_asked(asked: str | int | None, stored: str | int | None, flag: str, path: str) -> None:
    """Refuses an architecture or patch size that is asked for and is not the file's, where the file tells it.

    A name of timm for a Vision Transformer of this project's sizes is that size.
    """
    if asked is None or stored is None or VITS.get(asked, asked) == VITS.get(stored, stored):
        return
    size = stored.split("_")[1] if stored in VITS else str(stored)
    if asked in VITS or size not in str(asked):
        raise Refused(f"{flag} {asked}: {path} holds {stored}; leave {flag} out, or give the weights of {asked}")


def load_backbone(
    weights: str, arch: str | None = None, patch_size: int | None = None, checkpoint_key: str = "teacher",
    flag: str = "--pretrained_weights",
) -> tuple[nn.Module, dict]:
    """A frozen backbone in eval mode from a file of weights, and how its input images are made.

    Args:
        weights: a checkpoint of this project, a published full checkpoint, or the state dict of a backbone in any
            layout that `weights.layouts` knows. "" gives random weights and prints a note.
        arch, patch_size: used where the file does not say, and refused where it says something else; their own
            defaults are vit_small and 16.
        checkpoint_key: part of a full checkpoint, teacher or student.
        flag: the flag that names the file, for messages.

    Returns:
        The network, and {arch, patch_size, embed_dim, in_chans, mean, std, global_crops_size}.

    Raises:
        Refused (a ValueError): no such file, not a checkpoint, no such part in it, unknown architecture, or another
            than the one asked for.
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
    check_asked(arch, args.get("arch") or recognized.arch, "--arch", weights)
    check_asked(patch_size, recognized.options.get("patch_size"), "--patch_size", weights)
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
