"""What is drawn: each picture shows what it says, and the README's are what the code draws."""
import json
import os
import re
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import datasets
import evaluate
import hog
import pll
import pretrain
import train
from conftest import (CPU, DECODER, ONE_THREAD, ROOT, TINY, error_of, faces_with, flags_for,
                      given_to_fit, read_state, run_script, shown_accuracy)
from datasets import DATA, TEMPLATE, InputError, load_faces, to_picture
from decoder import heat
from hog import BINS, edge, glyphs

MADE_BY = {                                  # picture of the README -> what makes it
    "hog": "python hog.py", "pll": "python pll.py", "pretraining": "python pretrain.py",
    "attention": "python evaluate.py", "disambiguation": "python evaluate.py",
    "curves": "python evaluate.py", "queries": "python evaluate.py",
    "locked-in": "python evaluate.py"}
RUNS = {"pretraining": "pretrain-toy/pictures/epoch-0016.png",
        "attention": "train-toy/pictures/attention-test.png",
        "disambiguation": "train-toy/pictures/disambiguation.png",
        "locked-in": "train-toy/pictures/locked-in.png",
        "curves": "train-toy/pictures/curves.png", "queries": "train-toy/pictures/queries.png"}


def small(path, side=48):
    """A picture at low resolution, (side, side, 3) in 0 .. 255."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB").resize((side, side), Image.Resampling.BOX), float)


@pytest.mark.parametrize("name", MADE_BY)
def test_the_readmes_pictures_are_what_the_code_draws(name, tmp_path):
    published = ROOT / ".github" / f"{name}.png"
    readme = (ROOT / "README.md").read_text()
    assert f".github/{name}.png" in readme and MADE_BY[name] in readme
    drawn = ROOT / "runs" / RUNS.get(name, "")
    if name in RUNS and not drawn.is_file():
        pytest.skip("made by the README's first command, which was not run here")
    if name == "locked-in":                  # which faces it shows depends on every last bit
        accuracy = json.loads((ROOT / "runs/train-toy/test.json").read_text())["accuracy"]
        if f"{accuracy:.2%}" != f"{shown_accuracy():.2%}":
            pytest.skip("the first command ended otherwise here than in the README (rounding)")
    if name not in RUNS:
        drawn = tmp_path / "drawn.png"
        {"hog": hog, "pll": pll}[name].main(["--out", str(drawn)])
    if name not in RUNS:                     # no training amplifies what differs in rounding
        assert np.abs(small(drawn, 400) - small(published, 400)).mean() < 0.1
    assert np.abs(small(drawn) - small(published)).mean() < 4


@pytest.mark.parametrize("name, runs", [
    ("ferplus", "{ours,rc-vit,mim-hog-pll,decoder-uniform,mim-hog,decoder-soft,recipe}-0"),
    ("recipe", "recipe-0")])
def test_the_readmes_curves_of_kept_runs_are_what_evaluate_py_draws(name, runs, tmp_path,
                                                                    monkeypatch, capsys):
    readme = (ROOT / "README.md").read_text()
    folder, methods = "tests/results/ferplus-15-epochs", runs.removesuffix("-0").strip("{}")
    assert f".github/{name}.png" in readme and f"{folder}/{runs} --split val" in readme
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    evaluate.main([f"{folder}/{m}-0" for m in methods.split(",")] + ["--split", "val"])
    assert capsys.readouterr().out.splitlines()[-1] == "pictures: runs/pictures (curves)"
    drawn = small(tmp_path / "runs/pictures/curves.png", 400)
    assert np.abs(drawn - small(ROOT / ".github" / f"{name}.png", 400)).mean() < 1


def stripes(across):
    """An image whose edges run from left to right, or from top to bottom: (1, 1, 32, 32)."""
    wave = torch.sin(torch.arange(32.0) * 0.8).expand(1, 1, 32, 32)
    return wave.transpose(2, 3) if across else wave


def test_a_glyph_lies_along_the_edge():
    for across in (True, False):
        picture = np.asarray(glyphs(hog.hog(stripes(across))[0], 40).convert("L"), int)
        dark = np.argwhere(picture[40:80, 40:80] < 200) - 19.5         # rows, columns of a cell
        spread = np.abs(dark).max(0)
        assert (spread[1] > 3 * spread[0]) == across and spread.max() > 15
    assert sorted(round(np.degrees(np.arctan2(-dy, dx))) % 180 for dx, dy in (
        edge(b, 1.0) for b in range(BINS))) == list(range(10, 180, 20))
    a, b = torch.rand(2, 9, 4, 4)                          # channels are averaged
    assert glyphs(torch.stack([a, b]), 24).tobytes() == glyphs(((a + b) / 2)[None], 24).tobytes()


def test_hog_draws_a_given_image_and_names_a_broken_one(tmp_path, capsys):
    Image.new("L", (60, 40), 90).save(tmp_path / "grey.png")
    hog.main(["--image", str(tmp_path / "grey.png"), "--out", str(tmp_path / "new/hog.png")])
    with Image.open(tmp_path / "new/hog.png") as picture:
        flat = np.asarray(picture.convert("L"))
        assert flat[70:700, 30 + 2 * 702 + 5:30 + 2 * 702 + 660].min() == 255   # no edge, no stroke
    slope = (np.add.outer(np.arange(224), np.arange(300)) % 60 * 4).astype(np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 3                                     # the camera was held upside down
    Image.fromarray(slope[::-1, ::-1]).save(tmp_path / "turned.png", exif=turned)
    wide = np.asarray(hog.figure(hog.picture(tmp_path / "turned.png")))
    middle = Image.fromarray(slope[:, 38:262]).convert("RGB")
    assert np.array_equal(wide, np.asarray(hog.figure(middle)))
    (tmp_path / "text.png").write_text("hello")
    noise = np.random.default_rng(0).integers(0, 256, (300, 300)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "chunk.png")
    content = (tmp_path / "chunk.png").read_bytes()
    second = content.index(b"IDAT", content.index(b"IDAT") + 4)
    (tmp_path / "chunk.png").write_bytes(content[:second] + b"\0" + content[second + 1:])
    Image.fromarray(np.full((64, 64), 40_000, np.uint16)).save(tmp_path / "deep.png")
    entry = lambda tag, kind, value: struct.pack(">HHI", tag, kind, 1) + value      # of TIFF
    exif = (b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + entry(0x0101, 5, struct.pack(">I", 38))
            + entry(0x0112, 3, b"\0\3\0\0") + b"\0" * 4 + struct.pack(">II", 1, 1))
    Image.new("RGB", (16, 16)).save(tmp_path / "exif.jpg", exif=exif)    # a height of 1 / 1
    for flag, name in (("--image", "text.png"), ("--image", "chunk.png"), ("--image", "deep.png"),
                       ("--image", "exif.jpg"), ("--out", "x.nothing"), ("--image", "none.png")):
        with pytest.raises(SystemExit) as stop:
            hog.main([flag, str(tmp_path / name)])
        told = capsys.readouterr().err
        assert stop.value.code == 2 and told.startswith("error: ")
        assert name in told or flag == "--out"


def test_the_story_of_a_sample_is_that_of_the_equations(monkeypatch):
    """What is written into it comes from the functions themselves."""
    written, whole = [], pll.bars

    def watch(draw, x, y, title, values, names, chosen, note):
        written.append((title, values, chosen, note))
        whole(draw, x, y, title, values, names, chosen, note)

    monkeypatch.setattr(pll, "bars", watch)
    assert pll.story(0.1).size == (1920, 1420)
    titles, values, chosen, notes = zip(*written)
    assert values[2][:3] == pytest.approx([1 / 3] * 3) and sum(values[2]) == pytest.approx(1)
    assert "not more than 0.1: keep" in notes[4] and values[5] == values[2]
    assert "\nmore than 0.1: revise" in notes[7] and values[8] == [0, 1, 0, 0, 0, 0, 0]
    for note in (notes[4], notes[7]):
        v1, v2, lead = map(float, re.search(r"= (.*) - (.*) = (.*)\n", note).groups())
        assert v1 - v2 == pytest.approx(lead, abs=1.1e-3)
    pll.story(0.2)                                       # more than any lead here: nothing fires
    assert "not more than 0.2: keep" in written[-2][3] and written[-1][1] == values[2]


def test_cosines_are_written_and_the_simplex_is_even():
    picture = pll.cosines([("simplex", pll.simplex(4, 8)), ("one", torch.ones(4, 8))], list("abcd"))
    pixels = np.asarray(picture)
    even = {tuple(pixels[95 + 76 * i, 145 + 76 * j]) for i in range(4) for j in range(4) if i != j}
    assert even <= {(169, 169, 255), (170, 170, 255)}   # -1/3: a third of the way to blue
    assert tuple(pixels[95, 145 + 140 + 4 * 76 + 76]) == (255, 0, 0)     # row 0, column 1: a 1


def test_attention_is_red_where_a_label_looks():
    attention = torch.zeros(16)
    attention[[6, 9]] = 0.02                             # rows 1 and 2, columns 2 and 1 of four
    pixels = np.asarray(heat(Image.new("RGB", (40, 40), "white"), attention, 80), int)
    assert pixels[30, 50, 1] < 120 and pixels[50, 30, 1] < 120 and (pixels[70, 70] == 255).all()


def test_pre_training_draws_what_it_predicts(tmp_path, cache):
    flags = [*TINY, *DECODER, "--epochs", "3", "--cache", str(cache), "--picture-every", "2",
             "--out"]
    pretrain.main([*flags, str(tmp_path / "hog")])
    pretrain.main([*flags, str(tmp_path / "pixel"), "--target", "pixel"])
    for target in ("hog", "pixel"):
        names = sorted(p.name for p in (tmp_path / target / "pictures").iterdir())
        assert names == ["epoch-0000.png", "epoch-0002.png", "epoch-0003.png"]
    grid, pixels = 4, 288
    mask = pretrain.draw_masks("random", range(4), grid, 7, 0)[0].reshape(grid, grid)
    for target in ("hog", "pixel"):
        with Image.open(tmp_path / target / "pictures/epoch-0003.png") as picture:
            columns = [np.asarray(picture)[96:96 + pixels, 16 + k * 304:16 + k * 304 + pixels]
                       for k in range(4)]
        for row in range(grid):
            for column in range(grid):
                where = np.s_[row * 72 + 2:row * 72 + 70, column * 72 + 2:column * 72 + 70]
                hidden = bool(mask[row, column])
                assert (columns[1][where] == 215).all() == hidden       # grey where masked
                if not hidden:
                    assert (columns[2][where] == 255).all() and (columns[3][where] == 255).all()
        assert not np.array_equal(columns[2], columns[3])               # target and prediction


class Nothing(torch.nn.Module):
    """A masked model of 16 patches that predicts HOG without any edge."""

    def forward(self, images, mask):
        return torch.zeros(*mask.shape, 108)


def test_the_target_stands_before_the_prediction(tmp_path, cache, monkeypatch, said):
    run, _, _, faces, *_ = given_to_fit(pretrain, DECODER, tmp_path, cache, monkeypatch)
    drawn, whole = [], pretrain.seen_as

    def watch(values, image, *how):
        drawn.append((values, image))
        return whole(values, image, *how)

    monkeypatch.setattr(pretrain, "seen_as", watch)
    sheet = np.asarray(pretrain.reconstruction(run, Nothing(), faces, ""))
    values, shown = (torch.stack(column) for column in zip(*drawn[::2]))     # of the targets
    images = datasets.prepare(faces[range(4)], 16, "toy")
    assert shown.equal(images) and values.equal(pretrain.make_targets(images, "hog", 4))
    masks = pretrain.draw_masks("random", range(4), 4, 7, 0).reshape(4, 4, 4)
    for i, mask in enumerate(masks):                       # each row has its own
        encoder_sees = sheet[96 + 304 * i:384 + 304 * i, 320:608]
        assert np.array_equal((encoder_sees == 215).all(2)[36::72, 36::72], mask)
    assert [text for text, *_ in said][3:5] == ["HOG of masked patches", "predicted HOG"]
    target, predicted = (sheet[97:383, 17 + k * 304:303 + k * 304] for k in (2, 3))
    assert (predicted == 255).all() and not (target == 255).all()


def test_pixels_get_their_mean_and_deviation_back(cache):
    faces = load_faces("toy", None, "val", 16, cache=cache)
    image = evaluate.normalise(evaluate.resize(faces[[3]], 16), DATA["toy"])
    drawn = pretrain.seen_as(pretrain.make_targets(image, "pixel", 4)[0], image[0],
                             dict(patch_size=4, target="pixel", data="toy"), 16)
    difference = np.asarray(drawn, float) - np.asarray(to_picture(image[0], "toy"), float)
    assert abs(difference).max() <= 1


def test_a_picture_undoes_the_normalisation(cache):
    faces = load_faces("toy", None, "val", 16, cache=cache)
    x = evaluate.normalise(evaluate.resize(faces[[3]], 16), DATA["toy"])[0]
    assert np.array_equal(np.asarray(to_picture(x, "toy")), faces[[3]][0].permute(1, 2, 0).numpy())


def test_evaluation_draws_all_its_pictures(trained, cache, tmp_path, capsys, monkeypatch, said):
    shutil.copytree(trained, tmp_path / "run")
    shown, given, whole = {}, {}, evaluate.attention_of

    def cosines(pairs, names, tau):
        shown.update(pairs, tau=tau)
        return pll.cosines(pairs, names, tau)

    def attention_of(model, run, state, images, titles):
        given.update(images=images, titles=titles)
        return whole(model, run, state, images, titles)

    monkeypatch.setattr(evaluate, "cosines", cosines)
    monkeypatch.setattr(evaluate, "attention_of", attention_of)
    evaluate.main([str(tmp_path / "run")])
    text = capsys.readouterr().out
    faces = load_faces("toy", None, "test", 16, cache=cache)            # the first of each label
    assert given["images"].equal(faces[[faces.labels.tolist().index(k) for k in range(7)]])
    assert [title[0] for title in given["titles"]] == [f"voted {c}" for c in DATA["toy"]["classes"]]
    assert shown["after"].equal(read_state(trained)["model"]["head.queries"])
    begun = given_to_fit(train, ["--init", "none"], tmp_path / "new", cache, monkeypatch)[1]
    assert shown["before"].equal(begun.head.queries) and shown["tau"] == 0.25
    drawn = {p.stem for p in (tmp_path / "run/pictures").iterdir()}
    assert drawn - {"locked-in"} == {"confusion-test", "curves", "reliability-test",
                                     "attention-test", "queries", "disambiguation"}
    assert all(name in text.splitlines()[-1] for name in drawn)
    kept = json.loads((tmp_path / "run/test.json").read_text())
    assert ("locked-in" in drawn) == (kept["locked_in"] > 0)
    assert f"accuracy             {kept['accuracy']:7.2%}" in text
    calibration = f"reliability, ECE {kept['vote_calibration_error']:.1%}"
    assert calibration in [text for text, *_ in said]


def test_locked_in_are_faces_of_which_the_network_says_the_vote_and_c_another_label(monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluate, "disambiguation", lambda faces, *rows: drawn.append(
        [faces.names, *(x.tolist() for x in rows[:3])]))
    faces = faces_with([2, 0, 0, 1, 0])
    c = torch.tensor([[0, 1.0, 0], [0, 1, 0], [1, 0, 0], [0.5, 0.5, 0], [0, 1, 0]])
    sets = torch.tensor([[0, 1, 0], [1, 1, 0], [1, 1, 0], [1, 1, 0], [1, 1, 0]], dtype=torch.bool)
    state, said = {"candidates": sets, "confidence": c, "classes": "abc"}, [2, 1, 0, 1, 0]
    evaluate.disambiguated(state, faces, torch.tensor(said))
    assert drawn == [[[faces.names[i] for i in rows],
                      *(x[rows].tolist() for x in (sets, c, torch.tensor(said)))]
                     for rows in ([1, 2, 3, 4], [4])]    # large sets; said, voted: 0, C says 1
    assert list(evaluate.disambiguated(state, faces, torch.tensor([2, 1, 0, 1, 1]))) == [
        "disambiguation"]                            # nothing is locked in


def test_a_run_without_weights_is_compared_by_its_kept_result(trained, cache, tmp_path, capsys,
                                                              monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "run", ignore=shutil.ignore_patterns("val.json"))
    evaluate.main(["run", "--markdown"])
    with_weights = capsys.readouterr().out
    (tmp_path / "run/last.pt").unlink()
    evaluate.main(["run", "--markdown"])
    assert capsys.readouterr().out == with_weights
    assert error_of(evaluate, ["run", "--split", "val"], capsys) == (
        "error: run/last.pt: no weights are there; what was measured is shown by: python "
        "evaluate.py run --split test\n")


@pytest.mark.parametrize("file, content", [("config.json", None), ("log.jsonl", "{"),
                                           ("test.json", "[1"), ("log.jsonl", "")])
def test_a_broken_published_run_is_one_line(file, content, trained, tmp_path):
    for name in ("config.json", "log.jsonl"):
        shutil.copy(trained / name, tmp_path / name)
    (tmp_path / "test.json").write_text("{}")
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(evaluate.InputError, match="must be whole|holds no epoch"):
        evaluate.evaluate(tmp_path, "test", {})


def test_a_checkpoint_named_by_file_is_not_mistaken_for_its_folder(trained, tmp_path, capsys):
    (tmp_path / "test.json").write_text('{"accuracy": 9}')
    shutil.copy(trained / "last.pt", tmp_path / "model.pt")
    evaluate.main([str(tmp_path / "model.pt"), "--json"])
    assert json.loads(capsys.readouterr().out)["faces"] == 1000
    assert (tmp_path / "test.json").read_text() == '{"accuracy": 9}'      # and nothing is written
    shutil.copy(trained / "last.pt", tmp_path / "last.pt")                # now it is made anew
    evaluate.main([str(tmp_path), "--json"])
    assert json.loads((tmp_path / "test.json").read_text())["faces"] == 1000
    evaluate.main([str(tmp_path)])
    (tmp_path / "pictures/confusion-test.png").write_text("of last.pt")
    evaluate.main([str(tmp_path / "model.pt")])
    assert f"pictures: {tmp_path}/pictures-model (confusion-test, " in capsys.readouterr().out
    assert (tmp_path / "pictures/confusion-test.png").read_text() == "of last.pt"


def test_where_the_data_lie_now_takes_the_place_of_what_the_run_had(monkeypatch):
    class Asked(Exception):
        """What `evaluate` was given."""

    def ask(path, split, overrides):
        raise Asked(path, split, overrides)
    monkeypatch.setattr(evaluate, "evaluate", ask)
    with pytest.raises(Asked) as asked:
        evaluate.main("RUN --split val --data-dir D --partial --cache C --device cpu".split())
    assert asked.value.args == ("RUN", "val", dict(data_dir="D", partial=True, cache="C",
                                                   device="cpu", deterministic=False, accumulate=1))
    with pytest.raises(Asked) as asked:
        evaluate.main(["RUN"])                                            # as in training
    assert asked.value.args[2].keys() == {"device", "deterministic", "accumulate"}


def test_a_legend_stands_beneath_a_picture_and_inside_its_width():
    for width in (180, 1200):
        below = np.asarray(hog.footnote(Image.new("RGB", (width, 50), "teal"), "red: one, " * 20))
        assert (below[:50] == (0, 128, 128)).all() and (below[50:58] == 255).all()
        inked = (below[50:] < 128).all(-1)
        assert inked.any() and not inked[-4:].any() and not inked[:, -4:].any()


def test_labels_that_were_given_up_are_struck_through(cache):
    faces = load_faces("toy", None, "val", 16, cache=cache).subset(torch.tensor([0]))
    candidates = torch.tensor([[True, True, False, True, False, False, False]])
    soft = pll.initial_confidence(candidates)
    hard = pll.revise(soft, torch.tensor([[0.0, 9, 0, 0, 0, 0, 0]]), 0.1)

    def struck(confidence):
        picture = evaluate.disambiguation(faces, candidates, confidence, [1],
                                          DATA["toy"]["classes"])
        red = (np.asarray(picture)[250:] == (178, 34, 34)).all(-1).any(1)    # rows with red
        return [int(row) for row in np.flatnonzero(red[1:] & ~red[:-1])]
    assert struck(soft) == [] and len(struck(hard)) == 2
    assert struck(hard)[1] - struck(hard)[0] == 2 * 28                   # the first and the third


def test_each_face_has_its_own_labels_and_answer(cache, said):
    faces = load_faces("toy", None, "val", 16, cache=cache).subset(torch.tensor([0, 1]))
    faces.labels = torch.tensor([2, 3])
    start = torch.tensor([[0.5, 0.5, 0, 0, 0, 0, 0]] * 2)
    confidence = torch.stack([start[0], torch.eye(7)[0]])                # the second gave up b
    sheet = np.asarray(evaluate.disambiguation(faces, start > 0, confidence, [4, 5], "abcdefg"))
    assert [text for text, *_ in said if ": " in text][:4] == [
        "voted: c", "predicted: e", "voted: d", "predicted: f"]
    assert [(text, at[0]) for text, at, ink in said if ink == "grey"] == [("b", 288)]
    assert not np.array_equal(sheet[20:220, 20:220], sheet[20:220, 280:480])


def test_the_reliability_picture_has_probabilities_across_and_shares_up(said):
    picture = evaluate.reliability_picture(torch.tensor([[0.9, 0.1]]).log(),
                                           torch.tensor([[2.0, 8]]))
    assert said[0][0] == "reliability, ECE 70.0%"
    assert picture.getpixel((110 + 540, 70 + 480 - 15)) == (70, 130, 180)     # in the dot


def test_reliability_bins_hold_all_faces_and_their_sums():
    torch.manual_seed(0)
    logits, votes = torch.randn(200, 7) * 2, torch.randint(0, 5, (200, 7)).float() + 0.1
    count, probability, share = evaluate.reliability(logits, votes)
    assert count.sum() == 200
    top = logits.softmax(1).max(1).values
    assert probability.sum().item() == pytest.approx(top.sum().item(), rel=1e-5)
    agree = (votes / votes.sum(1, keepdim=True))[range(200), logits.argmax(1)]
    assert share.sum().item() == pytest.approx(agree.sum().item(), rel=1e-5)
    inside = probability / count.clamp(min=1) * 15
    assert all(k - 1e-4 <= v <= k + 1 for k, v in enumerate(inside.tolist()) if count[k])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, cache):
    """Five faces of the toy's validation split as files, and a broken one."""
    folder = tmp_path_factory.mktemp("pictures")
    faces = load_faces("toy", None, "val", 16, cache=cache)
    (folder / "more").mkdir()
    for i in range(5):
        image = Image.fromarray(faces[[i]][0].permute(1, 2, 0).numpy())
        image.save(folder / ("more" if i > 2 else "") / f"{i}.{'PNG' if i == 4 else 'png'}")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("not a picture by its name")
    (folder / "._0.png").write_bytes(b"what macOS keeps beside a picture")
    return folder


