"""Training of Grounding DINO on images with boxes, from its weights or from random ones.

The data and the prompt of a step are functions of (seed, step), so that a resumed run is the uninterrupted one.

Shapes: B images, N tokens of the image encoder, Q queries, T tokens of the prompt, n boxes.
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import parallel
from detection import inference, prompts
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
FREE = {"output_dir", "device", "num_workers", "save_minutes", "log_every", "eval", "eval_images", "held_back", "text",
        "threshold", "text_threshold", "no_pictures"}  # flags that may change when a run resumes


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


# ---- Data ----


class Steps(Dataset):
    """Item s is all that step s needs: the processor's tensors, the prompt's ids, and the labels of each image."""

    def __init__(self, objects: Objects, detector: Detector, recipe: Recipe) -> None:
        self.objects, self.processor, self.limit, self.recipe = objects, detector.processor, detector.limit, recipe
        self.lengths = prompts.lengths(objects.phrases, detector.processor.tokenizer)
        prompts.parts(self.lengths, self.limit, "--train")  # every phrase fits into a prompt

    def __len__(self) -> int:
        return self.recipe.steps

    def rows(self, step: int) -> list[int]:
        """Images of a step. The set is gone through again and again, in another order each time."""
        numbers = range(step * self.recipe.batch_size, (step + 1) * self.recipe.batch_size)
        orders = {epoch: np.random.default_rng((self.recipe.seed, epoch)).permutation(len(self.objects))
                  for epoch in {i // len(self.objects) for i in numbers}}
        return [int(orders[i // len(self.objects)][i % len(self.objects)]) for i in numbers]

    def __getitem__(self, step: int) -> dict:
        rng = np.random.default_rng((self.recipe.seed, 1, step))
        rows = self.rows(step)
        truths = [self.objects.truth(i) for i in rows]
        present = {int(k) for truth in truths for k in truth.classes[~truth.crowd]}
        chosen = choose(present, self.lengths, self.limit, self.recipe.phrases, rng)
        prompt = prompts.encode([self.objects.phrases[k] for k in chosen], self.processor.tokenizer, "--train")
        images, labels = [], []
        for i, truth in zip(rows, truths, strict=True):
            image, flip = self.objects.load(i), rng.random() < self.recipe.flip
            images.append(image.flip(-1) if flip else image)
            labels.append(as_labels(truth, self.objects.size(i), chosen, flip))
        pixels = self.processor.image_processor(images=images, return_tensors="pt")
        return {**pixels, "ids": prompt.ids, "labels": labels}


def choose(present: set[int], lengths: list[int], limit: int, most: int, rng: np.random.Generator) -> list[int]:
    """Phrases of a prompt in random order: those present in the images, then others drawn at random, while they fit.

    Args:
        present: indices of phrases.
        lengths: tokens of each phrase.
        limit: tokens of a prompt, with [CLS] and [SEP].
        most: phrases of a prompt, more if more are present; 0: no limit.
    """
    order = rng.permutation(len(lengths)).tolist()
    chosen, left = [], limit - 2
    for k in sorted(order, key=lambda k: k not in present):  # a stable sort
        if lengths[k] <= left and (k in present or not most or len(chosen) < most):
            chosen.append(k)
            left -= lengths[k]
    return [chosen[i] for i in rng.permutation(len(chosen))]


def as_labels(truth, size: tuple[int, int], chosen: list[int], flip: bool) -> dict[str, Tensor]:
    """What transformers' loss takes: class_labels (n,), positions in the prompt, and boxes (n, 4), centre and size as
    fractions of the image. Objects whose phrase is not in the prompt are left out, as it doesn't ask for them."""
    height, width = size
    boxes = truth.boxes / torch.tensor([width, height, width, height])
    if flip:
        boxes = torch.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], 1)
    position = {k: i for i, k in enumerate(chosen)}
    kept = [i for i, k in enumerate(truth.classes.tolist()) if k in position and not truth.crowd[i]]
    classes = torch.tensor([position[int(k)] for k in truth.classes[kept]], dtype=torch.int64)
    return {"class_labels": classes, "boxes": inference.centres(boxes[kept])}


# ---- Loss ----


