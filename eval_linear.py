"""Linear classification on frozen features (DINO, arXiv 2104.14294, section 4.1), logistic regression, fine-tuning.

    python eval_linear.py --pretrained_weights output/run/checkpoint.pth --data_path images
    torchrun --nproc_per_node=8 eval_linear.py --pretrained_weights output/run/checkpoint.pth --data_path images

Several values of --lr, --n_last_blocks or --avgpool_patchtokens make a sweep: all are trained in one pass, the best is
chosen on a held-out part of the training set, and the test set is used once, for it alone.

Shapes: N images, D width, C classes, S settings.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import flags
import parallel
from method.photometric import to_device
from protocols import linear, scores
from protocols.features import (
    TRAINING_SCALE,
    Network,
    feature_batches,
    input_dataset,
    load_network,
    network_features,
)
from protocols.splits import Labelled, Task, open_task, run_of
from vision_transformer import VisionTransformer
from weights import checkpoints

STRENGTHS = [10.0**e for e in range(-6, 4)]  # of --logreg
UNFINISHED, CLASSIFIER = "checkpoint_linear.pth", "linear.pth"


def percentage(text: str) -> float:
    match = re.fullmatch(r"([0-9.]+)(%?)", text)
    try:
        value = float(match[1]) / (100 if match[2] else 1) if match else -1
    except ValueError:
        value = -1
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; give 1%, 10% or a number between 0 and 1")
    return value


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("Linear classification on frozen features, and fine-tuning.")
    add = parser.add_argument
    add("--data_path", default="shapes",
        help="folder with train/ and val/ (or test/), or one folder, or a .txt list; torchvision:CIFAR10; shapes")
    add("--val_data_path", default="", help="test pictures that lie elsewhere; then --data_path is all training set")
    flags.add_network_flags(parser)

    add("--n_last_blocks", type=flags.positive_int, nargs="+", default=[4],
        help="class tokens of so many last blocks: 4 for ViT-S, 1 for ViT-B; several make a sweep")
    add("--avgpool_patchtokens", type=flags.boolean, nargs="+", default=[False],
        help="add the mean of the patch tokens: true for ViT-B; both make a sweep")
    add("--lr", type=flags.positive, nargs="+", default=None,
        help="peak learning rate for a batch of 256, scaled linearly; several make a sweep (default: 0.001, and 0.0005 "
             "with --finetune)")
    add("--epochs", type=flags.positive_int, default=100, help="of training")
    add("--val_freq", type=flags.positive_int, default=1, help="epochs between progress lines")
    add("--val_share", type=flags.fraction, default=0.1, help="of the training images, held out to choose a setting by")
    add("--views", type=flags.count, default=0,
        help="random crops an image whose features are kept and trained on in turn; 0: new crops in every epoch, as "
             "published")
    add("--low_shot", type=percentage, default=0.0, help="train on this share of each class: 1%% or 10%%")
    add("--num_labels", type=flags.count, default=0, help="outputs of the classifier; 0: the classes of the data")
    add("--evaluate", action="store_true", help="only evaluate --linear_weights")
    add("--linear_weights", default="", help="a classifier of this script or a published one")
    add("--logreg", action="store_true", help="scikit-learn's logistic regression instead, regularized by validation")
    add("--seed", type=flags.seed, default=0, help="of the classifier, the order and what is held out")
    add("--output_dir", default="", help="for eval_linear.json and linear.pth; empty: the weights' folder, or .")
    tuning = parser.add_argument_group("fine-tuning of the whole network")
    tuning.add_argument("--finetune", action="store_true", help="train the backbone too (AdamW)")
    tuning.add_argument("--layer_decay", type=flags.fraction, default=0.75, help="learning rate a layer further down")
    tuning.add_argument("--warmup_epochs", type=flags.non_negative, default=5, help="of the learning rate")
    tuning.add_argument("--weight_decay", type=flags.non_negative, default=0.05, help="of the matrices")
    tuning.add_argument("--mixup", type=flags.non_negative, default=0.8, help="its Beta distribution; 0: none")
    tuning.add_argument("--cutmix", type=flags.non_negative, default=1.0, help="its Beta distribution; 0: none")
    tuning.add_argument("--smoothing", type=flags.number(float, 0, 0.99), default=0.1, help="of the labels")
    tuning.add_argument("--drop_path_rate", type=flags.number(float, 0, 0.99), default=0.1, help="stochastic depth")
    tuning.add_argument("--ema_decay", type=flags.number(float, 0, 0.999999), default=0.999,
                        help="moving average of the weights, which is what is evaluated; 0: none")
    flags.add_launch_flags(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    chosen = [name for name in ("evaluate", "logreg", "finetune") if getattr(args, name)]
    if len(chosen) > 1:
        raise ValueError(f"--{chosen[0]} with --{chosen[1]}: give one of them")
    args.lr = args.lr or ([5e-4] if args.finetune else [1e-3])
    if args.finetune and len(args.lr) > 1:
        raise ValueError(f"--lr {' '.join(f'{v:g}' for v in args.lr)} with --finetune: give one value")
    if args.finetune and args.arch == "pixels":
        raise ValueError("--arch pixels with --finetune: raw pixels have no weights to tune; name a network")
    if args.finetune and args.precision == "fp16":
        raise ValueError("--precision fp16 with --finetune: small gradients would vanish; give bf16 or fp32")
    if args.finetune and args.warmup_epochs > args.epochs:
        raise ValueError(f"--warmup_epochs {args.warmup_epochs:g} is longer than --epochs {args.epochs}; lower it")
    if args.linear_weights and not args.evaluate:
        raise ValueError(f"--linear_weights {args.linear_weights}: add --evaluate; training starts from nothing")
    if args.evaluate and not args.linear_weights:
        args.linear_weights = str(flags.output_dir(args) / CLASSIFIER)


# ---- Frozen features, all that the settings see ----


def with_blocks(network: Network, args: argparse.Namespace) -> tuple[Network, int]:
    """The network that gives `linear.probe_features`, and the most blocks of the settings: 0 where there are none."""
    model = network.forward
    if not isinstance(model, VisionTransformer):
        return network, 0
    most = max(args.n_last_blocks)
    if most > len(model.blocks):
        raise ValueError(f"--n_last_blocks {most}: the network has {len(model.blocks)} blocks; lower it")
    forward = linear.probe_features(model, most)
    return network._replace(forward=forward, about=network.about | {"output": f" {most} blocks and mean"}), most


def settings(args: argparse.Namespace, blocks: int) -> list[linear.Setting]:
    if blocks:
        return linear.settings_of(args.lr, args.n_last_blocks, args.avgpool_patchtokens)
    return linear.settings_of(args.lr, [0], [False])


def eval_features(network: Network, part: Labelled, args: argparse.Namespace, device: torch.device) -> Tensor:
    return network_features(network, part.images, args.batch_size_per_gpu, args.num_workers,
                            flags.output_dir(args) / "features")


def training_batches(
    network: Network, part: Labelled, args: argparse.Namespace, device: torch.device, epoch: int, kept: list[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(features, labels) of an epoch's global batches, in an order that (seed, epoch) alone decides.

    `kept` holds the features of the first --views epochs.
    """
    order = torch.from_numpy(np.random.default_rng((args.seed, epoch)).permutation(len(part.labels)))
    if args.views:
        while len(kept) <= epoch % args.views:
            kept.append(network_features(network, part.images, args.batch_size_per_gpu, args.num_workers,
                                         flags.output_dir(args) / "features", view=len(kept), scale=TRAINING_SCALE))
        images = kept[epoch % args.views]
        batch = args.batch_size_per_gpu * parallel.world_size()
        batches = (to_device(images[rows], device) for rows in order.split(batch))
    else:
        batches = feature_batches(
            network.forward, input_dataset(network, part.images, epoch, TRAINING_SCALE), order.tolist(),
            args.batch_size_per_gpu, args.num_workers, device, network.autocast(),
        )
    first = 0
    for features in batches:
        yield features, to_device(part.labels[order[first : first + len(features)]], device)
        first += len(features)


