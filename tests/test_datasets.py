"""datasets.py: the layouts on disk, votes to labels, alignment, the toy."""
import csv
import importlib
import json
import os
import shutil
import time
from types import FunctionType

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps

import datasets
import evaluate
import pretrain
import train
from conftest import DECODER, ROOT, TINY, read_state
from datasets import (DATA, PROTOTYPES, TEMPLATE, Faces, InputError, align, five_points, hold_out,
                      list_toy, listing, load_faces, read_image, similarity, toy_sample,
                      voted_label)

REAL = next((folder for folder in (ROOT.parent / "shared/ferplus", ROOT / "data/ferplus")
             if (folder / "FER2013Train").is_dir()), None)
real = pytest.mark.skipif(REAL is None, reason="FERPlus's folders are not in data/ferplus")
KINDS = DATA["ferplus"]["classes"] + ["unknown", "NF"]
FOLDERS = dict(Training="FER2013Train", PublicTest="FER2013Valid", PrivateTest="FER2013Test")


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
            folder = FOLDERS[usage]
            grey(root / folder / name, int(name[3:10]))
    return root


def fake_kaggle(root):
    """Kaggle's fer2013.csv to ROWS, whose images are as bright as fake_ferplus's."""
    with open(root / "fer2013.csv", "w", newline="") as file:
        csv.writer(file).writerows([["emotion", "pixels", "Usage"]] + [
            [0, " ".join([str(v)] * 2304), row[0]] for v, row in zip((7, 8, 9, 1, 33, 20), ROWS)])


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
    fake_ferplus(tmp_path, ROWS)
    plain = load_faces("ferplus", tmp_path, "train", 48, partial=True, cache=tmp_path / "cache")
    shutil.rmtree(tmp_path / "FER2013Train")
    fake_kaggle(tmp_path)
    kaggle = load_faces("ferplus", tmp_path, "train", 48, partial=True, cache=tmp_path / "cache")
    assert kaggle[[0, 1]].equal(plain[[0, 1]]) and kaggle.labels.equal(plain.labels)
    assert kaggle.names == plain.names and kaggle.notes == plain.notes
    path = tmp_path / "fer2013.csv"                                  # a pixel is mended, read anew
    path.write_text(path.read_text().replace("7 7 7,", "7 7 8,"))
    mended = load_faces("ferplus", tmp_path, "train", 48, partial=True, cache=tmp_path / "cache")
    assert (mended[[0]] != plain[[0]]).nonzero().tolist() == [[0, 0, 47, 47]]


def test_a_cell_of_kaggles_csv_is_an_image_row_by_row():
    pixels = np.arange(2304) % 251
    image = datasets.kaggle_image(" ".join(map(str, pixels)), "row 2")
    assert np.array_equal(image, pixels.reshape(48, 48))


