"""Wrong flags and combinations: exit code 2, one line with flag, value and remedy, nothing written, at once."""

import argparse
import copy
import json
import os
import re
import shlex
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from processes import ENV, SMALL, launch

import curate
import detect
import eval_depth
import eval_knn
import eval_semantic
import flags
import main_dino
import parallel
import visualize_attention
from imagesets import loaders
from pretraining import faults, options
from protocols import features
from vision_transformer import build_backbone

SECONDS = 5  # torch is imported already
pytestmark = pytest.mark.usefixtures("small_heads")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """What the command lines below name: pictures, lists, weights, and things that are none of these."""
    folder = tmp_path_factory.mktemp("bad")
    for i in range(4):
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(folder / f"picture{i}.png")
    for name in ("few", "unlabelled/train", "unlabelled/val", "labelled/train/a", "labelled/train/b",
                 "disjoint/train/a", "disjoint/train/c", "disjoint/val/b", "disjoint/val/d"):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / name / "x.png")
    (folder / "empty").mkdir()
    (folder / "file").write_text("neither a folder nor a picture")
    (folder / "empty.txt").write_text("")
    (folder / "gone.txt").write_text("gone.png\n")
    (folder / "mixed.txt").write_text("picture0.png\t1\npicture1.png\n")
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    (folder / "broken.pth").write_bytes(b"PK\3\4 no more than this")
    torch.manual_seed(0)
    state = build_backbone("vit_nano", 16, img_size=32)[0].state_dict()
    torch.save(state, folder / "nano.pth")
    torch.save({"student": {"x": torch.zeros(1)}, "epoch": 3}, folder / "student.pth")
    torch.save({"teacher": {0: torch.zeros(1)}}, folder / "numbered.pth")
    (folder / "tensor").mkdir()
    for name in ("tensor.pth", "tensor/checkpoint.pth"):
        torch.save(torch.zeros(1), folder / name)
    (folder / "folder" / "checkpoint.pth").mkdir(parents=True)
    (folder / "itself.txt").write_text(f"@{folder}/itself.txt")
    (folder / "nested.txt").write_text("--epochs 3 @none.txt")
    (folder / "rubbish.tar").write_bytes(b"rubbish" * 200)
    np.save(folder / "array.npy", np.zeros(3))
    dense_folders(folder)
    coco_files(folder)
    return folder


def dense_folders(folder: Path) -> None:
    """masks_NAME and depth_NAME: two images for training and two for test, the last of which has something wrong."""
    wrong = {
        "masks": {"missing": None, "sizes": np.zeros((8, 9), np.uint8), "classes": np.full((8, 8), 254, np.uint8)},
        "depth": {"missing": None, "sizes": np.ones((8, 9)), "empty": np.zeros((8, 8)), "negative": -np.ones((8, 8))},
    }
    save = {"masks": lambda values, path: Image.fromarray(values).save(f"{path}.png"),
            "depth": lambda values, path: np.save(f"{path}.npy", values.astype(np.float32))}
    for truth, name in [(truth, name) for truth, cases in wrong.items() for name in cases]:
        for part, i in [("train", 0), ("train", 1), ("val", 0), ("val", 1)]:
            root = folder / f"{truth}_{name}" / part
            for inner in ("images", truth):
                (root / inner).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (99 * i, 0, 0)).save(root / "images" / f"{i}.png")
            values = wrong[truth][name] if (part, i) == ("val", 1) else np.eye(8, dtype=np.uint8) + (truth == "depth")
            if values is not None:
                save[truth](values, root / truth / f"{i}")
        (folder / f"{truth}_{name}" / "classes.txt").write_text("ground\nline\n")


def coco_files(folder: Path) -> None:
    """NAME.json, files in COCO format with one thing wrong, of the pictures."""
    good = {"images": [{"id": 7, "file_name": "picture0.png", "width": 8, "height": 8}],
            "annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 1, 4, 4]}],
            "categories": [{"id": 3, "name": "Fish"}, {"id": 5, "name": "cup"}]}
    wrong = {"good": {}, "unknown": {"annotations": {"image_id": 8}}, "category": {"annotations": {"category_id": 4}},
             "outside": {"annotations": {"bbox": [5, 5, 9, 2]}}, "gone": {"images": {"file_name": "gone.png"}},
             "flat": {"annotations": {"bbox": [1, 1, 4, 0]}}, "twice": {"categories": {"name": "Cup "}},
             "lacks": {"categories": {"id": None, "names": ""}}}
    for name, changes in wrong.items():
        content = copy.deepcopy(good)
        for key, values in changes.items():
            content[key][0].update(values)
            content[key][0] = {k: v for k, v in content[key][0].items() if v is not None}
        (folder / f"{name}.json").write_text(json.dumps(content))


def run(script, argv: str, here: Path, out: Path, defaults=()) -> tuple[int, float]:
    """Exit code and CPU seconds of the script's own parser and main; {here} stands for the folder above."""
    argv = [a.replace("{here}", str(here)) for a in shlex.split(argv)]
    output = [] if "--output_dir" in argv else ["--output_dir", str(out)]
    begun = time.process_time()
    try:
        code = script.main(script.get_args_parser().parse_args([*defaults, *output, *argv]))
    except SystemExit as error:
        code = error.code
    return code, time.process_time() - begun


