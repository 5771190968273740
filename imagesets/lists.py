"""Lists of images: text files of paths, with or without labels, and CSV files with a header."""

from __future__ import annotations

import csv
import io
import os
import re

import parallel
from imagesets.decode import printable
from imagesets.parts import LABEL_COLUMNS, SPLIT_COLUMNS, is_part, part_named
from parallel import Refused


def read_rows(where: str, path: str, split: str | None = None) -> list[list[bytes]]:
    """[path] or [path, label] of each image of a list.

    Args:
        split: None: of all rows; 'train': of that part, if a column says the part; 'val': of that part.

    Raises:
        Refused: not a list, one that gives an image two labels, or one without the part.
    """
    table = path.lower().endswith(".csv")
    rows = csv_rows(where, read(path), split) if table else text_rows(where, path, read(path))
    if split == "val" and not table:
        raise Refused(f"{where}: a list has no validation part; give the validation images a list of their own")
    check_repeated(where, rows)
    return rows


def read(path: str | os.PathLike) -> bytes:
    with open(path, "rb") as file:
        return file.read().removeprefix(b"\xef\xbb\xbf")


def read_text(path: str | os.PathLike) -> str:
    """A text file in UTF-8, with or without a byte order mark. Raises Refused for one in another encoding."""
    content = read(path)
    try:
        return content.decode("utf-8")
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


def text_rows(where: str, list_path: str, content: bytes) -> list[list[bytes]]:
    """[path] or [path, label] of each line: "path", "path<TAB>label", or "path label" where the first line as a whole
    is no file and its part before the last space is one. Lines that begin with # and name no file are comments."""
    folder = os.fsencode(os.path.dirname(list_path))
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):  # as PowerShell writes
        raise Refused(f"{where}: the list is in UTF-16; save it as UTF-8")
    ends = b"\n" if b"\n" in content else b"\r"  # CR alone ended lines on old Macs
    lines = [line for line in (line.rstrip(b"\r") for line in content.split(ends)) if line.strip()]
    rows = [line.split(b"\t") for line in lines if not is_comment(folder, line)]
    rows = [[row[0], *(label.strip() for label in row[1:])] for row in rows]
    if len(rows) < len(lines):
        parallel.say(f"{where}: {len(lines) - len(rows)} of {len(lines)} lines are comments, as they begin with # and "
                     "name no file")
    if not rows:
        raise Refused(f"{where}: the list is empty; write one path per line")
    if odd := [row for row in rows if len(row) != len(rows[0]) or len(row) > 2]:
        raise Refused(f"{where}: some lines have a label and some don't (the first that differs: "
                      f"{printable(odd[0][0])!r}); write 'path' or 'path<TAB>label' in all")
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


def is_comment(folder: bytes, line: bytes) -> bool:
    if not line.startswith(b"#"):
        return False
    names = (line.partition(b"\t")[0], line.rstrip().rpartition(b" ")[0].rstrip())
    return not any(name and os.path.isfile(os.path.join(folder, name)) for name in names)


PATH_COLUMNS = ("path", "image", "file", "filename", "file_name", "filepath", "image_path")


def csv_table(where: str, content: bytes) -> tuple[list[str], list[list[str]]]:
    """The names of the columns, in lower case, and the rows of a CSV file."""
    text = content.decode("utf-8", "surrogateescape")
    head = re.split(r"[\r\n]", text, maxsplit=1)[0]
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count)))
    rows = [row for row in rows if any(cell.strip() for cell in row)]
    names = [cell.strip().lower() for cell in rows[0]] if rows else []
    if not set(PATH_COLUMNS) & set(names) or len(rows) < 2:
        raise Refused(f"{where}: give a header with a column path, and label if there are labels, and a row per image; "
                      f"the first line is {head.strip()[:80]!r}")
    return names, rows[1:]


def csv_rows(where: str, content: bytes, split: str | None) -> list[list[bytes]]:
    """[path] or [path, label] of each row of a CSV file, whose header names the columns."""
    names, rows = csv_table(where, content)
    path, label = (next((names.index(name) for name in known if name in names), None)
                   for known in (PATH_COLUMNS, LABEL_COLUMNS))
    columns = [path] if label is None else [path, label]
    for number, row in enumerate(rows, 2):
        if len(row) <= max(columns) or not all(row[c].strip() for c in columns):
            raise Refused(f"{where}: row {number} has no {' or no '.join(names[c] for c in columns)}; complete it")
    if label is None and len(names) > 1:
        parallel.say(f"{where}: no labels, because no column is named {' or '.join(LABEL_COLUMNS)}; the columns are "
                     f"{', '.join(names)}")
    rows = rows_of_part(where, names, rows, split)
    return [[row[c].strip().encode("utf-8", "surrogateescape") for c in columns] for row in rows]


def rows_of_part(where: str, names: list[str], rows: list[list[str]], split: str | None) -> list[list[str]]:
    """The rows of a split, as a column of the table tells it; all rows for None, or where there is no such column."""
    column = split_column(names)
    cells = [] if column is None else split_cells(rows, column)
    part = part_named(where, several(cells), split)
    if part is not None:
        if others := sorted({cell for cell in cells if not is_part(cell)}):
            parallel.say(f"{where}: rows whose {names[column]!r} is {' or '.join(map(repr, others))} are left out")
        return [row for row, cell in zip(rows, cells, strict=True) if cell == part]
    if split == "val":
        raise Refused(f"{where}: a list has no validation part without a column split with the values train and val; "
                      "give the validation images a list of their own")
    if column is not None and not cells:
        parallel.say(f"{where}: the column {names[column]!r} is not used, as its values are no parts (train, val)")
    if parts := several(cells):
        parallel.say(f"{where}: the rows of all parts are used ({', '.join(sorted(parts))})")
    return rows


def split_column(names: list[str]) -> int | None:
    return next((names.index(name) for name in SPLIT_COLUMNS if name in names), None)


def split_cells(rows: list[list[str]], column: int) -> list[str]:
    """The part of each row, in lower case; [] if no value of the column is a part."""
    cells = [row[column].strip().lower() if column < len(row) else "" for row in rows]
    return cells if any(map(is_part, cells)) else []


def parts_in(where: str, path: str) -> set[str]:
    """The parts that a list tells apart."""
    if not path.lower().endswith(".csv"):
        return set()
    names, rows = csv_table(where, read(path))
    column = split_column(names)
    return set() if column is None else several(split_cells(rows, column))


def several(cells: list[str]) -> set[str]:
    """The parts, if there are two or more: a list of one part alone is a set of its own."""
    parts = set(cells)
    return parts if len(parts) > 1 else set()
