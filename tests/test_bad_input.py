"""Whatever is wrong with the input: one exact line (what, where, what to do) and status 2."""
import csv
import io
import pathlib
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import pretrain
import train
from conftest import TINY, error_of, read_state
from datasets import DATA, TREES

KINDS = DATA["ferplus"]["classes"] + ["unknown", "NF"]
NEUTRAL = [10] + [0] * 9
NO_FACE = [0] * 9 + [10]


def image(mode="L", size=(48, 48), kind="png", **how):
    """The bytes of an image file."""
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **how)
    return file.getvalue()


def ferplus(folder, rows=(("fer0000001.png", NEUTRAL),), files=None, columns=KINDS, kaggle=None):
    """A FERPlus of a few training rows: (image name, ten votes); files: name -> bytes."""
    with open(folder / "fer2013new.csv", "w", newline="") as file:
        csv.writer(file).writerows([["Usage", "Image name", *columns]]
                                   + [["Training", name, *votes] for name, votes in rows])
    if kaggle is None:
        (folder / "FER2013Train").mkdir()
        for name, content in (files or {"fer0000001.png": image()}).items():
            (folder / "FER2013Train" / name).write_bytes(content)
    else:
        with open(folder / "fer2013.csv", "w", newline="") as file:
            csv.writer(file).writerows([["emotion", "pixels", "Usage"], *kaggle])
    return ["--data", "ferplus", "--data-dir", folder, "--partial"]


def raf(folder, text="train_00001.jpg 5\n", originals=False, points=None, distribution=None):
    """A RAF-DB of one training face."""
    for name in ("EmoLabel", "Annotation/manual", "Image/original" if originals else
                 "Image/aligned"):
        (folder / "basic" / name).mkdir(parents=True)
    (folder / "basic/EmoLabel/list_patition_label.txt").write_bytes(
        text if isinstance(text, bytes) else text.encode())
    where = "original/train_00001.jpg" if originals else "aligned/train_00001_aligned.jpg"
    (folder / "basic/Image" / where).write_bytes(image("RGB", kind="jpeg"))
    if points is not None:
        (folder / "basic/Annotation/manual/train_00001_manu_attri.txt").write_text(points)
    if distribution is not None:
        (folder / "basic/EmoLabel/distribution.txt").write_text(distribution)
    return ["--data", "raf", "--data-dir", folder, "--partial"]


def affectnet(folder, path="a.jpg", landmarks=";".join(["1"] * 136), expression=0, times=1):
    """An AffectNet of one training row, or that row more than once."""
    with open(folder / "training.csv", "w", newline="") as file:
        csv.writer(file).writerows([["subDirectory_filePath", "facial_landmarks", "expression"],
                                    *[[path, landmarks, expression]] * times])
    (folder / "a.jpg").write_bytes(image("RGB", kind="jpeg"))
    return ["--data", "affectnet8", "--data-dir", folder, "--partial"]


def folders(folder, expression, landmarks=np.ones(136)):
    """An AffectNet of one training image in folders."""
    for name in ("images", "annotations"):
        (folder / "train_set" / name).mkdir(parents=True)
    (folder / "train_set/images/1.jpg").write_bytes(image("RGB", kind="jpeg"))
    for name, values in (("exp", expression), ("lnd", landmarks)):
        np.save(folder / f"train_set/annotations/1_{name}.npy", values, allow_pickle=True)
    return ["--data", "affectnet8", "--data-dir", folder, "--partial"]


def own(folder, rows="a.png,3,1\n", header="image,joy,grief\n"):
    """Somebody's own training face, with votes for two classes."""
    (folder / "train.csv").write_text(header + rows)
    (folder / "a.png").write_bytes(image("RGB"))
    return ["--data", "own", "--data-dir", folder]


def broken(content, name="fer0000001.png"):
    return lambda folder: ferplus(folder, files={name: content})


