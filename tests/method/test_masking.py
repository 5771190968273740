"""Block-wise masks: against the statistics of the published generator, and what they must not depend on."""

import numpy as np
import pytest
import torch
from dinov2_figures import files, names_of

from method.masking import add_block, batch_masks, block_mask, masked_share, masks_weight

FACTS = {name: names_of(name) for name in files("mask_facts*.json")}
GRIDS = [(name, grid) for name, facts in FACTS.items() for grid in facts if grid[0].isdigit()]
DRAWS = 1000


def within(found: np.ndarray, expected: float, std: float, file: str, draws: int = DRAWS) -> None:
    """Means of samples agree with the file's to five standard errors of their difference."""
    error = std * np.sqrt(1 / draws + 1 / FACTS[file]["draws"])
    assert abs(found - expected) <= 5 * error + 1e-3, (found, expected, error)


@pytest.mark.parametrize("file, grid", GRIDS)
def test_statistics_of_masks(file, grid):
    rows, columns = map(int, grid.split("x"))
    border = np.ones((rows, columns), bool)
    border[1:-1, 1:-1] = False
    rng = np.random.default_rng(0)
    for count, facts in FACTS[file][grid]["requested"].items():
        masks = np.stack([block_mask(rng, rows, columns, int(count)) for _ in range(DRAWS)])
        assert masks.dtype == bool and masks.shape == (DRAWS, rows, columns)
        masked = masks.sum((1, 2))
        assert masked.max() <= int(count) and masked.min() >= facts["min"] - 2
        within(masked.mean(), facts["mean"], facts["std"], file)
        exact = facts["share_exact"]
        within((masked == int(count)).mean(), exact, np.sqrt(exact * (1 - exact)), file)
        shares = masks[:, border].mean(1)
        within(shares.mean(), facts["border_share"], shares.std(), file)


@pytest.mark.parametrize("file, grid", GRIDS)
def test_statistics_of_one_block(file, grid):
    rows, columns = map(int, grid.split("x"))
    facts, rng, sides = FACTS[file][grid]["one_block"], np.random.default_rng(1), []
    for _ in range(DRAWS):
        mask = np.zeros((rows, columns), bool)
        added = add_block(rng, mask, int(FACTS[file][grid]["max_num_patches"]))
        height, width = mask.any(1).sum(), mask.any(0).sum()
        assert added == mask.sum() == height * width  # one rectangle
        sides.append((height, width))
    height, width = np.array(sides).T
    assert height.max() <= facts["height_max"] == rows - 1 and width.max() <= facts["width_max"] == columns - 1
    area, log_aspect = height * width, np.log(height / width)
    within(area.mean(), facts["area_mean"], area.std(), file)
    within(log_aspect.mean(), facts["log_aspect_mean"], facts["log_aspect_std"], file)
    within(log_aspect.std(), facts["log_aspect_std"], facts["log_aspect_std"], file)
    assert area.min() >= facts["area_min"] and area.max() <= FACTS[file][grid]["max_num_patches"]


@pytest.mark.parametrize("file, name", [(file, name) for file, facts in FACTS.items() for name in facts["collate"]])
def test_statistics_of_batches(file, name):
    facts, grid = FACTS[file]["collate"][name], tuple(map(int, name.split("_")[-1].split("x")))
    n = facts["rows"]
    batches = torch.stack([batch_masks(0, 0, step, n, grid) for step in range(200)])
    assert batches.dtype == torch.bool and batches.shape == (200, n, grid[0] * grid[1])
    assert {int((masks.sum(1) == 0).sum()) for masks in batches} == set(facts["rows_without_mask"])
    masked = batches.sum((1, 2)).double()
    assert masked.max() <= facts["upperbound"][0]
    within(masked.mean().item(), facts["n_masked_mean"], masked.std().item(), file, 200)


def test_each_interval_of_the_ratio_has_one_mask():
    masks = batch_masks(3, 1, 2, 40, (20, 20), ratio=(0.2, 0.6))
    counts = masks.sum(1).sort(descending=True).values[:20].flip(0)
    limits = np.linspace(0.2, 0.6, 21) * 400
    assert all(low - 4 <= count <= high for count, low, high in zip(counts, limits, limits[1:], strict=False))
    filled = [int(batch_masks(3, 1, step, 40, (20, 20))[0].any()) for step in range(60)]
    assert 15 < sum(filled) < 45  # the order is random


def test_rows_epochs_and_steps():
    """A process draws its own rows alone, and finds what it would have found in the whole batch."""
    whole = batch_masks(5, 2, 7, 24, (8, 10))
    assert torch.equal(whole, torch.cat([batch_masks(5, 2, 7, 24, (8, 10), rows=slice(i, i + 8)) for i in (0, 8, 16)]))
    assert torch.equal(whole, batch_masks(5, 2, 7, 24, (8, 10)))
    others = [batch_masks(*key, 24, (8, 10)) for key in ((6, 2, 7), (5, 3, 7), (5, 2, 8))]
    assert not any(torch.equal(whole, other) for other in others)


@pytest.mark.parametrize("n, probability, masked", [(8, 0.0, 0), (7, 0.5, 3), (5, 1.0, 5), (1, 0.5, 0)])
def test_number_of_masked_crops(n, probability, masked):
    masks = batch_masks(0, 0, 0, n, (8, 8), probability=probability)
    assert masks.any(1).sum() == masked


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (2, 2), (3, 7)])
def test_small_grids_end(grid):
    rng = np.random.default_rng(0)
    for count in range(grid[0] * grid[1] + 1):
        assert block_mask(rng, *grid, count).sum() <= count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights(dtype):
    masks = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)
    found = masks_weight(masks, dtype)
    assert torch.equal(found, torch.tensor([1 / 2] * 2 + [1 / 3] * 3, dtype=dtype))
    assert masks_weight(masks[1:2]).shape == (0,)


@pytest.mark.parametrize("n, side, ratio, probability", [
    (16, 14, (0.1, 0.5), 0.5), (7, 6, (0.1, 0.5), 0.5), (8, 6, (0.1, 0.5), 0.1), (8, 6, (0.01, 0.02), 0.5),
    (16, 4, (0.2, 0.2), 1.0), (16, 4, (0.05, 0.05), 1.0), (16, 1, (0.1, 1.0), 1.0), (16, 4, (0.0, 0.5), 0.5),
])  # fmt: skip
def test_share_of_crops_with_a_mask(n, side, ratio, probability):
    """Masks of a single patch are not always found, which the share leaves out."""
    masks = torch.cat([batch_masks(0, 0, step, n, (side, side), ratio, probability) for step in range(25)])
    share = masked_share(n, (side, side), ratio, probability)
    assert share == pytest.approx(masks.any(1).float().mean().item(), abs=0.03)
    assert (share > 0) == bool(masks.any())