def probabilities(trained, faces):
    model, run, _ = evaluate.load_run(trained, {"device": "cpu"})
    return evaluate.predict(run, model, faces).softmax(1)


def test_a_folder_of_faces_becomes_a_table(trained, cache, pictures, tmp_path):
    done = run_script("evaluate.py", trained, "--folder", pictures, "--csv", tmp_path / "out.csv",
                      status=1)
    assert f"error: {pictures}/broken.png: not a readable image" in done.stderr
    assert "stopped: 1 of 6 pictures could not be read" in done.stderr
    rows = [line.split(",") for line in (tmp_path / "out.csv").read_text().splitlines()]
    assert rows[0] == ["image", "label", "candidates", *DATA["toy"]["classes"]]
    expected = probabilities(trained, load_faces("toy", None, "val", 16, cache=cache))
    assert len(rows) == 6
    for row in rows[1:]:
        shares = expected[int(row[0][-5])]
        assert [float(v) for v in row[3:]] == pytest.approx(shares.tolist(), abs=2e-4)
        assert row[1] == DATA["toy"]["classes"][shares.argmax()]
        assert row[2].split() == [n for n, s in zip(DATA["toy"]["classes"], shares) if s >= 0.1]


def test_a_folder_of_more_pictures_than_a_batch(trained, pictures):
    model, run, state = evaluate.load_run(trained, {"device": "cpu"})
    paths = sorted(pictures.rglob("?.*"))
    found = list(evaluate.recognise(run, model, state, paths, None, batch_size=2))
    assert [path for path, _, _ in found] == paths and len(paths) == 5
    for path, zeta, _ in found:
        [(_, alone, _)] = evaluate.recognise(run, model, state, [path], None)
        assert alone.tolist() == pytest.approx(zeta.tolist(), abs=1e-5)


