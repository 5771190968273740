"""The documentation: scripts accept its commands, the fast ones run, links and names exist, flags.md is current."""

import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image
from processes import ENV

from imagesets import shapes

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PRESETS = sorted((ROOT / "presets").glob("*.txt"))
SCRIPTS = sorted(ROOT.glob("*.py"))

# Documented commands that are not run here: a word of the command, and why. The first match counts.
NOT_RUN = {
    "torchrun": "needs several GPUs; tests/pretraining/test_distributed.py runs two processes",
    "srun": "needs Slurm",
    "run_with_submitit.py": "needs Slurm; tests/test_submitit.py",
    "pytest": "runs this test",
    "ruff": "CI runs it",
    "venv": "needs the network",
    "pip": "needs the network",
    "benchmarks/": "takes minutes",
    "docs/make_flags.py": "test_the_page_of_flags_is_current",
    "--format onnx": "needs optional packages; tests/test_export.py",
    "DAVIS": "needs the data set; tests/test_video_segmentation.py",
    "ADEChallengeData2016": "needs the data set; tests/imagesets/test_class_masks.py",
    "nyu_depth_v2": "needs the data set; tests/imagesets/test_depth_maps.py",
    "kitti_raw": "needs the data set; tests/imagesets/test_depth_maps.py",
    "roxford5k": "needs the data set; tests/test_image_retrieval.py",
    "copydays": "needs the data set; tests/test_copy_detection.py",
    "IDEA-Research": "needs the network; tests/test_detect.py",
    "imagenette128": "needs the data set",
    "cifar10/train": "needs the data set",
    "torchvision:": "needs the data set",
    ".tar": "needs shards; tests/imagesets/test_shards.py",
    "hf:": "needs the data set",
    "pipe:": "needs the data set",
}

# Flags that make a documented command fast. They are appended, and the last value of a flag counts.
NETWORK = "--device cpu --num_workers 0"
QUICK = {
    "main_dino.py": f"{NETWORK} --arch vit_nano --patch_size 8 --steps 2 --warmup_epochs 0 --precision fp32 "
                    "--batch_size_per_gpu 8 --global_crops_size 32 --local_crops_size 16 --out_dim 64 "
                    "--warmup_teacher_temp_epochs 0",
    "main_dinov2.py": f"{NETWORK} --arch vit_nano --patch_size 8 --steps 2 --warmup_epochs 0 --precision fp32 "
                      "--batch_size_per_gpu 8 --global_crops_size 32 --local_crops_size 16 --out_dim 64 "
                      "--warmup_teacher_temp_epochs 0",
    "eval_knn.py": NETWORK,
    "eval_linear.py": f"{NETWORK} --epochs 2 --views 1",
    "eval_segmentation.py": "--device cpu --image_size 32",
    "eval_semantic.py": f"{NETWORK} --steps 3",
    "eval_depth.py": f"{NETWORK} --steps 3",
    "visualize_attention.py": "--device cpu --image_size 32 --max_images 2",
    "evaluate.py": f"{NETWORK} --image_size 32 --linear_epochs 2 --linear_views 1",
    "extract_features.py": NETWORK,
    "curate.py": NETWORK,
    "detect.py": f"{NETWORK} --steps 2 --warmup_steps 0 --batch_size 2 --train scenes:8x64 --eval scenes:8x64",
}


def fenced(text: str) -> list[str]:
    """Lines of the bash blocks; a line that ends with a backslash is joined with the next."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def commands(line: str) -> list[list[str]]:
    """`X=1 a && b  # why` -> [words of a, words of b]; variables set before a command are dropped."""
    split = [[]]
    for word in shlex.split(line, comments=True):
        if word in ("&&", ";", "|"):
            split.append([])
        elif split[-1] or not re.fullmatch(r"[A-Z_]+=.*", word):
            split[-1].append(word)
    return [command for command in split if command]


def documented() -> list[tuple[str, list[str]]]:
    """(file name, words) of every command on the pages, in the headers of presets and in the docstrings of scripts."""
    lines = [(page.name, line) for page in PAGES for line in fenced(page.read_text())]
    for preset in PRESETS:
        lines += [(preset.name, line) for line in re.findall(r"^#   (\w.*)", preset.read_text(), re.MULTILINE)]
    for script in SCRIPTS:
        docstring = script.read_text().split('"""')[1].replace("\\\\\n", " ")
        lines += [(script.name, line) for line in re.findall(r"^    ((?:python|torchrun) .*)", docstring, re.MULTILINE)]
    return [(where, words) for where, line in lines for words in commands(line)]


