"""datasets.py: the layouts on disk, votes to labels, alignment, augmentation, the toy."""
import csv
import os
import pathlib

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
from datasets import (DATA, PROTOTYPES, TEMPLATE, Faces, InputError, align, augment, five_points,
                      hold_out, listing, load_faces, prepare, read_image, similarity, toy_sample,
                      voted_label)

REAL = pathlib.Path(__file__).resolve().parents[2] / "shared" / "ferplus"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the real FERPlus is not here")
KINDS = DATA["ferplus"]["classes"] + ["unknown", "NF"]


def grey(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((48, 48), value, np.uint8)).save(path)


def fake_ferplus(root, rows):
    """rows: (usage, name, ten votes); an image for each name, as bright as its number."""
    with open(root / "fer2013new.csv", "w", newline="") as file:
        csv.writer(file).writerows([["Usage", "Image name"] + KINDS]
                                   + [[u, n] + v for u, n, v in rows])
    for usage, name, _ in rows:
        if name:
            folder = dict(Training="FER2013Train", PublicTest="FER2013Valid")[usage]
            grey(root / folder / name, int(name[3:10]))
    return root


ROWS = [("Training", "fer0000007.png", [6, 3, 0, 0, 0, 0, 0, 0, 1, 0]),
        ("Training", "", [0, 0, 0, 0, 0, 0, 0, 0, 0, 10]),
        ("Training", "fer0000009.png", [0, 0, 0, 0, 0, 0, 0, 0, 6, 4]),
        ("Training", "fer0000020.png", [10, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        ("PublicTest", "fer0000033.png", [0, 0, 0, 0, 0, 0, 4, 5, 0, 0]),
        ("Training", "fer0000020.png", [0, 1, 0, 4, 4, 0, 0, 0, 0, 0])]


def test_ferplus_is_joined_by_name_and_the_last_row_of_a_name_wins(tmp_path):
    fake_ferplus(tmp_path, ROWS)
    faces = load_faces("ferplus", tmp_path, "train", 48, partial=True, cache=tmp_path / "cache")
    assert faces.names == ["fer0000007.png", "fer0000020.png"]        # unknown on top: left out
    assert faces.labels.tolist() == [0, 3]                            # a tie: the first class
    assert faces.votes.tolist() == [[6, 3, 0, 0, 0, 0, 0, 0], [0, 1, 0, 4, 4, 0, 0, 0]]
    assert faces[[1, 0]].float().mean((1, 2, 3)).tolist() == [20, 7]
    assert "2 faces of 3 images" in faces.notes[0]
    assert "1 rows without image, 1 repeated" in faces.notes[0]
    valid = load_faces("ferplus", tmp_path, "val", 48, partial=True, cache=tmp_path / "cache")
    assert valid.labels.tolist() == [7] and valid.images.shape == (1, 1, 48, 48)


def test_ferplus_from_kaggles_csv_is_joined_by_row(tmp_path):
    fake_ferplus(tmp_path, ROWS[:1] + ROWS[2:4])
    plain = load_faces("ferplus", tmp_path, "train", 48, partial=True, cache=tmp_path / "cache")
    for folder in tmp_path.glob("FER*/*.png"):
        folder.unlink()
    (tmp_path / "FER2013Train").rmdir()
    with open(tmp_path / "fer2013.csv", "w", newline="") as file:
        csv.writer(file).writerows([["emotion", "pixels", "Usage"]] + [
            [0, " ".join([str(v)] * 2304), "Training"] for v in (7, 9, 20)])
    kaggle = load_faces("ferplus", tmp_path, "train", 48, partial=True, cache=tmp_path / "cache")
    assert kaggle[[0, 1]].equal(plain[[0, 1]]) and kaggle.labels.equal(plain.labels)


@pytest.mark.parametrize("votes, argmax, majority", [
    ([5, 3, 1, 1, 0, 0, 0, 0, 0, 0], 0, 0),           # 5 of 5 + 3 once single votes are gone
    ([4, 4, 2, 0, 0, 0, 0, 0, 0, 0], 0, None),        # a tie: argmax takes the first
    ([3, 2, 2, 0, 0, 0, 0, 0, 3, 0], None, None),     # as many say unknown
    ([1, 0, 0, 0, 0, 0, 0, 0, 9, 0], None, None),     # unknown
    ([1, 1, 1, 1, 1, 1, 1, 1, 0, 0], 0, None),
    ([0, 0, 0, 0, 0, 0, 0, 2, 1, 1], 7, 7),           # nothing says that votes sum to ten
    ([0, 0, 0, 0, 0, 0, 0, 0, 0, 10], None, None)])
def test_voted_label(votes, argmax, majority):
    assert voted_label(votes, 8, "argmax") == argmax
    assert voted_label(votes, 8, "majority") == majority


@real
def test_the_argmax_convention_leaves_3521_of_the_3574_test_images():
    with open(REAL / "fer2013new.csv", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["Usage"] == "PrivateTest" and r["Image name"]]
    labels = [voted_label([int(r[k]) for k in KINDS], 8, "argmax") for r in rows]
    assert len(labels) == 3574 and sum(label is not None for label in labels) == 3521


@real
def test_the_real_ferplus(tmp_path):
    train = listing("ferplus", REAL, "train")
    valid = listing("ferplus", REAL, "val")
    assert len(train.sources) == len(train.names) and len(set(train.names)) == len(train.names)
    assert "of 28558 images" in train.notes[0] and "of 3579 images" in valid.notes[0]
    assert all(source.exists() for source in valid.sources)
    votes = np.array(train.votes)
    assert 2.2 < (votes >= 1).sum(1).mean() < 2.3 and 1.4 < (votes >= 2).sum(1).mean() < 1.6
    majority = listing("ferplus", REAL, "val", "majority")
    assert len(majority.names) < len(valid.names)
    image = valid.read(0, 48)
    assert image.shape == (1, 48, 48) and image.dtype == np.uint8 and image.std() > 5
    with pytest.raises(InputError, match="neither FER2013Test/ nor fer2013.csv"):
        listing("ferplus", REAL, "test")


def fake_raf(root, aligned=True, share=False):
    (root / "basic/EmoLabel").mkdir(parents=True)
    rows = [("train_00001", 5), ("train_00002", 1), ("test_0001", 7)]
    (root / "basic/EmoLabel/list_patition_label.txt").write_text("".join(
        f"{n}.jpg {l}\n" for n, l in rows))
    for n, l in rows:
        folder = root / "basic/Image" / ("aligned" if aligned else "original")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (100, 100), (l * 20, 0, 0)).save(folder / f"{n}{'_aligned' * aligned}.jpg")
        if not aligned:
            manual = root / "basic/Annotation/manual"
            manual.mkdir(parents=True, exist_ok=True)
            points = "".join(f"{x:.1f}\t{y:.1f}\n" for x, y in TEMPLATE * 100 / 112)
            (manual / f"{n}_manu_attri.txt").write_text(points + "0\n1\n2\n")
    if share:
        (root / "basic/EmoLabel/distribution.txt").write_text("".join(
            f"{n}.jpg 1 0 0 0 {8 if l == 5 else 0} 0 0.5\n" for n, l in rows))
    return root


@pytest.mark.parametrize("aligned", [True, False])
def test_raf(tmp_path, aligned):
    root = fake_raf(tmp_path, aligned)
    faces = load_faces("raf", root, "train", 32, partial=True, cache=tmp_path / "c")
    assert faces.labels.tolist() == [4, 0] and faces.votes is None
    assert DATA["raf"]["classes"][4] == "sadness" and DATA["raf"]["classes"][0] == "surprise"
    assert faces[[0]][0, 0].float().mean() == pytest.approx(100, abs=3)


def test_raf_reads_a_distribution_as_votes(tmp_path):
    found = listing("raf", fake_raf(tmp_path, share=True), "train", partial=True)
    assert found.votes == [[1, 0, 0, 0, 8, 0, 0.5], [1, 0, 0, 0, 0, 0, 0.5]]
    assert found.labels == [4, 0]


LANDMARKS = np.random.default_rng(0).uniform(20, 80, (68, 2))


def test_affectnet_from_csv_and_from_folders(tmp_path):
    text = ";".join(f"{v:.2f}" for v in LANDMARKS.flatten())
    labels = [3, 7, 9, 0]
    with open(tmp_path / "training.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["subDirectory_filePath", "face_x", "facial_landmarks", "expression"])
        for i, label in enumerate(labels):
            (tmp_path / "5").mkdir(exist_ok=True)
            Image.effect_noise((100, 100), 60).convert("RGB").save(tmp_path / f"5/{i}.png")
            rows.writerow([f"5/{i}.png", 0, text, label])
    eight = load_faces("affectnet8", tmp_path, "train", 32, cache=tmp_path / "c")
    seven = load_faces("affectnet7", tmp_path, "train", 32, cache=tmp_path / "c")
    assert eight.labels.tolist() == [3, 7, 0] and seven.labels.tolist() == [3, 0]
    assert DATA["affectnet8"]["classes"][3] == "surprise"
    other = tmp_path / "other/train_set"
    for folder in ("images", "annotations"):
        (other / folder).mkdir(parents=True)
    for i, label in enumerate(labels):
        (other / f"images/{i}.png").write_bytes((tmp_path / f"5/{i}.png").read_bytes())
        np.save(other / f"annotations/{i}_exp.npy", np.array(str(label)))
        np.save(other / f"annotations/{i}_lnd.npy", LANDMARKS.flatten().round(2))
    folders = load_faces("affectnet8", tmp_path / "other", "train", 32, cache=tmp_path / "c")
    assert folders.labels.equal(eight.labels) and folders[[0, 1, 2]].equal(eight[[0, 1, 2]])


def test_a_similarity_is_found_again_and_never_mirrors():
    angle, scale, shift = 0.3, 1.7, np.array([5.0, -2.0])
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = similarity(TEMPLATE, TEMPLATE @ (scale * rotation).T + shift)
    np.testing.assert_allclose(matrix, np.c_[scale * rotation, shift], atol=1e-6)
    mirrored = similarity(TEMPLATE, TEMPLATE * [-1, 1])
    assert np.linalg.det(mirrored[:, :2]) > 0


def test_alignment_puts_the_points_on_the_template():
    image = Image.new("L", (200, 200))
    points = TEMPLATE @ np.array([[0.9, 0.4], [-0.4, 0.9]]) + [60, 20]
    for x, y in points:
        image.paste(255, (round(x) - 2, round(y) - 2, round(x) + 3, round(y) + 3))
    aligned = np.asarray(align(image, points, 112))
    assert all(aligned[round(y) - 1:round(y) + 2, round(x) - 1:round(x) + 2].max() > 150
               for x, y in TEMPLATE)
    assert five_points(LANDMARKS)[0].tolist() == pytest.approx(LANDMARKS[36:42].mean(0).tolist())


def test_memory_map_is_kept_until_a_source_changes(tmp_path):
    fake_ferplus(tmp_path, ROWS)
    load = lambda: load_faces("ferplus", tmp_path, "val", 48, partial=True,
                              cache=tmp_path / "cache")
    load()
    files = set((tmp_path / "cache").iterdir())
    load()
    assert set((tmp_path / "cache").iterdir()) == files
    grey(tmp_path / "FER2013Valid/fer0000033.png", 90)
    os.utime(tmp_path / "FER2013Valid/fer0000033.png", (1, 1))
    assert load()[[0]].float().mean() == 90


def plain_batch(n=64):
    values = torch.rand(n, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    return (values * 255).to(torch.uint8)


def uniform_rows(n=64, value=None):
    u = torch.rand(n, 12, generator=torch.Generator().manual_seed(1))
    return u if value is None else torch.full_like(u, value)


def test_augmentation_without_change_is_preparation():
    u = uniform_rows(value=0.5)                                       # the middle of every range
    plain = augment(plain_batch(), u, 24, "toy", scale=1.0)
    torch.testing.assert_close(plain, prepare(plain_batch(), 24, "toy"), rtol=1e-4, atol=1e-4)
    u[:, 4] = 0.0                                                     # a flip and nothing else
    torch.testing.assert_close(augment(plain_batch(), u, 24, "toy", scale=1.0).flip(-1), plain,
                               rtol=1e-4, atol=1e-4)


def test_a_face_is_augmented_alike_however_the_batch_is_divided():
    images, u = plain_batch(), uniform_rows()
    settings = dict(scale=0.5, degrees=15.0, light=0.3, erase=0.5)
    whole = augment(images, u, 32, "toy", **settings)
    parts = [augment(images[i:i + 16], u[i:i + 16], 32, "toy", **settings)
             for i in range(0, 64, 16)]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert whole.shape == (64, 3, 32, 32) and whole.isfinite().all()


def test_erasing_happens_as_often_as_asked_and_grey_becomes_three_channels():
    white = torch.full((2000, 1, 24, 24), 255, dtype=torch.uint8)
    x = augment(white, uniform_rows(2000), 24, "ferplus", scale=1.0, erase=0.25)
    assert x.shape == (2000, 3, 24, 24) and x[:, 0].equal(x[:, 2])
    share = (x == 0).float().mean((1, 2, 3))
    assert (share > 0).float().mean() == pytest.approx(0.25, abs=0.04)
    assert 0.02 < share[share > 0].mean() < 0.33


def test_hold_out_is_stratified_and_disjoint():
    labels, names = torch.tensor([0] * 100 + [1] * 50), [str(i) for i in range(150)]
    faces = Faces("toy", "train", np.zeros((150, 3, 2, 2), np.uint8), labels, names)
    train, held = hold_out(faces, 0.1, seed=0)
    assert held.labels.bincount().tolist() == [10, 5] and len(train) == 135
    assert set(train.names).isdisjoint(held.names)
    assert [int(n) for n in held.names] == held.rows.tolist()


def test_the_toy_is_a_function_of_its_seed_and_confuses_as_people_do():
    samples = [toy_sample(0, "train", i) for i in range(600)]
    again = toy_sample(0, "train", 5)
    assert samples[5][0] == again[0] and samples[5][2].tolist() == again[2].tolist()
    votes, truth = np.array([s[2] for s in samples]), np.array([s[0] for s in samples])
    assert (votes.sum(1) == 10).all()
    wrong = (votes.argmax(1) != truth).mean()
    assert 0.05 < wrong < 0.25                                        # a vote is not the truth
    assert 2.0 < (votes > 0).sum(1).mean() < 3.0                      # about FERPlus's 2.24
    names = DATA["toy"]["classes"]

    def share(a, b):                             # the votes for b per face of a
        of_a = truth == names.index(a)
        return votes[of_a, names.index(b)].sum() / of_a.sum()
    assert share("fear", "surprise") > 2 * share("fear", "happiness")
    assert share("anger", "disgust") > 1.2 * share("anger", "surprise")
    assert PROTOTYPES.shape == (7, len(datasets.UNITS))


@pytest.mark.parametrize("mode, message", [
    ("CMYK", "colour mode CMYK"), ("I;16", "colour mode I;16")])
def test_image_modes_that_are_not_read(tmp_path, mode, message):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new(mode, (8, 8)).save(path)
    with pytest.raises(InputError, match=message):
        read_image(path, 3)


def test_broken_input_is_named(tmp_path):
    fake_ferplus(tmp_path, ROWS)
    load = lambda: load_faces("ferplus", tmp_path, "train", 48, partial=True,
                              cache=tmp_path / "cache")
    with pytest.raises(InputError,
                       match="5 faces for the train split, officially 28709.*--partial"):
        load_faces("ferplus", tmp_path, "train", 48, cache=tmp_path / "cache")
    file = tmp_path / "FER2013Train/fer0000020.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(InputError, match="fer0000020.png: not a readable image"):
        load()
    assert not list((tmp_path / "cache").glob("*.tmp"))
    file.unlink()
    with pytest.raises(InputError, match="fer0000020.png: no such image"):
        load()
    table = tmp_path / "fer2013new.csv"
    table.write_text(table.read_text().replace("6,3,0", "6,-3,0"))
    with pytest.raises(InputError,
                       match=r"fer2013new.csv, row 2: '-3' is not a whole number from 0"):
        load()
    table.write_text(table.read_text().replace("surprise", "astonishment"))
    with pytest.raises(InputError, match="no column 'surprise'"):
        load()
    with pytest.raises(InputError, match="(?s)there is no such folder.*FER2013Train/"):
        load_faces("ferplus", tmp_path / "nowhere", "train", 48)


def test_raf_is_judged_by_its_official_labels_even_with_a_distribution(tmp_path):
    fake_raf(tmp_path, share=True)
    assert listing("raf", tmp_path, "test", partial=True).labels == [6]     # the votes say surprise


def test_affectnet_without_a_class_or_without_images_is_one_error(tmp_path):
    (tmp_path / "val_set").mkdir()
    found = "(?s)neither validation.csv nor val_set/images/.*_lnd.npy"
    with pytest.raises(InputError, match=found):
        listing("affectnet8", tmp_path, "test")
    with open(tmp_path / "validation.csv", "w", newline="") as file:
        rows = [["subDirectory_filePath", "facial_landmarks", "expression"]]
        csv.writer(file).writerows(rows + [[f"{i}.jpg", "", i % 7] for i in range(3500)])
    assert len(listing("affectnet7", tmp_path, "test").names) == 3500
    found = "class contempt: 0 faces for the test split, officially 500"
    with pytest.raises(InputError, match=found):
        listing("affectnet8", tmp_path, "test")
