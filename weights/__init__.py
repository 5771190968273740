"""Files of weights: checkpoints of a run, and backbones in every published layout.

    from weights import load_backbone

    backbone, info = load_backbone("output/run/checkpoint.pth")
"""

from weights.backbones import load_backbone

__all__ = ["load_backbone"]
