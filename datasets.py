"""Faces and what the crowd said of them: the toy, FERPlus, RAF-DB, AffectNet-7 and -8, your own.

Paper: Sec. 4.1 (data) and 4.2 (size, alignment). Every data set becomes the same thing, `Faces`:
images as one uint8 array, and for each face the votes, the voted label and its name.

    symbol  name       shape          meaning
    n, K    len, classes              number of faces, number of expressions
    x       images     (n, C, S, S)   uint8, C = 1 or 3 channels, S = stored side in pixels
            votes      (n, K)         how many annotators chose each class; None where unknown
    y       labels     (n,)           the voted label, 0 .. K-1
            truth      (n,)           the class that was drawn; the toy alone knows it

Images are read, aligned and shrunk once, into a memory map that is rebuilt when a source changes.

Run:  python datasets.py --data toy                        (a check, and a contact sheet)
      python datasets.py --data ferplus --data-dir DIR
"""
import argparse
import csv
import errno
import hashlib
import inspect
import math
import os
import shutil
import sys
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import Dataset
from tqdm import tqdm

from hog import EIGHT_BIT
from pll import draw_matrix


class InputError(Exception):
    """Something the user gave is wrong; the message says what, where and what to do."""


def complaint(error):
    """The line for a wrong input, or for a path that cannot be used; None for other errors."""
    if isinstance(error, InputError):
        return f"error: {error}"
    if isinstance(error, OSError) and error.filename:
        return f"error: {error.filename}: {error.strerror}"
    return None


# Pillow refuses images of twice the pixels that it warns of.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
AFFECTNET = "neutral happiness sadness surprise fear disgust anger contempt".split()
FERPLUS = "neutral happiness surprise sadness anger disgust fear contempt".split()
RAF = "surprise fear disgust happiness sadness anger neutral".split()
_rgb = dict(channels=3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))   # ImageNet's
# data: class names in the official order; stored side in pixels, channels; official counts of each
# split (FERPlus: rows of its csv; AffectNet: of each class; None, as its training counts differ by
# release); mean and standard deviation of a channel, pixels in 0 .. 1. "own" is anybody's, whose
# classes `settle_classes` reads. Another layout needs an entry here (the keys of counts are its
# splits, None is unchecked), a tree in TREES and a reader with its branch in `listing`, which
# leaves out images without a label and names in `sources` each file that its images are made of.
DATA = {
    "toy": dict(_rgb, classes=AFFECTNET[:7], side=96, counts=dict(train=2000, val=500, test=1000)),
    "ferplus": dict(classes=FERPLUS, side=48, channels=1, mean=(0.508,) * 3, std=(0.255,) * 3,
                    counts=dict(train=28_709, val=3_589, test=3_589)),
    "raf": dict(_rgb, classes=RAF, side=224, counts=dict(train=12_271, test=3_068)),
    "affectnet7": dict(_rgb, classes=AFFECTNET[:7], side=224, counts=dict(train=None, test=500)),
    "affectnet8": dict(_rgb, classes=AFFECTNET, side=224, counts=dict(train=None, test=500)),
    "own": dict(_rgb, classes=None, side=224, counts=dict(train=None, test=None)),
}
TREES = {
    "ferplus": """
  DIR/ or DIR/data/, each for itself
    fer2013new.csv                   votes, from github.com/microsoft/FERPlus
    FER2013Train/fer0000000.png ...  and FER2013Valid/, FER2013Test/;
    or, instead of the images, Kaggle's fer2013.csv""",
    "raf": """
  DIR/basic/
    EmoLabel/list_patition_label.txt       rows like: train_00001.jpg 5
    EmoLabel/distribution.txt              (optional) name and 7 votes in label order, which is
      1 surprise, 2 fear, 3 disgust, 4 happiness, 5 sadness, 6 anger, 7 neutral
    Image/aligned/train_00001_aligned.jpg  or Image/original/train_00001.jpg with
    Annotation/manual/train_00001_manu_attri.txt""",
    "affectnet7": """
  DIR/training.csv, DIR/validation.csv and the images that they name; or
  DIR/train_set/ and DIR/val_set/, each with
    images/N.jpg  annotations/N_exp.npy  annotations/N_lnd.npy""",
    "own": """
  DIR/train.csv and DIR/test.csv with the same columns, and the images that they name:
    image,CLASS,CLASS,...            a path below DIR, then how many voted for each class""",
}
TREES["affectnet8"] = TREES["affectnet7"]


@dataclass
class Listing:
    """A split before its images are read: what is known of each face, and how to read it."""
    names: list
    labels: list
    read: Callable                          # (i, side) -> uint8 (C, side, side)
    votes: list = None
    truth: list = None
    sources: list = field(default_factory=list)   # files whose change makes the memory map stale
    notes: list = field(default_factory=list)     # what was kept and what was left out


@dataclass
class Faces(Dataset):
    """A split with its images; `faces[indices]` is a uint8 batch (B, C, S, S)."""
    split: str
    images: np.ndarray
    labels: torch.Tensor
    names: list
    votes: torch.Tensor = None
    truth: torch.Tensor = None
    notes: list = field(default_factory=list)
    rows: torch.Tensor = None                # which rows of `images`, if not all of them

    def __len__(self):
        return len(self.names)

    def __getitem__(self, indices):
        rows = torch.as_tensor(indices) if self.rows is None else self.rows[indices]
        return torch.from_numpy(self.images[rows.numpy()])

    def subset(self, chosen):
        """The faces with these indices (a tensor), on the same images."""
        pick = lambda values: None if values is None else values[chosen]
        rows = torch.arange(len(self)) if self.rows is None else self.rows
        return replace(self, labels=self.labels[chosen], names=[self.names[i] for i in chosen],
                       votes=pick(self.votes), truth=pick(self.truth), rows=rows[chosen])

    def __getstate__(self):                  # a worker process opens the memory map, not a copy
        return {**self.__dict__, "images": self.images.filename}

    def __setstate__(self, state):
        self.__dict__.update(state, images=np.load(state["images"], mmap_mode="r"))


# ---------------------------------------------------------------------------------------- images

def read_image(path, channels):
    """Read an image file as PIL "L" or "RGB"; InputError names the file that cannot be read."""
    try:
        with Image.open(path) as image:
            if image.mode not in EIGHT_BIT:
                raise InputError(f"{path}: colour mode {image.mode} is not read here; convert it "
                                 "to 8-bit grey or RGB")
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":   # a phone's photograph
                raise InputError(f"{path}: holds {image.n_frames} frames; extract one")
            return image.convert("L" if channels == 1 else "RGB")
    except FileNotFoundError:
        raise InputError(f"{path}: no such image") from None
    except Image.DecompressionBombError:
        most = 2 * Image.MAX_IMAGE_PIXELS
        raise InputError(f"{path}: more than {most} pixels; shrink it") from None
    except InputError:
        raise
    except Exception as error:                           # of damaged files Pillow says anything
        raise InputError(f"{path}: not a readable image ({error}); fetch it again") from None