def test_a_picture_is_given_to_the_network_as_the_faces_of_its_training_were(tmp_path):
    """Grey and of 48 pixels at most for FERPlus, whose faces a larger model is given enlarged."""
    Image.new("RGB", (200, 300), "red").save(tmp_path / "face.png")
    run, seen = pretrain.Run(dict(data="ferplus", image_size=96), 0, 1, CPU), []

    def model(x):
        seen.append(x.shape)
        return torch.zeros(len(x), 8)

    [(_, _, face)] = evaluate.recognise(run, model, DATA["ferplus"], [tmp_path / "face.png"], None)
    assert face.shape == (1, 48, 48) and seen == [(1, 3, 96, 96)]


def test_the_device_of_the_command_line_is_that_of_recognition(monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "load_run", lambda *how: asked.append(how) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate.main("RUN --image x.png --device cpu".split())
    assert asked[0][1]["device"] == "cpu"


def test_landmarks_of_a_path_come_before_those_of_a_name(tmp_path):
    path, near, far = tmp_path / "face.png", TEMPLATE / 7, TEMPLATE / 3
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    read = lambda marks: evaluate.read_face(path, DATA["toy"], 16, marks)
    assert np.array_equal(read({str(path): near, "face.png": far}), read({"face.png": near}))


def test_one_image_in_and_a_label_out(trained, pictures, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    Image.open(pictures / "0.png").convert("L").save(tmp_path / "grey.png")
    evaluate.main([str(tmp_path / "run"), "--image", str(pictures / "0.png"),
                   str(tmp_path / "grey.png")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(pictures / "0.png") and lines[9] == str(tmp_path / "grey.png")
    assert {line.split()[0] for line in lines[1:8]} == set(DATA["toy"]["classes"])
    assert lines[8].startswith("  candidate set: ") and "attention-of-images" in lines[-1]
    assert (tmp_path / "run/pictures/attention-of-images.png").exists()


def test_a_name_that_is_no_text_is_kept_byte_by_byte(trained, pictures, tmp_path):
    """As Linux allows it; here in a place where nothing but ASCII is expected."""
    shutil.copytree(trained, tmp_path / "run")
    name = os.fsencode(tmp_path) + b"/\xc3\xa9\xff.png"
    try:
        shutil.copy(pictures / "0.png", name)
    except OSError:
        pytest.skip("this disk takes no such name")
    ascii_alone = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, ROOT / "evaluate.py", tmp_path / "run", "--image", name, "--csv",
         tmp_path / "out.csv"], capture_output=True,
        env={**os.environ, **ONE_THREAD, **ascii_alone, "PYTHONIOENCODING": "utf-8:strict"})
    assert done.returncode == 0, done.stderr
    assert name in done.stdout and name + b"," in (tmp_path / "out.csv").read_bytes()


def test_mean_and_deviation_come_from_the_checkpoint(trained, pictures, tmp_path, capsys):
    state = read_state(trained)
    torch.save({**state, "mean": [0.0, 0.0, 0.0]}, tmp_path / "last.pt")
    for folder in (trained, tmp_path):
        evaluate.main([str(folder), "--folder", str(pictures / "more")])
    first, other = capsys.readouterr().out.split("image,label")[1:]
    assert first != other


def test_landmarks_align_a_face(trained, pictures, tmp_path, capsys):
    """A face that was shifted and doubled in size is the same face once its points are known."""
    with Image.open(pictures / "0.png") as face:
        large = Image.new("RGB", (64, 64), "white")
        large.paste(face.resize((32, 32), Image.Resampling.NEAREST), (20, 10))
    large.save(tmp_path / "large.png")
    face.save(tmp_path / "face.png")
    header = "image," + ",".join(f"{a}{i}" for i in range(1, 6) for a in "xy")
    row = lambda name, points: ",".join([name, *(f"{v:.3f}" for v in points.flatten())])
    small_points = TEMPLATE * 16 / 112
    (tmp_path / "points.csv").write_text("\n".join([header, row("face.png", small_points), row(
        "large.png", small_points * 2 + [20, 10])]))
    read = evaluate.read_landmarks(tmp_path / "points.csv")
    side = [evaluate.read_face(tmp_path / name, DATA["toy"], 16, read).astype(int)
            for name in ("face.png", "large.png")]
    assert np.abs(side[0] - side[1]).mean() < 12
    evaluate.main([str(trained), "--folder", str(tmp_path), "--landmarks",
                   str(tmp_path / "points.csv")])
    assert "large.png" in capsys.readouterr().out
    with pytest.raises(pretrain.Stopped, match="1 of 1 pictures could not be read"):
        evaluate.main([str(trained), "--image", str(pictures / "0.png"), "--landmarks",
                       str(tmp_path / "points.csv")])
    assert "not in the file of --landmarks; add a row" in capsys.readouterr().err
    for points, message in ((np.ones(10), ", row 2: five times the same point; correct the row"),
                            (np.full(10, 1e9), "is not a number from")):
        (tmp_path / "wrong.csv").write_text("\n".join([header, row("face.png", points)]))
        with pytest.raises(InputError, match=message):
            evaluate.read_landmarks(tmp_path / "wrong.csv")
    twice = [header, row("face.png", small_points), row("face.png", small_points)]
    (tmp_path / "wrong.csv").write_text("\n".join(twice))
    with pytest.raises(InputError, match="row 3: face.png is listed twice; remove one row"):
        evaluate.read_landmarks(tmp_path / "wrong.csv")


def test_a_picture_that_no_library_can_take_does_not_end_the_others(trained, tmp_path, capsys):
    """A damaged note of the camera, and points of which no face can be made."""
    for name, more in (("a.jpg", {}), ("b.jpg", {"exif": b"Exif\0\0XXXXjunk"}), ("c.jpg", {})):
        Image.new("RGB", (40, 40), "grey").save(tmp_path / name, **more)
    points = {"a.jpg": np.arange(10.0), "b.jpg": np.arange(10.0), "c.jpg": np.zeros(10)}
    points["c.jpg"][0] = 1e-300                            # five points, but no size
    (tmp_path / "points.csv").write_text("\n".join([
        "image," + ",".join(f"{axis}{i}" for i in range(1, 6) for axis in "xy"),
        *(",".join([name, *map(repr, map(float, at))]) for name, at in points.items())]))
    for more, failed in ([], 1), (["--landmarks", str(tmp_path / "points.csv")], 2):
        with pytest.raises(pretrain.Stopped, match=f"{failed} of 3 pictures could not be read"):
            evaluate.main([str(trained), "--folder", str(tmp_path), *more])
        out, error = capsys.readouterr()
        assert "b.jpg: its EXIF data are damaged (" in error and error.count("error: ") == failed
        assert sum(line.startswith(str(tmp_path)) for line in out.splitlines()) == 3 - failed
    assert "c.jpg: its points are not of a face (five times the same point); correct" in error


@pytest.mark.parametrize("flags, message", [
    (["--folder", "nowhere"], "--folder nowhere: no such folder"),
    (["--folder", str(ROOT / ".ci")], "holds no picture"),
    (["--image", "x.png", "--landmarks", "none.csv"], "none.csv: not a readable csv file"),
    (["--folder", "PICTURES", "--csv", "/dev/null/x"], "--csv /dev/null/x: cannot be written")])
def test_wrong_input_is_one_line(flags, message, trained, pictures, capsys):
    flags = [str(pictures / "more") if flag == "PICTURES" else flag for flag in flags]
    with pytest.raises(SystemExit) as stop:
        pretrain.command_line(lambda: evaluate.main([str(trained), *flags]))
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_csv_that_cannot_be_written_is_said_before_a_face_is_read(trained, pictures, tmp_path,
                                                                    monkeypatch):
    read = []
    monkeypatch.setattr(evaluate, "read_face", lambda *args: read.append(args))
    with pytest.raises(InputError, match="--csv /dev/null/x: cannot be written"):
        evaluate.main([str(trained), "--folder", str(pictures), "--csv", "/dev/null/x"])
    assert not read
    (tmp_path / "old.csv").write_text("what stood there")
    monkeypatch.setattr(evaluate, "read_face", torch.cat)              # fails
    with pytest.raises(TypeError):
        evaluate.main([str(trained), "--folder", str(pictures), "--csv", str(tmp_path / "old.csv")])
    assert (tmp_path / "old.csv").read_text() == "what stood there"


def test_curves_of_several_runs_have_a_colour_each(trained, method_run):
    logs = [("ours", evaluate.load_run(trained, {"device": "cpu"})[2]["log"]),
            ("decoder", evaluate.load_run(method_run("decoder"), {"device": "cpu"})[2]["log"])]
    pixels = np.asarray(evaluate.curves(logs))
    for colour in ((178, 34, 34), (70, 130, 180)):       # firebrick, steelblue
        assert (pixels == colour).all(-1).sum() > 200


def test_a_comparison_draws_the_curves_of_its_runs(trained, method_run, tmp_path, capsys,
                                                   monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluate.main([str(trained), str(method_run("decoder"))])
    assert capsys.readouterr().out.splitlines()[-1] == "pictures: runs/pictures (curves)"
    assert (tmp_path / "runs/pictures/curves.png").exists()


def test_a_method_without_label_queries_has_pictures_too(method_run, cache, capsys):
    evaluate.main([str(method_run("pico")), "--split", "val"])
    assert "confusion-val, curves, reliability-val)" in capsys.readouterr().out


def test_the_rows_of_drawn_matrices_are_voted_labels(monkeypatch, said):
    sheet, drawn, written = Image.new("RGB", (130, 130)), [], []
    pll.draw_matrix(ImageDraw.Draw(sheet), 0, 0, [[0, 1], [0, 0]], [[5, 6], [7, 8]], "ab", "{}")
    assert sheet.getpixel((65, 3)) == (0, 0, 255) and sheet.getpixel((3, 65)) == (255, 255, 255)
    assert [(text, at) for text, at, _ in said if text.isdigit()] == [
        ("5", (31, 31)), ("6", (93, 31)), ("7", (31, 93)), ("8", (93, 93))]
    for module in (evaluate, datasets):
        monkeypatch.setattr(module, "draw_matrix", lambda *how: (drawn.append(how[3]),
                                                                 written.append(how[4])))
    said.clear()
    evaluate.confusion_picture(dict(confusion=[[3, 1], [0, 2]], accuracy=0.12,
                                    mean_class_accuracy=0.34), "ab")
    assert said[0][0] == "accuracy 12.0%, mean class 34.0%"
    assert written[0].tolist() == [[3, 1], [0, 2]]
    votes = [[6, 4, 0, 0, 0, 0, 0], [8, 2, 0, 0, 0, 0, 0], [0, 10, 0, 0, 0, 0, 0]]
    datasets.statistics("toy", {"train": datasets.Listing(list("abc"), [0, 0, 1], None, votes)})
    assert drawn[0].tolist() == [[0.75, 0.25], [0, 1]]
    assert drawn[1][:2, :2] == pytest.approx(np.array([[0.7, 0.3], [0, 1]]))


def test_curves_are_of_the_labels_loss_and_the_accuracies(monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluate, "chart", lambda draw, x, y, title, series: drawn.append(series))
    log = [dict(loss=9, pll=i, trivial=5, train_accuracy=0.1 * i, val_accuracy=0.2 * i,
                val_mean_class=0.3 * i) for i in (1, 2)]
    evaluate.curves([("", log)])
    evaluate.curves([("one", log), ("two", log)])
    values = [[v for _, _, v in series] for series in drawn]
    assert values[0] == [[1, 2], [5, 5]] and values[2] == [[1, 2], [1, 2]]
    assert values[1] == [[0.1, 0.2], [0.2, 0.4], [0.3, 0.6]] and values[3] == [[0.2, 0.4]] * 2
    shorter = [{k: v for k, v in record.items() if not k.startswith("val")} for record in log]
    evaluate.curves([("one", shorter), ("two", log)])      # what both have
    assert [v for _, _, v in drawn[-1]] == [[0.1, 0.2]] * 2


def test_the_axes_of_a_chart_count_upwards_and_from_the_first_epoch(said):
    draw = ImageDraw.Draw(Image.new("RGB", (900, 600)))
    evaluate.chart(draw, 0, 0, "t", [("a", "red", [0.0, 2.0, 1.0])])
    ticks = sorted((at[1], -float(text)) for text, at, _ in said if "." in text)
    assert len(ticks) == 5 and ticks == sorted(ticks, key=lambda tick: tick[1])
    assert [text for text, *_ in said if text.isdigit()] == ["1", "2", "3"]


def test_a_picture_of_your_own_is_turned_upright_and_cut_to_its_middle_square(tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (16, 30, 3)).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "wide.png")
    turned = Image.Exif()
    turned[0x0112] = 3                                     # the camera was held upside down
    Image.fromarray(values[::-1, ::-1]).save(tmp_path / "turned.png", exif=turned)
    for name in ("wide.png", "turned.png"):
        read = evaluate.read_face(tmp_path / name, DATA["toy"], 16, None)
        assert np.array_equal(read.transpose(1, 2, 0), values[:, 7:23])
    tall = values.transpose(1, 0, 2)                       # (30, 16, 3)
    cut = datasets.to_array(Image.fromarray(tall), 16)
    assert np.array_equal(cut.transpose(1, 2, 0), tall[7:23])


def test_your_own_data_set_is_turned_upright_as_your_pictures_are(tmp_path, monkeypatch):
    monkeypatch.setitem(DATA["own"], "classes", ["joy", "grief"])
    values = np.random.default_rng(0).integers(0, 255, (16, 16, 3)).astype(np.uint8)
    held = Image.Exif()
    held[0x0112] = 6                                       # the camera lay on its side
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray(np.rot90(values)).save(tmp_path / "b.png", exif=held)
    (tmp_path / "train.csv").write_text("image,joy,grief\na.png,1,0\nb.png,1,0\n")
    faces = load_faces("own", tmp_path, "train", 16, cache=tmp_path / "cache")
    assert np.array_equal(faces[[0]][0].permute(1, 2, 0), values)
    assert faces[[1]].equal(faces[[0]])


def test_no_more_curves_are_drawn_than_there_are_colours(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    kept = sorted((ROOT / "tests/results/toy").glob("*-0"))
    evaluate.main([*map(str, kept[:8])])
    assert capsys.readouterr().out.endswith("\npictures: runs/pictures (curves)\n")
    first = np.asarray(Image.open("runs/pictures/curves.png"))
    evaluate.main([*map(str, kept[:9])])
    assert capsys.readouterr().out.endswith("(curves); of the first 8 runs\n")
    assert np.array_equal(np.asarray(Image.open("runs/pictures/curves.png")), first)
