"""The baseline: a straightforward implementation of DINO's pseudo-code (arXiv 2104.14294, algorithm 1), in eager mode.

It shares no code with the project. The names of its parameters are the published ones, so that both implementations
can start from the same weights, from which they compute the same losses and updates (tests/test_benchmarks.py). It does

    one pass per crop, or per resolution with `grouped`    attention as softmax(q k^T) v
    the loss as a double loop over pairs of views          EMA, clipping and AdamW one parameter at a time
    one read of the loss on the host in every step         augmentation of one image at a time with Pillow
"""

from __future__ import annotations

import math
import random

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch import nn

SIZES = {  # width, blocks, heads
    "vit_nano": (192, 4, 3), "vit_tiny": (192, 12, 3), "vit_small": (384, 12, 6), "vit_base": (768, 12, 12),
}


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(d // self.heads), dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, heads, drop):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)
        self.drop = drop

    def dropped(self, x):
        """Stochastic depth: compute the branch for all samples, then multiply it by zero for some."""
        if not self.training or self.drop == 0:
            return x
        keep = (torch.rand(len(x), 1, 1, device=x.device) >= self.drop).to(x.dtype)
        return x * keep / (1 - self.drop)

    def forward(self, x):
        x = x + self.dropped(self.attn(self.norm1(x)))
        return x + self.dropped(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, patch, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    def __init__(self, arch="vit_small", patch=16, size=224, drop_path=0.1):
        super().__init__()
        dim, depth, heads = SIZES[arch]
        self.width, self.side, self.patch = dim, size // patch, patch
        self.patch_embed = PatchEmbed(patch, dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, self.side**2 + 1, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, heads, drop_path * i / (depth - 1)) for i in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def positions(self, side):
        if side == self.side:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].view(1, self.side, self.side, -1).permute(0, 3, 1, 2)
        scale = (side + 0.1) / self.side
        grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, x):
        side = x.shape[-1] // self.patch
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], dim=1) + self.positions(side)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


class LastLayer(nn.Module):
    def __init__(self, dim, k):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(k, 1), requires_grad=False)
        self.weight_v = nn.Parameter(torch.randn(k, dim) * 0.02)

    def forward(self, x):
        return x @ (self.weight_g * self.weight_v / self.weight_v.norm(dim=1, keepdim=True)).T


class Head(nn.Module):
    def __init__(self, dim, k):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU(),
                                 nn.Linear(2048, 256))
        self.last_layer = LastLayer(256, k)

    def forward(self, x):
        x = self.mlp(x)
        return self.last_layer(x / x.norm(dim=1, keepdim=True))


class Network(nn.Module):
    def __init__(self, arch, patch, size, k, drop_path):
        super().__init__()
        self.backbone = ViT(arch, patch, size, drop_path)
        self.head = Head(self.backbone.width, k)

    def forward(self, x):
        return self.head(self.backbone(x))


def H(t, s, center, tps, tpt):  # noqa: N802 - the paper's name
    """Cross-entropy of algorithm 1 between a view t of the teacher and a view s of the student, (B, K) each."""
    t = torch.softmax((t - center) / tpt, dim=1).detach()
    s = torch.log_softmax(s / tps, dim=1)
    return -(t * s).sum(dim=1).mean()


def dino_loss(student_out, teacher_out, center, tps=0.1, tpt=0.04):
    """Mean of H over pairs of different views: lists of (B, K), the global views first."""
    total, pairs = 0.0, 0
    for i, t in enumerate(teacher_out):
        for v, s in enumerate(student_out):
            if v != i:
                total = total + H(t.float(), s.float(), center, tps, tpt)
                pairs += 1
    return total / pairs


def forward(network, crops, grouped):
    """List of crops (B, 3, s, s) -> list of head outputs (B, K)."""
    if not grouped:
        return [network(crop) for crop in crops]
    sizes = sorted({crop.shape[-1] for crop in crops}, reverse=True)
    out = [network.backbone(torch.cat([crop for crop in crops if crop.shape[-1] == size])) for size in sizes]
    return list(network.head(torch.cat(out)).chunk(len(crops)))


class Trainer:
    def __init__(self, arch="vit_small", patch=16, size=224, k=65536, device="cpu", dtype=None, grouped=False,
                 drop_path=0.1):
        self.student = Network(arch, patch, size, k, drop_path).to(device)
        self.teacher = Network(arch, patch, size, k, 0.0).to(device)
        self.teacher.load_state_dict(self.student.state_dict())
        for p in self.teacher.parameters():
            p.requires_grad = False
        decayed = [p for p in self.student.parameters() if p.requires_grad and p.ndim > 1]
        others = [p for p in self.student.parameters() if p.requires_grad and p.ndim == 1]
        self.optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}],
                                           lr=1e-4, weight_decay=0.04, foreach=False)
        self.center = torch.zeros(1, k, device=device)
        self.device, self.dtype, self.grouped = device, dtype, grouped

    def losses(self, crops):
        with torch.autocast(self.device.split(":")[0], self.dtype, enabled=self.dtype is not None):
            with torch.no_grad():
                teacher_out = forward(self.teacher, crops[:2], self.grouped)
            student_out = forward(self.student, crops, self.grouped)
        return dino_loss(student_out, teacher_out, self.center), teacher_out

    def step(self, crops, momentum=0.996):
        loss, teacher_out = self.losses(crops)
        if not math.isfinite(loss.item()):
            raise SystemExit("the loss is not finite")
        self.optimizer.zero_grad()
        loss.backward()
        for p in self.student.parameters():
            if p.grad is not None:
                norm = p.grad.norm(2)
                if 3.0 / (norm + 1e-6) < 1:
                    p.grad.mul_(3.0 / (norm + 1e-6))
        self.optimizer.step()
        with torch.no_grad():
            for s, t in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                t.mul_(momentum).add_((1 - momentum) * s)
            self.center = 0.9 * self.center + 0.1 * torch.cat(teacher_out).float().mean(dim=0)
        return loss.item()


# ---- Augmentation, one image at a time ----


def jitter(image):
    from torchvision.transforms import functional as T

    factors = [(T.adjust_brightness, random.uniform(0.6, 1.4)), (T.adjust_contrast, random.uniform(0.6, 1.4)),
               (T.adjust_saturation, random.uniform(0.8, 1.2)), (T.adjust_hue, random.uniform(-0.1, 0.1))]
    random.shuffle(factors)
    for function, factor in factors:
        image = function(image, factor)
    return image


def view(image, scale, size, blur, solarize):
    """Pillow image -> one normalized crop, float32 (3, size, size)."""
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as T

    box = transforms.RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3))
    image = T.resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC)
    if random.random() < 0.5:
        image = T.hflip(image)
    if random.random() < 0.8:
        image = jitter(image)
    if random.random() < 0.2:
        image = T.to_grayscale(image, 3)
    if random.random() < blur:
        image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
    if random.random() < solarize:
        image = ImageOps.solarize(image)
    return T.normalize(T.to_tensor(image), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def augment(image, local=8, sizes=(224, 96), global_scale=(0.4, 1.0), local_scale=(0.05, 0.4)):
    views = [view(image, global_scale, sizes[0], 1.0, 0.0), view(image, global_scale, sizes[0], 0.1, 0.2)]
    return views + [view(image, local_scale, sizes[1], 0.5, 0.0) for _ in range(local)]


class ImageFiles(torch.utils.data.Dataset):
    """Image files -> lists of crops."""

    def __init__(self, paths, **options):
        self.paths, self.options = paths, options

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        with open(self.paths[index], "rb") as file:
            return augment(Image.open(file).convert("RGB"), **self.options)
