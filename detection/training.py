"""Training of Grounding DINO on images with boxes, from its weights or from random ones.

The data and the prompt of a step are functions of (seed, step), so that a resumed run is the uninterrupted one.
Shapes: B images, N tokens of the image encoder, n boxes.
"""

from __future__ import annotations

import copy
import functools
import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import box_convert

import parallel
from detection import prompts
from detection.coco import Objects
from detection.networks import Detector
from imagesets.loaders import worker_options
from parallel import Refused, Stopped
from pretraining.faults import Requests
from pretraining.logs import Log
from utils import cosine_scheduler
from weights import checkpoints

WEIGHTS = {"ce": 2.0, "bbox": 5.0, "giou": 2.0}  # of the terms of the loss, appendix A of the paper
PROPOSALS = 900  # of the encoder, that its loss is computed on


class Recipe(NamedTuple):
    steps: int = 1000
    batch_size: int = 4
    lr: float = 1e-4
    backbone_lr: float = 0.1  # times lr, for the image and the text backbone
    weight_decay: float = 1e-4
    warmup_steps: int = 0
    clip_grad: float = 0.1  # largest norm of all gradients together
    phrases: int = 0  # in a prompt; 0: as many as it holds
    flip: float = 0.5  # probability
    seed: int = 0
    num_workers: int = 2


