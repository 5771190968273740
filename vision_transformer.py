"""Backbones: the Vision Transformer of DINO and DINOv2, its projection head, and `build_backbone` for every network.

Shapes: B images, N tokens (class token, registers, patches), D width, H heads, h x w patch grid, K prototypes.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.init import trunc_normal_
from torch.utils.checkpoint import checkpoint


def is_observed(module: nn.Module) -> bool:
    """Whether a module has forward or backward hooks."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                or module._backward_pre_hooks)


def accepts(module: nn.Module, argument: str) -> bool:
    """Whether a module's `forward` has this argument. Read without `inspect`, which torch.compile can't trace."""
    code = getattr(module.forward, "__code__", None)
    return code is not None and argument in code.co_varnames[: code.co_argcount]


# ---- Layers that save less for the backward pass (set_grad_checkpointing(layers=True)) ----


def recomputed(first: Callable[[Tensor], Tensor], linear: nn.Module, x: Tensor) -> Tensor:
    """linear(first(x)), saving only x for backward: for norms and activations, which are cheap to recompute.

    A block of width D saves 16 D values per token: 4 D are the output of GELU and 2 D the outputs of the two norms.
    """
    return checkpoint(lambda x: linear(first(x)), x, use_reentrant=False, preserve_rng_state=False)


# ---- Vision Transformer ----


def drop_path(x: Tensor, drop_prob: float = 0.0, training: bool = False) -> Tensor:
    """Stochastic depth: zero each sample with probability `drop_prob`, scale the others by 1 / (1 - drop_prob)."""
    if drop_prob == 0.0 or not training:
        return x
    keep = 1.0 - drop_prob
    mask = x.new_empty(x.shape[0], *([1] * (x.ndim - 1))).bernoulli_(keep)
    return x * (mask / keep)


class DropPath(nn.Module):
    """Stochastic depth per sample (Huang et al. 2016).

    With `subset`, a Block computes its branches for `kept_rows` of the batch only, which saves their time and memory
    (DINOv2, arXiv 2304.07193, section 5, "Efficient stochastic depth").
    """

    def __init__(self, drop_prob: float = 0.0, subset: bool = False) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.subset = subset

    def kept_rows(self, n: int, device: torch.device) -> Tensor:
        """Indices of the max(1, int(n (1 - drop_prob))) samples, drawn at random, that a branch is computed for."""
        return torch.randperm(n, device=device)[: max(int(n * (1 - self.drop_prob)), 1)]

    def forward(self, x: Tensor) -> Tensor:
        return drop_path(x, self.drop_prob, self.training)


