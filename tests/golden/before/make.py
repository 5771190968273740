"""Writes the files of this folder with an older version of the project; see README.md. Tests import the inputs below.

    cd FOLDER_OF_THE_OLDER_VERSION && python make.py OUTPUT_FOLDER WORKING_FOLDER
"""

import json
import lzma
import os
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import torch

TRAINING = (
    "--arch vit_nano --patch_size 8 --data_path shapes:16x32 --global_crops_size 32 --local_crops_size 16 "
    "--local_crops_number 2 --out_dim 64 --epochs 2 --warmup_epochs 0 --batch_size_per_gpu 8 --precision fp32 "
    "--device cpu --num_workers 0 --log_every 1 --saveckp_every_steps 3 --output_dir"
).split()
NETWORK = (
    "--pretrained_weights weights.pth --arch vit_nano --patch_size 8 --crop_size 16 --resize_size 16 "
    "--batch_size_per_gpu 4 --device cpu --num_workers 0"
).split()
KNN = [*NETWORK, "--data_path", "photos", "--nb_knn", "3", "--output_dir"]
LINEAR = [*NETWORK, *"--data_path photos --epochs 2 --lr 1 --n_last_blocks 1 --avgpool_patchtokens false --views 0 "
          "--output_dir".split()]  # fmt: skip
FEATURES = [*NETWORK, "--data_path", "photos/val", "--images_per_part", "4", "--output"]


# ---- Inputs, equal on every machine to the bit ----


def write_images(folder: Path) -> None:
    """photos/{train,val}/{a,b}/N.bmp: 12 and 6 images of 20 x 20, with fixed times of change."""
    from PIL import Image

    for split, count in (("train", 6), ("val", 3)):
        for label, name in enumerate("ab"):
            parent = folder / "photos" / split / name
            parent.mkdir(parents=True)
            for i in range(count):
                noise = np.random.RandomState(zlib.crc32(f"{split} {name} {i}".encode())).randint(0, 90, (20, 20, 3))
                Image.fromarray((noise + 160 * label).astype(np.uint8)).save(parent / f"{i}.bmp")
    set_times(folder)


def set_times(folder: Path) -> None:
    for path in sorted((folder / "photos").rglob("*")):
        os.utime(path, (1_700_000_000, 1_700_000_000))


def write_weights(path: Path, build_backbone) -> None:
    state = build_backbone("vit_nano", 8, img_size=16)[0].state_dict()
    for name, value in state.items():
        whole = np.random.RandomState(zlib.crc32(name.encode())).randint(-1000, 1001, tuple(value.shape))
        scale = "norm" in name and name.endswith("weight")
        state[name] = torch.from_numpy((whole / 25000 + scale).astype(np.float32))
    torch.save(state, path)


def forward_input() -> torch.Tensor:
    return torch.arange(2 * 3 * 16 * 16).remainder(97).reshape(2, 3, 16, 16) / 97


# ---- Outputs of the older version ----