@functools.lru_cache(2)
def order_of(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


class Steps(Dataset):
    """Item s is all that step s needs: the processor's tensors, the prompt's ids, and the labels of each image."""

    def __init__(self, objects: Objects, detector: Detector, recipe: Recipe) -> None:
        self.objects, self.processor, self.recipe = objects, detector.processor, recipe
        self.limit = detector.network.config.max_text_len
        self.lengths = prompts.lengths(objects.phrases, detector.processor.tokenizer, self.limit, "--train")

    def __len__(self) -> int:
        return self.recipe.steps

    def numbers(self, step: int) -> list[int]:
        """Images of a step. The set is gone through again and again, in another order each time."""
        size, n = self.recipe.batch_size, len(self.objects)
        return [int(order_of(self.recipe.seed, i // n, n)[i % n]) for i in range(step * size, (step + 1) * size)]

    def __getitem__(self, step: int) -> dict:
        rng = np.random.default_rng((self.recipe.seed, 1, step))
        numbers, images, labels = self.numbers(step), [], []
        present = {row["category_id"] for i in numbers for row in self.objects.rows[i] if not row["iscrowd"]}
        chosen = choose(present, self.lengths, self.limit, self.recipe.phrases, rng)
        for i in numbers:
            image, flip = self.objects.load(i), rng.random() < self.recipe.flip
            images.append(image.flip(-1) if flip else image)
            labels.append(as_labels(self.objects.rows[i], chosen, image.shape[1:], flip))
        pixels = self.processor.image_processor(images=images, return_tensors="pt")
        prompt = prompts.encode(self.objects.phrases, chosen, self.processor.tokenizer)
        return {**pixels, "ids": prompt.ids, "labels": labels}


def choose(present: set[int], lengths: Mapping[int, int], limit: int, most: int, rng: np.random.Generator) -> list[int]:
    """Categories in random order: those present in the images, then others drawn at random, while their phrases fit
    into a prompt of `limit` tokens, and are not more than `most` (0: no limit) or than are present."""
    chosen, left, ids = [], limit - 2, list(lengths)
    for k in sorted((ids[i] for i in rng.permutation(len(ids))), key=lambda k: k not in present):  # a stable sort
        if lengths[k] <= left and (k in present or not most or len(chosen) < most):
            chosen.append(k)
            left -= lengths[k]
    return [chosen[i] for i in rng.permutation(len(chosen))]


def as_labels(rows: Sequence[Mapping], chosen: Sequence[int], size: Sequence[int], flip: bool) -> dict[str, Tensor]:
    """Annotations as transformers' loss takes them: class_labels (n,), positions in the prompt, and boxes (n, 4),
    centre and size as fractions of the image. Crowds are left out, and categories that are not in the prompt.

    Not by the library's image processor: its boxes are fractions of the padded image, the network's are of the image.
    """
    rows = [row for row in rows if row["category_id"] in chosen and not row["iscrowd"]]
    boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float32).reshape(-1, 4)
    boxes = (box_convert(boxes, "xywh", "xyxy") / torch.tensor([*size[::-1], *size[::-1]])).clamp(0, 1)
    if flip:
        boxes = torch.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], 1)
    classes = torch.tensor([chosen.index(row["category_id"]) for row in rows], dtype=torch.int64)
    return {"class_labels": classes, "boxes": box_convert(boxes, "xyxy", "cxcywh")}


def losses(detector: Detector, batch: Mapping) -> tuple[Tensor, dict[str, Tensor]]:
    """The paper's loss: focal loss of the tokens, L1 and GIoU of the boxes, each query matched to one object or none,
    summed over the layers of the decoder and the encoder's proposals. Returns the sum, and its terms for the last layer
    of the decoder and for the encoder.

    The library's own encoder term is replaced: it is computed from queries that don't depend on the image and from
    boxes without gradient, so the selection of queries and their first boxes would not be trained. And all images of a
    step have the same prompt, because the library's targets are right for that case only: it takes the phrases of every
    image but the first from the second image's prompt.
    """
    network, device = detector.network, detector.network.device
    labels = [{k: v.to(device) for k, v in label.items()} for label in batch["labels"]]
    ids = batch["ids"].to(device).expand(len(labels), -1)
    mask = torch.ones_like(ids)
    network.config.auxiliary_loss = True  # after each layer of the decoder
    out = network(batch["pixel_values"].to(device), ids, attention_mask=mask,
                  pixel_mask=batch["pixel_mask"].to(device), labels=labels)
    terms = {name.removeprefix("loss_"): value for name, value in out.loss_dict.items()
             if name.startswith("loss_") and "_enc" not in name}
    terms |= {f"{name}_encoder": value for name, value in encoder_terms(network, out, ids, mask, labels).items()}
    total = sum(WEIGHTS[name.split("_")[0]] * value for name, value in terms.items())
    shown = {name: value.detach() for name, value in terms.items() if not name[-1].isdigit()}
    return total, {"loss": total.detach(), **shown}


def encoder_terms(network, out, ids: Tensor, mask: Tensor, labels: list[dict]) -> dict[str, Tensor]:
    """Terms of the encoder's proposals, the PROPOSALS most probable ones."""
    module = importlib.import_module(type(network).__module__)
    logits, boxes = out.enc_outputs_class, out.enc_outputs_coord_logits.sigmoid()  # (B, N, limit), (B, N, 4)
    top = logits.amax(-1).topk(min(PROPOSALS, logits.shape[1]), 1).indices[..., None]
    logits, boxes = (x.gather(1, top.expand(-1, -1, x.shape[-1])) for x in (logits, boxes))
    config = copy.copy(network.config)
    config.two_stage = config.auxiliary_loss = False
    _, terms, _ = network.loss_function(logits, labels, logits.device, boxes, config,
                                        module.build_label_maps(logits, ids), module.build_text_mask(logits, mask))
    return {name: terms[f"loss_{name}"] for name in WEIGHTS}


def make_optimizer(detector: Detector, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW in two groups; `share` is what the learning rate is multiplied by."""
    groups = ([], [])
    for name, parameter in detector.network.named_parameters():
        groups[name.startswith(("model.backbone.", "model.text_backbone."))].append(parameter)
    return torch.optim.AdamW([{"params": groups[1], "share": recipe.backbone_lr}, {"params": groups[0], "share": 1.0}],
                             lr=0, weight_decay=recipe.weight_decay)


def find_checkpoint(folder: Path, settings: Mapping) -> tuple[dict, Path] | None:
    """The checkpoint to resume from and its path; None if there is none. Raises Refused if it belongs to a run with
    other `settings`, flags by name, or none is readable."""
    if latest := checkpoints.read_latest(folder):
        old = latest[0]["args"] if "network" in latest[0] else {}
        if changed := [f"{k} {old.get(k)} -> {v}" for k, v in settings.items() if old.get(k) != v]:
            raise Refused(f"--output_dir {folder}: {latest[1].name} belongs to a run with different flags "
                          f"({', '.join(changed)}); choose another folder, or the same flags to resume")
    return latest


def add_gradients(detector: Detector, batch: Mapping, clip_grad: float, step: int) -> dict[str, Tensor]:
    """The gradients of a step, clipped. Returns the terms of the loss. Raises Stopped if they are not finite."""
    try:
        loss, terms = losses(detector, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(detector.network.parameters(), clip_grad or math.inf)
        finite = bool(norm.isfinite() and terms["loss"].isfinite())
    except ValueError as error:
        if "nan" not in str(error):
            raise
        finite = False  # the library's loss does not accept such boxes
    if not finite:
        raise Stopped(f"the loss or its gradients are not finite at step {step}; start again with a lower --lr in "
                      "another --output_dir")
    return terms


def train(detector: Detector, objects: Objects, recipe: Recipe, folder: Path, settings: Mapping,
          latest: tuple[dict, Path] | None, requests: Requests, log_every: int) -> None:
    """Train from the checkpoint `latest`, or from the start. On a signal save and `requests.leave`."""
    optimizer, first = make_optimizer(detector, recipe), 0
    if latest:
        state, path = latest
        detector.network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
        parallel.say(f"resuming from {path} at step {first} of {recipe.steps}")
    schedule = cosine_scheduler(recipe.lr, 0.01 * recipe.lr, recipe.steps, 1, recipe.warmup_steps)
    batches = DataLoader(Steps(objects, detector, recipe), None, sampler=range(first, recipe.steps),
                         **worker_options(recipe.num_workers))
    log, window = Log(folder, first, recipe.steps), []
    detector.network.train()
    try:
        for step, batch in enumerate(batches, first):
            torch.manual_seed(recipe.seed * 1_000_003 + step)  # dropout; here, so that a resumed run is the same
            for group in optimizer.param_groups:
                group["lr"] = group["share"] * float(schedule[step])
            window.append(add_gradients(detector, batch, recipe.clip_grad, step))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % log_every == 0 or step + 1 == recipe.steps:
                means = {k: round(float(sum(terms[k] for terms in window)) / len(window), 4) for k in window[0]}
                log.step(f"step {step + 1}/{recipe.steps}  " + "  ".join(f"{k} {v:.3f}" for k, v in means.items()),
                         {"step": step, **means, "lr": float(schedule[step])})
                window = []
            stop, due = requests.agreed(step + 1)
            if stop or due or step + 1 == recipe.steps:
                checkpoints.save({"network": detector.network.state_dict(), "optimizer": optimizer.state_dict(),
                                  "step": step + 1, "args": dict(settings)}, folder / checkpoints.NAME)
            if stop:
                requests.leave()
    finally:
        log.close()
        detector.network.eval()
