"""What curation writes: list.txt for --data_path, curation.json, and a page with images.

Shapes: N images of the pile.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import atomic
from imagesets.checking import write_list
from imagesets.decode import MODES, printable
from imagesets.joined import Joined
from parallel import Refused, refusing
from protocols import report, sheets
from protocols.curation import EXACT, NEAR, Curated
from protocols.features import images_refused

COLUMNS = 8  # images per row of a sheet
CELL = 96  # pixels

# ---- The list ----


def check_names(images: Joined, folder: Path) -> None:
    """Raises Refused: a path that a line of a list can't hold, or images to be written into a folder of the user's."""
    own = not (folder / "images").exists() or b"images" in atomic.outputs_in(folder)
    for i in range(len(images)):
        path = images.path(i)
        if not path and not own:
            raise Refused(f"--output_dir {folder}: images/ in it was not written by this script, which would write "
                          f"{printable(images.name(i).encode())} and others there; choose another folder")
        if path and (b"\n" in path or b"\t" in path or b"\r" in path):
            raise Refused(f"--data_path: {printable(path)!r} has a tab or line break in its name, which a list can't "
                          "hold; rename it")


def write_kept(images: Joined, kept: np.ndarray, folder: Path) -> None:
    """list.txt: a line per image, its absolute path and, if the pile has labels, its class.

    Images without a file of their own, drawn or packed with others, are written to `folder`/images. What earlier runs
    wrote there stays.
    """
    lines = []
    for i in kept.tolist():
        path = images.path(i) or written(images, i, folder / "images")
        name = "" if images.labels is None else images.classes[int(images.labels[i])]
        lines.append(path + (b"\t" + name.encode() if name else b""))
    write_list(str(folder / "list.txt"), lines, "--output_dir")


def written(images: Joined, i: int, folder: Path) -> bytes:
    """The absolute path of a file of the image, in `folder`: PNG, or .npy for channels that are no colours."""
    with images_refused():
        pixels = images.load(i).numpy()  # (C, H, W)
    path = folder.absolute() / f"{i:08d}.{'png' if len(pixels) in MODES else 'npy'}"
    if not folder.exists():
        atomic.mark_output(folder)  # a pile that --output_dir lies in does not grow by these
        folder.mkdir()
    with atomic.replacing(path) as temporary, open(temporary, "wb") as file:
        if len(pixels) in MODES:
            Image.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1)).save(file, "PNG")
        else:
            np.save(file, np.moveaxis(pixels, 0, -1))
    return bytes(path)


# ---- Figures ----


def class_counts(images: Joined, curated: Curated) -> list[dict]:
    """Images per class before and after, [] for a pile without labels. Curation itself looks at no label."""
    if images.labels is None:
        return []
    labels, k = images.labels.numpy(), len(images.classes)
    counts = np.bincount(labels, minlength=k), np.bincount(labels[curated.kept], minlength=k)
    return [{"class": name, "before": int(one), "after": int(other)}
            for name, one, other in zip(images.classes, *counts, strict=True)]


def write_json(path: Path, images: Joined, curated: Curated, about: Mapping) -> dict:
    """Parameters, counts per stage and class, and each dropped image with the reason; returns all but the latter."""
    figures = dict(about, counts=curated.counts, classes=class_counts(images, curated))
    dropped = [{"image": images.name(i), "reason": reason}
               | ({} if keeper is None else {"duplicates": images.name(keeper)})
               for i, (reason, keeper) in sorted(curated.reasons.items())]
    with refusing(f"--output_dir {path.parent}", "make room, or give another"):
        atomic.write_text(path, json.dumps(figures | {"dropped": dropped}, indent=1))
    return figures


# ---- The page ----


def show(images: Joined, rows: Sequence[Sequence[int]], captions: Sequence[Sequence[str]], path: Path) -> None:
    """Draw rows of images into a PNG file."""
    with images_refused():
        figures = [[sheets.as_picture(images.load(int(i))) for i in row] for row in rows]
    sheets.save_picture(sheets.contact_sheet(figures, cell=CELL, captions=captions), path)


def duplicate_rows(images: Joined, curated: Curated, most: int) -> tuple[list[list[int]], list[list[str]]]:
    """The largest groups of duplicates, first the image that the others duplicate, and captions with what became of
    it."""
    numbers, counts = np.unique(curated.group, return_counts=True)
    largest = numbers[np.argsort(-counts, kind="stable")][: min(most, int((counts > 1).sum()))]
    rows, captions = [], []
    for first in largest.tolist():
        others = [i for i in np.flatnonzero(curated.group == first).tolist() if i != first]
        rows.append([first, *others[: COLUMNS - 1]])
        reasons = [curated.reasons.get(i, ("",))[0] for i in others]
        kinds = ", ".join(f"{reasons.count(kind)} {word}" for kind, word in ((EXACT, "exact"), (NEAR, "near"))
                          if kind in reasons)
        fate = curated.reasons[first][0] if first in curated.reasons else "kept"
        captions.append([f"{fate}; {kinds}", *(Path(images.name(i)).name for i in others[: COLUMNS - 1])])
    return rows, captions


def top_clusters(curated: Curated) -> np.ndarray:
    """(n,) the coarsest cluster of each clustered image."""
    labels = curated.levels[0].labels
    for level in curated.levels[1:]:
        labels = level.labels[labels]
    return labels.numpy()


def cluster_rows(curated: Curated, most: int) -> tuple[list[list[int]], list[list[str]], list[dict]]:
    """Images of clusters of the coarsest level, from the largest to the smallest: before, and those that are kept.

    Returns:
        rows of image numbers, captions, and {"cluster", "before", "after"} of all clusters.
    """
    top, is_kept = top_clusters(curated), np.isin(curated.clustered, curated.kept)
    before = np.bincount(top)
    after = np.bincount(top[is_kept], minlength=len(before))
    order = np.argsort(-before, kind="stable")
    table = [{"cluster": n, "before": int(before[c]), "after": int(after[c])} for n, c in enumerate(order)]
    rows, captions = [], []
    for n in np.unique(np.linspace(0, len(order) - 1, min(most, len(order))).round().astype(int)).tolist():
        members = top == order[n]
        for name, chosen in (("before", members), ("after", members & is_kept)):
            numbers = curated.clustered[chosen]
            spread = np.unique(np.linspace(0, len(numbers) - 1, min(COLUMNS, len(numbers))).round().astype(int))
            rows.append(numbers[spread].tolist())
            captions.append([f"{n} {name}: {len(numbers)}"])
    return rows, captions, table


def write_page(folder: Path, images: Joined, curated: Curated, figures: Mapping, most: int) -> None:
    """curation.html, with duplicates.png and clusters.png embedded; `most` rows of each."""
    sections = [("Stages", [report.table(figures["counts"])]),
                ("Settings", [report.facts({k: v for k, v in figures.items() if k not in ("counts", "classes")})])]
    if figures["classes"]:
        sections.insert(1, ("Classes", [report.table(figures["classes"]),
                                        report.note("Labels are counted here and used nowhere else.")]))
    rows, captions = duplicate_rows(images, curated, most)
    if rows:
        show(images, rows, captions, folder / "duplicates.png")
        sections.append(("Largest groups of duplicates", [report.figure(
            folder / "duplicates.png", "A group per row. The first image stands for it; its caption says what became "
            "of it. Long groups are cut.")]))
    if curated.levels:
        rows, captions, table = cluster_rows(curated, most)
        parts = [report.table(table)]
        if rows:
            show(images, rows, captions, folder / "clusters.png")
            parts.insert(0, report.figure(folder / "clusters.png", "Clusters of the coarsest level, the largest first, "
                                          "before and after: number of the cluster, and how many images it has."))
        sections.append(("Clusters", parts))
    atomic.write_text(folder / "curation.html", report.page("Curation", sections))
