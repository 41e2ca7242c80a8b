"""The tables of claims: how many points one row of the results has more than another.

Run:  python tests/claims.py      (Markdown, from the kept runs in tests/results)

Two tables: the comparisons that the paper makes (in the README), and further ones (at the end of
tests/results/ferplus.md).

A cell is the mean difference in accuracy over the seeds that both rows have; in brackets, on
FERPlus (Valid) the mean on the held-out training faces, on the toy (test split) the least and the
most of a seed. Bold: two such seeds or more, and one sign in all of them (on FERPlus on Valid and
held out); ': one seed alone. The paper's column, which the first table has, is the difference of
its own figures, whose `baseline` and ResNet-18 start from other weights than ours.
"""
import json
import statistics

from conftest import ROOT                                # lets evaluate.py be found, too
from evaluate import PAPER

RESULTS = ROOT / "tests/results"
COLUMNS = {"toy": "toy", "ferplus-4-epochs": "FERPlus, 4 epochs",
           "ferplus-15-epochs": "FERPlus, 15 epochs"}    # folder of RESULTS: heading
# `baseline` at about the cost of pre-training and training together; on the toy of training alone.
LONG_BASELINE = {"toy": "toy/baseline", "ferplus-4-epochs": "ferplus-other-lengths/baseline",
                 "ferplus-15-epochs": "ferplus-other-lengths/baseline-42-epochs"}


def places(name):
    """Where the runs of a row's name are kept, {column: folder and name}."""
    return name if isinstance(name, dict) else {folder: f"{folder}/{name}" for folder in COLUMNS}


def resnet(method):
    """Where a method on ResNet-18 is kept, whose 15 epochs are without layer decay."""
    return {**places(method), "ferplus-15-epochs": f"ferplus-other-lengths/{method}-15-epochs"}


# Sets with voted C on a linear head, after pre-training with HOG; the row `soft` of the toy is not.
SOFT = {**places("soft"), "toy": "toy/soft-hog"}

