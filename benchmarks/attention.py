"""Attention on this device, forward and backward: the plain product of matrices against the fused kernel.

    python benchmarks/attention.py

Prints the fastest of the repeats, interleaved in one run.
"""

import argparse
import time

import torch
import torch.nn.functional as F


def plain(q, k, v):
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def measure(function, qkv: torch.Tensor) -> float:
    started = time.perf_counter()
    function(*qkv.unbind(0)).float().sum().backward()
    qkv.grad = None
    return time.perf_counter() - started


def main(quick: bool) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    print("  B    N      dtype   plain ms   fused ms   ratio")
    for B, N in ((2, 10),) if quick else ((128, 10), (64, 37), (64, 65), (32, 197)):
        for dtype in (torch.float32, torch.bfloat16):
            qkv = torch.randn(3, B, 3, N, 64).to(dtype).requires_grad_()
            times = [(measure(plain, qkv), measure(fused, qkv)) for _ in range(2 if quick else 7)]
            a, b = (1000 * min(column) for column in zip(*times, strict=True))
            print(f"{B:3d} {N:4d} {str(dtype)[6:]:>10} {a:10.1f} {b:10.1f} {b / a:7.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    main(parser.parse_args().quick)