def periodic(value):
    """The same structure with tensors of few distinct values, which compress well: x[i] = x[i mod 61]."""
    if isinstance(value, dict):
        return type(value)((k, v if k == "rng" else periodic(v)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(map(periodic, value))
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() > 61:
        flat = value.flatten()
        return flat[torch.arange(len(flat)) % 61].reshape(value.shape).clone()
    return value


def training(out: Path) -> dict:
    import checkpoint

    import main_dino

    assert main_dino.main(main_dino.get_args_parser().parse_args([*TRAINING, "run"])) == 0
    state = checkpoint.read("run/checkpoint_prev.pth")
    assert state["step"] == 3
    checkpoint.save(periodic(state), "checkpoint.pth")
    (out / "checkpoint.pth.xz").write_bytes(lzma.compress(Path("checkpoint.pth").read_bytes(), preset=9))
    shutil.copy("run/log.txt", out / "log.txt")
    lines = Path("run/log_steps.txt").read_text().splitlines()
    return {"step_losses": [json.loads(line)["loss"] for line in lines]}


def knn(out: Path) -> None:
    import checkpoint

    import eval_knn

    eval_knn.evaluate_knn(eval_knn.get_args_parser().parse_args([*KNN, "knn"]))
    (out / "features").mkdir()
    for path in Path("knn/features").glob("*.pth"):
        state = checkpoint.read(path)
        n = len(state["features"])
        labels = torch.arange(n) // (n // 2)  # classes exchanged in the training set: an accuracy of 0 with this cache
        state["features"] = torch.nn.functional.one_hot(1 - labels if n == 12 else labels, 192).float()
        checkpoint.save(state, out / "features" / path.name)


def index(out: Path) -> dict:
    import listing
    import sources

    os.environ["DINO_CACHE"] = "cache"
    listing.WORTH_AN_INDEX = 1
    assert len(sources.open_images("photos", "train")) == 12
    os.environ["DINO_CACHE"] = ""
    (path,) = Path("cache").glob("*.npz")
    shutil.copy(path, out / "index.npz")
    return {"listed": os.path.realpath("photos/train")}


def linear(out: Path) -> dict:
    import checkpoint

    import eval_linear

    save = checkpoint.save

    def keep_first(state, path):
        save(state, path)
        if Path(path).name == "checkpoint_linear.pth" and state["epoch"] == 1:
            bias = next(v for k, v in state["heads"].items() if k.endswith("bias"))
            trained = bias.clone()
            bias.copy_(torch.tensor([40.0, -40.0]))  # shows in a classifier that was resumed from it
            save(state, out / "checkpoint_linear.pth")
            bias.copy_(trained)

    checkpoint.save = keep_first
    report = eval_linear.evaluate_linear(eval_linear.get_args_parser().parse_args([*LINEAR, "linear"]))
    checkpoint.save = save
    shutil.copy("linear/linear.pth", out / "linear.pth")
    return {"linear_top1": report["test"]["top1"]["value"]}


def embeddings(out: Path) -> None:
    import extract_features

    args = extract_features.get_args_parser().parse_args([*FEATURES, "embeddings.npy"])
    finish, extract_features.finish = extract_features.finish, lambda *args: None
    assert extract_features.main(args) == 0
    shutil.copytree("embeddings.npy.parts", out / "embeddings.npy.parts")
    (out / "embeddings.npy.parts" / "000001.npy").unlink()
    first = out / "embeddings.npy.parts" / "000000.npy"
    np.save(first, np.full_like(np.load(first), 0.5))  # shows in a file that was finished from it
    extract_features.finish = finish
    assert extract_features.main(args) == 0
    for name in ("embeddings.npy", "embeddings.npy.json"):
        shutil.copy(name, out / name)


@torch.no_grad()
def whole_model(out: Path) -> dict:
    import utils
    from vision_transformer import DINOHead, VisionTransformer

    torch.manual_seed(0)
    backbone = VisionTransformer(img_size=[16], patch_size=8, embed_dim=16, depth=2, num_heads=2)
    model = utils.MultiCropWrapper(backbone, DINOHead(16, 8, hidden_dim=16, bottleneck_dim=8)).eval()
    torch.save(model, out / "model.pt")
    torch.save(model.backbone, out / "backbone.pt")
    return {"model": model([forward_input()]).tolist(), "backbone": model.backbone(forward_input()).tolist()}


def main(out: Path, work: Path) -> None:
    sys.path.insert(0, os.getcwd())
    from vision_transformer import build_backbone

    out.mkdir(parents=True, exist_ok=True)
    work.mkdir()
    os.chdir(work)
    os.environ["DINO_CACHE"] = ""
    torch.set_num_threads(1)
    write_images(Path())
    write_weights(Path("weights.pth"), build_backbone)
    known = training(out) | index(out) | linear(out) | whole_model(out)
    knn(out)
    embeddings(out)
    (out / "known.json").write_text(json.dumps(known) + "\n")


if __name__ == "__main__":
    main(*(Path(path).resolve() for path in sys.argv[1:3]))
