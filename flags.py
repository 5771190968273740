"""Command lines: a parser that reads `@presets/file`, the types of flags, and the flags that several scripts share."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import parallel
from parallel import Refused, Stopped, worker_death

PRESETS = Path(__file__).parent / "presets"


def exit_code(
    script: str, work: Callable, args: argparse.Namespace, explain: Callable[[Exception], str | None] = worker_death
) -> int:
    """Run a script's work and leave its process group; the one place that turns an exception into a line.

    Args:
        work: args -> anything; an int is the exit code.
        explain: an exception that comes from outside the code -> one line that says so. A bug, of which it returns
            None, keeps its traceback.

    Returns:
        0 done, 2 refused, 1 stopped for a reason outside the code.
    """
    try:
        try:
            result = work(args)
            return result if isinstance(result, int) else 0
        except Refused as error:
            print(f"{script}: error: {error}", file=sys.stderr, flush=True)
            return 2
        except Exception as error:
            if (stopped := as_stopped(error, explain)) is None:
                raise
            return say_stopped(script, stopped)
        finally:
            parallel.stop()
    except RuntimeError as error:  # torch raises a worker's death wherever the process stands, here too
        if (reason := worker_death(error)) is None:
            raise
        return say_stopped(script, Stopped(reason))


def as_stopped(error: Exception, explain: Callable[[Exception], str | None]) -> Stopped | None:
    if isinstance(error, Stopped):
        return error
    reason = explain(error)
    return reason if reason is None or isinstance(reason, Stopped) else Stopped(reason)


def say_stopped(script: str, stopped: Stopped) -> int:
    if stopped.say:
        print(f"{script}: stopped: {stopped}", file=sys.stderr, flush=True)
    return 1


def output_dir(given: str, weights: str) -> Path:
    """--output_dir; if it is empty the folder of the file of weights, or the current one."""
    return Path(given or (os.path.dirname(weights) if os.path.isfile(weights) else "") or ".")


def prepare_output(folder: Path, flag: str = "--output_dir") -> None:
    """Make the folder. Refused where that can't be done, or where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("not writable")
    except OSError as error:
        raise Refused(f"{flag} {folder}: {error.strerror or error}; choose a folder you can write to") from error


class Parser(argparse.ArgumentParser):
    """Flags from the command line or from `@file`: one or several a line, `#` starts a comment."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, fromfile_prefix_chars="@", allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        """As argparse's, but a file of flags that can't be read and an unknown flag come with what there is."""
        for arg in sys.argv[1:] if args is None else args:
            if arg.startswith("@"):
                self.check_file(arg)
        try:
            found, unknown = self.parse_known_args(args, namespace)
        except RecursionError:
            self.error("@: a file of flags that names itself; take that line out of it")
        if unknown:
            near = difflib.get_close_matches(unknown[0], self._option_string_actions, 3)
            self.error(f"{' '.join(unknown)}: no such flag; " + (f"near ones: {', '.join(near)}; " if near else "")
                       + "--help shows all")
        return found

    def check_file(self, arg: str) -> None:
        try:
            Path(arg[1:]).read_text()
        except (OSError, UnicodeError) as error:
            presets = ", ".join(f"@presets/{path.name}" for path in sorted(PRESETS.glob("*.txt")))
            self.error(f"{arg}: not a file of flags ({getattr(error, 'strerror', 'not text')}); there are {presets}")

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        words = arg_line.split("#")[0].split()
        for word in words:
            if word.startswith("@"):
                self.check_file(word)
        return words

    def error(self, message: str) -> None:
        """One line, exit code 2: the usage of fifty flags would hide it."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def boolean(text: str) -> bool:
    words = {"true": True, "1": True, "on": True, "yes": True, "false": False, "0": False, "off": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false; give one of them")
    return words[text.lower()]


def number(kind: Callable, low: float = -math.inf, high: float = math.inf, above: bool = False) -> Callable:
    """A type for argparse: `kind` (int or float) within [low, high], or (low, high] with `above`; never NaN."""
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
        return value

    return parse


positive_int = number(int, 1)
count = number(int, 0)
positive = number(float, 0, above=True)
non_negative = number(float, 0)
fraction = number(float, 0, 1)
seed = number(int, 0, 2**32 - 1)  # NumPy's range; torch's is wider


def check_folder(path: str | os.PathLike, flag: str = "--output_dir") -> Path:
    """A folder that exists or can be made: Refused when it, or one that it would lie in, is a file."""
    for folder in (Path(path), *Path(path).parents):
        if folder.exists() and not folder.is_dir():
            raise Refused(f"{flag} {path}: {folder} is a file; give a folder")
    return Path(path)


def add_network_flags(parser: argparse.ArgumentParser) -> None:
    """What features.load_network and features.network_features read."""
    group = parser.add_argument_group("network and its pictures")
    add_weights_flags(group)
    add = group.add_argument
    add("--resize_size", type=count, default=0, help="pixels of the shorter side; 0: crop size x 256 / 224")
    add("--crop_size", type=count, default=0, help="of the centre crop; 0: the weights' global crops, or 224")
    add("--batch_size_per_gpu", type=positive_int, default=128, help="images a process and batch")


def add_weights_flags(parser: argparse._ActionsContainer, precision: bool = True) -> None:
    """The network alone, for scripts that make its pictures in their own way."""
    add = parser.add_argument
    add("--pretrained_weights", default="", help="a checkpoint or weights; empty: an untrained network")
    add("--checkpoint_key", default="teacher", help="part of the checkpoint: teacher or student")
    add("--arch", default="vit_small", help="where the weights do not say; `pixels` compares raw 32 x 32 pictures")
    add("--patch_size", type=positive_int, default=16, help="where the weights do not say")
    if precision:
        add("--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the network")


def add_dense_flags(parser: argparse.ArgumentParser) -> None:
    """Network of the scripts that look at whole pictures, patch by patch: nothing is cropped or batched."""
    group = parser.add_argument_group("network and its pictures")
    add_weights_flags(group, precision=False)
    group.add_argument(
        "--image_size", type=positive_int, default=480, metavar="PIXELS",
        help="shorter side as the network sees it, rounded down to whole patches; the proportions are kept")


def add_launch_flags(parser: argparse.ArgumentParser, workers: bool = True) -> None:
    """Where a script runs; workers=False for one that loads its images itself."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    if workers:
        parser.add_argument("--num_workers", type=count, default=10, help="processes a process that load images")
    parser.add_argument("--dist_url", default="env://", help="where the processes of a distributed run meet")
    parser.add_argument("--dist_timeout", type=number(float, 0, 1e6, above=True), default=parallel.TIMEOUT_MINUTES,
                        help="minutes that a process waits for the others before it gives up")
    # Launchers of older torch passed it; torchrun's LOCAL_RANK is what counts.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help="accepted and ignored")


def add_precision_flags(parser: argparse.ArgumentParser) -> None:
    choices = ("auto", "fp32", "fp16", "bf16")
    parser.add_argument("--precision", choices=choices, default="auto",
                        help="auto: bf16 where the device has bf16 arithmetic, else fp16 on a GPU, else fp32")