@pytest.mark.parametrize("votes, argmax, majority", [
    ([5, 3, 1, 1, 0, 0, 0, 0, 0, 0], 0, 0),           # 5 of 5 + 3 once single votes are gone
    ([4, 4, 2, 0, 0, 0, 0, 0, 0, 0], 0, None),        # a tie: argmax takes the first
    ([3, 2, 2, 0, 0, 0, 0, 0, 3, 0], None, None),     # as many say unknown
    ([1, 0, 0, 0, 0, 0, 0, 0, 9, 0], None, None),     # unknown
    ([1, 1, 1, 1, 1, 1, 1, 1, 0, 0], 0, None),
    ([5, 5, 0, 0, 0, 0, 0, 0, 0, 0], 0, None),        # a half is no majority
    ([0, 0, 0, 0, 0, 0, 0, 2, 1, 1], 7, 7),           # nothing says that votes sum to ten
    ([0, 1, 0, 0, 0, 0, 0, 0], 1, None),              # no columns but the classes
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
    if not (REAL / "FER2013Test").is_dir():
        with pytest.raises(InputError, match="neither FER2013Test/ nor fer2013.csv"):
            listing("ferplus", REAL, "test")


THREE = [("train_00001", 5), ("train_00002", 1), ("test_0001", 7)]


def fake_raf(root, aligned=True, share=False, rows=THREE):
    (root / "basic/EmoLabel").mkdir(parents=True)
    (root / "basic/EmoLabel/list_patition_label.txt").write_text("".join(
        f"{n}.jpg {l}\n" for n, l in rows))
    for n, l in rows:
        folder = root / "basic/Image" / ("aligned" if aligned else "original")
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (100, 100), (l * 20, 0, 0))
        if not aligned:                                # the face: the middle of a picture
            image = ImageOps.expand(image, 60, (0, 255, 0))
        image.save(folder / f"{n}{'_aligned' * aligned}.jpg", quality=95)
        if not aligned:
            manual = root / "basic/Annotation/manual"
            manual.mkdir(parents=True, exist_ok=True)
            points = "".join(f"{x:.1f}\t{y:.1f}\n" for x, y in TEMPLATE * 100 / 112 + 60)
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
    red, green, _ = faces[[0]][0].float()[:, 3:-3, 3:-3]
    assert red.mean() == pytest.approx(100, abs=3) and green.max() < 20   # the face and no frame


def test_raf_is_aligned_by_its_points_unless_told_otherwise(tmp_path):
    fake_raf(tmp_path, aligned=False)
    (tmp_path / "basic/Image/aligned").mkdir()
    for name in ("train_00001", "train_00002"):
        image = Image.new("RGB", (100, 100), (250, 250, 250))
        image.save(tmp_path / f"basic/Image/aligned/{name}_aligned.jpg")
    load = lambda how: load_faces("raf", tmp_path, "train", 32, partial=True, cache=tmp_path / "c",
                                  align_by=how)
    assert load("points")[[0]][0, 2].max() < 20 and "aligned by Annotation/manual" in \
        load("points").notes[0]
    assert load("given")[[0]].min() > 240
    assert "as aligned in Image/aligned" in load("given").notes[0]
    shutil.rmtree(tmp_path / "basic/Image/aligned")
    with pytest.raises(InputError, match="(?s)there is no Image/aligned, .*EmoLabel/list_patition"):
        load("given")


def test_raf_reads_a_distribution_as_votes(tmp_path):
    found = listing("raf", fake_raf(tmp_path, share=True), "train", partial=True)
    assert found.votes == [[1, 0, 0, 0, 8, 0, 0.5], [1, 0, 0, 0, 0, 0, 0.5]]
    assert found.labels == [4, 0] and "order" not in found.notes[0]
    table = tmp_path / "basic/EmoLabel/distribution.txt"
    table.write_text(table.read_text().replace(" 0 0 0 8 0 ", " 8 0 0 0 0 "))
    assert "txt (1 have none for their label: is the order right?), as aligned" in listing(
        "raf", tmp_path, "train", partial=True).notes[0]


def marks_at(corners):
    """AffectNet's 68 landmarks of a face with these eyes, nose tip and mouth corners (5, 2)."""
    marks = np.zeros((68, 2))
    for where, point in zip((slice(36, 42), slice(42, 48), 30, 48, 54), corners):
        marks[where] = point
    return marks


def fake_affectnet(table, rows):
    """A csv file of AffectNet, of rows (image, landmarks, label)."""
    with open(table, "w", newline="") as file:
        csv.writer(file).writerows([["subDirectory_filePath", "facial_landmarks", "expression"], *(
            [name, ";".join(map(str, marks.flatten())), label] for name, marks, label in rows)])


LANDMARKS = np.random.default_rng(0).uniform(20, 80, (68, 2))


def test_ferplus_as_cloned_has_its_folders_in_data(tmp_path):
    """Its folders hold a list, and no image until Kaggle's pixels have been unpacked."""
    (tmp_path / "plain").mkdir()
    fake_ferplus(tmp_path / "plain", ROWS)
    shutil.copytree(tmp_path / "plain", tmp_path / "cloned/data")
    (tmp_path / "cloned/data/fer2013new.csv").rename(tmp_path / "cloned/fer2013new.csv")
    read = lambda name: load_faces("ferplus", tmp_path / name, "train", 48, partial=True,
                                   cache=tmp_path / "cache")
    plain, cloned = read("plain"), read("cloned")
    assert cloned.names == plain.names and cloned[[0, 1]].equal(plain[[0, 1]])
    for image in (tmp_path / "cloned/data/FER2013Train").iterdir():
        image.unlink()
    (tmp_path / "cloned/data/FER2013Train/label.csv").write_text("")
    fake_kaggle(tmp_path / "cloned")
    assert read("cloned")[[0, 1]].equal(plain[[0, 1]])


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
    (other / "images/.hidden").touch()                                  # as macOS does
    read = lambda: load_faces("affectnet8", tmp_path / "other", "train", 32, cache=tmp_path / "c")
    folders = read()
    assert folders.labels.equal(eight.labels) and folders[[0, 1, 2]].equal(eight[[0, 1, 2]])
    np.save(other / "annotations/3_lnd.npy", LANDMARKS[::-1])            # behind the contempt
    again = read()
    assert again[[0, 1]].equal(folders[[0, 1]]) and not again[[2]].equal(folders[[2]])
    Image.effect_noise((100, 100), 90).convert("RGB").save(other / "images/0.png")
    changed = (read()[[0, 1, 2]] != again[[0, 1, 2]]).flatten(1).any(1)
    assert changed.tolist() == [True, False, False]


def test_affectnet_faces_are_aligned_by_their_own_landmarks(tmp_path):
    """A framed face of its own colour a row; the second row is no expression and is left out."""
    def read(shift):
        marks = marks_at(TEMPLATE * 100 / 112 + 60 + shift)
        fake_affectnet(tmp_path / "training.csv",
                       [(f"{i}.png", marks, label) for i, label in enumerate((3, 9, 0))])
        os.utime(tmp_path / "training.csv", (shift, shift))
        return load_faces("affectnet7", tmp_path, "train", 32, cache=tmp_path / "c")[[0, 1]].float()

    for i in range(3):
        face = Image.new("RGB", (100, 100), (80 * i, 0, 0))
        face.paste((80 * i, 0, 200), (0, 0, 100, 50))                # blue above
        ImageOps.expand(face, 60, (0, 255, 0)).save(tmp_path / f"{i}.png")
    red, green, blue = read(0)[..., 3:-3, 3:-3].unbind(1)
    assert red.mean((1, 2)).tolist() == pytest.approx([0, 160], abs=3) and green.max() < 20
    assert blue[:, :11].min() > 180 and blue[:, 15:].max() < 20
    assert read(40)[:, 1].mean() > 100                 # other landmarks: most of it is the frame


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
    marks = np.arange(136.0).reshape(68, 2)
    assert five_points(marks).tolist() == [
        [77, 78], [89, 90], [60, 61], [96, 97], [108, 109]]   # eyes 36-41, 42-47; 30; 48; 54


def test_alignment_is_least_squares_in_the_aligned_face():
    """Of points that no similarity brings onto the template: solved again as linear equations."""
    points = TEMPLATE * [0.7, 1] + np.random.default_rng(0).normal(0, 4, (5, 2)) + 20
    rows, goal = [], TEMPLATE.flatten()
    for x, y in points:                              # a x - b y + c, b x + a y + d
        rows += [[x, -y, 1, 0], [y, x, 0, 1]]
    a, b, c, d = np.linalg.lstsq(np.array(rows), goal, rcond=None)[0]
    ramp = np.tile(np.arange(160, dtype=np.float32), (160, 1))       # a pixel's value is its place
    for x_or_y, image in enumerate((ramp, ramp.T.copy())):
        aligned = np.asarray(align(Image.fromarray(image), points, 112))
        for u, v in ((20, 40), (56, 72), (90, 100)):
            x, y = np.linalg.solve([[a, -b], [b, a]], [u + 0.5 - c, v + 0.5 - d])
            assert aligned[v, u] == pytest.approx((x, y)[x_or_y] - 0.5, abs=0.1)   # bicubic's


def test_a_large_face_is_shrunk_without_aliasing():
    """Each pixel becomes the mean of the 8 x 8 that it stands for."""
    noise = np.random.default_rng(0).integers(0, 256, (896, 896)).astype(np.uint8)
    aligned = np.asarray(align(Image.fromarray(noise), TEMPLATE * 8, 112), float)
    assert abs(aligned - noise.reshape(112, 8, 112, 8).mean((1, 3))).max() < 2
    marked = np.zeros((896, 896), np.uint8)
    marked[400:416, 300:316] = 255                # centre (308, 408), an eighth of that: (38, 51)
    at = np.asarray(align(Image.fromarray(marked), TEMPLATE * 8, 112), float)
    y, x = np.unravel_index(at.argmax(), at.shape)
    assert abs(x + 0.5 - 38.5) <= 1 and abs(y + 0.5 - 51) <= 1


def test_points_that_are_one_are_an_error_and_a_wild_one_is_none():
    face = Image.new("RGB", (60, 60))
    with pytest.raises(ValueError, match="five times the same point"):
        align(face, np.full((5, 2), 7.0), 48)
    wild = TEMPLATE.copy()
    wild[0] = 1e13                                         # the face is a speck somewhere
    assert align(face, wild, 48).size == (48, 48)


def test_memory_map_is_kept_until_a_source_or_the_alignment_changes(tmp_path, monkeypatch):
    fake_ferplus(tmp_path, ROWS)
    load = lambda: load_faces("ferplus", tmp_path, "val", 48, partial=True,
                              cache=tmp_path / "cache")
    face = tmp_path / "FER2013Valid/fer0000033.png"
    load()
    files = set((tmp_path / "cache").iterdir())
    load()
    assert set((tmp_path / "cache").iterdir()) == files
    grey(face, 90)
    os.utime(face, (1, 1))
    assert load()[[0]].float().mean() == 90
    grey(face, 91)
    with open(face, "ab") as file:
        file.write(b" ")
    os.utime(face, (1, 1))
    assert load()[[0]].float().mean() == 91              # longer, of the same time
    kept = len(set((tmp_path / "cache").iterdir()))
    monkeypatch.setattr(datasets, "TEMPLATE", TEMPLATE + 1)
    load()
    assert len(set((tmp_path / "cache").iterdir())) == kept + 1
    other = lambda image, side: np.full((1, side, side), 7, np.uint8)      # as if it stood there
    monkeypatch.setattr(datasets, "to_array", FunctionType(other.__code__, vars(datasets)))
    assert load().images.max() == 7                      # other code
    monkeypatch.setitem(DATA["ferplus"], "channels", 3)
    with pytest.raises(ValueError, match="reshape"):     # read anew, and not as colour by mistake
        load()
    assert len(set((tmp_path / "cache").iterdir())) == kept + 2


OWN_READER = """
from datasets import number
from own_more import twice

def reader(names):
    def read(i, side):
        return [of_one(name) for name in names]
    return read

def of_one(name):
    return further(number(name, ""))

def further(value):
    return of_one(twice(value))

def idle():
    pass
"""
OWN_MORE = """
def twice(value):
    return 2 * of_one(value)

def of_one(value):
    return value
"""


def test_the_code_behind_a_reader_is_all_that_it_calls_in_its_folder(tmp_path, monkeypatch):
    """So a memory map is made again after a change of any of it, of your own reader's too."""
    (tmp_path / "own_reader.py").write_text(OWN_READER)
    (tmp_path / "own_more.py").write_text(OWN_MORE)
    monkeypatch.syspath_prepend(tmp_path)
    behind = datasets.code_behind(importlib.import_module("own_reader").reader([]))
    assert [line.strip() for line in behind.splitlines() if "def " in line] == [
        "def read(i, side):", "def of_one(name):", "def further(value):", "def twice(value):",
        "def of_one(value):"]


def test_a_data_set_of_your_own_is_not_read_as_another(tmp_path, monkeypatch):
    monkeypatch.setitem(DATA, "mine", DATA["affectnet7"])
    with pytest.raises(NotImplementedError, match="mine stands in DATA"):
        listing("mine", tmp_path, "train")


@pytest.mark.parametrize("flags, message", [
    (["--data", "raf", "--split", "val"], "raf has no val split; it has train, test"),
    (["--labels", "majority"], "--labels: has no effect unless data is ferplus; leave it out"),
    (["--data", "ferplus", "--align", "given"],
     "--align: has no effect unless data is raf; leave it out"),
    (["--out", "sheet"], "--out sheet: name a .png or .jpg file"),
    (["--out", "file/a/sheet.png"], "--out file/a/sheet.png: cannot be written (Not a directory)")])
def test_what_cannot_be_drawn_is_told_before_the_faces_are_read(flags, message, tmp_path,
                                                                monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets, "check", None)
    with pytest.raises(InputError) as error:
        datasets.main(flags)
    assert str(error.value) == message


@pytest.mark.parametrize("name", ["toy-train", "toy-statistics"])
def test_a_picture_that_cannot_be_written_is_an_error(name, tmp_path, monkeypatch):
    monkeypatch.setitem(DATA["toy"], "counts", dict(train=60))
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"runs/{name}.png").mkdir(parents=True)
    with pytest.raises(InputError, match=f"--out runs/{name}.png: cannot be written .Is a dir"):
        datasets.main([])


