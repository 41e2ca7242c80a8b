"""The table of claims: how many points one row of the tables has more than another, seed by seed.

Run:  python tests/claims.py      (Markdown, from the kept runs in tests/results; the README has it)

A cell is the mean, over the seeds that both rows have, of the difference in accuracy: on the toy's
test split (least to most of a seed), on FERPlus's Valid (on the held-out training faces). It is in
bold if there are two such seeds or more and the difference has one sign in each of them, on both
sets of faces; a ' marks a single seed. The paper's column is the difference of its own figures.
"""
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))                            # evaluate.py, when this file is run
from evaluate import PAPER  # noqa: E402

COLUMNS = {"toy": "toy", "ferplus-4-epochs": "FERPlus, 4 epochs",
           "ferplus-15-epochs": "FERPlus, 15 epochs"}    # folder of tests/results: heading
# (what, over what, kept run, another one): a row. A name with a slash is of that folder and stands
# in the column of the first one; any other is looked for in each column.
ROWS = [
    ("HOG as target", "pixels; one-hot labels", "mim-hog", "mim-pixel"),
    ("", "pixels; sets", "mim-hog-pll", "mim-pixel-pll"),
    ("candidate sets", "one-hot labels; HOG, linear head", "mim-hog-pll", "mim-hog"),
    ("", "one-hot labels; pixels, linear head", "mim-pixel-pll", "mim-pixel"),
    ("", "one-hot labels; ResNet-18 from random weights", "resnet18-pll", "baseline-resnet18"),
    ("label decoder", "linear head; sets", "decoder", "mim-hog-pll"),
    ("label decoder, Eq. 3", "linear head; sets", "decoder-uniform", "mim-hog-pll"),
    ("", "linear head; one-hot labels", "decoder-one-hot", "mim-hog"),
    ("", "linear head; vote shares", "decoder-soft", "soft"),
    ("Eq. 3", "none", "decoder-uniform", "decoder"),
    ("", "none; with revision", "ours", "decoder-revision"),
    ("revision (threshold 0.1)", "none", "decoder-revision", "decoder"),
    ("", "none; with Eq. 3", "ours", "decoder-uniform"),
    ("", "none; with Eq. 3, two votes a candidate", "min2", "decoder-uniform-min2"),
    ("revision (threshold 0.3)", "none; the recipe", "recipe", "recipe-no-revise"),
    ("`ours`", "Eq. 2 on a linear head, `mim-hog-pll`", "ours", "mim-hog-pll"),
    ("", "one-hot labels, `mim-hog`", "ours", "mim-hog"),
    ("", "one-hot labels, `baseline`", "ours", "baseline"),
    ("", "`baseline` of 18 epochs", "ferplus-4-epochs/ours", "ferplus-other-lengths/baseline"),
    ("", "vote shares, `soft`", "ours", "soft"),
    ("", "RC on the ViT", "ours", "rc-vit"),
    ("", "PiCO on the ViT", "ours", "pico-vit"),
    ("", "CC on the ViT", "ours", "cc-vit"),
    ("", "LW on the ViT", "ours", "lw-vit"),
    ("", "RC on ResNet-18", "ours", "rc"),
    ("", "PiCO on ResNet-18", "ours", "pico"),
    ("", "CC on ResNet-18", "ours", "cc"),
    ("", "LW on ResNet-18", "ours", "lw"),
    ("", "Eq. 2 on ResNet-18", "ours", "resnet18-pll"),
    ("the recipe", "one-hot labels; linear head", "recipe", "mim-hog"),
    ("", "one-hot labels; decoder, Eq. 3", "recipe", "decoder-one-hot"),
    ("", "vote shares; linear head", "recipe", "soft"),
    ("", "vote shares; decoder, Eq. 3", "recipe", "decoder-soft"),
    ("", "the same from random weights", "ferplus-15-epochs/recipe",
     "ferplus-other-lengths/scratch"),
    ("pre-training, HOG", "none; one-hot labels", "toy/mim-hog", "toy/baseline"),
    ("", "none, 18 epochs; one-hot labels", "ferplus-4-epochs/mim-hog",
     "ferplus-other-lengths/baseline"),
    ("pre-training, pixels", "none; one-hot labels", "toy/mim-pixel", "toy/baseline"),
    ("", "none, 18 epochs; one-hot labels", "ferplus-4-epochs/mim-pixel",
     "ferplus-other-lengths/baseline"),
]


def kept(name, key, results):
    """{seed: per cent} of the kept runs NAME-SEED, NAME with its folder; {} if there are none."""
    split = "test" if name.startswith("toy/") else "val"
    return {run.parent.name[-1]: 100 * json.loads(run.read_text())[key]
            for run in sorted(results.glob(f"{name}-[0-9]/{split}.json"))}


def gains(one, other, key, results):
    """Points that kept runs of one kind have more than another's, for each seed of both."""
    ours, theirs = kept(one, key, results), kept(other, key, results)
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def cell(one, other, results):
    """What the column says of two kept runs; empty if they share no seed."""
    points = gains(one, other, "accuracy", results)
    if not points:
        return ""
    signs, told = list(points), f"{min(points):+.1f} to {max(points):+.1f}"
    if not one.startswith("toy/"):
        held_out = gains(one, other, "held_out_accuracy", results)
        signs, told = signs + held_out, f"{statistics.mean(held_out):+.1f}"
    text = f"{statistics.mean(points):+.1f} ({told})"
    if len(points) == 1:
        return text + "'"
    same = all(p > 0 for p in signs) or all(p < 0 for p in signs)
    return f"**{text}**" if same else text


def in_the_paper(one, other):
    """The same difference of the paper's figures: FERPlus's, else (Tables 3, 4) RAF-DB's."""
    ours, theirs = PAPER.get(one.split("/")[-1], {}), PAPER.get(other.split("/")[-1], {})
    data = next((d for d in ("ferplus", "raf") if d in ours and d in theirs), None)
    return f"{ours[data] - theirs[data]:+.2f}" if data else ""


def table(results=ROOT / "tests/results"):
    """The lines of the table, Markdown."""
    lines = ["| what | over what | paper | " + " | ".join(COLUMNS.values()) + " |",
             "|---|---|" + "---|" * (1 + len(COLUMNS))]
    for what, over, one, other in ROWS:
        cells = []
        for folder in COLUMNS:
            named = "/" in one
            pair = (one, other) if named else (f"{folder}/{one}", f"{folder}/{other}")
            cells.append(cell(*pair, results) if pair[0].startswith(f"{folder}/") else "")
        lines.append("| " + " | ".join([what, over, in_the_paper(one, other), *cells]) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
