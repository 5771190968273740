"""Detect the objects that a text names, with Grounding DINO (arXiv 2303.05499) from the transformers library.

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
from detection import coco, files, inference, networks, prompts, training
from imagesets.decode import MAX_PIXELS
from parallel import Refused
from pretraining import faults
from pretraining.owner import owned
from protocols.features import images_refused
from weights import checkpoints

SETTINGS = ("model", "image_size", "train", "train_images", "skip_bad_boxes")  # what a run that resumes must share


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("Detection of what a text names, with Grounding DINO; training and evaluation of it.")
    recipe = training.Recipe()
    add = parser.add_argument_group("network").add_argument
    add("--model", default="", help="folder as save_pretrained writes it; OWNER/NAME on huggingface.co, which is "
        "fetched; or, to train, tiny: a small network with random weights")
    add("--image_size", type=flags.number(int, 32), default=96, metavar="PIXELS",
        help="shorter side of the resized images of --model tiny; others have their own")
    add = parser.add_argument_group("detection").add_argument
    add("--images", nargs="+", default=[], help="images, folders, videos, and drawn scenes: scenes:COUNTxPIXELS")
    add("--text", default="", help='what to look for, each phrase ended by a period: "red fish . blue cup ."')
    add("--threshold", type=flags.fraction, default=0.3,
        help="least probability of a box, that of its most probable token; lower it to see more boxes")
    add("--text_threshold", type=flags.fraction, default=0.25,
        help="least probability of the words that label a box; lower it if labels lack words")
    add = parser.add_argument_group("data").add_argument
    add("--train", default="", metavar="FILE", help="train on a file in COCO format, or scenes:COUNTxPIXELS")
    add("--train_images", default="", metavar="FOLDER", help="folder of the images of --train; empty: the file's")
    add("--eval", default="", metavar="FILE", help="report the average precision on such a file, or on drawn scenes")
    add("--eval_images", default="", metavar="FOLDER", help="folder of the images of --eval; empty: the file's")
    add("--skip_bad_boxes", action="store_true", help="leave out boxes without area or outside of their image, "
        "instead of refusing the file")
    add("--max_pixels", type=flags.positive_int, default=MAX_PIXELS,
        help="larger images count as undecodable, against decompression bombs; raise it for very large images")
    add("--held_back", default="", metavar="TEXT", help="also report how much of what this prompt finds on the images "
        "of --eval is still found after training")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=flags.positive_int, default=recipe.steps, help="training steps")
    add("--lr", type=flags.positive, default=recipe.lr, help="peak learning rate of AdamW; half a cosine to 1 %% of it")
    add("--backbone_lr", type=flags.fraction, default=recipe.backbone_lr,
        help="learning rate of the image and the text backbone as a share of --lr; 1 for random weights")
    add("--warmup_steps", type=flags.count, default=recipe.warmup_steps, help="steps of linear warm-up")
    add("--weight_decay", type=flags.non_negative, default=recipe.weight_decay, help="weight decay of AdamW")
    add("--clip_grad", type=flags.non_negative, default=recipe.clip_grad,
        help="largest norm of the gradients of a step; 0: no limit; raise it for random weights")
    add("--phrases", type=flags.count, default=recipe.phrases, help="phrases in a training prompt: those of the "
        "images, and others drawn at random; 0: as many as it holds; lower it for speed")
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
    if not args.model or args.model == networks.TINY and not args.train:
        raise Refused(f"--model {args.model or 'is missing'}: give a folder or OWNER/NAME on huggingface.co; tiny has "
                      "random weights, and needs --train")
    if args.held_back and not (args.train and args.eval):
        raise Refused(f"--held_back {args.held_back!r}: it needs --train and --eval; give both")
    if args.warmup_steps > args.steps:
        raise Refused(f"--warmup_steps {args.warmup_steps}: longer than --steps {args.steps}; lower it")


def detect(args: argparse.Namespace, device: torch.device) -> None:
    phrases, frames = prompts.parse(args.text), files.open_frames(args.images, args.max_pixels)
    folder, images, results = flags.check_folder(args.output_dir), [], []
    detector = networks.load(args.model, device)
    asked = inference.prompts_of(detector, phrases)
    pick = inference.most_probable(detector.processor.tokenizer, args.threshold, args.text_threshold)
    flags.prepare_output(folder)
    with files.Figures() as figures:
        named = ((frame, frame.image) for frame in frames)
        for frame, rows in inference.detections(detector, named, args.batch_size, asked, pick):
            number, (height, width) = len(images) + 1, frame.image.shape[1:]
            images.append({"id": number, "file_name": frame.name, "height": height, "width": width})
            figures.add(folder, number, frame, files.draw_boxes(frame.image, rows, phrases))
            results += [{"image_id": number} | {k: row[k] for k in row if k != "words"} for row in rows]
            found = ", ".join(f"{phrases[row['category_id']]} {row['score']:.2f}" for row in rows)
            print(f"{frame.name}: {found or 'nothing found'}", flush=True)
    about = {"images": images, "categories": [{"id": k, "name": phrase} for k, phrase in phrases.items()]}
    atomic.write_text(folder / "detections_images.json", json.dumps(about, indent=1))  # what the ids stand for
    atomic.write_text(folder / "detections.json", json.dumps(results, indent=1))
    print(f"{len(results)} boxes on {len(images)} images: detections.json and files with boxes written to {folder}")


def train_and_evaluate(args: argparse.Namespace, device: torch.device) -> int:
    networks.import_transformers()
    if args.eval:
        inference.import_evaluator()
    phrases = {"--held_back": prompts.parse(args.held_back, "--held_back")} if args.held_back else {}
    how = (args.skip_bad_boxes, args.max_pixels)
    train = args.train and coco.open_objects(args.train, args.train_images, "--train", *how)
    test = args.eval and coco.open_objects(args.eval, args.eval_images, "--eval", *how)
    phrases |= {flag: objects.phrases for flag, objects in (("--train", train), ("--eval", test)) if objects}
    folder = flags.check_folder(args.output_dir)
    recipe = training.Recipe(**{name: getattr(args, name) for name in training.Recipe._fields})
    settings = {name: getattr(args, name) for name in SETTINGS} | recipe._replace(num_workers=0)._asdict()
    latest = training.find_checkpoint(folder, settings) if train else None
    if args.model == networks.TINY:
        detector = networks.tiny(" ".join(train.phrases.values()).split(), args.image_size, device, args.seed)
    else:
        detector = networks.load(args.model, device)
    asked = {flag: inference.prompts_of(detector, phrases[flag], flag) for flag in phrases}  # checks all of them

    def held_back_results() -> list[dict]:
        pick = inference.most_probable(detector.processor.tokenizer, args.threshold, args.threshold)
        return inference.results_of(detector, test, args.batch_size, asked["--held_back"], pick)

    report = {"model": args.model, "train": args.train, "eval": args.eval}
    with owned(flags.prepare_output(folder)):
        try:
            before = held_back_results() if args.held_back else []
            if train:
                run_training(args, detector, train, recipe, folder, settings, latest)
            if args.held_back:
                ap50 = inference.kept(before, held_back_results(), test.images)
                report["held_back"] = {"text": args.held_back, "AP50": ap50}
                print(f"held back {args.held_back!r}: {ap50} AP50, the boxes before training as the truth")
            if test:
                report["results"] = inference.evaluate(detector, test, args.batch_size, asked["--eval"])
                print(f"{'categories':<14}{'number':>8}{'AP':>8}{'AP50':>8}")
                for name, row in report["results"].items():
                    print(f"{name:<14}{row['categories']:>8}{row['AP']:>8.1f}{row['AP50']:>8.1f}")
                atomic.write_text(folder / "detect.json", json.dumps(report, indent=1))
                print(f"wrote {folder / 'detect.json'}")
        except SystemExit as error:  # of a signal, see Requests
            print(f"stopped by a signal and saved; start again to continue (exit code {error.code})")
            return error.code
    return 0


def run_training(args: argparse.Namespace, detector: networks.Detector, objects: coco.Objects, recipe: training.Recipe,
                 folder: Path, settings: dict, latest: tuple[dict, Path] | None) -> None:
    network, requests = detector.network, faults.Requests(detector.network.device, args.save_minutes)
    print(f"{args.model}: {sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters; {network.device}\n"
          f"{objects.name}: {len(objects)} images, {len(objects.phrases)} phrases\n"
          f"{args.steps} steps of {args.batch_size} images; peak learning rate {args.lr:.1e}", flush=True)
    checkpoints.remove_temporary(folder)
    training.train(detector, objects, recipe, folder, settings, latest, requests, args.log_every)
    before = getattr(network.config, "trained_phrases", [])
    network.config.trained_phrases = sorted({*before, *objects.phrases.values()})
    networks.save(detector, folder / "network")
    print(f"wrote the network to {folder / 'network'}", flush=True)
    requests.finish()


def work(args: argparse.Namespace) -> int | None:
    check_args(args)
    device = parallel.start(args.device)
    with images_refused():
        return detect(args, device) if args.images else train_and_evaluate(args, device)


def main(args: argparse.Namespace) -> int:
    """Returns the exit code: 0 done, 2 refused, 1 stopped by an error, 75 stopped by a signal, to be continued."""
    return flags.exit_code("detect.py", work, args, lambda error: faults.explain(error, args.output_dir))


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