# ---- Protocols: each returns rows for the table and the test images' ranked classes ----


def probe(args: argparse.Namespace, network: Network, task: Task, device: torch.device) -> tuple[list[dict], Tensor]:
    """Train a linear classifier a setting in one pass, choose one, and use the test set once."""
    network, blocks = with_blocks(network, args)
    found = settings(args, blocks)
    width = network.info.get("embed_dim") or eval_features(network, task.test, args, device).shape[1]
    n_classes = max(args.num_labels, len(task.classes))
    torch.manual_seed(args.seed)
    heads = linear.Heads(found, width, blocks, n_classes).to(device)
    optimizer = linear.build_optimizer(heads, args.batch_size_per_gpu * parallel.world_size())
    loss = train_heads(args, heads, optimizer, network, task, device)
    rows = [{"lr": s.lr, "n_last_blocks": s.n_last_blocks, "avgpool": s.avgpool_patchtokens,
             "train_loss": float(v) if v.isfinite() else None} for s, v in zip(found, loss, strict=True)]
    best = 0
    if task.held:
        ranked = linear.predict(heads, eval_features(network, task.held, args, device))
        held = [scores.hits(r, task.held.labels)[0] for r in ranked]
        best = max(range(len(held)), key=lambda i: int(held[i].sum()))  # the first of equal ones
        rows = [row | {"held-out top1": scores.percent(h.double()), "chosen": "*" if i == best else ""}
                for i, (row, h) in enumerate(zip(rows, held, strict=True))]
    keep_classifier(args, heads, best, task.classes, network)
    return rows, linear.predict(heads, eval_features(network, task.test, args, device))[best]


