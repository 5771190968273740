"""What a Vision Transformer looks at: its class token's attention on a picture, a folder of pictures, or a video.

Shapes: B images, C channels, H heads, h x w patches, D width; pixel sizes are written height x width.
"""

import argparse
import contextlib
import itertools
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flags
import parallel
from imagesets import decode, loaders, shapes
from protocols import sheets
from vision_transformer import VITS, VisionTransformer
from weights import backbones

SHEET_PAIRS = 4  # a row of the PCA sheet holds this many pictures with their colours
DEFAULT_FPS = 25.0


def get_args_parser() -> flags.Parser:
    parser = flags.Parser("Draw what a Vision Transformer looks at, on a picture, a folder of pictures or a video.")
    network = parser.add_argument_group("network")
    network.add_argument("--arch", default="vit_small", help="a Vision Transformer; the checkpoint's own comes first")
    network.add_argument("--patch_size", type=flags.positive_int, default=8, help="the checkpoint's own comes first")
    network.add_argument("--pretrained_weights", default="", help="file of weights; random ones without, and said so")
    network.add_argument("--checkpoint_key", default="teacher", help="which network of a full checkpoint")
    network.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    source = parser.add_argument_group("what to look at (one of them; a picture of the embedded set without)")
    source.add_argument("--image_path", help="one picture")
    source.add_argument("--images", help="folder or list of pictures, or shapes:N: a sheet with a row for each")
    source.add_argument("--max_images", type=flags.positive_int, default=16,
                        help="of --images; of more of them, some evenly chosen")
    source.add_argument("--video", help="video file, or folder of frames in the order of their numbers")
    source.add_argument("--fps", type=flags.positive, help="frames a second of the video written; the source's own "
                        f"without, {DEFAULT_FPS:g} for a folder of frames")
    source.add_argument("--image_size", type=flags.positive_int, nargs="+", default=[480], metavar="PIXELS",
                        help="one number: shorter side, aspect ratio kept; two: height and width, exactly")
    show = parser.add_argument_group("what to draw")
    show.add_argument("--layer", type=int, default=-1, help="block whose attention is drawn, from 0; -1 is the last")
    show.add_argument("--threshold", type=flags.number(float, 0, 1, above=True),
                      help="also masks of the patches that hold this share of the attention (the paper's: 0.6)")
    show.add_argument("--pca", action="store_true", help="also the patch tokens' first three components as colours")
    show.add_argument("--point", type=flags.non_negative, nargs=2, metavar=("X", "Y"),
                      help="also how similar every patch is to the one at this pixel of the picture (in a video: of "
                      "its first frame, and followed from there)")
    parser.add_argument("--output_dir", default=".", help="folder to write into")
    return parser


# ---------------------------------------------------------------- sizes