def read_upright(path, channels):
    """`read_image`, turned as the camera was held. Not for points that are of the stored pixels."""
    image = read_image(path, channels)
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:                           # of damaged data Pillow says anything
        raise InputError(f"{path}: its EXIF data are damaged ({error}); save it without") from None


def to_array(image, side):
    """PIL image -> its middle square, uint8 (C, side, side), resized with a low-pass filter."""
    if image.size != (side, side):
        (width, height), short = image.size, min(image.size)
        left, top = (width - short) / 2, (height - short) / 2
        image = image.resize((side, side), Image.Resampling.BICUBIC, reducing_gap=3.0,
                             box=(left, top, left + short, top + short))
    array = np.asarray(image)                              # (side, side) or (side, side, 3)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


# Eyes, nose tip and mouth corners in a crop of 112 x 112 pixels, as MobileFaceNet is aligned.
TEMPLATE = np.array([[38.29, 51.70], [73.53, 51.50], [56.03, 71.74],
                     [41.55, 92.37], [70.73, 92.20]])


def similarity(source, target):
    """Least-squares similarity transform (Umeyama 1991): (P, 2), (P, 2) -> (2, 3) with
    target = M[:, :2] @ source + M[:, 2]; rotation, one scale and a shift, no mirror."""
    a, b = source - source.mean(0), target - target.mean(0)
    u, s, vt = np.linalg.svd(b.T @ a / len(a))
    sign = np.array([1.0, np.sign(np.linalg.det(u @ vt))])          # (2,)
    rotation = u @ np.diag(sign) @ vt                               # (2, 2)
    scale = (s * sign).sum() / a.var(0).sum()
    return np.c_[scale * rotation, target.mean(0) - scale * rotation @ source.mean(0)]


def align(image, points, side):
    """Warp a face so that its five points (5, 2) meet the template (Sec. 4.2): PIL -> PIL.

    The result has side x side pixels, in which the squared distances to the template are least. A
    much larger face is first shrunk by a whole factor: bicubic sampling alone would alias. Raises
    ValueError if the points are all the same or not finite.
    """
    if not np.isfinite(points).all():
        raise ValueError("not finite")
    if (points == points[0]).all() or points.var(axis=0).sum() == 0:
        raise ValueError("five times the same point")
    forward = similarity(points, TEMPLATE * side / 112)             # input pixel -> output pixel
    matrix = np.linalg.inv(np.vstack([forward, [0, 0, 1]]))[:2]     # output pixel -> input pixel
    shrink = int(min(max(np.sqrt(np.linalg.det(matrix[:, :2])) + 1e-6, 1), max(image.size)))
    image, matrix = image.reduce(shrink), matrix / shrink
    return image.transform((side, side), Image.Transform.AFFINE, matrix.flatten(),
                           Image.Resampling.BICUBIC)


def five_points(landmarks):
    """AffectNet's 68 landmarks (68, 2) -> eye centres, nose tip, mouth corners (5, 2); Sec. 4.2."""
    return np.stack([landmarks[36:42].mean(0), landmarks[42:48].mean(0), landmarks[30],
                     landmarks[48], landmarks[54]])


# ---------------------------------------------------------------------------------------- readers

MOST = 1e9                                               # no honest count of votes is above it


def number(text, where, low=0, high=MOST, whole=True):
    """Parse a number in low .. high, or say which row is wrong."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not low <= value <= high or (whole and not value.is_integer()):
        kind = "a whole number" if whole else "a number"
        limits = f"from {low}" + ("" if high == MOST else f" to {high}")
        raise InputError(f"{where}: {text!r} is not {kind} {limits}; correct the row")
    return int(value) if whole else value


def read_csv(path, columns):
    """Rows of a csv file as (row number, dict); InputError if a column is missing."""
    line, rows = 0, []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            for c in columns:
                found = (reader.fieldnames or []).count(c)
                if found != 1:
                    raise InputError(f"{path}: {'two columns' if found else 'no column'} {c!r}; "
                                     f"expected {', '.join(columns)}")
            line = 1
            for line, row in enumerate(reader, 2):
                rows.append((line, row))
            return rows
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8; save it as UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{path}, row {line + 1}: not readable ({error}); is a quotation mark "
                         "left open?") from None
    except OSError as error:
        raise InputError(f"{path}: not a readable csv file ({error})") from None


def read_rows(path):
    """Lines of a text file split at blanks, as (where, list of words); empty lines are left out."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: not a readable file ({error})") from None
    return [(f"{path}, row {i}", line.split()) for i, line in enumerate(lines, 1) if line.strip()]


def inside(root, name, where):
    """The path of `name` below `root`; InputError for none, or one that leaves the data folder."""
    if not name:
        raise InputError(f"{where}: no image is named; correct the row")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"{where}: {name!r} leaves the data folder; correct the row")
    return root / name


def once(name, known, where):
    """InputError for the name of a row that stands among those of the rows before."""
    if name in known:
        raise InputError(f"{where}: {name} is listed twice; remove one row")


def votes_of(root, name, row, columns, where):
    """The votes of an image's row in these columns; one at least, and the image below `root`."""
    inside(root, name, where)
    votes = [number(row[k], where) for k in columns]
    if not any(votes):
        raise InputError(f"{where}: {name} has no votes; remove the row")
    return votes


def layout_error(data, data_dir, found):
    """The error for a missing or wrong layout, with the expected tree drawn."""
    return InputError(f"{data_dir}: {found}. Expected for --data {data}:{TREES[data]}")


def voted_label(votes, classes, convention):
    """The crowd's label (Fig. 1: "voting") of a face.

    votes: a column for each of the `classes` labels, then, if there are any, unknown and no face.
    None if there is no such label. "argmax": the most voted class, the first of several; None if
    another column (unknown, no face) has as many votes. "majority" (FER+): columns with a single
    vote are set to 0, and the top must then have more than half of what is left.
    """
    votes = np.asarray(votes)
    if convention == "majority":
        votes = np.where(votes > 1, votes, 0)
        if votes.max() <= votes.sum() / 2:
            return None
    top = int(votes[:classes].argmax())
    return top if votes[top] > max(votes[classes:], default=0) else None


