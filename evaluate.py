"""How good a trained recogniser is, and several of them as the paper's tables.

Paper: Sec. 4 (the accuracy of its tables). The class is the argmax of the decoder's logits.

    symbol  name       shape    meaning
    n, K    len, classes        faces of the split, number of labels
            logits     (n, K)   of the last epoch's model; none is chosen by looking at the split
    y       labels     (n,)     the voted label
            shares     (n, K)   the share of the votes that each class got
            confusion  (K, K)   faces of a class (row) that were given a label (column)

Run:  python evaluate.py                                   (the toy's test split)
      python evaluate.py runs/train-ferplus --split val --data-dir DIR --json
      python evaluate.py RUN RUN ... --markdown            (a table, runs that differ in the seed
                                                            as one row with mean and deviation)
"""
import argparse
import json
import re
import time
from pathlib import Path

import torch

from datasets import DATA, InputError
from pll import candidates_from_votes
from pretrain import FREE, command_line, load_checkpoint, load_split, load_weights, say, start
from train import METHODS, accuracies, build_model, parse, predict


# The paper's own accuracies in per cent, Tables 1 to 4; never ours.
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
# Columns of the comparison: key of a result, heading, in per cent or not.
COLUMNS = [("accuracy", "accuracy", True), ("mean_class_accuracy", "mean class", True),
           ("inside_candidate_set", "in set", True), ("vote_nll", "NLL", False),
           ("vote_calibration_error", "ECE", True),
           ("accuracy_without_duplicates", "no dupl.", True), ("accuracy_on_truth", "truth", True),
           ("revised", "revised", True), ("revised_as_voted", "as voted", True),
           ("revised_as_true", "as true", True)]


def vote_metrics(logits, votes, bins=15):
    """How well the softmax matches the crowd: (NLL, ECE) against the vote shares; (n, K) each.

    NLL: the mean over faces of -sum of share * log probability, in nats. ECE (Guo et al. 2017, with
    vote shares for hits): faces are binned by the probability of the predicted class; the mean over
    faces of |mean probability - mean share of the votes for that class| of their bin.
    """
    shares = votes / votes.sum(dim=1, keepdim=True)
    log_zeta = logits.float().log_softmax(dim=1)                           # (n, K)
    top, predicted = log_zeta.exp().max(dim=1)                             # (n,)
    agree = shares.gather(1, predicted[:, None]).squeeze(1)                # (n,)
    where = (top * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins).index_add(0, where, top - agree)              # sums, (bins,)
    return (-(shares * log_zeta).sum(dim=1).mean().item(), gaps.abs().sum().item() / len(top))


def not_in(faces, others):
    """Faces whose pixels stand nowhere in `others`: (n,) bool."""
    known = {others[[i]].numpy().tobytes() for i in range(len(others))}
    return torch.tensor([faces[[i]].numpy().tobytes() not in known for i in range(len(faces))])


def confusion_matrix(predicted, labels, classes):
    """Counts (K, K): row = voted label, column = prediction."""
    return torch.bincount(labels * classes + predicted, minlength=classes ** 2).reshape(classes, -1)


def measure(logits, faces, classes, new=None):
    """All that is reported of a split, as plain numbers in a dict; logits (n, K) on the CPU.

    `new` (n,) bool marks faces that do not also stand in the training set.
    """
    predicted, labels = logits.argmax(dim=1), faces.labels
    confusion = confusion_matrix(predicted, labels, len(classes))          # (K, K)
    hits, faces_each, given = confusion.diag(), confusion.sum(1), confusion.sum(0)
    accuracy, mean_class = accuracies(predicted, labels, len(classes))
    result = {
        "faces": len(faces), "accuracy": accuracy, "mean_class_accuracy": mean_class,
        "majority_class_rate": faces_each.max().item() / len(faces),
        "per_class": {name: {"faces": int(n), "recall": (h / n).item() if n else None,
                             "precision": (h / g).item() if g else None}
                      for name, n, h, g in zip(classes, faces_each, hits, given)},
        "confusion": confusion.tolist()}
    if faces.votes is not None:
        candidates = candidates_from_votes(faces.votes)                    # (n, K)
        inside = candidates.gather(1, predicted[:, None]).float().mean()
        result["inside_candidate_set"] = inside.item()
        result["vote_nll"], result["vote_calibration_error"] = vote_metrics(logits, faces.votes)
    if new is not None:
        result["duplicates"] = int((~new).sum())
        if new.any():
            result["accuracy_without_duplicates"] = (predicted == labels)[new].float().mean().item()
    if faces.truth is not None:
        result["accuracy_on_truth"] = (predicted == faces.truth).float().mean().item()
        result["crowd_on_truth"] = (labels == faces.truth).float().mean().item()
    return result


