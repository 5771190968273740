"""The estimate of a step's memory against what autograd keeps."""

import pytest
import torch

import main_dino
import main_dinov2
import utils
from method import dinov2, masking
from pretraining import memory


def measured(args, network: torch.nn.Module, kept_patches: int = 64) -> tuple[float, float]:
    """Bytes that a step keeps for the backward pass, and those of them that are scores of the prototypes."""
    crops = [torch.randn(2 * args.batch_size_per_gpu, 3, 64, 64), torch.randn(3 * args.batch_size_per_gpu, 3, 32, 32)]
    masks = masking.batch_masks(0, 0, 0, 2 * args.batch_size_per_gpu, (8, 8))
    dropping = None if kept_patches == 64 else masks.int().argsort(1, descending=True)[:, :kept_patches].sort(1).values
    teacher = main_dinov2.make_network(args)
    return kept_by(lambda: dinov2.losses(network, teacher, crops, masks, main_dinov2.make_loss(args), 0.05, dropping),
                   args, network)


def kept_by(losses, args, network: torch.nn.Module) -> tuple[float, float]:
    kept: dict[int, tuple[int, bool]] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if not any(storage.data_ptr() == p.untyped_storage().data_ptr() for p in network.parameters()):
            kept[storage.data_ptr()] = (storage.nbytes(), args.out_dim in x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss, parts = losses()
    sizes = kept.values()
    return sum(n for n, scores in sizes if not scores), sum(n for n, scores in sizes if scores)


@pytest.mark.parametrize("checkpointing, dropped", [(None, 0.0), ("layers", 0.0), ("blocks", 0.0), (None, 0.4)])
def test_estimate(checkpointing, dropped):
    args = main_dinov2.get_args_parser().parse_args(
        "--arch vit_tiny --patch_size 8 --global_crops_size 64 --local_crops_size 32 --local_crops_number 3 --out_dim "
        "4096 --batch_size_per_gpu 8 --drop_path_rate 0".split())
    network = main_dinov2.make_network(args)
    network.backbone.set_grad_checkpointing(checkpointing is not None, layers=checkpointing == "layers")
    state, saved, scores = memory.bytes_needed(network, 8, 64, 32, 3, 0.15, None, checkpointing, dropped)
    assert state == 20 * sum(p.numel() for p in network.parameters())  # weights, gradients, moments, teacher's weights
    with_frozen = memory.bytes_needed(network, 8, 64, 32, 3, 0.15, torch.bfloat16, checkpointing, dropped, network)[0]
    without = memory.bytes_needed(network, 8, 64, 32, 3, 0.15, torch.bfloat16, checkpointing, dropped)[0]
    assert with_frozen - without == state / 5  # weights; autocast keeps no half copies of what needs no gradients
    activations, kept_scores = measured(args, network, 64 - int(64 * dropped))
    if checkpointing == "blocks":  # while a block is recomputed, its own activations are there too
        activations += memory.block_bytes(network.backbone, 8 * (2 * 65 + 3 * 17), 4)
    assert saved == pytest.approx(activations, rel=0.25)
    # Kept for backward: the student's and the teacher's scores. Backward adds the gradient of the former.
    rows, patches = 8 * 5, 0.15 * 16 * 64
    normalized = 2 * 256  # the prototypes of unit norm, of the pass of class tokens and of that of patches
    assert kept_scores == pytest.approx(4 * 4096 * (rows + 16 + 2 * patches + normalized), rel=0.15)
    assert scores == pytest.approx(4 * 4096 * (2 * rows + 16 + 3 * patches + normalized), rel=0.15)


def test_estimate_of_dino():
    args = main_dino.get_args_parser().parse_args(
        "--arch vit_tiny --patch_size 8 --global_crops_size 64 --local_crops_size 32 --local_crops_number 3 --out_dim "
        "4096 --batch_size_per_gpu 8 --drop_path_rate 0 --data_path shapes:64x64 --device cpu --precision fp32 "
        "--epochs 20".split())
    plan = main_dino.make_plan(args, 64)
    run = main_dino.make_run(args, plan, 64, torch.device("cpu"))
    state, saved, scores = memory.bytes_needed(run.student, 8, 64, 32, 3, 0.0, None, None)
    crops = [torch.randn(16, 3, 64, 64), torch.randn(24, 3, 32, 32)]
    activations, kept_scores = kept_by(
        lambda: utils.losses(run.student, run.teacher, crops, run.dino_loss, 0), args, run.student)
    assert saved == pytest.approx(activations, rel=0.25)
    assert scores == pytest.approx(kept_scores + 4 * 4096 * 8 * 5, rel=0.15)  # backward adds the gradient
    printed = f"estimated: {(state + saved + scores) / 1e9:.1f} GB"
    assert printed in main_dino.describe(args, run, plan, 64)
    args.arch, run.student.backbone = "resnet18", torch.nn.Linear(1, 1)
    assert "estimated" not in main_dino.describe(args, run, plan, 64)
