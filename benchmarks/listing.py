"""Start-up time and memory with many files: ours against torchvision's ImageFolder.

    python benchmarks/listing.py --images 1000000 --folder /dev/shm

Creates empty files in 1000 class folders, which take about 1 KiB each in memory (tmpfs), and removes them. Times hold
for folders in memory: on a disk or over a network, walking them takes many times as long, reading the index does not.
Memory is the private memory that a forked worker gains by reading every name once.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import bench

from imagesets.sources import open_images

CLASSES = 1000


def private_mb() -> float:
    """Memory of this process that is not shared with others."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_")) / 1024


def growth_in_a_fork(read: Callable[[int], object], n: int) -> float:
    """Private memory in MB that a forked process, like a data-loading worker, gains by read(0) ... read(n - 1)."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            for i in range(100):  # memory that only the first reads allocate
                read(i)
            before = private_mb()
            for i in range(n):
                read(i)
            os.write(send, str(private_mb() - before).encode())
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive) as file:
        grown = file.read()
    os.waitpid(pid, 0)
    return float(grown)


def make_files(folder: Path, n: int) -> None:
    for c in range(min(CLASSES, n)):
        name = f"n{c:08d}"
        (folder / name).mkdir()
        for i in range(c, n, CLASSES):
            (folder / name / f"{name}_{i}.JPEG").touch()


def timed(make: Callable):
    start = time.perf_counter()
    made = make()
    return made, time.perf_counter() - start


def main(args) -> int:
    from torchvision.datasets import ImageFolder

    args.images = 1000 if args.quick else args.images
    bench.header("a listing in memory")
    top = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        os.environ["DINO_CACHE"] = str(top / "cache")
        (top / "set").mkdir()
        make_files(top / "set", args.images)
        time.sleep(4)  # folders changed just now get no index
        baseline, walk = timed(lambda: ImageFolder(top / "set"))
        images, first = timed(lambda: open_images(top / "set"))
        images, later = timed(lambda: open_images(top / "set"))
        assert [s for s, _ in baseline.samples[::997]] == [images.name(i) for i in range(0, len(images), 997)]
        grown = [growth_in_a_fork(read, len(images)) for read in (baseline.samples.__getitem__, images.path)]
        size = sum(f.stat().st_size for f in (top / "cache").iterdir()) / 2**20 if (top / "cache").exists() else 0
    finally:
        shutil.rmtree(top)
    print(f"{len(images):,} files; index of {size:.0f} MB")
    results = {"first start, s": (walk, first), "every later start, s": (walk, later),
               "memory a worker gains in an epoch, MB": tuple(grown)}
    bench.table(["", "ImageFolder", "ours"], [[name, *both] for name, both in results.items()])
    bench.record(args, "listing", images=len(images), index_mb=size, found=results)
    return 0


def get_args_parser():
    parser = bench.parser(__doc__)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--folder", default="/dev/shm", help="where to make the files")
    return parser


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
