"""Linear classification on frozen features (DINO, arXiv 2104.14294, section 4.1), logistic regression, fine-tuning.

    python eval_linear.py --pretrained_weights output/run/checkpoint.pth --data_path images
    torchrun --nproc_per_node=8 eval_linear.py --pretrained_weights output/run/checkpoint.pth --data_path images

Several values of --lr, --n_last_blocks or --avgpool_patchtokens make a sweep: all classifiers are trained in one pass,
the best is chosen on a held-out part of the training set, and the test set is used once, for it alone. One setting is
reported as the published script does: at the epoch that is best on the test set (see --select_epoch).
"""

from __future__ import annotations

import argparse
import sys

import flags
import parallel
from parallel import Refused
from protocols import linear
from protocols.features import PIXELS, load_network
from protocols.finetune import Recipe
from protocols.probes import CLASSIFIER, evaluate_linear, show_linear
from protocols.published import LinearClassifier, validate_network  # noqa: F401 - published under this module's name
from weights.backbones import supported_drop_path_rate


def share(text: str) -> float:
    """A number, or a percentage: 0.1 and 10% are the same."""
    return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("Linear classification on frozen features, and fine-tuning.")
    flags.add_network_flags(parser)

    add = flags.add_data_flags(parser)
    add("--low_shot", type=flags.number(share, 0, 0.999999, above=True), default=0.0,
        help="train on this share of each class, such as 1%% or 0.01; without it, on all images")
    add("--val_share", type=flags.fraction, default=0.1,
        help="share of the training images held out to choose a setting by; raise it for small data")

    add = parser.add_argument_group("classifier").add_argument
    add("--n_last_blocks", type=flags.positive_int, nargs="+", default=[4],
        help="number of last blocks whose class tokens are the input: 4 for ViT-S, 1 for ViT-B; several make a sweep")
    add("--avgpool_patchtokens", type=flags.boolean, nargs="+", default=[False],
        help="add the mean of the patch tokens to the input: false for ViT-S, true for ViT-B; both make a sweep")
    add("--lr", type=flags.positive, nargs="+", default=None,
        help="peak learning rate for a batch of 256, scaled linearly with the batch; several make a sweep (default: "
             "0.001, and 0.0005 with --finetune)")
    add("--epochs", type=flags.positive_int, default=100, help="epochs of training")
    add("--val_freq", type=flags.positive_int, default=1,
        help="epochs between progress lines, and between validations of which the best counts")
    add("--select_epoch", choices=tuple(linear.SELECTIONS), default=None,
        help="which epoch's accuracy is reported: best on the test set, as published, which is optimistic; best on "
             "held_out training images; or the last. Default: best, but last for a sweep, whose setting is chosen on "
             "held-out images (docs/protocols.md)")
    add("--interpolation", choices=("bilinear", "bicubic"), default="bilinear",
        help="of the random crops to train on: bilinear as published; bicubic as images are resized for testing")
    add("--views", type=flags.count, default=0,
        help="random crops per image whose features are computed once and trained on in turn, which makes many epochs "
             "cheap; 0: new crops in every epoch, as published")
    add("--num_labels", type=flags.count, default=0,
        help="outputs of the classifier; 0: the number of classes in the data")
    add("--evaluate", action="store_true", help="evaluate --linear_weights without training")
    add("--linear_weights", default="",
        help="with --evaluate: file of a classifier, this project's or published; empty: linear.pth in --output_dir")
    add("--logreg", action="store_true",
        help="fit scikit-learn's logistic regression instead, its regularization chosen on held-out images; for "
             "small data")
    add("--seed", type=flags.seed, default=0,
        help="seed of the classifier, the order of images, what is held out, and an untrained network")

    add = parser.add_argument_group("fine-tuning").add_argument
    add("--finetune", action="store_true", help="train the backbone too, with AdamW")
    add("--layer_decay", type=flags.fraction, default=0.75,
        help="factor of the learning rate from one layer to the layer before it; 1: one rate for all layers")
    add("--warmup_epochs", type=flags.non_negative, default=5, help="epochs of linear learning-rate warm-up")
    add("--weight_decay", type=flags.non_negative, default=0.05, help="weight decay of matrices")
    add("--mixup", type=flags.non_negative, default=0.8, help="parameter of mixup's Beta distribution; 0: no mixup")
    add("--cutmix", type=flags.non_negative, default=1.0, help="parameter of cutmix's Beta distribution; 0: no cutmix")
    add("--smoothing", type=flags.number(float, 0, 0.99), default=0.1, help="label smoothing")
    add("--drop_path_rate", type=flags.number(float, 0, 0.99), default=flags.Default(0.1),
        help="stochastic depth; raise it for larger networks or longer training; the default is 0 for networks without "
             "it")
    add("--ema_decay", type=flags.number(float, 0, 0.999999), default=0.999,
        help="decay of the moving average of the weights, which is what is evaluated; 0: no average")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="",
        help="folder for eval_linear.json, linear.pth or finetuned.pth, and the cache features/; empty: the folder of "
             "the weights, or the current one")
    flags.add_launch_flags(parser)
    return parser


