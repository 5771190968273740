"""Command lines: a parser that reads flags from `@FILE`, types for argparse, and the flags that scripts share."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import parallel
from imagesets.decode import MAX_PIXELS
from parallel import Refused, Stopped, worker_death

PRESETS = Path(__file__).parent / "presets"
PUBLISHED, OWN = ARITHMETICS = ("published", "own")  # of an evaluation, see `add_arithmetic_flag`


def exit_code(
    script: str, work: Callable, args: argparse.Namespace,
    explain: Callable[[Exception], str | Stopped | None] = worker_death,
) -> int:
    """Run `work(args)`, leave the process group and return the exit code.

    This is the only place where an exception becomes a one-line message. Any exception that is neither `Refused` nor
    explained from outside the code is a bug and keeps its traceback.

    Args:
        work: does the script's job; an int that it returns is the exit code.
        explain: maps an exception to its reason in one line if that lies outside the code (a lost process, memory that
            ran out), else to None. Full disks are explained before it is asked.

    Returns:
        0 if the work is done, 2 for bad input, 1 if the work stopped for a reason outside the code, 130 on Ctrl-C.
    """
    try:
        try:
            result = work(args)
            sys.stdout.flush()  # here, not at Python's exit, which would print a traceback if the reader has gone
            return result if isinstance(result, int) else 0
        except Refused as error:
            print(f"{script}: error: {error}", file=sys.stderr, flush=True)
            return 2
        except KeyboardInterrupt:
            print(f"{script}: interrupted", file=sys.stderr, flush=True)
            return 130
        except Exception as error:
            stopped = error if isinstance(error, Stopped) else (
                output_closed(error) or parallel.full_disk(error) or explain(error))
            if stopped is None:
                raise
        finally:
            parallel.stop()
    except RuntimeError as error:  # torch raises the death of a data-loading worker anywhere, even in the lines above
        if (stopped := worker_death(error)) is None:
            raise
    if getattr(stopped, "say", True):
        print(f"{script}: stopped: {stopped}", file=sys.stderr, flush=True)
    return 1


def output_closed(error: Exception) -> str | None:
    """A one-line reason if the program that reads this one's output has ended, as in `| head`, else None."""
    if not isinstance(error, BrokenPipeError):
        return None
    try:
        os.write(sys.stdout.fileno(), b"\n")  # raises again, unless another pipe is broken
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit
        return "the program that reads the output has closed it"
    return None


def output_dir(given: str, weights: str) -> Path:
    """--output_dir; if it is empty the folder of the file of weights, or the current one."""
    return Path(given or (os.path.dirname(weights) if os.path.isfile(weights) else "") or ".")