# (what, over what, kept run, another): a row; "" as above. A name is looked for in each column's
# folder, or where a dict has it: {column: folder and name}, and other columns stay empty. Sets have
# equal C, Y / |Y|, if nothing is said; voted C is the vote shares.
THE_PAPERS = [                                           # comparisons of which it has the figures
    ("pre-training with HOG", "pixels; one-hot labels", "mim-hog", "mim-pixel"),
    ("", "pixels; sets", "mim-hog-pll", "mim-pixel-pll"),
    ("", "random weights; one-hot labels", "mim-hog", LONG_BASELINE),
    ("pre-training with pixels", "random weights; one-hot labels", "mim-pixel", LONG_BASELINE),
    ("candidate sets", "one-hot labels; after HOG", "mim-hog-pll", "mim-hog"),
    ("", "one-hot labels; after pixels", "mim-pixel-pll", "mim-pixel"),
    ("label decoder", "linear head", "decoder", "mim-hog-pll"),
    ("label decoder, Eq. 3", "linear head", "decoder-uniform", "mim-hog-pll"),
    ("Eq. 3", "none", "decoder-uniform", "decoder"),
    ("", "none; both with revision", "ours", "decoder-revision"),
    ("revision", "none", "decoder-revision", "decoder"),
    ("", "none; both with Eq. 3", "ours", "decoder-uniform"),
    ("`ours`, the whole method", "`mim-hog-pll`: sets, linear head", "ours", "mim-hog-pll"),
    ("", "`mim-hog`: one-hot labels, linear head", "ours", "mim-hog"),
    ("", "`baseline`: one-hot, random weights", "ours", LONG_BASELINE),
    ("", "RC on ResNet-18", "ours", resnet("rc")),
    ("", "PiCO on ResNet-18", "ours", resnet("pico")),
    ("", "LW (cross-entropy) on ResNet-18", "ours", resnet("lw-ce")),
    ("", "sets on ResNet-18", "ours", resnet("resnet18-pll")),
]
FURTHER = [
    ("sets, voted C", "equal C; linear head", SOFT, "mim-hog-pll"),
    ("", "equal C; decoder, Eq. 3", "decoder-soft", "decoder-uniform"),
    ("", "one-hot labels; linear head", SOFT, "mim-hog"),
    ("", "one-hot labels; decoder, Eq. 3", "decoder-soft", "decoder-one-hot"),
    ("", "one-hot labels; linear head, random weights", "soft", {"toy": "toy/baseline"}),
    ("sets, equal C", "one-hot labels; decoder, Eq. 3", "decoder-uniform", "decoder-one-hot"),
    ("", "one-hot labels; ResNet-18", resnet("resnet18-pll"), resnet("baseline-resnet18")),
    ("label decoder, Eq. 3", "linear head; one-hot labels", "decoder-one-hot", "mim-hog"),
    ("", "linear head; voted C", "decoder-soft", SOFT),
    ("revision", "none; both with Eq. 3, two votes a candidate", "min2", "decoder-uniform-min2"),
    ("", "none; the recipe (threshold 0.3)", "recipe", "recipe-no-revise"),
    ("`ours`", "`soft`: voted C on a linear head", "ours", SOFT),
    ("", "RC on the ViT", "ours", "rc-vit"),
    ("", "PiCO on the ViT", "ours", "pico-vit"),
    ("", "CC on the ViT", "ours", "cc-vit"),
    ("", "LW (cross-entropy) on the ViT", "ours", "lw-vit-ce"),
    ("", "LW (sigmoid) on the ViT", "ours", "lw-vit"),
    ("", "LW (sigmoid) on ResNet-18", "ours", resnet("lw")),
    ("", "CC on ResNet-18", "ours", resnet("cc")),
    ("", "one-hot labels on ResNet-18", "ours", resnet("baseline-resnet18")),
    ("`mim-hog-pll`", "RC on the ViT", "mim-hog-pll", "rc-vit"),
    ("", "PiCO on the ViT", "mim-hog-pll", "pico-vit"),
    ("", "CC on the ViT", "mim-hog-pll", "cc-vit"),
    ("", "LW (cross-entropy) on the ViT", "mim-hog-pll", "lw-vit-ce"),
    ("the recipe", "`mim-hog`: one-hot labels, linear head", "recipe", "mim-hog"),
    ("", "one-hot labels, decoder, Eq. 3", "recipe", "decoder-one-hot"),
    ("", "`soft`: voted C, linear head", "recipe", "soft"),
    ("", "voted C, decoder, Eq. 3", "recipe", "decoder-soft"),
    ("", "`baseline` from random weights", "recipe", LONG_BASELINE),
    ("", "the recipe from random weights", "recipe", {
        "ferplus-15-epochs": "ferplus-other-lengths/scratch"}),
    ("the recipe without revision", "one-hot labels, decoder, Eq. 3", "recipe-no-revise",
     "decoder-one-hot"),
    ("", "`soft`: voted C, linear head", "recipe-no-revise", "soft"),
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
    """What a column says of two kept runs; empty if they share no seed, ' behind it: one alone."""
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
    """The difference of the paper's figures: FERPlus's (Tables 1, 2), else RAF-DB's (3, 4).

    The paper does not say which of LW's two losses it took.
    """
    name = places(other)["toy"].removeprefix("toy/").removesuffix("-ce")
    ours, theirs = PAPER[one], PAPER[name]
    data = next(d for d in ("ferplus", "raf") if d in ours and d in theirs)
    return f"{ours[data] - theirs[data]:+.2f}"


def cells(one, other):
    """What each column says of a row's two names."""
    ours, theirs = places(one), places(other)
    return [cell(ours[folder], theirs[folder]) if folder in ours and folder in theirs else ""
            for folder in COLUMNS]


def table(rows, paper):
    """The lines of a table, Markdown; paper: with the paper's column."""
    heads = ["what", "over what", *["paper"] * paper, *COLUMNS.values()]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for what, over, one, other in rows:
        figures = [in_the_paper(one, other)] if paper else []
        lines.append("| " + " | ".join([what, over, *figures, *cells(one, other)]) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join([*table(THE_PAPERS, True), "", *table(FURTHER, False)]))
