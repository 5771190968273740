"""Pairs of layers that keep less for the backward pass: what lies between the two is cheap, and computed again there.

Of the 16 D values a token that a block of width D keeps, 4 D are the MLP's after GELU and 2 D those after the norms.
One function of both layers keeps what goes into the pair alone. Values and gradients are those of the layers.

Where a pair is not what it was built as (another class, a hook on one of them), and under torch.compile, which chooses
by itself what to compute again, the layers run one after the other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def is_observed(module: nn.Module) -> bool:
    """Whether somebody listens to what goes in or out of a module, forwards or backwards."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                or module._backward_pre_hooks)


def pairs(first: nn.Module, kind: type[nn.Module], linear: nn.Module, x: Tensor) -> bool:
    """Whether `linear(first(x))` may run as one function."""
    if type(first) is not kind or type(linear) is not nn.Linear or is_observed(first) or is_observed(linear):
        return False
    return x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def norm_linear(norm: nn.Module, linear: nn.Module, x: Tensor) -> Tensor:
    """linear(norm(x)), keeping x: (..., D) -> (..., out)."""
    if pairs(norm, nn.LayerNorm, linear, x) and norm.elementwise_affine and x.dtype == norm.weight.dtype:
        return NormLinear.apply(x, norm.weight, norm.bias, norm.eps, linear.weight, linear.bias)
    return linear(norm(x))


def gelu_linear(gelu: nn.Module, linear: nn.Module, x: Tensor) -> Tensor:
    """linear(gelu(x)), keeping x: (..., hidden) -> (..., out)."""
    if pairs(gelu, nn.GELU, linear, x) and gelu.approximate == "none":
        return GeluLinear.apply(x, linear.weight, linear.bias)
    return linear(gelu(x))


class NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gain, shift, eps, weight, bias):
        y, mean, rstd = torch.native_layer_norm(x, gain.shape, gain, shift, eps)
        ctx.save_for_backward(x, mean, rstd, gain, shift, weight, bias)
        ctx.eps = eps
        return F.linear(y, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, mean, rstd, gain, shift, weight, bias = ctx.saved_tensors
        y = torch.native_layer_norm(x, gain.shape, gain, shift, ctx.eps)[0]
        grad_y, *grads = linear_backward(grad, y, weight, bias)
        grad_x, grad_gain, grad_shift = torch.ops.aten.native_layer_norm_backward(
            grad_y.to(x.dtype), x, gain.shape, mean, rstd, gain, shift, [True, True, shift is not None])
        return grad_x, grad_gain, grad_shift, None, *grads


class GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        grad_y, *grads = linear_backward(grad, F.gelu(x), weight, bias)
        return torch.ops.aten.gelu_backward(grad_y.to(x.dtype), x), *grads


def linear_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients of F.linear(x, weight, bias) by its arguments; products in grad's type, the half one under autocast."""
    rows = grad.flatten(0, -2)
    grad_weight = rows.T @ x.to(grad.dtype).flatten(0, -2)
    grad_bias = rows.sum(0).to(bias.dtype) if bias is not None else None
    return grad @ weight.to(grad.dtype), grad_weight.to(weight.dtype), grad_bias
