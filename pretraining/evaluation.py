"""k-NN of the teacher's features while a run trains."""

from __future__ import annotations

import argparse

import torch
from torch import nn

import parallel
from imagesets import loaders
from protocols import transforms


class Evaluation:
    """k-NN of the teacher's features on labelled pictures, and the figures it must beat."""

    MOST_PIXELS = 100_000

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        path = args.eval_data_path or args.data_path
        flag = "--eval_data_path" if args.eval_data_path else "--data_path"
        self.train, self.val = (loaders.open_images(path, part, args.in_chans, args.max_pixels, flag)
                                for part in ("train", "val"))
        for images, part in ((self.train, "train"), (self.val, "val")):
            if images.labels is None:
                raise ValueError(f"--eval_data_path {path}: its {part} part has no labels; --eval_knn_every needs "
                                 "train/ and val/ folders of class folders")
        from protocols.splits import Part, match_classes

        parts = (Part(torch.empty(0), images.labels, images.classes) for images in (self.train, self.val))
        train, val = match_classes(*parts)  # by name: a class may be missing in one part
        self.labels, self.n_classes = (train.labels, val.labels), len(train.classes)

    def knn(self, backbone: nn.Module | None, autocast=None) -> tuple[float, float]:
        """(top-1, top-5) in % of 20-NN on a backbone's features, or on raw pixels for None."""
        from protocols.knn import knn_classifier

        try:
            with torch.random.fork_rng(devices=[]):  # loaders draw a seed: it must not move the run's random numbers
                found = [self.features(backbone, images, autocast) for images in (self.train, self.val)]
        except ValueError as error:
            raise loaders.Unreadable(f"--eval_data_path: {error}; evaluation needs all images: remove it") from error
        train, val = zip(found, self.labels, strict=True)
        return knn_classifier(*train, *val, k=20, T=0.07, num_classes=self.n_classes, device=self.device)

    def features(self, backbone: nn.Module | None, images: loaders.Images, autocast) -> torch.Tensor:
        from protocols.features import extract_features, pixel_features

        if backbone is None:
            return pixel_features(images, self.args.num_workers)
        crop = self.args.global_crops_size
        dataset = transforms.EvalImages(images, round(crop * 256 / 224), crop, self.args.mean, self.args.std)
        backbone.eval()
        found = extract_features(
            backbone, dataset, 4 * self.args.batch_size_per_gpu, self.args.num_workers, self.device, autocast)
        backbone.train()
        return found

    def baselines(self, backbone: nn.Module, autocast) -> dict[str, float]:
        """Top-1 of the untrained network and of raw pixels: a backbone that does not beat them has learned nothing.

        Without raw pixels where there are more than MOST_PIXELS training images: 3072 values of each would take hours.
        """
        found = {"untrained": self.knn(backbone, autocast)[0]}
        said = f"20-NN before training: {found['untrained']:.1f} % on this network's features"
        if len(self.train) <= self.MOST_PIXELS:
            found["pixels"] = self.knn(None)[0]
            said += f", {found['pixels']:.1f} % on raw pixels"
        if parallel.is_main():
            print(said, flush=True)
        return found
