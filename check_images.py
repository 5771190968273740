"""Check a set of images before training: decode every image once and report what the set contains.

    python check_images.py /path/to/images
    python check_images.py /path/to/images --write good.txt && python main_dino.py --data_path good.txt ...

Prints the files by suffix and by format, the sizes, the images that can't be decoded with the reasons, and the mean and
standard deviation of each channel as flags of main_dino.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence

import atomic
import flags
import parallel
from imagesets import checking
from imagesets.sources import Files, Images, open_images
from parallel import Refused

NAMED = 50  # images that can't be decoded and are printed
SAMPLE = 100  # images whose headers tell how many channels there are


def get_args_parser() -> flags.Parser:
    parser = flags.Parser("What a set of images holds, before training on it.", "%(prog)s DATA [FLAG VALUE] ...")
    parser.add_argument("data_path", metavar="DATA", help="folder, list, shards or another value of --data_path")
    group = parser.add_argument_group("data")
    group.add_argument("--in_chans", type=flags.count, default=0,
                       help="channels to decode; 0: 1 if the images are grey, the channels of .npy arrays, else 3")
    flags.add_reading_flags(group)
    parser.add_argument_group("output").add_argument(
        "--write", default="", metavar="LIST.txt",
        help="write the images that can be decoded, with their labels, as a list for --data_path")
    return parser


def check(args: argparse.Namespace) -> None:
    """Decode every image and print what there is. Raises Refused for bad input."""
    with parallel.refusing(f"--write {args.write}", "remove it or give another name"):
        atomic.check_own(args.write)
    reading = {"max_pixels": args.max_pixels, "value_range": args.value_range, "flag": "DATA"}
    images = open_images(args.data_path, in_chans=args.in_chans or 3, **reading)
    in_chans = args.in_chans or channels(images)
    if in_chans != (args.in_chans or 3):
        images = open_images(args.data_path, in_chans=in_chans, **reading)
    if args.write and not isinstance(images, Files):
        raise Refused(f"--write {args.write}: {args.data_path} is not a folder or list of files; leave --write out")
    checked = checking.check(images)
    summary = checking.summarize(checked)
    print(f"{args.data_path}: {len(images)} images, {len(summary.bad)} of which can't be decoded; {labels(images)}")
    print(f"by suffix: {counts(Counter(suffix(images.name(i)) for i in range(len(images))))}")
    if summary.kinds:
        print(f"by format: {counts(summary.kinds, '; ')}")
    for number in list(summary.bad)[:NAMED]:
        print(f"can't be decoded: {images.name(number)}: {summary.bad[number]}")
    if len(summary.bad) > NAMED:
        print(f"and {len(summary.bad) - NAMED} more")
    if len(summary.bad) < len(images):
        print("height x width: {} x {} to {} x {}".format(*summary.smallest, *summary.largest))
        print(pasted(in_chans, summary))
    if args.write:
        good = [i for i in range(len(images)) if i not in summary.bad]
        checking.write_list(args.write, lines(images, good, args.write), "--write")
        print(f"wrote {args.write}: {len(good)} images")


def channels(images: Images) -> int:
    """Channels to decode the images with, by the headers of some of them: 1, 3, or those of .npy arrays."""
    if not hasattr(images, "content"):
        return 3
    step = max(1, len(images) // SAMPLE)
    kinds = {checking.file_kind(images.content(i)) for i in range(0, len(images), step)} - {""}
    numbers = {int(kind.split(", ")[1].split()[0]) for kind in kinds}
    arrays = all(kind.startswith("NPY") for kind in kinds)  # of image files, all but grey ones become RGB
    return numbers.pop() if len(numbers) == 1 and (arrays or numbers == {1}) else 3


def labels(images: Images) -> str:
    if images.labels is None:
        return "no labels"
    shown = ", ".join(images.classes[:5]) + (", ..." if len(images.classes) > 5 else "")
    return f"{len(images.classes)} classes ({shown})"


def suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "none"


def counts(counter: Counter, between: str = ", ") -> str:
    return between.join(f"{count} {what}" for what, count in counter.most_common())


def pasted(in_chans: int, summary: checking.Summary) -> str:
    """The flags of main_dino.py that describe the images."""
    mean, std = (" ".join(f"{value:.4f}" for value in values) for values in (summary.mean, summary.std))
    return (f"--in_chans {in_chans} " if in_chans != 3 else "") + f"--mean {mean} --std {std}"


def lines(images: Files, numbers: Sequence[int], path: str) -> list[bytes]:
    """Absolute paths, and with labels `path<TAB>class`. Raises Refused for names that a list can't hold."""
    rows = []
    for i in numbers:
        row = os.path.abspath(images.path(i))
        if b"\t" in row or b"\n" in row:
            raise Refused(f"--write {path}: {images.name(i)!r} has a tab or a line end in its name; rename it")
        rows.append(row if images.labels is None else row + b"\t" + os.fsencode(images.classes[images.labels[i]]))
    return rows


def main(args: argparse.Namespace) -> int:
    """Returns the exit code: 0 done, 2 refused."""
    return flags.exit_code("check_images.py", check, args)


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