def one_row(votes, name="fer0000001.png"):
    return lambda folder: ferplus(folder, [(name, votes)])


def bad_bytes(make, file, old, new):
    """A data set one of whose files has other bytes."""
    def prepare(folder):
        flags = make(folder)
        path = folder / file
        path.write_bytes(path.read_bytes().replace(old, new))
        return flags
    return prepare


NO_DATA = [
    ("no such folder", lambda f: ["--data", "raf", "--data-dir", f / "x"],
     "TMP/x: there is no such folder (--data-dir). Expected for --data raf:" + TREES["raf"]),
    ("a file for a folder", lambda f: ["--data", "raf", "--data-dir", __file__],
     f"{__file__}: there is no such folder (--data-dir). Expected for --data raf:" + TREES["raf"]),
    ("no votes file", lambda f: ["--data", "ferplus", "--data-dir", f],
     "TMP: there is no fer2013new.csv. Expected for --data ferplus:" + TREES["ferplus"]),
    ("no images", lambda f: [ferplus(f), shutil.rmtree(f / "FER2013Train")][0],
     "TMP: there is neither FER2013Train/ nor fer2013.csv. Expected for --data ferplus:"
     + TREES["ferplus"]),
    ("no label list", lambda f: ["--data", "raf", "--data-dir", f],
     "TMP: there is no EmoLabel/list_patition_label.txt. Expected for --data raf:" + TREES["raf"]),
    ("no aligned images", lambda f: [raf(f), shutil.rmtree(f / "basic/Image/aligned")][0],
     "TMP/basic: there is no Image/aligned, and no Image/original with Annotation/manual. "
     "Expected for --data raf:" + TREES["raf"]),
    ("no AffectNet", lambda f: ["--data", "affectnet7", "--data-dir", f],
     "TMP: there is neither training.csv nor train_set/images/. Expected for --data affectnet7:"
     + TREES["affectnet7"]),
    ("no table of one's own", lambda f: ["--data", "own", "--data-dir", f],
     "TMP: there is no train.csv (--data-dir). Expected for --data own:" + TREES["own"]),
    ("wrong count", lambda f: ferplus(f)[:-1],
     "TMP/fer2013new.csv: 1 faces for the train split, officially 28709; complete the data set, or "
     "say --partial to use it as it is"),
]
IMAGE = "TMP/FER2013Train/fer0000001.png: "
IMAGES = [
    ("missing image", lambda f: ferplus(f, files={"other.png": image()}),
     IMAGE + "no such file; is the data set unpacked completely?"),
    ("a folder without images", lambda f: ferplus(f, files={"readme.txt": b""}),
     IMAGE + "no such file; is the data set unpacked completely?"),
    ("empty image", broken(b""), IMAGE + "not a readable image (cannot identify image file "
     "'TMP/FER2013Train/fer0000001.png'); fetch it again"),
    ("truncated image", broken(image(size=(480, 480))[:100]),
     IMAGE + "not a readable image (image file is truncated); fetch it again"),
    ("text for an image", broken(b"hello"), IMAGE + "not a readable image (cannot identify image "
     "file 'TMP/FER2013Train/fer0000001.png'); fetch it again"),
    ("CMYK", broken(image("CMYK", kind="jpeg")),
     IMAGE + "colour mode CMYK is not read here; convert it to 8-bit grey or RGB"),
    ("16 bits", broken(image("I;16")),
     IMAGE + "colour mode I;16 is not read here; convert it to 8-bit grey or RGB"),
    ("animated", broken(image(kind="gif", save_all=True, append_images=[
        Image.new("L", (48, 48), 9)])), IMAGE + "holds 2 frames; extract one"),
    ("huge", broken(image("1", (20_000, 20_000))), IMAGE + "more than 178956970 pixels; shrink it"),
    ("a folder for an image", lambda f: [ferplus(f, [("", NO_FACE), ("a.png", NEUTRAL)]),
                                         (f / "FER2013Train/a.png").mkdir()][0],
     "TMP/FER2013Train/a.png: not a readable image ([Errno 21] Is a directory: "
     "'TMP/FER2013Train/a.png'); fetch it again"),
]
TABLES = [
    ("missing column", lambda f: ferplus(f, columns=KINDS[:-1] + ["noface"]),
     f"TMP/fer2013new.csv: no column 'NF'; expected Usage, Image name, {', '.join(KINDS)}"),
    ("empty csv", bad_bytes(lambda f: ferplus(f, ()), "fer2013new.csv", b"Usage", b"\n"),
     f"TMP/fer2013new.csv: no column 'Usage'; expected Usage, Image name, {', '.join(KINDS)}"),
    ("a folder for a csv", lambda f: [(f / "fer2013new.csv").mkdir(), (f / "FER2013Train").mkdir(),
                                      ["--data", "ferplus", "--data-dir", f]][2],
     "TMP/fer2013new.csv: not a readable csv file ([Errno 21] Is a directory: "
     "'TMP/fer2013new.csv')"),
    ("negative votes", one_row([-3] + [0] * 9),
     "TMP/fer2013new.csv, row 2: '-3' is not a whole number from 0; correct the row"),
    ("fractional votes", one_row([2.5] + [0] * 9),
     "TMP/fer2013new.csv, row 2: '2.5' is not a whole number from 0; correct the row"),
    ("votes in words", one_row(["many"] + [0] * 9),
     "TMP/fer2013new.csv, row 2: 'many' is not a whole number from 0; correct the row"),
    ("a short row", one_row([5, 5]),
     "TMP/fer2013new.csv, row 2: None is not a whole number from 0; correct the row"),
    ("votes beyond counting", one_row(["1e20"] + [0] * 9),
     "TMP/fer2013new.csv, row 2: '1e20' is not a whole number from 0; correct the row"),
    ("infinite votes", one_row(["inf"] + [0] * 9),
     "TMP/fer2013new.csv, row 2: 'inf' is not a whole number from 0; correct the row"),
    ("no votes", one_row([0] * 10),
     "TMP/fer2013new.csv, row 2: fer0000001.png has no votes; remove the row"),
    ("nothing but non-faces", one_row(NO_FACE),
     "TMP: no face is left in the train split of ferplus"),
    ("a face without a name", one_row(NEUTRAL, ""),
     "TMP/fer2013new.csv, row 2: votes for a face, but no image is named; correct the row"),
    ("an unknown part", bad_bytes(ferplus, "fer2013new.csv", b"Training", b"Trainng"),
     "TMP/fer2013new.csv, row 2: Usage 'Trainng' is none of Training, PublicTest, PrivateTest; "
     "correct the row"),
    ("an open quotation mark", bad_bytes(ferplus, "fer2013new.csv", b"Training", b'"Training'),
     "TMP/fer2013new.csv, row 2: not readable (unexpected end of data); is a quotation mark left "
     "open?"),
    ("not UTF-8", bad_bytes(ferplus, "fer2013new.csv", b"neutral", b"\xff\xfe"),
     "TMP/fer2013new.csv: not UTF-8; save it as UTF-8"),
    ("a name that leaves the folder", one_row(NEUTRAL, "../../secret.png"),
     "TMP/fer2013new.csv, row 2: '../../secret.png' leaves the data folder; correct the row"),
    ("Kaggle's of another length", lambda f: ferplus(f, kaggle=[]),
     "TMP/fer2013.csv: 0 rows, but TMP/fer2013new.csv has 1; they are joined by row, so both must "
     "be complete"),
    ("Kaggle's in another order", lambda f: ferplus(f, kaggle=[[0, "1 2", "PublicTest"]]),
     "TMP/fer2013.csv, row 2: Usage PublicTest, but Training in fer2013new.csv; the two files must "
     "have one order"),
    ("Kaggle's with few pixels", lambda f: ferplus(f, kaggle=[[0, "1 2", "Training"]]),
     "TMP/fer2013.csv, row 2: not 48 x 48 numbers from 0 to 255"),
    ("Kaggle's with large pixels", lambda f: ferplus(f, kaggle=[
        [0, " ".join(["256"] * 2304), "Training"]]),
     "TMP/fer2013.csv, row 2: not 48 x 48 numbers from 0 to 255"),
    ("Kaggle's with pixels beyond 64 bits", lambda f: ferplus(f, kaggle=[
        [0, " ".join([str(2 ** 70)] * 2304), "Training"]]),
     "TMP/fer2013.csv, row 2: not 48 x 48 numbers from 0 to 255"),
]
LIST = "TMP/basic/EmoLabel/list_patition_label.txt"
OTHERS = [
    ("unknown class", lambda f: raf(f, "train_00001.jpg 8\n"),
     f"{LIST}, row 1: '8' is not a whole number from 1 to 7; correct the row"),
    ("no class", lambda f: raf(f, "\ntrain_00001.jpg\n"),
     f"{LIST}, row 2: 'train_00001.jpg' is not a name and a class number; correct the row"),
    ("listed twice", lambda f: raf(f, "train_00001.jpg 5\ntrain_00001.jpg 4\n"),
     f"{LIST}, row 2: train_00001.jpg is listed twice; remove one row"),
    ("list not UTF-8", lambda f: raf(f, b"train_\xe9.jpg 5\n"),
     f"{LIST}: not UTF-8; save it as UTF-8"),
    ("a folder for a list", lambda f: [
        raf(f), (f / LIST[4:]).unlink(), (f / LIST[4:]).mkdir()][0],
     f"{LIST}: not a readable file ([Errno 21] Is a directory: '{LIST}')"),
    ("of no split", lambda f: raf(f, "val_00001.jpg 5\n"),
     f"{LIST}, row 1: 'val_00001.jpg' begins with neither train_ nor test_; rename the file and "
     "correct the row"),
    ("infinite votes", lambda f: raf(f, distribution="train_00001.jpg inf 0 0 0 0 0 1\n"),
     "TMP/basic/EmoLabel/distribution.txt, row 1: 'inf' is not a number from 0; correct the row"),
    ("a name too long", lambda f: raf(f, f"train_{'x' * 250}.jpg 5\n"),
     f"TMP/basic/Image/aligned/train_{'x' * 250}_aligned.jpg: cannot be a file (File name too "
     "long); correct its row"),
    ("listed outside", lambda f: raf(f, "../../train.jpg 5\n"),
     f"{LIST}, row 1: '../../train.jpg' leaves the data folder; correct the row"),
    ("a distribution without the face", lambda f: raf(f, distribution="train_00002.jpg 1 1 1 1\n"),
     "TMP/basic/EmoLabel/distribution.txt: no 7 votes for train_00001.jpg; complete the file or "
     "remove it"),
    ("a distribution with a face twice", lambda f: raf(f, distribution=2 * "train_00001.jpg 1 1\n"),
     "TMP/basic/EmoLabel/distribution.txt, row 2: train_00001.jpg is listed twice; remove one row"),
    ("a distribution without votes", lambda f: raf(f, distribution="train_00001.jpg 0 0 0 0 0 0 0"),
     "TMP/basic/EmoLabel/distribution.txt: no 7 votes for train_00001.jpg; complete the file or "
     "remove it"),
    ("points missing", lambda f: raf(f, originals=True),
     "TMP/basic/Annotation/manual/train_00001_manu_attri.txt: no such file; is the data set "
     "unpacked completely?"),
    ("three points", lambda f: raf(f, originals=True, points="1 2\n3 4\n5 6\n"),
     "TMP/basic/Annotation/manual/train_00001_manu_attri.txt: not five rows of x and y (cannot "
     "reshape array of size 6 into shape (5,2))"),
    ("points that are no numbers", lambda f: raf(f, originals=True, points="nan 1\n" * 5),
     "TMP/basic/Annotation/manual/train_00001_manu_attri.txt: not five rows of x and y (not "
     "finite)"),
    ("one landmark", lambda f: affectnet(f, landmarks="1;2"),
     "TMP/training.csv, row 2: not 68 landmarks (cannot reshape array of size 2 into shape "
     "(68,2))"),
    ("landmarks that are no numbers", lambda f: affectnet(f, landmarks=";".join(["nan"] * 136)),
     "TMP/training.csv, row 2: not 68 landmarks (not finite)"),
    ("unknown expression", lambda f: affectnet(f, expression=11),
     "TMP/training.csv, row 2: '11' is not a whole number from 0 to 10; correct the row"),
    ("an image elsewhere", lambda f: affectnet(f, path="/etc/passwd"),
     "TMP/training.csv, row 2: '/etc/passwd' leaves the data folder; correct the row"),
    ("an image in two rows", lambda f: affectnet(f, times=2),
     "TMP/training.csv, row 3: a.jpg is listed twice; remove one row"),
    ("columns for a class", lambda f: folders(f, np.zeros(1, [("a", int)])),
     "TMP/train_set/annotations/1_exp.npy: (0,) is not a whole number from 0 to 10; correct the "
     "row"),
    ("columns for landmarks", lambda f: folders(f, np.array(0), np.zeros(136, "i8,i8")),
     "TMP/train_set/annotations/1_lnd.npy: not 68 landmarks (Cannot cast array data from dtype([("
     "'f0', '<i8'), ('f1', '<i8')]) to dtype('float64') according to the rule 'unsafe')"),
    ("a pickle for landmarks", lambda f: folders(f, np.array("0"), np.array([None], dtype=object)),
     "TMP/train_set/annotations/1_lnd.npy: not 68 landmarks (Object arrays cannot be loaded when "
     "allow_pickle=False)"),
    ("a pickle for a class", lambda f: folders(f, np.array([{"a": 1}], dtype=object)),
     "TMP/train_set/annotations/1_exp.npy: not a class number (Object arrays cannot be loaded when "
     "allow_pickle=False)"),
    ("own: no column of images", lambda f: own(f, header="name,joy,grief\n"),
     "TMP/train.csv: no column 'image'; expected image"),
    ("own: one class", lambda f: own(f, "a.png,3\n", "image,joy\n"),
     "TMP/train.csv: the first row must be image and two class names or more, each once"),
    ("own: a class twice", lambda f: own(f, "a.png,3,1,1\n", "image,joy,grief,joy\n"),
     "TMP/train.csv: the first row must be image and two class names or more, each once"),
    ("own: images twice", lambda f: own(f, "a.png,3,1,1\n", "image,joy,grief,image\n"),
     "TMP/train.csv: two columns 'image'; expected image"),
    ("own: a vote too much", lambda f: own(f, "a.png,3,1,1\n"),
     "TMP/train.csv, row 2: more columns than train.csv's image, joy, grief; remove them"),
    ("own: a vote too few", lambda f: own(f, "a.png,3\n"),
     "TMP/train.csv, row 2: None is not a whole number from 0; correct the row"),
    ("own: no image", lambda f: own(f, "3,1\n", "joy,grief,image\n"),
     "TMP/train.csv, row 2: no image is named; correct the row"),
    ("own: an image twice", lambda f: own(f, "a.png,3,1\na.png,2,2\n"),
     "TMP/train.csv, row 3: a.png is listed twice; remove one row"),
    ("own: no votes", lambda f: own(f, "a.png,0,0\n"),
     "TMP/train.csv, row 2: a.png has no votes; remove the row"),
    ("own: an image elsewhere", lambda f: own(f, "../a.png,3,1\n"),
     "TMP/train.csv, row 2: '../a.png' leaves the data folder; correct the row"),
    ("own: no such image", lambda f: own(f, "b.png,3,1\n"),
     "TMP/b.png: no such file; is the data set unpacked completely?"),
    ("own: no row", lambda f: own(f, ""), "TMP: no face is left in the train split of own"),
    ("a word for a class", lambda f: folders(f, np.array("happy")),
     "TMP/train_set/annotations/1_exp.npy: 'happy' is not a whole number from 0 to 10; correct the "
     "row"),
]
ALL_DATA = NO_DATA + IMAGES + TABLES + OTHERS


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")   # ours is in datasets.py
@pytest.mark.parametrize("prepare, message", [case[1:] for case in ALL_DATA],
                         ids=[case[0] for case in ALL_DATA])
