"""How even the classes of a curated list are, beside lists of the same size drawn at random from the same pile.

    python benchmarks/evenness.py --pile long_tail.txt --curated output/curated/list.txt

"even" is the exponential of the entropy of the shares of the classes: the number of equally large classes with the same
entropy. Random lists are drawn without replacement; the range holds 95 % of them.
"""

import sys

import bench
import numpy as np

import flags
from imagesets.sources import open_images
from parallel import Refused


def evenness(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def random_range(labels: np.ndarray, size: int, draws: int, seed: int) -> tuple[float, float, float]:
    """Median and 95 % range of the evenness of random lists."""
    rng, classes = np.random.default_rng(seed), labels.max() + 1
    values = [evenness(np.bincount(rng.permutation(labels)[:size], minlength=classes)) for _ in range(draws)]
    low, median, high = np.percentile(values, (2.5, 50, 97.5))
    return median, low, high


def classes(path: str, flag: str) -> tuple[list[str], np.ndarray]:
    images = open_images(path, None, flag=flag)
    if images.labels is None:
        raise Refused(f"{flag} {path}: no labels; give a list with a class per line")
    return images.classes, images.labels.numpy()


def measure(args) -> None:
    names, pile = classes(args.pile, "--pile")
    kept_names, kept = classes(args.curated, "--curated")
    if set(kept_names) - set(names):
        raise Refused(f"--curated {args.curated}: has classes that --pile {args.pile} lacks; give the list that was "
                      "curated from it")
    kept = np.array([names.index(name) for name in kept_names])[kept]
    counts = [np.bincount(part, minlength=len(names)) for part in (pile, kept)]
    median, low, high = random_range(pile, len(kept), args.draws, args.seed)
    bench.table(("list", "images per class", "even"), [
        [name, " ".join(map(str, part)), f"{evenness(part):.2f}"]
        for name, part in zip((f"the pile, {len(pile)}", f"curated, {len(kept)}"), counts, strict=True)
    ] + [[f"{len(kept)} at random", "in proportion", f"{median:.2f} [{low:.2f}, {high:.2f}]"]])


def main(args) -> int:
    return flags.exit_code("evenness.py", measure, args)


def get_args_parser() -> flags.Parser:
    parser = flags.Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--pile", required=True, help="list with a class per image that was curated")
    add("--curated", required=True, help="list.txt that curate.py wrote from it")
    add("--draws", type=flags.positive_int, default=1000, help="random lists")
    add("--seed", type=flags.seed, default=0, help="of the random lists")
    return parser


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