def prepare_output(folder: str | os.PathLike, flag: str = "--output_dir") -> Path:
    """Create the folder and its parents, and return its path.

    Raises:
        Refused: it can't be created, or it isn't writable.
    """
    folder = Path(folder)
    with parallel.refusing(f"{flag} {folder}", "choose a folder you can write to"):
        check_links(folder, flag)
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("not writable")
    return folder


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to a flag's help, unless it is empty."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if isinstance(default, (list, tuple)) and default:  # as it is given, not as Python prints it
            return f"{action.help} (default: {' '.join(map(str, default))})"
        empty = default is False or default in ("", None, [], ())
        return action.help if empty else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that also reads flags from `@FILE`: one or more flags per line, `#` starts a comment,
    values with spaces are quoted.

    It can be the parent of another parser, as the published scripts use theirs: `-h` is added when it parses.

    Args:
        hints: what to say of flags that users try and that don't exist.
    """

    def __init__(
        self, description: str, usage: str = "%(prog)s [@FILE] [FLAG VALUE] ...", hints: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(usage=usage, description=description, fromfile_prefix_chars="@", allow_abbrev=False,
                         formatter_class=Help, add_help=False)
        self.hints = hints or {}

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        """Like argparse's, but errors are one line and suggest existing presets and similar flags."""
        if "--help" not in self._option_string_actions:
            self.add_argument("-h", "--help", action="help", help="show this help message and exit")
        args = [self.found_file(arg) for arg in (sys.argv[1:] if args is None else args)]
        try:
            namespace, unknown = self.parse_known_args(args, namespace)
        except RecursionError:
            self.error("@: the file of flags includes itself; remove that line")
        if unknown:
            near = difflib.get_close_matches(unknown[0], self._option_string_actions, 3)
            hint = self.hints.get(unknown[0]) or (f"did you mean {' or '.join(near)}?" if near else "")
            self.error(f"{' '.join(unknown)}: no such flag; {hint} --help lists all flags")
        return namespace

    def found_file(self, arg: str) -> str:
        """@FILE of flags, which is looked for beside this file too, so that presets work from any folder; else arg."""
        if not arg.startswith("@"):
            return arg
        path = Path(arg[1:])
        if not path.exists() and (PRESETS.parent / path).is_file():
            path = PRESETS.parent / path
        try:
            path.read_text()
            return f"@{path}"
        except (OSError, UnicodeError) as error:
            presets = ", ".join(f"@presets/{path.name}" for path in sorted(PRESETS.glob("*.txt")))
            self.error(f"{arg}: not a file of flags ({getattr(error, 'strerror', 'not text')}); available: {presets}")

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        words = shlex.shlex(arg_line.removeprefix("\ufeff"), posix=True)  # the mark is what some editors put first
        words.whitespace_split, words.escape = True, ""  # a path of Windows keeps its backslashes
        try:
            return [self.found_file(word) for word in words]
        except ValueError:  # an apostrophe without another one
            return [self.found_file(word) for word in arg_line.split("#")[0].split()]

    def error(self, message: str) -> None:
        """Print one line and exit with code 2; argparse would print the usage of fifty flags above it."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


class Default(float):
    """A flag's default number that may give way to what a network supports; the same number, if given, may not."""


def boolean(text: str) -> bool:
    words = {"true": True, "1": True, "on": True, "yes": True, "false": False, "0": False, "off": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is not a boolean; give true or false")
    return words[text.lower()]


LARGEST = 1e30  # of a flag's fractions, as products of two should be float32 numbers


def number(kind: Callable, low: float = -math.inf, high: float = math.inf, above: bool = False) -> Callable:
    """A `type` for argparse: finite numbers of `kind` (int or float) in [low, high], or (low, high] with `above`.

    Fractions are at most LARGEST in magnitude.
    """
    bounds = f"{'above' if above else 'at least'} {low}" if low > -math.inf else ""
    bounds += (" and " if bounds else "") + f"at most {high}" if high < math.inf else ""
    remedy = f"give a value {bounds or 'that is finite'}"

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError as error:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}; {remedy}") from error
        if not (low < value if above else low <= value) or value > high or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is out of range; {remedy}")
        if isinstance(value, float) and abs(value) > LARGEST:
            raise argparse.ArgumentTypeError(f"{text} is out of range; {remedy}, and at most {LARGEST:g}")
        return value

    return parse


positive_int = number(int, 1)
count = number(int, 0)
positive = number(float, 0, above=True)
non_negative = number(float, 0)
fraction = number(float, 0, 1)
seed = number(int, 0, 2**32 - 1)  # NumPy's range; torch's is wider


def check_folder(path: str | os.PathLike, flag: str = "--output_dir") -> Path:
    """The path of a folder that exists or may be created.

    Raises:
        Refused: the path or one of its parents is a file, or a link to nothing.
    """
    check_links(Path(path), flag)
    for folder in (Path(path), *Path(path).parents):
        if folder.exists() and not folder.is_dir():
            raise Refused(f"{flag} {path}: {folder} is a file; give a folder")
    return Path(path)


