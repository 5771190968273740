"""Two hosts: torchrun in two network namespaces, joined by a virtual cable, against two processes of one host."""

import itertools
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack, contextmanager

import pytest
import torch
from conftest import ROOT
from processes import ENV, SMALL, launch

RUN = [*SMALL, "--arch", "vit_nano", "--batch_size_per_gpu", "4", "--num_workers", "0", "--saveckp_freq", "0"]
PORT = 29511  # no other program listens inside a namespace


def ip(*words: object) -> None:
    done = subprocess.run(["ip", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(map(str, words))}: {done.stderr.strip()}")


@contextmanager
def two_hosts():
    """The names of two network namespaces with one cable between them, 10.99.0.1 and 10.99.0.2; removed at the end."""
    names = [f"dino{os.getpid()}-{i}" for i in (1, 2)]
    with ExitStack() as cleanup:
        for name in names:
            ip("netns", "add", name)
            cleanup.callback(ip, "netns", "delete", name)  # the cable goes with it
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for i, name in enumerate(names, 1):
            ip("-n", name, "address", "add", f"10.99.0.{i}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
            ip("netns", "exec", name, "true")
        yield names


@pytest.fixture
def hosts():
    if not shutil.which("ip"):
        pytest.skip("no ip command: apt-get install iproute2")
    with ExitStack() as cleanup:
        try:
            names = cleanup.enter_context(two_hosts())
        except OSError as error:
            pytest.skip(f"network namespaces are not allowed here: {error}")
        yield names


def test_two_hosts_equal_one(hosts, tmp_path):
    done = launch("main_dino.py", *RUN, "--output_dir", tmp_path / "one", processes=2)
    assert done.returncode == 0, done.stderr
    env = ENV | {"GLOO_SOCKET_IFNAME": "cable"}  # the host's own name leads gloo elsewhere
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1",
                "--master_addr", "10.99.0.1", "--master_port", str(PORT), "--node_rank"]  # fmt: skip
    script = [ROOT / "main_dino.py", *RUN, "--output_dir", tmp_path / "two"]
    running = [
        subprocess.Popen(["ip", "netns", "exec", name, *torchrun, str(rank), *script], env=env, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank, name in zip(itertools.count(), hosts)
    ]  # fmt: skip
    try:
        texts = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], texts
    assert "2 process(es)" in texts[0]
    assert (tmp_path / "one" / "log.txt").read_text() == (tmp_path / "two" / "log.txt").read_text() != ""
    one, two = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True) for name in ("one", "two"))
    for part in ("student", "teacher", "dino_loss"):
        assert one[part].keys() == two[part].keys()
        for key, value in one[part].items():
            assert torch.equal(two[part][key], value), (part, key)
