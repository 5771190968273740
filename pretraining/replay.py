"""Recomputes a step whose loss or gradient was not finite (failures.py), and prints where it fails.

    python main_dino.py --replay output/failure.pt      # or main_dinov2.py, which names it when a run fails

Shapes: B images per process and micro-batch, L local crops, V = 2 + L views, K prototypes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import utils
from parallel import Refused
from pretraining.failures import KEPT, NAME
from pretraining.state import dtype_named
from weights import checkpoints


class Method(NamedTuple):
    """What a step needs, built from the flags of a run; the weights are loaded afterwards."""

    student: nn.Module
    teacher: nn.Module
    dino_loss: nn.Module
    finish: Callable[[list[Tensor], Tensor], list[Tensor]]  # uint8 crops, parameters -> normalized crops
    losses: Callable[[list[Tensor], Mapping, int], tuple[Tensor, dict]]  # crops, batch, step -> loss, parts
    details: Callable[[Any, Mapping, int], str]  # student's output, parts, step -> a look inside the loss
    frozen: nn.Module | None = None  # makes the targets in distillation, where the teacher takes no part in the step


Build = Callable[[Mapping, Mapping], Method]
SCRIPTS = {"dino": "main_dino.py", "dinov2": "main_dinov2.py"}


def replay(path: str, device: torch.device, build: Build, method: str = "dino") -> None:
    """Recompute the step in its own precision (without torch.compile) and in float32, and print the first output that
    is not finite.

    Args:
        build: makes the method from (flags, {"epochs", "steps_per_epoch"}), as stored in failure.pt.
        method: that `build` makes, of SCRIPTS.

    Raises:
        Refused: the file does not exist, it is no failure.pt, or that of the other method.
    """
    try:
        failure = checkpoints.read(path)
    except (FileNotFoundError, ValueError) as error:
        raise Refused(f"--replay {error}; give the {NAME} that a run wrote") from error
    if "crops" not in failure:
        raise Refused(f"--replay {path}: not a {NAME}; give the one that a run of {SCRIPTS[method]} wrote")
    script = SCRIPTS[failure["args"].get("method", "dino")]
    if script != SCRIPTS[method]:
        raise Refused(f"--replay {path}: a run of {script} wrote it; python {script} --replay {path}")
    print(f"step {failure['step']} of rank {failure['rank']}, images {failure['index'][0].tolist()}"
          + (" ..." if len(failure["index"]) > 1 else ""))
    if alone := over_processes(failure):
        print(f"WARNING: {alone} saw the images of all {failure['args']['world_size']} processes in the run, and sees "
              "those of this rank here: what follows may differ from the step of the run")
    for name in ("student", "teacher"):
        largest, bad = largest_of(failure[name])
        print(f"{name}'s parameters before the step: max |w| {largest:g}"
              + (f"; NOT FINITE: {', '.join(bad[:5])}" if bad else ""))
    dtype = dtype_named(failure["dtype"])
    failed = compute(failure, build, device, dtype)
    if dtype is not None:
        print("\nthe same in float32")
        failed = compute(failure, build, device, None)
    print(f"\nin float32 the step is {'not finite either' if failed else 'finite'}")


def over_processes(failure: Mapping) -> str:
    """What a run of several processes computed over the images of all of them; "": nothing."""
    args = failure["args"]
    used = {"Sinkhorn-Knopp": args.get("centering") == "sinkhorn_knopp",
            "KoLeo (--koleo_all_processes)": args.get("koleo_all_processes") and args["koleo_loss_weight"],
            "batch norm": "cuda" in failure["rng"] and any(k.endswith("running_mean") for k in failure["student"])}
    return ", ".join(name for name, is_used in used.items() if is_used) if args.get("world_size", 1) > 1 else ""


def largest_of(tensors: Mapping[str, Tensor]) -> tuple[float, list[str]]:
    """(largest finite magnitude in the tensors, names of the tensors with values that are not finite)."""
    floating = {k: v for k, v in tensors.items() if v.is_floating_point() and v.numel()}
    bad = [k for k, v in floating.items() if not torch.isfinite(v).all()]
    return max((v.nan_to_num(0, 0, 0).abs().max().item() for v in floating.values()), default=0.0), bad


def compute(failure: Mapping, build: Build, device: torch.device, dtype: torch.dtype | None) -> bool:
    """Run one step forward and backward, under autocast if `dtype` is given. Returns whether it is not finite."""
    student, teacher, dino_loss, finish, losses, details, frozen = build(failure["args"], failure)
    for module, state in ((student, "student"), (teacher, "teacher"), (dino_loss, "dino_loss")):
        module.load_state_dict(failure[state])
        module.to(device)
    checkpoints.set_torch_rng_state(failure["rng"], device)
    targets = {"teacher": watch_outputs(teacher)} if frozen is None else {"frozen network": watch_outputs(frozen)}
    outputs = targets | {"student": watch_outputs(student)}
    student_outputs: list = []  # of each micro-batch
    student.register_forward_hook(lambda module, inputs, output: student_outputs.append(output))
    finite = True
    for micro in range(len(failure["crops"])):
        batch = {key: failure[key][micro] for key in KEPT if key in failure}
        crops = finish([c.to(device) for c in batch["crops"]], batch["params"])
        print(f"micro-batch {micro}: crops max |x| {max(c.abs().max().item() for c in crops):g}")
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss, parts = losses(crops, batch, failure["step"])
        finite &= bool(torch.isfinite(loss))
        print(f"  loss {loss.item():g}; {details(student_outputs[-1], parts, failure['step'])}")
        (loss / len(failure["crops"])).backward()
    grads = {k: p.grad for k, p in student.named_parameters() if p.grad is not None}
    bad = [report(name, magnitudes) for name, magnitudes in outputs.items()] + [report_gradients(grads)]
    return any(bad) or not finite


def view_losses(dino_loss: utils.DINOLoss, student_out: Tensor, teacher_out: Tensor, epoch: int) -> Tensor:
    """(V,): cross-entropy of each student view, averaged over the images and the global views it is compared with."""
    q = dino_loss.targets(teacher_out, epoch).unflatten(0, (2, -1))  # (2, B, K)
    log_p = (student_out.detach().float() / dino_loss.student_temp).log_softmax(-1).unflatten(0, (dino_loss.ncrops, -1))
    return torch.stack([torch.stack([-(q[i] * log_p[v]).sum(-1).mean() for i in range(2) if i != v]).mean()
                        for v in range(dino_loss.ncrops)])


def watch_outputs(network: nn.Module) -> list[tuple[str, float, bool]]:
    """A list that fills up in the forward pass: (name, max |x|, whether x is finite) of each module's output x."""
    magnitudes = []

    def note(name: str):
        def hook(module, inputs, output) -> None:
            for x in output if isinstance(output, tuple) else (output,):
                if isinstance(x, Tensor) and x.is_floating_point():
                    magnitudes.append((name, x.detach().abs().max().item(), bool(torch.isfinite(x).all())))
        return hook

    for name, module in network.named_modules():
        module.register_forward_hook(note(name or "network"))
    return magnitudes


def report(name: str, magnitudes: list[tuple[str, float, bool]]) -> bool:
    """Print the first output of a network that is not finite, after the three before it. Returns whether there is one.
    """
    bad = next((i for i, (_, _, finite) in enumerate(magnitudes) if not finite), None)
    if bad is None:
        module, largest, _ = max(magnitudes, key=lambda entry: entry[1])
        print(f"  {name}: all outputs are finite; largest in {module}: max |x| {largest:g}")
        return False
    for module, largest, finite in magnitudes[max(0, bad - 3) : bad + 1]:
        print(f"  {name}: {module} max |x| {largest:g}" + ("" if finite else "  <- the first that is not finite"))
    return True


def report_gradients(grads: Mapping[str, Tensor]) -> bool:
    """Print the largest gradient and those that are not finite. Returns whether there are any."""
    largest, bad = largest_of(grads)
    print(f"  gradients: max |g| {largest:g}"
          + (f"; not finite: {len(bad)} of {len(grads)}, among them {bad[-1]}" if bad else ""))
    return bool(bad)
