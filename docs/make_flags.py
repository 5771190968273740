"""Write docs/flags.md, the reference of all flags, from the parsers of the scripts.

    python docs/make_flags.py
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "flags.md"
FIRST, *MORE = PRETRAINING = ("main_dino.py", "main_dinov2.py")
SHARED = 3  # a flag that this many scripts have, with the same default and help, is listed once, as a shared flag
UNTITLED = ("options", "positional arguments")  # argparse's own groups

HEAD = """# All flags

`python docs/make_flags.py` generates this page from the scripts; `SCRIPT --help` prints the same. `@FILE` reads flags
from a file, such as those in `presets/`. If a flag is given twice, the later value counts.

## Flags shared by several scripts
"""


class Flag(NamedTuple):
    name: str
    default: str
    help: str


Groups = dict[Flag, str]  # each flag of a script, in the order of --help, and the title of its group


def parsers() -> dict[str, argparse.ArgumentParser]:
    """{script: its parser}, the training scripts first."""
    sys.path.insert(0, str(ROOT))
    names = [path.name for path in sorted(ROOT.glob("*.py")) if "\ndef get_args_parser(" in path.read_text()]
    names.sort(key=lambda name: name not in PRETRAINING)
    return {name: importlib.import_module(name.removesuffix(".py")).get_args_parser() for name in names}


def flags_of(parser: argparse.ArgumentParser) -> Groups:
    return {Flag(named(action), default(action), (action.help or "").replace("%%", "%")):
            "" if group.title in UNTITLED else group.title
            for group in parser._action_groups for action in group._group_actions
            if not isinstance(action, argparse._HelpAction)}


def named(action: argparse.Action) -> str:
    """`--flag`, and its choices if it has any."""
    names = " ".join(action.option_strings) or str(action.metavar)
    if action.nargs == 0 or not action.option_strings:
        return f"`{names}`"
    many = " ..." if action.nargs in ("+", "*") else ""
    choices = "\\|".join(map(str, action.choices)) if action.choices else ""
    return f"`{names}`{many}" + (f" {choices}" if choices else "")


def name_of(flag: Flag) -> str:
    return f"`{flag.name.split('`')[1].split()[0]}`"


def default(action: argparse.Action) -> str:
    value = action.default
    if action.required or not action.option_strings:
        return "required"
    if action.nargs == 0:
        return "off"
    if value is None or value == "" or value == []:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def tables(flags: Groups) -> list[str]:
    """One table per group, under its title."""
    lines = []
    for title in dict.fromkeys(flags.values()):
        lines += [f"**{title[:1].upper()}{title[1:]}**", ""] if title else []
        lines += ["| flag | default | description |", "|---|---|---|"]
        lines += [f"| {flag.name} | {flag.default} | {flag.help} |" for flag in flags if flags[flag] == title]
        lines += [""]
    return lines


def page() -> str:
    scripts = {script: flags_of(parser) for script, parser in parsers().items()}
    # A script that has every flag of the training script extends it: only what it adds is listed.
    extends = {script for script, flags in scripts.items() if script != FIRST and scripts[FIRST].keys() <= flags.keys()}
    own = [flags for script, flags in scripts.items() if script not in extends]
    every = {flag: group for flags in reversed(own) for flag, group in flags.items()}  # the group in the first script
    shared = {flag: every[flag] for flag in dict.fromkeys(flag for flags in own for flag in flags)
              if sum(flag in flags for flags in own) >= SHARED}
    lines = [HEAD, *tables(shared)]
    for script, flags in scripts.items():
        lines += [f"## {script}", ""]
        if script in extends:
            lines += [f"All flags of {FIRST}, and:", ""]
        first = scripts[FIRST] if script in extends or script in MORE else {}
        hidden = first if script in extends else shared | first
        lines += tables({flag: group for flag, group in flags.items() if flag not in hidden})
        if script in MORE:
            names = [name_of(flag) for flag in flags if flag in first and flag not in shared]
            lines += [f"As in {FIRST}: {', '.join(names)}.", ""]
        names = [name_of(flag) for flag in flags if flag in shared and script not in extends]
        lines += [f"Shared flags: {', '.join(names)}.", ""] if names else []
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    OUT.write_text(page())
    print(f"wrote {OUT.relative_to(ROOT)}")