def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    fake_ferplus(tmp_path, ROWS)
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(InputError, match="memory map of ferplus cannot be written .*are needed"):
        load_faces("ferplus", tmp_path, "val", 48, partial=True, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("size", [0, 5, 60, 300])
def test_a_memory_map_that_was_cut_off_is_an_error(size, tmp_path):
    """As a power cut leaves it: empty, or ending in its header or among its pixels."""
    fake_ferplus(tmp_path, ROWS)
    read = lambda: load_faces("ferplus", tmp_path, "val", 48, partial=True, cache=tmp_path / "maps")
    read()
    path, = (tmp_path / "maps").iterdir()
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=f"{path}: not a whole memory map .*; delete it"):
        read()


def test_unreadable_faces_are_named_in_their_order(monkeypatch):
    """Several threads read, and the first face takes longest."""
    def read(i, side):
        time.sleep(0.2 * (i == 0))
        raise InputError(f"face {i}")

    found = datasets.Listing(list("abc"), [0] * 3, read)
    monkeypatch.setattr(datasets, "listing", lambda *_: found)
    monkeypatch.setitem(DATA["toy"], "counts", dict(train=3))
    assert datasets.check("toy", None)[1] == ["face 0", "face 1", "face 2"]


def test_a_data_set_on_disk_is_checked(tmp_path, capsys, monkeypatch):
    twice = ("Training", "fer0000021.png", ROWS[3][2])
    again = ("PublicTest", "fer0000034.png", [9, 1, 0, 0, 0, 0, 0, 0, 0, 0])
    fake_ferplus(tmp_path, ROWS + [twice, again])
    grey(tmp_path / "FER2013Train/fer0000021.png", 20)         # as fer0000020.png
    grey(tmp_path / "FER2013Valid/fer0000034.png", 7)          # as fer0000007.png of training
    (tmp_path / "FER2013Train/fer0000007.png").write_bytes(b"no image")
    flags = ["--data", "ferplus", "--data-dir", str(tmp_path), "--out", str(tmp_path / "sheet.png")]
    with pytest.raises(SystemExit) as stop:
        datasets.main(flags)
    assert (tmp_path / "sheet.png").exists() and (tmp_path / "ferplus-statistics.png").exists()
    text = capsys.readouterr().out
    assert stop.value.code == 1
    assert "train: 3 faces of 4 images" in text
    assert "  neutral 2  happiness 0  surprise 0  sadness 1" in text
    assert "2 faces read, 1 unreadable; 1 repeat another one's pixels\n" in text
    assert "val: 2 faces of 2 images" in text and "problems: 4\n" in text
    assert "fer2013new.csv: 6 faces for the train split, officially 28709" in text
    assert "fer0000007.png: not a readable image" in text and "no fer2013.csv" not in text
    assert "there is neither FER2013Test/ nor fer2013.csv. Expected" in text
    grey(tmp_path / "FER2013Train/fer0000007.png", 7)
    lines, problems, _ = datasets.check("ferplus", tmp_path)
    assert "1 also stand in train" in lines[-1] and len(problems) == 3
    with pytest.raises(SystemExit):
        datasets.main([*flags, "--partial"])
    text = capsys.readouterr().out                       # the counts are accepted, no test images
    assert "problems: 1\n" in text and "officially" not in text