def kaggle_rows(pixels, table, rows):
    """Rows of Kaggle's fer2013.csv, after checking that they are those of FERPlus's table."""
    images = [r for _, r in read_csv(pixels, ["pixels", "Usage"])]
    if len(images) != len(rows):
        raise InputError(f"{pixels}: {len(images)} rows, but {table} has {len(rows)}; they are "
                         "joined by row, so both must be complete")
    for (line, row), other in zip(rows, images):
        if row["Usage"] != other["Usage"]:
            raise InputError(f"{pixels}, row {line}: Usage {other['Usage']}, but {row['Usage']} in "
                             f"{table.name}; the two files must have one order")
    return images


def kaggle_image(text, where):
    """48 x 48 numbers in a cell of fer2013.csv -> PIL "L"."""
    try:
        values = bytes(map(int, (text or "").split()))               # ValueError outside 0 .. 255
        return Image.fromarray(np.frombuffer(values, np.uint8).reshape(48, 48))
    except ValueError:
        raise InputError(f"{where}: not 48 x 48 numbers from 0 to 255") from None


def list_ferplus(root, split, convention, partial):
    """FERPlus from its folders, or from Kaggle's fer2013.csv; votes from fer2013new.csv."""
    usages = {"train": "Training", "val": "PublicTest", "test": "PrivateTest"}
    subset = {"train": "FER2013Train", "val": "FER2013Valid", "test": "FER2013Test"}[split]
    places = root, root / "data"     # the authors' repository has its table in DIR, folders in data
    find = lambda pattern: next((path for place in places for path in place.glob(pattern)), None)
    table, pixels, folder = find("fer2013new.csv"), find("fer2013.csv"), find(subset)
    if not table:
        raise layout_error("ferplus", root, "there is no fer2013new.csv")
    if not folder and not pixels:
        raise layout_error("ferplus", root, f"there is neither {subset}/ nor fer2013.csv")
    if pixels and not find(f"{subset}/*.png"):   # as cloned, the folders hold no image
        folder = None
    kinds = DATA["ferplus"]["classes"] + ["unknown", "NF"]
    rows = read_csv(table, ["Usage", "Image name"] + kinds)
    for line, row in rows:
        if row["Usage"] not in usages.values():
            raise InputError(f"{table}, row {line}: Usage {row['Usage']!r} is none of "
                             f"{', '.join(usages.values())}; correct the row")
        if not row["Image name"] and any(row[k] not in ("0", None) for k in kinds[:-1]):
            raise InputError(f"{table}, row {line}: votes for a face, but no image is named; "
                             "correct the row")
    mine = [(line, row, row["Image name"]) for line, row in rows if row["Usage"] == usages[split]]
    check_count("ferplus", split, len(mine), partial, table)
    images = None if folder else kaggle_rows(pixels, table, rows)
    named = [each for each in mine if each[2]]
    line_of = {name: line for line, _, name in named}    # a later row of a name replaces
    votes = {name: votes_of(root, name, row, kinds, f"{table}, row {line}")
             for line, row, name in named}
    labels = {name: voted_label(v, 8, convention) for name, v in votes.items()}
    names = [name for name in votes if labels[name] is not None]

    def read(i, side):
        if images is None:
            return to_array(read_image(folder / names[i], 1), side)
        line = line_of[names[i]]
        return to_array(kaggle_image(images[line - 2]["pixels"], f"{pixels}, row {line}"), side)

    none = " or there is none" * (convention == "majority")
    notes = [f"{len(names)} faces of {len(votes)} images; the {convention} label of "
             f"{len(votes) - len(names)} is unknown or no face{none} "
             f"({len(mine) - len(named)} rows without image, {len(named) - len(votes)} repeated)"]
    return Listing(names, [labels[n] for n in names], read, [votes[n][:8] for n in names],
                   sources=[folder / n for n in names] if images is None else [pixels, table],
                   notes=notes)


def raf_labels(table, split):
    """Name -> label of a split, in the order of RAF-DB's list."""
    labels = {}
    for where, parts in read_rows(table):
        if len(parts) != 2:
            raise InputError(f"{where}: {' '.join(parts)!r} is not a name and a class number; "
                             "correct the row")
        name = parts[0]
        inside(table, name, where)
        once(name, labels, where)
        if not name.startswith(("train_", "test_")):
            raise InputError(f"{where}: {name!r} begins with neither train_ nor test_; rename the "
                             "file and correct the row")
        if name.startswith(split + "_"):
            labels[name] = number(parts[1], where, 1, 7) - 1
    return labels


def list_raf(root, split, align_by, partial):
    """RAF-DB basic: the originals aligned by the five manual points, or its own aligned images."""
    root = root / "basic" if (root / "basic").is_dir() else root
    table, share = root / "EmoLabel/list_patition_label.txt", root / "EmoLabel/distribution.txt"
    aligned, original = root / "Image/aligned", root / "Image/original"
    if not table.exists():
        raise layout_error("raf", root, "there is no EmoLabel/list_patition_label.txt")
    points = root / "Annotation/manual"
    given = align_by == "given" or not (original.is_dir() and points.is_dir())
    if given and not aligned.is_dir():
        raise layout_error("raf", root, "there is no Image/aligned, and no Image/original with "
                           "Annotation/manual")
    labels = raf_labels(table, split)
    check_count("raf", split, len(labels), partial, table)
    names, votes = list(labels), None
    if share.exists():
        found = {}
        for where, (name, *cells) in read_rows(share):
            once(name, found, where)
            found[name] = [number(v, where, whole=False) for v in cells]
        missing = [n for n in names if len(found.get(n, ())) != 7 or sum(found[n]) == 0]
        if missing:
            raise InputError(f"{share}: no 7 votes for {missing[0]}; complete the file or remove "
                             "it")
        votes = [found[n] for n in names]
    files = [aligned / n.replace(".jpg", "_aligned.jpg") if given else original / n for n in names]
    marks = [points / n.replace(".jpg", "_manu_attri.txt") for n in names]

    def read(i, side):
        image = read_image(files[i], 3)
        if not given:
            try:
                rows = [row.split()[:2] for row in marks[i].read_text().splitlines()[:5]]
                image = align(image, np.array(rows, float).reshape(5, 2), side)
            except (OSError, ValueError) as error:
                raise InputError(f"{marks[i]}: not five rows of x and y ({error})") from None
        return to_array(image, side)

    against = sum(not found[n][labels[n]] for n in names) if votes else 0
    notes = [f"{len(names)} faces, " + ("votes from distribution.txt" if votes else
             "no votes: candidate sets will be generated")
             + f" ({against} have none for their label: is the order right?)" * (against > 0)
             + (", as aligned in Image/aligned" if given else ", aligned by Annotation/manual")]
    return Listing(names, [labels[n] for n in names], read, votes, notes=notes,
                   sources=files if given else files + marks)


