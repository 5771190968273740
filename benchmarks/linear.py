"""Seconds of an epoch of linear classification: one setting, a sweep of twelve in one pass, and twelve plain runs.

    python benchmarks/linear.py

Interleaved, so that a busy machine slows all alike. The plain run is the protocol written down directly: a backbone
pass, one linear layer, its gradient, for one setting after the other.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import linear  # noqa: E402
from vision_transformer import build_backbone  # noqa: E402

LRS, BLOCKS, POOLS = (0.001, 0.01, 0.1), (1, 4), (False, True)


def ours(model, batches, found) -> None:
    heads = linear.Heads(found, model.embed_dim, max(s.n_last_blocks for s in found), 1000)
    forward, optimizer = linear.probe_features(model, heads.blocks), linear.build_optimizer(heads, len(batches[0][0]))

    def features():
        for x, y in batches:
            with torch.no_grad():
                seen = forward(x)
            yield seen, y

    linear.train_epoch(heads, optimizer, 0, 1, features())


def plain(model, batches, setting) -> None:
    n = setting.n_last_blocks
    head = torch.nn.Linear(model.embed_dim * (n + setting.avgpool_patchtokens), 1000)
    optimizer = torch.optim.SGD(head.parameters(), setting.lr, momentum=0.9)
    for x, y in batches:
        with torch.no_grad():
            tokens = model.get_intermediate_layers(x, n)
            seen = torch.cat([t[:, 0] for t in tokens], 1)
            if setting.avgpool_patchtokens:
                seen = torch.cat([seen, tokens[-1][:, 1:].mean(1)], 1)
        loss = F.cross_entropy(head(seen), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="vit_tiny", help="a ViT")
    parser.add_argument("--size", type=int, default=96, help="pixels of the pictures")
    parser.add_argument("--batches", type=int, default=8, help="of 64 pictures, an epoch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    args = parser.parse_args()
    if args.quick:
        args.arch, args.size, args.batches, args.rounds = "vit_nano", 32, 2, 1
    torch.manual_seed(0)
    model = build_backbone(args.arch, 16, img_size=args.size)[0].eval()
    batches = [(torch.randn(64, 3, args.size, args.size), torch.randint(1000, (64,))) for _ in range(args.batches)]
    sweep = linear.settings_of(LRS, BLOCKS, POOLS)
    one = linear.Setting(0.01, 4, False)
    times: dict[str, list[float]] = {}
    ours(model, batches[:1], [one])  # the first pass also allocates
    for _ in range(args.rounds):
        for name, run in (("one setting", lambda: ours(model, batches, [one])),
                          (f"{len(sweep)} settings, one pass", lambda: ours(model, batches, sweep)),
                          (f"{len(sweep)} plain runs", lambda: [plain(model, batches, s) for s in sweep])):
            start = time.perf_counter()
            run()
            times.setdefault(name, []).append(time.perf_counter() - start)
    base = statistics.median(times["one setting"])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.arch} at {args.size} pixels, "
          f"{64 * args.batches} pictures, 1000 classes")
    print(f"{'':>24}  median s  fastest s  x one setting")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:>24}  {median:8.2f}  {min(values):9.2f}  {median / base:13.2f}")


if __name__ == "__main__":
    main()
