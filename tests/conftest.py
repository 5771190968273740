"""Every test finds the scripts at the project's root, and leaves one core to its neighbour."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
for folder in (ROOT / "tests", *(path for path in (ROOT / "tests").iterdir() if path.is_dir())):
    sys.path.append(str(folder))  # tests share oracles
sys.path.append(str(ROOT / "benchmarks"))  # behind the root: some names there are also names of modules
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def small_heads():
    """Projection heads of a few thousand weights, instead of five million, for runs in this process."""
    import main_dino

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main_dino, "DINOHead", partial(main_dino.DINOHead, hidden_dim=32, bottleneck_dim=16))
        yield


# ---- Order: files that wait more than they compute begin first, instead of alone at the end ----

LONG = ("test_slurm.py", "test_submitit.py", "test_two_hosts.py", "test_docs.py")


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist would begin with the files of most tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)
    for item in items:
        if item.get_closest_marker("slow"):  # pyproject.toml limits the time of the others
            item.add_marker(pytest.mark.timeout(0))
