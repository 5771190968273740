"""Every test finds the scripts at the project's root, and leaves one core to its neighbour."""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
for folder in (ROOT / "tests", *(path for path in (ROOT / "tests").iterdir() if path.is_dir())):
    sys.path.append(str(folder))  # tests share oracles
sys.path.append(str(ROOT / "benchmarks"))  # behind the root: some names there are also names of modules
torch.set_num_threads(1)