def train_heads(
    args: argparse.Namespace, heads: linear.Heads, optimizer, network: Network, task: Task, device: torch.device
) -> Tensor:
    """Train, or go on where a run of the same settings was stopped. Returns the (S,) losses of the last epoch."""
    path, kept, loss = flags.output_dir(args) / UNFINISHED, [], torch.zeros(len(heads.settings))
    run = run_of(args, network, task) | {"settings": [list(s) for s in heads.settings], "views": args.views}
    first = 0
    if state := linear.unfinished(path, run):
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        first, loss = state["epoch"], state["loss"]
    for epoch in range(first, args.epochs):
        batches = training_batches(network, task.train, args, device, epoch, kept)
        loss = linear.train_epoch(heads, optimizer, epoch, args.epochs, batches).cpu()
        if not loss.isfinite().any():  # a sweep goes on without the settings that diverged
            raise ValueError(f"--lr {min(args.lr):g}: the loss is no longer finite; lower it")
        if (epoch + 1) % args.val_freq == 0 or epoch + 1 == args.epochs:
            parallel.say(f"epoch {epoch + 1}/{args.epochs}: training loss {loss.min():.4f}"
                + (f" to {loss.max():.4f}" if len(loss) > 1 else ""))
        if parallel.is_main() and (epoch + 1 == args.epochs or not args.views or (epoch + 1) % 10 == 0):
            checkpoints.save({"run": run, "epoch": epoch + 1, "heads": heads.state_dict(), "loss": loss,
                             "optimizer": optimizer.state_dict()}, path)
    parallel.barrier()
    return loss


def keep_classifier(
    args: argparse.Namespace, heads: linear.Heads, best: int, classes: list[str], network: Network
) -> None:
    """linear.pth: the chosen classifier under the published names, and what it saw."""
    if not parallel.is_main():
        return
    head, setting = heads.heads[best], heads.settings[best]
    state = {"linear.weight": head.weight.detach().cpu(), "linear.bias": head.bias.detach().cpu()}
    checkpoints.save({"state_dict": state, "classes": list(classes), "setting": setting._asdict(),
                     "weights_sha256": network.about["weights_sha256"]}, flags.output_dir(args) / CLASSIFIER)
    (flags.output_dir(args) / UNFINISHED).unlink(missing_ok=True)


def evaluate(args: argparse.Namespace, network: Network, task: Task, device: torch.device) -> tuple[list[dict], Tensor]:
    """The test images by the classifier of --linear_weights."""
    loaded = linear.read_classifier(args.linear_weights)
    weight, bias = loaded["weight"], loaded["bias"]
    setting = loaded.get("setting", {"n_last_blocks": args.n_last_blocks[0], "lr": args.lr[0],
                                     "avgpool_patchtokens": args.avgpool_patchtokens[0]})
    args.n_last_blocks = [max(setting["n_last_blocks"], 1)]
    network, blocks = with_blocks(network, args)
    features = eval_features(network, task.test, args, device)
    width = features.shape[1] // (blocks + 1)
    heads = linear.Heads([linear.Setting(**setting)], width, blocks, len(bias)).to(device)
    own = heads.heads[0]
    if own.weight.shape != weight.shape:
        raise ValueError(f"--linear_weights {args.linear_weights}: weights {tuple(weight.shape)} instead of "
                         f"{tuple(own.weight.shape)}; do --n_last_blocks, --avgpool_patchtokens and the backbone fit?")
    own.load_state_dict({"weight": weight, "bias": bias})
    names = loaded.get("classes") or task.classes
    if not loaded.get("classes") and len(names) != len(bias):
        raise ValueError(f"--linear_weights {args.linear_weights}: {len(bias)} outputs without names for the "
                         f"{len(names)} classes of --data_path {args.data_path}; give data with all classes")
    number = {name: i for i, name in enumerate(task.classes)}
    outputs = torch.tensor([number.get(name, -1) for name in names] + [-1] * (len(bias) - len(names)))
    return [{"n_last_blocks": setting["n_last_blocks"], "avgpool": setting["avgpool_patchtokens"]}], outputs[
        linear.predict(heads, features)[0]]


