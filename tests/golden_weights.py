"""How the reference figures fill weights and inputs (README.md in tests/golden and tests/golden/dinov2)."""

import zlib
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"


def rs(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


def fill(module: torch.nn.Module, prefix: str = "") -> torch.nn.Module:
    """Fill every floating-point entry of the module's state with the reference weights, in float64."""
    module.double()
    for key, value in module.state_dict().items():
        if not value.is_floating_point():
            continue
        name = prefix + key
        random = torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(value.shape)))
        if name.endswith("running_var"):
            random = torch.ones_like(random)
        elif name.endswith("running_mean"):
            random = torch.zeros_like(random)
        elif name.endswith("weight_g") or ("norm" in name and name.endswith("weight")):
            random = 1 + 0.1 * random
        elif name.endswith("gamma"):
            random = 0.5 + 0.1 * random
        else:
            random = 0.04 * random
        value.copy_(random)
    return module
