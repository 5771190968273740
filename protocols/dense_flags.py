"""Flags of scripts that train linear layers on patch tokens, one function per group of --help."""

from __future__ import annotations

import argparse

import flags


def add_part_flags(group: argparse._ActionsContainer) -> None:
    """Sizes of the training images, what is held out, and the seed."""
    add = group.add_argument
    add("--image_size", type=flags.count, default=0, metavar="PIXELS",
        help="shorter side of the resized images; 0: as --crop_size; raise it if objects are small")
    add("--crop_size", type=flags.count, default=0, metavar="PIXELS",
        help="side of the training crops; 0: 512, or the shorter side of the images where that is less")
    add("--val_share", type=flags.number(float, 0, 0.9), default=0.1,
        help="share of the training images held out to choose a setting by; raise it for small data")
    add("--seed", type=flags.seed, default=0,
        help="of crops, layers, what is held out, and untrained weights; change it to see how much the table varies")


def add_training_flags(group: argparse._ActionsContainer, lr_help: str, published: str) -> None:
    """Rate and length of the training.

    Args:
        lr_help: when to change the learning rate.
        published: how many steps the published evaluations take.
    """
    add = group.add_argument
    add("--lr", type=flags.positive, nargs="+", default=[1e-2],
        help=f"peak learning rate of AdamW; {lr_help}; several make a sweep")
    add("--steps", type=flags.positive_int, default=400,
        help=f"training steps; raise it for large data: the published evaluations take {published}")
    add("--batch_size", type=flags.positive_int, default=16,
        help="training images per step, of all processes together; lower it if memory runs out")
    add("--warmup_steps", type=flags.count, default=0,
        help="steps of linear learning-rate warm-up, before half a cosine to 0")
    add("--weight_decay", type=flags.non_negative, default=1e-3, help="weight decay of AdamW")


def add_window_flags(group: argparse._ActionsContainer, window: str, averaged: str) -> None:
    """How test images are seen.

    Args:
        window: what --window_size 0 is.
        averaged: over scales.
    """
    add = group.add_argument
    add("--window_size", type=flags.count, default=0, metavar="PIXELS",
        help=f"side of the windows that a test image is seen through; 0: {window}")
    add("--stride", type=flags.count, default=0, metavar="PIXELS",
        help="distance between windows; 0: two thirds of the window; lower it for smoother results, and more time")
    add("--test_scales", type=flags.positive, nargs="+", default=[1.0],
        help=f"scales of the test images; over several, {averaged} are averaged")
    add("--test_flip", action="store_true", help="also test each image mirrored, and average")
