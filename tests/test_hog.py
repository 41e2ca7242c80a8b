"""hog.py: MaskFeat's layer as plain loops, and the invariances that make HOG a good target."""
import math

import pytest
import torch

from datasets import augment
from hog import AT_ONCE, BINS, cell_sums, from_patches, hog, hog_targets, to_patches


def slow_hog(image, cell):
    """HOG of one channel (H, W) with hard bins, pixel by pixel: (9, H/cell, W/cell)."""
    height, width = image.shape
    reflect = lambda i, n: -i if i < 0 else 2 * (n - 1) - i if i >= n else i
    pixel = lambda y, x: image[reflect(y, height), reflect(x, width)].item()
    sobel = [(1, 0, -1), (2, 0, -2), (1, 0, -1)]
    out = torch.zeros(BINS, height // cell, width // cell)
    for y in range(height):
        for x in range(width):
            gx = sum(sobel[i][j] * pixel(y + i - 1, x + j - 1) for i in range(3) for j in range(3))
            gy = sum(sobel[j][i] * pixel(y + i - 1, x + j - 1) for i in range(3) for j in range(3))
            bin_ = math.floor(math.atan2(gx, gy) / math.pi * BINS) % BINS
            out[bin_, y // cell, x // cell] += math.hypot(gx, gy)
    for row in range(height // cell):
        for column in range(width // cell):
            length = math.sqrt(sum(v * v for v in out[:, row, column].tolist()))
            out[:, row, column] /= max(length, 1e-12)
    return out


def smooth_noise(*shape):
    torch.manual_seed(0)
    return torch.rand(*shape)


def test_hard_binning_is_maskfeats_layer():
    images = smooth_noise(2, 3, 16, 24)
    fast = hog(images)
    assert fast.shape == (2, 3, 9, 2, 3)
    for b in range(2):
        for c in range(3):
            torch.testing.assert_close(fast[b, c], slow_hog(images[b, c], 8), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("binning", ["hard", "linear"])
def test_brightness_contrast_and_negation_change_nothing(binning):
    images = smooth_noise(2, 3, 32, 32)
    before = hog(images, binning=binning)
    torch.testing.assert_close(hog(images + 0.5, binning=binning), before, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(hog(images * 4.0, binning=binning), before)
    torch.testing.assert_close(hog(-images, binning=binning), before, rtol=1e-3, atol=1e-4)


def test_flat_image_gives_zero_and_other_cells_have_length_one():
    assert hog(torch.full((1, 3, 16, 16), 0.7)).abs().max() == 0
    torch.testing.assert_close(hog(smooth_noise(1, 3, 16, 16)).norm(dim=2), torch.ones(1, 3, 2, 2))


@pytest.mark.parametrize("size", [48, 224])
def test_a_flat_area_stays_flat_in_a_crop_and_a_step_of_one_grey_level_does_not(size):
    """The weights of a crop's interpolation do not sum to 1 exactly; that noise is no gradient."""
    levels = torch.arange(0, 255, 6, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 48, 48)
    u = torch.rand(len(levels), 12, generator=torch.Generator().manual_seed(0))
    assert hog(augment(levels, u, size, "ferplus", 0.5)).abs().max() == 0
    step = levels.clone()
    step[..., 24:] += 1
    lengths = hog(augment(step, u, size, "ferplus", 0.8)).norm(dim=2)
    assert (lengths.flatten(1).amax(dim=1) > 0.99).all()


def ramp(degrees):
    """An even slope whose gradient points `degrees` away from the x axis, (1, 1, 32, 32)."""
    y, x = torch.meshgrid(*2 * [torch.arange(32.0, dtype=torch.float64)], indexing="ij")
    radians = math.radians(degrees)
    return (x * math.cos(radians) + y * math.sin(radians))[None, None]


def test_rotation_by_20_degrees_moves_one_bin():
    bins = [hog(ramp(a))[0, 0, :, 1, 1].argmax().item() for a in range(0, 180, 20)]
    assert bins == [4, 3, 2, 1, 0, 8, 7, 6, 5]


def test_linear_binning_splits_a_vote_between_the_two_nearest_bins():
    """An even slope has one angle; its vote is divided by the distances to the bins' centres."""
    for degrees in (3.0, 37.0, 100.0, 178.0):
        votes = hog(ramp(degrees), binning="linear")[0, 0, :, 1, 1]
        position = (90.0 - degrees) / 20 - 0.5                # in bins, 0 at the first one's centre
        low, share = math.floor(position) % BINS, position - math.floor(position)
        expected = torch.zeros(BINS, dtype=torch.float64)
        expected[low], expected[(low + 1) % BINS] = 1 - share, share
        torch.testing.assert_close(votes, expected / expected.norm())


def test_linear_binning_is_continuous_where_hard_binning_jumps():
    edge = [ramp(9.9999), ramp(10.0001)]                      # the angle crosses a bin's border
    jump = lambda b: (hog(edge[0], binning=b) - hog(edge[1], binning=b)).abs().max().item()
    assert jump("linear") < 1e-4 and jump("hard") > 0.9


def test_gradients_are_right_and_finite():
    torch.manual_seed(0)
    images = torch.rand(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: hog(x, cell=2, binning="linear"), images)
    assert torch.autograd.gradcheck(lambda x: hog(x, cell=2, binning="hard"), images)
    for binning in ("hard", "linear"):
        flat = torch.ones(1, 3, 8, 8, requires_grad=True)
        hog(flat, binning=binning).sum().backward()
        assert flat.grad.isfinite().all()


def test_a_face_has_one_hog_in_any_batch():
    images = smooth_noise(AT_ONCE * 2 + 3, 3, 16, 16)         # more than are counted at a time
    assert hog(images).equal(torch.cat([hog(image[None]) for image in images]))


def test_votes_find_their_cell_among_very_many():
    """The number of a place is beyond 2^24 here, up to which fp32 counts without gaps."""
    bins = torch.full((1, 1, 701, 701), -1.0)
    sums = cell_sums(bins, torch.ones_like(bins), 1)
    assert (sums[:, :, 8] == 1).all() and sums.sum() == 701 * 701


def test_targets_have_the_papers_shape_and_come_back():
    images = smooth_noise(2, 3, 224, 224)
    targets = hog_targets(images)
    assert targets.shape == (2, 196, 108) and not targets.requires_grad
    assert from_patches(targets, 2).equal(hog(images))
    assert hog_targets(images[..., :48, :48], patch_size=8).shape == (2, 36, 108)


def test_a_target_belongs_to_its_patch():
    """Changing one patch changes its own target and, by the filter's border, its neighbours'."""
    images = smooth_noise(1, 3, 64, 64)
    before = hog_targets(images)
    images[:, :, 16:32, 32:48] += smooth_noise(1, 3, 16, 16)             # row 1, column 2
    changed = (hog_targets(images) != before).any(dim=2)[0].reshape(4, 4)
    neighbours = torch.zeros(4, 4, dtype=torch.bool)
    neighbours[0:3, 1:4] = True
    assert changed[1, 2] and not changed[~neighbours].any()
    cells = to_patches(torch.arange(2.0 * 9 * 16).reshape(1, 2, 9, 4, 4), 2)
    assert cells[0, 1, :4].tolist() == [2.0, 3.0, 6.0, 7.0]              # top right, first bin


def test_hog_is_fp32_under_autocast():
    images = smooth_noise(1, 3, 16, 16)
    rounded, plain = images.bfloat16(), hog(images)
    of_rounded = hog(rounded.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert hog(images).equal(plain) and hog(rounded).equal(of_rounded)


@pytest.mark.parametrize("call, message", [
    (lambda: hog(torch.zeros(1, 3, 20, 16)), "not filled by cells of 8"),
    (lambda: hog(torch.zeros(1, 3, 16, 16), binning="soft"), "'hard' or 'linear'")])
def test_errors_name_the_cause(call, message):
    with pytest.raises(ValueError, match=message):
        call()
