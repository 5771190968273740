"""Nearest neighbours of images among embeddings, printed and drawn as a sheet.

    python search.py --features photos.npy --query 17 403 --output sheet.png
    python search.py --features photos.npy --query mine.jpg --k 12 --output sheet.png

--features is a file of extract_features.py with class tokens. A query is a row of it, or an image file, which goes
through the network whose weights the file names. The search is exhaustive, by cosine similarity.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import atomic
import flags
import parallel
from protocols import charts, embeddings, image_search


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("Nearest neighbours of images among embeddings, as a sheet of images.")
    add = parser.add_argument_group("search").add_argument
    add("--features", required=True, help="file of embeddings that extract_features.py wrote")
    add("--query", required=True, nargs="+", help="rows of the file, from 0, or image files")
    add("--k", type=flags.number(int, 1, 100), default=8, help="neighbours per query, at most 100")

    add = parser.add_argument_group("data and network").add_argument
    add("--data_path", default="", help="where the images of the file are, if they were moved since")
    add("--pretrained_weights", default="", help="where the weights named by the file are, if they were moved since")

    add = parser.add_argument_group("output").add_argument
    add("--output", default="sheet.png", help="figure to write: " + ", ".join(charts.FORMATS))

    add = parser.add_argument_group("hardware").add_argument
    add("--device", default="cpu", help="device of the network, used for image files: auto, cpu, cuda or cuda:N")
    add("--batch_size_per_gpu", type=flags.positive_int, default=32,
        help="image files that go through the network at a time; lower it if memory runs out")
    return parser


def search(args: argparse.Namespace) -> list[list[tuple[int, float]]]:
    """Print the neighbours and write --output. Returns (row, cosine) of each query's neighbours.

    Raises:
        Refused: bad input.
    """
    output = Path(args.output)
    charts.check_format("--output", output)
    embeddings.check_output(output)
    with parallel.refusing(f"--output {output}", "remove it or give another name"):
        atomic.check_own(output)
    result = image_search.nearest_images(args.features, args.query, args.k, args.data_path, args.pretrained_weights,
                                         args.device, args.batch_size_per_gpu)
    charts.draw_sheet(image_search.sheet_rows(result), output)
    for query, row, neighbours in zip(result.queries, result.rows, result.nearest, strict=True):
        print(query if row is None else f"{query}: {result.names[row]}")
        for neighbour, cosine in neighbours:
            print(f"  {cosine:.4f}  row {neighbour}  {result.names[neighbour]}")
    print(f"wrote {output}", flush=True)
    return result.nearest


def main(args: argparse.Namespace) -> int:
    """Returns the exit code: 0 done, 2 refused."""
    return flags.exit_code("search.py", search, args)


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
