"""Detection of what a text names, with Grounding DINO (arXiv 2303.05499) of the transformers library.

    python detect.py --model IDEA-Research/grounding-dino-tiny --images photo.jpg --text "cat . remote control ."
    python detect.py @presets/detect_scenes.txt --train scenes:3000x96 --eval scenes:200x96
    python detect.py --model FOLDER --train train.json --eval val.json --held_back "dog . person ."

Needs transformers; --eval also needs faster-coco-eval. The name is all that it shares with DINO (docs/detection.md).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

import atomic
import flags
import parallel
from detection import coco, evaluation, files, inference, networks, prompts, scores, training
from detection.networks import Detector
from imagesets.decode import MAX_PIXELS
from parallel import Refused
from pretraining import faults
from pretraining.owner import owned
from weights import checkpoints


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("Detection of what a text names, with Grounding DINO; training and evaluation of it.")
    add = parser.add_argument_group("network").add_argument
    add("--model", default="",
        help="folder as save_pretrained writes it; OWNER/NAME on huggingface.co, which is fetched; or, to train, tiny: "
             "a small network with random weights")
    add("--image_size", type=flags.number(int, 32), default=96, metavar="PIXELS",
        help="shorter side of the resized images of --model tiny; others have their own")

    add = parser.add_argument_group("detection").add_argument
    add("--images", nargs="+", default=[],
        help="images, folders of images, videos, and drawn scenes: scenes:COUNTxPIXELS")
    add("--text", default="", help='what to look for, each phrase ended by a period: "red fish . blue cup ."')
    add("--threshold", type=flags.fraction, default=0.3,
        help="least probability of a box, that of its most probable token; lower it to see more boxes")
    add("--text_threshold", type=flags.fraction, default=0.25,
        help="least probability of the words that label a box; lower it if labels lack words")
    add("--no_pictures", action="store_true", help="write the JSON files alone, without images with boxes")

    add = parser.add_argument_group("data").add_argument
    add("--train", default="", metavar="FILE",
        help="train on this file in COCO format, or on drawn scenes: scenes:COUNTxPIXELS")
    add("--train_images", default="", metavar="FOLDER",
        help="folder of the images of --train; empty: the file's, or the folder images in it")
    add("--eval", default="", metavar="FILE",
        help="report the average precision on this file in COCO format, or on drawn scenes")
    add("--eval_images", default="", metavar="FOLDER", help="folder of the images of --eval; empty: as --train_images")
    add("--skip_bad_boxes", action="store_true",
        help="leave out boxes without area or outside of their image, instead of refusing the file")
    add("--max_pixels", type=flags.positive_int, default=MAX_PIXELS,
        help="larger images count as undecodable, against decompression bombs; raise it for very large images")
    add("--held_back", default="", metavar="TEXT",
        help="also report how much of what this prompt finds on the images of --eval is still found after training")

    add = parser.add_argument_group("training").add_argument
    recipe = training.Recipe()
    add("--steps", type=flags.positive_int, default=recipe.steps, help="training steps")
    add("--lr", type=flags.positive, default=recipe.lr, help="peak learning rate of AdamW; half a cosine to 1 % of it")
    add("--backbone_lr", type=flags.fraction, default=recipe.backbone_lr,
        help="learning rate of the image and the text backbone as a share of --lr; 1 for random weights")
    add("--warmup_steps", type=flags.count, default=recipe.warmup_steps, help="steps of linear warm-up")
    add("--weight_decay", type=flags.non_negative, default=recipe.weight_decay, help="weight decay of AdamW")
    add("--clip_grad", type=flags.non_negative, default=recipe.clip_grad,
        help="largest norm of the gradients of a step; 0: no limit; raise it for random weights")
    add("--phrases", type=flags.count, default=recipe.phrases,
        help="phrases in a training prompt: those of the images, and others drawn at random; 0: as many as it holds; "
             "lower it for speed")
    add("--flip", type=flags.fraction, default=recipe.flip,
        help="probability that a training image is mirrored; 0 if phrases say left or right")
    add("--seed", type=flags.seed, default=recipe.seed, help="of the order of the images, prompts and random weights")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="output/detect",
        help="for images with boxes, detections.json, checkpoints, the trained network (network/) and detect.json")
    add("--save_minutes", type=flags.non_negative, default=10, help="minutes between checkpoints; 0: only at the end")
    add("--log_every", type=flags.positive_int, default=50, help="steps per logged line")

    add = parser.add_argument_group("hardware").add_argument
    add("--batch_size", type=flags.positive_int, default=recipe.batch_size,
        help="images at a time, in training per step; lower it if memory runs out")
    add("--device", default="auto", help="auto (a CUDA GPU if there is one), cpu, cuda, cuda:N or mps (Apple GPUs)")
    add("--num_workers", type=flags.count, default=recipe.num_workers, help="processes that load training images")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise Refused for flags that are missing or don't fit together."""
    if not (args.images or args.train or args.eval):
        raise Refused("--images: nothing to do; give --images and --text, --train FILE or --eval FILE")
    if args.images and (args.train or args.eval):
        raise Refused(f"--images {args.images[0]}: not together with --train or --eval; give the folder of their "
                      "images with --train_images or --eval_images")
    if not args.model:
        raise Refused("--model: none given; give a folder, OWNER/NAME on huggingface.co, or tiny to train from random "
                      "weights")
    if args.model == networks.TINY and not args.train:
        raise Refused("--model tiny: random weights detect nothing; train it with --train, then give its folder")
    if args.held_back and not (args.train and args.eval):
        raise Refused(f"--held_back {args.held_back!r}: it needs --train and --eval; give both")
    if args.warmup_steps > args.steps:
        raise Refused(f"--warmup_steps {args.warmup_steps}: longer than --steps {args.steps}; lower it")