def script_and_flags(words: list[str]) -> tuple[str, list[str]] | None:
    """The Python script that a command starts, and the words after it; None if it starts none."""
    if words[0] not in ("python", "python3", "torchrun", "srun"):
        return None
    at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    return (words[at], words[at + 1:]) if at else None


def with_presets(flags: list[str]) -> list[str]:
    return [f"@{ROOT}/{word[1:]}" if word.startswith("@presets/") else word for word in flags]


def load(script: str):
    """The module of a script, under a name of its own: benchmarks/model.py is not another `model`."""
    spec = importlib.util.spec_from_file_location("documented_" + script.replace("/", "_")[:-3], ROOT / script)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    return module


DOCUMENTED = documented()


def test_commands_are_found():
    assert commands("A=1 python x.py --b 'c d' && pip install y  # z") == [["python", "x.py", "--b", "c d"],
                                                                          ["pip", "install", "y"]]
    assert script_and_flags("torchrun --nproc_per_node=8 x.py --y 1".split()) == ("x.py", ["--y", "1"])
    assert len([where for where, _ in DOCUMENTED if where == "README.md"]) > 15
    assert {preset.name for preset in PRESETS} <= {where for where, _ in DOCUMENTED}


@pytest.mark.parametrize("where, words", DOCUMENTED, ids=lambda x: x if isinstance(x, str) else " ".join(x)[:60])
def test_every_documented_command_is_accepted_by_its_script(where, words, capsys):
    command = script_and_flags(words)
    if command is None:
        assert words[0] in ("python", "python3", "pip", ".", "git", "cd", "export", "ruff", "pytest", "sbatch",
                            "hf"), words
        for file in re.findall(r"requirements\S*", " ".join(words)):
            assert (ROOT / file).is_file(), file
        return
    script, flags = command
    assert (ROOT / script).is_file(), f"{where}: there is no {script}"
    if "\ndef get_args_parser(" not in (ROOT / script).read_text():
        return
    launched = [word for word in flags[:1] if word.endswith(".py")]  # the launcher's first argument
    parser = load(script).get_args_parser(*launched)
    given = with_presets([flag for flag in flags if flag not in ("...", "[...]")])
    if len(given) < len(flags):  # abbreviated: check only that the flags exist
        assert {flag for flag in given if flag.startswith("--")} <= set(parser._option_string_actions), words
        return
    try:
        parser.parse_args(given)
    except SystemExit:
        pytest.fail(f"{where}: {' '.join(words)}: {capsys.readouterr().err}")


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py")))
def test_help_is_printed(script):
    """argparse formats help texts with %, where it is asked for them, and not before."""
    if "\ndef get_args_parser(" in (ROOT / script).read_text():
        assert "--" in load(script).get_args_parser().format_help()


@pytest.fixture(scope="module")
def playground(tmp_path_factory):
    """A working folder with the images that the pages call /path/to/images."""
    folder = tmp_path_factory.mktemp("reader")
    for i in range(12):
        for part in ("images/a", "images/b"):
            (folder / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(shapes.draw(i, 40)[0]).save(folder / part / f"{i}.png")
    return folder


def quick(script: str, flags: list[str], folder: Path) -> list[str]:
    """The flags of a documented command, with small data and the flags of QUICK."""
    smaller = [re.sub(r"^(shapes|scenes):\d+x(\d+)$", r"\1:200x32", flag) for flag in flags]
    smaller = [flag.replace("/path/to/images", str(folder / "images")) for flag in smaller]
    data = ["--data_path", "shapes:200x32"] if script == "main_dino.py" and "--data_path" not in smaller else []
    return [*with_presets(smaller), *data, *QUICK.get(script, "").split()]


def test_readme_runs_from_its_first_command_to_its_last(playground, monkeypatch, capsys):
    """In this process, in the order of the page and in one folder: later commands read what earlier ones write."""
    monkeypatch.chdir(playground)
    ran, skipped = [], []
    for where, words in DOCUMENTED:
        command = script_and_flags(words)
        if where != "README.md" or words[0] == ".":
            continue
        reason = next((why for word, why in NOT_RUN.items() if word in " ".join(words)), None)
        if reason:
            skipped.append((words, reason))
            continue
        assert command, f"{' '.join(words)}: neither a script nor in NOT_RUN"
        module = importlib.import_module(command[0].removesuffix(".py"))
        args = module.get_args_parser().parse_args(quick(*command, playground))
        assert module.main(args) in (0, None), (words, capsys.readouterr().err)
        ran.append(command[0])
    assert len(ran) >= 10 and ran[0] == "main_dino.py", ran
    written = {str(p.relative_to(playground)) for p in playground.rglob("*") if "images" not in p.parts}
    assert {"output/shapes/checkpoint.pth", "output/shapes/curves.png", "output/shapes/attention.png",
            "output/images.npy", "output/neighbours.png", "output/curves.png",
            "output/backbone.safetensors"} <= written  # fmt: skip
    print(f"{len(ran)} run; not run:", *(f"{' '.join(words)[:70]}: {why}" for words, why in skipped), sep="\n  ")


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.stem)
def test_presets_are_valid_and_state_their_accuracy_and_command(preset):
    scripts = {"dinov2": "main_dinov2", "semantic": "eval_semantic", "depth": "eval_depth", "detect": "detect"}
    script = importlib.import_module(scripts.get(preset.stem.split("_")[0], "main_dino"))
    data = [] if "shapes" in preset.name or "scenes" in preset.name else ["--data_path", "x"]
    args = script.get_args_parser().parse_args([f"@{preset}", *data])
    script.check_args(args)
    header = "".join(line for line in preset.read_text().splitlines(True) if line.startswith("#"))
    assert "%" in header or "shapes" in preset.name or "scenes" in preset.name
    assert re.search(rf"{script.__name__}\.py @presets/{preset.name}" if "dinov2" in preset.name
                     else f"@presets/{preset.name}", header)


