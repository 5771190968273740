"""Read files of weights without running code, and rename their tensors to the names that `build_backbone` uses.

The only place that knows the tensor names of published DINO, DINOv2, timm, Hugging Face, XCiT and torchvision files. A
layout is recognized by names and shapes of the tensors, never by the name of the file. Imports nothing of the project,
because hubconf.py loads it alone.

Shapes: N tokens, D width, C channels, P patch size, K classes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from numbers import Real
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Prefixes that wrappers add to the names of all parameters.
PREFIXES = ("module.", "model.", "encoder.", "net.", "network.", "vit.", "trunk.", "base_model.", "feature_extractor.",
            "image_encoder.", "timm_model.", "visual.trunk.")  # fmt: skip
# Parts that torch's wrappers add anywhere in a name.
WRAPPERS = re.compile(r"(?<![^.])_(orig_mod|forward_module|fsdp_wrapped_module|checkpoint_wrapped_module)\.")
# Names of student and teacher (--checkpoint_key), as entries of a file and as prefixes in one flat file; other methods
# call them online and momentum or target encoder, query and key encoder.
_PART = r"(_(backbone|encoder|model|network))?"
NETWORKS = {
    "student": re.compile(rf"(student{_PART}|online_(backbone|encoder|network)|base_encoder|encoder_q)(_state_dict)?"),
    "teacher": re.compile(rf"(teacher{_PART}|(momentum|target)_(backbone|encoder|network)|encoder_k)(_state_dict)?"),
}
# Prefixes of an average of weights in one flat file: the teacher, and what stands beside it is the student.
AVERAGES = re.compile(r"((model|net)_)?ema(_model)?|shadow")
BESIDE_TEACHER = ("backbone.", "encoder.", "model.", "net.", "network.")
# Entries of a file that hold its only network.
CONTAINERS = ("state_dict", "model", "model_state_dict", "model_state", "network", "net", "module", "backbone",
              "encoder", "weights", "params")  # fmt: skip
# Heads and classifiers, which are not part of a backbone.
HEAD = re.compile(r"(\w+_)?(heads?|fc|classif|classifier|last_linear|pooler)(_dist)?\.")
# Heads of DINO (`head`) and DINOv2 in a checkpoint of both networks' parts.
PROJECTION_HEAD = re.compile(r"(?:(?:module|student|teacher)\.)*(head|dino_head|ibot_head)\.(.+)")
# Tensors that have no effect on features: used in training only, or derived from the network's shape.
UNUSED = re.compile(r"(.*\.)?(num_batches_tracked|mask_token|masked_embed|relative_position_index|attn_mask)"
                    r"|decoder_pos_embed|(decoder(_\w+)?|aux\d|AuxLogits)\..*")
# (pattern of a tensor's name, what kind of network has it), for messages about files that do not fit.
KINDS = (
    (re.compile(r"(\w+\.)*(relative_position_bias_table|rel_pos_bias)"), "a network with relative positions"),
    (re.compile(r"blocks\.0\.gamma_1|storage_tokens|rope(_embed)?\.|embeddings\.patch_embeddings\.(weight|bias)"),
     "DINOv3 or another network with rotary positions, of which timm's file loads by timm's name for --arch"),
    (re.compile(r"dist_token|(\w+\.)*distillation_token"),
     "a distilled DeiT, of which timm's file loads by timm's name for --arch"),
    (re.compile(r"fc_norm\."), "an average-pooled network, which loads by timm's name for --arch"),
    (re.compile(r"norm_pre\.|visual\.|(\w+\.)*vision_model\."),
     "CLIP or another network with a norm before the first block"),
    (re.compile(r"blocks\.0\.ls1\.gamma"), "DINOv2 or another network with layer scale"),
)  # fmt: skip
# What a pickle may name. The published script stores its flags as a Namespace, and learning rate and weight decay as
# the np.float64 of a schedule. Paths become pure ones, which cannot reach the file system.
ALLOWED = [
    argparse.Namespace, np.dtype, type(np.dtype(np.float64)),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((pure, f"{module}.{name}") for module in ("pathlib", "pathlib._local")
      for pure, names in ((pathlib.PurePosixPath, ("PosixPath", "PurePosixPath")),
                          (pathlib.PureWindowsPath, ("WindowsPath", "PureWindowsPath"))) for name in names),
]  # fmt: skip
# Options of a network that its tensors do not show: export.py stores them with the weights.
INTERPOLATION = ("interpolate_antialias", "interpolate_offset")
TRAINING_INTERPOLATION = {"interpolate_antialias": False, "interpolate_offset": 0.1}  # the default of DINOv2's training
STORED_OPTIONS = (*INTERPOLATION, "num_heads", "timm_args")
# Names in one process's file of a run under FSDP, which holds a part of each flattened parameter.
SHARD = re.compile(r".*_flat_param")
SHARD_REMEDY = ("one process's part of a run that was sharded over GPUs (FSDP), not the whole weights: give the run's "
                "teacher_checkpoint.pth, in eval/training_N/")
# (how a file starts, what it is and what to do), for files that are no weights.
OTHER_FILES = (
    (re.compile(rb"version https://git-lfs"), "a pointer of Git LFS, not the file itself: run git lfs pull there"),
    (re.compile(rb"\s*<(!doctype|html)", re.I), "a web page: download the file itself"),
    (re.compile(rb'\s*\{(?=.*"(metadata|weight_map)")', re.S),
     "an index of weights that are split into several files: save them as one file, as model.save_pretrained(PATH, "
     "max_shard_size='100GB') of transformers does"),
    (re.compile(rb"\s*[{\[]"), "JSON, not weights: give the file of weights"),
)  # fmt: skip
# What is read of the metadata of a safetensors file; each value is JSON.
METADATA = ("arch", "patch_size", "in_chans", "mean", "std", "value_range", "global_crops_size", "method",
            *STORED_OPTIONS)  # fmt: skip


def is_number(value: object) -> bool:
    """A finite number; JSON's true is none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: object) -> bool:
    return is_number(value) and value >= 1 and value == int(value)


