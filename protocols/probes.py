"""The linear evaluation of a frozen network: probe, evaluation of a given classifier, logistic regression, fine-tuning.

Several learning rates, numbers of blocks or kinds of pooling make a sweep: all classifiers are trained in one pass, the
best is chosen on held-out training images, and the test images are classified once, by that one.

Shapes: M test images, C classes, S settings.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import flags
import parallel
from imagesets.checking import Chosen
from method.photometric import to_device
from parallel import Refused
from protocols import finetune, linear, scores
from protocols.features import TRAINING_SCALE, Network, feature_batches, input_dataset, network_features
from protocols.linear import Training
from protocols.progress import FIRST, MOST, progress
from protocols.splits import Task, open_task
from vision_transformer import VisionTransformer
from weights import checkpoints

STRENGTHS = [10.0**e for e in range(-6, 4)]  # values of C that logistic regression chooses from
UNFINISHED, CLASSIFIER = "checkpoint_linear.pth", "linear.pth"

Outcome = tuple[list[dict], Tensor]  # rows for the table, and (M, min(5, C)) classes of the test images, best first


# ---- The evaluation ----


def evaluate_linear(
    network: Network, data_path: str, val_data_path: str, output_dir: Path, training: Training,
    protocol: str = "probe", low_shot: float = 0.0, val_share: float = 0.1, linear_weights: str = "",
    recipe: finetune.Recipe | None = None,
) -> dict:
    """Run one protocol on labelled data and write eval_linear.json. All processes call this.

    Args:
        output_dir: for eval_linear.json, linear.pth or finetuned.pth, and the cache features/.
        protocol: "probe" trains linear classifiers; "evaluate" evaluates `linear_weights`; "logreg" fits logistic
            regression to the first setting's features; "finetune" trains the backbone too, by `recipe`.
        low_shot: share of each class's training images to train on; 0: all.
        val_share: share of the training images held out to choose a setting by; none are held out without a choice.

    Returns:
        The network's `about` and protocol, data_path, val_data_path, images (training, held out, test), epochs,
        select_epoch and interpolation (of a probe), notes, test (`scores.accuracy` of the test images), results (a row
        per setting).

    Raises:
        Refused: bad data, settings that don't fit the network or the choice of an epoch, a loss that is not finite, or
            an unusable folder.
    """
    blocks = with_blocks(network, training.n_last_blocks)[1]
    several = len(linear.sweep(training, blocks > 0)) > 1
    if protocol == "probe" and several and training.select_epoch == "best":
        raise Refused("--select_epoch best with several settings: a setting would be chosen on the test set; give "
                      "held_out or last, or one setting")
    choice = protocol == "logreg" or protocol == "probe" and (several or training.select_epoch == "held_out")
    task = open_task(data_path, val_data_path, network.reading, low_shot, val_share if choice else None,
                     training.seed)
    if training.num_labels and training.num_labels < len(task.classes):
        raise Refused(f"--num_labels {training.num_labels}: the data have {len(task.classes)} classes; raise it, or "
                      "give 0 to count them")
    flags.prepare_output(output_dir)
    for note in task.notes:
        parallel.say(note)
    if protocol == "evaluate":
        rows, ranked = apply_classifier(network, task, training, output_dir, linear_weights)
    elif protocol == "finetune":
        rows, ranked = finetune.tune(network, task, training, recipe or finetune.Recipe(), output_dir)
    else:
        rows, ranked = {"probe": probe, "logreg": logreg}[protocol](network, task, training, output_dir)
    report = network.about | {
        "protocol": protocol, "data_path": str(data_path), "val_data_path": val_data_path or None,
        "images": [len(part) if part else 0 for part in task[:3]], "epochs": training.epochs,
        **({"select_epoch": training.select_epoch, "interpolation": training.interpolation}
           if protocol == "probe" else {}),
        "notes": task.notes, "test": scores.accuracy([ranked], task.test.labels, task.classes), "results": rows,
    }
    return scores.write_results(output_dir / "eval_linear.json", **report)


def show_linear(report: dict) -> None:
    """Print the tables of a report. Its notes have been printed before the work began."""
    if len(report["results"]) > 1:
        print(scores.table(report["results"]))
    if "select_epoch" in report:
        chosen = next((row for row in report["results"] if row.get("chosen")), report["results"][0])
        print(f"epoch {chosen['epoch']} of {report['epochs']}: {linear.SELECTIONS[report['select_epoch']]}; "
              f"{report['interpolation']} training crops" + " as published" * (report["interpolation"] == "bilinear"))
    print("on the test set, in %, with its 95 % bootstrap interval")
    print(scores.table([{k: v for k, v in report["test"].items() if k != "per_class"}]))


# ---- Frozen features, all that the settings need ----


def with_blocks(network: Network, n_last_blocks: Sequence[int]) -> tuple[Network, int]:
    """The network that computes `linear.probe_features`, and the maximum of n_last_blocks; 0 without such blocks."""
    model = network.forward
    if not isinstance(model, VisionTransformer):
        return network, 0
    most = max(n_last_blocks)
    if most > len(model.blocks):
        raise Refused(f"--n_last_blocks {most}: the network has {len(model.blocks)} blocks; lower it")
    # Part of the name of cached features, which of networks with registers once held a mean over registers too.
    about = network.about | {"output": f" {most} blocks and mean" + " of patches" * (model.num_register_tokens > 0)}
    return network._replace(forward=linear.probe_features(model, most), about=about), most


def eval_features(network: Network, part: Chosen, training: Training, folder: Path) -> Tensor:
    """Features of centre crops."""
    return network_features(network, part, training.batch_size, training.num_workers, folder / "features")


def training_batches(
    network: Network, part: Chosen, training: Training, folder: Path, epoch: int, kept: dict[int, Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(features, labels) of an epoch's global batches, in an order that depends on (seed, epoch) only.

    Args:
        kept: features by view, as far as they have been computed; extended here.
    """
    order = torch.from_numpy(np.random.default_rng((training.seed, epoch)).permutation(len(part)))
    batches = order.split(training.batch_size * parallel.world_size())
    if training.views:
        view = epoch % training.views
        if view not in kept:
            kept[view] = network_features(network, part, training.batch_size, training.num_workers,
                                          folder / "features", view, TRAINING_SCALE, training.interpolation)
        features = (to_device(kept[view][rows], network.device) for rows in batches)
    else:
        features = feature_batches(
            network.forward, input_dataset(network, part, epoch, TRAINING_SCALE, training.interpolation),
            order.tolist(), training.batch_size, training.num_workers, network.device, network.autocast())
    features = progress(features, len(part), f"epoch {epoch + 1}", len(batches[0]), MOST if epoch else FIRST)
    for x, rows in zip(features, batches, strict=True):
        yield x, to_device(part.labels[rows], network.device)


