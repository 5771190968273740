"""Time of a profiled step by kind of work: matrix products, attention, norms and so on (train_step.py --profile).

An operation's kind follows from what surrounds it (the update of the weights, the loss), from the shapes of its
arguments (K prototypes), and otherwise from its name, or on a GPU the kernel's name, by the table PATTERNS. The
backward pass of the patch embedding, and under torch.compile its forward pass, are products like others.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

UPDATE = "update"  # the annotation that surrounds clipping, optimizer and EMA in ours.Trainer.step
STEP = "step"  # the annotation that surrounds each profiled step

MATMUL, ATTENTION, NORMS, ACTIVATION = "matrix products", "attention", "norms", "activation"
RESIDUAL, PATCHES, LOSS = "residual and other elementwise", "patch embedding, convolutions", "loss and prototypes"
OPTIMIZER, COPIES, REST = "optimizer, EMA, clipping", "copies and casts", "no operation running"
KINDS = (MATMUL, ATTENTION, NORMS, ACTIVATION, RESIDUAL, PATCHES, LOSS, OPTIMIZER, COPIES)

SURROUNDED = ((OPTIMIZER, re.compile(UPDATE + "$")), (PATCHES, re.compile(PATCHES)),
              (LOSS, re.compile("PairsOfViews|WeightNorm|_weight_norm")))

# The first pattern that occurs in the name decides. A compiled kernel is called after all operations that it fuses.
PATTERNS = tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in (
    (ATTENTION, "scaled_dot_product|sdpa|flash|fmha|efficient_attention|dot_do_o|convert_dq"),
    (OPTIMIZER, "multi_tensor_apply|foreach|adamw"),
    (LOSS, "softmax|logsumexp|weight_norm|vector_norm"),
    (NORMS, "layer_?norm|batch_?norm|GammaBeta|bn_(fw|bw)"),
    (PATCHES, "conv(?!ert)|unfold|im2col|nchwToNhwc"),
    (MATMUL, r"nvjet|gemm|matmul|cutlass|splitK|addmm|\bmm\b|bmm|linear"),
    (ACTIVATION, "gelu|silu"),
    (COPIES, "copy|(?<!no)cast|clone|contiguous|CatArray|::cat|_cat_|^cat|memcpy|memset|fill|zero"),
    (RESIDUAL, ""),
))


class Operation(NamedTuple):
    """Something that took time of its own, without what it called."""

    name: str
    ms: float
    around: tuple[str, ...] = ()  # names of what surrounds it, and its own
    shapes: str = ""  # of its arguments


def kind_of(operation: Operation, prototypes: int = 0) -> str:
    """Args: prototypes: K; an operation with an argument of that size is the head's or the loss's. 0: unknown."""
    for kind, pattern in SURROUNDED:
        if any(pattern.match(name) or kind == LOSS and pattern.search(name) for name in operation.around):
            return kind
    kind = next(kind for kind, pattern in PATTERNS if pattern.search(operation.name))
    with_k = prototypes and kind in (MATMUL, RESIDUAL, COPIES) and re.search(rf"\b{prototypes}\b", operation.shapes)
    return LOSS if with_k else kind


def by_kind(trace: dict, prototypes: int = 0) -> dict[str, float]:
    """{kind: ms} of all KINDS and REST, whose sum is the duration of the profiled steps.

    Args:
        trace: what torch.profiler's `export_chrome_trace` writes, with the shapes of arguments. Without kernels in it,
            the operations of the CPU count.
    """
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X"]
    on_device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    operations = list(kernels(events, on_device) if on_device else own_times(events))
    times = Counter()
    for operation in operations:
        times[kind_of(operation, prototypes)] += operation.ms
    if on_device:
        total = (max(e["ts"] + e["dur"] for e in on_device) - min(e["ts"] for e in on_device)) / 1000
    else:
        total = sum(e["dur"] for e in events if e["name"] == STEP) / 1000
    return {kind: times[kind] for kind in KINDS} | {REST: total - sum(times.values())}


def kernels(events: Sequence[dict], on_device: Sequence[dict]) -> Iterator[Operation]:
    """Kernels with what surrounds the operations that launched them."""
    launching = {e["args"]["External id"]: (around, e) for around, e, _ in nested(events) if e["cat"] == "cpu_op"
                 and "External id" in e.get("args", {})}
    for kernel in on_device:
        around, launch = launching.get(kernel.get("args", {}).get("External id"), ((), {}))
        yield Operation(kernel["name"], kernel["dur"] / 1000, around, shapes(launch))


def own_times(events: Sequence[dict]) -> Iterator[Operation]:
    """Operations of the CPU inside of the steps."""
    for around, event, own in nested(events):
        if event["cat"] == "cpu_op" and STEP in around:
            yield Operation(event["name"], own / 1000, around, shapes(event))


def shapes(event: dict) -> str:
    return str(event.get("args", {}).get("Input Dims", ""))


def nested(events: Sequence[dict]) -> Iterator[tuple[tuple[str, ...], dict, float]]:
    """Yields (names of what surrounds an event, and its own; the event; its time without what it surrounds)."""
    threads = defaultdict(list)
    for event in events:
        if event.get("cat") in ("cpu_op", "user_annotation"):
            threads[event["tid"]].append(event)
    for thread in threads.values():
        inside, stack, chains = Counter(), [], []
        for event in sorted(thread, key=lambda e: (e["ts"], -e["dur"])):
            while stack and event["ts"] >= stack[-1]["ts"] + stack[-1]["dur"]:
                stack.pop()
            if stack:
                inside[id(stack[-1])] += event["dur"]
            stack.append(event)
            chains.append((tuple(e["name"] for e in stack), event))
        for names, event in chains:
            yield names, event, event["dur"] - inside[id(event)]
