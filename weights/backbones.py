"""Load backbones from files of weights, whichever library wrote them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import parallel
from parallel import Refused
from vision_transformer import VITS, XCITS, SwiGLU, VisionTransformer, build_backbone, is_network, torchvision_names
from weights import preprocessing
from weights.checkpoints import refusing
from weights.layouts import (
    INTERPOLATION,
    RESNETS,
    STORED_OPTIONS,
    UNUSED,
    VIT_SIZES,
    Weights,
    backbone_state,
    check_stated,
    configured,
    describe,
    is_training,
    misfit,
    network_config,
    read,
    recognize,
    rename,
    stored_args,
    stored_options,
)

REMEDY = "give the --arch, --patch_size and --in_chans of its network, or another file"


def load_matching(
    model: nn.Module, state: Mapping[str, Tensor], path: str, flag: str = "--pretrained_weights", remedy: str = REMEDY,
) -> None:
    """Copy a file's tensors into the model, and print `N of N tensors matched`.

    Args:
        path: the file, for messages.
        flag: the flag that names the file, for messages.
        remedy: what to do about a file that does not fit, for messages.

    Raises:
        Refused: the file does not hold exactly the tensors of the model; see `layouts.misfit`.
    """
    own = model.state_dict()
    expected = [k for k in own if k in state or not UNUSED.fullmatch(k)]
    fitting = {k: state[k] for k in expected if k in state and own[k].shape == state[k].shape}
    report = f"{path}: {len(fitting)} of {len(expected)} tensors matched"
    if problems := misfit(own, state):
        raise Refused(f"{flag} {report}; {problems}; {remedy}")
    model.load_state_dict(fitting, strict=False)
    if parallel.is_main():
        print(report, flush=True)


def load_weights_into(
    model: nn.Module, path: str, checkpoint_key: str = "teacher", flag: str = "--pretrained_weights",
    init_in_chans: str = "",
) -> None:
    """Copy the weights in a file, in any layout of `weights.layouts`, into a backbone.

    Position embeddings for another image size are interpolated to the backbone's grid, which is printed, as are the
    mean and std that are stored with the weights.

    Args:
        init_in_chans: mean or tile converts the first layer to the backbone's channels (`converted_channels`); "":
            another number of channels is refused.

    Raises:
        Refused: no such file, not a checkpoint, no such part in it, or weights of another network, or of the same that
            interpolates its position embeddings in another way.
    """
    with refusing(flag):
        loaded = read(path, mapped=True)
        state = backbone_state(loaded, checkpoint_key, path)
        args, config = stored_args(loaded), network_config(loaded, path, is_network)
        found = preprocessing.stored(path, args)
    with refusing(f"{flag} {path}:"):
        recognized = recognize(state)
        check_stated(args, STORED_OPTIONS)
        described = recognized if {"num_heads", "timm_args"} & args.keys() else configured(recognized, state, config)
        options = described.options
        if is_training(loaded, checkpoint_key, path):  # the published backbones' interpolation does not hold there
            options = {k: v for k, v in options.items() if k not in INTERPOLATION}
        options = options | stored_options(args)
        check_function(model, options, f"{flag} {path}")
    remedy = remedy_for(model, recognized.arch, options)
    if isinstance(model, VisionTransformer) and any(options.get(k, getattr(model, k)) != getattr(model, k)
                                                    for k in INTERPOLATION):
        begun = "; a run that has begun resumes without this file" if flag == "--init_from" else ""
        raise Refused(f"{flag} {path}: its network interpolates position embeddings in another way than this one; "
                      f"{remedy}{begun}")
    if isinstance(model, VisionTransformer):
        state = recognized.state if recognized.arch else rename(state)[1]
    elif misfit(model.state_dict(), state):  # else names of the model's library
        state = recognized.state
    state = with_channels(model, state, init_in_chans, f"{flag} {path}")
    positions = state.get("pos_embed")
    if isinstance(model, VisionTransformer) and positions is not None:
        state = state | {"pos_embed": resized_positions(model, positions)}
    size = f", patch size {recognized.options['patch_size']}" if "patch_size" in recognized.options else ""
    load_matching(model, state, f"{path} ({recognized.arch}{size})" if recognized.arch else path, flag, remedy)
    if "mask_token" in model.state_dict() and "mask_token" not in state:
        parallel.say(f"{path}: it has no mask_token, which keeps its initial value and is yet to be trained")
    if positions is not None and positions.shape != state["pos_embed"].shape:
        grids = (f"{math.isqrt(p.shape[1] - 1)} x {math.isqrt(p.shape[1] - 1)}" for p in (positions, model.pos_embed))
        parallel.say(f"{path}: position embeddings interpolated from {' to '.join(grids)} patches")
    if isinstance(model, VisionTransformer) and model.method == "dinov2" and not set(INTERPOLATION) <= options.keys():
        own = {k: getattr(model, k) for k in INTERPOLATION}
        parallel.say(f"{path}: it doesn't tell how its position embeddings were interpolated in training; this run "
                     f"does it by {as_flags(own)}")
    if normalization := {key: found[key] for key in ("mean", "std") if key in found}:
        parallel.say(f"{path}: its images were normalized with {preprocessing.sentence(normalization)}; this run uses "
                     "its own --mean and --std")


def check_function(model: nn.Module, options: Mapping, file: str) -> None:
    """Refuses to copy weights into a network that computes something else than theirs with the same tensors.

    Args:
        options: of `build_backbone`, of the weights' network.
    """
    if isinstance(model, VisionTransformer) and options.get("num_heads", model.num_heads) != model.num_heads:
        raise Refused(f"{file}: weights of a network with {options['num_heads']} attention heads, not "
                      f"{model.num_heads}; give others")
    arguments = options.get("timm_args")
    is_timm = type(model).__module__.startswith("timm.")  # of the same tensors; what they don't show is left to compare
    if arguments is not None and (not is_timm or {"act_layer", "num_heads"} & arguments.keys()):
        raise Refused(f"{file}: weights of a network of timm that computes something else than this one "
                      f"({', '.join(f'{k} {v}' for k, v in arguments.items()) or 'by its name'}); give others")


def remedy_for(model: nn.Module, arch: str | None, options: Mapping) -> str:
    """What to do about weights that do not fit the model: the flags of a training script that would make their network.

    Args:
        arch: of the weights, None: not recognized.
        options: of `build_backbone`, of the weights' network.
    """
    if not isinstance(model, VisionTransformer):
        return REMEDY
    own = {k: getattr(model, k) for k in INTERPOLATION}
    wanted = {k: options.get(k, own[k]) for k in INTERPOLATION}
    if arch:
        own |= {"arch": VIT_SIZES.get((model.embed_dim, model.n_blocks))}
        wanted |= {"arch": arch}
    if arch in VIT_SIZES.values():
        own |= {"patch_size": model.patch_size, "num_register_tokens": model.num_register_tokens,
                "layerscale": 0 if isinstance(model.blocks[0].ls1, nn.Identity) else 1e-5,
                "ffn_layer": "swiglu" if isinstance(model.blocks[0].mlp, SwiGLU) else "mlp"}
        wanted |= {"patch_size": options["patch_size"], "num_register_tokens": options.get("num_register_tokens", 0),
                   "layerscale": 1e-5 if options.get("init_values") else 0,
                   "ffn_layer": options.get("ffn_layer", "mlp")}
    given = {k: wanted[k] for k in own if wanted[k] != own[k]}
    if not given:
        return REMEDY
    if model.method == "dinov2" and arch and arch not in VIT_SIZES.values():
        return f"main_dino.py trains such networks, with --arch {arch}; or give another file"
    if model.method == "dinov2" or given.keys() <= {"arch", "patch_size"}:
        return f"give {as_flags(given)}, or another file"
    if "layerscale" in wanted:  # another default there
        given["layerscale"] = wanted["layerscale"]
    return f"main_dinov2.py trains such networks, with {as_flags(given)}; or give another file"


def as_flags(values: Mapping) -> str:
    """Values by the names of their flags, as a command line has them."""
    return " ".join(f"--{k} {f'{v:g}' if isinstance(v, float) else str(v).lower()}" for k, v in values.items())


def with_channels(model: nn.Module, state: Mapping[str, Tensor], init_in_chans: str, file: str) -> dict[str, Tensor]:
    """The state with the first convolution converted to the model's channels, if only these differ.

    Raises:
        Refused: they differ, and `init_in_chans` is "".
    """
    state = dict(state)
    for name, own in model.state_dict().items():
        if own.ndim != 4 or name not in state:
            continue
        shape = state[name].shape
        if len(shape) == 4 and shape[1] != own.shape[1] and shape[:1] + shape[2:] == own.shape[:1] + own.shape[2:]:
            if not init_in_chans:
                raise Refused(f"{file}: for images of {shape[1]} channel(s), not {own.shape[1]}; give --init_in_chans "
                              f"mean or tile to convert {name}, or --in_chans {shape[1]}")
            state[name] = converted_channels(state[name], own.shape[1], init_in_chans)
            parallel.say(f"{file}: {name} converted from {shape[1]} to {own.shape[1]} channel(s) by {init_in_chans}")
        break  # the first convolution alone sees the image
    return state


def converted_channels(weight: Tensor, in_chans: int, mode: str) -> Tensor:
    """A convolution's weight (D, C, h, w) for other channels: (D, in_chans, h, w).

    Both modes multiply by C / in_chans. With `mean` the response to an image of equal channels stays the same; with
    `tile` only if in_chans is a multiple of C: a single channel gets C times the first old one. Dividing by the sums of
    the channels that are repeated would restore it, but those may be near zero. A heuristic: the new channels are not
    those that the weights were trained on.

    Args:
        mode: mean: each channel gets the mean over the old ones; tile: the old ones repeat in their order.
    """
    old = weight.shape[1]
    if mode == "mean":
        weight = weight.mean(1, keepdim=True).expand(-1, in_chans, -1, -1)
    elif mode == "tile":
        weight = weight[:, torch.arange(in_chans) % old]
    else:
        raise ValueError(f"mode {mode!r}: give mean or tile")
    return weight * (old / in_chans)


def resized_positions(model: VisionTransformer, positions: Tensor) -> Tensor:
    """Position embeddings (1, 1 + patches, D) for the model's image size; unchanged unless made for a square image."""
    own = model.pos_embed
    side = math.isqrt(max(positions.shape[1] - 1, 0)) if positions.ndim == 3 else 0
    if positions.shape == own.shape or positions.shape != (1, side**2 + 1, own.shape[2]):
        return positions
    size = model.img_size
    source = SimpleNamespace(pos_embed=positions, patch_embed=model.patch_embed,
                             interpolate_offset=model.interpolate_offset,
                             interpolate_antialias=model.interpolate_antialias)
    return VisionTransformer.interpolate_pos_encoding(source, own, size, size)