def test_the_toy_passes_its_check_and_is_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(DATA["toy"], "counts", dict(train=60, val=10, test=20))
    monkeypatch.chdir(tmp_path)
    datasets.main(["--split", "val"])
    text = capsys.readouterr().out
    assert "test: 20 faces drawn" in text and "20 faces read, 0 unreadable; 0 repeat" in text
    assert "also stand in" not in text                     # the splits are other faces
    assert text.endswith("contact sheet: runs/toy-val.png\nstatistics: runs/toy-statistics.png\n"
                         "no problem\n")
    with Image.open(tmp_path / "runs/toy-val.png") as sheet:
        assert sheet.size == (8 * 196 + 16, 2 * 290 + 60)
    with Image.open(tmp_path / "runs/toy-statistics.png") as chart:
        assert chart.size == (2000, 200 + 62 * 7)
    with Image.open(tmp_path / "runs/toy-face.png") as face:
        assert np.array_equal(np.asarray(face).transpose(2, 0, 1), list_toy("val").read(0, 96))


def test_hold_out_is_stratified_and_disjoint():
    labels, names = torch.tensor([0] * 100 + [1] * 50 + [2] * 30), [str(i) for i in range(180)]
    faces = Faces("train", np.zeros((180, 3, 2, 2), np.uint8), labels, names)
    train, held = hold_out(faces, 0.1, seed=0)
    assert held.labels.bincount().tolist() == [10, 5, 3] and len(train) == 162
    assert set(train.names).isdisjoint(held.names)
    assert [int(n) for n in held.names] == held.rows.tolist()


