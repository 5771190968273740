"""k-NN of 50,000 training x 10,000 test images x 384 dimensions: ours against a direct implementation.

    python benchmarks/knn.py --rounds 2
    python benchmarks/knn.py --device cuda

Both compute the published protocol, top-1 and top-5 for k = 10, 20, 100, 200 at T = 0.07, and for comparison a single
k. Their accuracies must agree.
"""

import sys

import bench
import torch
import torch.nn.functional as F

from protocols.knn import knn_predict
from protocols.scores import hits

TEMPERATURE = 0.07
ROUNDING = 0.05  # points: rounding may decide near ties of votes differently


def straightforward(train, train_labels, test, test_labels, ks, classes, chunk=100):
    """{k: (top-1, top-5) in %}: for 100 test images at a time, all similarities and the k largest of them; then the
    one-hot labels of the neighbours, weighted by exp(s / T) and summed, and the classes sorted by that sum."""
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
    """Unit vectors in overlapping clusters, for accuracies between chance and 100 %."""
    g = torch.Generator().manual_seed(0)
    centers = torch.randn(classes, width, generator=g)
    labels = [torch.randint(classes, (count,), generator=g) for count in (n, m)]
    train, test = (F.normalize(centers[y] + 3 * torch.randn(len(y), width, generator=g), dim=1) for y in labels)
    return train.to(device), labels[0].to(device), test.to(device), labels[1].to(device)


def measure(name, data, ks, classes, args) -> dict:
    methods = {"straightforward": straightforward, "ours": ours}
    accuracies = {}

    def run(method: str) -> None:
        accuracies[method] = methods[method](*data, ks, classes)

    times = bench.in_turns({m: (lambda m=m: run(m)) for m in methods}, args.rounds, args.device)
    worst = max(abs(a - b) for k in ks for a, b in zip(*(accuracies[m][k] for m in methods), strict=True))
    if worst > max(ROUNDING, 100 / len(data[2])):
        raise SystemExit(f"{name}: the accuracies differ by {worst:.3f} points: {accuracies}")
    return bench.summary(times, "straightforward") | {"accuracies_differ": worst}


def main(args) -> int:
    sizes, classes = ((2000, 400, 64), 20) if args.quick else ((50_000, 10_000, 384), args.classes)
    bench.header("k-NN, {:,} x {:,} x {}, {} classes".format(*sizes, classes), args.device)
    data, settings, rows = features(*sizes, classes, args.device), {}, []
    for name, ks in (("k = 10 20 100 200", [10, 20, 100, 200]), ("k = 20", [20]), ("k = 200", [200])):
        settings[name] = measure(name, data, ks, classes, args)
        times = bench.time_rows({m: settings[name][m] for m in ("straightforward", "ours")})
        rows += [[f"{name}, {row[0]}", *row[1:]] for row in times]
    bench.table(bench.TIMES, rows)
    bench.record(args, "knn", sizes=sizes, settings=settings)
    return 0


def get_args_parser():
    parser = bench.parser(__doc__, rounds=3)
    parser.add_argument("--classes", type=int, default=1000)
    return parser


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