def files(folder: Path) -> list[tuple]:
    return sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*"))


def check(script, argv, words, here, tmp_path, capfd, monkeypatch, defaults=()):
    monkeypatch.chdir(tmp_path)
    before = files(here)
    code, seconds = run(script, argv, here, tmp_path / "out", defaults)
    stderr = capfd.readouterr().err
    assert code == 2, (code, stderr)
    assert len(stderr.strip().splitlines()) == 1 and "Traceback" not in stderr, stderr
    for word in words:
        assert re.search(word.replace("{here}", str(here)), stderr), (word, stderr)
    assert not list(tmp_path.iterdir()) and files(here) == before and seconds < SECONDS


# Each: the flags; what the line must say: flag, value, remedy (regular expressions).
TRAINING = [
    ("--replay {here}/array.npy", ("--replay {here}/array.npy", "damaged", "give the failure.pt")),
    ("--replay {here}/tensor.pth", ("--replay {here}/tensor.pth", "a Tensor", "give the failure.pt")),
    ("--replay {here}/absent.pt", ("--replay {here}/absent.pt", "no such file", "give the failure.pt")),
    # One value: text, sign, bounds, not a number
    ("--epochs 0", ("--epochs", "0 is out of range", "at least 1")),
    ("--epochs -3", ("--epochs", "-3 is out of range", "at least 1")),
    ("--epochs ten", ("--epochs", "'ten' is not a whole number", "at least 1")),
    ("--epochs 1.5", ("--epochs", "'1.5' is not a whole number", "at least 1")),
    ("--epochs ''", ("--epochs", "'' is not a whole number", "at least 1")),
    ("--steps -1", ("--steps", "-1", "at least 0")),
    ("--batch_size_per_gpu 0", ("--batch_size_per_gpu", "0", "at least 1")),
    ("--grad_accum_steps 0", ("--grad_accum_steps", "0", "at least 1")),
    ("--patch_size 0", ("--patch_size", "0", "at least 1")),
    ("--out_dim 1", ("--out_dim", "1", "at least 2")),
    ("--in_chans 0", ("--in_chans", "0", "at least 1")),
    ("--global_crops_size 0", ("--global_crops_size", "0", "at least 1")),
    ("--local_crops_size -96", ("--local_crops_size", "-96", "at least 1")),
    ("--local_crops_number -1", ("--local_crops_number", "-1", "at least 0")),
    ("--num_workers -1", ("--num_workers", "-1", "at least 0")),
    ("--saveckp_freq -1", ("--saveckp_freq", "-1", "at least 0")),
    ("--saveckp_every_steps x", ("--saveckp_every_steps", "'x'", "at least 0")),
    ("--eval_knn_every -1", ("--eval_knn_every", "-1", "at least 0")),
    ("--log_every 0", ("--log_every", "0", "at least 1")),
    ("--freeze_last_layer -1", ("--freeze_last_layer", "-1", "at least 0")),
    ("--seed -1", ("--seed", "-1", "at least 0")),
    ("--seed 18446744073709551616", ("--seed", "18446744073709551616", "at most")),
    ("--max_pixels 0", ("--max_pixels", "0", "at least 1")),
    ("--value_range 5 5", ("--value_range", "5 5", "LOW < HIGH")),
    ("--value_range -1000 nan", ("--value_range", "nan", "finite")),
    ("--lr nan", ("--lr", "nan", "above 0")),
    ("--lr inf", ("--lr", "inf", "above 0")),
    ("--lr 1e999", ("--lr", "1e999", "above 0")),
    ("--optimizer sgd --lr 1e300", ("--lr", "1e300", "at most 1e.30")),
    ("--lr 0", ("--lr", "0", "above 0")),
    ("--lr -0.1", ("--lr", "-0.1", "above 0")),
    ("--lr 0,0005", ("--lr", "'0,0005' is not a number", "above 0")),
    ("--min_lr=-1e-6", ("--min_lr", "-1e-6", "at least 0")),
    ("--weight_decay nan", ("--weight_decay", "nan", "at least 0")),
    ("--weight_decay_end=-inf", ("--weight_decay_end", "-inf", "at least 0")),
    ("--clip_grad -3", ("--clip_grad", "-3", "at least 0")),
    ("--warmup_epochs -1", ("--warmup_epochs", "-1", "at least 0")),
    ("--warmup_teacher_temp 0", ("--warmup_teacher_temp", "0", "above 0")),
    ("--teacher_temp 0", ("--teacher_temp", "0", "above 0")),
    ("--teacher_temp -0.04", ("--teacher_temp", "-0.04", "above 0")),
    ("--momentum_teacher 1.5", ("--momentum_teacher", "1.5", "at most 1")),
    ("--momentum_teacher nan", ("--momentum_teacher", "nan", "at most 1")),
    ("--drop_path_rate 1", ("--drop_path_rate", "1", "at most 0.99")),
    ("--max_bad_images 2", ("--max_bad_images", "2", "at most 1")),
    ("--mean nan nan nan", ("--mean", "nan", "at most 1")),
    ("--mean 123.7 116.3 103.5", ("--mean", "123.7", "at most 1")),
    ("--mean a b c", ("--mean", "'a' is not a number", "at most 1")),
    ("--std 0 0 0", ("--std", "0", "above 0 and at most 1")),
    ("--std 58.4 57.1 57.4", ("--std", "58.4", "at most 1")),
    ("--use_fp16 maybe", ("--use_fp16", "'maybe' is not", "true or false")),
    ("--norm_last_layer 2", ("--norm_last_layer", "'2' is not", "true or false")),
    ("--optimizer adam", ("--optimizer", "'adam'", "adamw")),
    ("--clip_mode norm", ("--clip_mode", "'norm'", "global")),
    ("--precision fp8", ("--precision", "'fp8'", "bf16")),
    # Number of values, names of flags, files of flags
    ("--global_crops_scale 0.4", ("--global_crops_scale", "expected 2")),
    ("--epochs", ("--epochs", "expected one")),
    ("--mean", ("--mean", "expected at least one")),
    ("--epoch 3", ("--epoch 3", "--epochs")),
    ("--learning_rate 0.1", ("--learning_rate", "--help")),
    ("stray", ("stray", "--help")),
    ("@presets/none.txt", ("@presets/none.txt", "No such file", "presets/shapes.txt")),
    ("@{here}", ("@{here}", "not a file of flags .Is a directory", "presets/shapes.txt")),
    ("@{here}/itself.txt", ("@", "includes itself", "remove that line")),
    ("@{here}/nested.txt", ("@none.txt", "No such file", "presets/shapes.txt")),
    ("@{here}/binary.txt", ("@{here}/binary.txt", "not text", "@presets/shapes.txt")),
    # Values that contradict each other
    ("--global_crops_scale 1 0.4", ("--global_crops_scale 1 0.4", "low <= high")),
    ("--local_crops_scale 0.4 0.05", ("--local_crops_scale 0.4 0.05", "low <= high")),
    ("--global_crops_scale 0 1", ("--global_crops_scale 0 1", "0 < low")),
    ("--global_crops_scale 0.4 1.4", ("--global_crops_scale", "1.4", "at most 1")),
    ("--local_crops_size 64", ("--local_crops_size 64", "--global_crops_size 32", "smaller")),
    ("--patch_size 17", ("--patch_size 17", "--local_crops_size 16", "lower")),
    ("--patch_size 33 --local_crops_number 0", ("--patch_size 33", "--global_crops_size 32", "lower")),
    ("--warmup_epochs 3", ("--warmup_epochs 3", "--epochs 2", "lower")),
    ("--warmup_epochs 2 --steps 3", ("--warmup_epochs 2", "--steps 3", "lower")),
    ("--warmup_teacher_temp_epochs 3", ("--warmup_teacher_temp_epochs 3", "--epochs 2", "lower")),
    ("--warmup_teacher_temp_epochs 3 --steps 8", ("--warmup_teacher_temp_epochs 3", "--steps 8", "lower")),
    ("--min_lr 0.01", ("--min_lr 0.01", "--lr 0.0005", "lower")),
    ("--lr 5e-6", ("--min_lr 1e-06", "--lr 5e-06", "8 images", "lower")),
    ("--mean 0.5", ("--mean 0.5", "--in_chans 3", "3 values")),
    ("--std 0.2 0.2 0.2 0.2", ("--std 0.2 0.2 0.2 0.2", "--in_chans 3", "3 values")),
    ("--in_chans 2", ("--mean", "--in_chans 2", "2 values")),
    ("--in_chans 2 --mean 0.5 0.5 --std 0.2 0.2", ("--in_chans 2", "shapes", "1, 3 or 4")),
    ("--parallel fsdp --precision fp16", ("--parallel fsdp", "--precision fp16", "choose --precision bf16")),
    ("--precision bf16 --use_fp16 false", ("--use_fp16 false", "--precision bf16", "leave one")),
    ("--compile --parallel fsdp", ("--compile default", "--parallel fsdp", "graph", "leave one")),
    ("--compile reduce-overhead --grad_accum_steps 2",
     ("--compile reduce-overhead", "--grad_accum_steps 2", "--compile default")),
    ("--compile fast", ("--compile", "'fast'", "reduce-overhead")),
    ("--crop_on_device", ("--crop_on_device", "--cache_images", "leave it out")),
    ("--crop_on_device --cache_images --noise_patches 0.1",
     ("--crop_on_device", "--noise_patches 0.1", "leave one of them out")),
    ("--arch gmlp_ti16_224 --global_crops_size 32", ("--global_crops_size 32", "--arch gmlp_ti16_224 ", "another")),
    ("--local_crops_number 1000000000", ("--local_crops_number", "at most 1000")),
    ("--arch resnet18 --grad_checkpointing", ("--grad_checkpointing blocks", "resnet18", "leave it out")),
    ("--arch resnet18 --grad_checkpointing layers", ("--grad_checkpointing layers", "resnet18", "leave it out")),
    ("--grad_checkpointing blokcs", ("--grad_checkpointing", "'blokcs'", "blocks")),
    ("--optimizer sgdm", ("--optimizer", "'sgdm'", "lars")),
    ("--arch vit_tiny_patch16_224 --grad_checkpointing layers", ("--grad_checkpointing layers", "give blocks")),
    ("--batch_size_per_gpu 65", ("--batch_size_per_gpu 65", "64 images", "lower")),
    ("--grad_accum_steps 9", ("--grad_accum_steps 9", "64 images", "lower")),
    # Network and device
    ("--arch vit_smal", ("--arch", "vit_smal", "vit_small")),
    ("--arch ''", ("--arch", "no such network", "vit_small")),
    ("--device cuda:99", ("--device cuda:99", "--device cpu|fewer")),
    ("--device tpu", ("--device tpu", "use auto")),
    ("--device meta", ("--device meta", "use auto")),
    ("--out_dim 100000000000000", ("memory ran out", "lower", "--out_dim")),
    ("--global_crops_size 10000000", ("memory ran out", "lower", "crops")),
    ("--steps 999999999999999", ("memory ran out", "lower", "--steps")),
    ("--steps 999999999999999999999999", ("memory ran out", "lower", "--steps")),
    ("--out_dim 999999999999999999999999", ("memory ran out", "lower", "--out_dim")),
    ("--init_from {here}/tensor.pth", ("--init_from {here}/tensor.pth", "a Tensor")),
    ("--init_from {here}/numbered.pth", ("--init_from {here}/numbered.pth", "0 of 150 tensors", "--arch")),
    ("--init_from {here}/none.pth", ("--init_from {here}/none.pth", "no such file")),
    ("--init_from {here}", ("--init_from {here}", "a folder", "give the file")),
    ("--init_from {here}/broken.pth", ("--init_from {here}/broken.pth", "not a readable checkpoint")),
    ("--init_from {here}/picture0.png", ("--init_from {here}/picture0.png", "not a readable checkpoint")),
    ("--init_from {here}/nano.pth", ("--init_from {here}/nano.pth", "of 150 tensors", "--arch")),
    ("--init_from {here}/student.pth", ("--init_from {here}/student.pth", "teacher", "it has student")),
    ("--init_in_chans mean", ("--init_in_chans mean", "--init_from")),
    ("--init_from {here}/nano.pth --arch vit_nano --in_chans 4 --mean 0 0 0 0 --std 1 1 1 1",
     ("--init_from {here}/nano.pth", "3 channel", "not 4", "--init_in_chans", "mean", "tile")),
    # Data
    ("--data_path {here}/none", ("--data_path '{here}/none'", "give")),
    ("--data_path ''", ("--data_path ''", "give")),
    ("--data_path {here}/file", ("--data_path '{here}/file'", "give")),
    ("--data_path {here}/file/images", ("--data_path '{here}/file/images'", "give")),
    ("--data_path {here}/picture0.png", ("--data_path '{here}/picture0.png'", "give")),
    ("--data_path {here}/empty", ("--data_path '{here}/empty'", "no images", "give")),
    ("--data_path {here}/few", ("--batch_size_per_gpu 8", "1 images", "lower")),
    ("--data_path {here}/empty.txt", ("--data_path '{here}/empty.txt'", "empty", "write")),
    ("--data_path {here}/gone.txt", ("--data_path '{here}/gone.txt'", "gone.png", "relative")),
    ("--data_path {here}/mixed.txt", ("--data_path '{here}/mixed.txt'", "TAB", "in all")),
    ("--data_path shapes:0", ("--data_path 'shapes:0'", "give shapes:COUNT")),
    ("--data_path shapes:64x4", ("--data_path 'shapes:64x4'", "8 pixels or more")),
    ("--data_path torchvision:CIFAR11", ("--data_path 'torchvision:CIFAR11'", "CIFAR10")),
    ("--data_path torchvision:", ("--data_path 'torchvision:'", "CIFAR10")),
    ("--data_path '{here}/x-{000..002}.tar'", ("--data_path '{here}/x-{000..002}.tar'", "3 of 3 shards", "correct")),
    ("--data_path {here}/rubbish.tar", ("--data_path '{here}/rubbish.tar'", "invalid header", "fetch this shard")),
    ("--data_path {here}/file.tar.gz", ("--data_path '{here}/file.tar.gz'", "isn't there", "correct")),
    ("--data_path hf:{here}/none", ("--data_path 'hf:{here}/none'", "no folder", "give")),
    ("--data_path hf:{here}/few", ("--data_path 'hf:{here}/few'", "save_to_disk|pip install datasets", "give|pip")),
    ("--eval_knn_every 1 --eval_data_path {here}/none", ("--eval_data_path '{here}/none'", "give")),
    ("--eval_knn_every 1 --eval_data_path {here}/few", ("--eval_data_path '{here}/few'", "val", "give")),
    ("--eval_knn_every 1 --data_path {here}/few --batch_size_per_gpu 1",
     ("--data_path '{here}/few'", "--eval_data_path", "--eval_knn_every 0")),
    ("--eval_knn_every 1 --data_path {here}/unlabelled --batch_size_per_gpu 1",
     ("--data_path {here}/unlabelled", "no labels", "--eval_data_path", "--eval_knn_every 0")),
    ("--eval_knn_every 1 --eval_data_path {here}/disjoint",
     ("--eval_data_path", "training: a, c; test: b, d", "--eval_knn_every 0")),
    ("--eval_knn_every 1 --eval_data_path {here}/unlabelled", ("--eval_data_path {here}/unlabelled", "no labels")),
    ("--eval_knn_every 1 --eval_data_path {here}/labelled", ("--eval_data_path '{here}/labelled'", "val", "give")),
    # Output
    ("--output_dir {here}/file", ("--output_dir {here}/file", "File exists|Not a directory", "choose")),
    ("--output_dir {here}/" + 300 * "x", ("--output_dir", "File name too long", "choose another")),
    ("--output_dir {here}/folder", ("--output_dir {here}/folder", "checkpoint.pth: a folder", "move the file away")),
    ("--output_dir {here}/tensor", ("--output_dir {here}/tensor", "a Tensor", "move the file away")),
    ("--output_dir {here}/file/out", ("--output_dir {here}/file/out", "Not a directory", "choose")),
    ("--output_dir /proc/out", ("--output_dir /proc/out", "choose")),  # where root can't write either
]  # fmt: skip

