"""The layout: which room may import which, derived from the files themselves."""

import ast
import graphlib
from pathlib import Path

from conftest import ROOT

ROOMS = {"method", "imagesets", "weights", "protocols", "pretraining", "detection"}
SHARED = {"vision_transformer", "utils", "flags", "parallel", "atomic"}
GROUND = {"parallel", "atomic"}
MAY_IMPORT = {
    "vision_transformer": set(), "parallel": set(), "atomic": set(), "hubconf": set(),
    "flags": {"parallel", "imagesets"},
    "method": {"parallel"},
    "utils": {"method"},
    "imagesets": GROUND,
    "weights": GROUND | {"vision_transformer", "method"},
    "protocols": SHARED | {"method", "imagesets", "weights"},
    "pretraining": SHARED | {"method", "imagesets", "weights", "protocols"},
    "detection": SHARED | {"imagesets", "weights", "protocols", "pretraining"},
    "run_with_submitit": SHARED | ROOMS - {"detection"} | {"main_dino", "main_dinov2"},
}
# Scripts for which the twenty files of the first layout made no room.
ADDED = {"main_dinov2", "check_images", "eval_semantic", "eval_depth", "curate", "detect"}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")} - SHARED - {"hubconf"}
# What a user's own folder often calls its modules: none of ours may have these names.
COMMON = {"data", "dataset", "datasets", "images", "model", "models", "metrics", "training", "train", "evaluation",
          "eval", "losses", "config", "common", "helpers", "logger", "checkpoint", "features", "layers"}


def files() -> list[Path]:
    return [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, known: set[str]) -> set[str]:
    """The project's modules that a file imports, anywhere in it, type checking included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name in known} - {module(path)}


def graph() -> dict[str, set[str]]:
    known = {module(path) for path in files()}
    return {module(path): imports(path, known) for path in files()}


def test_there_are_few_files_at_the_top():
    assert len(list(ROOT.glob("*.py"))) - len(ADDED & SCRIPTS) <= 20
    assert {path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file()} == ROOMS


def test_no_room_imports_what_stands_below_it():
    wrong = []
    for name, imported in graph().items():
        room = name.split(".")[0]
        allowed = MAY_IMPORT.get(room, SHARED | ROOMS) | {room}
        wrong += [f"{name} imports {other}" for other in imported if other.split(".")[0] not in allowed]
    assert not wrong


def test_no_file_imports_a_script():
    wrong = {name: imported & SCRIPTS for name, imported in graph().items() if imported & SCRIPTS}
    assert wrong == {"run_with_submitit": {"main_dino", "main_dinov2"}}


def test_there_are_no_circles():
    # A room's __init__ that hands a name on is no file of its own for this: who imports the room imports that file.
    graphlib.TopologicalSorter({name: imported - {name.split(".")[0]} for name, imported in graph().items()}).prepare()


def test_names_leave_a_users_own_modules_alone():
    tops = {name.split(".")[0] for name in graph()}
    assert not tops & COMMON