def logreg(args: argparse.Namespace, network: Network, task: Task, device: torch.device) -> tuple[list[dict], Tensor]:
    """Logistic regression on the first setting's features of centre crops."""
    network, blocks = with_blocks(network, args)
    n, avgpool = args.n_last_blocks[0], args.avgpool_patchtokens[0]
    train, held, test = (eval_features(network, part, args, device) for part in task[:3])
    if blocks:
        train, held, test = (linear.columns(x, blocks, n, avgpool) for x in (train, held, test))
    ranked, best, accuracies = linear.logistic_regression(
        (train, task.train.labels), (held, task.held.labels), test, STRENGTHS)
    rows = [{"C": c, "held-out top1": v, "chosen": "*" if c == best else ""}
            for c, v in zip(STRENGTHS, accuracies, strict=True)]
    return rows, ranked


def finetune(args: argparse.Namespace, network: Network, task: Task, device: torch.device) -> tuple[list[dict], Tensor]:
    from protocols.finetune import tune

    return tune(args, network, task, device, flags.output_dir(args))


# ---- The evaluation ----


def evaluate_linear(args: argparse.Namespace) -> dict:
    """The whole evaluation: prints the tables, writes eval_linear.json, returns what it holds.

    Raises:
        flags.Refused: bad input, in one line.
    """
    try:
        check_args(args)
        if args.evaluate:
            linear.read_classifier(args.linear_weights)  # a wrong file is named before any work
        device = parallel.start(args.device, args.dist_url, args.dist_timeout)
        network = load_network(
            args.pretrained_weights, args.arch, args.patch_size, args.checkpoint_key, device, args.crop_size,
            args.resize_size, args.precision, args.seed)
        blocks = with_blocks(network, args)[1]
        sweep = not (args.evaluate or args.finetune) and len(settings(args, blocks)) > 1
        task = open_task(args, network.info["in_chans"], hold_out=sweep or args.logreg)
        if args.num_labels and args.num_labels < len(task.classes):
            raise ValueError(f"--num_labels {args.num_labels}: the data have {len(task.classes)} classes; raise it, or "
                             "0 counts them")
        flags.prepare_output(flags.output_dir(args))
        for note in task.notes:
            parallel.say(note)
        protocol = evaluate if args.evaluate else logreg if args.logreg else finetune if args.finetune else probe
        rows, ranked = protocol(args, network, task, device)
    except (ValueError, OSError) as error:
        raise flags.Refused(error) from error
    test = scores.accuracy([ranked], task.test.labels, task.classes)
    about = network.about | {
        "protocol": protocol.__name__, "data_path": args.data_path, "val_data_path": args.val_data_path or None,
        "images": [len(part.labels) if part else 0 for part in task[:3]], "epochs": args.epochs, "notes": task.notes,
        "test": test,
    }
    if parallel.is_main():
        if len(rows) > 1:
            print(scores.table(rows))
        print("on the test set, in %, with its 95 % bootstrap interval")
        print(scores.table([{k: v for k, v in test.items() if k != "per_class"}]))
        scores.write_results(flags.output_dir(args) / "eval_linear.json", rows, **about)
        print(f"wrote {flags.output_dir(args) / 'eval_linear.json'}", flush=True)
    return about | {"results": rows}


def main(args: argparse.Namespace) -> int:
    """Returns the exit code: 0 done, 2 refused."""
    return flags.exit_code("eval_linear.py", evaluate_linear, args)


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
