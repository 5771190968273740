"""Images that can't be decoded: how many a run tolerates, and what ends it.

Shapes: N images in all.
"""

import math
from collections.abc import Iterable

import parallel
from parallel import Refused

Bad = tuple[str, str]  # name of an image that can't be decoded, and the reason


class TooManyBadImages(parallel.Stopped):
    """More images than --max_bad_images allows can't be decoded; all processes agree on it."""


class Unreadable(parallel.Stopped):
    """A process can't go on because an image can't be read."""

    def __init__(self, message: str) -> None:  # DataLoader raises it again with the worker's traceback as the message
        super().__init__(message.strip().splitlines()[-1].removeprefix(f"{__name__}.Unreadable: "))


class BadImages:
    """Counts the images that can't be decoded, each once, and stops a run that has too many.

    Each process counts its own, and `share` merges the counts, so that all processes stop together. The limit is
    max_bad_images x N rounded up: a small set of images may have one bad image unless the share is 0. The first ten
    are printed.

    Args:
        images: N.
        max_bad_images: share of the images, 0 to 1.

    Raises:
        Refused: max_bad_images is out of range.
    """

    PRINTED = 10

    def __init__(self, images: int, max_bad_images: float) -> None:
        if not 0 <= max_bad_images <= 1:
            raise Refused(f"--max_bad_images {max_bad_images}: give a share of the images, 0 to 1")
        self.images, self.max_bad_images = images, max_bad_images
        self.limit = math.ceil(round(max_bad_images * images, 6))  # 0.07 x 100 is 7.000000000000001
        self.reasons: dict[str, str] = {}  # name -> reason

    def add(self, bad: Iterable[Bad]) -> None:
        """Count a batch's `bad`. A process that is alone raises TooManyBadImages here."""
        for name, reason in bad:
            if name in self.reasons:
                continue
            self.reasons[name] = reason
            if len(self.reasons) <= self.PRINTED and parallel.is_main():
                last = "; further ones are only counted" if len(self.reasons) == self.PRINTED else ""
                print(f"bad image, replaced by another: {name}: {reason}{last}", flush=True)
        if parallel.world_size() == 1:
            self.check()

    def share(self) -> None:
        """Merge the processes' counts; all processes call this, from time to time. Raises TooManyBadImages."""
        if parallel.world_size() > 1:
            for reasons in parallel.gather_objects(list(self.reasons.items())):
                self.add(reasons)
            self.check()

    def check(self) -> None:
        if len(self.reasons) > self.limit:
            name, reason = list(self.reasons.items())[-1]
            raise TooManyBadImages(
                f"{len(self.reasons)} of {self.images} images can't be decoded, more than --max_bad_images "
                f"{self.max_bad_images:g} allows; remove them or raise it. The last: {name}: {reason}",
                say=parallel.is_main(),
            )
