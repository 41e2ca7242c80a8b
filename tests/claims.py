"""The table of claims: how many points one row of the tables has more than another.

Run:  python tests/claims.py      (Markdown, from the kept runs in tests/results; the README has it)

A cell is the mean difference in accuracy over the seeds that both rows have; in brackets, on
FERPlus (Valid) the mean on the held-out training faces, on the toy (test split) the least and the
most of a seed. Bold: two such seeds or more, and one sign in all of them (on FERPlus on Valid and
held out); ': one seed alone. The paper's column is the difference of its own figures, whose
`baseline` and ResNet-18 start from other weights than ours.
"""
import json
import statistics

from conftest import ROOT                                # lets evaluate.py be found, too
from evaluate import PAPER

RESULTS = ROOT / "tests/results"
COLUMNS = {"toy": "toy", "ferplus-4-epochs": "FERPlus, 4 epochs",
           "ferplus-15-epochs": "FERPlus, 15 epochs"}    # folder of RESULTS: heading
# (what, over what, kept run, another): a row. A name without a folder is looked for in that of each
# column; if the first has one, the row stands in that column alone. Equal C is Y / |Y|, voted C the
# vote shares.
ROWS = [
    ("HOG as target", "pixels; one-hot labels", "mim-hog", "mim-pixel"),
    ("", "pixels; sets, equal C", "mim-hog-pll", "mim-pixel-pll"),
    ("sets, equal C", "one-hot labels; after HOG, linear head", "mim-hog-pll", "mim-hog"),
    ("", "one-hot labels; after pixels, linear head", "mim-pixel-pll", "mim-pixel"),
    ("", "one-hot labels; ResNet-18 from random weights", "resnet18-pll", "baseline-resnet18"),
    ("sets, voted C", "one-hot labels; linear head", "soft", "mim-hog"),
    ("", "one-hot labels; random weights, linear head", "toy/soft", "baseline"),
    ("", "one-hot labels; decoder, Eq. 3", "decoder-soft", "decoder-one-hot"),
    ("", "equal C; linear head", "soft", "mim-hog-pll"),
    ("", "equal C; decoder, Eq. 3", "decoder-soft", "decoder-uniform"),
    ("label decoder", "linear head; equal C", "decoder", "mim-hog-pll"),
    ("decoder with Eq. 3", "linear head; equal C", "decoder-uniform", "mim-hog-pll"),
    ("", "linear head; one-hot labels", "decoder-one-hot", "mim-hog"),
    ("", "linear head; voted C", "decoder-soft", "soft"),
    ("Eq. 3", "none; equal C", "decoder-uniform", "decoder"),
    ("", "none; with revision", "ours", "decoder-revision"),
    ("revision, threshold 0.1", "none; equal C", "decoder-revision", "decoder"),
    ("", "none; with Eq. 3", "ours", "decoder-uniform"),
    ("", "none; with Eq. 3, two votes a candidate", "min2", "decoder-uniform-min2"),
    ("revision, threshold 0.3", "none; the recipe", "recipe", "recipe-no-revise"),
    ("`ours`", "equal C on a linear head, `mim-hog-pll`", "ours", "mim-hog-pll"),
    ("", "voted C on a linear head, `soft`", "ours", "soft"),
    ("", "one-hot labels, `mim-hog`", "ours", "mim-hog"),
    ("", "one-hot labels, `baseline`", "ours", "baseline"),
    ("", "`baseline` of 18 epochs", "ferplus-4-epochs/ours", "ferplus-other-lengths/baseline"),
    ("", "`baseline` of 42 epochs", "ferplus-15-epochs/ours",
     "ferplus-other-lengths/baseline-42-epochs"),
    ("", "RC on the ViT", "ours", "rc-vit"),
    ("", "PiCO on the ViT", "ours", "pico-vit"),
    ("", "CC on the ViT", "ours", "cc-vit"),
    ("", "LW on the ViT", "ours", "lw-vit"),
    ("", "RC on ResNet-18", "ours", "rc"),
    ("", "PiCO on ResNet-18", "ours", "pico"),
    ("", "CC on ResNet-18", "ours", "cc"),
    ("", "LW on ResNet-18", "ours", "lw"),
    ("", "equal C on ResNet-18", "ours", "resnet18-pll"),
    ("`mim-hog-pll`", "RC on the ViT", "mim-hog-pll", "rc-vit"),
    ("", "PiCO on the ViT", "mim-hog-pll", "pico-vit"),
    ("", "CC on the ViT", "mim-hog-pll", "cc-vit"),
    ("the recipe", "one-hot labels, `mim-hog`", "recipe", "mim-hog"),
    ("", "one-hot labels with decoder, Eq. 3", "recipe", "decoder-one-hot"),
    ("", "voted C of one vote, `soft`", "recipe", "soft"),
    ("", "voted C of one vote with decoder, Eq. 3", "recipe", "decoder-soft"),
    ("", "`baseline` of 42 epochs", "ferplus-15-epochs/recipe",
     "ferplus-other-lengths/baseline-42-epochs"),
    ("", "random weights, 49 epochs", "ferplus-15-epochs/recipe", "ferplus-other-lengths/scratch"),
    ("HOG, then one-hot labels", "random weights", "toy/mim-hog", "baseline"),
    ("", "random weights, 18 epochs", "ferplus-4-epochs/mim-hog", "ferplus-other-lengths/baseline"),
    ("pixels, then one-hot labels", "random weights", "toy/mim-pixel", "baseline"),
    ("", "random weights, 18 epochs", "ferplus-4-epochs/mim-pixel",
     "ferplus-other-lengths/baseline"),
]


