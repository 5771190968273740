"""The Triton kernels of short sequences against softmax(q k^T) v in float64, in Triton's interpreter."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from processes import ENV

pytest.importorskip("triton")

CHECK = """
import json, sys
sys.path.insert(0, "benchmarks")
import torch
import short_attention as attention

def off(a, b):
    return ((a.double() - b).norm() / b.norm()).item()

errors = []
for dtype, B, N, H, d in ((torch.float32, 2, 37, 3, 64), (torch.float32, 3, 64, 2, 32), (torch.float32, 1, 1, 1, 16),
                          (torch.float16, 2, 17, 2, 64)):
    torch.manual_seed(0)
    qkv, grad = torch.randn(B, N, 3, H, d).to(dtype).requires_grad_(), torch.randn(B, N, H * d).to(dtype)
    out = attention.attention(qkv, 0.3)
    (actual,) = torch.autograd.grad(out, qkv, grad)
    x = qkv.detach().double().requires_grad_()
    q, k, v = x.permute(2, 0, 3, 1, 4)
    expected = ((q @ k.mT * 0.3).softmax(-1) @ v).transpose(1, 2).flatten(2)
    (expected_grad,) = torch.autograd.grad(expected, x, grad.double())
    errors.append((str(dtype), off(out, expected), off(actual, expected_grad)))
assert attention.attention(torch.empty(0, 37, 3, 2, 16), 1.0).shape == (0, 37, 32)
print(json.dumps(errors))
"""


def test_kernels_are_exact():
    done = subprocess.run([sys.executable, "-c", CHECK], cwd=ROOT, env=ENV | {"TRITON_INTERPRET": "1"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for dtype, *errors in json.loads(done.stdout):
        assert max(errors) < (1e-6 if dtype == "torch.float32" else 1e-3), (dtype, errors)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_on_a_gpu(dtype):
    from short_attention import attention

    torch.manual_seed(0)
    qkv = torch.randn(64, 37, 3, 6, 64, device="cuda").to(dtype).requires_grad_()
    q, k, v = qkv.double().permute(2, 0, 3, 1, 4)
    out, exact = attention(qkv, 0.125), ((q @ k.mT * 0.125).softmax(-1) @ v).transpose(1, 2).flatten(2)
    grad = torch.randn_like(exact)
    (actual,), (expected,) = torch.autograd.grad(out, qkv, grad.to(dtype)), torch.autograd.grad(exact, qkv, grad)
    for a, b in ((out, exact), (actual, expected)):
        assert (a.double() - b).norm() / b.norm() < 4e-3
