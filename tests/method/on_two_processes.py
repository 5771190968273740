"""What each of two processes computes of the targets and of KoLeo over all processes, saved for the tests."""

import sys

import torch
from dinov2_figures import figures, rs

import parallel
from method.koleo import koleo
from method.sinkhorn import sinkhorn_knopp
from method.targets import Center, centred


def main(out: str, file: str) -> None:
    config, _ = figures(file)
    rank, k, temp = parallel.rank(), config["prototypes"], config["temp"]
    iterations, momentum = config.get("sinkhorn_iterations", 3), config.get("center_momentum", 0.9)
    result = {}
    rows = {"cls": config["cls_rows"], "patches": config["patch_rows"][rank]}
    for i, (kind, n) in enumerate(rows.items()):
        scores = rs(config["seed"] + 10 * rank + i, n, k).tanh()
        center = Center(*(1, k) if kind == "cls" else (1, 1, k), momentum=momentum)
        center.update(scores.mean(0))
        result[kind] = sinkhorn_knopp(scores, temp, iterations).rows(0, n)
        result[f"{kind}_centred"] = centred(scores, center.center, temp).rows(0, n)
        result[f"{'cls' if kind == 'cls' else 'patch'}_center"] = center.center

    scores = rs(11, 9, k)[slice(0, 9) if rank == 0 else slice(9, 9)]
    result["none_on_one"] = sinkhorn_knopp(scores, temp, iterations).rows(0, len(scores))
    center = Center(1, 1, k).double()
    center.update(scores.mean(0) if len(scores) else None)
    result["center_none_on_one"] = center.center

    features = rs(12, 10, 6)[5 * rank : 5 * rank + 5].requires_grad_()
    value = koleo(features, all_processes=True)
    value.backward()
    result |= {"koleo": value.detach(), "koleo_grad": features.grad}
    torch.save(result, f"{out}{rank}")


if __name__ == "__main__":
    parallel.start("cpu")
    main(*sys.argv[1:])
    parallel.stop()