def test_the_slurm_script_is_one_and_its_command_is_accepted():
    import main_dino
    from pretraining.faults import TO_BE_CONTINUED

    (script,) = re.findall(r"```sh\n(#!/bin/bash\n.*?)```", (ROOT / "docs/recipes.md").read_text(), re.DOTALL)
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    (command,) = re.findall(r"^srun python main_dino.py (.*)", script, re.MULTILINE)
    args = main_dino.get_args_parser().parse_args(with_presets(shlex.split(command)))
    main_dino.check_args(args)
    assert f"-eq {TO_BE_CONTINUED} ]" in script and "#SBATCH --signal=USR1@" in script and "#SBATCH --requeue" in script


@pytest.mark.parametrize("name, width", [("own_images_1gpu", 384), ("imagenette_resnet18", 512),
                                         ("imagenette_vits", 384), ("cifar10_resnet18", 512)])
def test_networks_of_presets_for_one_gpu_take_their_crops(name, width):
    import main_dino

    args = main_dino.get_args_parser().parse_args([f"@{ROOT}/presets/{name}.txt", "--data_path", "x"])
    backbone, features = main_dino.make_backbone(args)
    sizes = [args.global_crops_size] + [args.local_crops_size] * bool(args.local_crops_number)
    for size in sizes:
        assert backbone.eval()(torch.zeros(1, 3, size, size)).shape == (1, width) and features == width


