"""What surrounds a training loop, whatever the method: resume, log, evaluate and save at the ends of epochs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

from torch import Tensor, nn

import flags
import parallel
from imagesets.bad_images import BadImages
from imagesets.pixels import Pixels
from imagesets.sources import Images
from parallel import Refused
from pretraining import faults, monitor, same_images
from pretraining.evaluation import KnnEvaluation
from pretraining.faults import TO_BE_CONTINUED
from pretraining.logs import Log
from pretraining.meters import Clock, Meters
from pretraining.owner import owned
from pretraining.plan import Plan
from pretraining.state import Run
from weights import checkpoints

Losses = Callable[[nn.Module, list[Tensor], dict], tuple[Tensor, dict]]


class Ends(NamedTuple):
    """What happens at the ends of epochs, and on which data."""

    images: Images
    evaluation: KnnEvaluation | None
    eval_knn_every: int  # epochs
    saveckp_freq: int  # epochs
    pictures_every: int  # epochs
    crop_size: int
    mean: Sequence[float]
    std: Sequence[float]
    source: Images | None = None  # what the loader reads instead of `images`
    pixels: Pixels | None = None  # cuts the crops on the device


@contextmanager
def memory_refused():
    """Memory that runs out while a run is set up is bad input."""
    try:
        yield
    except Exception as error:  # the type depends on what can't be made that large
        if not (reason := faults.out_of_memory(error)):
            raise
        raise Refused(reason) from error


def carry_out(
    run: Run, plan: Plan, ends: Ends, description: str, train: Callable[[Log], bool], extend: bool = False,
    tensorboard: bool = False, wandb_config: Mapping | None = None,
) -> int:
    """Resume if there is something to resume, train, and return the exit code.

    Args:
        description: printed first.
        extend: the run may be longer than the checkpoint's, or on more images.
        train: trains from `run.step` to the end and returns True, or False if a signal ended it early.
    """
    run.image_sample = same_images.sample(ends.images)
    latest = run.find_checkpoint(extend)
    flags.prepare_output(run.folder)
    with owned(run.folder):
        if parallel.is_main():
            checkpoints.remove_temporary(run.folder)
        parallel.say(description)
        knn = known_accuracies(run, latest[0] if latest else None, ends.evaluation)
        if latest:
            run.resume(*latest)
            parallel.say(f"resuming from {latest[1]} at step {run.step} of {plan.steps}")
        run.knn = knn
        del latest  # its memory
        log = Log(run.folder, run.step, plan.steps, tensorboard=tensorboard, wandb_config=wandb_config)
        try:
            finished = train(log)
        finally:
            log.close()
        if not finished:
            parallel.say(f"stopped by a signal and saved; start again to continue (exit code {TO_BE_CONTINUED})")
            return TO_BE_CONTINUED
        backbone = run.teacher_backbone()  # all processes help, where it is sharded
        if parallel.is_main():
            names = monitor.save_last_figures(run.folder, ends.images, backbone, ends.crop_size, ends.mean, ends.std)
            print(f"wrote {', '.join(names)}, log.txt and {run.last_saved} in {run.folder}", flush=True)
    return 0


def known_accuracies(run: Run, state: Mapping | None, evaluation: KnnEvaluation | None) -> dict:
    """What the checkpoint `state` knows of k-NN, without figures on other images; baselines, where it has none.

    Call before the run is resumed: its weights are those that it began with, if --init_from is as it was then.
    """
    knn = dict(state["knn"]) if state else {}
    if not evaluation:
        return knn
    data = evaluation.identity()
    if knn.get("data", data) != data:
        parallel.say("k-NN is from here on measured on other images of --eval_data_path (or --data_path): the best "
                     "accuracy and the baselines of those so far are dropped")
        knn = {}
    if not {"untrained", "start", "pixels"} & knn.keys():
        given = run.settings["init_from"]
        same = not state or (state["args"].get("init_from") or "") == given
        knn |= evaluation.baselines(run.teacher_backbone() if same else None, run.autocast(),
                                    "start" if given else "untrained")
    return knn | {"data": data}


def add_gradients(
    run: Run, student: nn.Module, losses: Losses, finish: Callable[[list[Tensor], Tensor], list[Tensor]],
    batches: Iterator[dict], bad_images: BadImages, clock: Clock, grad_accum_steps: int,
) -> tuple[dict[str, Tensor], dict]:
    """Add the gradients of a step's micro-batches to the student's parameters.

    Args:
        student: run.student, or what makes its gradients those of all processes.
        losses: (student, crops, batch) -> (loss, parts), the method.
        finish: uint8 crops and their parameters -> normalized crops.

    Returns:
        The scalars among the parts, and all parts. Scalars and parts called `..._mean` are means over the
        micro-batches that have them (not None), the others are those of the last micro-batch.
    """
    values: dict[str, list[Tensor]] = {}
    for micro in range(grad_accum_steps):
        batch = clock.next(batches)
        bad_images.add(batch["bad"])
        crops = finish(batch["crops"], batch["params"])
        last = micro == grad_accum_steps - 1
        with nullcontext() if last or student is run.student else student.no_sync():
            with run.autocast():
                loss, parts = losses(student, crops, batch)
            run.scaler.scale(loss / grad_accum_steps).backward()
        for name, value in parts.items():
            if isinstance(value, Tensor) and (name.endswith("_mean") or value.ndim == 0):
                values.setdefault(name, []).append(value)
    means = {name: sum(several) / len(several) for name, several in values.items()}
    return {name: value for name, value in means.items() if value.ndim == 0}, parts | means


def end_epoch(run: Run, plan: Plan, epoch: int, ln_k: float, ends: Ends, log: Log) -> None:
    """k-NN when it is due, the line of the epoch, then the checkpoints.

    The checkpoint to resume from is written last: after a kill before it, the rest of the epoch is repeated, and
    with it the others are written.
    """
    run.watch.check(run.last_saved)
    last, names, warning = run.step == plan.steps, [], None
    if ends.saveckp_freq and (epoch + 1) % ends.saveckp_freq == 0:
        names.append(f"checkpoint{epoch:04d}.pth")
    if ends.evaluation and ((epoch + 1) % ends.eval_knn_every == 0 or last):
        top1, top5 = ends.evaluation.knn(run.teacher_backbone(), run.autocast())
        best = max(run.knn.get("best", -1), run.knn.get("start", -1))
        run.knn |= {"epoch": epoch, "top1": top1, "top5": top5, "best": max(best, top1)}
        if top1 > best:
            run.knn["best_epoch"] = epoch
            names.append(checkpoints.BEST)
        warning = below_start(top1, run.knn.get("start"), len(ends.evaluation.parts[1]))
    monitor.log_epoch(log, epoch, run.step, run.meters.means(), ln_k, run.knn if ends.evaluation else {})
    if warning:
        parallel.say(f"WARNING: {warning}")
    if last or (ends.pictures_every and (epoch + 1) % ends.pictures_every == 0):
        draw(run, ends, log, f"epoch{epoch:04d}")
    run.meters = Meters()
    run.save(*names, checkpoints.NAME)


def below_start(top1: float, start: float | None, images: int) -> str | None:
    """A line if k-NN accuracy is below that of the starting weights by more than 2 points and more than chance.

    Args:
        top1, start: in %; start is None where a run does not start from a file.
        images: of the evaluation, which give `start` a 95 % interval.
    """
    if start is None or start - top1 <= max(2.0, 1.96 * math.sqrt(start * (100 - start) / images)):
        return None
    return (f"20-NN top-1 {top1:.1f} % is {start - top1:.1f} points below the starting weights, so the file of "
            "--init_from is still the better network; try a lower --lr, such as a tenth")


def draw(run: Run, ends: Ends, log: Log, when: str) -> None:
    """Figures of the teacher on six fixed images, where --pictures_every asks for them."""
    if ends.pictures_every:
        backbone = run.teacher_backbone()  # all processes help, where it is sharded
        if parallel.is_main():
            log.pictures(monitor.draw(ends.images, backbone, ends.crop_size, ends.mean, ends.std), when, run.step)