def as_text(result, classes):
    """The result as lines for a terminal."""
    lines = [f"accuracy             {result['accuracy']:7.2%}   of {result['faces']} faces",
             f"mean class accuracy  {result['mean_class_accuracy']:7.2%}",
             f"majority class rate  {result['majority_class_rate']:7.2%}   (the trivial answer)"]
    if "inside_candidate_set" in result:
        lines += [f"inside candidate set {result['inside_candidate_set']:7.2%}",
                  f"votes: NLL           {result['vote_nll']:7.3f}   ECE "
                  f"{result['vote_calibration_error']:.2%}"]
    if "accuracy_without_duplicates" in result:
        lines.append(f"without duplicates   {result['accuracy_without_duplicates']:7.2%}   "
                     f"({result['duplicates']} faces also stand in the training set)")
    if "accuracy_on_truth" in result:
        lines.append(f"accuracy on truth    {result['accuracy_on_truth']:7.2%}   "
                     f"(the crowd's label: {result['crowd_on_truth']:.2%})")
    if "revised" in result:
        agree = [f"{result[key]:.2%} {text}" for key, text in (
            ("revised_as_voted", "as voted"), ("revised_as_true", "as drawn")) if key in result]
        lines.append(f"revised in training  {result['revised']:7.2%}   of its faces"
                     + (f", {', '.join(agree)}" if agree else ""))
    percent = lambda v: "-" if v is None else f"{v:.1%}"
    lines += ["", f"{'class':12s} {'faces':>6s} {'recall':>8s} {'precision':>10s}"]
    lines += [f"{name:12s} {row['faces']:6d} {percent(row['recall']):>8s} "
              f"{percent(row['precision']):>10s}" for name, row in result["per_class"].items()]
    lines += ["", f"{'voted / predicted':18s}" + "".join(f"{name[:7]:>8s}" for name in classes)]
    lines += [f"{name:18s}" + "".join(f"{count:8d}" for count in row)
              for name, row in zip(classes, result["confusion"])]
    return "\n".join(lines)


def load_run(path, overrides):
    """A trained model, its `Run` and its last epoch's log; path is a run folder or a checkpoint."""
    path = Path(path)
    path = path / "last.pt" if path.is_dir() else path
    if not path.exists():
        raise InputError(f"{path}: no such run; make it with: python train.py")
    state = load_checkpoint(path, "train")
    config = {**state["config"], **overrides}
    if state["classes"] != DATA[config["data"]]["classes"]:
        raise InputError(f"{path}: trained on the classes {', '.join(state['classes'])}")
    if not state["log"]:
        raise InputError(f"{path}: stopped within its first epoch; go on with train.py --resume")
    run = start(config)
    model = build_model(config)
    load_weights(model, state["model"], path)
    return model.to(run.device), run, state["log"][-1]


def evaluate(path, split, overrides):
    """One run on one split: (result as a dict, its settings, its faces)."""
    model, run, last = load_run(path, overrides)
    data, classes = run.config["data"], DATA[run.config["data"]]["classes"]
    faces, new = load_split(run, split), None
    if data == "ferplus":                        # some images stand in Training too
        new = not_in(faces, load_split(run, "train"))
    begin = time.time()
    logits = predict(run, model, faces).cpu()                              # (n, K)
    speed = round(len(faces) / (time.time() - begin), 1)
    result = {"run": str(path), "data": data, "split": split, "epoch": last["epoch"],
              "images_per_second": speed, **measure(logits, faces, classes, new),
              **{k: v for k, v in last.items() if k.startswith("revised")}}
    return result, run, faces