def is_range(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_number, value)) and value[0] < value[1]


# What an entry of a checkpoint's flags must be, for each that loading reads (mean and std: preprocessing.per_channel).
STATED: dict[str, tuple[Callable[[object], bool], str]] = {
    "arch": (lambda value: isinstance(value, str) and value != "", "a name"),
    **dict.fromkeys(("patch_size", "in_chans", "global_crops_size"), (is_count, "a whole number above 0")),
    "interpolate_antialias": (lambda value: isinstance(value, (bool, np.bool_)), "true or false"),
    "interpolate_offset": (is_number, "a number"),
    "num_heads": (is_count, "a whole number above 0"),
    "timm_args": (lambda value: isinstance(value, Mapping), "arguments by name"),
    "value_range": (is_range, "two numbers LOW HIGH with LOW < HIGH"),
}  # fmt: skip


class BadFile(ValueError):
    """The file is damaged, or does not contain what was asked for; the message says which and starts with the path."""


class Weights(NamedTuple):
    """A file's tensors under the names of a network of `build_backbone`."""

    layout: str  # name of the layout for messages; "" if the tensors keep their names
    arch: str | None  # None: not recognized
    options: dict  # further arguments of build_backbone
    state: dict[str, Tensor]


# ---- Reading ----


def read(path: str | os.PathLike, kind: type = dict, mapped: bool = False) -> dict:
    """Load a file of tensors and plain types onto the CPU, never running code that a pickle names.

    Besides plain types a pickle may contain what published full checkpoints do (`ALLOWED`). The metadata of a
    safetensors file written by export.py is returned under `args`.

    Args:
        mapped: let the tensors be parts of the file, which processes on a machine share, where that is possible. For
            callers that copy what they keep: a file that is written over in place changes them.

    Raises:
        FileNotFoundError: as `check_file`. Nothing is downloaded or substituted.
        BadFile: the file is truncated or corrupt, contains something other than data, is no `kind`, or is a shard.
        ImportError: a safetensors file, and safetensors is not installed.
    """
    check_file(path)
    start = b""
    try:
        with open(path, "rb") as file:
            start = file.read(256)
        if start[8:9] == b"{" or str(path).endswith(".safetensors"):  # after the length of its header
            return read_safetensors(path)
        with torch.serialization.safe_globals(ALLOWED), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*TorchScript archive")
            loaded = load(path, mapped)
    except (ImportError, BadFile):
        raise
    except Exception as error:  # the type depends on where the file is damaged
        # torch's own text is long and advises to load the file unsafely.
        reason = "damaged or cut short, or not a file of weights: copy or download it again"
        if isinstance(error, PermissionError):
            reason = "no permission to read it"
        elif other := next((remedy for mark, remedy in OTHER_FILES if mark.match(start)), None):
            reason = other
        elif "TorchScript" in str(error):
            reason = ("TorchScript, a program, and only data is read: save its weights by torch.save(torch.jit.load("
                      "PATH).state_dict(), OTHER_PATH)")
        named = re.search(r"(?:GLOBAL |got <class ')([\w.]+)", str(error))
        if named and "_shard" in named[1]:
            reason = SHARD_REMEDY
        elif named:
            reason = f"it contains {named[1]}, and only data is read: save model.state_dict() alone"
        raise BadFile(f"{path}: not a readable checkpoint of plain tensors ({reason})") from error
    if not isinstance(loaded, kind):
        raise BadFile(f"{path}: not a readable checkpoint of plain tensors (it contains a {type(loaded).__name__})")
    parts = [loaded, *loaded.values()] if isinstance(loaded, Mapping) else []
    if any(SHARD.match(str(name)) for part in parts if isinstance(part, Mapping) for name in part):
        raise BadFile(f"{path}: {SHARD_REMEDY}")
    return loaded