def test_the_toy_is_a_function_of_its_seed_and_confuses_as_people_do():
    samples = [toy_sample("train", i) for i in range(600)]
    again = toy_sample("train", 5)
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
    assert PROTOTYPES.shape == (7, 12)


def test_the_toy_is_the_one_that_all_kept_results_are_of():
    found = {split: listing("toy", None, split) for split in ("train", "val", "test")}
    assert [np.sum(f.votes, axis=0).tolist() for f in found.values()] == [
        [3813, 2554, 3001, 2757, 2713, 2582, 2580], [991, 561, 662, 743, 759, 672, 612],
        [2010, 1337, 1353, 1178, 1520, 1373, 1229]]
    assert [f.notes[0].split()[-3] for f in found.values()] == ["325", "71", "143"]


def test_each_action_unit_of_the_toy_moves_its_own_part_of_the_face():
    """Where on average the pixels are that it changes: row, and distance from the middle column."""
    rows, columns = np.mgrid[:96, :96]
    drawn = lambda units: np.asarray(
        datasets.toy_face(units, np.random.default_rng(0), 96), float).sum(2)
    plain, places = drawn(np.zeros(12)), []
    for unit in np.eye(12):
        change = abs(drawn(unit) - plain)
        places.append([(change * v).sum() / change.sum() for v in (rows, abs(columns - 47.5))])
    brows, lids = [(30, 14), (30, 17), (34, 13)], [(41, 15), (41, 14)]
    nose, lip = (53, 5), (67, 5)
    smile_and_frown, stretched_pressed_open = [(51, 13), (71, 7)], [(71, 7), (70, 5), (76, 4)]
    expected = [*brows, *lids, nose, lip, *smile_and_frown, *stretched_pressed_open]
    assert abs(np.array(places) - expected).max() < 0.9
    corners = [(drawn(np.eye(12)[unit]) - plain)[58:, [*range(30, 38), *range(58, 66)]]
               for unit in (7, 8)]               # of the mouth, where both draw dark on the skin
    up, down = ((rows[58:, :16] * (c < -60)).sum() / (c < -60).sum() for c in corners)
    assert up < down - 5


