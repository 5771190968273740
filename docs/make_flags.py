"""Write docs/flags.md, every flag of every script once, from the parsers themselves.

    python docs/make_flags.py
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "flags.md"
FIRST = "main_dino.py"
SHARED = 3  # scripts that have a flag with the same words and default, for it to be listed with the shared ones

HEAD = """# Every flag

Written by `python docs/make_flags.py` from the scripts' parsers; `SCRIPT --help` says the same. `@FILE` in place of
flags reads them from a file, such as those in `presets/`; the later of two equal flags counts.

## Flags that several scripts share

""".splitlines()

Key = tuple[str, str, str]  # names, default, help


def parsers() -> dict[str, argparse.ArgumentParser]:
    """{script: its parser}, the training script first."""
    sys.path.insert(0, str(ROOT))
    names = [path.name for path in sorted(ROOT.glob("*.py")) if "\ndef get_args_parser(" in path.read_text()]
    names.sort(key=lambda name: name != FIRST)
    return {name: importlib.import_module(name.removesuffix(".py")).get_args_parser() for name in names}


def flags_of(parser: argparse.ArgumentParser) -> list[Key]:
    actions = [a for a in parser._actions if not isinstance(a, argparse._HelpAction)]
    return [(named(a), default(a), (a.help or "").replace("%%", "%")) for a in actions]


def named(action: argparse.Action) -> str:
    """`--flag VALUE`, its choices in place of VALUE where there are any."""
    names = " ".join(action.option_strings) or str(action.metavar)
    if action.nargs == 0 or not action.option_strings:
        return f"`{names}`"
    value = "\\|".join(map(str, action.choices)) if action.choices else ""
    many = {"+": " ...", "*": " ..."}.get(action.nargs, "") if isinstance(action.nargs, str) else ""
    return f"`{names}`{many}" + (f" {value}" if value else "")


def default(action: argparse.Action) -> str:
    value = action.default
    if action.required or not action.option_strings:
        return "must be given"
    if action.nargs == 0:
        return "off"
    if value is None or value == "" or value == []:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def table(flags: list[Key]) -> list[str]:
    rows = [f"| {name} | {value} | {text} |" for name, value, text in flags]
    return ["| flag | default | what it is |", "|---|---|---|", *rows, ""]


def page() -> str:
    found = {script: flags_of(parser) for script, parser in parsers().items()}
    # A script whose flags include all those of the training script only adds to it.
    added = {s: [f for f in flags if f not in found[FIRST]] if s != FIRST and set(found[FIRST]) <= set(flags) else None
             for s, flags in found.items()}
    own = [flags for script, flags in found.items() if added[script] is None]
    shared = [f for f in dict.fromkeys(f for flags in own for f in flags) if sum(f in flags for flags in own) >= SHARED]
    lines = [*HEAD, *table(shared)]
    for script, flags in found.items():
        lines += [f"## {script}", ""]
        if added[script] is not None:
            lines += [f"Those of {FIRST}, and:", "", *table(added[script])]
            continue
        common = [name.split("`")[1].split()[0] for name, *_ in (f for f in flags if f in shared)]
        lines += table([f for f in flags if f not in shared])
        lines += [f"And, as above: {', '.join(f'`{name}`' for name in common)}.", ""] if common else []
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    OUT.write_text(page())
    print(f"wrote {OUT.relative_to(ROOT)}")