def list_affectnet(data, root, split, partial):
    """AffectNet from its two csv files or from train_set/ and val_set/; aligned by landmarks."""
    classes = len(DATA[data]["classes"])
    table = root / {"train": "training.csv", "test": "validation.csv"}[split]
    folder = root / {"train": "train_set", "test": "val_set"}[split]
    rows, seen = [], set()                       # (image, label, landmarks' place, their text)
    if table.exists():
        columns = ["subDirectory_filePath", "facial_landmarks", "expression"]
        for line, row in read_csv(table, columns):
            where, name = f"{table}, row {line}", row["subDirectory_filePath"]
            label = number(row["expression"], where, 0, 10)
            once(name, seen, where)
            seen.add(name)
            rows.append((inside(root, name, where), label, where, row["facial_landmarks"] or ""))
    elif (folder / "images").is_dir():
        files = (folder / "images").glob("[!.]*")        # macOS adds hidden ones
        for file in sorted(files, key=lambda f: (len(f.name), f.name)):
            note = folder / "annotations" / file.stem
            try:
                label = np.load(f"{note}_exp.npy", allow_pickle=False).item()
            except Exception as error:                   # of damaged files numpy says anything
                raise InputError(f"{note}_exp.npy: not a class number ({error})") from None
            rows.append((file, number(label, f"{note}_exp.npy", 0, 10), f"{note}_lnd.npy", None))
    else:
        raise layout_error(data, root, f"there is neither {table.name} nor {folder.name}/images/")
    kept = [r for r in rows if r[1] < classes]
    counts = Counter(r[1] for r in kept)
    for c, name in enumerate(DATA[data]["classes"]):
        check_count(data, split, counts[c], partial, f"{root}, class {name}")

    def read(i, side):
        file, _, where, text = kept[i]
        image = read_image(file, 3)
        try:
            values = np.load(where, allow_pickle=False) if text is None else \
                np.array(text.replace(";", " ").split())
            landmarks = values.astype(float).reshape(68, 2)
            return to_array(align(image, five_points(landmarks), side), side)
        except Exception as error:
            raise InputError(f"{where}: not 68 landmarks ({error})") from None

    notes = [f"{len(kept)} faces of {len(rows)} images; {len(rows) - len(kept)} are of other "
             "classes (none, uncertain, no face" + (", contempt)" if classes == 7 else ")"),
             "no votes: candidate sets will be generated"]
    names = [str(r[0].relative_to(root)) for r in kept]
    marks = [table] if table.exists() else [r[2] for r in kept]
    return Listing(names, [r[1] for r in kept], read, sources=[r[0] for r in kept] + marks,
                   notes=notes)


def settle_classes(flags):
    """Read the classes of `--data own`, into DATA and, in place, into the flags.

    They are the columns of its train.csv but "image", in their order. Other data sets' are known.
    """
    if flags["data"] != "own":
        return
    root = Path(flags["data_dir"] or "data/own")
    table = root / "train.csv"
    if not table.is_file():
        raise layout_error("own", root, "there is no train.csv (--data-dir)")
    read_csv(table, ["image"])                           # names what is wrong with the file
    with open(table, newline="", encoding="utf-8-sig") as file:
        header = next(csv.reader(file))
    header.remove("image")
    if len(header) < 2 or len(set(header) - {""}) < len(header):
        raise InputError(f"{table}: the first row must be image and two class names or more, each "
                         "once")
    flags["classes"] = DATA["own"]["classes"] = header


def list_own(root, split):
    """Anybody's faces with votes: a csv file for each split; the middle square of each image."""
    table, classes = root / f"{split}.csv", DATA["own"]["classes"]
    if not table.is_file():
        raise layout_error("own", root, f"there is no {table.name}")
    votes = {}
    for line, row in read_csv(table, ["image", *classes]):
        where, name = f"{table}, row {line}", row["image"]
        if row.keys() - {"image", *classes}:
            raise InputError(f"{where}: more columns than train.csv's image, {', '.join(classes)}; "
                             "remove them")
        once(name, votes, where)
        votes[name] = votes_of(root, name, row, classes, where)
    names = list(votes)
    labels = [voted_label(v, len(classes), "argmax") for v in votes.values()]
    read = lambda i, side: to_array(read_upright(root / names[i], 3), side)
    return Listing(names, labels, read, list(votes.values()), sources=[root / n for n in names],
                   notes=[f"{len(names)} faces of {len(classes)} classes, as {table} says"])


def check_count(data, split, found, partial, where):
    """InputError, which names --partial, unless a split has its official size (Sec. 4.1)."""
    official = DATA[data]["counts"][split]
    if official is not None and found != official and not partial:
        raise InputError(f"{where}: {found} faces for the {split} split, officially {official}; "
                         "complete the data set, or say --partial to use it as it is")


# ---------------------------------------------------------------------------------------- the toy

# Facial action units (Ekman and Friesen): which each expression uses, and how strongly. Fear shares
# the raised brows, wide eyes and open mouth of surprise; disgust the lowered brows of anger. The
# units: 1 inner, 2 outer brow up, 4 brow lowered, 5 upper lid up, 7 lids tight, 9 nose wrinkled, 10
# upper lip up, 12 corners up, 15 down, 20 lips stretched, 23 tightened, 26 jaw dropped.
PROTOTYPES = np.array([
    #  1    2    4    5    7    9   10   12   15   20   23   26      numbers of the action units
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],  # neutral
    [0.0, 0.0, 0.0, 0.0, 0.5, 0.0, 0.2, 1.0, 0.0, 0.0, 0.0, 0.4],  # happiness
    [1.0, 0.0, 0.4, 0.0, 0.3, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0],  # sadness
    [0.9, 1.0, 0.0, 0.9, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0],  # surprise
    [1.0, 0.7, 0.5, 1.0, 0.0, 0.0, 0.0, 0.0, 0.2, 1.0, 0.0, 0.5],  # fear
    [0.0, 0.0, 0.7, 0.0, 0.6, 1.0, 1.0, 0.0, 0.4, 0.0, 0.0, 0.1],  # disgust
    [0.0, 0.0, 1.0, 0.4, 0.5, 0.3, 0.0, 0.0, 0.3, 0.0, 1.0, 0.0],  # anger
])


