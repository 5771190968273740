"""Whole training steps of DINOv2 against the published code's, driven by the files of reference figures."""

import numpy as np
import pytest
import torch
from dinov2_figures import figures, files, network, rs

import utils
from method import dinov2
from method.dinov2 import DINOv2Loss
from method.groups import parameter_groups, set_lr_and_wd
from method.targets import PART


def rows(tensors: dict[str, torch.Tensor], names: list[str]) -> np.ndarray:
    """Of each tensor: sum, L2 norm, first four entries (repeated where there are fewer)."""
    flat = [tensors[name].detach().flatten().numpy() for name in names]
    return np.stack([[x.sum(), np.linalg.norm(x), *np.resize(x, 4)] for x in flat])


def close(got: np.ndarray, want: torch.Tensor) -> None:
    """To 1e-9 of each tensor's L2 norm: some sums are zero but for rounding."""
    assert (np.abs(got - want.numpy()) <= 1e-9 * want[:, 1:2].numpy() + 1e-14).all()


@pytest.mark.parametrize("name", files("train_*.npz"))
def test_steps(name):
    config, want = figures(name)
    student, teacher = network(config), network(config).requires_grad_(False)
    heads = [config["dino_head"], config.get("ibot_head") or config["dino_head"]]
    weights = config["weights"]
    objective = DINOv2Loss(
        *(head["out_dim"] for head in heads), "centering" if config["targets"] == "centering" else "sinkhorn_knopp",
        weights["dino"], weights["ibot"], weights["koleo"], student_temp=config["student_temp"],
        center_momentum=config["center_momentum"], sinkhorn_iterations=config["sinkhorn_iterations"]).double()
    groups = parameter_groups(dict(student.named_children()), config["layer_decay"], config["patch_embed_lr"])
    optimizer = torch.optim.AdamW(groups, betas=config["betas"], eps=config["eps"])
    names, images, seed = want["names"].tolist(), config["images"], config["seed"]

    for step, (lr, wd, momentum, temp, last_layer_lr) in enumerate(want["schedules"].tolist()):
        first = 1000 * seed + 10 * step
        shapes = [config["global_crops_size"]] * 2 + [config["local_crops_size"]] * config["local_crops"]
        crops = [rs(first + i, images, 3, size, size) for i, size in enumerate(shapes)]
        crops = [torch.cat(crops[:2]), *([torch.cat(crops[2:])] if crops[2:] else [])]
        loss, parts = dinov2.losses(student, teacher, crops, want["masks"][step].bool(), objective, temp)
        loss.backward()
        logged = {"dino_local": parts["dino_local"], "dino_global": parts["dino_global"], "koleo": parts["koleo"] / 2,
                  "ibot": parts["ibot"] / 2}
        terms = [next(v for k, v in logged.items() if k.split("_")[-1] in term) for term in want["terms"].tolist()]
        torch.testing.assert_close(torch.stack(terms), want["losses"][step], rtol=1e-9, atol=0)
        torch.testing.assert_close(loss.detach(), want["total"][step], rtol=1e-9, atol=0)
        torch.testing.assert_close(parts["loss"], sum(parts[k] for k in logged), rtol=1e-12, atol=0)
        if step == 0:
            close(rows({k: p.grad for k, p in student.named_parameters()}, names), want["grads_first_step"])
        norms = [utils.clip_gradients(getattr(student, part), config["clip"], per_tensor=False)
                 for part in want["submodules"].tolist()]
        norms = torch.stack([n.norm() if isinstance(n, torch.Tensor) else torch.stack(n).norm() for n in norms])
        torch.testing.assert_close(norms, want["grad_norms"][step], rtol=1e-9, atol=0)
        set_lr_and_wd(optimizer, lr, wd, last_layer_lr)
        optimizer.step()
        optimizer.zero_grad()
        utils.ema_update(student, teacher, momentum)
        objective.update_centers(parts)

    close(rows(student.state_dict(), names), want["student"])
    close(rows(teacher.state_dict(), names), want["teacher"])
    if "dino_center" in want:
        torch.testing.assert_close(objective.dino_loss.center, want["dino_center"], rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(objective.ibot_patch_loss.center, want["ibot_center"], rtol=1e-9, atol=1e-14)


class Scores(torch.nn.Module):
    """A student or teacher whose scores are given, in bfloat16."""

    def __init__(self, seed: int, views: int, k: int) -> None:
        super().__init__()
        self.class_scores, self.tokens = rs(seed, 4 * views, k).bfloat16(), rs(seed + 1, 8, 8)
        self.scores = rs(seed + 2, 8 * 16, k).bfloat16()

    def forward(self, crops, masks, positions):
        return dinov2.Outputs(self.class_scores, self.scores[positions], self.tokens, self.tokens)


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_no_float32_matrix_of_all_scores_is_made(monkeypatch, centering):
    """In distillation with all patches: n = 128 rows of patches and K = 512."""
    k, part = 512, 4 * 512
    monkeypatch.setitem(PART, "cpu", part)
    student, teacher, crops = Scores(1, 3, k), Scores(4, 2, k), [torch.zeros(8, 3, 16, 16), torch.zeros(4, 3, 8, 8)]
    objective = DINOv2Loss(k, k, centering, mask_student=False, all_patches=True)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        parts = dinov2.losses(student, teacher, crops, torch.zeros(8, 16, dtype=torch.bool), objective, 0.07)[1]
    assert max(event.self_cpu_memory_usage for event in profile.events()) <= teacher.scores.nbytes  # positions' rows
    if centering == "centering":
        for name, scores in (("class_mean", teacher.class_scores), ("patch_mean", teacher.scores)):
            torch.testing.assert_close(parts[name], scores.float().mean(0, keepdim=True), rtol=1e-5, atol=1e-6)
    else:
        assert "patch_mean" not in parts and objective.update_centers(parts) is None
