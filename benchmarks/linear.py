"""Time of an epoch of linear classification: one setting, a sweep of twelve in one pass, and twelve plain runs.

    python benchmarks/linear.py

A plain run is a direct implementation of one setting: a backbone pass, one linear layer, its gradient.
"""

import sys

import bench
import torch
import torch.nn.functional as F

from protocols import linear
from vision_transformer import build_backbone

LRS, BLOCKS, POOLS = (0.001, 0.01, 0.1), (1, 4), (False, True)


def ours(model, batches, settings) -> None:
    images = batches[0][0]
    heads = linear.Heads(settings, model.embed_dim, max(s.n_last_blocks for s in settings), 1000).to(images.device)
    forward, optimizer = linear.probe_features(model, heads.blocks), linear.build_optimizer(heads, len(images))

    def feature_batches():
        for x, y in batches:
            with torch.no_grad():
                features = forward(x)
            yield features, y

    linear.train_epoch(heads, optimizer, 0, 1, feature_batches())


def plain(model, batches, setting) -> None:
    n = setting.n_last_blocks
    head = torch.nn.Linear(model.embed_dim * (n + setting.avgpool_patchtokens), 1000, device=batches[0][0].device)
    optimizer = torch.optim.SGD(head.parameters(), setting.lr, momentum=0.9)
    for x, y in batches:
        with torch.no_grad():
            tokens = model.get_intermediate_layers(x, n)
            features = torch.cat([t[:, 0] for t in tokens], 1)
            if setting.avgpool_patchtokens:
                features = torch.cat([features, tokens[-1][:, 1 + model.num_register_tokens :].mean(1)], 1)
        loss = F.cross_entropy(head(features), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main(args) -> int:
    if args.quick:
        args.arch, args.size, args.batches, args.rounds = "vit_nano", 32, 2, 1
    torch.manual_seed(0)
    bench.header(f"linear classifiers, {args.arch} at {args.size} pixels, {64 * args.batches} images, 1000 classes",
                 args.device)
    model = build_backbone(args.arch, 16, img_size=args.size)[0].eval().to(args.device)
    batches = [(torch.randn(64, 3, args.size, args.size, device=args.device),
                torch.randint(1000, (64,), device=args.device)) for _ in range(args.batches)]
    sweep, one = linear.sweep(linear.Training(LRS, BLOCKS, POOLS)), linear.Setting(0.01, 4, False)
    plain_runs = f"{len(sweep)} plain runs"
    times = bench.in_turns({
        plain_runs: lambda: [plain(model, batches, s) for s in sweep],
        f"{len(sweep)} settings, one pass": lambda: ours(model, batches, sweep),
        "one setting": lambda: ours(model, batches, [one]),
    }, args.rounds, args.device)
    variants = bench.summary(times, plain_runs)
    bench.table([*bench.TIMES, "times one setting"],
                [[*cells, row["ms"] / variants["one setting"]["ms"]]
                 for cells, row in zip(bench.time_rows(variants), variants.values(), strict=True)])
    bench.record(args, "linear", variants=variants)
    return 0


def get_args_parser():
    parser = bench.parser(__doc__)
    parser.add_argument("--arch", default="vit_tiny", help="a ViT")
    parser.add_argument("--size", type=int, default=96, help="side of the images in pixels")
    parser.add_argument("--batches", type=int, default=8, help="batches of 64 images per epoch")
    return parser


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