# ---- What a network supports in training ----


def supported_drop_path_rate(arch: str, rate: float, in_chans: int = 3, is_default: bool = False) -> float:
    """The rate to build a network with.

    A network without stochastic depth gets 0 if the rate is a flag's default, which is printed. torchvision's networks
    then keep the default, which has no effect on them: earlier runs have stored it.

    Raises:
        Refused: the network has no stochastic depth, but the rate was given.
    """
    if not rate or arch in VITS:
        return rate
    import torchvision  # takes seconds to import; ViTs do not need it

    known = arch in torchvision_names()
    try:
        model, _ = build_backbone(arch, drop_path_rate=rate, in_chans=in_chans)
        supported = not known or any(isinstance(m, torchvision.ops.StochasticDepth) for m in model.modules())
    except ValueError:
        try:
            build_backbone(arch, in_chans=in_chans)
        except ValueError as error:  # not because of the rate
            raise Refused(error) from error
        supported = False
    if supported or (is_default and known):
        return rate
    if not is_default:
        raise Refused(f"--drop_path_rate {rate:g}: --arch {arch} has no stochastic depth; leave the flag out or give 0")
    parallel.say(f"--drop_path_rate 0 instead of the default {rate:g}: {arch} has no stochastic depth")
    return 0.0


@torch.no_grad()
def normalizes_single_values(model: nn.Module, in_chans: int, size: int) -> bool:
    """Whether batch norm meets one value per channel in a batch of one image of `size` x `size` pixels.

    Its variance is 0 then, and torch refuses to train.
    """
    single: list[bool] = []
    hooks = [module.register_forward_pre_hook(lambda m, x: single.append(x[0].numel() == x[0].shape[1]))
             for module in model.modules() if isinstance(module, _BatchNorm)]
    training = model.training
    try:
        if hooks:
            model.eval()(torch.zeros(1, in_chans, size, size, device=next(model.parameters()).device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return any(single)


# ---- From a file to a frozen network ----


def read_backbone(path: str, checkpoint_key: str, flag: str) -> tuple[dict, Weights]:
    """The training flags stored in a file of weights, and what it says of its backbone. Raises Refused."""
    with refusing(flag):
        loaded = read(path)
        config = network_config(loaded, path, is_network)
    args = stored_args(loaded)
    with refusing(f"--checkpoint_key {checkpoint_key}:"):
        state, training = backbone_state(loaded, checkpoint_key, path), is_training(loaded, checkpoint_key, path)
    with refusing(f"{flag} {path}:"):
        check_stated(args, ["value_range"])
        return args, describe(args, state, (*VITS, *XCITS), is_network, config, training)


def check_asked(asked: str | int | None, stored: str | int | None, flag: str, path: str) -> None:
    """Refuses an architecture or patch size that is asked for and is not the file's, where the file tells it.

    A name of timm for a Vision Transformer of this project's sizes is that size.
    """
    if asked is None or stored is None or VITS.get(asked, asked) == VITS.get(stored, stored):
        return
    size = stored.split("_")[1] if stored in VITS else str(stored)
    if asked in VITS or size not in str(asked):
        raise Refused(f"{flag} {asked}: {path} holds {stored}; leave {flag} out, or give the weights of {asked}")


def trained_with(args: Mapping, described: Weights) -> str | None:
    """The method that made the weights of a file, dino or dinov2, if it tells.

    Checkpoints of main_dino.py state none. Those of other programs, and of fine-tuned networks, may be of any method.
    """
    if not args:
        return described.options.get("method")  # published files of DINOv2 have a mask token
    method = args.get("method", "dino" if "global_batch" in args else None)
    return method if method in ("dino", "dinov2") else None


def holds(arch: str, described: Weights) -> bool:
    """Whether a file has exactly the tensors of timm's network `arch`, which may compute something else than another
    of the same tensors: resnetaa50 filters before its strides, resnet50 does not."""
    if arch in VITS or not is_network(arch):
        return False
    try:
        with torch.device("meta"):
            model, _ = build_backbone(arch, in_chans=described.options.get("in_chans", 3), timm_args={})
    except ValueError:  # not timm's
        return False
    return not misfit(model.state_dict(), described.state)


def load_backbone(
    weights: str, arch: str | None = None, patch_size: int | None = None, checkpoint_key: str = "teacher",
    flag: str = "--pretrained_weights", mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
    in_chans: int | None = None,
) -> tuple[nn.Module, dict]:
    """A frozen backbone in eval mode from a file of weights, and how its input images are made.

    Prints the mean and std, and where they come from; `weights.preprocessing` knows the places.

    Args:
        weights: a checkpoint of this project, a published full checkpoint, or the state dict of a backbone in any
            layout that `weights.layouts` knows. "" gives random weights and prints a note.
        arch, patch_size: used where the file does not say, and refused where it says something else; their own
            defaults are vit_small and 16.
        checkpoint_key: part of a full checkpoint, teacher or student.
        flag: the flag that names the file, for messages.
        mean, std: one value per channel of intensities in [0, 1], instead of the stored ones.
        in_chans: channels, where the file does not say.

    Returns:
        The network, and {arch, patch_size, embed_dim, in_chans, mean, std, global_crops_size, options: the arguments
        of `build_backbone`, sources: where mean and std come from}, and, if stored, value_range of the training
        images, resize_ratio and interpolation (see `preprocessing.stored`), and method: dino or dinov2.

    Raises:
        Refused (a ValueError): no such file, not a checkpoint, no such part in it, unknown architecture, another than
            the one asked for, or mean and std that are unknown or do not fit the channels.
    """
    args, described = read_backbone(weights, checkpoint_key, flag) if weights else ({}, Weights("", None, {}, {}))
    with refusing(flag):
        found = preprocessing.stored(weights, args)
    channels = described.options.get("in_chans") or (found["in_chans"].value if "in_chans" in found else None)
    if weights and in_chans and channels and in_chans != channels:
        raise Refused(f"--in_chans {in_chans}: {weights} is for images of {channels} channel(s); leave it out")
    info = {
        "arch": described.arch or arch or "vit_small",
        "patch_size": described.options.get("patch_size") or patch_size or 16,
        "in_chans": channels or in_chans or 3,
        "global_crops_size": found["image_size"].value if "image_size" in found else 224,
    }
    if described.arch in RESNETS.values() and arch not in (None, described.arch) and holds(arch, described):
        described = described._replace(arch=arch, options=described.options | {"timm_args": {}})
        info["arch"] = arch
    check_asked(arch, described.arch, "--arch", weights)
    if described.arch in (*VITS, *XCITS):
        check_asked(patch_size, described.options.get("patch_size"), "--patch_size", weights)
    if method := trained_with(args, described):
        info["method"] = method
    if "value_range" in args:
        info["value_range"] = tuple(args["value_range"])
    file = f"{flag} {weights}" if weights else f"--in_chans {in_chans}"
    info |= {key: found[key] for key in ("resize_ratio", "interpolation") if key in found}
    normalization = preprocessing.normalization(found, info["in_chans"], file, mean, std)
    info |= {key: value for key, (value, _) in normalization.items()}
    info["sources"] = {key: source for key, (_, source) in normalization.items()}
    info["options"] = described.options | {k: info[k] for k in ("patch_size", "in_chans")}
    if "fc_norm.weight" in described.state and info["arch"] not in (*VITS, *XCITS):
        info["options"]["global_pool"] = "avg"  # timm has this norm where it averages patch tokens, by default or not
    try:
        model, info["embed_dim"] = build_backbone(info["arch"], **info["options"])
    except ValueError as error:  # it names --arch; vision_transformer.py imports nothing of the project
        raise Refused(error) from error
    if weights:
        layout = f", {described.layout} names" if described.layout else ""
        load_matching(model, described.state, f"{weights} ({info['arch']}{layout})", flag=flag)
    else:
        parallel.say(f"no {flag}: the network has random weights")
    parallel.say(f"images of {info['in_chans']} channel(s), normalized with {preprocessing.sentence(normalization)}")
    return model.eval().requires_grad_(False), info
