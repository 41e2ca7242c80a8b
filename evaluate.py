"""Measure a trained recogniser, and compare several in tables like the paper's.

Paper: Sec. 4 (the accuracy of its tables). The class is the argmax of the decoder's logits.

    symbol  name       shape    meaning
    n, K    len, classes        faces of the split, number of labels
            logits     (n, K)   of the last epoch's model; no epoch is chosen by its accuracy here
    y       labels     (n,)     the voted label
            shares     (n, K)   the share of the votes that each class got
            confusion  (K, K)   faces of a class (row) that were given a label (column)
    zeta               (K,)     probabilities, the softmax of a face's logits

Run:  python evaluate.py                                   (the toy's test split)
      python evaluate.py runs/train-ferplus --split val --data-dir DIR --json
      python evaluate.py RUN RUN ... --markdown            (a table, runs that differ in the seed
                                                            as one row with mean and deviation)
      python evaluate.py RUN --image FACE [FACE ...]       (what is on these pictures)
      python evaluate.py RUN --folder DIR --csv OUT
"""
import argparse
import csv
import json
import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from datasets import (DATA, InputError, align, as_picture, normalise, number, once, read_csv,
                      read_upright, resize, to_array)
from decoder import attention_picture
from hog import footnote
from pll import (candidates_from_votes, cosines, draw_matrix, initial_confidence, is_one_hot,
                 pll_loss, simplex)
from pretrain import (FREE, Stopped, autocast, command_line, load_checkpoint, load_split,
                      load_weights, replace_file, same_faces, say, start)
from train import METHODS, SETTINGS, accuracies, build_model, parse, predict, training_faces


# What the paper reports, in per cent (Tables 1 to 4); nothing here was measured by this code.
PAPER = {
    "ours": dict(raf=92.05, ferplus=91.11, affectnet7=67.11, affectnet8=64.12),
    "baseline": dict(raf=88.36, ferplus=88.18, affectnet7=64.61, affectnet8=61.34),
    "rc": dict(raf=88.92, ferplus=88.53, affectnet7=64.87, affectnet8=61.63),
    "lw": dict(raf=88.70, ferplus=88.10, affectnet7=64.53, affectnet8=61.46),
    "pico": dict(raf=88.53, ferplus=87.93, affectnet7=64.35, affectnet8=61.38),
    "resnet18-pll": dict(raf=89.67, ferplus=89.80, affectnet8=62.89),
    "mim-pixel": dict(raf=89.64, affectnet7=65.25),
    "mim-hog": dict(raf=89.85, affectnet7=65.31),
    "mim-pixel-pll": dict(raf=90.09, affectnet7=65.97),
    "mim-hog-pll": dict(raf=90.35, affectnet7=66.12),
    "decoder": dict(raf=91.29, affectnet7=66.67),
    "decoder-uniform": dict(raf=91.64, affectnet7=66.90),
    "decoder-revision": dict(raf=91.89, affectnet7=66.93),
}
# What config.json says, beside FREE, in which two runs of one row may differ.
ABOUT = ("command", "commit", "processes", "threads", "python", "torch", "torchvision", "earlier",
         "deterministic", "accumulate", "compile")
# Columns of the comparison: key of a result, heading; all but NLL in per cent.
COLUMNS = {"held_out_accuracy": "held out", "accuracy": "accuracy",
           "mean_class_accuracy": "mean class", "inside_candidate_set": "in set", "vote_nll": "NLL",
           "vote_calibration_error": "ECE", "accuracy_without_duplicates": "no dupl.",
           "accuracy_on_truth": "truth", "disputed_accuracy": "disputed"}
# Columns of the second table: what became of the candidate sets of the training faces.
BECAME = {"revised": "revised", "revised_as_voted": "as voted", "trivial_as_voted": "trivial",
          "revised_as_true": "as drawn", "locked_in": "locked in",
          "disputed_revised": "disputed: revised", "disputed_as_voted": "disputed: as voted",
          "disputed_as_true": "disputed: as drawn",
          "disputed_network_as_voted": "disputed: network as voted",
          "disputed_network_as_true": "disputed: network as drawn"}


def reliability(logits, votes, bins=15):
    """Faces by the probability of the predicted class: (count, probability, share), (bins,) each.

    For each bin the number of faces, the sum of these probabilities, and the sum of the shares of
    the votes that the predicted classes got (Guo et al. 2017, with vote shares for hits).
    """
    shares = votes / votes.sum(dim=1, keepdim=True)                        # (n, K)
    top, predicted = logits.float().softmax(dim=1).max(dim=1)              # (n,)
    agree = shares.gather(1, predicted[:, None]).squeeze(1)                # (n,)
    add = lambda values: torch.histogram(top, bins, range=(0.0, 1.0), weight=values).hist  # (bins,)
    return add(torch.ones_like(top)), add(top), add(agree)


def crowd(faces, classes):
    """The votes (n, K); one for the label where they are not known."""
    return F.one_hot(faces.labels, classes).float() if faces.votes is None else faces.votes