# ---- Linear probe ----


def probe(network: Network, task: Task, training: Training, folder: Path) -> Outcome:
    """Train one linear classifier per setting in one pass, choose one and its epoch, and test that.

    The setting is chosen on the held-out images. So is the epoch, or on the test images, by `training.select_epoch`.
    """
    interleaved = linear.interleaves(network.forward)
    network, blocks = with_blocks(network, training.n_last_blocks)
    settings = linear.sweep(training, blocks > 0)
    torch.manual_seed(training.seed)
    heads = linear.Heads(settings, network.info["embed_dim"], blocks, max(training.num_labels, len(task.classes)),
                         interleaved)
    optimizer = linear.build_optimizer(heads.to(network.device), training.batch_size * parallel.world_size())
    kept: dict[int, Tensor] = {}
    modules: dict[str, torch.nn.Module | torch.optim.Optimizer] = {"heads": heads, "optimizer": optimizer}
    judges = {"best": task.test, "held_out": task.held, "last": None}[training.select_epoch]
    if judges:
        modules["best"] = best_epochs = linear.BestEpochs(heads)
        judged = eval_features(network, judges, training, folder)

    def epoch_losses(epoch: int) -> Tensor:
        batches = training_batches(network, task.train, training, folder, epoch, kept)
        loss = linear.train_epoch(heads, optimizer, epoch, training.epochs, batches)
        if judges and linear.is_validated(epoch + 1, training):
            right = [int(scores.hits(r, judges.labels)[0].sum()) for r in linear.predict(heads, judged)]
            best_epochs.update(heads, right, epoch + 1)
        return loss

    run = run_of(network, task, training, settings) | ({} if interleaved else {"interleaved": False})
    loss = linear.train(folder / UNFINISHED, run, modules, epoch_losses, training,
                        save_freq=10 if training.views else 1)  # epochs on cached views take little time
    epochs = best_epochs.epoch.tolist() if judges else [training.epochs] * len(settings)
    heads = best_epochs.heads if judges else heads
    rows = [{"lr": s.lr, "n_last_blocks": s.n_last_blocks, "avgpool": s.avgpool_patchtokens, "epoch": epoch,
             "train_loss": float(v) if v.isfinite() else None}
            for s, epoch, v in zip(settings, epochs, loss, strict=True)]
    best = 0
    if task.held:
        ranked = linear.predict(heads, eval_features(network, task.held, training, folder))
        right = [scores.hits(r, task.held.labels)[0] for r in ranked]
        finite = [i for i, head in enumerate(heads.heads) if linear.is_finite(head)]
        best = max(finite or [0], key=lambda i: int(right[i].sum()))  # the first among ties
        rows = [row | {"held-out top1": scores.percent(r.double()), "chosen": "*" if i == best else ""}
                for i, (row, r) in enumerate(zip(rows, right, strict=True))]
    if parallel.is_main():
        save_classifier(heads, best, task.classes, network, folder)
    return rows, linear.predict(heads, eval_features(network, task.test, training, folder))[best]


