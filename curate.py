"""Make a training list from a pile of images: drop duplicates, keep images near trusted ones, balance the contents.

    python curate.py --pretrained_weights output/run/checkpoint.pth --data_path photos more_photos --keep 100000 \\
        --output_dir output/curated
    python curate.py --features photos.npy --data_path photos --against test_images --trusted good_images \\
        --output_dir output/curated
    python main_dino.py --data_path output/curated/list.txt ...

Writes list.txt, curation.json (what was dropped and why, counts per stage, settings) and curation.html, a page with the
largest groups of duplicates and the clusters before and after. The stages, in this order: exact duplicates, near
duplicates, --against, --trusted, --keep; docs/curation.md describes them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import atomic
import flags
import parallel
from parallel import Refused
from protocols import curation, curation_report, extraction, neighbours
from protocols.features import load_network
from protocols.image_search import stored_network


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("A training set from a pile of images.")
    flags.add_network_flags(parser)

    data = parser.add_argument_group("data")
    add = data.add_argument
    add("--data_path", required=True, nargs="+", help="the pile: folders of images, .txt lists, shards or shapes")
    add("--features", nargs="+", default=[], metavar="FILE",
        help="embeddings of the pile by extract_features.py, a file per --data_path; without it they are computed, and "
             "kept in --output_dir. The network is then that of the files")
    flags.add_reading_flags(data, skip_bad=True)

    add = parser.add_argument_group("duplicates").add_argument
    add("--duplicate_threshold", type=flags.number(float, 0, 1), default=0.98, metavar="COSINE",
        help="images of at least this cosine are near duplicates; 0: drop only equal files. What it should be depends "
             "on the network: measure it, or look at the page (docs/curation.md)")
    add("--against", nargs="+", default=[], metavar="PATH",
        help="images, such as a test set, whose copies and near duplicates are dropped from the pile")
    add("--against_threshold", type=flags.number(float, 0, 1), default=0.0, metavar="COSINE",
        help="0: as --duplicate_threshold; lower it to be safe from leaks into a test set")

    add = parser.add_argument_group("retrieval").add_argument
    add("--trusted", nargs="+", default=[], metavar="PATH", help="images to keep only what is near to them")
    add("--neighbors", type=flags.positive_int, default=4,
        help="nearest images of the pile per trusted image; raise it if the trusted set is small")
    add("--from_clusters", type=flags.count, default=0, metavar="M",
        help="instead of neighbours, M images from each cluster of the pile that holds trusted images; for small "
             "trusted sets; 0: off")
    add("--cluster_votes", type=flags.positive_int, default=1,
        help="trusted images that such a cluster has to hold; raise it if the trusted set has outliers")

    add = parser.add_argument_group("balance").add_argument
    add("--keep", type=flags.count, default=0, metavar="N",
        help="images to sample, balanced; all that are left if they are fewer; 0: keep all")
    add("--clusters", type=flags.positive_int, nargs="+", default=[], metavar="K",
        help="clusters per level, from the finest; empty: four levels, ten images per cluster, then a third as many "
             "clusters per level")
    add("--iterations", type=flags.positive_int, default=50, help="iterations of k-means, at most")
    add("--resampling_steps", type=flags.count, default=10,
        help="repetitions of k-means on the points nearest to each centroid, on all levels but the finest; 0: none")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", required=True, help="folder for list.txt, curation.json, curation.html and the embeddings")
    add("--save_pictures", type=flags.count, default=8, metavar="N",
        help="groups of duplicates and clusters to draw on the page; 0: none")
    add("--seed", type=flags.seed, default=0, help="of clusters, what is sampled from them, and an untrained network")
    flags.add_launch_flags(parser)
    parser.add_argument("--search", choices=neighbours.ENGINES, default="auto",
                        help="faiss or this project's search, which also runs on GPUs and in several processes; both "
                             "are exhaustive. auto: faiss on a CPU if it is installed")
    return parser


STORED = ("arch", "patch_size", "checkpoint_key", "mean", "std", "in_chans", "precision", "resize_size", "crop_size",
          "max_pixels", "value_range", "skip_bad")  # flags of the network and its images, which --features names
NEEDED = {  # flags without effect unless one of these is given
    "against_threshold": ("against",), "from_clusters": ("trusted",), "cluster_votes": ("from_clusters",),
    "neighbors": ("trusted",), "clusters": ("keep", "from_clusters"), "iterations": ("keep", "from_clusters"),
    "resampling_steps": ("keep",),
}


def check_args(args: argparse.Namespace) -> None:
    default = get_args_parser().get_default
    given = {name: f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
             for name, value in vars(args).items() if value != default(name)}
    for name in STORED if args.features else ():
        if name in given:
            raise Refused(f"{given[name]} with --features: network and images are as for the files; leave one of them "
                          "out")
    if args.features and args.pretrained_weights and not (args.against or args.trusted):
        raise Refused(f"{given['pretrained_weights']} with --features: the network is only needed for images of "
                      "--against and --trusted; leave it out")
    for name, others in NEEDED.items():
        if name in given and not any(getattr(args, other) for other in others):
            raise Refused(f"{given[name]}: has no effect without --{' or --'.join(others)}; give that, or leave it out")
    if args.from_clusters and "neighbors" in given:
        raise Refused(f"{given['neighbors']} with --from_clusters: images come from clusters instead; leave one out")
    if args.against and not (args.against_threshold or args.duplicate_threshold):
        raise Refused("--against with --duplicate_threshold 0: images near it would stay; give --against_threshold (1: "
                      "copies only are dropped)")


def curate(args: argparse.Namespace) -> dict:
    """Curate what the flags name; returns the figures of curation.json. Raises Refused for bad input."""
    check_args(args)
    folder = flags.check_folder(args.output_dir)
    if not (folder / "curation.json").exists():
        with parallel.refusing(f"--output_dir {folder}: list.txt", "choose another folder"):
            atomic.check_own(folder / "list.txt")
    device = parallel.start(args.device, args.dist_url, args.dist_timeout)
    engine, others = neighbours.pick_engine(args.search, device), {"against": args.against, "trusted": args.trusted}
    if args.features:
        images, features, about = curation.read_embeddings(args.features, args.data_path)
        network = stored_network(about, args.pretrained_weights, device) if any(others.values()) else None
    else:
        network = load_network(device=device, crop_size=args.crop_size, resize_size=args.resize_size,
                               **flags.network_values(args))
        images = curation.open_pile(args.data_path, network.reading)
        about = extraction.describe(network, "", "cls", args.seed, args.precision)
    sets = {name: curation.open_pile(paths, network.reading, f"--{name}") for name, paths in others.items() if paths}
    settings = curation.Settings(
        args.duplicate_threshold, args.against_threshold, args.neighbors, args.from_clusters, args.cluster_votes,
        args.keep, tuple(args.clusters), args.iterations, args.resampling_steps, args.seed)
    curation.check_settings(settings, len(images))
    curation.say_parts(args.data_path)
    curation_report.check_names(images, folder)
    folder = flags.prepare_output(folder)
    width = features.shape[1] if args.features else network.info["embed_dim"]
    parallel.say(curation.estimate(len(images), width, *(len(sets.get(name, ())) for name in others), settings, device))
    work = (args.batch_size_per_gpu, args.num_workers)
    if not args.features:
        features = curation.embed(network, args.data_path, images, folder / "embeddings", about, *work)
    embedded = {name: curation.embed(network, others[name], part, folder / name, about, *work)
                for name, part in sets.items()}
    against = (sets["against"], embedded["against"]) if args.against else None
    curated = curation.curate(images, features, settings, against, embedded.get("trusted"), engine, device)
    figures = {"data_path": args.data_path, "features": args.features, "against": args.against, "trusted": args.trusted,
               "search": engine, "settings": settings._asdict(), "network": {k: about[k] for k in (
                   "arch", "weights", "weights_sha256")}}
    return parallel.on_main(lambda: write(folder, images, curated, figures, args.save_pictures))


def write(folder: Path, images: curation.Joined, curated: curation.Curated, figures: dict, pictures: int) -> dict:
    curation_report.write_kept(images, curated.kept, folder)
    figures = curation_report.write_json(folder / "curation.json", images, curated, figures)
    curation_report.write_page(folder, images, curated, figures, pictures)
    print(f"wrote list.txt ({len(curated.kept)} of {len(images)} images), curation.json and curation.html in {folder}",
          flush=True)
    return figures


def main(args: argparse.Namespace) -> int:
    """Returns the exit code: 0 done, 2 refused."""
    return flags.exit_code("curate.py", curate, args)


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
