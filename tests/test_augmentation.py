"""datasets.augment: what of a face is changed at random, how far and how often."""
import math

import pytest
import torch

from datasets import DATA, augment, erased, prepare


def plain_batch(n=64):
    values = torch.rand(n, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    return (values * 255).to(torch.uint8)


def white(n=64):
    return torch.full((n, 1, 24, 24), 255, dtype=torch.uint8)


def uniform_rows(n=64, value=None):
    u = torch.rand(n, 12, generator=torch.Generator().manual_seed(1))
    return u if value is None else torch.full_like(u, value)


def test_augmentation_without_change_is_preparation():
    u = uniform_rows()                                                # --crop-scale 1: no crop
    u[:, 4] = 0.9                                                     # no flip
    plain = augment(plain_batch(), u, 24, "toy", scale=1.0)
    torch.testing.assert_close(plain, prepare(plain_batch(), 24, "toy"), rtol=1e-4, atol=1e-4)
    u[:, 4] = 0.0                                                     # a flip and nothing else
    torch.testing.assert_close(augment(plain_batch(), u, 24, "toy", scale=1.0).flip(-1), plain,
                               rtol=1e-4, atol=1e-4)


def slow_twin(image, u, size, scale, degrees, light):
    """One face (C, S, S) in 0 .. 1, pixel by pixel: cropped, mirrored, turned and lit, but not
    normalised; u are the numbers of its row."""
    channels, side = len(image), len(image[0])
    area = scale + (1 - scale) * u[0]
    ratio = math.exp((2 * u[1] - 1) * min(math.log(4 / 3), -math.log(area)))
    width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
    middle = (2 * u[2] - 1) * (1 - width), (2 * u[3] - 1) * (1 - height)
    angle = math.radians((2 * u[5] - 1) * degrees)
    out = torch.zeros(channels, size, size)
    for row in range(size):
        for column in range(size):
            x, y = width * (2 * (column + 0.5) / size - 1), height * (2 * (row + 0.5) / size - 1)
            x = -x if u[4] < 0.5 else x
            x, y = (middle[0] + x * math.cos(angle) - y * math.sin(angle),
                    middle[1] + x * math.sin(angle) + y * math.cos(angle))      # -1 .. 1
            x, y = (min(max((v + 1) * side / 2 - 0.5, 0), side - 1) for v in (x, y))   # a pixel
            left, top = min(int(x), side - 2), min(int(y), side - 2)
            for c in range(channels):
                upper, lower = (image[c][r][left] * (left + 1 - x) + image[c][r][left + 1]
                                * (x - left) for r in (top, top + 1))
                value = upper * (top + 1 - y) + lower * (y - top)
                value = 0.5 + (value - 0.5) * (1 + (2 * u[6] - 1) * light) + (2 * u[7] - 1) * light
                out[c, row, column] = min(max(value, 0), 1)
    return out


@pytest.mark.parametrize("how", [(0.5, 0.0, 0.0), (1.0, 30.0, 0.0), (0.3, 30.0, 0.4)])
def test_augmentation_equals_its_slow_twin(how):
    about, u = DATA["raf"], uniform_rows(6)                      # a mean for each colour
    found = augment(plain_batch(6), u, 10, "raf", *how)
    for x, image, row in zip(found, plain_batch(6), u.tolist()):
        expected = slow_twin((image / 255).tolist(), row, 10, *how)
        for c in range(3):
            torch.testing.assert_close(x[c] * about["std"][c] + about["mean"][c], expected[c],
                                       rtol=1e-4, atol=1e-4)


def test_erasing_equals_its_slow_twin():
    u = uniform_rows(20)[:, :4]
    for found, (a, b, c, d) in zip(erased(u, 24), u.tolist()):
        share, aspect = 0.02 + 0.31 * a, 3.3 ** (2 * b - 1)      # of the area; height / width
        height, width = (min(24 * math.sqrt(v), 24) for v in (share * aspect, share / aspect))
        top, left = c * (24 - height), d * (24 - width)
        for row in range(24):
            for column in range(24):
                assert found[row, column] == (top <= row + 0.5 < top + height
                                              and left <= column + 0.5 < left + width)


def test_crops_rotations_and_light_are_what_was_asked_for():
    """A ramp of brightness tells where the corners of a crop lie in the picture."""
    across = torch.arange(0, 256, 4, dtype=torch.uint8).expand(1, 1, 64, 64)   # 4 a pixel
    down, u = across.transpose(2, 3), uniform_rows(500)
    u[:, 4] = 0.9                                            # no flip

    def seen(image, **how):                                  # where a pixel came from, 0 .. 64
        x = augment(image.expand(500, -1, -1, -1), u, 64, "ferplus", **how)[:, 0]
        return (x * 0.255 + 0.508) * 255 / 4 + 0.5

    x, y = seen(across, scale=0.5), seen(down, scale=0.5)
    w = (x[:, 32, 60] - x[:, 32, 3]) / 57                    # share of the width, (500,)
    h = (y[:, 60, 32] - y[:, 3, 32]) / 57
    assert 0.48 < (w * h).min() < 0.55 and 0.9 < (w * h).max() < 1.02
    assert w.min() > 0.59 and w.max() < 1.02 and 0.7 < (w / h).min() and (w / h).max() < 1.36
    area = 0.5 + 0.5 * u[:, 0]
    torch.testing.assert_close(w * h, area, rtol=0.02, atol=0.01)      # exactly what was drawn
    left = x[:, 32, 3] - 3 * w
    assert left.min() > -1 and (left + 64 * w).max() < 65    # no crop leaves the picture
    assert left.std() > 2 and y[:, 3, 32].std() > 2
    u[:, 1] = 0.5                                            # square crops
    turned = seen(across, scale=1.0, degrees=15.0)[:, 16:48, 16:48]
    slope = (turned[:, -1, 16] - turned[:, 0, 16]) / (turned[:, 16, -1] - turned[:, 16, 0])
    angles = slope.atan() * 180 / torch.pi
    assert 13 < angles.max() < 15.5 and -15.5 < angles.min() < -13
    lit = (seen(across, scale=1.0, light=0.3) - 0.5) / 63.75     # brightness 0 .. 1
    middle, contrast = lit[:, 32, 31:33].mean(1), (lit[:, 32, 36] - lit[:, 32, 27]) * 63.75 / 9
    assert 0.18 < middle.min() < 0.25 and 0.75 < middle.max() < 0.82
    assert 0.69 < contrast.min() < 0.75 and 1.25 < contrast.max() < 1.31


def test_a_face_is_augmented_alike_however_the_batch_is_divided():
    images, u = plain_batch(), uniform_rows()
    settings = dict(scale=0.5, degrees=15.0, light=0.3, erase=0.5)
    whole = augment(images, u, 32, "toy", **settings)
    parts = [augment(images[i:i + 16], u[i:i + 16], 32, "toy", **settings)
             for i in range(0, 64, 16)]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert whole.shape == (64, 3, 32, 32) and whole.isfinite().all()


def test_erasing_happens_as_often_as_asked_and_grey_becomes_three_channels():
    x = augment(white(2000), uniform_rows(2000), 24, "ferplus", scale=1.0, erase=0.25)
    assert x.shape == (2000, 3, 24, 24) and x[:, 0].equal(x[:, 2])
    share = (x == 0).float().mean((1, 2, 3))
    assert (share > 0).float().mean() == pytest.approx(0.25, abs=0.04)
    assert 0.02 < share[share > 0].mean() < 0.33


def test_a_turned_face_has_no_black_corners():
    x = augment(white(), uniform_rows(), 24, "ferplus", scale=1.0, degrees=45.0)
    torch.testing.assert_close(x, x[0, 0, 12, 12].expand_as(x))


def test_what_is_erased_lies_anywhere_and_has_any_shape():
    x = augment(white(4000), uniform_rows(4000), 48, "ferplus", scale=1.0, erase=1.0)
    gone = (x == 0)[:, 0]
    often = gone.float().mean(dim=0)                                 # (48, 48)
    for turned in (often.flip(0), often.flip(1), often.T):
        assert (often - turned).abs().max() < 0.05
    assert 0 < often[0, 0] < 0.05 and often[24, 24] > 0.2
    high, wide = gone.any(2).sum(1), gone.any(1).sum(1)              # in pixels
    assert 3 < (high / wide).max() < 4.5 and 3 < (wide / high).max() < 4.5      # 3.3, but whole


def test_each_random_number_of_an_augmentation_has_a_part_of_its_own():
    seen = lambda u: augment(plain_batch(), u, 24, "toy", 0.5, 15.0, 0.3, 1.0)
    before = seen(uniform_rows())
    for k in range(12):
        u = uniform_rows()
        u[:, k] = (u[:, k] + 0.5) % 1
        assert not seen(u).equal(before), k


def test_crops_lie_anywhere_and_contrast_does_not_follow_brightness():
    u, slope = uniform_rows(2000), torch.arange(70, 190, 5, dtype=torch.uint8)   # round mid-grey
    correlation = lambda a, b: torch.corrcoef(torch.stack([a, b]))[0, 1].abs()
    left, top = (augment(x.expand(2000, 1, 24, 24), u, 24, "ferplus", 0.5)[:, 0].mean((1, 2))
                 for x in (slope, slope[:, None]))
    assert correlation(left, top) < 0.1
    lit = augment(slope.expand(2000, 1, 24, 24), u, 24, "ferplus", 1.0, light=0.1)[:, 0]
    assert correlation(lit.mean((1, 2)), lit.std((1, 2))) < 0.1


def test_bright_light_stays_within_the_range_of_pixels():
    assert augment(white(), uniform_rows(), 24, "ferplus", 1.0, light=0.5).max() <= \
        prepare(white(), 24, "ferplus").max()


def test_half_of_the_faces_are_turned_round_and_as_many_of_these_erased():
    slope = torch.arange(0, 240, 10, dtype=torch.uint8).expand(4000, 1, 24, 24)
    x = augment(slope, uniform_rows(4000), 24, "ferplus", scale=1.0)[:, 0]
    turned = x[:, 0, 0] > x[:, 0, -1]
    assert turned.float().mean() == pytest.approx(0.5, abs=0.04)
    x = augment(white(4000), uniform_rows(4000), 24, "ferplus", scale=1.0, erase=0.25)
    gone = (x == 0).flatten(1).any(dim=1)
    for rows in (turned, ~turned):
        assert gone[rows].float().mean() == pytest.approx(0.25, abs=0.04)
