"""Sets of images and edited copies of them, with the ground truth of which copy belongs to which image.

    database/, queries/, ground_truth.csv      header query,match,attack; a line per match, paths in the two folders. A
                                               query with several matches has several lines; an empty match: none
    original/, strong/, jpeg/*/, crop/*/       INRIA Copydays: files with the same first four digits belong together;
                                               the folders may also be named jpegqual/*/ and crops/*/
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from imagesets.listing import natural_order
from imagesets.sources import open_images
from parallel import Refused

HEADER = ("query", "match", "attack")
COPYDAYS = {"strong": ("strong",), "jpeg": ("jpeg", "jpegqual"), "crop": ("crop", "crops")}  # groups and their folders


class Copies(NamedTuple):
    """Names of files below a folder; for each query the rows of its matches in the database, and its attack; notes."""

    database: list[str]
    queries: list[str]
    matches: list[list[int]]
    attacks: list[str]
    notes: Sequence[str] = ()  # on what a report should say beside its figures


def read_copies(data_path: str) -> Copies:
    """The ground truth of `data_path`, in either layout.

    Raises:
        Refused: neither layout, or a file that is missing or contradicts another.
    """
    folder, where = Path(data_path).expanduser(), f"--data_path {data_path}"
    if (folder / "ground_truth.csv").is_file():
        copies = read_csv(folder, where)
    elif (folder / "original").is_dir():
        copies = read_copydays(folder, where)
    else:
        raise Refused(f"{where}: neither ground_truth.csv nor original/ in it; give a folder with database/, queries/ "
                      "and ground_truth.csv, or Copydays")
    if not any(copies.matches):
        raise Refused(f"{where}: none of its {len(copies.queries)} queries has a match; give a ground truth with some")
    return copies


def read_csv(folder: Path, where: str) -> Copies:
    try:
        with open(folder / "ground_truth.csv", newline="", encoding="utf-8-sig") as file:
            lines = [tuple(cell.strip() for cell in line) for line in csv.reader(file) if any(line)]
    except (OSError, UnicodeError, csv.Error) as error:
        raise Refused(f"{where}: ground_truth.csv can't be read ({error}); give a text file in UTF-8") from error
    if not lines or lines[0] != HEADER:
        raise Refused(f"{where}: ground_truth.csv has to begin with the line {','.join(HEADER)}")
    wrong = [",".join(line) for line in lines if len(line) != 3 or not line[0]]
    if wrong:
        raise Refused(f"{where}: ground_truth.csv: the line {wrong[0]!r} is not query,match,attack")
    if len(lines) == 1:
        raise Refused(f"{where}: ground_truth.csv is empty; write a line per query below its header")
    database = images_in(folder / "database", where)
    row = {name: i for i, name in enumerate(database)}
    matches, attacks = {}, {}
    for query, match, attack in lines[1:]:
        if match and match not in row:
            raise Refused(f"{where}: ground_truth.csv: {match!r}, the match of {query!r}, is not in database/")
        if attacks.setdefault(query, attack) != attack:
            raise Refused(f"{where}: ground_truth.csv: {query!r} has two attacks, {attacks[query]!r} and {attack!r}")
        if match and row[match] in matches.get(query, ()):
            raise Refused(f"{where}: ground_truth.csv: {match!r} is a match of {query!r} twice; remove one "
                          "line")
        matches.setdefault(query, []).extend([row[match]] if match else [])
    absent = [query for query in matches if not (folder / "queries" / query).is_file()]
    if absent:
        raise Refused(f"{where}: {len(absent)} image(s) of ground_truth.csv are not in queries/, the first is "
                      f"{absent[0]!r}; put them there or take their lines out")
    return Copies([f"database/{name}" for name in database], [f"queries/{name}" for name in matches],
                  list(matches.values()), list(attacks.values()))


def read_copydays(folder: Path, where: str) -> Copies:
    database = images_in(folder / "original", where)
    row = {}
    for i, name in enumerate(database):
        if row.setdefault(name[:4], i) != i:
            raise Refused(f"{where}: original/ has two images whose names begin with {name[:4]}; rename one")
    queries, matches, attacks, notes = [], [], [], []
    for group, names in COPYDAYS.items():
        present = [name for name in names if (folder / name).is_dir()]
        if len(present) > 1:
            raise Refused(f"{where}: both {present[0]}/ and {present[1]}/ in it, which stand for the same queries; "
                          "remove one")
        below = folder / (present or names)[0]
        count = len(queries)
        kinds = [below] if group == "strong" else sorted(below.glob("*/"), key=lambda kind: natural_order(kind.name))
        for kind in kinds:
            for name in images_in(kind, where) if kind.is_dir() else ():
                queries.append(f"{kind.relative_to(folder)}/{name}")
                matches.append([row[name[:4]]] if name[:4] in row else [])
                attacks.append(group if kind == below else group + kind.name)
        if len(queries) == count:
            searched = " or ".join(f"{name}/" + "*/" * (group != "strong") for name in names)
            notes.append(f"no {group} queries: no image in {searched}; the figures of all queries are without them")
    return Copies([f"original/{name}" for name in database], queries, matches, attacks, notes)


def images_in(folder: Path, where: str) -> list[str]:
    """Paths of the images in a folder, relative to it, in the order of their names."""
    if not folder.is_dir():
        raise Refused(f"{where}: there is no folder {folder.name}/ in it; give a folder that has one")
    images = open_images(folder)
    return [os.path.relpath(images.name(i), folder) for i in range(len(images))]