def check_links(path: Path, flag: str) -> None:
    """Raises Refused: the path or one of its parents is a link to nothing, in whose place no folder can be made."""
    for folder in (path, *path.parents):
        if folder.is_symlink() and not folder.exists():
            raise Refused(f"{flag} {path}: {folder} is a link to {os.readlink(folder)!r}, which isn't there; make that "
                          "folder, or choose another one")


class Range(argparse.Action):
    """Two numbers, LOW < HIGH."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if not values[0] < values[1]:
            parser.error(f"{self.option_strings[0]} {values[0]:g} {values[1]:g}: give LOW HIGH with LOW < HIGH")
        setattr(namespace, self.dest, values)


# ---- Flags that several scripts share. `parser` may be a group of the caller: argparse can't nest groups. ----


def group_of(parser: argparse._ActionsContainer, title: str) -> argparse._ActionsContainer:
    """A new group of a parser; a group is returned as it is."""
    return parser.add_argument_group(title) if isinstance(parser, argparse.ArgumentParser) else parser


def add_data_flags(parser: Parser, default: str = "shapes") -> Callable:
    """Training and test images of a classification. Returns the group's `add_argument`, for further flags."""
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data_path", default=default,
        help="folder with train/ and val/ (or test/), a single folder, a .txt or .csv list, torchvision:CIFAR10, or "
             "shapes")
    add("--val_data_path", default="",
        help="test images outside of --data_path, all of which is then used for training")
    add_reading_flags(group, skip_bad=True)
    return add


def add_reading_flags(parser: argparse._ActionsContainer, skip_bad: bool = False) -> None:
    """How images are read, in training and evaluation (decode.Reading).

    Args:
        skip_bad: whether images may be left out; a data set with a ground truth needs all of its images.
    """
    add = group_of(parser, "data").add_argument
    add("--max_pixels", type=positive_int, default=MAX_PIXELS,
        help="larger images count as undecodable, against decompression bombs; raise it for very large images")
    add("--value_range", type=number(float), nargs=2, metavar=("LOW", "HIGH"), action=Range,
        help="values of black and of white in images of more than 8 bits: give it for float images and for data that "
             "use a part of 16 bits (docs/data.md); without it, what the files declare, and in evaluation the range "
             "that the weights were trained with")
    if skip_bad:
        add("--skip_bad", default="", metavar="FILE",
            help="leave out images that can't be decoded and list them, with the reasons, in this file; every image is "
                 "decoded once more for it. Without it, the first such image is an error")


def add_network_flags(parser: argparse._ActionsContainer) -> None:
    """The network and the size and batch size of its images (see features.load_network)."""
    group = group_of(parser, "network")
    add_weights_flags(group)
    add = group.add_argument
    add("--resize_size", type=count, default=0,
        help="shorter side in pixels of the resized image, before the centre crop; 0: crop size x 256 / 224; set it to "
             "the crop size to keep more of each image")
    add("--crop_size", type=count, default=0,
        help="side in pixels of the centre crop; 0: the image size stored with the weights, in ours the global crop "
             "size of training, else 224; raise it if objects are small in the images")
    add("--batch_size_per_gpu", type=positive_int, default=128,
        help="images per process and batch; lower it if memory runs out")


def add_weights_flags(parser: argparse._ActionsContainer, precision: bool = True) -> None:
    """The network alone, for scripts that resize and crop images in their own way."""
    group = group_of(parser, "network")
    add = group.add_argument
    add("--pretrained_weights", default="",
        help="checkpoint or file of weights; empty: a randomly initialized network, as a baseline")
    add("--checkpoint_key", default="teacher",
        help="network to load from the checkpoint: teacher or student; the teacher's features are usually better")
    add("--arch", default=None,
        help="architecture, if the weights do not name it (default: vit_small); `pixels` compares raw 32 x 32 images, "
             "as a baseline")
    add("--patch_size", type=positive_int, default=None,
        help="patch size of a ViT, if the weights do not name it (default: 16, and 8 to visualize attention)")
    add_image_flags(group)
    if precision:
        add("--precision", choices=("fp32", "fp16", "bf16"), default="fp32",
            help="precision of the network; fp16 and bf16 are faster on a GPU, with slightly different features")


