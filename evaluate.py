"""How good a trained recogniser is: accuracy, a row a class, and which class is taken for which.

Paper: Sec. 4 (the accuracy of its tables). The class is the argmax of the decoder's logits.

    symbol  name       shape    meaning
    n, K    len, classes        faces of the split, number of labels
            logits     (n, K)   of the last epoch's model; none is chosen by looking at the split
    y       labels     (n,)     the voted label
            confusion  (K, K)   faces of a class (row) that were given a label (column)

Run:  python evaluate.py                                   (the toy's test split)
      python evaluate.py runs/train-ferplus --split val --data-dir DIR --json
"""
import argparse
import json
import time
from pathlib import Path

import torch

from datasets import DATA, InputError
from pll import candidates_from_votes
from pretrain import command_line, load_checkpoint, load_split, load_weights, say, start
from train import accuracies, build_model, predict


def confusion_matrix(predicted, labels, classes):
    """Counts (K, K): row = voted label, column = prediction."""
    return torch.bincount(labels * classes + predicted, minlength=classes ** 2).reshape(classes, -1)


def measure(logits, faces, classes):
    """All that is reported of a split, as plain numbers in a dict; logits (n, K) on the CPU."""
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
        lines.append(f"inside candidate set {result['inside_candidate_set']:7.2%}")
    if "accuracy_on_truth" in result:
        lines.append(f"accuracy on truth    {result['accuracy_on_truth']:7.2%}   "
                     f"(the crowd's label: {result['crowd_on_truth']:.2%})")
    percent = lambda v: "-" if v is None else f"{v:.1%}"
    lines += ["", f"{'class':12s} {'faces':>6s} {'recall':>8s} {'precision':>10s}"]
    lines += [f"{name:12s} {row['faces']:6d} {percent(row['recall']):>8s} "
              f"{percent(row['precision']):>10s}" for name, row in result["per_class"].items()]
    lines += ["", f"{'voted / predicted':18s}" + "".join(f"{name[:7]:>8s}" for name in classes)]
    lines += [f"{name:18s}" + "".join(f"{count:8d}" for count in row)
              for name, row in zip(classes, result["confusion"])]
    return "\n".join(lines)


def load_run(path, overrides):
    """A trained model and its `Run`: path is a run folder or a checkpoint of train.py."""
    path = Path(path)
    path = path / "last.pt" if path.is_dir() else path
    if not path.exists():
        raise InputError(f"{path}: no such run; make it with: python train.py")
    state = load_checkpoint(path, "train")
    config = {**state["config"], **overrides}
    if state["classes"] != DATA[config["data"]]["classes"]:
        raise InputError(f"{path}: trained on the classes {', '.join(state['classes'])}")
    run = start(config)
    model = build_model(config)
    load_weights(model, state["model"], path)
    return model.to(run.device), run, len(state["log"])


def main(argv=None):
    """Evaluate one run on one split and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="?", default="runs/train-toy", help="run folder or checkpoint")
    parser.add_argument("--split", default="test", choices=("test", "val"), help="(%(default)s)")
    parser.add_argument("--data-dir", help="folder of the data set (as in training)")
    parser.add_argument("--device", help="cuda, cpu, ... (cuda if there is one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    overrides = {"device": args.device, "batch_size": 256}
    if args.data_dir:
        overrides["data_dir"] = args.data_dir
    model, run, epoch = load_run(args.run, overrides)
    classes = DATA[run.config["data"]]["classes"]
    faces = load_split(run, args.split)
    begin = time.time()
    logits = predict(run, model, faces).cpu()                              # (n, K)
    seconds = time.time() - begin
    result = {"run": str(args.run), "data": run.config["data"], "split": args.split,
              "epoch": epoch, "images_per_second": round(len(faces) / seconds, 1),
              **measure(logits, faces, classes)}
    if args.json:
        say(run, json.dumps(result))
    else:
        say(run, f"{args.run}, epoch {epoch}, {run.config['data']} {args.split} split")
        say(run, "\n".join(faces.notes) + "\n\n" + as_text(result, classes))


if __name__ == "__main__":
    command_line(main)
