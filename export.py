"""Write a backbone for other libraries, and check that they compute with it what this project computes.

    python export.py --pretrained_weights output/run/checkpoint.pth --format onnx --output backbone.onnx
    python export.py --pretrained_weights output/run/checkpoint.pth --format hf --output backbone_hf \\
        --results output/run/eval_knn.json --training_data "my pictures"

What is written is loaded by its library (onnxruntime, safetensors, timm, transformers, torch.export) and compared on
random pictures; only then it appears under --output. Exit code 1: the outputs differ, and nothing is left.

Shapes: B pictures, C channels, D width; sizes are height x width in pixels.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

import flags
from protocols.features import weights_hash
from protocols.formats import FORMATS, SUFFIXES, Differs, Run, same
from vision_transformer import VisionTransformer
from weights import backbones
from weights.layouts import STORED_OPTIONS


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("Write a backbone for other libraries, and check what they compute with it.")
    add = parser.add_argument
    add("--pretrained_weights", required=True, help="a checkpoint or weights, in any layout")
    add("--checkpoint_key", default="teacher", help="part of the checkpoint: teacher or student")
    add("--arch", default="vit_small", help="where the weights do not say")
    add("--patch_size", type=flags.positive_int, default=16, help="where the weights do not say")
    add("--format", choices=tuple(FORMATS), required=True,
        help="onnx; safetensors; timm: a folder for timm.create_model('local-dir:FOLDER', pretrained=True); "
        "hf: a folder for transformers; torch: a .pt2 of torch.export")
    add("--output", required=True, help="file or folder to write; there must be none yet")
    add("--image_size", type=flags.count, default=0,
        help="pixels a side; 0: what the network's position embeddings are made for, or the training's crops")
    add("--dynamic_size", action="store_true", help="onnx, torch: pictures of any height and width, as the network")
    add("--opset", type=flags.positive_int, default=18, help="onnx: version of the operators")
    add("--tolerance", type=flags.positive, default=1e-4, help="largest difference, in units of the features' RMS")
    add("--resize_size", type=flags.count, default=0, help="timm, hf: shorter side before the crop; 0: x 256 / 224")
    add("--results", nargs="*", default=[], help="hf: results' files of the evaluations, for the model card")
    add("--training_data", default="not stated", help="hf: for the model card")
    add("--license", default="", help="hf, timm: of the weights, such as apache-2.0")
    return parser


# ---- What is exported ----


def at_size(model: nn.Module, size: int) -> nn.Module:
    """A copy of a ViT whose position embeddings are made for pictures of size x size; other networks as they are."""
    if not isinstance(model, VisionTransformer):
        return model
    patches = (size // model.patch_embed.patch_size) ** 2
    position = model.interpolate_pos_encoding(torch.empty(1, 1 + patches, 0), size, size)
    model = copy.deepcopy(model)
    model.pos_embed = nn.Parameter(position.clone(), requires_grad=False)
    model.patch_embed.img_size, model.patch_embed.num_patches = size, patches
    return model


@torch.no_grad()
def largest_difference(ours: Run, theirs: Run, about: dict, dynamic_size: bool) -> float:
    """max |ours - theirs| over the features' root mean square, for one and three pictures, of several sizes if any."""
    side, patch = about["image_size"], about["patch_size"]
    sizes = [(side, side)]
    if dynamic_size:
        sizes += [(side + patch, side), (side, 2 * side), (side + 2 * patch + 3, side + 2 * patch)]
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for batch, (height, width) in [(b, size) for size in sizes for b in (1, 3)]:
        x = torch.randn(batch, about["in_chans"], height, width, generator=generator)
        expected, found = ours(x), theirs(x)
        same("shape of the features", tuple(found.shape), tuple(expected.shape))
        difference = (found - expected).abs().max() / expected.square().mean().sqrt()
        worst = max(worst, np.nan_to_num(difference.item(), nan=math.inf))
    return worst