# Published numbers: peak learning rate, images per step, K, K', steps, and the epochs of 1,250 steps of each warm-up.
RECIPES = {
    "dinov2_vitl16_short": (32, 0.004 * 2**0.5, 2048, 65536, 65536, 125_000, 10),
    "dinov2_vitl14": (96, 0.0002 * 3**0.5, 3072, 131072, 131072, 625_000, 80),
    "dinov2_vitg14": (256, 0.0002 * 3**0.5, 3072, 131072, 131072, 625_000, 80),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_dinov2_are_the_published_ones(name, monkeypatch):
    import main_dinov2
    from pretraining import options

    processes, peak, images, k, k_patches, steps, warmup = RECIPES[name]
    monkeypatch.setattr("parallel.world_size", lambda: processes)
    args = main_dinov2.get_args_parser().parse_args([f"@{ROOT}/presets/{name}.txt"])
    plan = main_dinov2.make_plan(args, 1_281_167)  # images of ImageNet-1k: the length does not depend on their number
    assert options.images_per_step(args) == images and plan.steps == steps == len(plan.lr)
    assert plan.lr.max() == pytest.approx(peak) and plan.lr.argmax() in (1250 * warmup - 1, 1250 * warmup)
    assert plan.lr[0] == 0 and plan.lr[-1] == pytest.approx(1e-6, rel=0.01)
    assert (args.out_dim, main_dinov2.patch_prototypes(args)) == (k, k_patches)
    assert (plan.last_layer_lr == 0).sum() == 1250 and not plan.last_layer_lr[:1250].any()
    assert (plan.teacher_temp < 0.07).sum() == 1250 * 30 - 1 and plan.teacher_temp[0] == 0.04
    short = name == "dinov2_vitl16_short"
    assert plan.momentum[0] == (0.992 if short else 0.994) and plan.wd[0] == pytest.approx(0.04)
    assert plan.wd[-1] == pytest.approx(0.4 if short else 0.2) and args.layer_decay == (0.9 if short else 1)
    assert (args.centering == "centering") == short and args.ibot_separate_head != short
    assert (args.head_bottleneck_dim, args.ibot_head_bottleneck_dim) == (256 if short else 384, 256)
    assert (args.patch_size, args.local_crops_size) == ((16, 96) if short else (14, 98))
    assert args.drop_path_rate == (0.3 if short else 0.4)


def test_the_table_of_published_keys_is_right():
    """docs/dinov2.md: each flag exists, and its columns are the defaults and the values of the long recipe."""
    import main_dinov2

    parser = main_dinov2.get_args_parser()
    recipes = [parser.parse_args(words) for words in ([], [f"@{ROOT}/presets/dinov2_vitl14.txt"])]
    table = (ROOT / "docs" / "dinov2.md").read_text().split("## Published keys")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([\w.]+)` \| `--(\w+)` \| (.*?) \| (.*?) \|$", table, re.M)
    assert len(rows) > 40
    for key, flag, *values in rows:
        assert f"--{flag}" in parser._option_string_actions, key
        for args, value in zip(recipes, values, strict=True):
            if flag not in ("arch", "batch_size_per_gpu", "epoch_steps", "ffn_layer", "ibot_out_dim", "epochs"):
                ours = getattr(args, flag)
                ours = [float(x) for x in ours] if isinstance(ours, (list, tuple)) else [ours]
                theirs = [x if x in ("centering", "sinkhorn_knopp") else {"true": True, "false": False}.get(x) if
                          x in ("true", "false") else float(x.replace(",", "")) for x in value.split()]
                assert ours == theirs, (key, flag, value)


def test_the_page_of_flags_is_current():
    code = "import sys; sys.path.insert(0, 'docs'); import make_flags; print(make_flags.page(), end='')"
    done = subprocess.run([sys.executable, "-c", code], env=ENV, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == (ROOT / "docs" / "flags.md").read_text(), "run  python docs/make_flags.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"(?:\]\(|src=\")([^)#\s\"]+)[)\"]", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_every_room_is_in_the_readme():
    table = (ROOT / "README.md").read_text().split("## Rooms")[1].split("\n## ")[0]
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert all(f"`{room}/`" in table for room in rooms)
    assert all((ROOT / name).exists() for name in re.findall(r"`([\w/]+(?:\.py|/))`", table))


def test_how_it_works_names_functions_that_exist():
    for file, name in re.findall(r"`([\w/]+\.py):([\w.]+)`", (ROOT / "docs" / "how_it_works.md").read_text()):
        value = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        for part in name.split("."):
            value = getattr(value, part)


def test_reliability_names_tests_that_exist():
    """`file.py::test_name`, or `file.py::start_of_its_name_…`."""
    names = re.findall(r"`([\w/]+\.py)(?:::(\w+)(…?))?`", (ROOT / "docs" / "reliability.md").read_text())
    names = [name for name in names if "test_" in name[0]]
    assert len(names) > 15
    for file, name, abbreviated in names:
        text = (ROOT / "tests" / file).read_text()
        assert re.search(rf"^def {name}" + ("" if abbreviated else r"\(") if name else "", text, re.M), (file, name)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_tables_have_no_empty_cells(page):
    """The first header may be empty, and so may remarks and the default of a flag."""
    for line in page.read_text().splitlines():
        if re.search(r"\|\s*\|", line) and page.name not in ("flags.md", "data.md"):
            assert re.match(r"\|\s*\|", line) and not re.search(r"\|\s*\|", line[1:]), line


def test_first_screen_of_the_readme_is_short():
    """A figure, how to install, the first command with its output, and results, before anything else."""
    head = (ROOT / "README.md").read_text().split("\n## Your own images")[0]
    assert len(head.split("\n## ")[0].splitlines()) < 20 and len(head.splitlines()) < 80
    positions = [head.index(part) for part in ("<img ", "pip install -r", "@presets", "```text", "images/s |")]
    assert positions == sorted(positions)
