"""Histograms of oriented gradients: what pre-training predicts.

Paper: Sec. 3.2 ("we adopt hog descriptor as prediction of decoder"); Dalal and Triggs 2005, in the
form of MaskFeat (Wei et al. 2022): each channel by itself, 9 unsigned orientations, cells of 8 x 8
pixels, every cell normalised by its own length, no blocks.

    name        shape                  meaning
    images      (B, C, H, H)           C channels; scale and offset do not change the result
    gx, gy      (B, C, H, H)           Sobel derivatives along x and y
    magnitude   (B, C, H, H)           sqrt(gx^2 + gy^2), the weight of a pixel's vote
    angle       (B, C, H, H)           orientation in bins, atan2(gx, gy) / pi * 9, taken modulo 9
    histograms  (B, C, 9, h, h)        length 1 in each cell and channel, or 0 where it is flat;
                                       h = H / side of a cell
    targets     (B, N, C*9*2*2)        the same numbers, patch by patch: 2 x 2 cells in each

With the paper's sizes:  224 pixels -> 28 x 28 cells -> 2 x 2 cells in each of 14 x 14 patches
                         -> 196 targets of 3 * 9 * 2 * 2 = 108 numbers.

Run:  python hog.py [--image FACE] [--out runs/hog.png]   (a picture: face, gradient, histograms)
      python -m pytest tests/test_hog.py
"""
import argparse
import colorsys
import math
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from vit import patchify, unpatchify

BINS = 9  # orientations of 20 degrees each
FLAT = 1e-4  # a gradient that no grey level makes: rounding, in a crop, leaves up to 1e-5
AT_ONCE = 8  # images of a batch whose votes are counted at a time
EIGHT_BIT = ("1", "L", "LA", "P", "RGB", "RGBA")  # Pillow's modes of 8-bit grey and RGB images


def gradients(images):
    """Sobel derivatives with reflected borders: (B, C, H, W) -> gx, gy of the same shape.

    Each is a smoothing (1, 2, 1) along one axis of a central difference (1, 0, -1) along the other.
    """
    x = F.pad(images, (1, 1, 1, 1), mode="reflect")                     # (B, C, H+2, W+2)
    across = x[..., :-2] - x[..., 2:]                                   # (B, C, H+2, W)
    down = x[..., :-2, :] - x[..., 2:, :]                               # (B, C, H, W+2)
    gx = torch.add(across[..., :-2, :], across[..., 1:-1, :], alpha=2) + across[..., 2:, :]
    gy = torch.add(down[..., :-2], down[..., 1:-1], alpha=2) + down[..., 2:]
    return gx, gy                                                       # (B, C, H, W)


def magnitude_and_angle(gx, gy):
    """Length of the gradient, its angle from the y axis (MaskFeat's) in bins, not yet modulo 9.

    The angle is in -9 .. 9. Both are finite, and so are their gradients: where the image is flat
    the angle has no meaning and the derivatives of sqrt and atan2 do not exist, so such pixels are
    given length 0, a constant, and angle 0. Flat is what rounding alone can make (`FLAT`): else
    the normalisation of its cell would lift that noise to length 1.
    """
    power = gx.square().add_(gy.square())
    flat = power < FLAT ** 2
    magnitude = power.masked_fill(flat, 1.0).sqrt().masked_fill(flat, 0.0)
    angle = torch.atan2(gx, gy.masked_fill(flat, 1.0)).div_(math.pi).mul_(BINS)
    return magnitude, angle                                             # (B, C, H, W)


def cell_sums(bins, votes, cell):
    """Sum the votes for each bin over cells of cell x cell pixels.

    bins and votes (B, C, H, W); bins are whole numbers in -18 .. 17, of which those 9 apart are the
    same orientation -> (B, C, 9, H/cell, W/cell).
    """
    height, width = votes.shape[-2] // cell, votes.shape[-1] // cell
    row = torch.arange(votes.shape[-2], device=votes.device) // cell
    column = torch.arange(votes.shape[-1], device=votes.device) // cell
    plane, cells = height * width, row[:, None] * width + column        # a pixel's cell, (H, W)
    # Bin b votes in plane b + 18 of 36; adding planes 9 apart, at the end, is the modulo.
    place = bins.long().mul_(plane).add_(cells + 2 * BINS * plane)      # (B, C, H, W)
    planes = votes.new_zeros(*votes.shape[:2], 4 * BINS * plane)        # (B, C, 36*h*w)
    planes = planes.scatter_add(2, place.flatten(2), votes.flatten(2))  # each pixel votes once
    return planes.unflatten(2, (4, BINS, height, width)).sum(dim=2)     # (B, C, 9, H/cell, W/cell)