def run_of(network: Network, task: Task, training: Training, settings: Sequence[linear.Setting]) -> dict:
    """What a stopped run and the one that resumes it must have in common.

    Choices that older versions did not have are left out where they are what those did, whose files can be resumed.
    """
    run = linear.run_of(network.about, task, training) | {
        "settings": [list(s) for s in settings], "views": training.views}
    if training.select_epoch != "last":
        run |= {"select_epoch": training.select_epoch, "val_freq": training.val_freq}
    return run if training.interpolation == "bicubic" else run | {"interpolation": training.interpolation}


def save_classifier(heads: linear.Heads, best: int, classes: list[str], network: Network, folder: Path) -> None:
    """linear.pth: the chosen classifier under the published names, its classes and its setting."""
    head, setting = heads.heads[best], heads.settings[best]
    state = {"linear.weight": head.weight.detach().cpu(), "linear.bias": head.bias.detach().cpu()}
    checkpoints.save(
        {"state_dict": state, "classes": list(classes), "setting": setting._asdict(),
         "interleaved": heads.interleaved, "weights_sha256": network.about["weights_sha256"]}, folder / CLASSIFIER)
    (folder / UNFINISHED).unlink(missing_ok=True)


# ---- Other protocols ----


def apply_classifier(network: Network, task: Task, training: Training, folder: Path, linear_weights: str) -> Outcome:
    """Classify the test images with a given classifier; its file's setting, or else the first one of `training`."""
    loaded = linear.read_classifier(linear_weights)
    weight, bias = loaded["weight"], loaded["bias"]
    setting = loaded.get("setting") or linear.sweep(training)[0]
    # A classifier of this project says which, or is older than the distinction; a published one fits its network.
    interleaved = loaded.get("interleaved", "setting" in loaded or linear.interleaves(network.forward))
    network, blocks = with_blocks(network, [max(setting.n_last_blocks, 1)])
    heads = linear.Heads([setting], network.info["embed_dim"], blocks, len(bias), interleaved).to(network.device)
    head = heads.heads[0]
    if head.weight.shape != weight.shape:
        raise Refused(f"--linear_weights {linear_weights}: weights {tuple(weight.shape)} instead of "
                      f"{tuple(head.weight.shape)}; do --n_last_blocks, --avgpool_patchtokens and the backbone fit?")
    head.load_state_dict({"weight": weight, "bias": bias})
    names = loaded.get("classes")
    if not names:
        names, order = unnamed_outputs(task.classes, len(bias), linear_weights)
        task.notes.append(f"--linear_weights {linear_weights}: its outputs have no names and are taken for the classes "
                          f"in {order}")
        parallel.say(task.notes[-1])
    names = [unicodedata.normalize("NFC", name) for name in names]  # as `splits.match_classes` does
    number = {name: i for i, name in enumerate(task.classes)}
    if not number.keys() & set(names):
        raise Refused(f"--linear_weights {linear_weights}: none of its classes ({', '.join(names[:5])}, ...) is in "
                      f"--data_path ({', '.join(task.classes[:5])}, ...), so every answer would be wrong; give a "
                      "classifier of these classes")
    outputs = torch.tensor([number.get(name, -1) for name in names] + [-1] * (len(bias) - len(names)))
    row = {"n_last_blocks": setting.n_last_blocks, "avgpool": setting.avgpool_patchtokens}
    return [row], outputs[linear.predict(heads, eval_features(network, task.test, training, folder))[0]]


def unnamed_outputs(classes: Sequence[str], count: int, linear_weights: str) -> tuple[list[str], str]:
    """The classes that `count` outputs without names stand for, and the order that this assumes, for a note.

    Names that are whole numbers are in numeric order: as labels, 2 comes before 10, as text it does not. Where only
    some of the numbers below `count` occur, output i is class i. All other names are in the order of `classes`.

    Raises:
        Refused: other numbers of classes and outputs.
    """
    numbers = [int(name) for name in classes if name.isdecimal()]
    numeric = len(set(numbers)) == len(classes)
    if len(classes) == count:
        return (sorted(classes, key=int), "numeric order") if numeric else (list(classes), "the order of their names")
    if numeric and max(numbers) < count:
        by_number = dict(zip(numbers, classes, strict=True))
        return [by_number.get(i, "") for i in range(count)], "numeric order, from 0"
    raise Refused(f"--linear_weights {linear_weights}: {count} outputs without names for the {len(classes)} classes of "
                  "--data_path; give data with all classes")


def logreg(network: Network, task: Task, training: Training, folder: Path) -> Outcome:
    """Logistic regression on the first setting's features of centre crops."""
    network, blocks = with_blocks(network, training.n_last_blocks)
    n, avgpool = training.n_last_blocks[0], training.avgpool_patchtokens[0]
    train, held, test = (linear.columns(eval_features(network, part, training, folder), blocks, n, avgpool)
                         for part in task[:3])
    ranked, best, accuracies = linear.logistic_regression(
        (train, task.train.labels), (held, task.held.labels), test, STRENGTHS)
    rows = [{"C": c, "held-out top1": v, "chosen": "*" if c == best else ""}
            for c, v in zip(STRENGTHS, accuracies, strict=True)]
    return rows, ranked
