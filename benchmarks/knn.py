"""k-NN of 50,000 training x 10,000 test images x 384 dimensions: ours against the protocol as one writes it down.

    python benchmarks/knn.py [--quick] [--device cuda] [--json results.jsonl]

Both answer the published protocol, top-1 and top-5 for k = 10, 20, 100, 200 at T = 0.07, and for comparison one k at
a time. They take turns within one run, and their figures must agree.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from knn import knn_predict  # noqa: E402
from scores import hits  # noqa: E402

TEMPERATURE = 0.07
ROUNDING = 0.05  # points: near ties of votes may fall the other way


def straightforward(train, train_labels, test, test_labels, ks, classes, chunk=100):
    """{k: (top-1, top-5) in %}: for 100 test images at a time, all similarities and the largest of them; for each k,
    one-hot labels weighted by exp(s / T) and summed, and the classes sorted by the sums."""
    right1, right5 = dict.fromkeys(ks, 0), dict.fromkeys(ks, 0)
    for x, y in zip(test.split(chunk), test_labels.split(chunk), strict=True):
        values, index = (x @ train.T).topk(max(ks), dim=1)
        labels, weights = train_labels[index], (values / TEMPERATURE).exp()
        for k in ks:
            one_hot = F.one_hot(labels[:, :k], classes).float()  # (chunk, k, classes)
            votes = (one_hot * weights[:, :k, None]).sum(1)
            right = votes.sort(dim=1, descending=True)[1] == y[:, None]
            right1[k] += right[:, 0].sum().item()
            right5[k] += right[:, : min(5, k)].any(1).sum().item()
    return {k: (100 * right1[k] / len(test), 100 * right5[k] / len(test)) for k in ks}


def ours(train, train_labels, test, test_labels, ks, classes):
    ranked = knn_predict(train, train_labels, test, ks, [TEMPERATURE], classes, device=train.device)[0]
    right = {k: hits(r, test_labels, k) for k, r in zip(ks, ranked, strict=True)}
    return {k: tuple(100 * x.double().mean().item() for x in both) for k, both in right.items()}


def features(n, m, width, classes, device):
    """Unit vectors in overlapping clusters, so that the accuracies mean something."""
    g = torch.Generator().manual_seed(0)
    centers = torch.randn(classes, width, generator=g)
    labels = [torch.randint(classes, (count,), generator=g) for count in (n, m)]
    found = [F.normalize(centers[y] + 3 * torch.randn(len(y), width, generator=g), dim=1) for y in labels]
    return found[0].to(device), labels[0].to(device), found[1].to(device), labels[1].to(device)


def timed(function, *args):
    start = time.perf_counter()
    found = function(*args)
    if args[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, found


def measure(name, data, ks, classes, rounds):
    """Times of both, turn by turn, after a warm-up on a part of the test images."""
    few = data[0], data[1], data[2][:200], data[3][:200]
    for function in (straightforward, ours):
        function(*few, ks, classes)
    seconds = {"straightforward": [], "ours": []}
    for _ in range(rounds):
        slow, expected = timed(straightforward, *data, ks, classes)
        fast, found = timed(ours, *data, ks, classes)
        seconds["straightforward"].append(slow)
        seconds["ours"].append(fast)
    worst = max(abs(a - b) for k in ks for a, b in zip(expected[k], found[k], strict=True))
    if worst > max(ROUNDING, 100 / len(data[2])):
        raise SystemExit(f"{name}: the accuracies differ by {worst:.3f} points: {expected} {found}")
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    row = {"setting": name, "ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios),
           "accuracies_differ": worst, "top1": {k: v[0] for k, v in found.items()}}
    for method, times in seconds.items():
        row |= {f"{method}_s": statistics.median(times), f"{method}_spread_s": max(times) - min(times)}
    print(f"{name:22s} {row['straightforward_s']:11.2f} s (+-{row['straightforward_spread_s'] / 2:.2f})"
          f" {row['ours_s']:11.2f} s (+-{row['ours_spread_s'] / 2:.2f})"
          f" {row['ratio']:8.2f} ({row['ratio_low']:.2f} .. {row['ratio_high']:.2f})", flush=True)
    return row


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2,000 x 400 x 64: does it run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", default="", help="file that gets a line of JSON more")
    return parser


def main(args):
    sizes = (2000, 400, 64) if args.quick else (50_000, 10_000, 384)
    data = features(*sizes, args.classes, args.device)
    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else \
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(f"k-NN {sizes[0]} x {sizes[1]} x {sizes[2]}, {args.classes} classes, {where}; median of {args.rounds}")
    print(f"{'':22s} {'straightforward':>22s} {'ours':>22s} {'ratio (range)':>20s}")
    ks = [10, 20, 100, 200]
    settings = [("k = 10 20 100 200", ks), ("k = 20", [20]), ("k = 200", [200])]
    rows = [measure(name, data, chosen, args.classes, args.rounds) for name, chosen in settings]
    if args.json:
        with open(args.json, "a") as file:
            report = {"benchmark": "knn", "sizes": sizes, "classes": args.classes, "machine": where,
                      "torch": torch.__version__, "rounds": args.rounds, "rows": rows}
            file.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main(get_args_parser().parse_args())