def toy_sample(split, i):
    """Toy face i: class, action units (12,) in 0 .. 1, votes (7,), and the generator to draw it.

    A face is its class at some intensity, often blended with a second, similar one. Each of ten
    annotators perceives the units with noise of their own and names the nearest expression.
    """
    rng = np.random.default_rng([0, ("train", "val", "test").index(split), i])
    truth = rng.integers(7)
    likeness = np.exp(-((PROTOTYPES - PROTOTYPES[truth]) ** 2).sum(1) / 1.5)   # (7,)
    likeness[truth] = 0
    other = rng.choice(7, p=likeness / likeness.sum())
    blend = rng.uniform(0.0, 0.6) if rng.random() < 0.6 else 0.0
    units = rng.uniform(0.45, 1.0) * ((1 - blend) * PROTOTYPES[truth] + blend * PROTOTYPES[other])
    units = np.clip(units + rng.normal(0, 0.05, 12), 0, 1)
    seen = units + rng.normal(0, 0.30, (10, 12))                            # (10, 12)
    distance = ((seen[:, None] - 0.75 * PROTOTYPES) ** 2).sum(-1)           # (10, 7)
    return int(truth), units, np.bincount(distance.argmin(1), minlength=7), rng


def toy_pens(image, rng):
    """Two ways to draw in face coordinates (0 .. 1, y downwards), under one random pose."""
    big, draw, uniform = image.width, ImageDraw.Draw(image), rng.uniform
    turn, tilt, zoom = uniform(-0.03, 0.03), math.radians(uniform(-5, 5)), uniform(0.95, 1.02)
    rotation = [[math.cos(tilt), math.sin(tilt)], [-math.sin(tilt), math.cos(tilt)]]
    shift = uniform(-0.015, 0.015, 2)

    def place(points):
        p = (np.asarray(points, float) - 0.5) * zoom
        p[:, 0] += turn * np.cos(p[:, 1] * 2)
        return [tuple(v) for v in (p @ rotation + 0.5 + shift) * big]

    def area(points, fill):
        draw.polygon(place(points), fill=fill)

    def stroke(points, width, fill):
        draw.line(place(points), fill=fill, width=max(1, round(width * big)), joint="curve")

    return area, stroke


def oval(x, y, rx, ry):
    """Points of an ellipse around (x, y)."""
    a = np.linspace(0, 2 * np.pi, 40)
    return np.c_[x + rx * np.cos(a), y + ry * np.sin(a)]


def toy_upper_face(units, area, stroke, hair, dark, gap, thick):
    """Eyes, lids, brows, nose and folds of both sides; lengths are shares of the picture."""
    inner, outer, lower, lid, tight, wrinkle, lip, smile = units[:8]
    t, y, half = np.linspace(-1, 1, 15), 0.45, 0.075
    opening = 0.030 * (1 + 0.9 * lid - 0.6 * tight - 0.25 * smile)
    for s in (-1, 1):
        x = 0.5 + s * gap
        area(oval(x, y, half, opening), (245, 245, 240))
        area(oval(x, y, min(0.030, opening * 1.05), min(0.030, opening * 1.05)), (40, 30, 25))
        arc = np.c_[x + half * t, y - opening * np.sqrt(1 - t ** 2)]
        stroke(arc, 0.010, (30, 20, 20))
        stroke(np.c_[arc[:, 0], 2 * y - arc[:, 1] + 0.012 * tight], 0.006 + 0.006 * tight, dark)
        start = np.array([0.5 + s * (0.072 - 0.022 * lower), 0.362 - 0.055 * (inner - lower)])
        end = np.array([0.5 + s * 0.245, 0.365 - 0.060 * outer - 0.012 * lower * (1 - outer)])
        stroke([start, (start + end) / 2 - [0, 0.025 * (1 - lower)], end], thick, hair)
        wing = 0.02 * wrinkle
        stroke([(0.5 + s * 0.022, 0.48), (0.5 + s * 0.045, 0.60 - wing),
                (0.5 + s * 0.015, 0.615 - wing)], 0.010 + 0.004 * wrinkle, dark)
        for k in range(3) if wrinkle > 0.3 else ():
            stroke([(0.5, 0.44 + 0.025 * k), (0.5 + s * 0.04, 0.425 + 0.025 * k)],
                   0.009 * wrinkle, dark)
        fold = max(smile, wrinkle, lip)
        if fold > 0.25:
            stroke([(0.5 + s * 0.065, 0.60), (0.5 + s * (0.12 + 0.05 * smile), 0.70)],
                   0.011 * fold, dark)
        if lower > 0.4:
            stroke([(0.5 + s * 0.018, 0.36), (0.5 + s * 0.014, 0.405)], 0.008 * lower, dark)


def toy_mouth(units, area, lips):
    """Lips, the open mouth and the upper teeth."""
    lip, smile, frown, stretch, press, jaw = units[6:]
    t = np.linspace(-1, 1, 15)
    half = 0.115 * (1 + 0.40 * smile + 0.45 * stretch - 0.25 * press - 0.25 * jaw * (1 - stretch))
    line = 0.745 + (0.065 * frown - 0.075 * smile) * t ** 2 - 0.02 * lip * (1 - abs(t))
    bow = np.sqrt(1 - t ** 2) if stretch < 0.5 else 1 - t ** 8     # stretched lips: a square mouth
    upper = line - (0.004 + 0.040 * lip) * bow
    under = line + (0.004 + 0.130 * jaw + 0.02 * stretch) * bow
    plump, x = 0.020 * (1 - 0.7 * press) * (1 - t ** 2), 0.5 + half * t
    between = lambda a, b: np.r_[np.c_[x, a], np.c_[x, b][::-1]]   # outline from curve a to curve b
    area(between(upper - plump, under + plump), lips)
    area(between(upper, under), (60, 15, 20))
    if max(smile * jaw * 2, lip, stretch) > 0.35:
        area(between(upper, upper + np.minimum(under - upper, 0.035))[2:-2], (238, 238, 230))