class LayerScale(nn.Module):
    """Learned scale per channel of a residual branch (Touvron et al. 2021)."""

    def __init__(self, dim: int, init_values: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    """fc2(act(fc1(x))); with `norm`, fc2(act(fc1(norm(x)))). Widths that are not given are `in_features`."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, out_features or in_features)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        if norm is None or self.drop.p or is_observed(self.drop):
            x = x if norm is None else norm(x)
            return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
        return recomputed(self.act, self.fc2, recomputed(norm, self.fc1, x))


def swiglu(x: Tensor) -> Tensor:
    """(..., 2 h) -> (..., h): silu of the first half times the second half."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


class SwiGLU(nn.Module):
    """Gated MLP (Shazeer 2020) as in DINOv2's ViT-g: w3(silu(x1) * x2) with x1, x2 = w12(x); `norm` as in Mlp.

    Its hidden width is two thirds of `hidden_features`, rounded up to a multiple of 8, so that it has about as many
    parameters as an Mlp of `hidden_features`.
    """

    def __init__(self, in_features: int, hidden_features: int, drop: float = 0.0) -> None:
        super().__init__()
        hidden = (int(hidden_features * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(in_features, 2 * hidden)
        self.w3 = nn.Linear(hidden, in_features)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        if norm is None:
            return self.drop(self.w3(swiglu(self.w12(x))))
        return self.drop(recomputed(swiglu, self.w3, recomputed(norm, self.w12, x)))


FFN_LAYERS = {"mlp": Mlp, "swiglu": SwiGLU, "swiglufused": SwiGLU}  # the last is the published name
HALF = (torch.float16, torch.bfloat16)
LONGEST_PLAIN = 1024  # tokens; above, N x N attention weights would need too much memory


class Attention(nn.Module):
    """Multi-head self-attention: (B, N, D) -> ((B, N, D), weights (B, H, N, N) or None), the form of DINO's module.

    In the networks of DINOv2, `returns_weights` is False: as in the module published there, (B, N, D) alone, unless
    the weights are asked for.

    A fused kernel that never forms the weights runs, unless something needs them: `return_attention` (by default
    `returns_weights`; blocks pass False), a hook on this module that gets them, or a hook on `attn_drop` or a module in
    its place, where code written for the published models reads the weights.

    In half precision on a CPU, the explicit product runs for up to LONGEST_PLAIN tokens anyway, because it is three to
    eleven times as fast there (benchmarks/attention.py).

    `class_token_only` computes the first row of both results, (B, 1, D) and (B, H, 1, N). With `norm`, the input is
    norm(x).
    """

    returns_weights = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self, x: Tensor, return_attention: bool | None = None, class_token_only: bool = False,
        norm: nn.Module | None = None,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        if return_attention is None:
            return_attention = self.returns_weights
        B, N, D = x.shape
        qkv = self.qkv(x) if norm is None else recomputed(norm, self.qkv, x)
        qkv = qkv.reshape(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, N, D / H)
        if class_token_only:
            q = q[:, :, :1]
        attn = None
        wanted = (return_attention or (self.returns_weights and is_observed(self)) or is_observed(self.attn_drop)
                  or type(self.attn_drop) is not nn.Dropout)
        if wanted or (q.device.type == "cpu" and q.dtype in HALF and N <= LONGEST_PLAIN):
            attn = self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1))
            x = attn @ v
        else:
            dropout = self.attn_drop.p if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        x = x.transpose(1, 2).reshape(B, q.shape[2], D)
        x = self.proj_drop(self.proj(x))
        return (x, attn) if return_attention or self.returns_weights else x


class Block(nn.Module):
    """Pre-norm transformer block; `return_attention=True` returns the attention weights (B, H, N, N) instead.

    `class_token_only=True` computes only the class token's output, (B, 1, D); it still attends to every token. Saves
    three quarters of the block's FLOPs.

    A list of batches (n_i, N_i, D), of crops of several sizes, gives a list. It equals separate calls, except for the
    order in which stochastic depth draws: the attention branch of every batch, then the MLP branch of every batch.
    """

    recomputes_layers = False  # recompute norms and GELU in backward: VisionTransformer.set_grad_checkpointing
    drop_path1 = drop_path2 = property(lambda self: self.drop_path)  # DINOv2's names, one for each branch
    __jit_unused_properties__ = ["drop_path1", "drop_path2"]  # torch.jit.trace would compile them

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        init_values: float | None = None,
        ffn_layer: str = "mlp",
        drop_path_subset: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path = DropPath(drop_path, drop_path_subset) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        options = {"act_layer": act_layer} if FFN_LAYERS[ffn_layer] is Mlp else {}
        self.mlp = FFN_LAYERS[ffn_layer](dim, int(dim * mlp_ratio), drop=drop, **options)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()

    def forward(
        self, x: Tensor | list[Tensor], return_attention: bool = False, class_token_only: bool = False
    ) -> Tensor | list[Tensor]:
        if return_attention:
            if (weights := self.attend(x, True)[1]) is None:
                raise ValueError("return_attention: the block's own attention was replaced by one without weights")
            return weights
        batches = x if isinstance(x, list) else [x]
        batches = [self.add(x[:, :1] if class_token_only else x, self.attention_branch, x, class_token_only)
                   for x in batches]
        batches = [self.add(x, self.mlp_branch, x) for x in batches]
        return batches if isinstance(x, list) else batches[0]

    def attend(
        self, x: Tensor, return_attention: bool = False, class_token_only: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """attn(norm1(x)) and the weights, or None.

        An attention of other code, in place of `attn` or of its `forward`, is called as the published blocks do, with
        the tokens alone, and returns what the one published for DINO or the one for DINOv2 does.
        """
        given, norm = self.given(self.attn, self.norm1, x)
        is_own = accepts(self.attn, "class_token_only")
        out = self.attn(given, return_attention, class_token_only, **norm) if is_own else self.attn(given)
        tokens, weights = out if isinstance(out, tuple) else (out, None)
        return tokens if is_own or not class_token_only else tokens[:, :1], weights

    def attention_branch(self, x: Tensor, class_token_only: bool) -> Tensor:
        return self.ls1(self.attend(x, False, class_token_only)[0])

    def mlp_branch(self, x: Tensor) -> Tensor:
        given, norm = self.given(self.mlp, self.norm2, x)
        return self.ls2(self.mlp(given, **norm))

    def add(self, residual: Tensor, branch: Callable[..., Tensor], x: Tensor, *options: bool) -> Tensor:
        """residual + branch(x, *options), with stochastic depth in training."""
        if not (self.training and getattr(self.drop_path, "subset", False)):
            return residual + self.drop_path(branch(x, *options))
        rows = self.drop_path.kept_rows(len(x), x.device)
        y = branch(x[rows], *options).to(residual.dtype)
        return residual.index_add(0, rows, y, alpha=len(x) / len(rows))

    def given(self, module: nn.Module, norm: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, nn.Module]]:
        """Arguments with which `module` computes module(norm(x)): (norm(x), {}) or (x, {"norm": norm}).

        The second form recomputes the norm in the backward pass (`recomputed`). A module with hooks, of another class
        or with another `forward` gets the first form.
        """
        if (self.recomputes_layers and type(module) in (Attention, Mlp, SwiGLU) and accepts(module, "norm")
                and not is_observed(module)):
            return x, {"norm": norm}
        return norm(x), {}


class PatchEmbed(nn.Module):
    """(B, C, height, width) -> (B, h * w, D). A remainder at the right and bottom edge is ignored."""

    def __init__(self, img_size: int = 224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768) -> None:
        super().__init__()
        self.img_size = img_size
        self.patch_size = patch_size
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Number of patches (rows, columns), from the convolution's stride, which dense-feature code may change."""
        kernel, stride = self.proj.kernel_size, self.proj.stride
        return (height - kernel[0]) // stride[0] + 1, (width - kernel[1]) // stride[1] + 1

    def forward(self, x: Tensor) -> Tensor:
        (height, width), patch = x.shape[-2:], self.proj.kernel_size[0]
        if not torch.jit.is_tracing() and min(height, width) < patch:
            raise ValueError(f"image of {height} x {width} pixels is smaller than one patch of {patch}")
        return self.proj(x).flatten(2).transpose(1, 2)

    def is_matrix_product(self, x: Tensor) -> bool:
        """Whether `forward` may be computed as a product of `unfolded` patches and the convolution's weights.

        Not with hooks, another module in place of `proj`, another stride, or where the gradient of the image is
        needed. Traces, exports and torch.compile keep the convolution.
        """
        proj = self.proj
        return (type(self) is PatchEmbed and type(proj) is nn.Conv2d and proj.stride == proj.kernel_size
                and not is_observed(self) and not is_observed(proj) and not x.requires_grad
                and not torch.jit.is_tracing() and not torch.compiler.is_compiling()
                and min(x.shape[-2:]) >= proj.kernel_size[0])

    def unfolded(self, x: Tensor, before: int, dtype: torch.dtype) -> Tensor:
        """(B, C, height, width) -> (B, before + h * w, C p p): `before` rows of zeros, then a patch per row."""
        rows, columns = self.grid(*x.shape[-2:])
        (B, C), (p, q) = x.shape[:2], self.proj.kernel_size
        patches = x[..., : rows * p, : columns * q].unflatten(-1, (columns, q)).unflatten(-3, (rows, p))
        unfolded = x.new_empty(B, before + rows * columns, C * p * q, dtype=dtype)
        unfolded[:, :before] = 0
        unfolded[:, before:].view(B, rows, columns, C, p, q).copy_(patches.permute(0, 2, 4, 1, 3, 5))
        return unfolded


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The type in which a matrix product of x is computed."""
    if x.is_meta or x.dtype == torch.float64:  # there is no autocast for the meta device
        return x.dtype
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class Features(dict):
    """Output tokens of a Vision Transformer under DINOv2's published keys.

    x_norm_clstoken (B, D), x_norm_regtokens (B, R, D), x_norm_patchtokens (B, h w, D): after the last norm;
    x_prenorm (B, N, D): all tokens before it; masks: the masks that were given, or None.

    `cls_token, patch_tokens, registers = features` unpacks the attributes of these names.
    """

    def __init__(self, tokens: Tensor, prenorm: Tensor, registers: int, grid: tuple[int, int], masks: Tensor | None):
        super().__init__(
            x_norm_clstoken=tokens[:, 0], x_norm_regtokens=tokens[:, 1 : 1 + registers],
            x_norm_patchtokens=tokens[:, 1 + registers :], x_prenorm=prenorm, masks=masks)
        self.grid = grid

    @property
    def cls_token(self) -> Tensor:
        """(B, D)"""
        return self["x_norm_clstoken"]

    @property
    def patch_tokens(self) -> Tensor:
        """(B, h, w, D)"""
        return self["x_norm_patchtokens"].unflatten(1, self.grid)

    @property
    def registers(self) -> Tensor:
        """(B, R, D)"""
        return self["x_norm_regtokens"]

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.cls_token, self.patch_tokens, self.registers))

    def __missing__(self, key: object) -> Tensor:
        if isinstance(key, int):
            return tuple(self)[key]
        raise KeyError(key)


class VisionTransformer(nn.Module):
    """Vision Transformer (Dosovitskiy et al. 2020) of DINO (arXiv 2104.14294, section 3.2) and DINOv2 (2304.07193).

    Args:
        img_size: side in pixels of the images that `pos_embed` is made for; it is interpolated for other sizes.
        num_classes: > 0 adds a linear classifier `head` and makes `forward` return its logits.
        qk_scale: factor of the attention scores; None: 1 / sqrt(D / H).
        num_register_tokens: extra tokens without position embedding (Darcet et al. 2023).
        init_values: initial value of LayerScale (DINOv2: 1e-5); None or 0: no LayerScale.
        interpolate_antialias, interpolate_offset: how position embeddings are interpolated. Use the values of the
            weights' training: False and 0.1 for DINO and for DINOv2 without registers, True and 0 for DINOv2 with
            registers.
        method: "dino", or "dinov2" for a network with a `mask_token`, which replaces the embeddings of masked patches.
            Decides the initialization of the tokens too, and the forms in which code for the published networks reads
            these: of `get_intermediate_layers`, of a block's `attn` and of the sizes in `patch_embed`.
        ffn_layer: "mlp", or "swiglu" (gated).
        drop_path_uniform: the same rate of stochastic depth in all blocks; default: increasing linearly from 0.
        drop_path_subset: see DropPath.

    Attributes:
        grad_checkpointing: see set_grad_checkpointing.
        n_blocks: number of blocks; `img_size`, `patch_size`, `num_heads`, `num_register_tokens` as given.
    """

    grad_checkpointing = False
    chunked_blocks, num_tokens = False, 1  # what published code of DINOv2 asks: BlockChunk, and class tokens

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 0,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        num_register_tokens: int = 0,
        init_values: float | None = None,
        interpolate_antialias: bool = False,
        interpolate_offset: float = 0.1,
        method: str = "dino",
        ffn_layer: str = "mlp",
        drop_path_uniform: bool = False,
        drop_path_subset: bool = False,
    ) -> None:
        super().__init__()
        for name, value, known in (("method", method, ("dino", "dinov2")), ("ffn_layer", ffn_layer, FFN_LAYERS)):
            if value not in known:
                raise ValueError(f"{name} {value}: not known; choose {' or '.join(known)}")
        img_size = img_size if isinstance(img_size, int) else img_size[0]  # published code passes [224]
        if img_size < patch_size:
            raise ValueError(f"img_size {img_size} is smaller than one patch of {patch_size}")
        self.num_features = self.embed_dim = embed_dim
        self.img_size, self.patch_size, self.num_heads, self.n_blocks = img_size, patch_size, num_heads, depth
        self.num_register_tokens, self.method = num_register_tokens, method
        self.interpolate_antialias, self.interpolate_offset = interpolate_antialias, interpolate_offset
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + 1, embed_dim))
        self.register_tokens = (
            nn.Parameter(torch.zeros(1, num_register_tokens, embed_dim)) if num_register_tokens else None
        )
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim)) if method == "dinov2" else None
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, qk_scale, drop_rate, attn_drop_rate,
                  drop_path_rate if drop_path_uniform else drop_path_rate * i / max(depth - 1, 1),
                  norm_layer=norm_layer, init_values=init_values, ffn_layer=ffn_layer,
                  drop_path_subset=drop_path_subset)
            for i in range(depth)
        )
        if method == "dinov2":
            self.take_forms_of_dinov2()
        self.norm = norm_layer(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.init_weights()

    def take_forms_of_dinov2(self) -> None:
        """What DINOv2's published modules have in another form than DINO's."""
        embed = self.patch_embed
        embed.img_size, embed.patch_size = (self.img_size,) * 2, (self.patch_size,) * 2
        embed.patches_resolution = (self.img_size // self.patch_size,) * 2
        for block in self.blocks:
            block.attn.returns_weights = False

    def init_weights(self) -> None:
        """Random tokens and linear layers, as published for the network's `method`."""
        for tokens in (self.cls_token, self.pos_embed, self.register_tokens):
            if tokens is not None:
                trunc_normal_(tokens, std=0.02)
        if self.method == "dinov2":
            for tokens in (self.cls_token, self.register_tokens):
                if tokens is not None:
                    nn.init.normal_(tokens, std=1e-6)
        self.apply(init_linear)

    def __setstate__(self, state: dict) -> None:
        """Networks pickled before there was DINOv2, or its forms, lack what came with them."""
        super().__setstate__(state)
        if "img_size" not in self.__dict__:
            self.img_size = self.patch_embed.img_size
        if "method" not in self.__dict__:
            self.method, self.mask_token = "dino", None
            self.patch_size, self.num_heads = self.patch_embed.proj.kernel_size[0], self.blocks[0].attn.num_heads
            self.n_blocks = len(self.blocks)

    def interpolate_pos_encoding(self, x: Tensor, w: int, h: int) -> Tensor:
        """Position embeddings for an image of w x h pixels, bicubically interpolated: (1, 1 + patches, D).

        Args:
            x: tokens with the class token in front, (B, 1 + patches, D); only the number of tokens is read.
            w, h: sizes of dimensions 2 and 3 of the image; the names are the published ones.
        """
        n_stored = self.pos_embed.shape[1] - 1
        if x.shape[1] - 1 == n_stored and w == h:
            return self.pos_embed
        rows, columns = self.patch_embed.grid(w, h)
        if torch.jit.is_tracing():  # tracing fixes the size, and passes sizes as tensors
            rows, columns = int(rows), int(columns)
        side = math.isqrt(n_stored)
        patch_pos = self.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        # The published weights were trained with scale factors computed from grid size + 0.1, which also prevents
        # floor(side * scale) from losing a row to rounding. Interpolate in float32: not every device has half-precision
        # bicubic interpolation.
        offset, half = self.interpolate_offset, patch_pos.dtype in HALF
        to = ({"scale_factor": ((rows + offset) / side, (columns + offset) / side)} if offset
              else {"size": (rows, columns)})
        patch_pos = F.interpolate(patch_pos.float() if half else patch_pos, **to, mode="bicubic",
                                  antialias=self.interpolate_antialias).to(self.pos_embed.dtype)
        return torch.cat([self.pos_embed[:, :1], patch_pos.flatten(2).transpose(1, 2)], dim=1)

    def prepare_tokens(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Images (B, C, height, width) -> tokens (B, N, D): class token, registers, patches.

        Args:
            masks: (B, h w) bool, True where a patch's embedding is replaced by the mask token, before its position is
                added.
        """
        w, h = x.shape[-2:]
        # Networks with a mask token keep the convolution, so that images without a masked patch give the same bits with
        # and without `masks`.
        if self.mask_token is None and masks is None and self.patch_embed.is_matrix_product(x):
            return self.pos_drop(self.embed(x))
        x = self.patch_embed(x)
        if masks is not None:
            if self.mask_token is None:
                raise ValueError('masks: this network has no mask token; build it with method="dinov2"')
            x = torch.where(masks.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.interpolate_pos_encoding(x, w, h)
        if self.register_tokens is not None:
            x = torch.cat([x[:, :1], self.register_tokens.expand(x.shape[0], -1, -1), x[:, 1:]], dim=1)
        return self.pos_drop(x)

    def embed(self, x: Tensor) -> Tensor:
        """`prepare_tokens` without masks and dropout, as one matrix product: every token is written once.

        Class token and registers are rows of zeros among the unfolded patches; they, the positions and the bias are
        added to the product.
        """
        added = 1 if self.register_tokens is None else 1 + self.register_tokens.shape[1]
        patches = self.patch_embed.unfolded(x, added, autocast_dtype(x))
        proj = self.patch_embed.proj
        pos = self.interpolate_pos_encoding(patches[:, added - 1 :], *x.shape[-2:])  # (1, 1 + n, D)
        rows = [self.cls_token + pos[:, :1], self.register_tokens,
                pos[:, 1:] if proj.bias is None else pos[:, 1:] + proj.bias]
        rows = torch.cat([row for row in rows if row is not None], 1)  # (1, 1 + registers + n, D)
        return F.linear(patches, proj.weight.flatten(1)) + rows

    prepare_tokens_with_masks = prepare_tokens  # DINOv2's name

    def without_dropped(self, tokens: Tensor, kept: Tensor) -> Tensor:
        """(B, N, D) -> class token, registers and the patches with the indices `kept` (B, n), in their order."""
        first = 1 + self.num_register_tokens
        patches = tokens[:, first:].gather(1, kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        return torch.cat([tokens[:, :first], patches], dim=1)

    def set_grad_checkpointing(self, enable: bool = True, layers: bool = False) -> None:
        """Save only each block's input for backward and recompute the rest (the method has timm's name).

        With `layers`, recompute only what is cheap: norms and GELU (see `recomputed`).
        """
        self.grad_checkpointing = enable and not layers
        for block in self.blocks:
            block.recomputes_layers = enable and layers

    def forward_blocks(
        self, x: Tensor | list[Tensor], masks: Tensor | list[Tensor | None] | None = None,
        class_token_only: bool = False, kept: Tensor | None = None,
    ) -> Tensor | list[Tensor]:
        """Images (B, C, height, width) -> tokens (B, N, D) before the last norm, or the class token alone (B, 1, D).

        A list of batches, with a list of masks (None: no masks), gives a list. All batches pass a block before the
        next block, so that it is gathered once under FSDP; see Block. `kept`: see forward.
        """
        if isinstance(x, list):
            x = [self.prepare_tokens(x, m) for x, m in zip(x, masks or [None] * len(x), strict=True)]
        else:
            x = self.prepare_tokens(x, masks)
        if kept is not None:
            x = [self.without_dropped(x[0], kept), *x[1:]] if isinstance(x, list) else self.without_dropped(x, kept)
        for block in self.blocks:
            # Passed only where it is needed: a block of another class may not accept it.
            options = {"class_token_only": True} if class_token_only and block is self.blocks[-1] else {}
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False, **options)
            else:
                x = block(x, **options)
        return x

    def forward(
        self, x: Tensor | list[Tensor], masks: Tensor | list[Tensor | None] | None = None, is_training: bool = False,
        class_token_only: bool = False, all_tokens: bool = False, kept: Tensor | None = None,
    ) -> Tensor | list[Tensor] | Features | list[Features]:
        """Images (B, C, height, width) -> normalized class token (B, D), or logits (B, num_classes).

        Args:
            x, masks: or lists of them; see forward_blocks. A list gives a list.
            is_training: return forward_features(x, masks) instead.
            class_token_only: compute only the class token in the last block, which is faster in training; hooks on
                that block then see one token.
            all_tokens: return the normalized tokens (B, N, D) instead: class token, registers, patches.
            kept: (B, n) indices of the patches whose tokens pass the blocks, of a list's first batch; the other
                patches are dropped once the positions are added. None: all.
        """
        if is_training:
            return self.forward_features(x, masks)
        x = self.forward_blocks(x, masks, class_token_only, kept)
        outputs = [self.norm(tokens) for tokens in (x if isinstance(x, list) else [x])]
        if not all_tokens:
            outputs = [self.head(tokens[:, 0]) for tokens in outputs]
        return outputs if isinstance(x, list) else outputs[0]

    def forward_features(
        self, x: Tensor | list[Tensor], masks: Tensor | list[Tensor | None] | None = None
    ) -> Features | list[Features]:
        """Images (B, C, height, width) -> all tokens, normalized or not; a list of batches gives a list."""
        if isinstance(x, list):
            prenorm = self.forward_blocks(x, masks)
            masks = masks or [None] * len(x)
            return [self.named(x, tokens, m) for x, tokens, m in zip(x, prenorm, masks, strict=True)]
        return self.named(x, self.forward_blocks(x, masks), masks)

    forward_features_list = forward_features  # DINOv2's name, for lists

    def named(self, images: Tensor, prenorm: Tensor, masks: Tensor | None) -> Features:
        grid = self.patch_embed.grid(*images.shape[-2:])
        return Features(self.norm(prenorm), prenorm, self.num_register_tokens, grid, masks)

    def get_attention_maps(self, x: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Attention weights (B, H, N, N) of each of `layers`, in that order; -1 is the last layer.

        Raises:
            ValueError: a layer does not exist.
        """
        depth = len(self.blocks)
        wrong = [i for i in layers if not -depth <= i < depth]
        if wrong:
            raise ValueError(f"layer {wrong[0]} does not exist: the network has layers 0 to {depth - 1}")
        wanted = {i % depth for i in layers}
        maps, x = {}, self.prepare_tokens(x)
        for i in range(max(wanted, default=-1) + 1):
            if i in wanted:
                maps[i] = self.blocks[i](x, return_attention=True)
            if i < max(wanted):
                x = self.blocks[i](x)
        return [maps[i % depth] for i in layers]

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """Attention weights (B, H, N, N) of the last layer."""
        return self.get_attention_maps(x, [-1])[0]

    def get_intermediate_layers(
        self, x: Tensor, n: int | Sequence[int] = 1, reshape: bool = False, return_class_token: bool = False,
        norm: bool = True,
    ) -> list[Tensor] | tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:
        """Outputs of several blocks, as published for DINO or for DINOv2, whichever is the network's `method`.

        Args:
            x: images (B, C, height, width).
            n: the last n blocks, or the numbers of the blocks, whose outputs come in the blocks' order.
            reshape: patch tokens as a grid (B, D, h, w) instead of (B, h w, D). DINOv2 only.
            return_class_token: pairs of patch tokens and class token (B, D). DINOv2 only.
            norm: apply the network's last norm.

        Returns:
            DINO: a list of all tokens (B, N, D). DINOv2: a tuple of patch tokens.

        Raises:
            ValueError: a block does not exist, or the option is not this method's.
        """
        if self.method != "dinov2" and (reshape or return_class_token):
            name = "reshape" if reshape else "return_class_token"
            raise ValueError(f'{name}: not available for the networks of DINO; build the network with method="dinov2", '
                             "or take forward_features")
        outputs = self.block_outputs(x, n, norm)
        if self.method != "dinov2":
            return outputs
        patches = [tokens[:, 1 + self.num_register_tokens :] for tokens in outputs]
        if reshape:
            grid = self.patch_embed.grid(*x.shape[-2:])
            patches = [tokens.transpose(1, 2).unflatten(2, grid).contiguous() for tokens in patches]
        if return_class_token:
            return tuple((tokens, out[:, 0]) for tokens, out in zip(patches, outputs, strict=True))
        return tuple(patches)

    def block_outputs(self, x: Tensor, n: int | Sequence[int] = 1, norm: bool = True) -> list[Tensor]:
        """All tokens (B, N, D) after each of the last n blocks, or of the blocks with the numbers n."""
        depth = len(self.blocks)
        wanted = range(max(depth - n, 0), depth) if isinstance(n, int) else n
        if missing := [i for i in wanted if not 0 <= i < depth]:
            raise ValueError(f"block {missing[0]} does not exist: the network has blocks 0 to {depth - 1}")
        outputs, x = [], self.prepare_tokens(x)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in wanted:
                outputs.append(self.norm(x) if norm else x)
        return outputs

    def _get_intermediate_layers_not_chunked(self, x: Tensor, n: int | Sequence[int] = 1) -> list[Tensor]:
        """`block_outputs` before the last norm, under DINOv2's name, which code for dense features calls."""
        return self.block_outputs(x, n, norm=False)


def init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _vit(embed_dim: int, heads: int, patch_size: int, **kwargs) -> VisionTransformer:
    return VisionTransformer(
        patch_size=patch_size, embed_dim=embed_dim, norm_layer=partial(nn.LayerNorm, eps=1e-6),
        **{"num_heads": heads, "qkv_bias": True} | kwargs,
    )


def vit_nano(patch_size: int = 16, **kwargs) -> VisionTransformer:
    """Width 192, 4 blocks, 3 heads: 2.0 M parameters at patch 16. Not published; for quick experiments on a CPU."""
    return _vit(192, 3, patch_size, **{"depth": 4} | kwargs)


def vit_tiny(patch_size: int = 16, **kwargs) -> VisionTransformer:
    """Width 192, 12 blocks, 3 heads: 5.5 M parameters at patch 16."""
    return _vit(192, 3, patch_size, **kwargs)


def vit_small(patch_size: int = 16, **kwargs) -> VisionTransformer:
    """Width 384, 12 blocks, 6 heads: 21.7 M parameters at patch 16 (DeiT-S)."""
    return _vit(384, 6, patch_size, **kwargs)


def vit_base(patch_size: int = 16, **kwargs) -> VisionTransformer:
    """Width 768, 12 blocks, 12 heads: 85.8 M parameters at patch 16."""
    return _vit(768, 12, patch_size, **kwargs)


def vit_large(patch_size: int = 16, **kwargs) -> VisionTransformer:
    """Width 1024, 24 blocks, 16 heads: 303 M parameters at patch 16."""
    return _vit(1024, 16, patch_size, **{"depth": 24} | kwargs)


def vit_giant2(patch_size: int = 16, **kwargs) -> VisionTransformer:
    """Width 1536, 40 blocks, 24 heads, gated MLP: 1.1 billion parameters (DINOv2's ViT-g)."""
    return _vit(1536, 24, patch_size, **{"depth": 40, "ffn_layer": "swiglu"} | kwargs)


deit_tiny, deit_small, deit_base = vit_tiny, vit_small, vit_base


class WeightNormLinear(nn.Module):
    """x W^T with rows W_k = g_k v_k / |v_k|; parameters `weight_g` (K, 1) and `weight_v` (K, in), as published."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_features, 1))
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))  # as nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        # The kernel of torch's weight norm. For 65,536 rows on a CPU, forward and backward of the written-out formula
        # take five times as long (benchmarks/prototypes.py).
        return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))


class DINOHead(nn.Module):
    """Projection head (section 3.2, "Network architecture"): MLP, L2 normalization, weight-normalized prototypes.

    (B, in_dim) -> (B, out_dim). `norm_last_layer` fixes the norm of the prototypes at 1, which stabilizes training;
    DINOv2 lets it learn.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        mlp_bias: bool = True,
    ) -> None:
        super().__init__()
        widths = [in_dim] + [hidden_dim] * (max(nlayers, 1) - 1) + [bottleneck_dim]
        layers: list[nn.Module] = []
        for i, (fan_in, fan_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            layers.append(nn.Linear(fan_in, fan_out, bias=mlp_bias))
            if i < len(widths) - 2:
                layers += [nn.BatchNorm1d(fan_out), nn.GELU()] if use_bn else [nn.GELU()]
        # Published checkpoints call the single layer of a one-layer head `mlp.weight`.
        self.mlp = nn.Sequential(*layers) if len(layers) > 1 else layers[0]
        self.apply(init_linear)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        self.last_layer.weight_g.requires_grad_(not norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp(x)
        x = F.normalize(x, dim=-1)
        return self.last_layer(x)


VITS: dict[str, Callable[..., VisionTransformer]] = {
    "vit_nano": vit_nano, "vit_tiny": vit_tiny, "vit_small": vit_small, "vit_base": vit_base,
    "vit_large": vit_large, "vit_giant2": vit_giant2,
    "deit_tiny": deit_tiny, "deit_small": deit_small, "deit_base": deit_base,
}

# The published XCiT backbones under timm's names.
XCITS = {
    name: f"{name}_224"
    for name in ("xcit_small_12_p16", "xcit_small_12_p8", "xcit_medium_24_p16", "xcit_medium_24_p8")
}


def build_backbone(
    arch: str, patch_size: int = 16, drop_path_rate: float = 0.0, in_chans: int = 3, img_size: int = 224,
    timm_args: Mapping | None = None, **kwargs,
) -> tuple[nn.Module, int]:
    """Build a randomly initialized backbone: images (B, in_chans, height, width) -> features (B, embed_dim).

    Args:
        arch: a ViT of `VITS`, a torchvision classification network, an XCiT of `XCITS`, or any other timm name. A
            torchvision ResNet's name with `_cifar` has the stem for small images (see `small_stem`).
        patch_size: patch size of a ViT of `VITS`; ignored for other networks.
        img_size: side in pixels of the images that the position embeddings of a ViT of `VITS` are made for.
        timm_args: arguments of timm's network under timm's names, patch_size and img_size included; given, even as {},
            the network is timm's, whoever else has one of that name.
        kwargs: further arguments of the network's constructor.

    Returns:
        The network without its classifier, and embed_dim.

    Raises:
        ValueError: the name is unknown (the message lists similar names), or the network has no such option.
    """
    if timm_args is not None:
        return _build_timm(arch, drop_path_rate, in_chans, **kwargs | timm_args)
    if arch in VITS:
        vit = VITS[arch](patch_size, drop_path_rate=drop_path_rate, in_chans=in_chans, img_size=img_size, **kwargs)
        return vit, vit.embed_dim
    plain = arch.removesuffix(CIFAR)
    if plain in torchvision_names():
        model, width = _build_torchvision(plain, drop_path_rate, in_chans, **kwargs)
        return model if plain == arch else small_stem(model, arch), width
    return _build_timm(arch, drop_path_rate, in_chans, **kwargs)


CIFAR = "_cifar"


def torchvision_names() -> list[str]:
    import torchvision  # takes seconds to import; ViTs do not need it

    return torchvision.models.list_models(module=torchvision.models)


def is_network(arch: str) -> bool:
    """Whether `build_backbone` knows the name."""
    if arch in (*VITS, *XCITS):
        return True
    import timm

    return arch.removesuffix(CIFAR) in torchvision_names() or timm.is_model(arch)


def small_stem(model: nn.Module, arch: str) -> nn.Module:
    """A ResNet for small images, in place: 3 x 3 convolution of stride 1 and no pooling before the first stage
    (SimCLR, arXiv 2002.05709, appendix B.9). Its feature maps have four times the side, at over ten times the cost.
    """
    stem = getattr(model, "conv1", None)
    if not isinstance(stem, nn.Conv2d) or not hasattr(model, "maxpool"):
        raise ValueError(f"--arch {arch}: only torchvision's ResNets have a stem for small images")
    model.conv1 = nn.Conv2d(stem.in_channels, stem.out_channels, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's
    model.maxpool = nn.Identity()
    return model


def _build_torchvision(arch: str, drop_path_rate: float, in_chans: int, **kwargs) -> tuple[nn.Module, int]:
    import torchvision
    from torchvision.ops import StochasticDepth

    if arch in ("googlenet", "inception_v3"):  # a backbone has no auxiliary classifiers
        kwargs |= {"aux_logits": False, "init_weights": True}
    model = torchvision.models.get_model(arch, weights=None, **kwargs)
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    name, classifier = layers[-1]
    width = classifier.in_features if isinstance(classifier, nn.Linear) else classifier.in_channels
    model.set_submodule(name, nn.Identity())
    depths = [m for m in model.modules() if isinstance(m, StochasticDepth)]
    for i, depth in enumerate(depths):  # torchvision's default rate is not 0, which would affect the teacher
        depth.p = drop_path_rate * i / max(len(depths) - 1, 1)
    if in_chans != 3:
        name, stem = next((n, m) for n, m in layers if isinstance(m, nn.Conv2d))
        new = nn.Conv2d(in_chans, stem.out_channels, stem.kernel_size, stem.stride, stem.padding,
                        bias=stem.bias is not None)
        model.set_submodule(name, new)
    return model, width


def _build_timm(arch: str, drop_path_rate: float, in_chans: int, **kwargs) -> tuple[nn.Module, int]:
    import timm

    name = XCITS.get(arch, arch)
    if not timm.is_model(name):
        raise ValueError(f"--arch {arch}: no such network; {near_names(arch)}")
    options = {"pretrained": False, "num_classes": 0, "in_chans": in_chans, **kwargs}
    if drop_path_rate > 0:
        options["drop_path_rate"] = drop_path_rate
    try:  # dynamic_img_size: without it, a timm ViT accepts one input size only and fails on local crops
        model = timm.create_model(name, dynamic_img_size=True, **options)
    except (TypeError, AssertionError):
        try:
            model = timm.create_model(name, **options)
        except (TypeError, AssertionError) as error:
            raise ValueError(f"--arch {arch}: {error}; leave the option out for this network") from error
    if name.startswith("xcit_"):
        model.register_load_state_dict_pre_hook(take_published_xcit)
    return model, getattr(model, "head_hidden_size", None) or model.num_features


def take_published_xcit(model: nn.Module, state: dict[str, Tensor], prefix: str, *_) -> None:
    """Before `load_state_dict`: tensors under the published XCiT names get timm's, in place."""
    from timm.models.xcit import checkpoint_filter_fn

    own = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
    state.update({prefix + name: value for name, value in checkpoint_filter_fn(own, model).items()})


def near_names(arch: str) -> str:
    import timm

    known = [*VITS, *XCITS, *torchvision_names(), *timm.list_models()]
    near = difflib.get_close_matches(arch, known, n=5, cutoff=0.5) or list(VITS)
    return "similar names: " + ", ".join(dict.fromkeys(near))
