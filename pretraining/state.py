"""The state of a run: what a checkpoint holds, and how it is saved and resumed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

import parallel
from parallel import Refused
from pretraining import failures, sharding
from pretraining.meters import Meters, averaged
from pretraining.plan import Plan
from pretraining.same_images import differing
from weights import checkpoints

# Flags that may differ when a run resumes, because they do not change what it computes.
FREE_FLAGS = {
    "data_path", "output_dir", "saveckp_freq", "saveckp_every_steps", "saveckp_every_minutes", "keep_checkpoints",
    "eval_knn_every", "eval_data_path", "log_every", "pictures_every", "tensorboard", "wandb", "device",
    "num_workers", "dist_url", "dist_timeout", "local_rank", "compile", "grad_checkpointing", "max_bad_images",
    "replay", "max_pixels", "parallel", "extend", "cache_images",
}

# How the images of a step are shared out. May differ too, as long as a step has as many; see `Run.computed_over`.
SPLIT = ("batch_size_per_gpu", "grad_accum_steps", "world_size")

START = {"init_from", "init_in_chans", "init_heads"}  # what a run began with; of no effect on a resume

LENGTH = {"epochs", "steps", "images"}  # what a run may change with --extend: its length and its images

FROZEN = "distill_from_weights"  # beside the flags: the hash of the network of --distill_from, "" without one

# Beside the flags, with --freeze_backbone_epochs: True, unless the run began when the warm-up counted from its start.
WARMUP_AFTER_FREEZE = "warmup_after_freeze"

NEEDED = {
    "student", "teacher", "optimizer", "fp16_scaler", "dino_loss", "step", "precision", "args", "rng", "meters", "knn",
}


@dataclass
class Run:
    """Everything that changes during training. `settings`: the flags as plain values (see `plain_settings`)."""

    student: nn.Module  # a backbone and one or two heads
    teacher: nn.Module
    dino_loss: nn.Module  # the state of the losses: centres
    optimizer: torch.optim.Optimizer
    device: torch.device
    dtype: torch.dtype | None  # of autocast; None: float32
    steps_per_epoch: int
    settings: dict
    folder: Path
    keep_checkpoints: int = 0
    make_backbone: Callable[[], nn.Module] | None = None  # for sharded networks: builds the module to gather into
    # {what is computed over a part of a step's images: the setting of SPLIT that determines how many these are}
    computed_over: Mapping[str, str] = field(default_factory=dict)
    step: int = 0
    meters: Meters = field(default_factory=Meters)  # means over the current epoch
    # latest and best accuracy, the baselines, and the identity of the images that they were measured on
    knn: dict[str, float | str] = field(default_factory=dict)
    lowest_left: dict[str, float] = field(default_factory=dict)  # DINOv2: lowest share of each loss since the start
    last_saved: str = "none"
    watch: failures.Watch | None = None
    image_sample: list[str] = field(default_factory=list)  # see `same_images`; empty: not compared

    def __post_init__(self) -> None:
        self.set_precision(self.dtype)

    def set_precision(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)

    def watch_steps(
        self, plan: Plan, load: Callable[[int, int], Iterable[dict]], script: str = "main_dino.py"
    ) -> None:
        """Watch for steps that are not finite. `load`: (first, last) -> the micro-batches of these steps."""
        about = {"args": self.settings, "dtype": str(self.dtype), "epochs": plan.epochs,
                 "steps_per_epoch": plan.steps_per_epoch}
        if plan.teacher_temp is not None:
            about["teacher_temp"] = torch.from_numpy(plan.teacher_temp)
        optimizer = None if self.scaler.is_enabled() else self.optimizer
        self.watch = failures.Watch(self.student, self.teacher, self.dino_loss, optimizer, plan.momentum,
                                    lambda step: load(step, step + 1), about, self.folder / failures.NAME, self.device,
                                    script)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    @property
    def epoch(self) -> int:
        return self.step // self.steps_per_epoch

    def teacher_backbone(self) -> nn.Module:
        """The teacher's backbone, unsharded. Call on all processes."""
        if not self.make_backbone:
            return self.teacher.backbone
        return sharding.unsharded(self.teacher.backbone, self.make_backbone).to(self.device)

    def state(self) -> dict:
        """The contents of a checkpoint, complete on rank 0 only. Call on all processes."""
        keep = parallel.is_main()
        return {
            "student": sharding.whole(self.student.state_dict(), keep),
            "teacher": sharding.whole(self.teacher.state_dict(), keep),
            "optimizer": sharding.whole(self.optimizer.state_dict(), keep),
            "fp16_scaler": self.scaler.state_dict(),
            "dino_loss": self.dino_loss.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "precision": str(self.dtype),
            "args": self.settings,
            "rng": parallel.gather_objects(checkpoints.rng_state(self.device)),
            "meters": parallel.gather_objects(self.meters.state_dict()),
            "knn": self.knn,
            "lowest_left": self.lowest_left,
            "image_sample": self.image_sample,
            "best_checkpoint": checkpoints.BEST if "best_epoch" in self.knn else None,
        }

    def save(self, *names: str) -> None:
        """Write the state under each name, in this order. Call on all processes; rank 0 writes.

        Raises:
            NonFinite: a step since the last check was not finite; nothing is written.
        """
        if self.watch:
            self.watch.check(self.last_saved)
        state = self.state()
        for name in names:
            if parallel.is_main():
                checkpoints.save(state, self.folder / name)
        if parallel.is_main() and self.keep_checkpoints:
            checkpoints.remove_numbered(self.folder, keep=self.keep_checkpoints)
        self.last_saved = names[-1]
        parallel.barrier()

    def find_checkpoint(self, extend: bool = False) -> tuple[dict, Path] | None:
        """The checkpoint in the run's folder to `resume` from, and its path; None if there is none.

        Args:
            extend: the run may be longer than the checkpoint's, or on more images.

        Raises:
            Refused: the checkpoint is of another run, or unreadable; with `extend` also if there is none.
        """
        latest = checkpoints.read_latest(self.folder)
        if latest:
            self.check_resumable(*latest, extend)
        elif extend:
            raise Refused(f"--extend: no {checkpoints.NAME} in --output_dir {self.folder} to continue; leave --extend "
                          "out to start a run")
        return latest

    def check_resumable(self, state: Mapping, path: Path, extend: bool = False) -> None:
        """Raise Refused if this run can't continue from the checkpoint `state`, read from `path`."""
        if not NEEDED <= state.keys():
            raise Refused(f"--output_dir {path.parent}: {path.name} lacks state that a resume needs; to start "
                          f"from its weights, give --init_from {path} and another folder")
        changed = self.changed(state)
        if not changed or extend and changed.keys() <= LENGTH:
            self.check_extension(state, changed)
            self.check_images(state, path, extend)
            return
        if WARMUP_AFTER_FREEZE in changed and "freeze_backbone_epochs" not in changed:
            raise Refused(f"--output_dir {path.parent}: {path.name} belongs to a run whose --warmup_epochs and "
                          "--freeze_last_layer began with --freeze_backbone_epochs, and now begin after it; resume it "
                          f"with the version that began it, or give --init_from {path} --init_heads and another folder")
        shown = ", ".join("weights of --distill_from" if k == FROZEN else f"{k} {old} -> {new}"
                          for k, (old, new) in changed.items() if k != WARMUP_AFTER_FREEZE)
        remedy = "choose another folder, or the same flags to resume"
        if changed.keys() <= LENGTH:
            remedy += "; to continue that run for longer or on more images, add --extend"
        raise Refused(f"--output_dir {path.parent}: {path.name} belongs to a run with different hyperparameters "
                      f"({shown}); {remedy}")

    def changed(self, state: Mapping) -> dict[str, tuple]:
        """{flag: (the checkpoint's value, this run's)} of the flags that determine what a run computes."""
        before = state["args"]  # a flag that is newer than the checkpoint was off
        # A frozen network is known by its weights; in checkpoints from before these were stored, by its file.
        free = {*FREE_FLAGS, *SPLIT, *START, "distill_from" if FROZEN in before else FROZEN}
        if not self.settings.get("distill_from"):
            free.add("ibot_tokens")  # has no effect
        return {k: (before.get(k), v) for k, v in self.settings.items()
                if k not in free and before.get(k) != v and (v or k in before)}

    def check_extension(self, state: Mapping, changed: Mapping[str, tuple]) -> None:
        """Raise Refused if the run that `changed` describes is not longer, or has fewer images for each epoch."""
        if not changed:
            return
        if steps_per_epoch_of(state) > self.steps_per_epoch:
            raise Refused(f"--extend: {self.settings['images']} images are fewer than the {state['args']['images']} so "
                          "far; give all of them, or start another run with --init_from")
        unit = self.settings.get("epoch_steps") or self.steps_per_epoch  # steps of an epoch of the flags
        steps = self.settings["steps"] or self.settings["epochs"] * unit
        if steps <= self.step_after(state):
            flag = "steps" if self.settings["steps"] else "epochs"
            done = self.step_after(state) / (1 if flag == "steps" else unit)
            raise Refused(f"--extend: --{flag} {self.settings[flag]} is not more than the {done:g} done; raise it")

    def check_images(self, state: Mapping, path: Path, extend: bool) -> None:
        """Raise Refused if most images are others than the checkpoint's, unless the run is to be extended."""
        others, compared = self.other_images(state)
        if 2 * others > compared and not extend:
            raise Refused(f"--output_dir {path.parent}: {path.name} belongs to a run on other images: {others} of "
                          f"{compared} that were compared are not those that --data_path {self.settings['data_path']} "
                          "has in their places; give that run's images to resume, or go on with these by --extend, or "
                          f"in another folder from its weights by --init_from {path}")

    def other_images(self, state: Mapping) -> tuple[int, int]:
        """How many images differ from the checkpoint's, and how many could be compared: none where their number has
        changed, or of a checkpoint from before they were stored."""
        if state["args"]["images"] != self.settings["images"]:
            return 0, 0
        return differing(state.get("image_sample", ()), self.image_sample)

    def step_after(self, state: Mapping) -> int:
        """The step at which this run continues: as many epochs, of its own images, as the checkpoint's run has done.

        Where the flags count the run's length in steps, so do its schedules, and the step is the checkpoint's.
        """
        before = steps_per_epoch_of(state)
        if before == self.steps_per_epoch or self.settings["steps"] or self.settings.get("epoch_steps"):
            return state["step"]
        return round(state["step"] * self.steps_per_epoch / before)

    def resume(self, state: Mapping, path: Path) -> None:
        """Load a checkpoint's state, which `find_checkpoint` has accepted."""
        sharding.load(self.student, state["student"])
        sharding.load(self.teacher, state["teacher"])
        sharding.load_optimizer(self.optimizer, state["optimizer"])
        self.dino_loss.load_state_dict(state["dino_loss"])
        self.settings |= {k: v for k, v in state["args"].items() if k in START}
        if self.settings["precision"] == "auto":  # keep the precision, even if this hardware would choose another one
            self.set_precision(dtype_named(state["precision"]))
        self.scaler.load_state_dict(state["fp16_scaler"])
        # Of a checkpoint from before this was stored it is not known; 0 makes no warning.
        self.lowest_left = dict(state.get("lowest_left", {"dino_left": 0.0, "ibot_left": 0.0}))
        self.knn, self.step, self.last_saved = dict(state["knn"]), self.step_after(state), path.name
        if len(state["rng"]) == parallel.world_size():
            checkpoints.set_rng_state(state["rng"][parallel.rank()], self.device)
            self.meters.load_state_dict(state["meters"][parallel.rank()], self.device)
        else:
            seed_everything(self.settings["seed"] + self.step + parallel.rank())
            self.meters.load_state_dict(averaged(state["meters"]), self.device)
        self.say_split(state)
        others, compared = self.other_images(state)
        if others:
            parallel.say(f"{others} of {compared} images that were compared are not those of the run so far")
        if changed := self.changed(state):
            self.say_extended(state, changed)

    def say_split(self, state: Mapping) -> None:
        """Whether another split of the images of a step changes what the run computes."""
        before = self.settings | state["args"] | {"world_size": len(state["rng"])}
        changed = [name for name in SPLIT if before[name] != self.settings[name]]
        if not changed:
            return
        shown = ", ".join(f"{before[name]} -> {self.settings[name]} processes" if name == "world_size" else
                          f"{name} {before[name]} -> {self.settings[name]}" for name in changed)
        if others := [what for what, setting in self.computed_over.items() if setting in changed]:
            effect = (f"from here on {', '.join(others)} see other numbers of images at a time, so losses and "
                      "gradients are not what they would have been; give the earlier values to keep them")
        else:
            effect = "equal up to rounding, not bit by bit"
        if self.settings["drop_path_rate"]:
            effect += "; stochastic depth draws other random numbers"
        parallel.say(f"{shown}: {effect}")

    def say_extended(self, state: Mapping, changed: Mapping[str, tuple]) -> None:
        shown = ", ".join(f"{k} {old} -> {new}" for k, (old, new) in changed.items())
        before, counted = steps_per_epoch_of(state), ""
        if before != self.steps_per_epoch:
            self.meters = Meters()  # of an epoch of other images
            counted = (f"; after {state['step'] / before:.4g} epochs, step {state['step']} is now counted as step "
                       f"{self.step}") if self.step != state["step"] else (
                f"; step {self.step} is kept, after {self.step % self.steps_per_epoch} of the {self.steps_per_epoch} "
                f"steps of pass {self.epoch} over the images")
        parallel.say(
            f"--extend: {shown}{counted}. Weights, optimizer and centre continue; learning rate, weight decay, teacher "
            "momentum and temperature, crop sizes and dropped patches are from here on those of the longer run. It is "
            "not the run that the same flags give from the start, which would have followed them all along"
            + (", on all images" if "images" in changed else ""))


def steps_per_epoch_of(state: Mapping) -> int:
    """Steps per epoch of the run that wrote a checkpoint."""
    return state["args"]["images"] // state["args"]["global_batch"]


def plain_settings(flags: Mapping, n_images: int) -> dict:
    """The flags as a checkpoint stores them, with the number of images, the world size and the global batch size."""
    def plain(value: object) -> object:
        return list(value) if isinstance(value, tuple) else float(value) if isinstance(value, float) else value

    return {k: plain(v) for k, v in flags.items()} | {  # without types of ours, such as flags.Default
        "images": n_images,
        "world_size": parallel.world_size(),
        "global_batch": flags["batch_size_per_gpu"] * flags["grad_accum_steps"] * parallel.world_size(),
    }


def dtype_named(name: str) -> torch.dtype | None:
    """The inverse of `str` for a torch.dtype or None."""
    return None if name == "None" else getattr(torch, name.removeprefix("torch."))


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