def kept(name, key):
    """{seed: per cent} of the kept runs NAME-SEED, NAME with its folder; {} if there are none."""
    split = "test" if name.startswith("toy/") else "val"
    return {run.parent.name[-1]: 100 * json.loads(run.read_text())[key]
            for run in RESULTS.glob(f"{name}-[0-9]/{split}.json")}


def gains(one, other, key):
    """Points that kept runs of one kind have more than another's, for each seed of both."""
    ours, theirs = kept(one, key), kept(other, key)
    return [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]


def cell(one, other):
    """What a column says of two kept runs; empty if they share no seed."""
    points = gains(one, other, "accuracy")
    held_out = [] if one.startswith("toy/") else gains(one, other, "held_out_accuracy")
    if not points:
        return ""
    told = f"{statistics.mean(held_out):+.1f}" if held_out else \
        f"{min(points):+.1f} to {max(points):+.1f}"
    text = f"{statistics.mean(points):+.1f} ({told})"
    if len(points) == 1:
        return text + "'"
    signs = points + held_out
    return f"**{text}**" if min(signs) > 0 or max(signs) < 0 else text


def in_the_paper(one, other):
    """The difference of the paper's figures: FERPlus's (Tables 1, 2), else RAF-DB's (3, 4)."""
    ours, theirs = PAPER.get(one.split("/")[-1], {}), PAPER.get(other.split("/")[-1], {})
    data = next((d for d in ("ferplus", "raf") if d in ours and d in theirs), None)
    return f"{ours[data] - theirs[data]:+.2f}" if data else ""


def table():
    """The lines of the table, Markdown."""
    lines = ["| what | over what | paper | " + " | ".join(COLUMNS.values()) + " |",
             "|---|---|---|" + "---|" * len(COLUMNS)]
    for what, over, *names in ROWS:
        cells = []
        for folder in COLUMNS:
            one, other = (name if "/" in name else f"{folder}/{name}" for name in names)
            cells.append(cell(one, other) if one.startswith(f"{folder}/") else "")
        lines.append("| " + " | ".join([what, over, in_the_paper(*names), *cells]) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
