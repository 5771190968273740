"""A step whose loss or gradient was not finite: kept in failure.pt, and computed again with a look inside.

    python main_dino.py --replay output/failure.pt

Shapes: B images a process and micro-batch, L local crops, V = 2 + L views, K prototypes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

import parallel
import utils
from pretraining import metrics
from pretraining.run import Run, build_loss, build_networks, dtype_named, make_augmentation, plain_args
from weights import checkpoints

NAME = "failure.pt"


# ---- Keeping it ----


def save_failure(run: Run, found: metrics.NonFinite, batches: Iterable[dict], rng: dict, momenta: np.ndarray) -> str:
    """Write what computing the failed step again needs; every process calls it, the one that failed first writes.

    The student's weights and the centre are left alone from the failed step on (with --precision fp16, weights only
    where gradients overflow). The teacher has followed the student in vain since: that is taken back, to rounding.

    Args:
        batches: the micro-batches of that step on this process, as the loader gives them.
        rng: torch's random state before the step (see torch_rng).
        momenta: the teacher's in each update since, (n,).

    Returns:
        The file.
    """
    path = os.path.join(run.args.output_dir, NAME)
    student, teacher = run.network_state("student"), run.network_state("teacher")  # of all processes: may be sharded
    if parallel.rank() == found.rank:
        batches = list(batches)
        checkpoints.save({
            "step": found.step, "epoch": found.step // run.plan.steps_per_epoch, "rank": found.rank,
            "args": plain_args(run.args, len(run.images)), "student": student,
            "teacher": without_updates(teacher, student, [k for k, _ in run.teacher.named_parameters()], momenta),
            "dino_loss": run.dino_loss.state_dict(), "rng": rng, "dtype": str(run.dtype), "epochs": run.plan.epochs,
            "crops": [b["crops"] for b in batches], "params": [b["params"] for b in batches],
            "index": [b["index"] for b in batches],
        }, path)  # fmt: skip
    parallel.barrier()
    return path


def without_updates(teacher: dict, student: dict, names: list[str], momenta: np.ndarray) -> dict:
    """The parameters t of t' = m t + (1 - m) s, in float64: that of n updates has the product of their m."""
    m = float(np.prod(momenta))
    if m == 0:  # nothing of it is left
        return teacher
    before = {k: (student[k].double() + (teacher[k].double() - student[k].double()) / m).to(teacher[k].dtype)
              for k in names}
    return teacher | before


def torch_rng(device: torch.device) -> dict[str, Tensor]:
    """torch's random state on the CPU and this device: stochastic depth and dropout follow from it."""
    state = {"torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


# ---- Computing it again ----


def replay(path: str, device: torch.device) -> None:
    """Print what the step's crops do to its weights, as it was computed (without torch.compile) and in float32."""
    try:
        failure = checkpoints.read(path)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"--replay {error}; give the {NAME} that a run left") from error
    if "crops" not in failure:
        raise ValueError(f"--replay {path}: not a {NAME} of this script; give the one that a run left")
    args = argparse.Namespace(**failure["args"] | {"init_from": "", "compile": None, "grad_checkpointing": None})
    print(f"step {failure['step']} of rank {failure['rank']}, images {failure['index'][0].tolist()}"
          + (" ..." if len(failure["index"]) > 1 else ""))
    for name in ("student", "teacher"):
        largest, bad = largest_of(failure[name])
        print(f"{name}'s parameters before the step: max |w| {largest:g}"
              + (f"; NOT FINITE: {', '.join(bad[:5])}" if bad else ""))
    dtype = dtype_named(failure["dtype"])
    found = compute(failure, args, device, dtype)
    if dtype is not None:
        print("\nthe same in float32")
        found = compute(failure, args, device, None)
    print(f"\nin float32 the step is {'not finite either' if found else 'finite'}")


def largest_of(tensors: dict[str, Tensor]) -> tuple[float, list[str]]:
    """Largest finite magnitude in the tensors, and the names of those that are not all finite."""
    floating = {k: v for k, v in tensors.items() if v.is_floating_point() and v.numel()}
    bad = [k for k, v in floating.items() if not torch.isfinite(v).all()]
    return max((v.nan_to_num(0, 0, 0).abs().max().item() for v in floating.values()), default=0.0), bad