def vote_metrics(logits, votes):
    """How well the softmax matches the crowd: (NLL, ECE) against the vote shares; (n, K) each.

    NLL: the mean over faces of -sum of share * log probability, in nats. ECE: the mean over faces
    of |mean probability - mean share| of their bin in `reliability`.
    """
    shares = votes / votes.sum(dim=1, keepdim=True)
    _, probability, share = reliability(logits, votes)
    return (pll_loss(logits, shares).item(),
            (probability - share).abs().sum().item() / len(logits))


def not_in(faces, others):
    """Faces whose pixels stand nowhere in `others`: (n,) bool."""
    known = {others[[i]].numpy().tobytes() for i in range(len(others))}
    return torch.tensor([faces[[i]].numpy().tobytes() not in known for i in range(len(faces))])


def disputed(votes):
    """Faces on which fewer than half of the votes agree: (n, K) -> (n,) bool."""
    return votes.max(dim=1).values < votes.sum(dim=1) / 2


def reduced_wrongly(faces, candidates, confidence):
    """Training faces whose several candidates became one that is not the voted label, (n,) bool."""
    return (candidates.sum(dim=1) > 1) & is_one_hot(confidence) \
        & (confidence.argmax(dim=1) != faces.labels)


def became(faces, candidates, confidence, predicted):
    """Does disambiguation disambiguate? What became of the training faces; shares are 0 .. 1.

    candidates, confidence (n, K), predicted (n,), the network's answers to the faces as they are.
    `trivial_as_voted`: of the reduced sets, those that would be as voted, had each become its most
        frequent candidate (by the mean over faces of Y / |Y|);
    `locked_in`: of the sets reduced to another label than the voted one, for good by Eq. (5),
        those for which the network predicts the voted label by now;
    `usual_error`, `usual_error_share`: the class that most of these became, and how many did;
    `disputed_faces`: those with several candidates on which fewer than half of the votes agree;
    `disputed_revised`: of these, the ones whose set was reduced;
    `disputed_as_voted`, `disputed_network_as_voted`: of those in turn, the ones for which C and
        the network have the voted label; on the toy also `..._as_true`, the drawn class.
    A share of no faces is left out.
    """
    label, reduced = confidence.argmax(dim=1), is_one_hot(confidence)      # (n,)
    several, wrong = candidates.sum(dim=1) > 1, reduced_wrongly(faces, candidates, confidence)
    usual = (candidates * initial_confidence(candidates).mean(dim=0)).argmax(dim=1)        # (n,)
    found, hits = {}, {"trivial_as_voted": (usual == faces.labels)[several & reduced],
                       "locked_in": (predicted == faces.labels)[wrong]}
    if wrong.any():
        counts = label[wrong].bincount()                                   # (up to K,)
        found.update(usual_error=int(counts.argmax()),
                     usual_error_share=counts.max().item() / counts.sum().item())
    if faces.votes is not None:
        few = several & disputed(faces.votes)
        found["disputed_faces"], hits["disputed_revised"] = int(few.sum()), reduced[few]
        for name, right in (("voted", faces.labels), ("true", faces.truth)):
            if right is not None:
                hits[f"disputed_as_{name}"] = (label == right)[few & reduced]
                hits[f"disputed_network_as_{name}"] = (predicted == right)[few & reduced]
    return {**found, **{k: v.float().mean().item() for k, v in hits.items() if len(v)}}


def measure(logits, faces, classes, new=None):
    """All that is reported of a split, as plain numbers in a dict; logits (n, K) on the CPU.

    `new` (n,) bool marks faces that do not also stand in the training set.
    """
    predicted, labels, K = logits.argmax(dim=1), faces.labels, len(classes)
    # (K, K); row: voted label, column: prediction.
    confusion = torch.bincount(labels * K + predicted, minlength=K * K).reshape(K, K)
    right, voted, said = confusion.diag(), confusion.sum(1), confusion.sum(0)   # counts, (K,) each
    accuracy, mean_class = accuracies(predicted, labels)
    result = {
        "faces": len(faces), "accuracy": accuracy, "mean_class_accuracy": mean_class,
        "majority_class_rate": voted.max().item() / len(faces),
        "per_class": {name: {"faces": int(v), "recall": (r / v).item() if v else None,
                             "precision": (r / s).item() if s else None}
                      for name, r, v, s in zip(classes, right, voted, said)},
        "confusion": confusion.tolist()}
    if faces.votes is not None:
        candidates = candidates_from_votes(faces.votes)                    # (n, K)
        inside = candidates.gather(1, predicted[:, None]).float().mean()
        result["inside_candidate_set"] = inside.item()
        few = disputed(faces.votes)
        if few.any():
            result["disputed_accuracy"] = (predicted == labels)[few].float().mean().item()
    result["vote_nll"], result["vote_calibration_error"] = vote_metrics(logits, crowd(faces, K))
    if new is not None:
        result["duplicates"] = int((~new).sum())
        if new.any():
            result["accuracy_without_duplicates"] = (predicted == labels)[new].float().mean().item()
    if faces.truth is not None:
        result["accuracy_on_truth"] = (predicted == faces.truth).float().mean().item()
        result["crowd_on_truth"] = (labels == faces.truth).float().mean().item()
    return result