def check_file(path: str | os.PathLike) -> None:
    """Raises FileNotFoundError if there is no such file, or it is a folder or a part of a checkpoint in several files.
    """
    file = pathlib.Path(path)
    folder = file if file.is_dir() else file.parent
    if file.name == ".metadata" or file.suffix == ".distcp" or file.is_dir() and (file / ".metadata").is_file():
        raise FileNotFoundError(
            f"{path}: a checkpoint of torch.distributed.checkpoint in several files; make one of it by python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} FILE, and give that FILE")
    if file.is_dir():
        raise FileNotFoundError(f"{path}: a folder; give the file of weights in it")
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights; weights are never downloaded")


def load(path: str | os.PathLike, mapped: bool) -> object:
    if mapped:
        # Impossible for files in torch's format before zip files, and on some file systems.
        with contextlib.suppress(RuntimeError):
            return torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=True)
    return torch.load(path, map_location="cpu", weights_only=True)


def read_safetensors(path: str | os.PathLike) -> dict:
    """The tensors; if the metadata describe the network, under `state_dict`, with the metadata under `args`."""
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(f"{path} needs safetensors: pip install safetensors") from error
    with safe_open(path, framework="pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # f is not iterable
        metadata = f.metadata() or {}
    if not metadata.keys() & {"arch", "mean", "std"}:
        return tensors
    args = {}
    for key in metadata.keys() & set(METADATA):
        try:
            args[key] = json.loads(metadata[key])
        except ValueError as error:
            raise BadFile(f"{path}: {key} in its metadata is {metadata[key]!r}, which is not JSON; correct or remove "
                          "that entry") from error
    return {"state_dict": tensors, "args": args}


def stored_args(loaded: Mapping) -> dict:
    """The training flags in a checkpoint of this project or a published full one; {} for weights of others.

    Flags that are None are left out: other programs' checkpoints have flags of the same names without a value.
    """
    args = loaded.get("args")
    if args is None:  # a state dict of torch may carry metadata, where export.py puts them
        args = getattr(loaded, "_metadata", {}).get("", {}).get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    return {k: v for k, v in args.items() if v is not None} if isinstance(args, Mapping) else {}


def check_stated(args: Mapping, keys: Iterable[str]) -> None:
    """Raises BadFile, without the path, if an entry of a checkpoint's flags is not what `STATED` says of it."""
    for key in keys:
        if key in args and not STATED[key][0](args[key]):
            raise BadFile(f"{key} in its args is {args[key]!r}, not {STATED[key][1]}; correct or remove that entry")


def stored_options(args: Mapping) -> dict:
    """Options of a ViT among a checkpoint's flags (`stored_args`), which its tensors do not show.

    A checkpoint of main_dinov2.py that does not state the interpolation was trained with the default one, not with that
    of the published weights with registers.
    """
    options = TRAINING_INTERPOLATION if args.get("method") == "dinov2" else {}
    return options | {k: args[k] for k in STORED_OPTIONS if k in args}


def network_of(name: str) -> str | None:
    """student or teacher, if the first part of a name is one of theirs."""
    return next((key for key, pattern in NETWORKS.items() if pattern.fullmatch(name.split(".")[0])), None)


def is_average(name: str) -> bool:
    return "." in name and AVERAGES.fullmatch(name.split(".")[0]) is not None


def network_of_tensor(name: str) -> str | None:
    """student or teacher, by the prefix of a tensor's name."""
    return ("teacher" if is_average(name) else network_of(name)) if "." in name else None


def is_unmarked(networks: set[str], checkpoint_key: str) -> bool:
    """Whether names without a mark are the network that is wanted: all are, or the student beside a marked teacher."""
    return not networks or (networks == {"teacher"} and checkpoint_key == "student")


def strip_prefixes(state: Mapping[str, Tensor], checkpoint_key: str = "teacher") -> dict[str, Tensor]:
    """Parameter names of the backbone without the leading prefixes of wrappers (`module.`, `backbone.`, ...).

    A prefix of `PREFIXES` is stripped if all names have it, heads excepted, so that a part of that name which a
    network really has keeps it. If there are names with `backbone.`, or with the prefix of student or teacher, the
    tensors with other names belong to something else and are left out. Beside a teacher, `BESIDE_TEACHER` are the
    student.

    Raises:
        BadFile: the names mark student or teacher, but not `checkpoint_key`.
    """
    state = {WRAPPERS.sub("", name): value for name, value in state.items()}
    averages = sum(map(is_average, state))
    if 3 * averages < len(state):  # the rate of an average or an average of a part, not of a network
        state = {name: value for name, value in state.items() if not is_average(name)}
    while True:
        networks = {network_of_tensor(name) for name in state} - {None}
        if is_unmarked(networks, checkpoint_key):
            chosen = [name for name in state if name.startswith(BESIDE_TEACHER if networks else "backbone.")]
        else:
            chosen = [name for name in state if network_of_tensor(name) == checkpoint_key]
        if networks and not chosen:
            raise BadFile(f"no part {checkpoint_key!r} in this checkpoint; it has {', '.join(sorted(networks))}")
        if chosen:
            state = {name.split(".", 1)[1]: state[name] for name in chosen}
            continue
        body = [name for name in state if not HEAD.match(name) and not UNUSED.fullmatch(name)]
        prefix = next((p for p in PREFIXES if body and all(name.startswith(p) for name in body)), None)
        if prefix is None:
            return state
        state = {name.removeprefix(prefix): value for name, value in state.items()}


def backbone_state(loaded: Mapping, checkpoint_key: str, path: str = "") -> dict[str, Tensor]:
    """The backbone's tensors in a loaded file, prefixes stripped.

    They are the entry `checkpoint_key` of a full checkpoint or one that means it (`NETWORKS`), else an entry of
    `CONTAINERS`, each of which may hold such entries again, else the file itself.

    Raises:
        BadFile: a full checkpoint without that entry.
    """
    loaded = part(loaded, checkpoint_key, path)
    state = {k: v for k, v in loaded.items() if isinstance(k, str) and isinstance(v, Tensor)}
    try:
        return strip_prefixes(state, checkpoint_key)
    except BadFile as error:
        raise BadFile(f"{path}: {error}") from error


def head_states(loaded: Mapping, checkpoint_key: str, path: str = "") -> dict[str, dict[str, Tensor]]:
    """The projection heads in a full checkpoint: {"dino_head": state dict, "ibot_head": state dict}.

    A tied head, which serves both losses, is `dino_head` alone; DINO's head is `head`. {} if there are none.

    Raises:
        BadFile: a full checkpoint without the entry `checkpoint_key`.
    """
    heads: dict[str, dict[str, Tensor]] = {}
    for name, value in part(loaded, checkpoint_key, path).items():
        if isinstance(value, Tensor) and (match := PROJECTION_HEAD.fullmatch(WRAPPERS.sub("", str(name)))):
            heads.setdefault(match[1], {})[match[2]] = value
    return heads


def is_training(loaded: Mapping, checkpoint_key: str, path: str = "") -> bool:
    """Whether a file is a checkpoint of DINOv2's training: it has heads, and the published backbones have none.

    Raises:
        BadFile: a full checkpoint without the entry `checkpoint_key`.
    """
    return "dino_head" in head_states(loaded, checkpoint_key, path)


def part(loaded: Mapping, checkpoint_key: str, path: str = "") -> Mapping:
    """The entry of a loaded file that holds a network's tensors: see `backbone_state`. Raises BadFile."""
    while entries := [k for k, v in loaded.items() if isinstance(k, str) and isinstance(v, Mapping)]:
        marked = {k: network_of(k) for k in entries if network_of(k)}
        names = [checkpoint_key, *(k for k in marked if marked[k] == checkpoint_key)]
        names += CONTAINERS if is_unmarked(set(marked.values()), checkpoint_key) else ()
        name = next((k for k in names if k in entries), None)
        if name is None:
            break
        loaded = loaded[name]
    if entries and not any(isinstance(v, Tensor) for v in loaded.values()):
        raise BadFile(f"{path}: no part {checkpoint_key!r} in this checkpoint; it has {', '.join(entries)}: name one "
                      "by --checkpoint_key")
    return loaded


def misfit(own: Mapping[str, Tensor], state: Mapping[str, Tensor], optional: tuple[str, ...] = ()) -> str:
    """Why a file does not hold exactly the tensors of a network; "" if it does.

    Every tensor of the network must be in the file with its shape, in finite floating-point numbers (not quantized),
    and every tensor of the file must be the network's. Exceptions: heads, and other tensors without effect on features
    (`HEAD`, `UNUSED`), such as batch norm's counters, which are missing in older files, and DINOv2's mask token.

    Args:
        own: the network's state dict.
        state: the file's tensors under the network's names.
        optional: names of the network's tensors that may keep their random values.
    """
    missing = [k for k in own if k not in state and k not in optional and not UNUSED.fullmatch(k)]
    wrong = [f"{k} {tuple(v.shape)} instead of {tuple(own[k].shape)}"
             for k, v in state.items() if k in own and v.shape != own[k].shape]  # fmt: skip
    floating = {k: v for k, v in state.items() if k in own and own[k].is_floating_point()}
    whole = [f"{k} {v.dtype}" for k, v in floating.items() if not v.is_floating_point()]
    no_values = [k for k, v in floating.items() if v.is_meta > own[k].is_meta or v.layout != torch.strided]
    broken = [k for k, v in floating.items() if not v.is_meta and k not in no_values and not v.float().isfinite().all()]
    unused = [k for k in state if k not in own and not HEAD.match(k) and not UNUSED.fullmatch(k)]
    problems = [
        f"{what}: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        for what, names in (("missing", missing), ("wrong shape", wrong), ("not floating point", whole),
                            ("not dense", no_values), ("not finite", broken), ("unused", unused)) if names
    ]  # fmt: skip
    kind = next((kind for pattern, kind in KINDS if any(map(pattern.match, unused))), None)
    return "; ".join(problems + ([f"it looks like {kind}"] if kind else []))