def network_size(height: int, width: int, image_size: Sequence[int], patch: int) -> tuple[tuple, tuple]:
    """Size to which a picture is scaled, and size of what the network sees of it: two of (height, width).

    One number in `image_size` is the shorter side (rounded down to whole patches) and keeps the aspect ratio; two are
    the height and width as they stand. What is left of the last patch at the right and bottom is cut off, so that
    nothing is squashed.
    """
    if len(image_size) > 2:
        raise ValueError(f"--image_size {' '.join(map(str, image_size))}: give the shorter side, or height and width")
    if min(image_size) < patch:
        raise ValueError(f"--image_size {min(image_size)}: smaller than a patch of {patch}; give {patch} or more")
    scaled = tuple(image_size)
    if len(image_size) == 1:
        shorter = image_size[0] // patch * patch
        scaled = tuple(max(shorter, round(side * shorter / min(height, width))) for side in (height, width))
    return scaled, tuple(side // patch * patch for side in scaled)


def resize(image: Tensor, image_size: Sequence[int], patch: int) -> Tensor:
    """uint8 (C, height, width) -> uint8 (C, h * patch, w * patch), bicubic and antialiased; see `network_size`."""
    scaled, seen = network_size(*image.shape[-2:], image_size, patch)
    return F.interpolate(image[None], scaled, mode="bicubic", antialias=True)[0, :, : seen[0], : seen[1]]


def patch_of_point(point: Sequence[float], height: int, width: int, image_size: Sequence[int],
                   patch: int) -> tuple[int, int]:
    """Row and column of the patch at pixel (x, y) of a picture of height x width, before it was scaled."""
    x, y = point
    if x >= width or y >= height:
        raise ValueError(f"--point {x:g} {y:g}: outside the picture, which is {width} wide and {height} high")
    scaled, seen = network_size(height, width, image_size, patch)
    row, column = int((y + 0.5) * scaled[0] / height) // patch, int((x + 0.5) * scaled[1] / width) // patch
    return min(row, seen[0] // patch - 1), min(column, seen[1] // patch - 1)


# ---------------------------------------------------------------- the network


def load_network(args: argparse.Namespace) -> tuple[VisionTransformer, dict]:
    """The network and what `backbones.load_backbone` says of it; ValueError when it has no attention to draw."""
    device = parallel.pick_device(args.device)
    model, info = backbones.load_backbone(args.pretrained_weights, args.arch, args.patch_size, args.checkpoint_key)
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"--arch {info['arch']}: has no class token whose attention could be drawn; "
                         f"use one of {', '.join(VITS)}")
    if not -len(model.blocks) <= args.layer < len(model.blocks):
        raise ValueError(f"--layer {args.layer}: the network has layers 0 to {len(model.blocks) - 1}; -1 is the last")
    network_size(64, 64, args.image_size, info["patch_size"])  # a wrong flag is named before a picture is opened
    return model.to(device), info


@torch.no_grad()
def look(model: nn.Module, info: dict, image: Tensor, args: argparse.Namespace) -> tuple[np.ndarray, ...]:
    """Show the network a picture uint8 (C, height, width).

    Returns:
        The picture as it was seen, uint8 (h * patch, w * patch, 3); attention (H, h, w); patch tokens (h, w, D).
    """
    image = resize(image, args.image_size, info["patch_size"])
    device = next(model.parameters()).device
    mean, std = (torch.tensor(info[name], device=device).view(-1, 1, 1) for name in ("mean", "std"))
    attention, tokens = sheets.attention_and_tokens(model, ((image.to(device) / 255 - mean) / std)[None], args.layer)
    return sheets.as_picture(image), attention[0].numpy(), tokens[0].numpy()


# ---------------------------------------------------------------- one picture


def draw_picture(args: argparse.Namespace, model: nn.Module, info: dict) -> None:
    """Write img.png, attn-head*.png and the other pictures of one picture."""
    image = load_picture(args.image_path, info["in_chans"])
    point = args.point and patch_of_point(args.point, *image.shape[-2:], args.image_size, info["patch_size"])
    picture, attention, tokens = look(model, info, image, args)
    written = {"img": picture, "attn-mean": patches(attention.mean(axis=0), picture),
               "overlay": sheets.attention_overlay(picture, attention.mean(axis=0))}
    written |= {f"attn-head{i}": patches(head, picture) for i, head in enumerate(attention)}
    if args.threshold:
        masks = sheets.threshold_mask(attention, args.threshold)
        written |= {f"mask_th{args.threshold}_head{i}": sheets.mask_overlay(picture, m) for i, m in enumerate(masks)}
    if args.pca:
        written["pca"] = enlarge(sheets.pca_picture(tokens), picture)
    if point:
        written["similarity"] = similarity_picture(picture, tokens, tokens[point], point, info["patch_size"])
    save(written, args.output_dir)
    print(f"{len(attention)} heads on {attention.shape[1]} x {attention.shape[2]} patches: {len(written)} pictures "
          f"written to {args.output_dir} ({', '.join(f'{name}.png' for name in written)})")


def save(pictures: dict[str, np.ndarray], output_dir: str) -> None:
    flags.prepare_output(Path(output_dir))
    for name, picture in pictures.items():
        sheets.save_picture(picture, Path(output_dir, f"{name}.png"))


def load_picture(path: str | None, in_chans: int) -> Tensor:
    """A picture file as uint8 (C, height, width); the first of the embedded set when there is no path."""
    if path is None:
        return decode.from_array(shapes.draw(0, 480)[0], in_chans)
    if not Path(path).is_file():
        raise FileNotFoundError(f"--image_path {path}: no such file; a folder of pictures goes to --images")
    try:
        return decode.decode(path, in_chans)
    except ValueError as error:
        raise ValueError(f"--image_path {error}; give another picture") from error


def patches(values: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """A map as colours from its smallest to its largest value, each patch a square, at the picture's size."""
    return enlarge(sheets.heatmap(sheets.scale(values, values.min(), values.max())), picture)


def enlarge(colors: np.ndarray, picture: np.ndarray) -> np.ndarray:
    return sheets.resize(colors, *picture.shape[:2], smooth=False)


def similarity_picture(picture: np.ndarray, tokens: np.ndarray, token: np.ndarray, point: tuple[int, int] | None,
                       patch: int) -> np.ndarray:
    """The picture with every patch's similarity to a token (D,) laid over it; the patch at `point` is outlined."""
    drawn = sheets.attention_overlay(picture, sheets.similarity_map(tokens, token))
    return sheets.outline_patch(drawn, point, patch) if point else drawn


# ---------------------------------------------------------------- many pictures


def draw_sheets(args: argparse.Namespace, model: nn.Module, info: dict, source: loaders.Images | None = None) -> None:
    """Write attention_sheet.png, and pca_sheet.png with one basis of colours: of --images, or of `source`."""
    source = source or loaders.open_images(args.images, in_chans=info["in_chans"], flag="--images")
    seen = []
    for i in np.linspace(0, len(source) - 1, min(len(source), args.max_images)).astype(int).tolist():
        try:
            seen.append(look(model, info, source.load(i), args))
        except (ValueError, OSError) as error:
            print(f"left out: {error}")
    if not seen:
        raise ValueError(f"--images {args.images}: no picture of it can be read")
    pictures, attentions, tokens = zip(*seen, strict=True)
    masks = args.threshold and [sheets.threshold_mask(a.mean(axis=0), args.threshold) for a in attentions]
    drawn = {"attention_sheet": sheets.attention_sheet(pictures, attentions, masks)}
    if args.pca:
        basis = sheets.pca_basis(np.concatenate([t.reshape(-1, t.shape[-1]) for t in tokens]))
        cells = [cell for picture, t in zip(pictures, tokens, strict=True)
                 for cell in (picture, enlarge(sheets.pca_picture(t, basis), picture))]
        columns = 2 * min(SHEET_PAIRS, len(pictures))
        drawn["pca_sheet"] = sheets.contact_sheet([cells[i:i + columns] for i in range(0, len(cells), columns)])
    save(drawn, args.output_dir)
    print(f"{len(seen)} of {len(source)} pictures: {' and '.join(f'{name}.png' for name in drawn)} written to "
          f"{args.output_dir}")


# ---------------------------------------------------------------- video


def draw_video(args: argparse.Namespace, model: nn.Module, info: dict) -> None:
    """Write attention.mp4: each frame beside its overlay and the other pictures asked for."""
    frames, fps = open_video(args.video, args.fps, info["in_chans"])
    rows = video_rows(frames, args, model, info)
    first = next(rows, None)  # what is wrong with the flags shows here, before anything is written
    if first is None:
        raise ValueError(f"--video {args.video}: no frame in it; give another file or folder")
    flags.prepare_output(Path(args.output_dir))
    path, count = Path(args.output_dir, "attention.mp4"), 0
    with contextlib.closing(open_writer(path, first.shape, fps)) as writer:
        for row in itertools.chain([first], rows):
            writer.send(np.pad(row, ((0, len(row) % 2), (0, row.shape[1] % 2), (0, 0)), mode="edge"))
            count += 1
    print(f"{count} frames, {fps:g} a second: {path} written")


def video_rows(frames: Iterable[Tensor], args: argparse.Namespace, model: nn.Module,
               info: dict) -> Iterator[np.ndarray]:
    """For each frame uint8 (C, height, width) its pictures side by side; one frame is held at a time.

    The colours of the PCA and the token of the chosen point are the first frame's, so that they stay put.
    """
    first = basis = token = None
    for frame in frames:
        picture, attention, tokens = look(model, info, frame, args)
        if first is None:
            first = picture
            basis = sheets.pca_basis(tokens) if args.pca else None
            if args.point:
                token = tokens[patch_of_point(args.point, *frame.shape[-2:], args.image_size, info["patch_size"])]
        panels = frame_panels(picture, attention, tokens, args.threshold, basis, token)
        yield np.concatenate([sheets.resize(panel, *first.shape[:2]) for panel in panels], axis=1)


def frame_panels(picture: np.ndarray, attention: np.ndarray, tokens: np.ndarray, threshold: float | None,
                 basis: tuple | None, token: np.ndarray | None) -> list[np.ndarray]:
    """The pictures that stand side by side in a frame of the video, all of the picture's size."""
    mean = attention.mean(axis=0)
    panels = [picture, sheets.attention_overlay(picture, mean)]
    if threshold:
        panels.append(sheets.mask_overlay(picture, sheets.threshold_mask(mean, threshold)))
    if basis:
        panels.append(enlarge(sheets.pca_picture(tokens, basis), picture))
    if token is not None:
        panels.append(similarity_picture(picture, tokens, token, None, 0))
    return panels


def open_video(path: str, fps: float | None, in_chans: int) -> tuple[Iterator[Tensor], float]:
    """Frames uint8 (C, height, width), decoded as they are asked for, and frames a second.

    Raises:
        FileNotFoundError, ValueError: nothing there, or nothing that ffmpeg can read.
        ImportError: imageio-ffmpeg isn't installed.
    """
    imageio_ffmpeg = import_ffmpeg()
    if Path(path).is_dir():
        source = loaders.open_images(path, in_chans=in_chans, flag="--video")
        order = sorted(range(len(source)), key=lambda i: natural_order(source.name(i)))
        return (source.load(i) for i in order), fps or DEFAULT_FPS
    if not Path(path).is_file():
        raise FileNotFoundError(f"--video {path}: no such file or folder; give a video, or a folder of frames")
    if in_chans != 3:
        raise ValueError(f"--video {path}: a video has 3 channels, the network {in_chans}; give a folder of frames")
    reader = imageio_ffmpeg.read_frames(path)
    try:
        about = next(reader)
    except (OSError, RuntimeError, StopIteration) as error:
        raise ValueError(f"--video {path}: not a video that ffmpeg can read; give another file") from error
    width, height = about["size"]
    frames = (torch.frombuffer(bytearray(frame), dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)
              for frame in reader)
    return frames, fps or about["fps"] or DEFAULT_FPS


def natural_order(name: str) -> list:
    """Key that sorts frame2 before frame10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def open_writer(path: Path, shape: Sequence[int], fps: float) -> Generator:
    """A generator to which frames are sent; H.264 wants even sides, so an odd one of `shape` has a pixel more."""
    size = shape[1] + shape[1] % 2, shape[0] + shape[0] % 2
    writer = import_ffmpeg().write_frames(str(path), size, fps=fps, quality=7, macro_block_size=2)
    writer.send(None)
    return writer


def import_ffmpeg():
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise ImportError("--video needs imageio-ffmpeg: pip install imageio-ffmpeg") from error
    return imageio_ffmpeg


# ---------------------------------------------------------------- script


def check_args(args: argparse.Namespace) -> None:
    given = [name for name in ("image_path", "images", "video") if getattr(args, name) is not None]
    if len(given) > 1:
        raise ValueError(f"--{given[0]} and --{given[1]}: give one of them")
    if args.images is not None and args.point:
        raise ValueError("--point with --images: a point belongs to one picture; use --image_path or --video")
    flags.check_folder(args.output_dir)


def main(args: argparse.Namespace) -> None:
    draw = draw_video if args.video is not None else draw_sheets if args.images is not None else draw_picture
    try:
        check_args(args)
        draw(args, *load_network(args))
    except (ValueError, OSError, ImportError) as error:
        get_args_parser().error(str(error))


if __name__ == "__main__":
    arguments = get_args_parser().parse_args()
    main(arguments)
