"""The method of DINO (arXiv 2104.14294), in the paper's order: crops, networks, loss, schedules, teacher, optimizer.

Shapes: B images, G = 2 global and L local crops, V = G + L views, K prototypes, C channels.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from method import fused, photometric
from method.optimizers import LARS, SGD  # noqa: F401 - published here
from method.photometric import IMAGENET_MEAN, IMAGENET_STD

# ---- Multi-crop augmentation (section 3.1; appendix "Data augmentations", after BYOL and SwAV) ----


class DataAugmentationDINO:
    """Two global and L local crops of an image, in two stages with one source of randomness.

    `cut` runs in a loader's worker: it draws every parameter of the image's views from `rng`, and crops, resizes
    (bicubic, antialiased) and flips as uint8. `finish` runs batched on the device: colour jitter 0.4/0.4/0.2/0.1
    with probability 0.8, grey 0.2, blur (1.0 and 0.1 for the global crops, 0.5 for the local ones), solarize 0.2
    (second global crop), normalization. Called on one PIL image it gives the list of 2 + L normalized crops
    through the same code.

    Images that do not have three channels keep brightness, contrast, blur and solarize; saturation, hue and grey
    have no meaning for them and are left out.

    Args:
        global_crops_scale, local_crops_scale: smallest and largest share of the image's area in a crop.
        global_crops_size, local_crops_size: crops' side in pixels.
        mean, std: one value a channel, of intensities in [0, 1].
        compiled: by torch.compile, `finish` of three channels makes fewer passes over memory.
    """

    BLUR = (1.0, 0.1)  # probability for the first and second global crop
    LOCAL_BLUR = 0.5
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
    ) -> None:
        self.scales = [tuple(global_crops_scale)] * 2 + [tuple(local_crops_scale)] * local_crops_number
        self.sizes = [global_crops_size] * 2 + [local_crops_size] * local_crops_number
        self.blur = list(self.BLUR) + [self.LOCAL_BLUR] * local_crops_number
        self.solarize = list(self.SOLARIZE) + [0.0] * local_crops_number
        self.mean, self.std, self.compiled = tuple(mean), tuple(std), compiled

    def reduction(self, height: int, width: int) -> int:
        """1, 2, 4 or 8: by what a picture may be reduced as it is decoded, so that no crop has to be enlarged for it.

        A crop's shorter side is at least sqrt(3/4 of its area), or that of the picture (random_resized_crop_box).
        """
        spare = min(min(math.sqrt(scale[0] * height * width * 3 / 4), height, width) / size
                    for scale, size in zip(self.scales, self.sizes, strict=True))
        return next((r for r in (8, 4, 2) if r <= spare), 1)

    def cut(self, image: Tensor, rng: np.random.Generator) -> tuple[list[Tensor], Tensor]:
        """uint8 image (C, height, width) -> 2 + L uint8 crops (C, size, size), and their parameters (2 + L, 8).

        The parameters' columns are those of `photometric`; `rng` is the only source of randomness. Crops are views
        of (size, size, C) memory: torch's resizing of uint8 works in that layout, and answers in it when it is asked
        in it.
        """
        crops, params = [], np.empty((len(self.sizes), len(photometric.COLUMNS)), np.float32)
        for v, (scale, size) in enumerate(zip(self.scales, self.sizes, strict=True)):
            top, left, height, width = random_resized_crop_box(*image.shape[-2:], scale, rng)
            crop = image[None, :, top : top + height, left : left + width]
            crop = crop.contiguous(memory_format=torch.channels_last)
            crop = F.interpolate(crop, size=(size, size), mode="bicubic", antialias=True)[0]
            crops.append(crop.flip(-1) if rng.random() < 0.5 else crop)
            params[v] = self.draw_photometric(v, rng)
        return crops, torch.from_numpy(params)

    def draw_photometric(self, view: int, rng: np.random.Generator) -> np.ndarray:
        """Photometric parameters (8,) of a view, in `photometric`'s columns."""
        row = np.zeros(len(photometric.COLUMNS), np.float32)
        row[[photometric.BRIGHTNESS, photometric.CONTRAST, photometric.SATURATION]] = 1.0
        row[photometric.ORDER] = -1
        if rng.random() < 0.8:
            for column, (low, high) in self.JITTER.items():
                row[column] = uniform(rng, low, high)
            row[photometric.ORDER] = rng.integers(24)
        row[photometric.GREY] = rng.random() < 0.2
        row[photometric.SIGMA] = uniform(rng, 0.1, 2.0) if rng.random() < self.blur[view] else 0.0
        row[photometric.SOLARIZE] = rng.random() < self.solarize[view]
        return row

    def finish(self, crops: Sequence[Tensor], params: Tensor) -> list[Tensor]:
        """uint8 crops [(2B, C, g, g), (LB, C, l, l)] crop-major on any device -> the same, float32 and normalized.

        `params` ((2 + L) B, 8) stays on the CPU, so that nothing waits for the device.
        """
        rows = params.split([len(c) for c in crops])
        method = fused if self.compiled and len(self.mean) == 3 else photometric
        return [method.photometric(c, p, self.mean, self.std) for c, p in zip(crops, rows, strict=True)]

    def __call__(self, image, rng: np.random.Generator | None = None) -> list[Tensor]:
        """PIL image -> 2 + L normalized float32 crops (C, size, size); `rng` defaults to one seeded by torch's."""
        if rng is None:
            rng = np.random.default_rng(torch.randint(2**62, ()).item())
        pixels = np.array(image.convert("L" if len(self.mean) == 1 else "RGB"), ndmin=3)
        pixels = torch.from_numpy(pixels).reshape(image.height, image.width, -1).permute(2, 0, 1)
        crops, params = self.cut(pixels, rng)
        return [self.finish([c[None]], p[None])[0][0] for c, p in zip(crops, params, strict=True)]


def uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """rng.uniform(low, high), the same number in a third of the time; an image takes sixty."""
    return low + (high - low) * rng.random()


def random_resized_crop_box(
    height: int, width: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Box (top, left, height, width) of a share of the area in `scale`, with an aspect ratio in [3/4, 4/3].

    Drawn as Szegedy et al. 2015 do it: up to ten tries, then the largest centred box of a permitted ratio.
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
    """A backbone and a head over a list of crops: one backbone pass per resolution, one head pass.

    forward: a list of (n_i, C, h_i, w_i), or one such tensor -> (sum n_i, K), rows in the order given.

    A Vision Transformer's head reads the class token alone, so its last block computes nothing else.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        # A classifier left in a published backbone would stand between features and head.
        for name in ("fc", "head"):
            if isinstance(getattr(backbone, name, None), nn.Linear):
                setattr(backbone, name, nn.Identity())
        self.class_token_only = "class_token_only" in inspect.signature(backbone.forward).parameters
        self.channels_last = not self.class_token_only  # in memory: convolutions are faster that way
        self.backbone = backbone
        self.head = head

    def features(self, crops: Tensor | Sequence[Tensor]) -> Tensor:
        """list of (n_i, C, h_i, w_i) -> backbone features (sum n_i, D), rows in the order given."""
        features = self.outputs(crops, **({"class_token_only": True} if self.class_token_only else {}))
        return torch.cat(features) if len(features) > 1 else features[0]

    def tokens(self, crops: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """list of (n_i, C, h_i, w_i) -> a Vision Transformer's normalized tokens, list of (n_i, N_i, D)."""
        return self.outputs(crops, all_tokens=True)

    def outputs(self, crops: Tensor | Sequence[Tensor], **options: bool) -> list[Tensor]:
        """What `backbone(crops, **options)` returns for each element of the list, in one pass per resolution."""
        crops = [crops] if isinstance(crops, Tensor) else list(crops)
        groups: dict[torch.Size, list[int]] = {}
        for i, crop in enumerate(crops):
            groups.setdefault(crop.shape[-2:], []).append(i)
        outputs: list[Tensor] = [crops[0]] * len(crops)
        for members in groups.values():
            batch = torch.cat([crops[i] for i in members]) if len(members) > 1 else crops[members[0]]
            if self.channels_last:
                batch = batch.contiguous(memory_format=torch.channels_last)
            out = self.backbone(batch, **options)
            out = out[0] if isinstance(out, tuple) else out  # published XCiT returns several outputs
            for i, rows in zip(members, out.split([len(crops[i]) for i in members]), strict=True):
                outputs[i] = rows
        return outputs

    def forward(self, crops: Tensor | Sequence[Tensor]) -> Tensor:
        return self.head(self.features(crops))


# ---- Loss and centre (section 3.1, equations 1 to 4; algorithm 1) ----


def losses(
    student: nn.Module, teacher: MultiCropWrapper, crops: Sequence[Tensor], dino_loss: DINOLoss, epoch: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """What DINO computes for a micro-batch (algorithm 1); the state of networks and loss stays as it is.

    Args:
        student: a MultiCropWrapper, or what makes its gradients those of all processes.
        crops: [(2B, C, g, g), (LB, C, l, l)], normalized and crop-major.

    Returns:
        The loss to differentiate, and its parts: the scalars to log by their names, and without gradients the
        teacher's backbone features `teacher_features` (2B, D) and head output `teacher_output` (2B, K).
    """
    with torch.no_grad():
        # Cloned: a CUDA graph (--compile reduce-overhead) reuses the memory of its outputs when the next one starts.
        teacher_features = teacher.features(crops[:1]).clone()  # (2B, D), global views only
        teacher_output = teacher.head(teacher_features).clone()  # (2B, K)
    loss = cross_entropy(student(crops), dino_loss.targets(teacher_output, epoch), dino_loss.student_temp)
    return loss, {"loss": loss.detach(), "teacher_features": teacher_features, "teacher_output": teacher_output}


class DINOLoss(nn.Module):
    """Cross-entropy between the teacher's centred, sharpened output and the student's, over pairs of views.

        loss = mean over images and pairs (i, v), v != i, of  - sum_k q_i[k] log p_v[k]
        p_v = softmax(student_v / student_temp),  q_i = softmax((teacher_i - center) / teacher_temp(epoch))
        center <- m center + (1 - m) mean(teacher)            (over all images of all processes)

    i runs over the two global views, v over all `ncrops` views. The arithmetic is float32, or float64 for float64
    inputs.
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
        # A high temperature makes the first epochs unstable, so it is warmed up linearly.
        warmup = np.linspace(warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs)
        constant = np.full(max(nepochs - warmup_teacher_temp_epochs, 0), teacher_temp)
        self.teacher_temp_schedule = np.concatenate((warmup, constant))

    def targets(self, teacher_output: Tensor, epoch: int) -> Tensor:
        """q (..., K) of the teacher's output (..., K): centred, and sharpened with the epoch's temperature."""
        centred = at_least_float32(teacher_output.detach()) - self.center
        return F.softmax(centred / float(self.teacher_temp_schedule[epoch]), dim=-1)

    def forward(
        self, student_output: Tensor, teacher_output: Tensor, epoch: int, update_center: bool = True
    ) -> Tensor:
        """The loss of a batch, a scalar; then updates the centre, unless the caller does (gradient accumulation).

        Args:
            student_output: (V B, K), crop-major: all images' first view, then all images' second view, ...
            teacher_output: (2 B, K), the global views only, in the same order.
        """
        loss = cross_entropy(student_output, self.targets(teacher_output, epoch), self.student_temp)
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
    return PairsOfViews.apply(student_output, targets, temp)


class PairsOfViews(torch.autograd.Function):
    """`cross_entropy`, some images at a time: nothing is kept for backward but the logits and the targets.

    The gradient of the student's logits in view v is (n_v p_v - t_v) / (temp B pairs), where t_v is the sum of the
    q_i that v learns from and n_v their number; p is computed again for it. A part of the images fits the cache of a
    CPU, and on a GPU bounds the float32 temporaries (benchmarks/loss.py).
    """

    PART_CPU, PART_GPU = 2**20, 2**26  # values of a part's logits

    @staticmethod
    def forward(ctx, student: Tensor, targets: Tensor, temp: float) -> Tensor:
        ctx.save_for_backward(student, targets)
        ctx.temp = temp
        loss = torch.zeros((), dtype=at_least_float32(student[:0]).dtype, device=student.device)
        for _, x, q in PairsOfViews.parts(student, targets, temp):
            log_p = F.log_softmax(x, dim=-1)
            # Global view 0 learns from q_1 and 1 from q_0; each local view from both.
            loss -= (q.flip(0) * log_p[:2]).sum() + (q.sum(0) * log_p[2:].sum(0)).sum()
        return loss / PairsOfViews.count(student, targets)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        student, targets = ctx.saved_tensors
        grad = torch.empty_like(student)
        views = grad.unflatten(0, (-1, len(targets) // 2))  # (V, B, K)
        scale = grad_output / (ctx.temp * PairsOfViews.count(student, targets))
        for rows, x, q in PairsOfViews.parts(student, targets, ctx.temp):
            p = F.softmax(x, dim=-1)
            p[:2] -= q.flip(0)
            p[2:].mul_(2).sub_(q.sum(0))
            views[:, rows] = p.mul_(scale)
        return grad, None, None

    @staticmethod
    def count(student: Tensor, targets: Tensor) -> int:
        """Pairs of views times images: 2 (V - 1) B."""
        return 2 * len(student) - len(targets)

    @staticmethod
    def parts(student: Tensor, targets: Tensor, temp: float):
        """Yields (images' rows, the student's logits over the temperature (V, b, K), q (2, b, K))."""
        images = len(targets) // 2
        student, targets = student.unflatten(0, (-1, images)), targets.unflatten(0, (2, images))
        most = PairsOfViews.PART_CPU if student.device.type == "cpu" else PairsOfViews.PART_GPU
        size = max(1, most // (len(student) * student.shape[-1]))
        for first in range(0, images, size):
            rows = slice(first, first + size)
            yield rows, at_least_float32(student[:, rows]) / temp, targets[:, rows]


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# ---- Schedules (section 3.2, "Implementation details") ----


def cosine_scheduler(
    base_value: float,
    final_value: float,
    epochs: float,
    niter_per_ep: int,
    warmup_epochs: float = 0,
    start_warmup_value: float = 0,
) -> np.ndarray:
    """Value at every step: a linear warm-up to `base_value`, then a half cosine to `final_value`.

    `epochs` and `warmup_epochs` may be fractions: a run of so many steps is steps / niter_per_ep epochs.
    """
    n_steps, n_warmup = round(epochs * niter_per_ep), round(warmup_epochs * niter_per_ep)
    if n_warmup > n_steps:
        raise ValueError(f"warm-up of {warmup_epochs:g} epochs is longer than the run of {epochs:g}")
    warmup = np.linspace(start_warmup_value, base_value, n_warmup)
    t = np.arange(n_steps - n_warmup) / max(n_steps - n_warmup, 1)
    return np.concatenate((warmup, final_value + 0.5 * (base_value - final_value) * (1 + np.cos(np.pi * t))))


# ---- Teacher (section 3.1, "Teacher network") ----


@torch.no_grad()
def ema_update(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, parameters and floating-point buffers alike.

    Batch-norm statistics are such buffers: the teacher's follow the student's. Integer buffers are copied.
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
    """Two groups of the trainable parameters: matrices, and biases and norms, which are not decayed."""
    regularized, not_regularized = [], []
    for name, param in model.named_parameters():
        if param.requires_grad:
            plain = name.endswith(".bias") or param.ndim == 1
            (not_regularized if plain else regularized).append(param)
    return [{"params": regularized}, {"params": not_regularized, "weight_decay": 0.0}]


def set_lr_and_wd(optimizer: torch.optim.Optimizer, lr: float, wd: float) -> None:
    """Set a step's learning rate, and the weight decay of the first group of `get_params_groups`."""
    for i, group in enumerate(optimizer.param_groups):
        group["lr"] = lr
        if i == 0:
            group["weight_decay"] = wd


def build_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """`adamw`, `sgd` or `lars`; learning rate and weight decay are set at every step."""
    groups = get_params_groups(model)
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    return {"sgd": SGD, "lars": LARS}[name](groups)


@torch.no_grad()
def clip_gradients(model: nn.Module, clip: float, per_tensor: bool = True) -> Tensor:
    """Scale each parameter's gradient down to an L2 norm of `clip`, as DINO does, or all of them by one factor.

    Returns the norms before clipping (number of gradients,), on the device: nothing waits for it.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if not grads:
        return torch.zeros(0)
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
    return norms


def local_part(x: Tensor) -> Tensor:
    """This process's part of a tensor that is sharded over the processes (DTensor), sharing its memory; else x."""
    return x.to_local() if hasattr(x, "to_local") else x


def cancel_gradients_last_layer(epoch: int, model: nn.Module, freeze_last_layer: int) -> None:
    """Drop the gradients of the prototypes during the first `freeze_last_layer` epochs."""
    if epoch < freeze_last_layer:
        for name, param in model.named_parameters():
            if "last_layer" in name:
                param.grad = None