# ---- Recognizing the network ----

# (width, depth) of the Vision Transformers; all have heads of width 64
VIT_SIZES = {(192, 4): "vit_nano", (192, 12): "vit_tiny", (384, 12): "vit_small", (768, 12): "vit_base",
             (1024, 24): "vit_large", (1536, 40): "vit_giant2"}  # fmt: skip
VIT_NAME = re.compile(
    r"cls_token|pos_embed|register_tokens|mask_token|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)"
    r"|blocks\.\d+\.((norm[12]|attn\.(qkv|proj)|mlp\.(fc[12]|w12|w3))\.(weight|bias)|ls[12]\.gamma)"
)
# (number of blocks in the third stage, whether a block has three convolutions)
RESNETS = {(2, False): "resnet18", (6, False): "resnet34", (6, True): "resnet50", (23, True): "resnet101",
           (36, True): "resnet152"}  # fmt: skip
XCIT_SIZES = {128: "nano", 192: "tiny", 384: "small", 512: "medium", 768: "large"}


def recognize(state: Mapping[str, Tensor]) -> Weights:
    """Rename a backbone's tensors (prefixes stripped) and infer the network from their names and shapes.

    Tensors of a network that is not in the tables keep their names: --arch has to name it.

    Raises:
        BadFile: a tensor has a known name and an impossible number of dimensions.
    """
    layout, renamed = rename(state)
    for mark, describe in (("cls_attn_blocks.0.norm1.weight", xcit), ("layer4.0.conv1.weight", resnet),
                           ("blocks.0.attn.qkv.weight", vit)):
        if mark in renamed:
            recognized = describe(layout, renamed)
            return recognized if recognized.arch else recognized._replace(layout="", state=dict(state))
    return Weights("", None, {}, dict(state))


