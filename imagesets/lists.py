"""Lists of images: text files of paths, with or without labels, and CSV files with a header."""

from __future__ import annotations

import csv
import io
import os

import parallel
from imagesets.decode import printable
from parallel import Refused


def read_rows(where: str, path: str) -> list[list[bytes]]:
    """[path] or [path, label] of each image of a list.

    Raises:
        Refused: not a list, or one that gives an image two labels.
    """
    with open(path, "rb") as file:
        content = file.read().removeprefix(b"\xef\xbb\xbf")
    folder = os.fsencode(os.path.dirname(path))
    rows = csv_rows(where, content) if path.lower().endswith(".csv") else text_rows(where, folder, content)
    check_repeated(where, rows)
    return rows


def read_text(path: str | os.PathLike) -> str:
    """A text file in UTF-8, with or without a byte order mark. Raises Refused for one in another encoding."""
    with open(path, "rb") as file:
        content = file.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise Refused(f"{path}: line {line} is not in UTF-8; save the file as UTF-8") from error


def check_repeated(where: str, rows: list[list[bytes]]) -> None:
    """Refuses an image with two labels, and tells of images that are listed more than once with the same one."""
    first: dict[bytes, int] = {}
    repeated = []
    for i, row in enumerate(rows):
        path = os.path.normpath(row[0]) if b"//" in row[0] or b"./" in row[0] else row[0]
        before = first.setdefault(path, i)
        if before == i:
            continue
        if row[1:] != rows[before][1:]:
            labels = " and ".join(repr(printable(rows[j][1])) for j in (before, i))
            raise Refused(f"{where}: {printable(row[0])!r} has two labels, {labels} (images {before + 1} and {i + 1} "
                          "of the list); keep one of the lines")
        repeated.append(i)
    if repeated:
        parallel.say(f"{where}: {len(repeated)} of {len(rows)} images are listed again (the first: "
                     f"{printable(rows[repeated[0]][0])!r}) and count again; remove the lines to count each once")


def text_rows(where: str, folder: bytes, content: bytes) -> list[list[bytes]]:
    """[path] or [path, label] of each line: "path", "path<TAB>label", or "path label" where the first line as a whole
    is no file and its part before the last space is one."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):  # as PowerShell writes
        raise Refused(f"{where}: the list is in UTF-16; save it as UTF-8")
    rows = [line.split(b"\t") for line in (line.rstrip(b"\r") for line in content.split(b"\n")) if line]
    if not rows:
        raise Refused(f"{where}: the list is empty; write one path per line")
    if len({len(row) for row in rows}) > 1 or len(rows[0]) > 2:
        raise Refused(f"{where}: some lines have a label and some don't; write 'path' or 'path<TAB>label' in all")
    if bad := [row[0] for row in rows if not all(row)]:
        raise Refused(f"{where}: the path or the label of {printable(bad[0])!r} is empty; write both")
    first, space, _ = rows[0][0].rstrip().rpartition(b" ")
    if len(rows[0]) == 2 or not space or os.path.isfile(os.path.join(folder, rows[0][0])):
        return rows
    if not os.path.isfile(os.path.join(folder, first)):
        return rows
    parallel.say(f"{where}: lines are read as 'path label', split at the last space, as {printable(rows[0][0])!r} is "
                 "no file")
    split = [row[0].rstrip().rpartition(b" ") for row in rows]
    if bad := [row[0] for row, (path, _, label) in zip(rows, split, strict=True) if not path or not label]:
        raise Refused(f"{where}: {printable(bad[0])!r} has no label and the first line has one; write 'path label' in "
                      "all")
    return [[path.rstrip(), label] for path, _, label in split]


PATH_COLUMNS = ("path", "image", "file", "filename", "file_name", "filepath", "image_path")
LABEL_COLUMNS = ("label", "class", "target", "category")


def csv_rows(where: str, content: bytes) -> list[list[bytes]]:
    """[path] or [path, label] of each row of a CSV file, whose header names the columns."""
    text = content.decode("utf-8", "surrogateescape")
    head = text.partition("\n")[0]
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count)))
    rows = [row for row in rows if any(cell.strip() for cell in row)]
    names = [cell.strip().lower() for cell in rows[0]] if rows else []
    path = next((names.index(name) for name in PATH_COLUMNS if name in names), None)
    if path is None or len(rows) < 2:
        raise Refused(f"{where}: give a header with a column path, and label if there are labels, and a row per image; "
                      f"the first line is {head.strip()[:80]!r}")
    label = next((names.index(name) for name in LABEL_COLUMNS if name in names), None)
    columns = [path] if label is None else [path, label]
    for number, row in enumerate(rows[1:], 2):
        if len(row) <= max(columns) or not all(row[c].strip() for c in columns):
            raise Refused(f"{where}: row {number} has no {' or no '.join(names[c] for c in columns)}; complete it")
    return [[row[c].strip().encode("utf-8", "surrogateescape") for c in columns] for row in rows[1:]]
