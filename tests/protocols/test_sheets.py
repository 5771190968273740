"""Figures of images: the maps against naive loops, the sheets by their sizes and pixels."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from protocols import attention, dense, sheets
from vision_transformer import VisionTransformer


def random_image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


# ---- masks


def naive_mask(attention, mass):
    """Take patches one by one, the largest first and of equal ones the first in reading order, until it is enough."""
    h, w = len(attention), len(attention[0])
    cells = sorted((-attention[r][c], r, c) for r in range(h) for c in range(w))
    total, held = sum(-cell[0] for cell in cells), 0
    mask = [[False] * w for _ in range(h)]
    for value, r, c in cells:
        if held >= mass * total:
            break
        mask[r][c] = True
        held -= value
    return mask


@pytest.mark.parametrize("mass", ["0.1", "0.25", "0.5", "0.6", "0.9", "1"])
@pytest.mark.parametrize("top", [1, 3, 1000])  # 1 and 3: many ties
def test_threshold_mask_equals_the_loop(mass, top):
    rng = np.random.default_rng(top)
    counts = rng.integers(0, top + 1, (20, 3, 4, 5))
    attention = (counts / np.maximum(counts.sum((-1, -2), keepdims=True), 1)).astype(np.float64)
    mask = sheets.threshold_mask(attention, float(mass))
    assert mask.dtype == bool and mask.shape == attention.shape
    for n in range(20):
        for head in range(3):  # the loop in whole numbers, where sums are exact
            assert mask[n, head].tolist() == naive_mask(counts[n, head].tolist(), Fraction(mass)), (n, head)


def test_threshold_mask_keeps_as_many_equal_patches_as_the_mass_says():
    for dtype in (np.float32, np.float64):
        uniform = np.full((2, 5), 0.1, dtype=dtype)
        assert sheets.threshold_mask(uniform, 0.6).tolist() == [[True] * 5, [True] + [False] * 4]
    assert not sheets.threshold_mask(np.zeros((2, 2)), 0.6).any()


@pytest.mark.parametrize("mass", [0, -0.1, 1.01, float("nan")])
def test_threshold_mask_names_a_wrong_mass(mass):
    with pytest.raises(ValueError, match="threshold"):
        sheets.threshold_mask(np.ones((2, 2)), mass)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_threshold_mask_refuses_what_is_no_attention(value):
    with pytest.raises(ValueError, match="attention"):
        sheets.threshold_mask(np.array([[1.0, value]]), 0.6)


# ---- similarity and PCA


def test_similarity_map_equals_the_loop():
    tokens = np.random.default_rng(0).normal(size=(3, 4, 6))
    similarity = sheets.similarity_map(tokens, tokens[1, 2])
    for r in range(3):
        for c in range(4):
            a, b = tokens[r, c], tokens[1, 2]
            expected = sum(a * b) / (sum(a * a) ** 0.5 * sum(b * b) ** 0.5)
            assert similarity[r, c] == pytest.approx(expected, abs=1e-12)
    assert similarity[1, 2] == pytest.approx(1)
    assert sheets.similarity_map(np.zeros((2, 2, 4)), np.zeros(4)).tolist() == [[0, 0], [0, 0]]


def skewed_tokens(*shape, seed=0):
    """Tokens with a few strong directions whose scores are lopsided, as those of images are."""
    rng = np.random.default_rng(seed)
    strong = rng.exponential(size=(*shape[:-1], 3)) * (5, 3, 2)
    return strong @ rng.normal(size=(3, shape[-1])) + 0.01 * rng.normal(size=shape)


def test_pca_picture_does_not_change_when_tokens_are_rotated_shifted_or_scaled():
    tokens = skewed_tokens(2, 6, 7, 8)
    colors = sheets.pca_picture(tokens)
    assert colors.shape == (2, 6, 7, 3) and colors.dtype == np.uint8
    rotation, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))
    for changed in (tokens @ rotation, -tokens, tokens + 100, tokens * 0.01):
        assert np.abs(sheets.pca_picture(changed).astype(int) - colors).max() <= 1


def test_pca_picture_shares_its_basis_between_images():
    tokens = skewed_tokens(3, 4, 4, 8)
    together = sheets.pca_picture(tokens)
    assert (sheets.pca_picture(tokens[::-1])[::-1] == together).all()
    assert (sheets.pca_picture(tokens[1], sheets.pca_basis(tokens)) == together[1]).all()


def test_pca_components_are_the_directions_of_largest_variance():
    tokens = skewed_tokens(1, 9, 9, 6)
    _, components, low, high = sheets.pca_basis(tokens)
    flat = tokens.reshape(-1, 6)
    _, _, directions = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    assert np.allclose(np.abs(components @ directions[:3].T), np.eye(3), atol=1e-6)
    assert (high > low).all()


def test_pca_picture_of_too_few_directions_is_grey_in_the_others():
    one_direction = np.arange(12.0).reshape(3, 4, 1) * np.ones(5)
    colors = sheets.pca_picture(one_direction)
    assert len(np.unique(colors[..., 0])) > 5 and set(np.unique(colors[..., 1:])) == {128}
    assert set(np.unique(sheets.pca_picture(np.ones((2, 2, 4))))) == {128}
    assert sheets.pca_picture(np.random.default_rng(0).normal(size=(4, 4, 2))).shape == (4, 4, 3)


# ---- images and sheets


def test_scale_and_overlay():
    values = np.arange(12.0).reshape(3, 4)
    assert sheets.scale(values).min() == 0 and sheets.scale(values).max() == 1
    assert (sheets.scale(np.full((2, 2), 3.0)) == 0).all()
    image = random_image(30, 40)
    overlay = sheets.attention_overlay(image, values)
    assert overlay.shape == image.shape and overlay.dtype == np.uint8
    assert (overlay == sheets.attention_overlay(image, 7 * values)).all()  # any scale
    assert (sheets.heatmap(np.array([[0.0, 1.0]])) == [[(68, 1, 84), (253, 231, 36)]]).all()  # ends of viridis


def test_mask_overlay_tints_inside_and_dims_outside():
    image = np.full((40, 40, 3), 100, dtype=np.uint8)
    mask = np.zeros((4, 4), dtype=bool)
    mask[1:3, 1:3] = True
    drawn = sheets.mask_overlay(image, mask)
    assert drawn[20, 20].tolist() == [162, 86, 86] and drawn[2, 2].tolist() == [60, 60, 60]
    assert drawn[10, 20].tolist() == list(sheets.MASK_COLOR)


def test_as_picture_takes_any_number_of_channels():
    for channels in (1, 2, 3, 4):
        image = sheets.as_picture(torch.arange(channels * 6, dtype=torch.uint8).view(channels, 2, 3))
        assert image.shape == (2, 3, 3) and image[0, 0, 0] == 0 and image[1, 2, 0] == 5


@pytest.mark.parametrize("heads", [1, 6])
def test_attention_sheet_has_a_row_per_image_and_a_column_per_head(heads):
    images = [random_image(48, 48, i) for i in range(3)]
    attentions = np.random.default_rng(0).random((3, heads, 6, 6))
    sheet = sheets.attention_sheet(images, attentions, cell=50)
    title, gap = 14, 6
    assert sheet.shape == (title + 3 * (50 + gap), gap + (2 + heads) * (50 + gap), 3)
    masked = sheets.attention_sheet(images, attentions, sheets.threshold_mask(attentions.mean(1)), cell=50)
    assert masked.shape == (sheet.shape[0], sheet.shape[1] + 50 + gap, 3)


def test_contact_sheet_keeps_the_aspect_ratio():
    white, black = np.full((10, 10, 3), 255, np.uint8), np.zeros((20, 40, 3), np.uint8)
    sheet = sheets.contact_sheet([[black, black], [black]], cell=80, gap=4)
    assert sheet.shape == (4 + 2 * (40 + 4), 4 + 2 * (80 + 4), 3)
    assert (sheet[4:44, 4:84] == 0).all() and (sheet[48:88, 88:] == 255).all()
    assert sheets.contact_sheet([[black.transpose(1, 0, 2), white]], cell=80, gap=4).shape == (88, 172, 3)
    with pytest.raises(ValueError, match="no figures"):
        sheets.contact_sheet([])


def test_names_stand_below_the_figures():
    black = np.zeros((10, 40, 3), np.uint8)
    rows = [[black, black], [black]]
    plain, named = (sheets.contact_sheet(rows, cell=160, captions=c) for c in ((), [["one.png"], ["a/" * 200 + "b"]]))
    assert plain.shape[0] == 6 + 2 * 46 and named.shape[0] == 6 + 2 * (46 + 16)
    first, second = named[46:62], named[108:124]  # below the rows of figures
    assert (first[:, 6:166] < 255).any() and (first[:, 166:] == 255).all()  # no name, no text
    columns = (second < 255).any((0, 2)).nonzero()[0]
    assert columns.min() >= 6 and columns.max() < 166 and np.ptp(columns) > 120  # shortened to the cell


def test_a_long_name_keeps_its_ends():
    font = sheets.ImageFont.load_default(size=11)
    text = sheets.shortened("n01440764_10026.JPEG", font, 80)
    assert text.startswith("n01") and text.endswith("PEG") and font.getlength(text) <= 80
    assert sheets.shortened("a.png", font, 80) == "a.png"


def test_neighbours_are_framed_by_whether_they_are_right():
    black = np.zeros((20, 40, 3), np.uint8)
    sheet = sheets.neighbour_sheet([black] * 2, [[black] * 3] * 2, [[True, False, True], [False] * 3], cell=40)
    title, gap, width = 12, 6, 40
    assert sheet.shape == (title + 2 * (20 + gap), gap + 4 * (width + gap), 3)
    rows = [sheet[-52:-32], sheet[-26:-6]]
    colours = [[row[1, 6 + 46 * c + 20].tolist() for c in range(4)] for row in rows]
    right, wrong = list(sheets.RIGHT), list(sheets.WRONG)
    assert colours == [[[0] * 3, right, wrong, right], [[0] * 3, wrong, wrong, wrong]]


# ---- from a network


def tiny_vit(**options):
    torch.manual_seed(0)
    return VisionTransformer([32], patch_size=8, embed_dim=24, depth=3, num_heads=3, qkv_bias=True, **options).eval()


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("layer", [-1, 0, 1, 2])
def test_attention_is_the_class_tokens_row_of_the_networks_own(layer, registers):
    model = tiny_vit(num_register_tokens=registers)
    for block in model.blocks:  # sharp enough that a wrong row would show
        block.attn.qkv.weight.data *= 20
    x = torch.randn(2, 3, 40, 51)
    heads, tokens = dense.attention_and_tokens(model, x, layer)
    expected = model.get_attention_maps(x, [layer])[0][:, :, 0, 1 + registers:].unflatten(-1, (5, 6))
    torch.testing.assert_close(heads, expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(tokens, model.forward_features(x).patch_tokens)
    assert not model.blocks[layer].attn.qkv._forward_hooks


def test_network_sheets_have_a_row_per_image_and_leave_the_model_as_it_was():
    model = tiny_vit().train()
    model.patch_embed.eval()
    modes = [module.training for module in model.modules()]
    images = [torch.randint(0, 256, (3, height, 40), dtype=torch.uint8) for height in (40, 64)]
    drawn = attention.network_sheets(model, images, (0.5,) * 3, (0.2,) * 3, cell=50)
    assert drawn["attention"].shape == (14 + 2 * 56, 6 + 5 * 56, 3)
    assert drawn["pca"].shape == (6 + 2 * 56, 6 + 2 * 56, 3)
    assert attention.network_sheets(model, [], (0.5,) * 3, (0.2,) * 3) == {}
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