# The text of a result: a key, and the line that is printed if the result has it.
TEXT = (
    ("accuracy", "accuracy             {accuracy:7.2%}   of {faces} faces"),
    ("accuracy", "mean class accuracy  {mean_class_accuracy:7.2%}"),
    ("accuracy", "majority class rate  {majority_class_rate:7.2%}   (the trivial answer)"),
    ("held_out_accuracy", "held-out faces       {held_out_accuracy:7.2%}   (kept out of training "
     "by --val)"),
    ("inside_candidate_set", "inside candidate set {inside_candidate_set:7.2%}"),
    ("vote_nll", "{whose}: NLL           {vote_nll:7.3f}   ECE {vote_calibration_error:.2%}"),
    ("accuracy_without_duplicates", "without duplicates   {accuracy_without_duplicates:7.2%}   "
     "({duplicates} faces also stand in the training set)"),
    ("accuracy_on_truth", "accuracy on truth    {accuracy_on_truth:7.2%}   (the crowd's label: "
     "{crowd_on_truth:.2%})"),
    ("disputed_accuracy", "on disputed faces    {disputed_accuracy:7.2%}   (fewer than half of the "
     "votes agree)"),
    ("revised", "{sets:20s} {revised:7.2%}   {agree}"),
    ("trivial_as_voted", "trivial revision     {trivial_as_voted:7.2%}   as voted, had each of "
     "them become its most frequent candidate"),
    ("locked_in", "locked in            {locked_in:7.2%}   of those not as voted: the network now "
     "says the voted label"),
    ("usual_error", "{made:20s} {usual_error_share:7.2%}   of those not as voted, more than any "
     "other class"),
    ("disputed_as_voted", "disputed in training {disputed_revised:7.2%}   of {disputed_faces} are "
     "revised, {disputed_as_voted:.2%} of these as voted"),
)


def as_text(result, classes, revises):
    """The result as lines for a terminal; revises: of a run that reduces sets (Eq. 5)."""
    sets, whose, *how = ("revised in training", "of its faces", "as voted", "as drawn") \
        if revises else ("several candidates", "of the training faces",
                         "with the voted label first in C", "with the drawn one")
    agree = [f"{result[key]:.2%} {text}" for key, text in
             zip(("revised_as_voted", "revised_as_true"), how) if key in result]
    told = {**result, "sets": sets, "agree": ", ".join([whose, *agree]),
            "made": f"made {classes[result.get('usual_error', 0)]}",
            "whose": "votes" if "inside_candidate_set" in result else "label"}
    lines = [line.format(**told) for key, line in TEXT if key in result]
    percent = lambda v: "-" if v is None else f"{v:.1%}"
    lines += ["", f"{'class':12s} {'faces':>6s} {'recall':>8s} {'precision':>10s}"]
    lines += [f"{name:12s} {row['faces']:6d} {percent(row['recall']):>8s} "
              f"{percent(row['precision']):>10s}" for name, row in result["per_class"].items()]
    lines += ["", f"{'voted / predicted':18s}" + "".join(f"{name[:7]:>8s}" for name in classes)]
    lines += [f"{name:18s}" + "".join(f"{count:8d}" for count in row)
              for name, row in zip(classes, result["confusion"])]
    return "\n".join(lines)


def load_run(path, overrides):
    """A trained model, its `Run` and its checkpoint; path is a run folder or a checkpoint."""
    path = Path(path)
    path = path / "last.pt" if path.is_dir() else path
    if not path.exists():
        kept = [split for split in ("val", "test") if path.with_name(f"{split}.json").exists()]
        raise InputError(f"{path}: no such run; make it with: python train.py" if not kept else
                         f"{path}: no weights are there; what was measured is shown by: python "
                         f"evaluate.py {path.parent} --split {kept[0]}")
    state = load_checkpoint(path, "train")
    config = {**state["config"], **overrides, "out": str(path.parent)}
    known_to_this_code(path, config)
    if config["data"] == "own":
        DATA["own"]["classes"] = state["classes"]
    if state["classes"] != DATA[config["data"]]["classes"]:
        raise InputError(f"{path}: trained on the classes {', '.join(state['classes'])}")
    if not state["log"]:
        raise InputError(f"{path}: stopped within its first epoch; go on with train.py --resume")
    run = start(config)
    try:
        model = build_model(config)
    except KeyError as error:
        if error.args[0] not in SETTINGS:
            raise
        raise InputError(f"{path}: is older than the setting {error}; evaluate it with the code of "
                         "its commit (config.json)") from None
    load_weights(model, state["model"], path)
    return model.to(run.device).eval(), run, state


