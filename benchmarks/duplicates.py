"""Precision and recall of near duplicates at each threshold, on images whose edited copies are known.

    python benchmarks/duplicates.py --data_path copydetect --pretrained_weights output/run/checkpoint.pth

--data_path is a folder with database/, queries/ and ground_truth.csv, or Copydays (imagesets/copies.py). All images are
in one pile. True pairs are an image and its copies, and copies of one image. Pairs above the threshold are measured,
the groups into which curate.py joins them, and the average precision over all thresholds. With --quick, drawn images
and their mirror images.
"""

import os
import sys
import tempfile
from pathlib import Path

import bench
import numpy as np
import torch
from PIL import Image, ImageOps

import flags
from imagesets import shapes
from imagesets.copies import read_copies
from imagesets.sources import open_files
from protocols.duplicates import average_precision, threshold_curve
from protocols.features import load_network, network_features

THRESHOLDS = (0.99, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9, 0.85, 0.8, 0.7)
COLUMNS = ("threshold", "pairs", "precision %", "recall %", "group precision %", "group recall %", "images kept")


def sources(copies) -> np.ndarray:
    """For database, then queries: the number of the database image that each comes from; -1 for a query without one.

    A query of several database images counts for the first.
    """
    return np.array([*range(len(copies.database)), *(rows[0] if rows else -1 for rows in copies.matches)])


def draw(folder: Path) -> None:
    lines = ["query,match,attack"]
    for part in ("database", "queries"):
        (folder / part).mkdir()
    for i in range(12):
        image = Image.fromarray(shapes.draw(i, 32)[0])
        image.save(folder / "database" / f"{i}.png")
        ImageOps.mirror(image).save(folder / "queries" / f"{i}.png")
        lines.append(f"{i}.png,{i}.png,mirror")
    (folder / "ground_truth.csv").write_text("\n".join(lines))


def measure(data_path: str, args) -> tuple[list[dict], float, list[float]]:
    copies = read_copies(data_path)
    network = load_network(device=args.device, crop_size=args.crop_size, resize_size=args.resize_size,
                           **flags.network_values(args))
    images = open_files(os.path.expanduser(data_path), copies.database + copies.queries, network.reading)
    features = network_features(network, images, args.batch_size_per_gpu, args.workers)
    print(f"{len(copies.database)} images and {len(copies.queries)} copies; {network.about['arch']}, "
          f"{network.about['crop_size']} pixels, "
          f"{network.about['weights'] or 'no weights'}")
    source = sources(copies)
    return threshold_curve(features, source, args.thresholds), *average_precision(features, source)


def main(args) -> int:
    bench.header("Near duplicates by the cosine of embeddings", args.device)
    torch.manual_seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        if args.quick:
            args.arch = "pixels"
            draw(Path(folder))
        rows, area, interval = measure(folder if args.quick else args.data_path, args)
    bench.table(COLUMNS, [list(row.values()) for row in rows])
    print(f"average precision over all pairs {area:.1f} % [{interval[0]:.1f}, {interval[1]:.1f}]")
    bench.record(args, "duplicates", rows=rows, average_precision=area, interval=interval)
    return 0


def get_args_parser():
    parser = bench.parser(__doc__)
    flags.add_network_flags(parser)
    parser.add_argument("--data_path", default="", help="images, copies and ground truth")
    parser.add_argument("--thresholds", type=float, nargs="+", default=THRESHOLDS)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of an untrained network")
    return parser


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
