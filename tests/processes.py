"""Runs the project's scripts in processes of their own, alone or under torchrun, as a user does."""

import json
import os
import socket
import subprocess
import sys

from conftest import ROOT

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}

# A run of seconds: the smallest ViT on the smallest pictures.
SMALL = (
    "--arch vit_tiny --patch_size 16 --data_path shapes:64x32 --global_crops_size 32 --local_crops_size 16 "
    "--local_crops_number 2 --out_dim 64 --epochs 2 --warmup_epochs 0 --batch_size_per_gpu 8 --num_workers 1 "
    "--device cpu --precision fp32 --log_every 1"
).split()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(script: str, *args, processes: int = 1, timeout: float = 240, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_addr=127.0.0.1",
                    f"--master_port={free_port()}"]  # fmt: skip
    command += [str(ROOT / script), *map(str, args)]
    return subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=timeout, **kwargs)


def json_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