def describe(
    args: Mapping, state: Mapping[str, Tensor], ours: Collection[str], is_network: Callable[[str], bool],
    config: Mapping = MappingProxyType({}), training: bool = False,
) -> Weights:
    """The network of a file: as its flags name it, else recognized; `options` hold what either tells.

    A name in its flags that is no network's belongs to the program that wrote the file, and does not count.

    Args:
        args, state: of `stored_args` and `backbone_state`.
        ours: architectures whose tensors have this project's names, or are renamed to them. The networks of timm and
            torchvision keep the names that these libraries give.
        is_network: whether `build_backbone` knows a name.
        config: what `network_config` returns, for files whose flags don't name the network.
        training: what `is_training` returns. Such a file interpolates position embeddings by the default of training,
            unless it says otherwise; chunked names, which no published backbone has, mean the same.

    Raises:
        BadFile: see `check_stated`, `recognize` and `configured`; the message has no path.
    """
    check_stated(args, ("arch", "global_crops_size", *STORED_OPTIONS))
    if "arch" in args and not is_network(args["arch"]):
        args = {k: v for k, v in args.items() if k != "arch"}
    weights = recognize(state) if args.get("arch") in (None, *ours) else Weights("", None, {}, dict(state))
    if "arch" not in args:
        weights = configured(weights, state, config)
    check_stated(args, {"patch_size", "in_chans"} - weights.options.keys())  # the tensors tell better
    options = {"img_size": int(args["global_crops_size"])} if "global_crops_size" in args else {}
    options |= {k: args[k] for k in ("patch_size", "in_chans") if k in args}
    options |= weights.options
    if weights.arch in VIT_SIZES.values() and (training or CHUNKED in weights.layout):
        options |= TRAINING_INTERPOLATION
    options |= stored_options(args)
    if "num_heads" in args:
        del options["num_heads"]
        options |= heads_option(args["num_heads"], weights.state, "num_heads in its args") if "arch" in args else {}
    return weights._replace(arch=args.get("arch") or weights.arch, options=options)


# ---- What tensors do not show ----


def beside(path: str | os.PathLike, name: str, parse: Callable[[Mapping], dict] = dict) -> dict | None:
    """The JSON object in the file of that name beside a file of weights, parsed; None: there is none.

    Raises:
        BadFile: the file is damaged, or `parse` raised a ValueError.
    """
    file = pathlib.Path(path).with_name(name)
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, Mapping):
            raise ValueError("no object")
        return parse(content)
    except (OSError, ValueError) as error:
        raise BadFile(f"{file}, which says how images are made for {pathlib.Path(path).name}, can't be read ({error}); "
                      "repair it, or move the weights to another folder and give --mean and --std") from error