def toy_face(units, rng, side):
    """Draw a face with these action units and a random identity, pose and light: PIL RGB."""
    uniform = rng.uniform
    skin = np.array([[241, 206, 180], [224, 172, 136], [186, 128, 92], [122, 80, 56]])
    skin = np.clip(skin[rng.integers(4)] * uniform(0.92, 1.08) + rng.normal(0, 3, 3), 40, 250)
    colour = lambda rgb: tuple(int(v) for v in rgb)
    hair, back = colour(rng.integers(15, 110) * np.array([1.0, 0.8, 0.6])), rng.integers(60, 220, 3)
    image = Image.new("RGB", (3 * side, 3 * side), colour(back))
    area, stroke = toy_pens(image, rng)
    wide = uniform(0.31, 0.36)
    area(oval(0.5, 0.42, wide + 0.05, 0.42), hair)
    area(oval(0.5, 0.54, wide, 0.41), colour(skin))
    toy_upper_face(units, area, stroke, hair, colour(skin * 0.55), uniform(0.145, 0.17),
                   uniform(0.022, 0.034))
    toy_mouth(units, area, colour(skin * [0.80, 0.50, 0.50]))
    pixels = np.asarray(image.resize((side, side), Image.Resampling.BOX), np.float32)
    across, down = np.meshgrid(np.linspace(-1, 1, side), np.linspace(-1, 1, side))
    light = uniform(0.75, 1.1) + uniform(-0.25, 0.25) * across + uniform(-0.15, 0.15) * down
    pixels = pixels * light[..., None] + rng.normal(0, 5, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def list_toy(split):
    """The toy: drawn faces, with ten simulated annotators; as many as DATA says."""
    samples = [toy_sample(split, i) for i in range(DATA["toy"]["counts"][split])]
    truth, _, votes, _ = zip(*samples)
    labels = [voted_label(v, 7, "argmax") for v in votes]

    def read(i, side):
        _, units, _, rng = toy_sample(split, i)
        return to_array(toy_face(units, rng, side), side)

    wrong = sum(label != drawn for label, drawn in zip(labels, truth))
    notes = [f"{len(samples)} faces drawn; the crowd's argmax label is not what was drawn for "
             f"{wrong} of them"]
    return Listing([f"{split}_{i:05d}" for i in range(len(samples))], labels, read, list(votes),
                   list(truth), [Path(__file__)], notes)


# ---------------------------------------------------------------------------------------- loading

def require_split(data, split):
    """An InputError if a data set does not have this split."""
    if split not in DATA[data]["counts"]:
        raise InputError(f"{data} has no {split} split; it has {', '.join(DATA[data]['counts'])}")


def data_flags(parser):
    """The flags of a command line that say what is read."""
    add = parser.add_argument
    add("--data", default="toy", choices=DATA, help="data set (%(default)s)")
    add("--data-dir", help="its folder (data/DATA)")
    add("--labels", choices=("argmax", "majority"), help="FERPlus: votes to label (argmax)")
    add("--align", choices=("points", "given"),
        help="RAF-DB: align by the five points, or take its own aligned images (points)")
    add("--partial", action="store_true", help="accept a data set of unofficial size")


def settle_flags(flags):
    """Give --labels and --align their defaults, in place; InputError where they change nothing."""
    for name, default, data in (("labels", "argmax", "ferplus"), ("align", "points", "raf")):
        if flags[name] is not None and flags["data"] != data:
            raise InputError(f"--{name}: has no effect unless data is {data}; leave it out")
        flags[name] = flags[name] or default


def listing(data, data_dir, split, convention="argmax", partial=False, align_by="points"):
    """The `Listing` of a split of a data set, or an InputError."""
    require_split(data, split)
    if data == "toy":
        return list_toy(split)
    root = Path(data_dir or f"data/{data}")
    if not root.is_dir():
        raise layout_error(data, root, "there is no such folder (--data-dir)")
    if data == "ferplus":
        found = list_ferplus(root, split, convention, partial)
    elif data == "raf":
        found = list_raf(root, split, align_by, partial)
    elif data.startswith("affectnet"):
        found = list_affectnet(data, root, split, partial)
    elif data == "own":
        found = list_own(root, split)
    else:
        raise NotImplementedError(f"{data} stands in DATA; its reader has no branch here")
    if not found.names:
        raise InputError(f"{root}: no face is left in the {split} split of {data}")
    return found


def code_behind(function):
    """The source of a function and of the functions of its folder that it calls, and so on."""
    folder = lambda f: Path(f.__globals__.get("__file__", "")).parent
    functions = [function]
    for caller in functions:                             # grows by the functions called
        codes = [caller.__code__]
        for code in codes:                               # grows by the functions inside
            codes += filter(inspect.iscode, code.co_consts)
            for other in map(caller.__globals__.get, code.co_names):
                if inspect.isfunction(other) and folder(other) == folder(function) \
                        and other not in functions:
                    functions.append(other)
    return "".join(map(inspect.getsource, functions))


def memory_map(found, data, split, side, cache):
    """All images of a listing as a read-only uint8 array (n, C, side, side) on disk, built once.

    The file's name holds a digest of its shape, of the names, sizes and times of the sources and of
    the code that reads and aligns images, so that what changed is read again; old files may be
    deleted. It is written beside and renamed: a half-built file is never used.
    """
    shape = len(found.names), DATA[data]["channels"], side, side
    digest = hashlib.sha256(repr((data, split, shape, found.names, TEMPLATE.tolist(),
                                  code_behind(found.read))).encode())
    try:
        for source in found.sources:
            status = os.stat(source)
            digest.update(f"{source} {status.st_size} {status.st_mtime_ns}".encode())
    except FileNotFoundError:
        raise InputError(f"{source}: no such file; is the data set unpacked completely?") from None
    except (OSError, ValueError) as error:
        why = error.args[-1]                             # a name that no file can have
        raise InputError(f"{source}: cannot be a file ({why}); correct its row") from None
    path = Path(cache) / f"{data}-{split}-{side}-{digest.hexdigest()[:12]}.npy"
    if not path.exists():
        try:
            build_memory_map(path, found, shape)
        except OSError as error:
            raise InputError(f"--cache {cache}: the memory map of {data} cannot be written "
                             f"({error.strerror or error})") from None
    try:
        return np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: not a whole memory map ({error}); delete it") from None


def build_memory_map(path, found, shape):
    """Read every face of a listing into a new file; shape (n, C, side, side)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size, free = math.prod(shape), shutil.disk_usage(path.parent).free
    if size > free:                   # writing a memory map on a full disk would kill the process
        raise OSError(errno.ENOSPC, f"{size / 1e9:.1f} GB are needed, {free / 1e9:.1f} are free")
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    array = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
    bar = tqdm(total=len(array), desc=f"reading {path.name}", leave=False, disable=None)
    try:
        with bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for i in range(0, len(array), 256):           # few at a time: memory stays flat
                rows = range(i, min(i + 256, len(array)))
                faces = np.stack(list(pool.map(lambda j: found.read(j, shape[-1]), rows)))
                array[i:i + 256] = faces.reshape(len(rows), *shape[1:])   # grey is not made colour
                bar.update(len(rows))
        array.flush()
        del array                                         # Windows renames no file that is mapped
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_faces(data, data_dir, split, image_size, convention="argmax", partial=False,
               cache="runs/cache", align_by="points"):
    """A split as `Faces`; images are stored at image_size, or at the side in DATA if it is less."""
    found = listing(data, data_dir, split, convention, partial, align_by)
    side = min(image_size, DATA[data]["side"])
    images = memory_map(found, data, split, side, cache)                   # (n, C, side, side)
    votes = None if found.votes is None else torch.tensor(np.array(found.votes)).float()
    truth = None if found.truth is None else torch.tensor(found.truth)
    return Faces(split, images, torch.tensor(found.labels), found.names, votes, truth, found.notes)


def hold_out(faces, share, seed):
    """Split a training set into (training, hold-out) by class, a `share` of each: two `Faces`."""
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(faces), dtype=torch.bool)
    for c in faces.labels.unique():
        members = (faces.labels == c).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        held[members[order[:round(share * len(members))]]] = True
    return faces.subset((~held).nonzero().flatten()), faces.subset(held.nonzero().flatten())


# ---------------------------------------------------------------------------------------- batches

def prepare(images, size, data):
    """uint8 (B, C, S, S) -> normalised (B, 3, size, size); grey becomes three equal channels."""
    return normalise(resize(images, size), DATA[data])


def resize(images, size):
    """uint8 (B, C, S, S) -> pixels in 0 .. 1, (B, C, size, size)."""
    x = images.float() / 255
    if x.shape[-1] == size:
        return x
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True)    # (B, C, size, size)


def normalise(x, about):
    """Pixels (B, C, H, H) in 0 .. 1 -> (x - mean) / std of about (a dict), (B, 3, H, H)."""
    mean, std = (torch.tensor(about[k], device=x.device)[:, None, None] for k in ("mean", "std"))
    return (x - mean).div_(std)                                    # C = 1 spreads to 3 here


def as_picture(image):
    """A stored face, uint8 (C, S, S), as PIL RGB."""
    return Image.fromarray(image.permute(1, 2, 0).squeeze().numpy()).convert("RGB")


def to_picture(x, data):
    """Undo `normalise`: one image (3, H, H), on the CPU, -> PIL RGB."""
    mean, std = (torch.tensor(DATA[data][k])[:, None, None] for k in ("mean", "std"))
    return as_picture(((x * std + mean).clamp(0, 1) * 255).round().byte())


def augment(images, u, size, data, scale=0.5, degrees=0.0, light=0.0, erase=0.0):
    """Random crop, flip, rotation, light and erasing of a whole batch, on its device.

    images uint8 (B, C, S, S) -> normalised (B, 3, size, size). `u` (B, 12) in [0, 1) holds all that
    is random, a row a face, so that a face is augmented alike however a batch is divided. A crop
    has an area from `scale` to 1 and an aspect ratio of 3/4 to 4/3 (MaskFeat), or as near to that
    as the image allows; `degrees`, `light` are the largest rotation and change of brightness and
    contrast; `erase` is how often a rectangle (`erased`) is replaced by the mean colour.
    """
    spread = lambda k, a: (2 * u[:, k] - 1) * a                    # uniform in -a .. a, (B,)
    area = scale + (1 - scale) * u[:, 0]
    widest = (-area.log()).clamp(max=math.log(4 / 3))              # a wider one leaves the image
    shape = torch.exp(spread(1, widest))
    w, h = (area * shape).sqrt(), (area / shape).sqrt()            # shares of the image, (B,)
    x0, y0 = spread(2, 1 - w), spread(3, 1 - h)                    # the crop's centre, (B,)
    flip, angle = torch.where(u[:, 4] < 0.5, -1.0, 1.0), spread(5, math.radians(degrees))
    cos, sin = angle.cos(), angle.sin()
    at = (2 * torch.arange(size, device=u.device) + 1) / size - 1  # pixel centres, in -1 .. 1
    column = lambda *values: torch.stack(values, 1)[:, :, None, None]          # (B, 2, 1, 1)
    along = column(w * flip * cos, w * flip * sin) * at                        # (B, 2, 1, size)
    down = column(-h * sin, h * cos) * at[:, None] + column(x0, y0)            # (B, 2, size, 1)
    x = F.grid_sample(images.float() / 255, (along + down).permute(0, 2, 3, 1),
                      padding_mode="border", align_corners=False)
    if light:
        gain, offset = 1 + spread(6, light), spread(7, light)      # (B,) each
        shift = 0.5 + offset - 0.5 * gain                          # contrast is about mid-grey
        x = x.mul_(gain[:, None, None, None]).add_(shift[:, None, None, None]).clamp_(0, 1)
    x = normalise(x, DATA[data])                                   # (B, 3, size, size)
    if erase:
        chosen = ((u[:, 4] * 2) % 1 < erase)[:, None, None]        # independent of the flip
        x = x.masked_fill_((erased(u[:, 8:], size) & chosen)[:, None], 0.0)
    return x


def erased(u, size):
    """A random rectangle of each image (Zhong et al. 2020): u (B, 4) -> (B, size, size) bool.

    Its share of the image is uniform in 0.02 .. 0.33, its aspect ratio log-uniform in 1/3.3 .. 3.3.
    """
    share, aspect = 0.02 + 0.31 * u[:, 0], torch.exp((2 * u[:, 1] - 1) * math.log(3.3))   # (B,)
    centre = torch.arange(size, device=u.device) + 0.5             # of the pixels, (size,)

    def span(side, where):
        """Which rows or columns it covers: share of the side and where, (B,) -> (B, size) bool."""
        length = (side * size).clamp(1, size)
        start = (where * (size - length))[:, None]                 # (B, 1)
        return (centre >= start) & (centre < start + length[:, None])

    rows, columns = span((share * aspect).sqrt(), u[:, 2]), span((share / aspect).sqrt(), u[:, 3])
    return rows[:, :, None] & columns[:, None, :]                  # (B, size, size)


# ---------------------------------------------------------------------------------------- pictures

def contact_sheet(found, data, rows):
    """These faces of a listing with the voted label and each class's share of the votes: PIL."""
    columns, side, gap = 8, 180, 16
    classes, height, font = DATA[data]["classes"], side + 110, ImageFont.load_default
    bottom = math.ceil(len(rows) / columns) * height
    sheet = Image.new("RGB", (columns * (side + gap) + gap, bottom + 60), "white")
    draw = ImageDraw.Draw(sheet)
    for k, i in enumerate(rows):
        x, y = k % columns * (side + gap) + gap, k // columns * height + 10
        face = as_picture(torch.tensor(found.read(i, DATA[data]["side"])))
        sheet.paste(face.resize((side, side), Image.Resampling.BICUBIC), (x, y))
        draw.text((x, y + side + 2), classes[found.labels[i]], "firebrick", font(22))
        if found.votes is not None:
            step, votes = side / len(classes), torch.tensor(found.votes[i]).float()   # (K,)
            for c, v in enumerate((votes / votes.sum()).tolist()):
                left, floor = x + c * step, y + side + 80
                draw.rectangle([left, floor - 48 * v, left + 0.75 * step, floor],
                               "firebrick" if c == found.labels[i] else "grey")
                draw.text((left + 0.37 * step, floor + 4), classes[c][:2], "black", font(13), "mt")
    draw.text((gap, bottom + 20), "red: the voted label; bars: share of the votes for " +
              ", ".join(f"{name[:2]} = {name}" for name in classes), "black", font(20))
    return sheet


def statistics(data, found):
    """What the crowd said of a data set, found: split -> Listing; three charts side by side.

    Faces a class and split; how many classes a face got votes for; the mean share of the votes
    (column) over the faces of each voted label (row). The last two are of the first split, and need
    votes.
    """
    classes, font = DATA[data]["classes"], ImageFont.load_default
    split, listed = next(iter(found.items()))
    sheet = Image.new("RGB", (2000, 200 + 62 * len(classes)), "white")
    draw = ImageDraw.Draw(sheet)
    counts = {s: np.bincount(f.labels, minlength=len(classes)) for s, f in found.items()}
    most = max(c.max() for c in counts.values())
    draw.text((40, 20), f"{data}: faces of each voted label", "black", font(26))
    for k, name in enumerate(classes):
        draw.text((160, 114 + 62 * k), name, "black", font(22), "rm")
    for j, (s, shade) in enumerate(zip(counts, ("firebrick", "steelblue", "grey"))):
        draw.text((170 + 130 * j, 110 + 62 * len(classes)), s, shade, font(22))
        for k, count in enumerate(counts[s]):
            y, length = 90 + 62 * k + 17 * j, 330 * count / most
            draw.rectangle((170, y, 170 + length, y + 13), shade)
            draw.text((176 + length, y + 7), str(count), "black", font(16), "lm")
    if listed.votes is None:
        return sheet
    votes = np.array(listed.votes, float)                                   # (n, K)
    share = np.bincount((votes > 0).sum(1), minlength=len(classes) + 1) / len(votes)
    draw.text((660, 20), f"classes with votes, a face ({split})", "black", font(26))
    for k in range(1, len(classes) + 1):
        y = 90 + 62 * (k - 1)
        draw.text((690, y + 24), str(k), "black", font(22), "rm")
        draw.rectangle((705, y + 4, 705 + 300 * share[k] / share.max(), y + 44), "steelblue")
        draw.text((712 + 300 * share[k] / share.max(), y + 24), f"{share[k]:.1%}", "black",
                  font(20), "lm")
    draw.text((1160, 20), f"mean share of the votes ({split})", "black", font(26))
    voted = np.eye(len(classes))[listed.labels]                             # (n, K)
    total = voted.T @ (votes / votes.sum(1, keepdims=True))                 # (K, K)
    mean = total / voted.sum(0)[:, None].clip(1)
    draw_matrix(draw, 1320, 90, mean, mean, classes, "{:.0%}")
    draw.text((1320, 100 + 62 * len(classes)), "row: voted label, column: votes", "black", font(20))
    return sheet


def check(data, data_dir, convention="argmax", partial=False, align_by="points"):
    """What a data set on disk holds, read face by face: (lines of text, problems, listings).

    Problems are wrong counts (unless `partial` accepts them) and faces that cannot be read; faces
    whose pixels stand in another split or twice in one are counted, as FERPlus has some officially.
    The listings are a dict, split -> (Listing, indices of the faces that can be read).
    """
    lines, problems, listings = [], [], {}
    known = {}                                   # digest of the pixels -> the split seen first
    classes, side = DATA[data]["classes"], DATA[data]["side"]
    for split in DATA[data]["counts"]:
        for lenient in (partial, True):          # a wrong count is a problem, the faces are read
            try:
                found = listing(data, data_dir, split, convention, lenient, align_by)
                break
            except InputError as error:
                if str(error) not in problems:
                    problems.append(str(error))
        else:
            continue

        def digest(i):
            try:
                return hashlib.sha256(found.read(i, side).tobytes()).hexdigest()
            except InputError as error:
                return error

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            digests = list(pool.map(digest, range(len(found.names))))
        problems += [str(d) for d in digests if isinstance(d, InputError)]
        listings[split] = found, [i for i, d in enumerate(digests) if isinstance(d, str)]
        digests = [d for d in digests if isinstance(d, str)]
        elsewhere = Counter(known[d] for d in digests if d in known)
        known.update((d, split) for d in digests if d not in known)
        counts = Counter(found.labels)
        lines += [f"{split}: {note}" for note in found.notes]
        lines += ["  " + "  ".join(f"{name} {counts[c]}" for c, name in enumerate(classes))]
        lines += [f"  {len(digests)} faces read, {len(found.names) - len(digests)} unreadable; "
                  f"{len(digests) - len(set(digests))} repeat another one's pixels" + "".join(
                      f"; {n} also stand in {other}" for other, n in elsewhere.items())]
    return lines, problems, listings


def save(picture, path):
    """Write a PIL picture, or say why it cannot be."""
    try:
        picture.save(path)
    except OSError as error:
        raise InputError(f"--out {path}: cannot be written ({error.strerror})") from None


def main(argv=None):
    """Check a data set; draw a contact sheet of one split and the statistics of all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    data_flags(parser)
    add("--split", default="train", choices=("train", "val", "test"), help="of the contact sheet")
    add("--out", help="where the contact sheet goes (runs/DATA-SPLIT.png)")
    args = parser.parse_args(argv)
    settle_flags(vars(args))
    settle_classes(vars(args))
    out = Path(args.out or f"runs/{args.data}-{args.split}.png")
    require_split(args.data, args.split)
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise InputError(f"--out {out}: name a .png or .jpg file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror})") from None
    lines, problems, listings = check(args.data, args.data_dir, args.labels, args.partial,
                                      args.align)
    print("\n".join(lines))
    found, readable = listings.get(args.split, (None, []))
    if readable:
        save(contact_sheet(found, args.data, readable[:64]), out)
        print(f"contact sheet: {out}")
        if args.data == "toy":                               # the others' faces are files already
            face = torch.tensor(found.read(readable[0], DATA["toy"]["side"]))
            save(as_picture(face), out.with_name("toy-face.png"))
    if listings:
        chart = out.with_name(f"{args.data}-statistics.png")
        save(statistics(args.data, {split: f for split, (f, _) in listings.items()}), chart)
        print(f"statistics: {chart}")
    if problems:
        more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
        print("\n".join([f"problems: {len(problems)}", *problems[:20], *more]))
        sys.exit(1)
    print("no problem")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        if not complaint(error):
            raise
        print(complaint(error), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