def cell_histograms(images, cell, binning):
    """HOG of a few images whose size cells fill, (B, C, H, W) -> (B, C, 9, H/cell, W/cell)."""
    magnitude, angle = magnitude_and_angle(*gradients(images))
    if binning == "hard":
        sums = cell_sums(angle.detach().floor(), magnitude, cell)
    else:
        position = angle - 0.5                                          # 0 at bin 0's centre
        low = position.detach().floor()
        share = position - low                                          # of the next bin, [0, 1)
        sums = cell_sums(low, magnitude * (1 - share), cell) \
            + cell_sums(low + 1, magnitude * share, cell)
    return F.normalize(sums, dim=2)                                     # length 1 over the 9 bins


def hog(images, cell=8, binning="hard"):
    """HOG of a batch (Sec. 3.2), (B, C, H, W) -> (B, C, 9, H/cell, W/cell), on its device.

    binning "hard" gives a pixel's whole vote to the bin floor(angle) mod 9, as MaskFeat does;
    "linear" splits it between the two bins whose centres are nearest, in proportion, which makes
    the result continuous and differentiable in the angle too. fp32 even under autocast and for
    half-precision images; float64 stays float64. Images must be finite. Raises ValueError for a
    size that cells do not fill.
    """
    if images.shape[-1] % cell or images.shape[-2] % cell:
        raise ValueError(f"an image of {images.shape[-2]} x {images.shape[-1]} pixels is not "
                         f"filled by cells of {cell}")
    if binning not in ("hard", "linear"):
        raise ValueError(f"binning is 'hard' or 'linear', not {binning!r}")
    with torch.autocast(images.device.type, enabled=False):
        images = images if images.dtype == torch.float64 else images.float()
        # A few at a time: what is as large as the images is then small and stays in the cache.
        return torch.cat([cell_histograms(part, cell, binning) for part in images.split(AT_ONCE)])


def to_patches(histograms, cells):
    """Histograms (B, C, 9, h, w) -> targets (B, N, C*9*cells^2), cells x cells of them a patch.

    In the order of the ViT's tokens; in a target: channel, bin, row, column.
    """
    return patchify(histograms.flatten(1, 2), cells)                    # (B, N, C*9*cells^2)


def from_patches(targets, cells):
    """Inverse of `to_patches` for square images: (B, N, C*9*cells^2) -> (B, C, 9, h, h)."""
    return unpatchify(targets, cells).unflatten(1, (-1, BINS))          # (B, C, 9, h, h)