def compute(failure: dict, args: argparse.Namespace, device: torch.device, dtype: torch.dtype | None) -> bool:
    """One step forward and back, in `dtype` where it is given. Returns whether something in it was not finite."""
    student, teacher = build_networks(args, device)
    for name, network in (("student", student), ("teacher", teacher)):
        network.load_state_dict(failure[name])
    dino_loss = build_loss(args, failure["epochs"]).to(device)
    dino_loss.load_state_dict(failure["dino_loss"])
    torch.set_rng_state(failure["rng"]["torch"])
    if device.type == "cuda" and "cuda" in failure["rng"]:
        torch.cuda.set_rng_state(failure["rng"]["cuda"], device)
    seen = {"teacher": watch_outputs(teacher), "student": watch_outputs(student)}
    augmentation, finite = make_augmentation(args), True
    for micro, (crops, params) in enumerate(zip(failure["crops"], failure["params"], strict=True)):
        crops = augmentation.finish([c.to(device) for c in crops], params)
        print(f"micro-batch {micro}: crops max |x| {max(c.abs().max().item() for c in crops):g}")
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            with torch.no_grad():
                teacher_out = teacher(crops[:1])  # (2B, K)
            student_out = student(crops)  # (VB, K)
        loss = dino_loss(student_out, teacher_out, failure["epoch"], update_center=False)
        finite &= bool(torch.isfinite(loss))
        losses = view_losses(dino_loss, student_out.detach(), teacher_out, failure["epoch"])
        print(f"  loss {loss.item():g}; by the student's view: {' '.join(f'{x:g}' for x in losses.tolist())}")
        (loss / args.grad_accum_steps).backward()
    grads = {k: p.grad for k, p in student.named_parameters() if p.grad is not None}
    bad = [report(name, outputs) for name, outputs in seen.items()] + [report_gradients(grads)]
    return any(bad) or not finite


def view_losses(dino_loss: utils.DINOLoss, student_out: Tensor, teacher_out: Tensor, epoch: int) -> Tensor:
    """(V,): each view's mean cross-entropy over the images and the teacher's other global views."""
    q = dino_loss.teacher_probabilities(teacher_out, epoch).unflatten(0, (2, -1))  # (2, B, K)
    log_p = (student_out.float() / dino_loss.student_temp).log_softmax(-1).unflatten(0, (dino_loss.ncrops, -1))
    return torch.stack([torch.stack([-(q[i] * log_p[v]).sum(-1).mean() for i in range(2) if i != v]).mean()
                        for v in range(dino_loss.ncrops)])


def watch_outputs(network: nn.Module) -> list[tuple[str, float, bool]]:
    """A list to which each module's output adds (name, largest magnitude, whether it is finite), in turn."""
    seen = []

    def note(name: str):
        def hook(module, inputs, output) -> None:
            for x in output if isinstance(output, tuple) else (output,):
                if isinstance(x, Tensor) and x.is_floating_point():
                    seen.append((name, x.detach().abs().max().item(), bool(torch.isfinite(x).all())))
        return hook

    for name, module in network.named_modules():
        module.register_forward_hook(note(name or "all of it"))
    return seen


def report(name: str, seen: list[tuple[str, float, bool]]) -> bool:
    """Print where a network's outputs first leave the finite numbers. Returns whether they do."""
    bad = next((i for i, (_, _, finite) in enumerate(seen) if not finite), None)
    if bad is None:
        module, largest, _ = max(seen, key=lambda s: s[1])
        print(f"  {name}: all outputs are finite; the largest is of {module}: max |x| {largest:g}")
        return False
    for module, largest, finite in seen[max(0, bad - 3) : bad + 1]:
        print(f"  {name}: {module} max |x| {largest:g}" + ("" if finite else "  <- the first that is not finite"))
    return True


def report_gradients(grads: dict[str, Tensor]) -> bool:
    largest, bad = largest_of(grads)
    print(f"  gradients: max |g| {largest:g}"
          + (f"; not finite: {len(bad)} of {len(grads)}, among them {bad[-1]}" if bad else ""))
    return bool(bad)
