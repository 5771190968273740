"""Files of weights: the checkpoints of a run, and backbones in every published layout.

    import sys
    sys.path.insert(0, "/path/to/this/folder")
    from weights import load_backbone

    backbone, info = load_backbone("output/run/checkpoint.pth")  # or a file of another library
"""

from weights.backbones import load_backbone

__all__ = ["load_backbone"]