def comparable(config):
    """A run's settings without its place and its seed, which may stand in the path of --init."""
    same = {k: v for k, v in config.items() if k not in FREE + ("seed",)}
    same["init"] = re.sub(r"[-_/]?(seed)?\d+", "", str(config["init"]))
    return same


def departures(config):
    """Settings in which a run is not what --method alone gives, like ", init none, lr 0.001"."""
    alone = parse(["--method", config["method"], "--data", config["data"], "--scale",
                   config["scale"]])
    mine, alone = comparable(config), comparable(alone)
    return "".join(f", {k} {config[k]}" for k in alone if mine.get(k) != alone[k])


def comparison(results, markdown):
    """Lines of a table: a row for each group of runs that differ in the seed alone.

    results: list of (result, config). Numbers are mean and, for several seeds, standard deviation.
    Paths of --init may differ in their digits (a pre-training run for each seed), in nothing else.
    """
    groups = {}
    for result, config in results:
        group = groups.setdefault(json.dumps(comparable(config), sort_keys=True), [])
        if config["seed"] in [other["seed"] for _, other in group]:
            raise InputError(f"{result.get('run')}: a second run of seed {config['seed']} with the "
                             "same settings; name each run once")
        group.append((result, config))
    columns = [c for c in COLUMNS if any(c[0] in result for result, _ in results)]
    rows = [["method", "data", "seeds"] + [heading for _, heading, _ in columns] +
            ["accuracy in the paper"]]
    for group in sorted(groups.values(), key=lambda g: list(METHODS).index(g[0][1]["method"])):
        config, cells = group[0][1], []
        for key, _, percent in columns:
            values = torch.tensor([result[key] for result, _ in group if key in result])
            values = values * 100 if percent else values
            digits = 1 if percent else 3
            spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.{digits}f}{spread}" if len(values) else "-")
        other = departures(config)           # the paper's figure is for the paper's row alone
        paper = None if other else PAPER.get(config["method"], {}).get(config["data"])
        rows.append([config["method"] + other, f"{config['data']} {group[0][0]['split']}",
                     str(len(group)), *cells, "-" if paper is None else f"{paper:.2f}"])
    if {row[-1] for row in rows[1:]} == {"-"}:
        rows = [row[:-1] for row in rows]                # the toy is not in the paper
    if markdown:
        rows.insert(1, ["---"] * len(rows[0]))
        return ["| " + " | ".join(row) + " |" for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]


def main(argv=None):
    """Evaluate one run, or compare several."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("runs", nargs="*", default=["runs/train-toy"], help="run folders (%(default)s)")
    add("--split", default="test", choices=("test", "val"), help="(%(default)s)")
    add("--data-dir", help="folder of the data set (as in training)")
    add("--device", help="cuda, cpu, ... (cuda if there is one)")
    add("--json", action="store_true", help="print one JSON object a run")
    add("--markdown", action="store_true", help="print the comparison as a Markdown table")
    args = parser.parse_args(argv)
    overrides = {"device": args.device, "deterministic": False}
    if args.data_dir:
        overrides["data_dir"] = args.data_dir
    results = []
    for path in args.runs:
        result, run, faces = evaluate(path, args.split, overrides)
        results.append((result, run.config))
        if args.json:
            say(run, json.dumps(result))
        elif len(args.runs) == 1 and not args.markdown:
            say(run, f"{path}, epoch {result['epoch']}, {result['data']} {args.split} split")
            classes = DATA[result["data"]]["classes"]
            say(run, "\n".join(faces.notes) + "\n\n" + as_text(result, classes))
    if not args.json and (len(args.runs) > 1 or args.markdown):
        say(run, "\n".join(comparison(results, args.markdown)))


if __name__ == "__main__":
    command_line(main)
