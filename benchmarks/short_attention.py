"""Attention of short sequences, such as the 37 tokens of a local crop, as one Triton kernel forward and one backward.

A program computes one head of one crop, whose tokens fit into registers. It reads queries, keys and values where the
linear layer wrote them, and the backward kernel writes their gradient in the same layout: a general kernel returns
three gradients, which then have to be copied together. Backward recomputes the weights and saves the input alone.

A variant (variants.py), which enters the project when a measured step is faster with it.

Shapes: B crops, N tokens, H heads of width d, a power of two from 16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LONGEST = 64  # tokens


@torch.library.custom_op("dino::short_attention", mutates_args=())
def attention(qkv: Tensor, scale: float) -> Tensor:
    """softmax(q k^T scale) v of q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]: (B, N, 3, H, d) -> (B, N, H d)."""
    B, N, _, H, d = qkv.shape
    out = qkv.new_empty(B, N, H * d)
    if B:
        _forward[(B * H,)](qkv, out, scale, N, H, d, block(N), precision(qkv))
    return out


@torch.library.custom_op("dino::short_attention_backward", mutates_args=())
def backward(grad: Tensor, qkv: Tensor, scale: float) -> Tensor:
    """Gradient (B, N, 3, H, d) of `attention` for the gradient (B, N, H d) of its result."""
    B, N, _, H, d = qkv.shape
    grad_qkv = torch.empty_like(qkv)
    if B:
        _backward[(B * H,)](grad.contiguous(), qkv, grad_qkv, scale, N, H, d, block(N), precision(qkv))
    return grad_qkv


@attention.register_fake
def _(qkv, scale):
    B, N, _, H, d = qkv.shape
    return qkv.new_empty(B, N, H * d)


@backward.register_fake
def _(grad, qkv, scale):
    return torch.empty_like(qkv)


def save(ctx, inputs, output) -> None:
    qkv, ctx.scale = inputs
    ctx.save_for_backward(qkv)


attention.register_autograd(lambda ctx, grad: (backward(grad, *ctx.saved_tensors, ctx.scale), None),
                            setup_context=save)


def block(tokens: int) -> int:
    return max(16, triton.next_power_of_2(tokens))  # tl.dot wants 16 rows


def precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"  # of tl.dot; without effect in half precision


@triton.jit
def _places(N, HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Of a program: where its queries are in qkv, where its results are in the output, and which rows are tokens."""
    crop, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    token, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, D)[None, :]
    at = (crop * N + token) * (3 * HEADS * D) + head * D + column
    return at, (crop * N + token) * (HEADS * D) + head * D + column, token < N


@triton.jit
def _weights(qkv, at, inside, scale, N, HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
             PRECISION: tl.constexpr):
    q = tl.load(qkv + at, mask=inside, other=0.0)
    k = tl.load(qkv + at + HEADS * D, mask=inside, other=0.0)
    v = tl.load(qkv + at + 2 * HEADS * D, mask=inside, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    scores = tl.where(tl.arange(0, BLOCK)[None, :] < N, scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    return q, k, v, weights / tl.sum(weights, 1)[:, None]


@triton.jit
def _forward(qkv, out, scale, N, HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
             PRECISION: tl.constexpr):
    at, out_at, inside = _places(N, HEADS, D, BLOCK)
    q, k, v, weights = _weights(qkv, at, inside, scale, N, HEADS, D, BLOCK, PRECISION)
    result = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    tl.store(out + out_at, result.to(v.dtype), mask=inside)


@triton.jit
def _backward(grad, qkv, grad_qkv, scale, N, HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
              PRECISION: tl.constexpr):
    at, out_at, inside = _places(N, HEADS, D, BLOCK)
    q, k, v, weights = _weights(qkv, at, inside, scale, N, HEADS, D, BLOCK, PRECISION)
    g = tl.load(grad + out_at, mask=inside, other=0.0)
    grad_v = tl.dot(tl.trans(weights.to(g.dtype)), g, input_precision=PRECISION)
    tl.store(grad_qkv + at + 2 * HEADS * D, grad_v.to(v.dtype), mask=inside)
    grad_weights = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    inner = tl.sum(weights * grad_weights, 1)[:, None]
    grad_scores = (weights * (grad_weights - inner) * scale).to(q.dtype)
    tl.store(grad_qkv + at, tl.dot(grad_scores, k, input_precision=PRECISION).to(q.dtype), mask=inside)
    tl.store(grad_qkv + at + HEADS * D, tl.dot(tl.trans(grad_scores), q, input_precision=PRECISION).to(q.dtype),
             mask=inside)
