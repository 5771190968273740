"""DINO (arXiv 2104.14294), in the paper's order: crops, networks, loss, schedules, teacher, optimizer.

Shapes: B images, G = 2 global and L local crops, V = G + L views, K prototypes, C channels.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.init import trunc_normal_  # noqa: F401 - part of the published utils.py, as LARS and the two below

from method import fused, photometric
from method.noise import with_noise
from method.optimizers import LARS, SGD  # noqa: F401
from method.pairs import class_loss
from method.photometric import IMAGENET_MEAN, IMAGENET_STD
from method.pillow import GaussianBlur, Solarization  # noqa: F401
from method.targets import at_least_float32

# ---- Multi-crop augmentation (section 3.1; appendix "Data augmentations", after BYOL and SwAV) ----


class DataAugmentationDINO:
    """Two global and L local crops per image, in two stages.

    1. `cut` runs in a data-loading worker. It draws all random parameters of the views, then crops, resizes (bicubic,
       antialiased) and flips, in uint8.
    2. `finish` runs on the device, on a batch: colour jitter 0.4/0.4/0.2/0.1 with probability 0.8, grey 0.2, blur
       (1.0 and 0.1 for the global crops, 0.5 for the local ones), solarize 0.2 (second global crop), normalization.

    Calling the object on a PIL image runs both stages and returns the list of 2 + L normalized crops.

    For images without three channels, saturation, hue and grey are skipped.

    Args:
        global_crops_scale, local_crops_scale: range of a crop's area, as a fraction of the image's area.
        global_crops_size, local_crops_size: side of the crops in pixels.
        mean, std: one value per channel, for intensities in [0, 1].
        compiled: run `finish` through torch.compile, with fewer passes over memory (three channels only).
        blur: probability for the first and second global crop, and for a local crop.
        blur_sigma: range of its standard deviation in pixels.
        noise: probability of a square of Gaussian noise in a crop (`method.noise`).
    """

    BLUR = (1.0, 0.1)  # probability for the first and second global crop
    LOCAL_BLUR = 0.5
    SIGMA = (0.1, 2.0)  # pixels
    SOLARIZE = (0.0, 0.2)
    JITTER = {photometric.BRIGHTNESS: (0.6, 1.4), photometric.CONTRAST: (0.6, 1.4),
              photometric.SATURATION: (0.8, 1.2), photometric.HUE: (-0.1, 0.1)}

    def __init__(
        self,
        global_crops_scale: Sequence[float],
        local_crops_scale: Sequence[float],
        local_crops_number: int,
        global_crops_size: int = 224,
        local_crops_size: int = 96,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        compiled: bool = False,
        blur: Sequence[float] = (*BLUR, LOCAL_BLUR),
        blur_sigma: tuple[float, float] = SIGMA,
        noise: float = 0.0,
    ) -> None:
        self.scales = [tuple(global_crops_scale)] * 2 + [tuple(local_crops_scale)] * local_crops_number
        self.sizes = [global_crops_size] * 2 + [local_crops_size] * local_crops_number
        self.blur = [*blur[:2], *blur[2:] * local_crops_number]
        self.blur_sigma, self.noise = tuple(blur_sigma), noise
        self.solarize = list(self.SOLARIZE) + [0.0] * local_crops_number
        self.mean, self.std, self.compiled = tuple(mean), tuple(std), compiled

    def reduction(self, height: int, width: int) -> int:
        """Factor (1, 2, 4 or 8) by which an image may be downscaled while decoding, such that no crop is upscaled.

        A crop's shorter side is at least min(sqrt(3/4 of its area), the image's) (random_resized_crop_box).
        """
        spare = min(min(math.sqrt(scale[0] * height * width * 3 / 4), height, width) / size
                    for scale, size in zip(self.scales, self.sizes, strict=True))
        return next((r for r in (8, 4, 2) if r <= spare), 1)

    def cut(self, image: Tensor, rng: np.random.Generator) -> tuple[list[Tensor], Tensor]:
        """uint8 image (C, height, width) -> 2 + L uint8 crops (C, size, size), and their parameters (2 + L, 8).

        The columns of the parameters are those of `photometric`. `rng` is the only source of randomness. The crops are
        channels-last in memory, (size, size, C), which is the layout that torch's uint8 resize works in.
        """
        crops, params = [], []
        for size, (top, left, height, width), flipped, row in self.draw(*image.shape[-2:], rng):
            crop = image[None, :, top : top + height, left : left + width]
            crop = crop.contiguous(memory_format=torch.channels_last)
            crop = F.interpolate(crop, size=(size, size), mode="bicubic", antialias=True)[0]
            crop = crop.flip(-1) if flipped else crop
            crops.append(with_noise(crop, rng) if self.noise and rng.random() < self.noise else crop)
            params.append(row)
        return crops, torch.from_numpy(np.stack(params))

    def places(self, index: int, height: int, width: int, rng: np.random.Generator) -> tuple[Sequence[Tensor], Tensor]:
        """What `cut` does to an image of this size, for cutting on the device, and the same parameters.

        The first are 2 + L int64 rows (7,): `index` of the image, size of the crop, box (top, left, height, width), and
        whether it is flipped.
        """
        draws = list(self.draw(height, width, rng))
        rows = np.array([(index, size, *box, flipped) for size, box, flipped, _ in draws])
        return torch.from_numpy(rows).unbind(), torch.from_numpy(np.stack([row for *_, row in draws]))

    def draw(
        self, height: int, width: int, rng: np.random.Generator
    ) -> Iterator[tuple[int, tuple[int, int, int, int], bool, np.ndarray]]:
        """Yields (size, box, flipped, photometric parameters) of each view; draws a view when it is asked for."""
        for v, (scale, size) in enumerate(zip(self.scales, self.sizes, strict=True)):
            box = random_resized_crop_box(height, width, scale, rng)
            yield size, box, rng.random() < 0.5, self.draw_photometric(v, rng)

    def resized(self, global_crops_size: int, local_crops_size: int) -> DataAugmentationDINO:
        """The same views at another resolution: blur in proportion, and no noise."""
        other = copy.copy(self)
        other.sizes = [global_crops_size] * 2 + [local_crops_size] * (len(self.sizes) - 2)
        other.blur_sigma = tuple(sigma * global_crops_size / self.sizes[0] for sigma in self.blur_sigma)
        other.noise = 0.0
        return other

    def draw_photometric(self, view: int, rng: np.random.Generator) -> np.ndarray:
        """Random photometric parameters (8,) of one view, in the columns of `photometric`."""
        row = np.zeros(len(photometric.COLUMNS), np.float32)
        row[[photometric.BRIGHTNESS, photometric.CONTRAST, photometric.SATURATION]] = 1.0
        row[photometric.ORDER] = -1
        if rng.random() < 0.8:
            for column, (low, high) in self.JITTER.items():
                row[column] = uniform(rng, low, high)
            row[photometric.ORDER] = rng.integers(24)
        row[photometric.GREY] = rng.random() < 0.2
        row[photometric.SIGMA] = uniform(rng, *self.blur_sigma) if rng.random() < self.blur[view] else 0.0
        row[photometric.SOLARIZE] = rng.random() < self.solarize[view]
        return row

    def finish(self, crops: Sequence[Tensor], params: Tensor) -> list[Tensor]:
        """uint8 crops [(2B, C, g, g), (LB, C, l, l)], crop-major, on any device -> float32, normalized, same shapes.

        `params` ((2 + L) B, 8) stays on the CPU, which avoids a synchronization with the device.
        """
        rows = params.split([len(c) for c in crops])
        method = fused if self.compiled and len(self.mean) == 3 else photometric
        return [method.photometric(c, p, self.mean, self.std) for c, p in zip(crops, rows, strict=True)]

    def __call__(self, image, rng: np.random.Generator | None = None) -> list[Tensor]:
        """PIL image -> 2 + L normalized float32 crops (C, size, size); by default torch's generator seeds `rng`."""
        from torchvision.transforms.functional import pil_to_tensor  # takes long to import; training does without it

        rng = rng or np.random.default_rng(torch.randint(2**62, ()).item())
        crops, params = self.cut(pil_to_tensor(image.convert("L" if len(self.mean) == 1 else "RGB")), rng)
        return [self.finish([c[None]], p[None])[0][0] for c, p in zip(crops, params, strict=True)]


def uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """Equal to rng.uniform(low, high), three times as fast; an image needs about sixty calls."""
    return low + (high - low) * rng.random()


def random_resized_crop_box(
    height: int, width: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Random box (top, left, height, width) with an area fraction in `scale` and an aspect ratio in [3/4, 4/3].

    After ten boxes that do not fit, the largest centred box with a permitted ratio (Szegedy et al. 2015).
    """
    for _ in range(10):
        area = height * width * uniform(rng, *scale)
        ratio = math.exp(uniform(rng, math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w = min(width, max(1, round(height * 4 / 3)))
    h = min(height, max(1, round(width * 4 / 3)))
    return (height - h) // 2, (width - w) // 2, h, w


# ---- Networks: one pass per resolution (section 3.1, "multi-crop") ----


class MultiCropWrapper(nn.Module):
    """Applies a backbone and a head to a list of crops: one backbone pass per resolution, one head pass.

    forward: a list of (n_i, C, h_i, w_i), or one such tensor -> (sum n_i, K), rows in input order.

    The last block of a Vision Transformer computes only the class token, which is all that the head reads.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        # Remove the classifier of a published backbone: the head takes features, not logits.
        for name in ("fc", "head"):
            if isinstance(getattr(backbone, name, None), nn.Linear):
                setattr(backbone, name, nn.Identity())
        # Convolutions are faster in this memory format; Vision Transformers, which know the option, keep theirs.
        self.channels_last = "class_token_only" not in inspect.signature(backbone.forward).parameters
        self.backbone = backbone
        self.head = head

    def features(self, crops: Tensor | Sequence[Tensor], kept: Tensor | None = None) -> Tensor:
        """list of (n_i, C, h_i, w_i) -> backbone features (sum n_i, D), rows in input order."""
        features = self.outputs(crops) if self.channels_last else self.outputs(crops, kept, class_token_only=True)
        return torch.cat(features) if len(features) > 1 else features[0]

    def outputs(self, crops: Tensor | Sequence[Tensor], kept: Tensor | None = None, **options: bool) -> list[Tensor]:
        """[backbone(crop, **options) for crop in crops], computed in one pass per resolution.

        Args:
            kept: (n_0, n) indices of the patches of the first item that a Vision Transformer keeps; None: all.
        """
        crops = [crops] if isinstance(crops, Tensor) else list(crops)
        groups: dict[tuple, list[int]] = {}
        for i, crop in enumerate(crops):
            groups.setdefault((*crop.shape[-2:], kept is not None and i == 0), []).append(i)
        outputs: list[Tensor] = [crops[0]] * len(crops)
        for (*_, dropping), members in groups.items():
            batch = torch.cat([crops[i] for i in members]) if len(members) > 1 else crops[members[0]]
            if self.channels_last:
                batch = batch.contiguous(memory_format=torch.channels_last)
            out = self.backbone(batch, **options, **{"kept": kept} if dropping else {})
            out = out[0] if isinstance(out, tuple) else out  # published XCiT returns several outputs
            for i, rows in zip(members, out.split([len(crops[i]) for i in members]), strict=True):
                outputs[i] = rows
        return outputs

    def forward(self, crops: Tensor | Sequence[Tensor], kept: Tensor | None = None) -> Tensor:
        return self.head(self.features(crops, kept))


# ---- Loss and centre (section 3.1, equations 1 to 4; algorithm 1) ----


def losses(
    student: nn.Module, teacher: MultiCropWrapper, crops: Sequence[Tensor], dino_loss: DINOLoss, epoch: int,
    kept: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The DINO loss of a micro-batch (algorithm 1). Changes neither the networks nor the centre.

    Args:
        student: a MultiCropWrapper, or its DistributedDataParallel.
        crops: [(2B, C, g, g), (LB, C, l, l)], normalized and crop-major.
        kept: (2B, n) indices of the patches of the global crops that the student sees; None: all.

    Returns:
        The loss to differentiate, and a dict of detached parts: scalars to log, the teacher's backbone features
        `teacher_features` (2B, D), its head output `teacher_output` (2B, K) and its mean `teacher_mean` (1, K).
    """
    with torch.no_grad():
        # Cloned: a CUDA graph (--compile reduce-overhead) overwrites its outputs when the next graph starts.
        teacher_features = teacher.features(crops[:1]).clone()  # (2B, D), global views only
        teacher_output = teacher.head(teacher_features).clone()  # (2B, K)
    dropping = () if kept is None else (kept.to(crops[0].device, non_blocking=True),)
    student_output = student(crops, *dropping)
    loss = dino_loss.compare(student_output, dino_loss.targets(teacher_output, epoch))
    return loss, {"loss": loss.detach(), "teacher_features": teacher_features, "teacher_output": teacher_output,
                  "teacher_mean": at_least_float32(teacher_output).mean(0, keepdim=True)}


class DINOLoss(nn.Module):
    """Cross-entropy between the teacher's centred and sharpened output and the student's, over pairs of views.

        loss = mean over images and pairs (i, v), v != i, of  - sum_k q_i[k] log p_v[k]
        p_v = softmax(student_v / student_temp),  q_i = softmax((teacher_i - center) / teacher_temp(epoch))
        center <- m center + (1 - m) mean(teacher)            (over all images of all processes)

    i runs over the two global views, v over all `ncrops` views. Computed in float32, or in float64 for float64 inputs.
    """

    def __init__(
        self,
        out_dim: int,
        ncrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.ncrops = ncrops
        self.register_buffer("center", torch.zeros(1, out_dim))
        # A high temperature makes the first epochs unstable, hence the linear warm-up.
        warmup = np.linspace(warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs)
        constant = np.full(max(nepochs - warmup_teacher_temp_epochs, 0), teacher_temp)
        self.teacher_temp_schedule = np.concatenate((warmup, constant))

    def targets(self, teacher_output: Tensor, epoch: int) -> Tensor:
        """The probabilities q (..., K) of the teacher's output (..., K), with the temperature of the epoch."""
        centred = at_least_float32(teacher_output.detach()) - self.center
        return F.softmax(centred / float(self.teacher_temp_schedule[epoch]), dim=-1)

    def compare(self, student_output: Tensor, targets: Tensor) -> Tensor:
        """The loss of the student's output (V B, K) for the probabilities `targets` (2 B, K)."""
        return cross_entropy(student_output, targets, self.student_temp)

    def forward(
        self, student_output: Tensor, teacher_output: Tensor, epoch: int, update_center: bool = True
    ) -> Tensor:
        """Returns the scalar loss of a batch, then updates the centre.

        Args:
            student_output: (V B, K), crop-major: the first view of all images, then the second view of all images, ...
            teacher_output: (2 B, K), the global views only, in the same order.
            update_center: False leaves the update to the caller (gradient accumulation).
        """
        loss = self.compare(student_output, self.targets(teacher_output, epoch))
        if update_center:
            self.update_center(teacher_output)
        return loss

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor) -> None:
        """center <- m center + (1 - m) mean over the rows of all processes (equation 4)."""
        mean = at_least_float32(teacher_output).mean(dim=0, keepdim=True)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(mean)
            mean = mean / dist.get_world_size()
        self.center = self.center * self.center_momentum + mean * (1 - self.center_momentum)


def cross_entropy(student_output: Tensor, targets: Tensor, temp: float) -> Tensor:
    """Mean over images and pairs of views (i, v), v != i, of  - sum_k q_i[k] log softmax(student_v / temp)[k].

    Args:
        student_output: (V B, K) logits, crop-major, the two global views first.
        targets: (2 B, K) probabilities q of the global views, in the same order.
    """
    return class_loss(student_output, targets, temp)[0]


# ---- Schedules (section 3.2, "Implementation details") ----


def cosine_scheduler(
    base_value: float,
    final_value: float,
    epochs: float,
    niter_per_ep: int,
    warmup_epochs: float = 0,
    start_warmup_value: float = 0,
    freeze_epochs: float = 0,
) -> np.ndarray:
    """Values (epochs * niter_per_ep,), one per step: zeros while frozen, linear warm-up to `base_value`, half cosine to
    `final_value`. With final_value = base_value, it is constant after the warm-up (DINOv2's teacher temperature).

    The epochs may be fractional: a run of `steps` steps has steps / niter_per_ep epochs.
    """
    n_steps, n_warmup, n_frozen = (round(n * niter_per_ep) for n in (epochs, warmup_epochs, freeze_epochs))
    if n_frozen + n_warmup > n_steps:
        raise ValueError(f"warm-up of {freeze_epochs + warmup_epochs:g} epochs is longer than the run of {epochs:g}")
    warmup = np.linspace(start_warmup_value, base_value, n_warmup)
    n = n_steps - n_frozen - n_warmup
    cosine = final_value + 0.5 * (base_value - final_value) * (1 + np.cos(np.pi * np.arange(n) / max(n, 1)))
    return np.concatenate((np.zeros(n_frozen), warmup, cosine))


# ---- Teacher (section 3.1, "Teacher network") ----


@torch.no_grad()
def ema_update(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, for parameters and floating-point buffers.

    Buffers include the statistics of batch norm. Integer buffers are copied.
    """
    targets, sources = [], []
    for t, s in zip((*teacher.parameters(), *teacher.buffers()), (*student.parameters(), *student.buffers()),
                    strict=True):
        t, s = local_part(t), local_part(s)
        if t.is_floating_point():
            targets.append(t)
            sources.append(s)
        else:
            t.copy_(s)
    if targets:
        torch._foreach_mul_(targets, momentum)
        torch._foreach_add_(targets, sources, alpha=1 - momentum)


# ---- Optimization (section 3.2; appendix) ----


def get_params_groups(model: nn.Module) -> list[dict]:
    """Two groups of trainable parameters: weight matrices; biases and norm parameters, without weight decay."""
    regularized, not_regularized = [], []
    for name, param in model.named_parameters():
        if param.requires_grad:
            undecayed = name.endswith(".bias") or param.ndim == 1
            (not_regularized if undecayed else regularized).append(param)
    return [{"params": regularized}, {"params": not_regularized, "weight_decay": 0.0}]


def set_lr_and_wd(optimizer: torch.optim.Optimizer, lr: float, wd: float) -> None:
    """Set the learning rate of all groups, and the weight decay of the first group of `get_params_groups`."""
    for i, group in enumerate(optimizer.param_groups):
        group["lr"] = lr
        if i == 0:
            group["weight_decay"] = wd


def build_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer `adamw`, `sgd` or `lars`; the loop sets learning rate and weight decay at every step."""
    groups = get_params_groups(model)
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    return {"sgd": SGD, "lars": LARS}[name](groups)


@torch.no_grad()
def clip_gradients(model: nn.Module, clip: float, per_tensor: bool = True) -> list[Tensor]:
    """Clip the L2 norm of each parameter's gradient to `clip`, as DINO does, or with per_tensor=False the total norm.

    Returns:
        The norms before clipping, a scalar on the device for each gradient (no synchronization). clip = 0 only
        measures.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if not grads:
        return []
    parts = [local_part(g) for g in grads]
    norms = torch.stack(torch._foreach_norm(parts))
    if any(part is not g for part, g in zip(parts, grads, strict=True)):  # sharded over the processes
        norms = norms.square()
        dist.all_reduce(norms)
        norms = norms.sqrt()
    if clip > 0:
        reference = norms if per_tensor else torch.linalg.vector_norm(norms).expand_as(norms)
        factors = (clip / (reference + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(parts, list(factors.unbind()))
    return list(norms.unbind())


def local_part(x: Tensor) -> Tensor:
    """This process's shard of a DTensor, sharing its memory; other tensors are returned as they are."""
    return x.to_local() if hasattr(x, "to_local") else x


def cancel_gradients_last_layer(epoch: int, model: nn.Module, freeze_last_layer: int) -> None:
    """Remove the gradients of the last layer (the prototypes) during the first `freeze_last_layer` epochs."""
    if epoch < freeze_last_layer:
        for name, param in model.named_parameters():
            if "last_layer" in name:
                param.grad = None


# ---- Names of the published utils.py that stand on rooms below this file ----

ELSEWHERE = {
    "bool_flag": "flags.boolean", "get_rank": "parallel.rank", "get_world_size": "parallel.world_size",
    "is_main_process": "parallel.is_main",
    **{name: f"pretraining.published.{name}" for name in (
        "fix_random_seeds", "has_batchnorms", "init_distributed_mode", "restart_from_checkpoint", "MetricLogger",
        "SmoothedValue")},
    **{name: f"protocols.published.{name}" for name in (
        "load_pretrained_weights", "PCA", "compute_map", "multi_scale")},
}


def __getattr__(name: str) -> object:
    """Imports a name of ELSEWHERE when code written for the published utils.py asks for it; this project never does."""
    if name not in ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = ELSEWHERE[name].rpartition(".")
    return getattr(importlib.import_module(module), attribute)