def network_config(loaded: Mapping, path: str | os.PathLike, is_network: Callable[[str], bool]) -> Mapping:
    """What is known of a network besides its tensors, with its place under `source`; {} where the file names it.

    config.json beside the file (Hugging Face's of a Vision Transformer, timm's); else the flags in a checkpoint of
    timm's training script, or that the ViT-S of MoCo v3 has 12 heads.

    Raises:
        BadFile: config.json is damaged.
    """
    arch, args, state = loaded.get("arch"), stored_args(loaded), loaded.get("state_dict")
    if isinstance(args.get("arch"), str) and is_network(args["arch"]):
        return {}
    config = beside(path, "config.json") or {}
    name, kind = config.get("architecture"), f"{config.get('model_type')} {config.get('architectures')}"
    if is_network(name.split(".")[0]) if isinstance(name, str) else TRANSFORMER.search(kind):  # else another program's
        return {**config, "source": str(pathlib.Path(path).with_name("config.json"))}
    if isinstance(arch, str) and args.get("model") == arch:
        arguments = args.get("model_kwargs") if isinstance(args.get("model_kwargs"), Mapping) else {}
        pool = {"global_pool": args["gp"]} if "gp" in args else {}
        return {"architecture": arch, "model_args": pool | dict(arguments), "source": "its args"}
    is_moco = isinstance(state, Mapping) and any(
        re.match(r"(module\.)?(base|momentum)_encoder\.", str(name)) for name in state)
    return {"num_attention_heads": 12, "source": "MoCo v3"} if is_moco and arch == "vit_small" else {}


TRANSFORMER = re.compile(r"vit|dino|deit|beit", re.IGNORECASE)  # in Hugging Face's names of kinds of networks


def is_square(size: object) -> bool:
    return not isinstance(size, (list, tuple)) or len(set(map(str, size))) == 1


# What this project's networks compute where tensors do not tell: {field of a configuration: (is it so, as what)}.
GELU = (lambda value: str(value).lower() in ("gelu", "gelu_python"), "GELU")
SQUARE = (is_square, "a square")
VIT_FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "hidden_act": GELU, "act_layer": GELU, "image_size": SQUARE, "img_size": SQUARE, "input_size": SQUARE,
    "layer_norm_eps": (lambda value: is_number(value) and 0 <= value <= 1e-5, "1e-6"),
    "global_pool": (lambda value: value in ("", "token"), "the class token"),
}  # fmt: skip
RESNET_FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "act_layer": (lambda value: str(value).lower() == "relu", "ReLU"),
    "global_pool": (lambda value: value in ("", "avg"), "the average"),
    "output_stride": (lambda value: value == 32, "32"), "aa_layer": (lambda value: value == "", "none"),
}  # fmt: skip
# timm's names of ResNets that are this project's, whose names end in what they start with here.
RESNET_ALIAS = re.compile(r"((tv|ssl|swsl|gluon|ig)_)?(?P<arch>resnet\d+)(_v1b)?")


def configured(weights: Weights, state: Mapping[str, Tensor], config: Mapping) -> Weights:
    """The recognized network with what its configuration says and its tensors do not show.

    Another number of heads becomes an option. A network of timm that this project does not have, or that computes
    something else than this project's of the same tensors, such as another activation or pooling, becomes timm's own,
    with the names and arguments there.

    Args:
        state: the tensors under the file's names.
        config: what `network_config` returns.

    Raises:
        BadFile: a network of another library that computes something else.
    """
    arguments = config.get("model_args")
    arguments = {k: v for k, v in arguments.items() if v is not None} if isinstance(arguments, Mapping) else {}
    name = config.get("architecture")
    timm = name.split(".")[0] if isinstance(name, str) else None
    own = {k: weights.options[k] for k in ("patch_size", "in_chans") if k in weights.options}
    if weights.arch is None and timm and arguments:
        return Weights("", timm, own | {"timm_args": timm_arguments(arguments, {})}, dict(state))
    is_vit = weights.arch in VIT_SIZES.values()
    if not config or not (is_vit or weights.arch in RESNETS.values()):
        return weights
    described = config["pretrained_cfg"] if isinstance(config.get("pretrained_cfg"), Mapping) else config
    shape = described.get("input_size") if timm else None
    timm_fields = {"global_pool": config.get("global_pool"),
                   "input_size": shape[1:] if isinstance(shape, list) else None} | arguments
    stated = timm_fields if timm else {
        k: config.get(k) for k in ("num_attention_heads", "hidden_act", "layer_norm_eps", "image_size")}
    options = {}
    if is_vit and (heads := stated.get("num_heads" if timm else "num_attention_heads")) is not None:
        options = heads_option(heads, weights.state, config["source"])
    fields = VIT_FIELDS if is_vit else RESNET_FIELDS
    other = {k: stated[k] for k, (is_ours, _) in fields.items() if stated.get(k) is not None and not is_ours(stated[k])}
    alias = RESNET_ALIAS.fullmatch(timm or "")
    if timm and (other or not is_vit and not (alias and alias["arch"] == weights.arch)):
        return Weights("", timm, own | {"timm_args": timm_arguments(timm_fields, state)}, dict(state))
    for field, value in other.items():
        raise BadFile(f"{config['source']} says {field} {value!r}, and {weights.arch} has {fields[field][1]}, so that "
                      "its features would be others; give other weights, or, if that file does not belong to these, "
                      "move them to another folder")
    return weights._replace(options=weights.options | options)


