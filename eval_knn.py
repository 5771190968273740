"""Weighted k-NN classification with frozen features (DINO, arXiv 2104.14294, section 4.1; Wu et al. 2018, section 3.4).

    python eval_knn.py --pretrained_weights output/run/checkpoint.pth --data_path /path/to/images
    torchrun --nproc_per_node=8 eval_knn.py --pretrained_weights output/run/checkpoint.pth --data_path /path/to/images

A folder with train/ and val/ (or test/): test images are classified by their nearest training images. One labelled
folder: each image is classified by all others (leave-one-out). A folder without labels: measures that need none.
"""

from __future__ import annotations

import argparse
import sys

import flags
import parallel
from protocols import knn_files, published
from protocols.features import load_network
from protocols.knn import knn_classifier  # noqa: F401 - published under this module's name, as extract_features
from protocols.knn_evaluation import KnnSettings, compute_features, evaluate_knn, show_knn
from protocols.published import extract_features  # noqa: F401


def __getattr__(name: str) -> type:
    """The published ReturnIndexDataset, whose base class takes seconds to import."""
    if name == "ReturnIndexDataset":
        return published.ReturnIndexDataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("Weighted k-NN classification with frozen features.")
    flags.add_network_flags(parser)
    flags.add_data_flags(parser)

    add = parser.add_argument_group("classification").add_argument
    add("--nb_knn", type=flags.positive_int, nargs="+", default=[10, 20, 100, 200],
        help="numbers of neighbours k; all are evaluated in one search. 20 is the usual figure to report")
    add("--temperature", type=flags.positive, nargs="+", default=[0.07],
        help="temperature of the votes' weights; lower values favour the nearest neighbours")
    add("--metric", choices=("cosine", "l2"), default="cosine",
        help="similarity; l2, for features whose norm matters, divides distances by the training features' root mean "
             "square norm")
    add("--n_per_class", type=flags.positive_int, nargs="+", default=[],
        help="few-shot: training images per class, drawn at random; several values are all evaluated")
    add("--draws", type=flags.positive_int, default=10,
        help="random draws per few-shot setting; raise it for a smaller error of their mean")
    add("--label_free", action="store_true",
        help="RankMe, uniformity and alignment for labelled images too; without labels they are always computed")
    add("--seed", type=flags.seed, default=0, help="seed of few-shot draws and of an untrained network")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="",
        help="folder for eval_knn.json and the cache features/; empty: the folder of the weights, or the current one")
    add("--dump_features", default="",
        help="folder to write trainfeat.pth, trainlabels.pth, testfeat.pth and testlabels.pth to, with features of L2 "
             "norm 1 as the published script writes them; their norms go to trainnorms.pth and testnorms.pth")
    add("--load_features", default="",
        help="folder with such files to evaluate instead of images; no network is loaded")

    hardware = parser.add_argument_group("hardware")
    hardware.add_argument("--use_cuda", type=flags.boolean, default=True,
                          help="false searches neighbours on the CPU, for training features that don't fit the GPU; "
                               "--device is where the network runs")
    flags.add_launch_flags(hardware)
    return parser


def evaluate(args: argparse.Namespace) -> dict:
    """Evaluate, write eval_knn.json, print the tables and return the report.

    Raises:
        Refused: bad input.
    """
    beside = "" if args.pretrained_weights else args.load_features
    folder = flags.output_dir(args.output_dir or beside, args.pretrained_weights)
    flags.check_folder(args.dump_features, "--dump_features")
    device = parallel.start(args.device, args.dist_url, args.dist_timeout)
    if args.load_features:
        (parts, about), views = knn_files.load(args.load_features), None
    else:
        network = load_network(device=device, crop_size=args.crop_size, resize_size=args.resize_size,
                               **flags.network_values(args))
        about = network.about
        parts, views = compute_features(network, args.data_path, args.val_data_path, folder, args.label_free,
                                        args.batch_size_per_gpu, args.num_workers)
    source = {"data_path": args.load_features or args.data_path, "val_data_path": args.val_data_path or None}
    settings = KnnSettings(args.nb_knn, args.temperature, args.metric, args.n_per_class, args.draws, args.seed)
    report = evaluate_knn(parts, views, about | source, folder, settings, args.label_free,
                          device if args.use_cuda else "cpu")
    if parallel.is_main():
        if args.dump_features:
            knn_files.dump(args.dump_features, parts, about)
        show_knn(report)
        print(f"wrote {folder / 'eval_knn.json'}", flush=True)
    return report


def main(args: argparse.Namespace) -> int:
    """Returns the exit code: 0 done, 2 refused."""
    return flags.exit_code("eval_knn.py", evaluate, args)


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
