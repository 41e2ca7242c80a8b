"""Histograms of oriented gradients: what pre-training predicts.

Paper: Sec. 3.2 ("we adopt hog descriptor as prediction of decoder"); Dalal and Triggs 2005, in the
form of MaskFeat (Wei et al. 2022): each channel by itself, 9 unsigned orientations, cells of 8 x 8
pixels, every cell normalised by its own length, no blocks.

    name        shape                  meaning
    images      (B, C, H, H)           any scale and offset: the result does not depend on them
    gx, gy      (B, C, H, H)           Sobel derivatives along x and y
    magnitude   (B, C, H, H)           sqrt(gx^2 + gy^2), the weight of a pixel's vote
    angle       (B, C, H, H)           orientation in bins, atan2(gx, gy) / pi * 9, taken modulo 9
    histograms  (B, C, 9, H/8, H/8)    length 1 in each cell and channel, or 0 where it is flat
    targets     (B, N, C*9*(P/8)^2)    the same numbers, patch by patch

With the paper's sizes:  224 pixels -> 28 x 28 cells -> 2 x 2 cells in each of 14 x 14 patches
                         -> 196 targets of 3 * 9 * 2 * 2 = 108 numbers.

Run:  python -m pytest tests/test_hog.py
"""
import math

import torch
import torch.nn.functional as F

BINS = 9  # orientations of 20 degrees each


def gradients(images):
    """Sobel derivatives with reflected borders: (B, C, H, W) -> gx, gy of the same shape.

    Each is a smoothing (1, 2, 1) along one axis of a central difference (1, 0, -1) along the other.
    """
    x = F.pad(images, (1, 1, 1, 1), mode="reflect")                     # (B, C, H+2, W+2)
    across = x[..., :-2] - x[..., 2:]                                   # (B, C, H+2, W)
    down = x[..., :-2, :] - x[..., 2:, :]                               # (B, C, H, W+2)
    gx = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]   # (B, C, H, W)
    gy = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]                  # (B, C, H, W)
    return gx, gy


def magnitude_and_angle(gx, gy):
    """Length of the gradient and its orientation in bins, [0, 9); both finite with their gradients.

    Where the image is flat the angle has no meaning and the derivatives of sqrt and atan2 do not
    exist: such pixels are given length 0 and angle 0, constants.
    """
    flat = (gx == 0) & (gy == 0)
    gx, gy = gx.masked_fill(flat, 0.0), gy.masked_fill(flat, 1.0)
    magnitude = (gx.square() + gy.square()).sqrt().masked_fill(flat, 0.0)
    angle = torch.atan2(gx, gy) / math.pi * BINS                        # (-9, 9]
    return magnitude, angle.masked_fill(flat, 0.0)


def cell_sums(votes, cell):
    """Sum over cells of cell x cell pixels: (B, C, H, W) -> (B, C, H/cell, W/cell)."""
    return F.avg_pool2d(votes, cell) * cell ** 2


def hog(images, cell=8, binning="hard"):
    """HOG of a batch, (B, C, H, W) -> (B, C, 9, H/cell, W/cell), on the images' device.

    binning "hard" gives a pixel's whole vote to the bin floor(angle) mod 9, as MaskFeat does;
    "linear" splits it between the two bins whose centres are nearest, in proportion, which makes
    the result continuous and differentiable in the angle too. fp32 even under autocast and for
    half-precision images; float64 stays float64. Raises ValueError for a size that cells do not
    fill.
    """
    if images.shape[-1] % cell or images.shape[-2] % cell:
        raise ValueError(f"an image of {images.shape[-2]} x {images.shape[-1]} pixels is not "
                         f"filled by cells of {cell}")
    with torch.autocast(images.device.type, enabled=False):
        images = images if images.dtype == torch.float64 else images.float()
        magnitude, angle = magnitude_and_angle(*gradients(images))
        if binning == "hard":
            vote = angle.detach().floor().remainder(BINS)               # 0 .. 8
            sums = [cell_sums(magnitude * (vote == b), cell) for b in range(BINS)]
        elif binning == "linear":
            sums = []
            for b in range(BINS):                                       # centre of bin b: b + 1/2
                distance = (angle - (b + 0.5) + BINS / 2).remainder(BINS) - BINS / 2
                sums.append(cell_sums(magnitude * (1 - distance.abs()).clamp(min=0), cell))
        else:
            raise ValueError(f"binning is 'hard' or 'linear', not {binning!r}")
        histograms = torch.stack(sums, dim=2)                           # (B, C, 9, H/8, W/8)
        return F.normalize(histograms, dim=2)                           # length 1 over the 9 bins


def to_patches(histograms, cells):
    """Histograms (B, C, 9, h, w) -> targets (B, N, C*9*cells^2), cells x cells of them a patch.

    N = (h/cells) * (w/cells), row by row as the ViT's tokens; in a target: channel, bin, row,
    column.
    """
    batch, channels, bins, height, width = histograms.shape
    rows, columns = height // cells, width // cells
    x = histograms.reshape(batch, channels * bins, rows, cells, columns, cells)
    x = x.permute(0, 2, 4, 1, 3, 5)                                     # (B, r, c, C*9, ., .)
    return x.reshape(batch, rows * columns, -1)                         # (B, N, C*9*cells^2)


def from_patches(targets, cells, channels=3):
    """Inverse of `to_patches` for square images: (B, N, C*9*cells^2) -> (B, C, 9, h, h)."""
    batch, count, _ = targets.shape
    side = round(count ** 0.5)
    x = targets.reshape(batch, side, side, channels * BINS, cells, cells)
    x = x.permute(0, 3, 1, 4, 2, 5)                                     # (B, C*9, side, cells, ...)
    return x.reshape(batch, channels, BINS, side * cells, side * cells)


def hog_targets(images, patch_size=16, binning="hard"):
    """What pre-training predicts: images (B, C, H, H) -> (B, N, C*9*2*2), no gradient.

    A patch always holds 2 x 2 cells, as in the paper's setting of 16-pixel patches and 8-pixel
    cells; a smaller model has smaller cells.
    """
    with torch.no_grad():
        return to_patches(hog(images, patch_size // 2, binning), 2)     # (B, N, 108) for RGB