def check_args(args: argparse.Namespace) -> str:
    """The protocol that the flags choose, as `evaluate_linear` names it. Refuses flags that contradict each other."""
    chosen = [name for name in ("evaluate", "logreg", "finetune") if getattr(args, name)]
    if len(chosen) > 1:
        raise Refused(f"--{chosen[0]} with --{chosen[1]}: give one of them")
    if args.finetune and args.lr and len(args.lr) > 1:
        raise Refused(f"--lr {' '.join(f'{v:g}' for v in args.lr)} with --finetune: give one value")
    if args.finetune and args.arch == PIXELS:
        raise Refused("--arch pixels with --finetune: raw pixels have no weights to tune; name a network")
    if args.finetune and args.precision == "fp16":
        raise Refused("--precision fp16 with --finetune: small gradients would vanish; give bf16 or fp32")
    if args.finetune and args.warmup_epochs > args.epochs:
        raise Refused(f"--warmup_epochs {args.warmup_epochs:g} is longer than --epochs {args.epochs}; lower it")
    if args.linear_weights and not args.evaluate:
        raise Refused(f"--linear_weights {args.linear_weights}: training does not start from it; add --evaluate, or "
                      "leave it out")
    return chosen[0] if chosen else "probe"


def training_of(args: argparse.Namespace) -> linear.Training:
    lrs = args.lr or [5e-4 if args.finetune else 1e-3]
    several = max(map(len, (lrs, args.n_last_blocks, args.avgpool_patchtokens))) > 1
    return linear.Training(
        lrs, args.n_last_blocks, args.avgpool_patchtokens, args.epochs, args.views, args.num_labels, args.val_freq,
        args.seed, args.batch_size_per_gpu, args.num_workers, args.select_epoch or ("last" if several else "best"),
        args.interpolation)


def recipe_of(args: argparse.Namespace) -> Recipe:
    return Recipe(args.layer_decay, args.warmup_epochs, args.weight_decay, args.mixup, args.cutmix, args.smoothing,
                  float(args.drop_path_rate), args.ema_decay)


def evaluate(args: argparse.Namespace) -> dict:
    """Evaluate, write eval_linear.json, print the tables and return the report.

    Raises:
        Refused: bad input.
    """
    protocol = check_args(args)
    folder = flags.output_dir(args.output_dir, args.pretrained_weights)
    linear_weights = args.linear_weights or str(folder / CLASSIFIER)
    if args.evaluate:
        linear.read_classifier(linear_weights)  # fail before any work
    device = parallel.start(args.device, args.dist_url, args.dist_timeout)
    network = load_network(device=device, crop_size=args.crop_size, resize_size=args.resize_size,
                           **flags.network_values(args))
    recipe = recipe_of(args)
    if args.finetune:
        recipe = recipe._replace(drop_path_rate=supported_drop_path_rate(
            network.info["arch"], recipe.drop_path_rate, network.info["in_chans"],
            isinstance(args.drop_path_rate, flags.Default)))
    report = evaluate_linear(
        network, args.data_path, args.val_data_path, folder, training_of(args), protocol, args.low_shot,
        args.val_share, linear_weights, recipe)
    if parallel.is_main():
        show_linear(report)
        print(f"wrote {folder / 'eval_linear.json'}", flush=True)
    return report


def main(args: argparse.Namespace) -> int:
    """Returns the exit code: 0 done, 2 refused."""
    return flags.exit_code("eval_linear.py", evaluate, args)


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