KNN = [
    ("--nb_knn 0", ("--nb_knn", "0", "at least 1")),
    ("--nb_knn", ("--nb_knn", "expected at least one")),
    ("--temperature 0", ("--temperature", "0", "above 0")),
    ("--temperature nan", ("--temperature", "nan", "above 0")),
    ("--metric cos", ("--metric", "'cos'", "cosine")),
    ("--n_per_class -5", ("--n_per_class", "-5", "at least 1")),
    ("--draws 0", ("--draws", "0", "at least 1")),
    ("--pretrained_weights {here}/none.pth", ("--pretrained_weights {here}/none.pth", "no such file")),
    ("--pretrained_weights {here}/broken.pth", ("--pretrained_weights {here}/broken.pth", "not a readable")),
    ("--pretrained_weights {here}/nano.pth --arch vit_small", ("--arch vit_small", "holds vit_nano", "leave --arch")),
    ("--pretrained_weights {here}/nano.pth --arch resnet18", ("--arch resnet18", "holds vit_nano", "leave --arch out")),
    ("--pretrained_weights {here}/nano.pth --patch_size 8", ("--patch_size 8", "holds 16", "leave --patch_size out")),
    ("--pretrained_weights {here}/student.pth", ("--checkpoint_key teacher", "student.pth", "it has student")),
    ("--data_path {here}/none", ("--data_path '{here}/none'", "give")),
    ("--val_data_path {here}/none", ("--val_data_path '{here}/none'", "give")),
    ("--data_path {here}/disjoint", ("--data_path", "training: a, c; test: b, d", "same names")),
    ("--resize_size 16 --crop_size 32", ("--resize_size 16", "--crop_size 32", "larger")),
    ("--load_features {here}/none", ("--load_features {here}/none", "trainfeat.pth")),
    ("--output_dir {here}/file", ("--output_dir {here}/file", "choose")),
    ("--device cuda:99", ("--device cuda:99", "--device cpu|fewer")),
]  # fmt: skip