def describe(model: nn.Module, info: dict, args: argparse.Namespace) -> dict:
    """What a written file says of the network: plain values."""
    is_vit = isinstance(model, VisionTransformer)
    size = args.image_size or (model.patch_embed.img_size if is_vit else info["global_crops_size"])
    if 0 < args.resize_size < size:
        raise flags.Refused(f"--resize_size {args.resize_size}: smaller than the crop of {size}; raise it")
    if is_vit and size < info["patch_size"]:
        raise flags.Refused(f"--image_size {size}: smaller than a patch of {info['patch_size']}")
    about = {k: list(v) if isinstance(v, tuple) else v for k, v in info.items()} | {
        "global_crops_size": size, "image_size": size, "resize_size": args.resize_size or round(size * 256 / 224),
        "weights_sha256": weights_hash(model)}  # fmt: skip
    if is_vit:
        about |= {k: getattr(model, k) for k in STORED_OPTIONS}
    return about


def read_reports(about: dict, args: argparse.Namespace) -> list[tuple[str, dict]]:
    """The reports of --results, which must be of these weights."""
    reports = []
    for path in args.results:
        try:
            report = json.loads(Path(path).read_text())
            if not report["results"]:
                raise ValueError("no results in it")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise flags.Refused(f"--results {path}: not a results' file of an evaluation ({error})") from error
        if report.get("weights_sha256") != about["weights_sha256"]:
            raise flags.Refused(f"--results {path}: of other weights; evaluate --pretrained_weights "
                                f"{args.pretrained_weights} with --checkpoint_key {args.checkpoint_key}")
        reports.append((path, report))
    return reports


# ---- The script ----

ONLY_FOR = {"dynamic_size": ("onnx", "torch"), "opset": ("onnx",), "results": ("hf",), "training_data": ("hf",),
            "license": ("hf", "timm")}  # fmt: skip


def check_flags(args: argparse.Namespace) -> None:
    """What can be said before anything is read. Raises ValueError."""
    output = Path(args.output)
    if not args.pretrained_weights:
        raise ValueError("--pretrained_weights: empty; give a file of weights, as random ones are not worth a file")
    if not re.fullmatch(r"[\w.+-]*", args.license):
        raise ValueError(f"--license {args.license!r}: give its identifier, such as apache-2.0")
    if output.suffix != SUFFIXES.get(args.format, output.suffix):
        raise ValueError(f"--output {args.output}: a file of this format is named {SUFFIXES[args.format]}")
    if not args.output or output.exists():
        raise ValueError(f"--output {args.output or repr('')}: exists; remove it or give another")
    flags.check_folder(output, "--output")
    for flag, formats in ONLY_FOR.items():
        if getattr(args, flag) != get_args_parser().get_default(flag) and args.format not in formats:
            raise ValueError(f"--{flag}: for --format {' and '.join(formats)}; leave it out for {args.format}")


def export(args: argparse.Namespace) -> float:
    """Write --output and return the largest difference between this project's features and the library's.

    Raises:
        flags.Refused: bad input. Differs: the library computes something else; nothing is left.
    """
    output = Path(args.output)
    try:
        check_flags(args)
        model, info = backbones.load_backbone(args.pretrained_weights, args.arch, args.patch_size,
                                               args.checkpoint_key)
        about = describe(model, info, args)
        args.reports = read_reports(about, args)
        ours = model if args.dynamic_size else at_size(model, about["image_size"])
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporters, about themselves
            written = Path(folder) / output.name
            theirs = FORMATS[args.format](ours, about, written, args)
            difference = largest_difference(model, theirs, about, args.dynamic_size)
            verdict = f"largest difference {difference:.1e} of the features' RMS, tolerance {args.tolerance:g}"
            if difference > args.tolerance:
                raise Differs(verdict)
            os.replace(written, output)
    except (ValueError, OSError, ImportError) as error:
        raise flags.Refused(error) from error
    except RuntimeError as error:
        raise flags.Refused(f"--format {args.format}: this network can't be written so "
                            f"({str(error).strip().splitlines()[0][:200]})") from error
    print(f"wrote {args.output} ({args.format}); {verdict}; weights {about['weights_sha256'][:16]}")
    return difference


def main(args: argparse.Namespace) -> int:
    try:
        return flags.exit_code("export.py", export, args)
    except Differs as error:
        print(f"export.py: error: --format {args.format}: the library computes something else ({error}); nothing was "
              "written", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
