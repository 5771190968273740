"""Start-up: who the launchers say this process is, and what is said of a start that can't work."""

import os
import socket

import pytest
import torch
from processes import ENV, SMALL, free_port, launch
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

import parallel
from method import photometric
from parallel import Refused
from pretraining import networks
from weights import checkpoints

KINDS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "SLURM_", "SUBMITIT_", "TORCHELASTIC_")
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SLURM = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1",
         "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_JOB_ID": "123", "SLURM_NTASKS": "8"}  # fmt: skip
SUBMITIT = {"SUBMITIT_LOCAL_JOB_ID": "77", "SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_GLOBALID": "1",
            "SUBMITIT_LOCAL_LOCALID": "1"}  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    """Sets the launchers' variables to these alone."""
    def set_to(variables):
        for name in list(os.environ):
            if name.startswith(KINDS):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_to


def test_each_launcher_says_who_this_process_is(environment):
    environment({"MASTER_ADDR": "left.over", "SLURM_JOB_ID": "5", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"})
    assert parallel.launch_environment() == {}  # a batch script's own shell
    environment(TORCHRUN | SLURM)
    assert parallel.launch_environment() == TORCHRUN  # torchrun inside a Slurm step
    environment({"RANK": "1", "WORLD_SIZE": "2"})
    assert parallel.launch_environment("tcp://h:1") == {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    environment(SLURM)
    found = parallel.launch_environment()
    port = int(found.pop("MASTER_PORT"))
    assert found == {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu03"}
    for other in ({"SLURM_JOB_ID": "124"}, {"SLURM_STEP_ID": "1"}):
        environment(SLURM | other)
        assert port != int(parallel.launch_environment()["MASTER_PORT"]) in range(1024, 32768)
    environment(SLURM | {"MASTER_ADDR": "a", "MASTER_PORT": "5"})
    assert {"MASTER_ADDR": "a", "MASTER_PORT": "5"}.items() <= parallel.launch_environment().items()
    environment(SUBMITIT)
    assert {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items() <= parallel.launch_environment().items()
    for alone in (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, SUBMITIT | {"SUBMITIT_LOCAL_NTASKS": "1"}):
        environment(alone)
        assert parallel.launch_environment() == {}


@pytest.mark.parametrize("nodelist, first", [
    ("vm", "vm"), ("a,b", "a"), ("node[03-07,12]", "node03"), ("node[5]", "node5"), ("r[0-1]n[1-4],x", "r0n1"),
    ("a-b[2,4]c.d-e,f", "a-b2c.d-e"), ("n8,n[1-3]", "n8"),
])  # fmt: skip
def test_first_host_of_a_node_list(nodelist, first):
    assert parallel.first_slurm_host(nodelist) == first


def without(variables, name):
    return {k: v for k, v in variables.items() if k != name}


BAD = [
    ("RANK alone", {"RANK": "0"}, "WORLD_SIZE is not set"),
    ("WORLD_SIZE alone", {"WORLD_SIZE": "2"}, "RANK is not set"),
    ("no address", without(TORCHRUN, "MASTER_ADDR"), "MASTER_ADDR is not set"),
    ("empty address", TORCHRUN | {"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
    ("no port", without(TORCHRUN, "MASTER_PORT"), "MASTER_PORT is not set"),
    ("port of letters", TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
    ("port out of range", TORCHRUN | {"MASTER_PORT": "65536"}, "from 1 to 65535"),
    ("rank of letters", TORCHRUN | {"RANK": "first"}, "RANK is 'first'"),
    ("rank below 0", TORCHRUN | {"RANK": "-1"}, "RANK is '-1' instead of a whole number from 0 to 1"),
    ("rank out of range", TORCHRUN | {"RANK": "2"}, "RANK is '2' instead of a whole number from 0 to 1"),
    ("no processes", TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
    ("no task number", without(SLURM, "SLURM_PROCID"), "SLURM_PROCID is not set"),
    ("no task count", without(SLURM, "SLURM_STEP_NUM_TASKS"), "start with srun"),
    ("no hosts", without(SLURM, "SLURM_STEP_NODELIST"), "SLURM_STEP_NODELIST is not set"),
    ("no submitit task number", without(SUBMITIT, "SUBMITIT_LOCAL_GLOBALID"), "start with submitit"),
]


@pytest.mark.parametrize("variables, named", [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_variables_are_named(environment, variables, named):
    environment(variables)
    with pytest.raises(ValueError, match="the variable ") as error:
        parallel.launch_environment()
    assert named in str(error.value) and len(str(error.value).splitlines()) == 1


def test_one_gpu_for_several_processes_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert str(parallel.pick_device("cuda", 1)) == "cuda:1" and str(parallel.pick_device("cuda:1")) == "cuda:1"
    for name, local_rank, named in (("cuda:0", 1, "would share that GPU"), ("cuda", 2, "GPU 2 does not exist")):
        with pytest.raises(ValueError, match=named):
            parallel.pick_device(name, local_rank)


def test_a_slurm_task_that_sees_one_gpu_takes_it_whatever_its_number(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    for name, others, own in (("GPUS_PER_TASK", None, "1"), ("TRES_PER_TASK", "cpu=4", "cpu=4,gres/gpu=1"),
                              ("GPU_BIND", "none", "single:1")):
        with monkeypatch.context() as environment:
            if others:
                environment.setenv(f"SLURM_{name}", others)
            with pytest.raises(ValueError, match="GPU 3 does not exist"):
                parallel.pick_device("auto", 3)
            environment.setenv(f"SLURM_{name}", own)
            assert str(parallel.pick_device("auto", 3)) == "cuda:0"


@pytest.mark.parametrize("backend, there", [("nccl", "cuda:1"), ("gloo", "cpu")])
def test_nccl_has_the_processs_gpu_alone(backend, there, monkeypatch):
    assert parallel.group_device("cpu") == torch.device("cpu")  # one process
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_backend", lambda: backend)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    assert parallel.group_device("cpu") == torch.device(there)


def test_what_is_gathered_lies_where_the_group_can_have_it(monkeypatch):
    """NCCL knows tensors on GPUs alone; the meta device stands for one."""
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(parallel, "group_device", lambda device: torch.device("meta"))
    seen = []

    def all_gather(parts, x):
        seen.extend(part.device.type for part in (*parts, x))
        raise InterruptedError  # nothing can be copied back from there

    monkeypatch.setattr("torch.distributed.all_gather", all_gather)
    with pytest.raises(InterruptedError):
        parallel.gather(torch.ones(2))
    assert seen == ["meta"] * 3


def test_a_start_that_cannot_work_ends_at_once_in_one_line(tmp_path):
    """Real processes. Nothing listens for them: a wait would last ten minutes."""
    bad = {name: (variables, "cpu", named) for name, variables, named in BAD}
    starts = [bad[name] for name in ("RANK alone", "no address", "rank of letters", "rank out of range",
                                     "no task number")]  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        starts += [
            (TORCHRUN | {"MASTER_PORT": port}, "cpu", f"MASTER_PORT {port}: Address already in use"),
            (TORCHRUN | {"MASTER_ADDR": "no-such-host.invalid"}, "cpu", "MASTER_ADDR no-such-host.invalid"),
            ({}, "cuda:77", "--device cuda:77"),
        ]
        clean = {k: v for k, v in ENV.items() if not k.startswith(KINDS)}
        for variables, device, named in starts:
            done = launch("main_dino.py", *SMALL, "--output_dir", tmp_path / "out", "--device", device, timeout=120,
                          env=clean | variables)
            assert done.returncode == 2 and named in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "out").exists()


def test_a_process_that_never_comes_ends_the_wait(tmp_path):
    variables = TORCHRUN | {"MASTER_PORT": str(free_port())}
    done = launch("main_dino.py", *SMALL, "--output_dir", tmp_path / "out", "--dist_timeout", 0.02, env=ENV | variables)
    assert done.returncode == 2 and "no process group of 2 at 127.0.0.1" in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1


# ---- Apple GPUs, as far as a machine without one can tell ----


def test_an_apple_gpu_is_taken_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(Refused, match="--device mps: .*no Apple GPU.*--device cpu"):
        parallel.pick_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parallel.pick_device("mps") == torch.device("mps") and parallel.pick_device("auto").type == "cpu"
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Refused, match="--device mps with 2 processes.*--device cpu"):
        parallel.start("mps")


def test_what_a_run_on_an_apple_gpu_builds():
    """float32, no scaler that acts, a fused AdamW that knows the device, random state in plain types."""
    device = torch.device("mps")
    dtype = networks.half_precision("auto", True, device)
    assert dtype is None
    with torch.autocast(device.type, dtype, enabled=False):
        assert not torch.amp.GradScaler(device.type, enabled=False).is_enabled()
    assert "mps" in _get_fused_kernels_supported_devices()
    assert checkpoints.rng_state(device).keys() == {"python", "numpy", "torch"}
    x = torch.ones(2, 3)
    assert photometric.to_device(x, torch.device("cpu")) is x  # pinned memory is for CUDA only