def heads_option(heads: object, state: Mapping[str, Tensor], source: str) -> dict:
    """{} for heads of width 64, which are this project's own. Raises BadFile."""
    width = state["blocks.0.norm1.weight"].shape[0] if "blocks.0.norm1.weight" in state else 0
    if not is_count(heads) or width % heads:
        raise BadFile(f"{heads!r} attention heads ({source}), which do not divide the width {width}; correct it there")
    return {"num_heads": int(heads)} if heads * 64 != width else {}


def timm_arguments(fields: Mapping, state: Mapping[str, Tensor]) -> dict:
    """Arguments of timm's network from what a configuration of timm's says."""
    ignored = ("num_classes", "in_chans", "input_size", "pretrained", "dynamic_img_size")
    arguments = {k: v for k, v in fields.items() if v is not None and k not in ignored}
    if "blocks.0.attn.qkv.weight" in state:
        if fields.get("input_size"):
            arguments = {"img_size": fields["input_size"]} | arguments
        if arguments.get("global_pool", "token") not in ("", "token"):
            arguments = {"fc_norm": "fc_norm.weight" in state} | arguments
    return arguments


def shape(state: Mapping[str, Tensor], name: str, ndim: int) -> torch.Size:
    """Shape of a tensor that must have `ndim` dimensions. Raises BadFile."""
    if state[name].ndim != ndim:
        raise BadFile(f"{name} has shape {tuple(state[name].shape)}, expected {ndim} dimensions; give another file")
    return state[name].shape