def losses(detector: Detector, batch: Mapping) -> tuple[Tensor, dict[str, Tensor]]:
    """The paper's loss: focal loss of the tokens, L1 and GIoU of the boxes, each query matched to one object or none,
    summed over the layers of the decoder and the encoder's proposals.

    The library's own encoder term is replaced: it is computed from queries that don't depend on the image and from
    boxes without gradient, so the selection of queries and their first boxes would not be trained. And all images of a
    step have the same prompt, because the library's targets are right for that case only: it takes the phrases of every
    image but the first from the second image's prompt.

    Returns:
        The sum, and its terms for the last layer of the decoder and for the encoder.
    """
    network, device = detector.network, detector.device
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


# ---- The run ----


def make_optimizer(detector: Detector, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW in two groups; `share` is what the learning rate is multiplied by."""
    groups = {"backbones": [], "others": []}
    for name, parameter in detector.network.named_parameters():
        if parameter.requires_grad:
            inside = name.startswith(("model.backbone.", "model.text_backbone."))
            groups["backbones" if inside else "others"].append(parameter)
    return torch.optim.AdamW([{"params": groups["backbones"], "share": recipe.backbone_lr},
                              {"params": groups["others"], "share": 1.0}], lr=0, weight_decay=recipe.weight_decay)


def find_checkpoint(folder: Path, settings: Mapping) -> tuple[dict, Path] | None:
    """The checkpoint to resume from and its path; None if there is none.

    Raises:
        Refused: it belongs to a run with other flags, or none is readable.
    """
    latest = checkpoints.read_latest(folder)
    if latest:
        state, path = latest
        if not state.keys() >= {"network", "optimizer", "step", "args"}:
            raise Refused(f"--output_dir {folder}: {path.name} is not of detect.py; choose another folder")
        changed = [f"{k} {state['args'].get(k)} -> {v}" for k, v in settings.items()
                   if k not in FREE and state["args"].get(k) != v]
        if changed:
            raise Refused(f"--output_dir {folder}: {path.name} belongs to a run with different flags "
                          f"({', '.join(changed)}); choose another folder, or the same flags to resume")
    return latest


def add_gradients(detector: Detector, batch: Mapping, clip_grad: float, step: int) -> dict[str, Tensor]:
    """The gradients of a step, clipped. Returns the terms of the loss.

    Raises:
        Stopped: loss or gradients are not finite; the weights are those before the step.
    """
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


def train(
    detector: Detector, objects: Objects, recipe: Recipe, folder: Path, settings: Mapping,
    latest: tuple[dict, Path] | None, save_minutes: float, log_every: int,
) -> bool:
    """Train from the checkpoint `latest`, or from the start. Returns False when a signal ended the run early.

    Args:
        settings: the flags as plain values, kept in the checkpoint.

    Raises:
        Stopped: the loss is no longer finite.
    """
    optimizer, first = make_optimizer(detector, recipe), 0
    if latest:
        state, path = latest
        detector.network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
        parallel.say(f"resuming from {path} at step {first} of {recipe.steps}")
    schedule = cosine_scheduler(recipe.lr, 0.01 * recipe.lr, recipe.steps, 1, recipe.warmup_steps)
    data = Steps(objects, detector, recipe)
    batches = DataLoader(data, None, sampler=range(first, recipe.steps), **worker_options(recipe.num_workers))
    requests, log, window = Requests(detector.device, save_minutes), Log(folder, first, recipe.steps), []
    detector.network.train()

    def save(step: int) -> None:
        checkpoints.save({"network": detector.network.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                          "args": dict(settings)}, folder / checkpoints.NAME)

    try:
        for step, batch in enumerate(batches, first):
            torch.manual_seed(recipe.seed * 1_000_003 + step)  # dropout; here, so that a resumed run is the same
            for group in optimizer.param_groups:
                group["lr"] = group["share"] * float(schedule[step])
            terms = add_gradients(detector, batch, recipe.clip_grad, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            window.append(terms)
            if (step + 1) % log_every == 0 or step + 1 == recipe.steps:
                means = {name: round(float(sum(t[name] for t in window)) / len(window), 4) for name in terms}
                log.step(f"step {step + 1}/{recipe.steps}  "
                         + "  ".join(f"{name} {value:.3f}" for name, value in means.items()),
                         {"step": step, **means, "lr": float(schedule[step])})
                window = []
            stop, due = requests.agreed(step + 1)
            if stop or due or step + 1 == recipe.steps:
                save(step + 1)
            if stop and step + 1 < recipe.steps:
                return False
        return True
    finally:
        log.close()
        detector.network.eval()