def evaluate(path, split, overrides):
    """One run on one split: (result as a dict, its settings, log, and a function for pictures).

    A run folder without weights (a published result) is taken at the word of its SPLIT.json, and
    has None for a function.
    """
    kept = Path(path) / f"{split}.json"
    if kept.exists() and not (Path(path) / "last.pt").exists():
        return stored(Path(path), kept)
    model, run, state = load_run(path, overrides)
    data, classes = run.config["data"], DATA[run.config["data"]]["classes"]
    faces, new = load_split(run, split), None
    if data == "ferplus":                        # some images stand in Training too
        new = not_in(faces, load_split(run, "train"))
    begin = time.perf_counter()
    logits = predict(run, model, faces).cpu()                              # (n, K)
    speed = round(len(faces) / (time.perf_counter() - begin), 1)
    last = state["log"][-1]
    result = {"run": str(path), "data": data, "split": split, "epoch": last["epoch"],
              "step": state["step"], "images_per_second": speed, "notes": faces.notes,
              **measure(logits, faces, classes, new),
              **{k: v for k, v in last.items() if k.startswith("revised")}}
    if run.config["val"]:                        # of the training set, what choices are made on
        result["held_out_accuracy"] = last["val_accuracy"]
    known = answers = None
    if run.config["revise"]:
        known, _ = training_faces(run)
        same_faces(run, state, known)
        answers = predict(run, model, known).argmax(dim=1).cpu()           # (n,) of training
        result.update(became(known, state["candidates"], state["confidence"], answers))
    return result, run.config, state["log"], lambda: pictures(
        run, model, state, faces, logits, result, known, answers)


def stored(folder, kept):
    """What `evaluate` returns, from the three json files of a published run."""
    try:
        config = json.loads((folder / "config.json").read_text())
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        result = json.loads(kept.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: without last.pt, {kept.name}, config.json and log.jsonl must "
                         f"be whole ({error})") from None
    if not log:
        raise InputError(f"{folder}/log.jsonl: holds no epoch; take another run")
    known_to_this_code(folder / "config.json", config)
    return result, config, log, None


def known_to_this_code(where, config):
    """InputError for a run of a method or a data set that somebody's own code has added."""
    if config.get("method") not in METHODS or config.get("data") not in DATA:
        raise InputError(f"{where}: method {config.get('method')!r}, data {config.get('data')!r}: "
                         "this code has no such row or data set; take the code that trained it")


def keep_result(path, result):
    """SPLIT.json in a run's folder, by the first process; not for a checkpoint named by file."""
    if Path(path).is_dir() and os.environ.get("RANK", "0") == "0":
        text = json.dumps(result, indent=1) + "\n"
        replace_file(Path(path) / f"{result['split']}.json", lambda file: file.write(text.encode()))


def comparable(config):
    """A run's settings without its place, how it was computed (ABOUT), and its seed.

    The seed may also end a part of the path of --init (runs/pretrain-0) or follow "seed" in it.
    """
    same = {k: v for k, v in config.items() if k not in FREE + ABOUT + ("seed",)}
    seed = rf"[-_/]?seed{config['seed']}(?!\d)|[-_/]{config['seed']}(?=/|\.pt$|$)"
    same["init"] = re.sub(seed, "", str(config["init"]))
    return same


def departures(config):
    """Settings in which a run is not what --method alone gives, like ["init none", "lr 0.001"].

    A preset that is not the data's own counts, and so does a setting unknown to this code. Warm-ups
    that keep their share of the epochs, the classes of one's own data, and settings unknown to the
    run's older code, do not.
    """
    flags = ["--method", config["method"], "--data", config["data"], "--scale", config["scale"]]
    alone = parse([*flags, "--epochs", str(config["epochs"])])
    mine, alone = comparable(config), {**comparable(alone), "epochs": parse(flags)["epochs"]}
    usual = "laptop" if config["data"] == "toy" else "paper"
    scale = [f"scale {config['scale']}"] * (config["scale"] != usual)
    return scale + [f"{k} {mine[k]}" for k in {**alone, **mine}      # in the order of the settings
                    if k in mine and k != "classes" and mine[k] != alone.get(k)]


def named_above(rows):
    """Of the settings that each row departs in: those of all rows, and those of most rows.

    The latter only if each other row has another value for it, which it then names: two lists.
    """
    settings = dict.fromkeys(s for row in rows for s in row)
    name = lambda setting: setting.split(" ")[0]
    every = [s for s in settings if all(s in row for row in rows)]
    most = [s for s in settings if s not in every and sum(s in row for row in rows) > len(rows) / 2
            and all(name(s) in map(name, row) for row in rows)]
    return every, most