ATTENTION = [
    ("--image_path {here}/none.png", ("--image_path {here}/none.png", "(?i)no such file")),
    ("--image_path {here}/file", ("--image_path", "{here}/file", "not an image")),
    ("--images {here}/none", ("--images '{here}/none'", "give")),
    ("--image_path {here}/picture0.png --images {here}", ("--image_path and --images", "one of them")),
    ("--image_size 4", ("--image_size 4", "patch of 16", "raise")),
    ("--image_size 64 64 64", ("--image_size 64 64 64", "give the shorter side")),
    ("--layer 99", ("--layer 99", "0 to 11")),
    ("--threshold 1.5", ("--threshold", "1.5", "at most 1")),
    ("--point 900 900", ("--point 900 900", "outside")),
    ("--point nan 0", ("--point", "nan", "at least 0")),
    ("--arch resnet18", ("--arch resnet18", "give a Vision Transformer")),
    ("--video {here}/none.mp4", ("--video {here}/none.mp4", "no such file")),
    ("--output_dir {here}/file/out", ("--output_dir {here}/file/out", "is a file", "give a folder")),
]  # fmt: skip

SEMANTIC = [
    ("--data_path {here}/masks_missing", ("--data_path '{here}/masks_missing'", "1.png", "no mask", "add it")),
    ("--data_path {here}/masks_sizes", ("--data_path", "masks_sizes", "1.png", "8", "9")),
    ("--data_path {here}/masks_classes", ("--data_path", "masks_classes", "1.png", "254", "2 classes")),
    ("--data_path {here}/few", ("--data_path '{here}/few'", "images/ and masks/")),
    ("--data_path {here}/empty", ("--data_path '{here}/empty'", "images/ and masks/")),
    ("--n_last_blocks 0", ("--n_last_blocks", "0", "at least 1")),
    ("--steps 0", ("--steps", "0", "at least 1")),
    ("--lr nan", ("--lr", "nan", "above 0")),
    ("--dropout 1", ("--dropout", "1", "at most 0.99")),
    ("--test_scales 0", ("--test_scales", "0", "above 0")),
    ("--val_share 1", ("--val_share", "1", "at most")),
]  # fmt: skip