# ---- Detect ----


def detect(args: argparse.Namespace, device: torch.device) -> None:
    phrases, items = prompts.parse(args.text), files.open_items(args.images, max_pixels=args.max_pixels)
    folder = flags.check_folder(args.output_dir)
    detector = networks.load(args.model, device)
    inference.chunks(detector, phrases)
    results = files.Results(flags.prepare_output(folder), phrases, draw=not args.no_pictures)
    for batch in inference.batched(items, args.batch_size):
        found = inference.detect(detector, [item.image for item in batch], phrases, args.threshold, args.text_threshold)
        for item, boxes in zip(batch, found, strict=True):
            results.add(item, boxes)
            print(f"{item.name}: " + (", ".join(
                f"{phrases[k]} {score:.2f}" for k, score in
                zip(boxes.classes.tolist(), boxes.scores.tolist(), strict=True)) or "nothing found"), flush=True)
    results.close()
    print(f"{len(results.results)} boxes on {len(results.images)} images: detections.json"
          + (f" and {len(results.names)} files with boxes" if results.names else "") + f" written to {folder}")


# ---- Train and evaluate ----


def open_data(args: argparse.Namespace) -> tuple[coco.Objects | None, coco.Objects | None]:
    how = {"skip_bad": args.skip_bad_boxes, "max_pixels": args.max_pixels}
    train = coco.open_objects(args.train, args.train_images, "--train", **how) if args.train else None
    if not args.eval:
        return train, None
    scores.import_evaluator()
    return train, coco.open_objects(args.eval, args.eval_images or args.train_images, "--eval", **how)


def make_detector(args: argparse.Namespace, device: torch.device, *sets: coco.Objects | None) -> Detector:
    if args.model != networks.TINY:
        return networks.load(args.model, device)
    words = [word for objects in sets if objects for phrase in objects.phrases for word in phrase.split()]
    return networks.tiny(words, args.image_size, device, args.seed)


def train_and_evaluate(args: argparse.Namespace, device: torch.device) -> int:
    train, test = open_data(args)
    folder = flags.check_folder(args.output_dir)
    settings = {k: v for k, v in vars(args).items() if isinstance(v, (str, int, float))}
    latest = training.find_checkpoint(folder, settings) if train else None
    detector = make_detector(args, device, train, test)
    held_back = prompts.parse(args.held_back, "--held_back") if args.held_back else []
    for phrases, flag in ((test.phrases if test else [], "--eval"), (held_back, "--held_back")):
        if phrases:
            inference.chunks(detector, phrases, flag)
    flags.prepare_output(folder)
    report = {"model": args.model, "train": args.train, "eval": args.eval}
    with owned(folder):
        if train:
            before = held_back and evaluation.answers(detector, test, held_back, args.batch_size, args.threshold)
            if not run_training(args, detector, train, folder, settings, latest):
                print(f"stopped by a signal and saved; start again to continue (exit code {faults.TO_BE_CONTINUED})")
                return faults.TO_BE_CONTINUED
            detector = detector._replace(trained=detector.trained | set(train.phrases))
            networks.save(detector, folder / "network")
            print(f"wrote the network to {folder / 'network'}", flush=True)
            if held_back:
                after = evaluation.answers(detector, test, held_back, args.batch_size, args.threshold)
                report["held_back"] = {"text": args.held_back, "AP50": evaluation.kept(before, after, test)}
                print(f"held back {args.held_back!r}: {report['held_back']['AP50']} AP50, the boxes before training as "
                      "the truth")
        if test:
            report["results"] = evaluation.evaluate(detector, test, args.batch_size)
            evaluation.show(report["results"])
            atomic.write_text(folder / "detect.json", json.dumps(report, indent=1))
            print(f"wrote {folder / 'detect.json'}")
    return 0


def run_training(args: argparse.Namespace, detector: Detector, objects: coco.Objects, folder: Path, settings: dict,
                 latest: tuple[dict, Path] | None) -> bool:
    recipe = training.Recipe(args.steps, args.batch_size, args.lr, args.backbone_lr, args.weight_decay,
                             args.warmup_steps, args.clip_grad, args.phrases, args.flip, args.seed, args.num_workers)
    size = sum(parameter.numel() for parameter in detector.network.parameters())
    print(f"{args.model}: {size / 1e6:.2f} M parameters; {detector.device}\n"
          f"{objects.name}: {len(objects)} images, {len(objects.phrases)} phrases\n"
          f"{args.steps} steps of {args.batch_size} images; peak learning rate {args.lr:.1e}", flush=True)
    checkpoints.remove_temporary(folder)
    return training.train(detector, objects, recipe, folder, settings, latest, args.save_minutes, args.log_every)


def work(args: argparse.Namespace) -> int | None:
    check_args(args)
    device = parallel.start(args.device)
    return detect(args, device) if args.images else train_and_evaluate(args, device)


def main(args: argparse.Namespace) -> int:
    """Returns the exit code: 0 done, 2 refused, 1 stopped by an error, 75 stopped by a signal, to be continued."""
    return flags.exit_code("detect.py", work, args, lambda error: faults.explain(error, args.output_dir))


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