def comparison(results, markdown, columns=COLUMNS, title=""):
    """Lines of a table: a row for each group of runs that differ in the seed alone.

    results: list of (result, config). Numbers are mean and, for several seeds, standard deviation.
    What all or most rows depart in stands once, in a line above the table, after the title.
    Paths of --init may differ in the run's seed (a pre-training run for each), in nothing else.
    The paper's figure stands beside the paper's row alone, one that departs in nothing. Runs that
    have none of the columns are left out; no line if that leaves none.
    """
    results = [(r, c) for r, c in results if any(key in r for key in columns)]
    if not results:
        return []
    groups = {}
    for result, config in results:
        group = groups.setdefault((config["data"], config["method"], *departures(config)), [])
        if config["seed"] in [other["seed"] for _, other in group]:
            raise InputError(f"{result.get('run')}: a second run of seed {config['seed']} with the "
                             "same settings; name each run once")
        group.append((result, config))
    first = columns is COLUMNS                           # the table that has the paper's figures
    columns = {k: v for k, v in columns.items() if any(k in result for result, _ in results)}
    groups = dict(sorted(groups.items(), key=lambda item: list(METHODS).index(item[0][1])))
    others = [list(key[2:]) for key in groups]           # what each row departs in
    every, most = named_above(others) if len(groups) > 1 else ([], [])
    rows = [["method", "data", "seeds", *columns.values(), "accuracy in the paper"]]
    for group, other in zip(groups.values(), others):
        config, cells = group[0][1], []
        for key in columns:
            scale, digits = (1, 3) if key == "vote_nll" else (100, 1)
            values = scale * torch.tensor([r[key] for r, _ in group if key in r])
            spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.{digits}f}{spread}" if len(values) else "-")
        known = first and not other and group[0][0]["split"] == "test"
        paper = PAPER.get(config["method"], {}).get(config["data"]) if known else None
        name = ", ".join([config["method"]] + [s for s in other if s not in every + most])
        rows.append([name, f"{config['data']} {group[0][0]['split']}",
                     str(len(group)), *cells, "-" if paper is None else f"{paper:.2f}"])
    if {row[-1] for row in rows[1:]} == {"-"}:
        rows = [row[:-1] for row in rows]                # the paper has none of these
    above = [title] * bool(title) + [f"{words}: {', '.join(settings)}" for words, settings in (
        ("every row", every), ("where no other is named", most)) if settings]
    lines = ["; ".join(above), ""] if above else []
    if markdown:
        rows.insert(1, ["---"] * len(rows[0]))
        return lines + ["| " + " | ".join(row) + " |" for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return lines + ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


# ---------------------------------------------------------------------------------------- pictures

COLOURS = ("firebrick", "steelblue", "seagreen", "darkorange", "purple", "black", "deeppink",
           "teal")


def chart(draw, x, y, title, series):
    """A line chart in a box from (x, y); series: [(name, colour, values of epoch 1, 2, ...)]."""
    width, height = 860, 460
    font, flat = ImageFont.load_default, [v for _, _, values in series for v in values]
    low, high, epochs = min(flat), max(flat), max(len(values) for _, _, values in series)
    low, high = low - 0.05 * (high - low), high + 0.05 * (high - low) + 1e-6
    place = lambda k, v: (x + 90 + (width - 110) * k / max(epochs - 1, 1),
                          y + 50 + (height - 100) * (high - v) / (high - low))
    draw.text((x, y), title, "black", font(26))
    for i in range(5):
        value = low + (high - low) * i / 4
        draw.line((*place(0, value), *place(epochs - 1, value)), "gainsboro", 2)
        draw.text((x + 80, place(0, value)[1]), f"{value:.2f}", "black", font(20), "rm")
    for epoch in sorted({round(1 + (epochs - 1) * i / 4) for i in range(5)}):
        draw.text((place(epoch - 1, low)[0], y + height - 42), str(epoch), "black", font(20), "mt")
    draw.text((x + width / 2, y + height - 16), "epoch", "black", font(20), "mt")
    for k, (name, colour, values) in enumerate(series):
        points = [place(i, v) for i, v in enumerate(values)]
        draw.line(points, colour, 4)
        for px, py in points:
            draw.ellipse((px - 4, py - 4, px + 4, py + 4), colour)
        draw.text((x + 90, y + height + 16 + 28 * k), name, colour, font(22))


def curves(logs):
    """Losses and accuracies against epochs; logs: [(name of a run, its log)]: PIL RGB.

    One run: Eq. (2) and its trivial answer, training and validation. Several: a colour a run.
    """
    def lines(of):
        """Series of a chart from [(name, log, key)]."""
        return [(name, COLOURS[k % len(COLOURS)], [record[key] for record in log])
                for k, (name, log, key) in enumerate(of)]

    title, log = "accuracy", logs[0][1]
    if len(logs) == 1:
        left = lines([("the loss of the labels (pll)", log, "pll"),
                      ("the trivial answer", log, "trivial")])
        right = lines((key.replace("_", " "), log, key) for key in
                      ("train_accuracy", "val_accuracy", "val_mean_class") if key in log[0])
    else:
        known = all("val_accuracy" in log[0] for _, log in logs)
        title = "val accuracy" if known else "train accuracy"
        left = lines((name, log, "pll") for name, log in logs)
        right = lines((name, log, title.replace(" ", "_")) for name, log in logs)
    sheet = Image.new("RGB", (1800, 520 + 28 * max(len(left), len(right)) + 20), "white")
    draw = ImageDraw.Draw(sheet)
    chart(draw, 20, 20, "loss of the labels", left)
    chart(draw, 920, 20, title, right)
    return sheet


def confusion_picture(result, classes):
    """The confusion matrix, a row's shares as shades: PIL RGB."""
    counts = np.array(result["confusion"])                                 # (K, K)
    sheet = Image.new("RGB", (260 + 76 * len(classes), 150 + 76 * len(classes)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default
    draw.text((20, 14), f"accuracy {result['accuracy']:.1%}, mean class "
              f"{result['mean_class_accuracy']:.1%}", "black", font(26))
    draw_matrix(draw, 170, 90, counts / counts.sum(1, keepdims=True).clip(1), counts, classes, "{}",
                76)
    draw.text((170, 100 + 76 * len(classes)), "row: voted label, column: prediction", "black",
              font(20))
    return sheet


def reliability_picture(logits, votes):
    """How often the crowd agrees with predictions of a given probability: PIL RGB."""
    count, probability, share = reliability(logits, votes)
    sheet = Image.new("RGB", (760, 860), "white")
    draw, font, side = ImageDraw.Draw(sheet), ImageFont.load_default, 600
    draw.text((20, 14), f"reliability, ECE {vote_metrics(logits, votes)[1]:.1%}", "black", font(26))
    place = lambda p, s: (110 + side * p, 70 + side * (1 - s))
    for i in range(6):
        draw.line((*place(0, i / 5), *place(1, i / 5)), "gainsboro", 2)
        draw.text((100, place(0, i / 5)[1]), f"{i / 5:.1f}", "black", font(20), "rm")
        draw.text((place(i / 5, 0)[0], 80 + side), f"{i / 5:.1f}", "black", font(20), "mt")
    for n, p, s in zip(count.tolist(), probability.tolist(), share.tolist()):
        if n:
            x, y = place(p / n, s / n)
            size = 4 + 40 * (n / count.sum().item()) ** 0.5
            draw.rectangle((x - 9, y, x + 9, 70 + side), "lightsteelblue")
            draw.ellipse((x - size / 2, y - size / 2, x + size / 2, y + size / 2), "steelblue")
    draw.line((*place(0, 0), *place(1, 1)), "firebrick", 3)
    draw.multiline_text((110, 120 + side), "across: probability of the predicted class\nup: share "
                        "of the votes for it; area of a dot: faces\nred line: perfect calibration",
                        "black", font(20), spacing=8)
    return sheet


def disambiguation(faces, candidates, confidence, predicted, classes):
    """Fig. 4: face, voted label, candidates with the ones that C gave up struck through: PIL RGB.

    Of the given faces (n <= 18 look best); candidates, confidence (n, K), predicted (n,).
    """
    columns, side, font = 6, 200, ImageFont.load_default
    height, width, rows = side + 70 + 30 * len(classes), side + 60, -(-len(faces) // columns)
    sheet = Image.new("RGB", (columns * width + 20, rows * height + 20), "white")
    draw = ImageDraw.Draw(sheet)
    for i in range(len(faces)):
        x, y = 20 + i % columns * width, 20 + i // columns * height
        face = as_picture(faces[[i]][0])
        sheet.paste(face.resize((side, side), Image.Resampling.BICUBIC), (x, y))
        draw.rectangle((x, y + side, x + side - 1, y + side + 30), "gainsboro")
        draw.text((x + 8, y + side + 4), f"voted: {classes[faces.labels[i]]}", "black", font(20))
        for row, k in enumerate(candidates[i].nonzero().flatten().tolist()):
            at, given_up = y + side + 36 + 28 * row, confidence[i, k] == 0
            draw.rectangle((x, at, x + side - 1, at + 26), "lightsteelblue")
            draw.text((x + 8, at + 2), classes[k], "grey" if given_up else "black", font(20))
            if given_up:
                end = x + 10 + draw.textlength(classes[k], font(20))
                draw.line((x + 6, at + 15, end, at + 15), "firebrick", 3)
        at = y + side + 38 + 28 * int(candidates[i].sum())
        draw.text((x + 8, at), f"predicted: {classes[predicted[i]]}", "darkgreen", font(20))
    return footnote(sheet, "blue: the candidate set; struck through: given up in training; "
                    "predicted: by the network at the end")


@torch.no_grad()
def attention_of(model, run, state, images, titles):
    """Attention picture of images uint8 (n, C, S, S): PIL RGB; classes, mean, std are state's."""
    x = normalise(resize(images.to(run.device), run.config["image_size"]), state)
    with autocast(run):
        tokens = model.encoder(x)[:, 1:]                                   # (n, HW, d)
        logits, maps = model.head(tokens, need_attention=True)             # (n, K) and the maps
    zeta = logits.float().softmax(1).cpu()
    sheet = attention_picture([as_picture(f) for f in images], maps, zeta, state["classes"], titles)
    return footnote(sheet, "red cloud: where the label's query looks (last layer, mean over heads, "
                    "each by its own maximum); number: the label's probability, the largest in red")


def pictures(run, model, state, faces, logits, result, known, answers):
    """All pictures of a run and a split: {file name: PIL RGB}.

    result: what was measured; known, answers: of a run that revises, its training faces and what
    the network says of them.
    """
    classes, c = state["classes"], run.config
    made = {f"confusion-{faces.split}": confusion_picture(result, classes),
            "curves": curves([("", state["log"])])}
    made[f"reliability-{faces.split}"] = reliability_picture(logits, crowd(faces, len(classes)))
    if c["head"] == "decoder":
        first = np.unique(faces.labels, return_index=True)[1].tolist()      # of each class
        titles = [[f"voted {classes[faces.labels[i]]}", f"said {classes[logits[i].argmax()]}"]
                  for i in first]
        made[f"attention-{faces.split}"] = attention_of(model, run, state, faces[first], titles)
        torch.manual_seed(c["seed"])                     # as train.main began
        before = build_model(c).head.queries.detach()
        after = model.head.queries.detach().cpu()
        shown = [("before", before), ("after", after)]
        with suppress(ValueError):                       # too many classes have none
            shown.append(("simplex", simplex(*after.shape)))
        made["queries"] = footnote(cosines(shown, classes, c["tau"]), "cosines of the label "
                                   "queries: red 1, white 0, blue -1")
    if c["revise"]:
        made.update(disambiguated(state, known, answers))
    return made


def disambiguated(state, faces, answers):
    """Fig. 4 twice, each of 18 training faces at most: {name: PIL RGB}.

    faces, answers (n,): all of them, and what the network says. "disambiguation" has the first
    whose sets have three labels or more, or the most: none is chosen by what became of it.
    "locked-in", if there are any, has the first whose set became another label than the voted one,
    although the network says the voted one by now.
    """
    candidates, confidence = state["candidates"], state["confidence"]      # (n, K)
    sizes, wrong = candidates.sum(dim=1), reduced_wrongly(faces, candidates, confidence)
    chosen = {"disambiguation": sizes >= sizes.max().clamp(max=3),
              "locked-in": wrong & (answers == faces.labels)}
    rows = {name: mask.nonzero().flatten()[:18] for name, mask in chosen.items()}
    return {name: disambiguation(faces.subset(r), candidates[r], confidence[r], answers[r],
                                 state["classes"]) for name, r in rows.items() if len(r)}


def save_pictures(folder, made):
    """Write {name: PIL} as PNG files into a folder, by the first process; returns what to tell."""
    if os.environ.get("RANK", "0") == "0":
        for name, picture in made.items():
            replace_file(folder / f"{name}.png", lambda file: picture.save(file, "png"))
    return f"pictures: {folder} ({', '.join(made)})"


# ------------------------------------------------------------------------------- faces of your own

def read_landmarks(path):
    """Five points a picture from a csv file: image, x1, y1, ... x5, y5 -> {name: (5, 2)}.

    In pixels, in the order left eye, right eye, nose tip, left and right corner of the mouth, as
    seen in the picture.
    """
    columns, found = [f"{axis}{i}" for i in range(1, 6) for axis in "xy"], {}
    for line, row in read_csv(Path(path), ["image"] + columns):
        where = f"{path}, row {line}"
        once(row["image"], found, where)
        points = np.array([number(row[k], where, -1e6, 1e6, whole=False) for k in columns])
        found[row["image"]] = points.reshape(5, 2)
        if (found[row["image"]] == found[row["image"]][0]).all():
            raise InputError(f"{where}: five times the same point; correct the row")
    return found


def read_face(path, about, side, landmarks):
    """A picture file as the model's input, uint8 (C, side, side): aligned, or its middle square."""
    image = read_upright(path, about["channels"])
    if landmarks is None:
        return to_array(image, side)
    points = landmarks.get(str(path), landmarks.get(path.name))
    if points is None:
        raise InputError(f"{path}: not in the file of --landmarks; add a row")
    try:
        return to_array(align(image, points, side), side)
    except ValueError as error:
        raise InputError(f"{path}: its points are not of a face ({error}); correct them") from None


def recognise(run, model, state, paths, landmarks, batch_size=64):
    """Yield (path, probabilities (K,), image) of each picture file that can be read.

    They are computed in batches. The others are named on stderr. Size, mean and deviation are the
    checkpoint's, channels and the largest size the data set's.
    """
    c = run.config
    side = min(c["image_size"], DATA[c["data"]]["side"])
    for i in tqdm(range(0, len(paths), batch_size), leave=False, disable=None):
        read = []
        for path in paths[i:i + batch_size]:
            try:
                face = torch.tensor(read_face(path, DATA[c["data"]], side, landmarks))
                read.append((path, face))                                  # (C, S, S)
            except InputError as error:
                tqdm.write(f"error: {error}", file=sys.stderr)
        if read:
            x = torch.stack([face for _, face in read]).to(run.device)     # (b, C, S, S)
            with torch.no_grad(), autocast(run):
                logits = model(normalise(resize(x, c["image_size"]), state))
            for (path, face), zeta in zip(read, logits.float().softmax(dim=1).cpu()):
                yield path, zeta, face


def recognise_files(args, overrides):
    """The command lines --image and --folder; status 1 at the end if a file could not be read."""
    sys.stdout.reconfigure(errors="surrogateescape")     # of file names that are no UTF-8
    model, run, state = load_run(args.runs[0], overrides)
    classes = state["classes"]
    if run.rank > 0:
        return                                   # one process is enough for a few pictures
    if args.folder:
        if not Path(args.folder).is_dir():
            raise InputError(f"--folder {args.folder}: no such folder")
        kinds = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
        paths = sorted(p for p in Path(args.folder).rglob("*")
                       if p.suffix.lower() in kinds and not p.name.startswith("."))
        if not paths:
            raise InputError(f"--folder {args.folder}: holds no picture ({', '.join(kinds)})")
    else:
        paths = [Path(p) for p in args.image]
    landmarks = read_landmarks(args.landmarks) if args.landmarks else None
    if args.csv:
        write_rows(args.csv, [], "a")            # a path that cannot be written shows at once
    rows, shown = [], []
    for path, zeta, image in recognise(run, model, state, paths, landmarks):
        label = classes[zeta.argmax()]
        # Its candidate set: the labels that one of ten people would choose, at least the first.
        chosen = [name for name, chance in zip(classes, zeta) if chance >= min(0.1, zeta.max())]
        rows.append([path, label, " ".join(chosen), *(f"{v:.4f}" for v in zeta.tolist())])
        if args.image:
            if len(shown) < 8:
                shown.append((path, image, label))
            order = zeta.argsort(descending=True).tolist()
            say(run, f"{path}\n" + "\n".join(
                f"  {classes[k]:10s} {zeta[k]:6.1%} {'#' * round(40 * zeta[k].item())}"
                for k in order) + f"\n  candidate set: {', '.join(chosen)}")
    if args.csv or args.folder:
        write_rows(args.csv, [["image", "label", "candidates", *classes], *rows])
    if shown and run.config["head"] == "decoder":
        picture = attention_of(model, run, state, torch.stack([image for _, image, _ in shown]),
                               [[path.name[:16], f"said {label}"] for path, _, label in shown])
        say(run, save_pictures(run.out / "pictures", {"attention-of-images": picture}))
    if len(rows) < len(paths):
        raise Stopped(f"{len(paths) - len(rows)} of {len(paths)} pictures could not be read")


def write_rows(path, rows, mode="w"):
    """A csv file, or stdout for want of a path; mode "a" leaves what the file holds."""
    if not path:
        csv.writer(sys.stdout, lineterminator="\n").writerows(rows)
        return
    try:
        with open(path, mode, newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
    except OSError as error:
        raise InputError(f"--csv {path}: cannot be written ({error.strerror})") from None


# ----------------------------------------------------------------------------------------- the file

def command(argv):
    """The command line; InputError for flags that do not go together."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("runs", nargs="*", default=["runs/train-toy"], help="run folders (%(default)s)")
    add("--split", choices=("test", "val"), help="(test)")
    add("--data-dir", help="folder of the data set (as in training)")
    add("--partial", action="store_true", help="accept a split of unofficial size")
    add("--cache", help="folder of the memory maps (as in training)")
    add("--device", help="cpu, cuda or cuda:N (cuda if there is one)")
    add("--json", action="store_true", help="print one JSON object a run")
    add("--markdown", action="store_true", help="print the comparison as a Markdown table")
    add("--image", nargs="+", help="recognise faces: picture files")
    add("--folder", help="recognise faces: all pictures below a folder")
    add("--csv", help="write what was recognised to this file (--folder: else to stdout)")
    add("--landmarks", help="align them: csv of image, x1, y1, ... x5, y5 (eyes, nose, mouth)")
    args = parser.parse_args(argv)
    asked = bool(args.image) + bool(args.folder)
    idle = (args.split, args.json, args.markdown) if asked else (args.csv, args.landmarks)
    if asked > 1 or asked and len(args.runs) > 1 or any(idle):
        raise InputError("--image or --folder takes one run; --csv and --landmarks go with them, "
                         "--split, --json and --markdown do not")
    if args.json and args.markdown:
        raise InputError("--json: one object a run, no table; leave it or --markdown out")
    return args


def main(argv=None):
    """Evaluate one run, compare several, or recognise faces in picture files."""
    args = command(argv)
    overrides = {"device": args.device, "deterministic": False, "accumulate": 1}
    overrides.update({k: getattr(args, k) for k in ("data_dir", "partial", "cache")
                      if getattr(args, k)})
    if args.image or args.folder:
        return recognise_files(args, overrides)
    results, logs, alone = [], [], len(args.runs) == 1 and not args.markdown
    tell = print if os.environ.get("RANK", "0") == "0" else lambda text: None
    for path in args.runs:
        result, config, log, draw = evaluate(path, args.split or "test", overrides)
        if draw:
            keep_result(path, result)            # before it is told: a broken pipe loses nothing
        results.append((result, config))
        logs.append((path, log))
        if args.json:
            tell(json.dumps(result))
        elif alone:
            tell(f"{path}, epoch {result['epoch']}, {result['data']} {result['split']} split")
            text = as_text(result, list(result["per_class"]), config["revise"])
            tell("\n".join(result["notes"]) + "\n\n" + text)
    if args.json:
        return
    if not alone:
        tell("\n".join(comparison(results, args.markdown)))
        sets = comparison([(r, c) for r, c in results if c["revise"]], args.markdown, BECAME,
                          "training faces, what became of their candidate sets")
        if sets:
            tell("\n" + "\n".join(sets))
    if alone and draw:
        drawn = "pictures" if Path(path).is_dir() else f"pictures-{Path(path).stem}"
        tell("\n" + save_pictures(Path(config["out"]) / drawn, draw()))
    elif not args.markdown:                      # of several runs, or of one without its weights
        few = logs[:len(COLOURS)]                # as many as there are colours
        more = f"; of the first {len(few)} runs" * (len(logs) > len(few))
        tell("\n" + save_pictures(Path("runs/pictures"), {"curves": curves(few)}) + more)


if __name__ == "__main__":
    command_line(main)