def hog_targets(images, patch_size=16):
    """What pre-training predicts (Sec. 3.2): images (B, C, H, H) -> (B, N, C*9*2*2), no gradient.

    A patch always holds 2 x 2 cells, as in the paper's setting of 16-pixel patches and 8-pixel
    cells; a smaller model has smaller cells.
    """
    with torch.no_grad():
        return to_patches(hog(images, patch_size // 2), 2)              # (B, N, 108) for RGB


# ---------------------------------------------------------------------------------------- pictures

def edge(b, length):
    """End points, from the middle, of the edge that votes for bin b: across the gradient."""
    theta = (b + 0.5) * math.pi / BINS                      # atan2(gx, gy) at the bin's centre
    return length * math.cos(theta), -length * math.sin(theta)


def colour(b):
    """A colour for each orientation, dark enough for a white ground: (red, green, blue)."""
    return tuple(int(200 * v) for v in colorsys.hsv_to_rgb(b / BINS, 1.0, 1.0))


def glyphs(histograms, pixels):
    """Draw HOG: histograms (C, 9, h, w) -> PIL RGB, w*pixels x h*pixels.

    A cell is a bundle of nine strokes along the edges; the more votes, the more opaque a stroke.
    Channels are averaged.
    """
    votes = histograms.mean(dim=0)                                      # (9, h, w)
    _, height, width = votes.shape
    picture = Image.new("RGB", (width * pixels, height * pixels), "white")
    draw = ImageDraw.Draw(picture)
    for b, row, column in (votes > 0.15).nonzero().tolist():            # weaker ones only blur
        x, y, share = (column + 0.5) * pixels, (row + 0.5) * pixels, votes[b, row, column].item()
        dx, dy = edge(b, 0.46 * pixels)
        fill = tuple(int(255 - min(share, 1) * (255 - c)) for c in colour(b))
        draw.line((x - dx, y - dy, x + dx, y + dy), fill, max(pixels // 8, 1))
    return picture


def footnote(picture, text):
    """The picture with a legend beneath it, in lines that fit: PIL RGB."""
    lines = textwrap.wrap(text, picture.width // 11)
    sheet = Image.new("RGB", (picture.width, picture.height + 20 + 28 * len(lines)), "white")
    sheet.paste(picture)
    ImageDraw.Draw(sheet).multiline_text((16, picture.height + 8), "\n".join(lines), "black",
                                         ImageFont.load_default(20), spacing=6)
    return sheet


def picture(path):
    """An image file of 8-bit grey or RGB, turned as the camera was held: PIL RGB.

    ValueError names a file that is none.
    """
    try:
        with Image.open(path) as image:
            if image.mode in EIGHT_BIT:
                return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:                           # of damaged files Pillow says anything
        raise ValueError(f"{path}: not a readable image ({error})") from None
    raise ValueError(f"{path} is not of 8-bit grey or RGB but {image.mode}")


def figure(image):
    """Face, gradient and histograms of an RGB image beside each other, with a legend: PIL RGB.

    Of its middle square, at the paper's size.
    """
    cell, side, zoom = 8, 224, 3
    image = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(image) / 255).permute(2, 0, 1)[None]      # (1, 3, S, S)
    magnitude, _ = magnitude_and_angle(*gradients(pixels.float()))
    strength = magnitude.mean(dim=1)[0]                                 # (S, S)
    ink = 255 - (255 * (strength / strength.max().clamp(min=1e-9)) ** 0.5).byte().numpy()
    big, gap, top = side * zoom, 30, 60
    panels = [image, Image.fromarray(ink).convert("RGB"),
              glyphs(hog(pixels, cell)[0], cell * zoom)]
    titles = ["face", "length of the gradient (square root)", f"HOG, cells of {cell} x {cell}"]
    sheet = Image.new("RGB", (3 * big + 4 * gap, big + top + 110), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(30)
    for k, (panel, title) in enumerate(zip(panels, titles)):
        x = gap + k * (big + gap)
        sheet.paste(panel.resize((big, big), Image.Resampling.NEAREST), (x, top))
        draw.rectangle((x - 1, top - 1, x + big, top + big), outline="silver")
        draw.text((x, top - 12), title, "black", font, anchor="ls")
    y = top + big + 55
    draw.text((gap, y), "edge for which a bin votes:", "black", font, anchor="lm")
    for b in range(BINS):
        x = gap + 520 + b * 140
        dx, dy = edge(b, 34)
        draw.line((x - dx, y - dy, x + dx, y + dy), colour(b), 6)
        draw.text((x + 44, y), str(b), "black", font, anchor="lm")
    return sheet


def drawn_face():
    """A plain face with curved, straight, thin and broad edges, for want of an image: PIL RGB."""
    side = 448
    image = Image.new("RGB", (side, side), (205, 215, 225))
    draw, at = ImageDraw.Draw(image), lambda *shares: [round(v * side) for v in shares]
    draw.ellipse(at(0.16, 0.06, 0.84, 0.96), (236, 196, 164), (90, 60, 45), 4)
    for x in (0.35, 0.65):
        draw.ellipse(at(x - 0.09, 0.36, x + 0.09, 0.48), "white", (60, 40, 35), 4)
        draw.ellipse(at(x - 0.04, 0.38, x + 0.04, 0.46), (60, 40, 35))
        draw.line(at(x - 0.11, 0.30 + 0.02 * (x < 0.5), x + 0.11, 0.30 + 0.02 * (x > 0.5)),
                  (70, 45, 35), 14)
    draw.line(at(0.5, 0.46, 0.46, 0.62, 0.53, 0.63), (150, 105, 85), 6)
    draw.chord(at(0.33, 0.60, 0.67, 0.84), 20, 160, (150, 50, 55), (90, 30, 35), 4)
    return image


def main(argv=None):
    """Draw the HOG of an image file, or of a drawn face."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--image", help="a picture of a face, cropped (a drawn one)")
    parser.add_argument("--out", default="runs/hog.png", help="the picture (%(default)s)")
    args = parser.parse_args(argv)
    try:
        image = picture(args.image) if args.image else drawn_face()
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        figure(image).save(args.out)
    except (OSError, ValueError) as error:
        print(f"error: {error}; give --image a picture and --out a path ending in .png",
              file=sys.stderr)
        sys.exit(2)
    print(f"HOG: {args.out}")


if __name__ == "__main__":
    main()