def vit(layout: str, state: dict[str, Tensor]) -> Weights:
    """Options of build_backbone for a ViT, and its architecture if VisionTransformer has all of its tensors.

    Some networks of timm have no position embedding of the class token, or have added it to the token: it becomes 0.
    timm calls the layers of a gated MLP fc1 and fc2 too; fc1 has twice as many outputs as fc2 has inputs.
    """
    if "pos_embed" not in state or "patch_embed.proj.weight" not in state:
        return Weights(layout, None, {}, state)
    width, in_chans, _, patch = shape(state, "patch_embed.proj.weight", 4)
    positions = shape(state, "pos_embed", 3)[1]
    if math.isqrt(positions) ** 2 == positions:
        state |= {"pos_embed": F.pad(state["pos_embed"], (0, 0, 1, 0))}
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    options = {"patch_size": patch, "in_chans": in_chans, "img_size": side * patch}
    if not all(VIT_NAME.fullmatch(name) or HEAD.match(name) for name in state):
        return Weights(layout, None, options, state)
    arch = VIT_SIZES.get((width, distinct(state, r"blocks\.(\d+)\.")))
    first, second = (state.get(f"blocks.0.mlp.{name}.weight", torch.empty(0, 0)).shape for name in ("fc1", "fc2"))
    if first[0] and first[0] == 2 * second[-1]:
        state = {k.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3."): v for k, v in state.items()}
    gated = "blocks.0.mlp.w12.weight" in state
    if gated or arch == "vit_giant2":
        options["ffn_layer"] = "swiglu" if gated else "mlp"
    if "register_tokens" in state:
        options["num_register_tokens"] = state["register_tokens"].shape[1]
        # The published networks with registers interpolate in another way than training does by default, whose
        # checkpoints have chunked names.
        if layout and CHUNKED not in layout:
            options |= {"interpolate_antialias": True, "interpolate_offset": 0.0}
    if "blocks.0.ls1.gamma" in state:
        options["init_values"] = 1.0
    if "mask_token" in state:
        options["method"] = "dinov2"
    return Weights(layout, arch, options, state)


def xcit(layout: str, state: dict[str, Tensor]) -> Weights:
    stem = "patch_embed.proj.{}.0.weight"
    width = XCIT_SIZES.get(state["cls_token"].shape[-1])
    patch = 16 if stem.format(6) in state else 8  # one convolution of stride 2 per halving
    depth = distinct(state, r"blocks\.(\d+)\.")
    if width is None or stem.format(0) not in state:
        return Weights(layout, None, {}, state)
    options = {"patch_size": patch, "in_chans": shape(state, stem.format(0), 4)[1]}
    return Weights(layout, f"xcit_{width}_{depth}_p{patch}_224", options, state)


def resnet(layout: str, state: dict[str, Tensor]) -> Weights:
    arch = RESNETS.get((distinct(state, r"layer3\.(\d+)\."), "layer1.0.conv3.weight" in state))
    if state.get("layer1.0.conv1.weight", torch.empty(0)).shape[:1] != (64,):  # Wide ResNet, ResNeXt
        arch = None
    options = {"in_chans": shape(state, "conv1.weight", 4)[1]} if "conv1.weight" in state else {}
    return Weights(layout, arch, options, state)


def distinct(state: Mapping[str, Tensor], pattern: str) -> int:
    """Number of distinct values of the pattern's group, matched at the start of the names."""
    return len({m[1] for m in (re.match(pattern, name) for name in state) if m})


# ---- Names ----


def rename(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The layout's name, and the tensors under the names of this project's (for XCiT, timm's) networks."""
    layout, state = "", dict(state)
    for mark, name, convert in LAYOUTS:
        if any(re.match(mark, key) for key in state):
            layout, state = f"{layout}, {name}".removeprefix(", "), convert(state)
    return layout, state


# The library has two sets of names: on disk, and, from transformers 5 on, in a model's state_dict().
HUGGING_FACE = [(re.compile(pattern), name) for pattern, name in (
    (r"^(vit|dinov2|dinov2_with_registers)\.", ""),
    (r"^encoder\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^layernorm\.", "norm."),
    (r"^layers?\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.(attention\.)?(query|key|value|[qkv]_proj)\.", r".attn.\2."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
)]  # fmt: skip


def from_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state.items():
        for pattern, new in HUGGING_FACE:
            name = pattern.sub(new, name)
        renamed[name] = value
    for name in [n for n in renamed if re.search(r"\.attn\.(query|q_proj)\.", n)]:
        parts = [name.replace("query", p).replace("q_proj", f"{p[0]}_proj") for p in ("query", "key", "value")]
        if all(part in renamed for part in parts):
            qkv = torch.cat([renamed.pop(part) for part in parts])
            renamed[re.sub(r"(query|q_proj)", "qkv", name)] = qkv
    return renamed


def from_dinov2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drops the mask tokens of other methods, which have three dimensions; DINOv2's is (1, D)."""
    return {k: v for k, v in state.items() if k != "mask_token" or v.ndim == 2}


def from_chunks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`blocks.<chunk>.<block>.` becomes `blocks.<block>.`; blocks are numbered through all chunks."""
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", k): v for k, v in state.items()}


def from_timm_registers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"register_tokens" if k == "reg_token" else k: v for k, v in state.items()}


def to_timm_registers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ViT with registers as timm has it: the class token includes its position embedding."""
    state, position = dict(state), state["pos_embed"]
    state |= {"reg_token": state.pop("register_tokens"), "pos_embed": position[:, 1:],
              "cls_token": state["cls_token"] + position[:, :1]}
    return state


def from_xcit(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published XCiT names as timm's, which has `pos_embed` and splits qkv in the class-attention blocks."""
    renamed = {}
    for name, value in state.items():
        name = name.replace("pos_embeder.", "pos_embed.")
        if re.match(r"cls_attn_blocks\.\d+\.attn\.qkv\.", name):
            renamed |= {name.replace("qkv", p): v for p, v in zip("qkv", value.chunk(3), strict=True)}
        else:
            renamed[name] = value
    return renamed


def to_xcit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_xcit`; other networks' tensors keep their names."""
    published = {}
    for name, value in state.items():
        match = re.fullmatch(r"(cls_attn_blocks\.\d+\.attn\.)([qkv])(\.\w+)", name)
        if match and match[2] != "q":
            continue
        if match:
            name, value = f"{match[1]}qkv{match[3]}", torch.cat([state[f"{match[1]}{p}{match[3]}"] for p in "qkv"])
        published[re.sub(r"^pos_embed\.", "pos_embeder.", name)] = value
    return published


CHUNKED = "chunked"
# (pattern that one of the names matches, name of the layout, conversion), applied one after another in this order.
LAYOUTS = (
    (r"((vit|dinov2|dinov2_with_registers)\.)?embeddings\.patch_embeddings\.", "Hugging Face", from_hugging_face),
    (r"mask_token$", "DINOv2", from_dinov2),
    (r"blocks\.\d+\.\d+\.attn\.qkv\.weight", CHUNKED, from_chunks),
    (r"reg_token$", "timm", from_timm_registers),
    (r"cls_attn_blocks\.0\.attn\.qkv\.", "XCiT", from_xcit),
)


# ---- Linear classifiers ----


def linear_classifier(loaded: Mapping, path: str = "") -> nn.Linear:
    """The classifier of a linear evaluation, D -> K.

    Reads a published `*_linearweights.pth`, and any file whose tensors, or those under `state_dict`, have names that
    end in `linear.weight` and `linear.bias`, or are `weight` and `bias`.

    Raises:
        BadFile: there is no such pair, or there are several.
    """
    state = loaded["state_dict"] if isinstance(loaded.get("state_dict"), Mapping) else loaded
    weights = [k for k in state if isinstance(k, str) and re.fullmatch(r"(.*\.)?linear\.weight|weight", k)]
    weight, bias = (state.get(weights[0].removesuffix("weight") + kind) if len(weights) == 1 else None
                    for kind in ("weight", "bias"))
    if not isinstance(weight, Tensor) or not isinstance(bias, Tensor) or weight.shape[:-1] != bias.shape:
        raise BadFile(f"{path}: no linear classifier, which has `linear.weight` (classes, width) and `linear.bias`; "
                      f"it has {', '.join(map(str, list(state)[:5]))}")
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.load_state_dict({"weight": weight, "bias": bias})
    return linear
