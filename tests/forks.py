"""The pretraining scripts in real processes that start in a moment: forked from a server that has imported this file.

Everything is as it would be under `python main_dino.py`, but for networks of a few thousand weights, and for the
pictures at the end, which are left out. Each process is the leader of a session, so that killing its group kills its
loaders' workers too, as a batch system does.
"""

import contextlib
import os
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import matplotlib.figure  # noqa: F401 - imported by runs when they need it, and here once for all, as the next two
import torch
import torch._dynamo  # noqa: F401 - by every optimizer, for more than a second
import torchvision  # noqa: F401
from processes import meeting, start

import main_dino
import main_dinov2
import vision_transformer
from pretraining import monitor

SMALLEST = (
    "--arch vit_nano --patch_size 8 --data_path shapes:64x16 --global_crops_size 16 --local_crops_size 8 "
    "--local_crops_number 2 --out_dim 32 --epochs 3 --warmup_epochs 1 --batch_size_per_gpu 8 --num_workers 1 "
    "--device cpu --precision fp32 --log_every 2"
).split()
SMALLEST_DINOV2 = [*SMALLEST, *(
    "--ibot_separate_head true --ibot_out_dim 24 --head_hidden_dim 32 --head_bottleneck_dim 16 "
    "--ibot_head_hidden_dim 24 --ibot_head_bottleneck_dim 8 --warmup_teacher_temp_epochs 1 --patch_size 4 "
    "--centering sinkhorn_knopp --num_register_tokens 2 --layerscale 0.1 --drop_path_rate 0.3"
).split()]
SCRIPTS = {"main_dino.py": main_dino, "main_dinov2.py": main_dinov2}


def make_small() -> None:
    monitor.save_last_figures = lambda *args: []
    main_dino.DINOHead = partial(vision_transformer.DINOHead, hidden_dim=32, bottleneck_dim=16)
    vision_transformer.VITS["vit_nano"] = lambda patch_size, **kwargs: vision_transformer.VisionTransformer(
        patch_size=patch_size, embed_dim=32, depth=2, num_heads=2, qkv_bias=True, **kwargs)


def make_small_in(monkeypatch) -> None:
    """`make_small` in this process, until the test ends: tests that follow need the networks as they are."""
    monkeypatch.setattr(vision_transformer, "VITS", dict(vision_transformer.VITS))
    monkeypatch.setattr(main_dino, "DINOHead", None)
    monkeypatch.setattr(monitor, "save_last_figures", None)
    make_small()


def child(script: str, argv: list[str], env: dict[str, str], output: str, before) -> None:
    os.setsid()
    os.environ.update(env)
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT), stream)
    torch.set_num_threads(1)
    make_small()
    if before is not None:
        before()
    sys.exit(SCRIPTS[script].main(SCRIPTS[script].get_args_parser().parse_args(argv)))


class Started:
    """The processes of a run; `output` is what they have said so far, of all ranks or of one."""

    def __init__(self, *argv, processes: int = 1, before=None, script: str = "main_dino.py") -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.all = [start(child, script, [str(a) for a in argv], env, f"{self.folder.name}/{rank}", before)
                    for rank, env in enumerate(meeting(processes))]

    def output(self, rank: int | None = None) -> str:
        ranks = range(len(self.all)) if rank is None else [rank]
        files = [Path(self.folder.name, str(r)) for r in ranks]
        return "".join(f.read_text() for f in files if f.exists())

    def signal(self, number: int, *ranks: int) -> None:
        """To the whole group, workers included; to all ranks by default."""
        for rank in ranks or range(len(self.all)):
            with contextlib.suppress(ProcessLookupError):  # ended, or not yet the leader of its group
                os.killpg(self.all[rank].pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        for process in self.all:
            process.kill()
            process.join()

    def running(self) -> bool:
        return any(process.is_alive() for process in self.all)

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit codes by rank, negative for a signal; kills what still runs after `timeout` and fails."""
        end = time.monotonic() + timeout
        for process in self.all:
            process.join(max(end - time.monotonic(), 0))
        if self.running():
            self.kill()
            raise AssertionError(f"still running after {timeout} s: {self.output()[-2000:]}")
        return [process.exitcode for process in self.all]

    def wait_for(self, condition, timeout: float = 240) -> bool:
        """Until `condition()` is true; False when the run ended before."""
        end = time.monotonic() + timeout
        while not condition():
            if not self.running():
                return False
            assert time.monotonic() < end, f"waited in vain: {self.output()[-2000:]}"
            time.sleep(0.002)
        return True


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


if __name__ == "__main__":  # under torchrun
    make_small()
    sys.exit(main_dino.main(main_dino.get_args_parser().parse_args()))