DEPTH = [
    ("--data_path {here}/depth_missing", ("--data_path '{here}/depth_missing'", "1.png", "no depth", "add it")),
    ("--data_path {here}/depth_sizes", ("--data_path", "depth_sizes", "1.png|1.npy", "8", "9")),
    ("--data_path {here}/depth_empty", ("--data_path", "depth_empty", "1.npy", "no depth")),
    ("--data_path {here}/depth_negative", ("--data_path", "depth_negative", "1.npy")),
    ("--data_path {here}/empty", ("--data_path '{here}/empty'", "images/ and depth/")),
    ("--depth_scale -1", ("--depth_scale", "-1", "at least 0")),
    ("--bins 1", ("--bins", "1", "at least 2")),
    ("--min_depth 0", ("--min_depth", "0", "above 0")),
    ("--n_blocks 0", ("--n_blocks", "0", "at least 1")),
    ("--eval_crop nyu", ("--eval_crop", "'nyu'", "eigen_nyu")),
]  # fmt: skip

CURATE = [
    ("--data_path {here}/few --features {here}/array.npy", ("--features {here}/array.npy", "extract_features.py")),
    ("--data_path {here}/few --trusted {here}/none", ("--trusted '{here}/none'", "give")),
    ("--data_path {here}/few --duplicate_threshold nan", ("--duplicate_threshold", "nan", "at least 0")),
    ("--data_path {here}/few --against_threshold 2", ("--against_threshold", "2", "at most 1")),
    ("--data_path {here}/few --neighbors 0", ("--neighbors", "0", "at least 1")),
    ("--data_path {here}/few --cluster_votes 0", ("--cluster_votes", "0", "at least 1")),
    ("--data_path {here}/few --clusters 0", ("--clusters", "0", "at least 1")),
    ("--data_path {here}/few --iterations 0", ("--iterations", "0", "at least 1")),
    ("--data_path {here}/few --resampling_steps -1", ("--resampling_steps", "-1", "at least 0")),
    ("--data_path {here}/few --keep many", ("--keep", "'many'", "at least 0")),
    ("--data_path {here}/few --pretrained_weights {here}/none.pth", ("--pretrained_weights {here}/none", "no such")),
    ("", ("--data_path", "required")),
]  # fmt: skip