def add_image_flags(parser: argparse._ActionsContainer) -> None:
    """Channels and normalization of the network's images (see weights.preprocessing); None: as the weights say."""
    add = group_of(parser, "network").add_argument
    add("--mean", type=fraction, nargs="+",
        help="mean of each channel, of intensities in [0, 1]; without it the one stored with the weights, else "
             "ImageNet's. Give it if the weights come from code that normalizes in another way")
    add("--std", type=number(float, 0, 1, above=True), nargs="+",
        help="standard deviation of each channel; without it as --mean")
    add("--in_chans", type=positive_int,
        help="channels of the images, if the weights do not say; without it 3")


def network_values(args: argparse.Namespace) -> dict:
    """The flags of `add_weights_flags` and `add_reading_flags`, and --seed, as arguments of `features.load_network`."""
    names = ("arch", "patch_size", "checkpoint_key", "precision", "seed", "mean", "std", "in_chans", "max_pixels",
             "value_range", "skip_bad")
    return {"weights": args.pretrained_weights} | {name: value for name, value in vars(args).items() if name in names}


def add_dense_flags(parser: argparse._ActionsContainer) -> None:
    """The network of scripts that use patch features of whole images, one image at a time."""
    group = group_of(parser, "network")
    add_weights_flags(group, precision=False)
    group.add_argument(
        "--image_size", type=positive_int, default=480, metavar="PIXELS",
        help="shorter side of the resized image, rounded down to whole patches; the aspect ratio is kept; raise it for "
             "finer results, lower it if memory runs out")


def add_arithmetic_flag(add: Callable, own: str) -> None:
    """Choice between the published script's arithmetic and this project's; `own` says what the latter does."""
    add("--arithmetic", choices=ARITHMETICS, default=PUBLISHED,
        help=f"published: computes as the published script does, for figures to compare with the paper's; own: {own} "
             "(docs/protocols.md)")


def add_image_size(parser: argparse._ActionsContainer) -> None:
    """Size of whole images whose patches are shown or judged; see dense.default_size."""
    group_of(parser, "network").add_argument(
        "--image_size", type=count, default=0, metavar="PIXELS",
        help="shorter side of the resized image; the aspect ratio is kept; 0: 480 for a network trained on crops of "
             "224 pixels, in proportion for others, and at most twice the images' own; raise it for finer results, "
             "lower it if memory runs out")


def add_launch_flags(parser: argparse._ActionsContainer, workers: bool = True) -> None:
    """Device and processes; workers=False for scripts that load images in the main process."""
    add = group_of(parser, "hardware").add_argument
    add("--device", default="auto", help="auto (a CUDA GPU if there is one), cpu, cuda, cuda:N or mps (Apple GPUs)")
    if workers:
        add("--num_workers", type=count, default=10,
            help="data-loading workers per process; raise it if the GPU waits for data (in training, if `data` on the "
                 "progress lines is above a few percent), lower it if memory runs out")
    add("--dist_url", default="env://",
        help="where the processes of a distributed run meet; env:// takes what torchrun or Slurm sets; give "
             "tcp://HOST:PORT or file://PATH for other launchers")
    add("--dist_timeout", type=number(float, 0, 1e6, above=True), default=parallel.TIMEOUT_MINUTES,
        help="minutes that a process waits for the others before it gives up; raise it if one is much slower")
    # Launchers of older torch passed it; torchrun's LOCAL_RANK is what counts.
    add("--local_rank", "--local-rank", type=int, default=0, help="ignored; launchers of older PyTorch pass it")


def add_precision_flags(parser: argparse._ActionsContainer) -> None:
    group_of(parser, "hardware").add_argument(
        "--precision", choices=("auto", "fp32", "fp16", "bf16"), default="auto",
        help="auto: bf16 on hardware with fast bf16, else fp16 on a GPU, else fp32; choose fp32 to rule out rounding "
             "if training is unstable")