def test_the_contact_sheet_has_each_label_at_its_face(said):
    """Ten faces, each brighter than the one before; the first could not be read."""
    found = datasets.Listing(list("abcdefghij"), [0] * 9 + [3],
                             lambda i, side: np.full((3, side, side), 20 * i, np.uint8))
    sheet = np.asarray(datasets.contact_sheet(found, "toy", range(1, 10)))
    shown = [sheet[100 + k // 8 * 290, 106 + k % 8 * 196, 0] for k in range(9)]
    assert shown == [20, 40, 60, 80, 100, 120, 140, 160, 180]
    assert [(at, text) for text, at, _ in said[:9:8]] == [((16, 192), "neutral"),
                                                          ((16, 482), "surprise")]


def test_the_statistics_count_every_class_with_a_vote(said):
    votes = [[9, 1, 0, 0, 0, 0, 0], [8, 2, 0, 0, 0, 0, 0], [0, 10, 0, 0, 0, 0, 0]]
    datasets.statistics("toy", {"train": datasets.Listing(list("abc"), [0, 0, 1], None, votes)})
    shares = [text for text, *_ in said if "%" in text]
    assert shares[:7] == ["33.3%", "66.7%", "0.0%", "0.0%", "0.0%", "0.0%", "0.0%"]
    assert shares[7:9] == ["85%", "15%"] and shares[14:16] == ["0%", "100%"]     # a row a label


@pytest.mark.parametrize("mode, message", [
    ("CMYK", "colour mode CMYK"), ("I;16", "colour mode I;16")])
def test_image_modes_that_are_not_read(tmp_path, mode, message):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new(mode, (8, 8)).save(path)
    with pytest.raises(InputError, match=message):
        read_image(path, 3)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")   # as datasets.py does
def test_a_photograph_of_a_hundred_megapixels_is_read(tmp_path):
    Image.new("1", (10_000, 10_000)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 1).size == (10_000, 10_000)


def test_a_phones_photograph_with_a_second_picture_is_its_first(tmp_path):
    first, second = Image.new("RGB", (8, 8), (200, 100, 50)), Image.new("RGB", (8, 8))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    first.save(tmp_path / "b.jpg")
    a, b = (np.asarray(read_image(tmp_path / f"{name}.jpg", 3), int) for name in "ab")
    assert np.abs(a - b).max() <= 2


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
    with pytest.raises(InputError, match="fer0000020.png: no such file"):
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


def test_a_ferplus_is_trained_and_judged_on_its_own_splits(tmp_path, capsys):
    fake_ferplus(tmp_path, [(usage, f"fer{shade:07}.png", [9 * (k == label) for k in range(10)])
                            for usage, shade, label in (
        ("Training", 40, 0), ("Training", 80, 3), ("PublicTest", 80, 3), ("PublicTest", 160, 0),
        ("PrivateTest", 200, 1))])
    train.main(["--data", "ferplus", "--data-dir", str(tmp_path), "--partial", "--scale", "laptop",
                *TINY, "--batch-size", "2", "--init", "none", "--cache", str(tmp_path / "cache"),
                "--out", str(tmp_path / "run")])
    capsys.readouterr()
    for split, faces, duplicates, name in (("val", 2, 1, "neutral"), ("test", 1, 0, "happiness")):
        evaluate.main([str(tmp_path / "run"), "--split", split, "--json"])
        found = json.loads(capsys.readouterr().out)
        assert (found["faces"], found["duplicates"]) == (faces, duplicates)   # 80 is in Training
        assert found["per_class"][name]["faces"] == 1


def test_official_classes_and_counts():
    assert DATA["raf"]["classes"] == "surprise fear disgust happiness sadness anger neutral".split()
    assert DATA["affectnet8"]["classes"] == ("neutral happiness sadness surprise fear disgust "
                                             "anger contempt").split()
    assert DATA["affectnet7"]["classes"] == DATA["affectnet8"]["classes"][:7]
    assert DATA["ferplus"]["classes"] == ("neutral happiness surprise sadness anger disgust fear "
                                          "contempt").split()
    counts = lambda data: tuple(DATA[data]["counts"].values())
    assert counts("raf") == (12_271, 3_068) and counts("ferplus") == (28_709, 3_589, 3_589)
    assert counts("affectnet7") == counts("affectnet8") == (None, 500)


def test_a_subset_of_a_subset_is_of_the_faces_that_it_names(cache):
    faces = load_faces("toy", None, "val", 16, cache=cache)
    twice = faces.subset(torch.tensor([3, 8, 20, 40])).subset(torch.tensor([3, 1]))
    assert twice.names == [faces.names[40], faces.names[8]]
    assert twice[[0, 1]].equal(faces[[40, 8]])


def test_every_face_of_the_memory_map_is_the_readers(cache):
    """They are read 256 at a time."""
    faces, found = load_faces("toy", None, "val", 16, cache=cache), list_toy("val")
    for i in (0, 255, 256, 499):
        assert np.array_equal(faces[[i]][0], found.read(i, 16))
    assert faces.truth.tolist() == found.truth and (faces.labels != faces.truth).sum() == 71


def test_shrinking_averages_and_does_not_pick():
    images = ((torch.arange(96) % 4 == 0) * 255).byte().expand(1, 1, 96, 96)   # one column of four
    inner = datasets.resize(images, 24)[..., 2:-2]
    torch.testing.assert_close(inner, torch.full_like(inner, 0.25), rtol=0, atol=0.05)
    stored = datasets.to_array(Image.fromarray(images[0, 0].numpy()), 24)[..., 2:-2] / 255.0
    assert abs(stored - 0.25).max() < 0.05


def test_the_majority_convention_reaches_the_faces(tmp_path):
    fake_ferplus(tmp_path, ROWS)
    faces = load_faces("ferplus", tmp_path, "train", 48, "majority", partial=True,
                       cache=tmp_path / "cache")
    assert faces.names == ["fer0000007.png"]                         # 4 of 8 are no majority
    told = "majority label of 2 is unknown or no face or there is none ("
    assert told in faces.notes[0]
    assert told in datasets.check("ferplus", tmp_path, "majority", partial=True)[0][0]


def test_ferplus_may_lie_in_data_and_its_table_may_have_been_saved_by_excel(tmp_path):
    (tmp_path / "data").mkdir()
    table = fake_ferplus(tmp_path / "data", ROWS) / "fer2013new.csv"
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())          # a byte-order mark
    assert len(listing("ferplus", tmp_path, "train", partial=True).names) == 2
    faces = load_faces("ferplus", tmp_path, "val", 224, partial=True, cache=tmp_path / "cache")
    assert faces.images.shape == (1, 1, 48, 48)                      # enlarged only in a batch


def test_raf_db_of_another_size_is_refused(tmp_path):
    with pytest.raises(InputError, match="2 faces for the train split, officially 12271"):
        listing("raf", fake_raf(tmp_path), "train")


def test_constants_that_others_have_measured():
    """MobileFaceNet's template in 112 x 112 pixels; the mean and deviation of ImageNet."""
    assert TEMPLATE.tolist() == [[38.29, 51.70], [73.53, 51.50], [56.03, 71.74], [41.55, 92.37],
                                 [70.73, 92.20]]
    theirs = torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1.transforms()
    assert (list(DATA["raf"]["mean"]), list(DATA["raf"]["std"])) == (theirs.mean, theirs.std)


def small_release(data, root):
    """Fourteen training and seven test faces in the layout of RAF-DB or AffectNet, with points."""
    faces = [(split, i, i % 7) for split, count in (("train", 14), ("test", 7))
             for i in range(count)]
    if data == "raf":
        fake_raf(root, aligned=False, rows=[(f"{split}_{i}", k + 1) for split, i, k in faces])
        return
    rows = {"train": [], "test": []}
    for split, i, k in faces:
        Image.new("RGB", (112, 112), (30 * k, 80, 9 * i)).save(root / f"{split}-{i}.png")
        rows[split].append((f"{split}-{i}.png", marks_at(TEMPLATE), k))
    fake_affectnet(root / "training.csv", rows["train"])
    fake_affectnet(root / "validation.csv", rows["test"])


@pytest.mark.parametrize("data", ["raf", "affectnet7"])
@pytest.mark.parametrize("method", ["ours", "rc-vit"])
def test_data_without_votes_go_through_both_stages_and_the_evaluation(data, method, tmp_path):
    small_release(data, tmp_path)
    flags = ["--data", data, "--data-dir", str(tmp_path), "--partial", "--cache",
             str(tmp_path / "c"), *TINY, "--batch-size", "14", "--workers", "0", "--out"]
    pretrain.main([*flags, str(tmp_path / "mim"), *DECODER])
    train.main([*flags, str(tmp_path / "run"), "--method", method, "--init", str(tmp_path / "mim"),
                *["--warmup-revision", "1"] * (method == "ours")])
    candidates = read_state(tmp_path / "run")["candidates"]               # of lw1
    assert candidates.shape == (14, 7) and candidates[range(14), [k % 7 for k in range(14)]].all()
    evaluate.main([str(tmp_path / "run")])
    found = json.loads((tmp_path / "run/test.json").read_text())
    assert found["faces"] == 7 and "vote_nll" in found and "inside_candidate_set" not in found
    assert (tmp_path / "run/pictures/reliability-test.png").is_file()