DETECT = [
    ("--model {here}/few --images {here}/few --text 'cup . Cup .'", ("--text", "'cup'", "twice")),
    ("--train {here}/unknown.json", ("--train {here}/unknown.json", "annotation 1", "image_id 8", "remove")),
    ("--train {here}/outside.json", ("--train {here}/outside.json", "annotation 1", "outside", "--skip_bad_boxes")),
    ("--train {here}/flat.json", ("--train {here}/flat.json", "annotation 1", "no area", "--skip_bad_boxes")),
    ("--train {here}/twice.json", ("--train {here}/twice.json", "'cup'", "twice", "rename")),
    ("--train {here}/category.json", ("--train {here}/category.json", "category_id 4", "remove")),
    ("--train {here}/gone.json", ("--train {here}/gone.json", "gone.png", "--train_images")),
    ("--train {here}/lacks.json", ("--train {here}/lacks.json", "categories", "COCO", "id")),
    ("--train {here}/good.json --eval {here}/gone.json", ("--eval {here}/gone.json", "gone.png", "--eval_images")),
    ("--train {here}/file", ("--train {here}/file", "not JSON", "COCO")),
    ("--train {here}/none.json", ("--train {here}/none.json", "No such file", "COCO")),
    ("--train scenes:0", ("--train scenes:0", "scenes:COUNT")),
    ("--train {here}/good.json --held_back 'cup'", ("--held_back 'cup'", "--eval")),
    ("--train {here}/good.json --eval scenes:2 --held_back 'cup'", ("--held_back 'cup'", "no separator")),
    ("--train {here}/good.json --steps 0", ("--steps", "0", "at least 1")),
    ("--train {here}/good.json --backbone_lr 2", ("--backbone_lr", "2", "at most 1")),
    ("--eval {here}/good.json", ("--model tiny", "--train")),
]  # fmt: skip

KNN_DEFAULTS = "--arch vit_nano --patch_size 16 --data_path shapes:16x32 --crop_size 32 --device cpu".split()
ATTENTION_DEFAULTS = "--arch vit_tiny --patch_size 16 --device cpu".split()


