"""Export a backbone for other libraries, and verify that they compute the same features as this project.

    python export.py --pretrained_weights output/run/checkpoint.pth --format onnx --output backbone.onnx
    python export.py --pretrained_weights output/run/checkpoint.pth --format hf --output backbone_hf \\
        --results output/run/eval_knn.json --training_data "my holiday photos"

The written file is loaded by its library (onnxruntime, safetensors, timm, transformers, torch) and compared
with the network on random images; only then does it appear under --output. Exit code 1: the features differ, and
nothing is written.

Shapes: B images, C channels, D width; sizes are height x width in pixels.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from torch import nn

import flags
from parallel import Refused
from protocols.features import weights_hash
from protocols.formats import FORMATS, SUFFIXES, Differs, Run, same
from vision_transformer import VisionTransformer
from weights import backbones
from weights.layouts import INTERPOLATION, STORED_OPTIONS


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("Export a backbone for other libraries, and verify the features that they compute with it.")
    network = parser.add_argument_group("network")
    add = network.add_argument
    add("--pretrained_weights", required=True, help="checkpoint or weights, in any layout")
    add("--checkpoint_key", default="teacher", help="part of the checkpoint: teacher or student")
    add("--arch", default=None, help="if the weights do not say (default: vit_small)")
    add("--patch_size", type=flags.positive_int, default=None, help="if the weights do not say (default: 16)")
    flags.add_image_flags(network)
    add = parser.add_argument_group("output").add_argument
    add("--format", choices=tuple(FORMATS), required=True,
        help="onnx; safetensors; timm: a folder for timm.create_model('local-dir:FOLDER', pretrained=True); "
        "hf: a folder for transformers; torch: a .pt2 file of torch.export; published: a .pth file with the backbone's "
        "state dict, as the published ones")
    add("--output", required=True, help="file or folder to write; it must not exist")
    add("--tolerance", type=flags.positive, default=1e-4,
        help="largest accepted difference of a feature, relative to the features' RMS; raise it for networks that "
        "other libraries compute in another order")
    add = parser.add_argument_group("image size").add_argument
    add("--image_size", type=flags.count, default=0,
        help="pixels per side, for use at another size than in training; 0: the size of the position embeddings, or "
        "of the training crops")
    add("--dynamic_size", action="store_true", help="onnx, torch: accept any height and width instead of one size")
    add("--resize_size", type=flags.count, default=0,
        help="timm, hf: shorter side before the crop in the preprocessing configuration; 0: image size x 256 / 224")
    add = parser.add_argument_group("metadata and versions").add_argument
    add("--opset", type=flags.positive_int, default=18,
        help="onnx: version of the operators; lower it for an older runtime")
    add("--results", nargs="*", default=[], help="hf: JSON files of this project's evaluations, for the model card")
    add("--training_data", default="not stated", help="hf: description for the model card")
    add("--license", default="", help="hf, timm: license of the weights, such as apache-2.0")
    return parser


# ---- What is exported ----


def at_size(model: nn.Module, size: int) -> nn.Module:
    """A copy of a ViT with position embeddings for images of size x size; other networks are returned unchanged."""
    if not isinstance(model, VisionTransformer):
        return model
    patches = (size // model.patch_size) ** 2
    position = model.interpolate_pos_encoding(torch.empty(1, 1 + patches, 0), size, size)
    model = copy.deepcopy(model)
    model.pos_embed = nn.Parameter(position.clone(), requires_grad=False)
    model.img_size, model.patch_embed.num_patches = size, patches
    return model


@torch.no_grad()
def largest_difference(ours: Run, theirs: Run, about: Mapping, dynamic_size: bool) -> float:
    """max |ours - theirs| / RMS(ours) over random images: batches of 1 and 3, of several sizes if they are dynamic.

    Raises:
        Differs: the shapes of the features differ.
    """
    side, patch = about["image_size"], about["patch_size"]
    sizes = [(side, side)]
    if dynamic_size:
        sizes += [(side + patch, side), (side, 2 * side), (side + 2 * patch + 3, side + 2 * patch)]
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for batch, (height, width) in [(b, size) for size in sizes for b in (1, 3)]:
        x = torch.randn(batch, about["in_chans"], height, width, generator=generator)
        expected, features = ours(x), theirs(x)
        same("shape of the features", tuple(features.shape), tuple(expected.shape))
        difference = (features - expected).abs().max() / expected.square().mean().sqrt()
        worst = max(worst, np.nan_to_num(difference.item(), nan=math.inf))
    return worst


def describe(model: nn.Module, info: Mapping, image_size: int, resize_size: int) -> dict:
    """What the written file says about the network, in plain values.

    Args:
        info: what `load_backbone` returned.
        image_size, resize_size: as --image_size and --resize_size, 0 for their defaults.

    Raises:
        Refused: sizes that contradict each other or the network.
    """
    is_vit = isinstance(model, VisionTransformer)
    size = image_size or (model.img_size if is_vit else info["global_crops_size"])
    if 0 < resize_size < size:
        raise Refused(f"--resize_size {resize_size}: smaller than the crop of {size}; raise it")
    if is_vit and size < info["patch_size"]:
        raise Refused(f"--image_size {size}: smaller than a patch of {info['patch_size']}; raise it")
    about = {k: list(v) if isinstance(v, tuple) else v for k, v in info.items() if k not in ("options", "sources")} | {
        "global_crops_size": size, "image_size": size, "resize_size": resize_size or round(size * 256 / 224),
        "weights_sha256": weights_hash(model)}  # fmt: skip
    about |= {k: info["options"][k] for k in STORED_OPTIONS if k in info["options"]}
    if is_vit:
        about |= {k: getattr(model, k) for k in INTERPOLATION}
    return about


@torch.no_grad()
def refuse_unfit_size(model: nn.Module, about: Mapping) -> None:
    """Refuse an image size that a network of timm or torchvision does not accept; some accept only one."""
    if isinstance(model, VisionTransformer):
        return
    size = about["image_size"]
    try:
        model(torch.zeros(1, about["in_chans"], size, size))
    except (RuntimeError, ValueError, AssertionError) as error:  # timm asserts
        reason = " ".join(str(error).split())[:200]
        raise Refused(f"--image_size {size}: {about['arch']} refuses it ({reason}); give another one") from error


def read_report(path: str, weights_sha256: str) -> dict:
    """A JSON file that an evaluation of these weights wrote. Raises Refused."""
    try:
        report = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:  # ValueError: not JSON, or not text
        raise Refused(f"--results {path}: not a results file of an evaluation ({error}); give its JSON file") from error
    rows = report.get("results") if isinstance(report, dict) else None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise Refused(f"--results {path}: not a results file of an evaluation (no results in it); give its JSON file")
    if report.get("weights_sha256") != weights_sha256:
        raise Refused(f"--results {path}: belongs to other weights; evaluate the same --pretrained_weights and "
                      "--checkpoint_key")
    return report


# ---- The script ----

FILES = {*SUFFIXES.values(), ".pt", ".bin", ".ckpt"}
ONLY_FOR = {"dynamic_size": ("onnx", "torch"), "opset": ("onnx",), "results": ("hf",), "training_data": ("hf",),
            "license": ("hf", "timm")}  # fmt: skip


def check_output(output: str, kind: str) -> None:
    """Refuse an --output that exists, can't be made, or has another suffix than its format's."""
    path = Path(output)
    if path.suffix != SUFFIXES.get(kind, path.suffix):
        raise Refused(f"--output {output}: the name must end in {SUFFIXES[kind]} for --format {kind}")
    if kind not in SUFFIXES and path.suffix in FILES:
        raise Refused(f"--output {output}: --format {kind} writes a folder; give a name without {path.suffix}")
    if not output or path.exists():
        raise Refused(f"--output {output or repr('')}: exists; remove it or give another name")
    flags.check_folder(path, "--output")


def check_flags(given: Mapping, kind: str) -> None:
    """Refuse flags, by name, that contradict the format, and a license that is no identifier."""
    parser = get_args_parser()
    for flag, kinds in ONLY_FOR.items():
        if given[flag] != parser.get_default(flag) and kind not in kinds:
            raise Refused(f"--{flag}: for --format {' and '.join(kinds)}; leave it out for {kind}")
    if not re.fullmatch(r"[\w.+-]*", given["license"]):
        raise Refused(f"--license {given['license']!r}: give its identifier, such as apache-2.0")


def export(args: argparse.Namespace) -> float:
    """Write --output and return the largest relative difference of features.

    Raises:
        Refused: bad input.
        Differs: the library computes other features; nothing is written.
    """
    kind, output = args.format, Path(args.output)
    if not args.pretrained_weights:
        raise Refused("--pretrained_weights: empty; give a file of weights, random weights are not exported")
    check_output(args.output, kind)
    check_flags(vars(args), kind)
    model, info = backbones.load_backbone(args.pretrained_weights, args.arch, args.patch_size, args.checkpoint_key,
                                          mean=args.mean, std=args.std, in_chans=args.in_chans)
    about = describe(model, info, args.image_size, args.resize_size)
    refuse_unfit_size(model, about)
    options = {flag: getattr(args, flag) for flag, kinds in ONLY_FOR.items() if kind in kinds}
    if args.results:
        options["results"] = [(path, read_report(path, about["weights_sha256"])) for path in args.results]
    exported = model if args.dynamic_size else at_size(model, about["image_size"])
    flags.prepare_output(output.parent, "--output")
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters warn about their own internals
        written = Path(folder) / output.name
        with redirect_stdout(io.StringIO()):  # what is said about the temporary file
            theirs = FORMATS[kind](exported, about, written, **options)
        difference = largest_difference(model, theirs, about, args.dynamic_size)
        verdict = f"largest difference {difference:.1e} of the features' RMS, tolerance {args.tolerance:g}"
        if difference > args.tolerance:
            raise Differs(verdict)
        os.replace(written, output)
    print(f"wrote {args.output} ({kind}); {verdict}; weights {about['weights_sha256'][:16]}")
    return difference


def main(args: argparse.Namespace) -> int:
    """Returns the exit code: 0 written, 1 the features differ, 2 bad input."""
    return flags.exit_code("export.py", export, args)


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
