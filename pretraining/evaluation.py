"""k-NN evaluation of the teacher's features during training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import nn

import parallel
from imagesets.decode import Reading
from imagesets.sources import Images, open_images
from parallel import Refused
from pretraining.networks import without_graphs
from pretraining.same_images import sample
from protocols.features import extract_features, pixel_features
from protocols.knn import knn_classifier
from protocols.splits import Part, match_classes
from protocols.transforms import EvalImages

K = 20  # neighbours
MOST_PIXELS = 100_000  # training images above which k-NN on raw pixels is skipped, as it would take hours


class KnnEvaluation(NamedTuple):
    """20-NN classification of labelled validation images by labelled training images."""

    parts: tuple[Images, Images]  # training, validation
    labels: tuple[torch.Tensor, torch.Tensor]  # class indices, the same classes in both parts
    n_classes: int
    crop_size: int
    mean: Sequence[float]
    std: Sequence[float]
    batch_size: int
    num_workers: int
    device: torch.device

    def knn(self, backbone: nn.Module | None, autocast: AbstractContextManager | None = None) -> tuple[float, float]:
        """(top-1, top-5) accuracy in % of 20-NN on the backbone's features; None: on raw pixels."""
        with torch.random.fork_rng(devices=[]):  # data loaders draw a seed from torch, which training must not notice
            try:
                features = [self.features(backbone, images, autocast) for images in self.parts]
            except Refused as error:  # an image that can't be decoded
                raise parallel.Stopped(f"--eval_data_path: {error}") from error
        train, val = zip(features, self.labels, strict=True)
        return knn_classifier(*train, *val, k=K, T=0.07, num_classes=self.n_classes, device=self.device)

    def features(self, backbone: nn.Module | None, images: Images, autocast: AbstractContextManager | None
                 ) -> torch.Tensor:
        if backbone is None:
            return pixel_features(images, self.num_workers)
        dataset = EvalImages(images, round(self.crop_size * 256 / 224), self.crop_size, self.mean, self.std)
        backbone.eval()
        with without_graphs(backbone):
            features = extract_features(backbone, dataset, self.batch_size, self.num_workers, self.device, autocast)
        backbone.train()
        return features

    def identity(self) -> str:
        """Hash of k, the labels, and some of the images: accuracies of another one can't be compared. Call on all
        processes."""
        content = hashlib.sha256(f"{K} {[sample(images) for images in self.parts]}".encode())
        for labels in self.labels:
            content.update(labels.numpy().tobytes())
        return content.hexdigest()[:12]

    def baselines(self, backbone: nn.Module | None, autocast: AbstractContextManager | None, name: str = "untrained"
                  ) -> dict[str, float]:
        """Top-1 of the network at the start and of raw pixels; a backbone that is not better has learned nothing.

        Raw pixels are skipped for more than MOST_PIXELS training images.

        Args:
            backbone: None: not known, as a run resumes with another --init_from than it began with.
            name: of the first figure: "untrained", or "start" for a network that starts from a file of weights.
        """
        figures, parts = {}, []
        if backbone is not None:
            figures[name] = self.knn(backbone, autocast)[0]
            what = "this network's features" if name == "untrained" else "the features of the weights it starts from"
            parts.append(f"{figures[name]:.1f} % on {what}")
        if len(self.parts[0]) <= MOST_PIXELS:
            figures["pixels"] = self.knn(None)[0]
            parts.append(f"{figures['pixels']:.1f} % on raw pixels")
        if backbone is None:
            parts.append("unknown for the weights that the run began with, as --init_from is not as it was then")
        parallel.say(f"20-NN before training: {', '.join(parts)}")
        return figures


def open_evaluation(
    path: str, flag: str, reading: Reading, crop_size: int, mean: Sequence[float], std: Sequence[float],
    batch_size: int, num_workers: int, device: torch.device,
) -> KnnEvaluation:
    """The k-NN evaluation on the data set at `path`, the value of `flag`.

    Raises:
        Refused: there is no train or val part, one of them has no labels, or they have no class in common.
    """
    try:
        parts = tuple(open_images(path, part, flag=flag, **reading.decoding()) for part in ("train", "val"))
        for images, part in zip(parts, ("train", "val"), strict=True):
            if images.labels is None:
                raise Refused(f"{flag} {path}: its {part} part has no labels")
        # Match classes by name: a part may lack some of them.
        train, val = match_classes(*(Part(torch.empty(0), images.labels, images.classes) for images in parts), flag)
    except Refused as error:
        raise Refused(f"{error}; evaluation during training needs train/ and val/ folders of class folders: name them "
                      "with --eval_data_path, or give --eval_knn_every 0 to train without it") from error
    return KnnEvaluation(parts, (train.labels, val.labels), len(train.classes), crop_size, mean, std, batch_size,
                         num_workers, device)