DENSE_DEFAULTS = "--arch vit_nano --patch_size 8 --steps 1 --warmup_steps 0 --num_workers 0 --device cpu".split()
CURATE_DEFAULTS = ["--device", "cpu"]
DETECT_DEFAULTS = "--model tiny --device cpu --num_workers 0".split()
TABLES = {eval_semantic: (SEMANTIC, DENSE_DEFAULTS), eval_depth: (DEPTH, DENSE_DEFAULTS),
          curate: (CURATE, CURATE_DEFAULTS), detect: (DETECT, DETECT_DEFAULTS)}  # fmt: skip


def test_there_are_enough_of_them():
    assert len({argv for argv, _ in TRAINING}) == len(TRAINING) >= 100


@pytest.mark.parametrize("argv, words", TRAINING, ids=[argv for argv, _ in TRAINING])
def test_training(argv, words, here, tmp_path, capfd, monkeypatch):
    check(main_dino, argv, words, here, tmp_path, capfd, monkeypatch, SMALL)


@pytest.mark.parametrize("argv, words", KNN, ids=[argv for argv, _ in KNN])
def test_knn(argv, words, here, tmp_path, capfd, monkeypatch):
    check(eval_knn, argv, words, here, tmp_path, capfd, monkeypatch, KNN_DEFAULTS)


@pytest.mark.parametrize("argv, words", ATTENTION, ids=[argv for argv, _ in ATTENTION])
def test_attention(argv, words, here, tmp_path, capfd, monkeypatch):
    check(visualize_attention, argv, words, here, tmp_path, capfd, monkeypatch, ATTENTION_DEFAULTS)


@pytest.mark.parametrize("script, argv, words", [
    pytest.param(script, *row, id=f"{script.__name__} {row[0]}") for script in TABLES for row in TABLES[script][0]])
def test_dense_tasks_curation_and_detection(script, argv, words, here, tmp_path, capfd, monkeypatch):
    check(script, argv, words, here, tmp_path, capfd, monkeypatch, TABLES[script][1])


