"""Draw the curves of one or several training runs.

    python plots.py run1/log.txt run2/log.txt --out curves.png
"""

import argparse
import sys

import atomic
import flags
import parallel
from protocols.charts import training_curves


def get_args_parser() -> flags.Parser:
    parser = flags.Parser("Draw the curves of one or several runs of main_dino.py.",
                          "%(prog)s LOG [LOG ...] [--out FILE]")
    parser.add_argument("logs", nargs="+", metavar="LOG", help="log.txt of a run, or the folder that holds it")
    parser.add_argument("--out", default="curves.png", help="figure to write: .png, or .svg or .pdf for print")
    return parser


def draw(args: argparse.Namespace) -> None:
    with parallel.refusing(f"--out {args.out}", "remove it or give another name"):
        atomic.check_own(args.out)
    training_curves(args.logs, args.out)
    print(f"curves of {len(args.logs)} run(s) written to {args.out}")


def main(args: argparse.Namespace) -> int:
    """Returns the exit code: 0 done, 2 refused."""
    return flags.exit_code("plots.py", draw, args)


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
