"""One process and two: images/s, and the bytes that a step communicates, counted and predicted by model.py.

    python benchmarks/scaling.py                      # gloo on this CPU; two processes share its cores
    python benchmarks/scaling.py --device cuda        # nccl, one GPU per process

The count is the size of the gradient buckets and of the centre's mean that one process passes to the collectives. A
ring all-reduce sends 2 (n - 1) / n times as much over each link.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import bench
import model
import naive
import ours
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from train_step import crops_of


def count_bytes(student: DistributedDataParallel | None) -> dict[str, int]:
    """A dict that is updated while steps run: bytes in gradient buckets, and in all calls of all_reduce."""
    tally = {"gradients": 0, "all": 0}
    plain = dist.all_reduce

    def counted(x, *args, **kwargs):
        tally["all"] += x.numel() * x.element_size()
        return plain(x, *args, **kwargs)

    def hook(group, bucket):
        tally["gradients"] += bucket.buffer().numel() * bucket.buffer().element_size()
        return allreduce_hook(group, bucket)  # which calls all_reduce

    if student is not None:
        dist.all_reduce = counted
        student.register_comm_hook(None, hook)
    return tally


def worker(rank: int, processes: int, args, store: str) -> None:
    """Run the steps of one process; rank 0 writes its timings and counts to `store`.json."""
    torch.set_num_threads(args.threads)
    cuda = args.device.startswith("cuda")
    device = f"cuda:{rank}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(rank)
    if processes > 1:
        dist.init_process_group("nccl" if cuda else "gloo", init_method=f"file://{store}", rank=rank,
                                world_size=processes)
    torch.manual_seed(0)
    trainer, wrapped = ours.Trainer(args.arch, args.patch, args.sizes[0], args.out_dim, device, local=args.local), None
    if processes > 1:
        wrapped = DistributedDataParallel(trainer.student, device_ids=[rank] if cuda else None)
    tally = count_bytes(wrapped)
    crops = [c.to(device) for c in crops_of(args.batch, args)[1]]
    seconds = []
    for _ in range(args.rounds + 1):
        tally |= dict.fromkeys(tally, 0)
        bench.wait(device)
        start = time.perf_counter()
        trainer.step(crops, forward=wrapped)
        bench.wait(device)
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        Path(store + ".json").write_text(json.dumps({"seconds": seconds[1:], **tally,
                                                           "centre": tally["all"] - tally["gradients"]}))
    if processes > 1:
        dist.destroy_process_group()


def measure(processes: int, args) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        mp.spawn(worker, (processes, args, store), nprocs=processes)
        result = json.loads(Path(store + ".json").read_text())
    rate = processes * args.batch / statistics.median(result["seconds"])
    return {"processes": processes, "images_per_s": rate, **result}


def get_args_parser():
    parser = bench.step_parser(__doc__, naive.SIZES, "vit_tiny", (96, 48))
    parser.add_argument("--batch", type=int, default=8, help="images per process and step")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes to measure")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per process")
    return parser


def main(args) -> int:
    if args.quick:
        args.arch, args.sizes, args.local, args.out_dim, args.batch, args.rounds = "vit_nano", (32, 16), 2, 64, 2, 1
        args.processes = [2]
    bench.header(f"scaling, {args.arch}/{args.patch}, {args.batch} images per process", args.device)
    shape = model.Shape.of(args.arch, args.patch, args.sizes, args.local, args.out_dim)
    runs = [measure(n, args) for n in args.processes]
    bench.table(["processes", "images/s", "ratio", "MB of gradients a step", "MB in the model", "MB of the centre"],
                [[r["processes"], r["images_per_s"], r["images_per_s"] / runs[0]["images_per_s"],
                  r["gradients"] / 1e6, 4 * shape.parameters() / 1e6 * (r["processes"] > 1), r["centre"] / 1e6]
                 for r in runs])
    bench.record(args, "scaling", runs=runs)
    return 0


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