@pytest.mark.parametrize("variables, word", [({"RANK": "0"}, "MASTER_ADDR|WORLD_SIZE"), ({"WORLD_SIZE": "2"}, "RANK")])
def test_half_a_launch(variables, word, here, tmp_path, capfd, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check(main_dino, "", (word, "torchrun"), here, tmp_path, capfd, monkeypatch, SMALL)


@pytest.mark.parametrize("url, word", [("tcp://no.invalid:5", "give a name"), ("file://{here}/x/y", "its folder"),
                                       ("nonsense", "No rendezvous")])  # fmt: skip
def test_a_place_to_meet_that_is_none(url, word, here, tmp_path, capfd, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    check(main_dino, f"--dist_url {url}", (f"--dist_url {url}", word), here, tmp_path, capfd, monkeypatch, SMALL)


@pytest.mark.parametrize("script, argv, words", [
    ("main_dino.py", ["@presets/none.txt"], ("@presets/none.txt", "No such file")),
    ("main_dino.py", [*SMALL, "--data_path", "/no/such/folder"], ("--data_path '/no/such/folder'", "give")),
    ("eval_knn.py", ["--pretrained_weights", "/no/such.pth"], ("--pretrained_weights /no/such.pth", "no such file")),
    ("visualize_attention.py", ["--layer", "99", "--device", "cpu"], ("--layer 99", "0 to 11")),
])  # fmt: skip
def test_in_a_process_of_its_own(script, argv, words, tmp_path):
    done = launch(script, *argv, "--output_dir", tmp_path / "out", real=argv[0].startswith("@"))
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"{script}: error: ") and all(re.search(word, done.stderr) for word in words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
    RuntimeError("CUDA error: out of memory\nmore"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")])
def test_memory_that_ran_out_is_one_line_whoever_says_so(error):
    said = faults.out_of_memory(error)
    assert said.startswith("memory ran out (") and "lower --batch_size_per_gpu" in said and "\n" not in said
    assert faults.out_of_memory(RuntimeError("shapes do not fit")) is None


def test_a_reader_that_has_enough_is_named_as_such(tmp_path):
    """Not as a dead worker, which breaks a pipe too."""
    command = [sys.executable, ROOT / "main_dino.py", *SMALL, "--arch", "vit_nano", "--output_dir", tmp_path]
    run = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.stdout.readline()
    run.stdout.close()
    said = run.stderr.read()
    assert run.wait(timeout=120) == 1
    assert "reads the output has closed it" in said and "worker" not in said and said.count("\n") == 1


def test_output_still_buffered_when_its_reader_has_gone_is_one_line(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert flags.exit_code("check_images.py", lambda args: print("few words"), argparse.Namespace()) == 1
    said = capsys.readouterr().err
    assert "check_images.py: stopped: " in said and "closed" in said and said.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("write", [
    lambda: Path("/dev/full").write_text("x"), lambda: torch.save({"x": torch.ones(9)}, "/dev/full"),
    lambda: Image.new("RGB", (99, 99)).save("/dev/full", "PNG"),
])  # fmt: skip
def test_a_full_disk_is_one_line_in_every_script(write, capsys):
    assert flags.exit_code("export.py", lambda args: write(), argparse.Namespace()) == 1
    said = capsys.readouterr().err
    assert "export.py: stopped: " in said and said.count("\n") == 1
    assert "No space left on device" in said or "disk is full" in said


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(eval_knn, "load_network", interrupted)
    assert eval_knn.main(eval_knn.get_args_parser().parse_args(["--device", "cpu"])) == 130
    assert capsys.readouterr().err == "eval_knn.py: interrupted\n"


@pytest.mark.parametrize("flags, words", [
    ((), ("--data_path", "@presets/shapes.txt", "--output_dir")),
    (("--output_dir", "x"), ("--data_path", "@presets/shapes.txt", "--output_dir")),
    (("--arch", "vit_tiny"), ("--data_path", "@presets/shapes.txt", "--output_dir")),
    (("--resume", "x"), ("--resume x", "resumes by itself", "--output_dir")),
])
def test_a_first_users_start(tmp_path, flags, words):
    done = launch("main_dino.py", *flags, cwd=tmp_path)
    assert done.returncode == 2 and all(word in done.stderr for word in words) and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_presets_work_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("@presets/shapes.txt\n--epochs 3  # fewer\n")
    assert main_dino.get_args_parser().parse_args(["@presets/shapes.txt"]).out_dim == 256
    args = main_dino.get_args_parser().parse_args(["@mine.txt"])
    assert (args.out_dim, args.epochs) == (256, 3)


def test_a_preset_holds_what_a_command_line_holds(tmp_path):
    (tmp_path / "mine.txt").write_text(
        "\ufeff--epochs 3 # fewer\r\n--data_path \"my images\"  --output_dir 'C:\\out\\a'\n"
        "--eval_data_path it's\n", encoding="utf-8")
    args = main_dino.get_args_parser().parse_args([f"@{tmp_path / 'mine.txt'}"])
    assert (args.epochs, args.data_path, args.output_dir) == (3, "my images", r"C:\out\a")
    assert args.eval_data_path == "it's"


def test_every_parser_can_be_the_parent_of_another():
    for script in (main_dino, eval_knn, visualize_attention):
        parser = argparse.ArgumentParser(parents=[script.get_args_parser()])
        assert parser.parse_args(["--arch", "vit_small"]).arch == "vit_small"


def test_long_warmups_of_dino_are_told(monkeypatch):
    """The defaults take all of a run of ten epochs; none of the presets is warned of."""
    monkeypatch.setattr(options, "description", lambda *args: [])

    def warned(*argv, images=50_000):
        args = main_dino.get_args_parser().parse_args([*argv, "--data_path", "x"])
        run = SimpleNamespace(student=SimpleNamespace(backbone=None))
        return main_dino.describe(args, run, main_dino.make_plan(args, images), images)

    said = warned("--epochs", "10", images=640)
    assert "WARNING: --warmup_epochs 10 is 100%" in said and "lower" in said and "--freeze_last_layer" not in said
    assert "--freeze_last_layer 1 is 500%" in warned("--steps", "2", "--warmup_epochs", "0", images=640)
    for path in (ROOT / "presets").glob("*.txt"):
        if " main_dino.py @" in path.read_text() or "submitit.py @" in path.read_text():
            assert not warned(f"@{path}"), path


def test_pixels_that_no_patch_covers_are_told(tmp_path, capsys, monkeypatch):
    """And once, how many workers there are of those that were asked for."""
    monkeypatch.setattr(loaders, "available_cores", lambda: 1)
    argv = [*SMALL, "--arch", "vit_nano", "--patch_size", "7", "--steps", "1", "--num_workers", "10", "--output_dir",
            str(tmp_path)]  # fmt: skip
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert main_dino.main(main_dino.get_args_parser().parse_args(argv)) == 0
    said = capsys.readouterr().out
    assert "the last 4 pixels of --global_crops_size 32 are not used, as --patch_size 7" in said and "28 or 35" in said
    assert "the last 2 pixels of --local_crops_size 16" in said and "14 or 21" in said
    assert said.count("instead of --num_workers 10") == 1 and "1 data-loading workers" in said
    assert not [w for w in warned if "worker" in str(w.message)]


def test_an_image_size_that_patches_do_not_divide_is_told(here, capsys):
    for flag, size, remedy in (("--image_size", 190, "176 or 192"), ("--crop_size", 40, "32 or 48")):
        features.load_network(str(here / "nano.pth"), crop_size=size, size_flag=flag)
        said = capsys.readouterr().out
        assert f"{flag} {size} is not a multiple of the patch size 16" in said and f"give {remedy}" in said
    features.load_network(str(here / "nano.pth"), crop_size=32)
    assert "multiple" not in capsys.readouterr().out


@pytest.mark.parametrize("below", ["", "/run"])
def test_an_output_folder_that_is_a_link_to_nothing(tmp_path, below):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for check in (flags.prepare_output, flags.check_folder):  # the latter before any work, also of files below
        with pytest.raises(parallel.Refused, match=r"--output_dir .*link.* is a link to '.*gone'.*choose another"):
            check(f"{tmp_path}/link{below}")
    (tmp_path / "gone").mkdir()
    assert flags.prepare_output(f"{tmp_path}/link{below}").is_dir()
