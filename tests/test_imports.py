"""Every module imports, and what a laptop needs runs, where Python has no POSIX (Windows)."""

import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT
from processes import ENV

WITHOUT_POSIX = """
import os, signal, sys
import filelock, numpy, PIL.Image, torch, torchvision  # not ours: each has its own code for Windows

try:
    import submitit
except ImportError:
    pass
for name in ("fcntl", "resource", "pwd", "grp"):
    sys.modules[name] = None
for module, names in (
    (os, ("fork", "forkpty", "mkfifo", "pread", "sched_getaffinity", "getuid", "getloadavg")),
    (signal, ("SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGALRM", "SIGKILL", "sigwaitinfo", "pthread_sigmask", "setitimer")),
):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
"""
IMPORTS = """
import importlib
failed = []
for name in sys.argv[2:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        failed.append(f"{name}: {error!r}")
assert not failed, failed
"""
SIGNALS = """
import torch
import parallel
from imagesets import loaders
from pretraining.faults import Requests
loaders.init_worker(0)
requests = Requests(torch.device("cpu"))
signal.raise_signal(signal.SIGTERM)
assert requests.agreed(1) == (True, False)
assert "memory" in parallel.worker_death(RuntimeError("DataLoader worker (pid 1) exited unexpectedly."))
"""
DATA = """
import io, tarfile
from pathlib import Path
from PIL import Image
import torch
from imagesets.loaders import batches
from imagesets.sources import open_images

folder = Path(sys.argv[1])
content = io.BytesIO()
Image.new("RGB", (8, 8), (1, 2, 3)).save(content, "PNG")
with tarfile.open(folder / "a.tar", "w") as tar:
    for i in range(4):
        member = tarfile.TarInfo(f"{i}.png")
        member.size = len(content.getvalue())
        tar.addfile(member, io.BytesIO(content.getvalue()))
class Crops:
    reduction = None
    def cut(self, image, rng):
        return [image, image], torch.zeros(2, 8)
(batch,) = batches(open_images(folder / "a.tar"), Crops(), 4, 0, seed=0, last_batch=1)
assert batch["crops"][0].amax((0, 2, 3)).tolist() == [1, 2, 3]
"""
FILES = [*ROOT.glob("*.py"), *(path for room in ROOT.glob("*/__init__.py") for path in room.parent.rglob("*.py"))]
MODULES = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES)


def test_every_module_imports_and_works(tmp_path):
    """One process for the three: it imports all that there is, handles signals that exist, and loads data."""
    assert {"main_dino", "imagesets.loaders", "pretraining.faults", "weights"} <= set(MODULES)
    command = [sys.executable, "-c", WITHOUT_POSIX + IMPORTS + SIGNALS + DATA, str(tmp_path), *MODULES]
    done = subprocess.run(command, env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="a lock of another process, by fcntl")
def test_a_lock_is_released_when_its_process_ends(tmp_path):
    script = """
        import os, sys
        from filelock import FileLock
        lock = FileLock(sys.argv[1])
        lock.acquire()
        print("locked", flush=True)
        sys.stdin.read()
        os._exit(1)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "lock")]
    pipes = {"env": ENV, "cwd": ROOT, "text": True, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as first:
        assert first.stdout.readline() == "locked\n"
        with subprocess.Popen(command, **pipes) as second:
            with pytest.raises(subprocess.TimeoutExpired):
                second.wait(3)  # it imports in less, and waits for the first
            first.stdin.close()
            assert second.stdout.readline() == "locked\n"
            second.stdin.close()
