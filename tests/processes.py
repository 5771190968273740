"""Runs the project's scripts in processes of their own, alone or several that meet, as a user does.

Processes are forked from a server that has imported what scripts import (`forks.py`), which saves each of them several
seconds of a core. `real=True` starts Python instead, and torchrun for several processes: for tests of just that.
"""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path

from conftest import ROOT

PATHS = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}

# A run of seconds: the smallest ViT on the smallest pictures.
SMALL = (
    "--arch vit_tiny --patch_size 16 --data_path shapes:64x32 --global_crops_size 32 --local_crops_size 16 "
    "--local_crops_number 2 --out_dim 64 --epochs 2 --warmup_epochs 0 --batch_size_per_gpu 8 --num_workers 1 "
    "--device cpu --precision fp32 --log_every 1"
).split()

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["forks"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def meeting(processes: int) -> list[dict[str, str]]:
    """Variables of each process of a run; none for a single one."""
    port = str(free_port())
    return [{} if processes == 1 else {
        "RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank), "MASTER_PORT": port,
        "MASTER_ADDR": "127.0.0.1"} for rank in range(processes)]  # fmt: skip


def start(target, *args) -> multiprocessing.Process:
    """A process forked from the server, which is started by the first one."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = PATHS
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    process = server.Process(target=target, args=args)
    process.start()
    return process


def together(target, processes: int, *args) -> None:
    """target(rank, *args) in each of several processes."""
    running = [start(target, rank, *args) for rank in range(processes)]
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0] * processes


def run_script(script: str, argv: list[str], env: dict[str, str], folder: str, output: str) -> None:
    """In the new process: what `python script` does, with its output in files."""
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_APPEND | os.O_CREAT), stream)
    sys.argv = [script, *argv]
    sys.path.insert(0, os.path.dirname(script))
    runpy.run_path(script, run_name="__main__")


def launch(
    script: str | Path, *args, processes: int = 1, timeout: float = 240, env: dict[str, str] = ENV, cwd=None,
    real: bool = False,
) -> subprocess.CompletedProcess:
    """The exit code, or of several processes the first that is not 0, and the output, one rank after the other."""
    script, argv = str(ROOT / script), list(map(str, args))
    if real:
        torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_addr=127.0.0.1",
                    f"--master_port={free_port()}"] if processes > 1 else []  # fmt: skip
        return subprocess.run([sys.executable, *torchrun, script, *argv], env=env, capture_output=True, text=True,
                              timeout=timeout, cwd=cwd)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        outputs = [os.path.join(folder, str(rank)) for rank in range(processes)]
        running = [start(run_script, script, argv, env | variables, str(cwd or os.getcwd()), output)
                   for variables, output in zip(meeting(processes), outputs, strict=True)]
        end = time.monotonic() + timeout
        for process in running:
            process.join(max(end - time.monotonic(), 0))
        files = [[Path(f"{output}.{name}") for output in outputs] for name in ("out", "err")]
        said = ["".join(file.read_text() for file in each if file.exists()) for each in files]
    late = [process for process in running if process.is_alive()]
    for process in late:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    assert not late, f"still running after {timeout} s: {said}"
    code = next((process.exitcode for process in running if process.exitcode), 0)
    return subprocess.CompletedProcess([script, *argv], code, *said)


def json_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
