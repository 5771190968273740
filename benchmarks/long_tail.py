"""A long-tailed list of the images of class folders, to measure what curate.py evens out.

    python benchmarks/long_tail.py --data_path imagenette128/train --ratio 50 --output long_tail.txt

Class number c of C keeps a share ratio^(-c / (C - 1)) of the largest class's size: all of the first class, 1 / ratio of
that of the last. Which images a class keeps is drawn by the seed. The list has a line "path<TAB>class" per image.
"""

import argparse
import os
import sys
from pathlib import Path

import bench  # noqa: F401 - puts the project on the path
import numpy as np

import flags
from imagesets.sources import open_images
from parallel import Refused


def sizes(largest: int, classes: int, ratio: float) -> list[int]:
    """Number of images of each class, at least 1."""
    return [max(1, round(largest * ratio ** (-c / max(1, classes - 1)))) for c in range(classes)]


def draw(labels: np.ndarray, ratio: float, seed: int) -> np.ndarray:
    """Numbers of the images to keep, ascending."""
    counts, rng = np.bincount(labels), np.random.default_rng(seed)
    kept = [rng.permutation(np.flatnonzero(labels == c))[:n]
            for c, n in enumerate(sizes(int(counts.max()), len(counts), ratio))]
    return np.sort(np.concatenate(kept))


def write(args: argparse.Namespace) -> None:
    """Write --output. Raises Refused for bad input."""
    images = open_images(args.data_path)
    if images.labels is None or not hasattr(images, "path"):
        raise Refused(f"--data_path {args.data_path}: no class folders; give a folder that has one per class")
    labels = images.labels.numpy()
    kept = draw(labels, args.ratio, args.seed)
    lines = [b"%s\t%s\n" % (os.path.abspath(images.path(i)), images.classes[labels[i]].encode()) for i in kept]
    Path(args.output).write_bytes(b"".join(lines))
    bench.table(("class", "images"), [[name, int(n)] for name, n in
                                      zip(images.classes, np.bincount(labels[kept]), strict=False)])
    print(f"wrote {args.output}: {len(kept)} of {len(labels)} images")


def main(args: argparse.Namespace) -> int:
    return flags.exit_code("long_tail.py", write, args)


def get_args_parser() -> flags.Parser:
    parser = flags.Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data_path", required=True, help="folder with a folder of images per class, or a list with labels")
    add("--ratio", type=flags.number(float, 1), default=50.0, help="images of the largest class per image of the last")
    add("--seed", type=flags.seed, default=0, help="of which images a class keeps")
    add("--output", required=True, help=".txt list to write")
    return parser


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