def test_bad_data(prepare, message, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    flags = [*prepare(folder), *TINY, "--batch-size", "1"]
    error = error_of(pretrain, flags, capsys)
    assert error == f"error: {message}\n".replace("TMP", str(folder))
    assert not list(tmp_path.glob("runs/cache/*"))       # no half-built memory map is left


def edited(change):
    """A checkpoint of the fixture after `change(state)`."""
    def prepare(run, path):
        state = read_state(run)
        change(state)
        torch.save(state, path)
    return prepare


class Bomb:
    """An object whose unpickling creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(self.path),)


CHECKPOINTS = [
    ("truncated", lambda run, path: path.write_bytes((run / "last.pt").read_bytes()[:5000]),
     "TMP: not a readable checkpoint (OSError); it is truncated or not ours"),
    ("empty", lambda run, path: path.write_bytes(b""),
     "TMP: not a readable checkpoint (EOFError); it is truncated or not ours"),
    ("text", lambda run, path: path.write_text("hello, this is not a checkpoint"),
     "TMP: not a readable checkpoint (KeyError); it is truncated or not ours"),
    ("runs code", lambda run, path: torch.save({"stage": "pretrain", "x": Bomb(f"{path}.ran")},
                                               path),
     "TMP: not a readable checkpoint (UnpicklingError); it is truncated or not ours"),
    ("old pickle that runs code", lambda run, path: path.write_bytes(
        pickle.dumps(Bomb(f"{path}.ran"), protocol=2)),
     "TMP: not a readable checkpoint (UnpicklingError); it is truncated or not ours"),
    ("other dict", lambda run, path: torch.save({"weights": torch.zeros(2)}, path),
     "TMP: not a checkpoint of pretrain.py or train.py"),
    ("other object", lambda run, path: torch.save([1, 2], path),
     "TMP: not a checkpoint of pretrain.py or train.py"),
    ("other stage", edited(lambda state: state.update(stage="train")),
     "TMP: a checkpoint of train.py; pretrain.py's is needed"),
    ("no epoch", edited(lambda state: state["log"].clear()),
     "TMP: stopped within its first epoch; go on with pretrain.py --resume"),
    ("NaN weights", edited(lambda state: state["model"]["encoder.norm.weight"].fill_(torch.nan)),
     "TMP (epoch 2): 1 tensors hold NaN or infinity (first: norm.weight); take another checkpoint"),
    ("numbers for weights", edited(lambda state: state["model"].update(w=1.0)),
     "TMP: its model is not what pretrain.py writes; take another checkpoint"),
    ("a list for settings", edited(lambda state: state.update(config=[1])),
     "TMP: its config is not what pretrain.py writes; take another checkpoint"),
    ("one weight missing", edited(lambda state: state["model"].pop("encoder.norm.weight")),
     "TMP (epoch 2): weights of another model (1 missing, 0 superfluous, 0 of other shape; first: "
     "norm.weight); give the same --scale and sizes"),
    ("no such file", lambda run, path: None, "TMP: no such checkpoint"),
]


@pytest.mark.parametrize("prepare, message", [case[1:] for case in CHECKPOINTS],
                         ids=[case[0] for case in CHECKPOINTS])
def test_bad_checkpoints(prepare, message, pretrained, cache, tmp_path, capsys):
    path = tmp_path / "given.pt"
    prepare(pretrained, path)
    error = error_of(train, [*TINY, "--cache", cache, "--out", tmp_path / "run", "--init", path],
                     capsys)
    assert error == f"error: {message}\n".replace("TMP", str(path))
    assert not pathlib.Path(f"{path}.ran").exists()      # the code in it did not run


NUMBERS = [
    (pretrain, "--epochs 0", "--epochs 0: give a number from 1 to 100000"),
    (pretrain, "--batch-size 0", "--batch-size 0: give a number from 1 to 1000000"),
    (pretrain, "--batch-size 2001", "--batch-size 2001 is more than the 2000 faces"),
    (pretrain, "--lr -1", "--lr -1.0: give a number from 0.0 to 10.0"),
    (pretrain, "--lr nan", "--lr nan: give a number from 0.0 to 10.0"),
    (pretrain, "--mask-ratio 1", "--mask-ratio 1.0: give a number from 0.01 to 0.99"),
    (pretrain, "--seed -1", "--seed -1: give a number from 0 to 4294967296"),
    (pretrain, "--workers -1", "--workers -1: give a number from 0 to 1000"),
    (pretrain, "--image-size 50", "--image-size 50 is not a multiple of --patch-size 4"),
    (pretrain, "--warmup-epochs 3", "--warmup-epochs 3: more than the 2 epochs"),
    (pretrain, "--resume", "OUT/last.pt: nothing to resume; leave --resume out to start"),
    (train, "--threshold 1", "--threshold 1.0: give a number from 0.0 to 0.9999"),
    (train, "--val 0.95", "--val 0.95: give a number from 0.0 to 0.9"),
    (train, "--tau 0", "--tau 0.0: give a number from 0.001 to 100.0"),
    (train, "--candidates lw3", "--candidates lw3: choose votes, lw1, lw2, lw4 or uniform:Q with Q "
     "from 0 to 1"),
    (train, "--device cuda:99", None),
    (evaluate, "OUT", "OUT: no such run; make it with: python train.py"),
    (evaluate, "RUN --split test --data-dir x --device quantum", None),
]


@pytest.mark.parametrize("script, flags, message", NUMBERS, ids=[case[1] for case in NUMBERS])
def test_bad_numbers(script, flags, message, trained, cache, tmp_path, capsys):
    out = tmp_path / "run"
    flags = flags.replace("OUT", str(out)).replace("RUN", str(trained)).split()
    if script is not evaluate:
        flags = [*TINY, "--cache", cache, "--out", out, *flags]
    if script is train:
        flags += ["--init", "none"]
    error = error_of(script, flags, capsys)
    if message is None:                                  # the reason is torch's, and may change
        assert re.fullmatch(r"error: --device \S+: cannot be used \(.+\)\n", error)
    else:
        assert error == f"error: {message}\n".replace("OUT", str(out))
    assert not out.exists()


def test_a_run_without_an_epoch_is_not_evaluated(trained, tmp_path, capsys):
    edited(lambda state: state["log"].clear())(trained, tmp_path / "early.pt")
    assert error_of(evaluate, [tmp_path / "early.pt"], capsys) == (
        f"error: {tmp_path / 'early.pt'}: stopped within its first epoch; go on with train.py "
        "--resume\n")


@pytest.mark.parametrize("flags, message", [
    ("--epochs many", "argument --epochs: invalid int value: 'many'"),
    ("--data mnist", "argument --data: invalid choice: 'mnist' (choose from "
     f"{', '.join(map(repr, DATA))})"),
    ("--learning-rate 1", "unrecognized arguments: --learning-rate 1")])
def test_bad_words_on_the_command_line(flags, message, capsys):
    assert error_of(pretrain, flags.split(), capsys).endswith(f": error: {message}\n")
