"""Stage 2: Algorithm 1. The pre-trained encoder and the label decoder learn from candidate sets.

Paper: Sec. 3.3 and Algorithm 1, settings of Sec. 4.2; what the paper leaves to MaskFeat's protocol
(layer-wise decay, warm-up, drop path) is taken from there.

    symbol   name        shape         meaning
    x_i      images      (b, 3, H, H)  this process's part of an augmented batch of B
    Y_i      candidates  (n, K) bool   candidate sets of the whole training set
    C_i      confidence  (n, K)        one row a training face, kept and revised during the run
    Q        queries     (K, d)        label embeddings of the decoder
             logits      (b, K)        sigma_logits, one a label
    T_max    epochs                    outer loop, in `pretrain.fit`
    I_max    steps                     inner loop, in `pretrain.train_epoch`; body: `algorithm_1`

Lines of Algorithm 1 are counted from "Ensure": 1 start of C, 2 epochs, 3 shuffle, 4 iterations,
5 fetch, 6 Eq. (3), 7 Eq. (4) and (5), 8 Eq. (2), 9 update.

Run:  python train.py                                      (the toy, after python pretrain.py)
      torchrun --nproc_per_node=2 train.py --data raf      (the paper's settings)
"""
import argparse
import copy
import math
import pickle
import shlex
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn import functional as F

from datasets import DATA, InputError, augment, hold_out, prepare, settle_classes
from decoder import LabelDecoder
from pll import (candidates_from_votes, cc_loss, contrastive_loss, generate_candidates,
                 initial_confidence, is_one_hot, lw_loss, lw_weights, move_prototypes,
                 moving_confidence, pll_loss, prototype_labels, rc_update, revise, simplex,
                 target_loss, transition, uniform_loss, uniform_transition)
from pretrain import (MODEL_SETTINGS, autocast, build_encoder, command_line, first_alone, fit,
                      load_checkpoint, load_split, load_weights, make_parser, parameter_groups,
                      parameters, refuse_idle, resolve, same_faces, saved_state, say, start,
                      uniforms)
from vit import from_torchvision, interpolate_positions

# setting: (paper, laptop, smallest, largest, meaning), or for a choice: (paper, laptop, choices,
# None, meaning). Every one is a flag of the same name. Batch size, learning rate and weight decay
# are the paper's (Sec. 4.2), epochs, warm-up, layer decay and drop path MaskFeat's.
SETTINGS = {
    **MODEL_SETTINGS,
    "model": ("vit", "vit", ("vit", "resnet18"), None, "backbone; Table 2 has ResNet-18"),
    "head": ("decoder", "decoder", ("decoder", "linear"), None, "label decoder or linear"),
    "loss": ("pll", "pll", ("pll", "ce", "soft", "rc", "cc", "lw", "pico"), None,
             "Eq. (2), or what a rival minimises"),
    "prior": ("uniform", "uniform", ("uniform", "votes"), None, "start of C: 1/|Y| or vote share"),
    "decoder_layers": (2, 2, 1, 12, "layers of the label decoder"),
    "epochs": (100, 15, 1, 100_000, "epochs"),
    "batch_size": (320, 32, 1, 1_000_000, "faces a step, all processes together"),
    "lr": (1e-4, 3e-4, 0.0, 10.0, "highest learning rate, that of the head"),
    "layer_decay": (0.65, 1.0, 0.01, 1.0, "factor of the learning rate a block away from the head"),
    "warmup_epochs": (20, 2, 0, 100_000, "epochs of linear warm-up"),
    "weight_decay": (0.05, 0.05, 0.0, 10.0, "weight decay of AdamW (not of norms, biases, tokens, "
                     "positions)"),
    "clip": (1.0, 1.0, 1e-6, 1e9, "largest norm of the gradient"),
    "drop_path": (0.1, 0.0, 0.0, 0.9, "how often the last block's branches are dropped"),
    "dropout": (0.1, 0.0, 0.0, 0.9, "dropout in the label decoder"),
    "crop_scale": (0.5, 0.8, 0.01, 1.0, "smallest area of a random crop"),
    "degrees": (15.0, 5.0, 0.0, 180.0, "largest rotation"),
    "light": (0.3, 0.2, 0.0, 1.0, "largest change of brightness and contrast"),
    "erase": (0.25, 0.0, 0.0, 1.0, "how often a rectangle is erased"),
    "min_votes": (1, 1, 1, 1000, "votes that make a label a candidate"),
    "uniform": ("queries", "queries", ("queries", "targets"), None,
                "Eq. (3) of the queries, or pull them to positions that are optimal in Eq. (3)"),
    "uniform_weight": (1.0, 1.0, 0.0, 1000.0, "weight of Eq. (3) beside Eq. (2)"),
    "tau": (0.25, 0.25, 0.001, 100.0, "temperature of Eq. (3)"),
    "threshold": (0.1, 0.1, 0.0, 0.9999, "lead of the first label that makes it the only one"),
    "warmup_revision": (20, 5, 0, 100_000,
                        "epochs before the first revision (PiCO: before its prototypes act)"),
    "lw_loss": ("sigmoid", "sigmoid", ("sigmoid", "ce"), None, "the loss that LW weights"),
    "lw_beta": (1.0, 1.0, 0.0, 100.0, "weight of the non-candidates in LW"),
    "queue": (8192, 1024, 1, 1_000_000, "earlier keys that PiCO compares with"),
    "val": (0.0, 0.0, 0.0, 0.9, "share of the training set that is held out for validation"),
    "save_every": (10, 1, 1, 100_000, "epochs from one checkpoint to the next"),
}

_linear = dict(head="linear", uniform_weight=0.0)          # no label queries
_plain = dict(_linear, init="imagenet")
# A row of the paper's tables is a line here: the settings in which it differs from the method
# (`init` and `revise` are resolved in `parse`), in the order of evaluate.py's tables. A loss of
# your own is a choice in SETTINGS, its start of C in `make_confidence`, its step in `objective` and
# its name in MOVING if that step changes C; `NEEDS`, `trivial_answer` say what else differs.
# Table 1 (rc, lw, pico on ResNet-18 as there, and on the ViT; cc and soft belong beside them), then
# Table 2, Table 3 and Table 4. With --scale laptop, "imagenet" is "none", random weights.
METHODS = {
    "ours": {},
    "baseline": dict(_plain, loss="ce"),
    "soft": dict(_plain, loss="soft"),
    **{name: dict(_plain, loss=name, model="resnet18") for name in ("rc", "cc", "lw", "pico")},
    **{f"{name}-vit": dict(_plain, loss=name) for name in ("rc", "cc", "lw", "pico")},
    "resnet18-pll": dict(_plain, model="resnet18", revise=False),
    "mim-pixel": dict(_linear, loss="ce", init="pretrain-pixel"),
    "mim-hog": dict(_linear, loss="ce"),
    "mim-pixel-pll": dict(_linear, revise=False, init="pretrain-pixel"),
    "mim-hog-pll": dict(_linear, revise=False),
    "decoder": dict(uniform_weight=0.0, revise=False),
    "decoder-uniform": dict(revise=False),
    "decoder-revision": dict(uniform_weight=0.0),
}
MOVING = ("rc", "lw", "pico")    # losses that change C (or LW's weights) in each step, unrevised
# Settings that have an effect only where others have certain values: (settings, when, in words).
NEEDS = (
    ("decoder_layers dropout uniform tau", lambda c: c["head"] == "decoder", "head is decoder"),
    ("uniform tau", lambda c: c["uniform_weight"] > 0, "uniform_weight is above 0"),
    ("tau", lambda c: c["uniform"] == "queries", "uniform is queries"),
    ("threshold", lambda c: c["revise"], "revise is True"),
    ("warmup_revision", lambda c: c["revise"] or c["loss"] == "pico",
     "revise is True or loss is pico"),
    ("candidates min_votes", lambda c: c["loss"] not in ("ce", "soft"), "the loss is of sets"),
    ("prior", lambda c: c["loss"] in ("pll", "rc", "pico"), "loss is pll, rc or pico"),
    ("lw_loss lw_beta", lambda c: c["loss"] == "lw", "loss is lw"),
    ("queue", lambda c: c["loss"] == "pico", "loss is pico"),
    ("patch_size dim depth heads layer_decay drop_path", lambda c: c["model"] == "vit",
     "model is vit"),
)
PICO = dict(width=128, encoder_momentum=0.999, first_momentum=0.95, last_momentum=0.8,
            contrast=0.5)


class LinearHead(nn.Module):
    """The head without label queries (Table 3): mean visual token, (B, HW, d) -> (B, K)."""

    def __init__(self, dim, classes):
        super().__init__()
        self.linear = nn.Linear(dim, classes)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens):
        # In fp32, as the label decoder's last step: in 16 bits two logits may be the same number.
        with torch.autocast(tokens.device.type, enabled=False):
            return self.linear(tokens.float().mean(dim=1))                # (B, HW, d) -> (B, K)


class ResNet18(nn.Module):
    """torchvision's ResNet-18 without its classifier: (B, 3, H, H) -> tokens (B, 1+HW, 512).

    The visual tokens are the last feature map. Their mean stands where the ViT has its class token,
    which no head reads.
    """

    def __init__(self):
        super().__init__()
        self.net = torchvision.models.resnet18(weights=None)
        self.net.avgpool, self.net.fc = nn.Identity(), nn.Identity()

    def forward(self, images):
        x = self.net(images).unflatten(1, (512, -1)).transpose(1, 2)      # (B, HW, 512)
        return torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)         # (B, 1+HW, 512)


class Recogniser(nn.Module):
    """Encoder, then a head that reads the visual tokens (Fig. 2); (B, 3, H, H) -> logits (B, K).

    Another decoder in place of `LabelDecoder` needs `queries` (K, d), which Eq. (3) spreads, and
    for evaluate.py's pictures (logits, maps) if need_attention is True. With `width` there is also
    PiCO's projection, which only its training asks for: then the output is (logits, unit vectors
    (B, width) from the mean token).
    """

    def __init__(self, encoder, head, dim=0, width=0):
        super().__init__()
        self.encoder, self.head = encoder, head
        self.projection = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, width)) \
            if width else None

    def forward(self, images):
        tokens = self.encoder(images)[:, 1:]                              # (B, HW, d)
        logits = self.head(tokens)                                        # (B, K)
        if self.projection is None or not self.training:
            return logits
        return logits, F.normalize(self.projection(tokens.mean(dim=1)).float(), dim=1)


def build_model(config):
    """The recogniser of the settings, with random weights."""
    if config["model"] == "resnet18":
        encoder, dim, heads = ResNet18(), 512, 8
    else:
        encoder = build_encoder(config, config["drop_path"])
        dim, heads = config["dim"], config["heads"]
    classes = len(DATA[config["data"]]["classes"])
    if config["uniform"] == "targets":
        try:
            simplex(classes, dim)
        except ValueError as error:
            raise InputError(f"--uniform targets: {error}; give a --dim of "
                             f"{classes - 1} or more") from None
    if config["head"] == "decoder":
        head = LabelDecoder(dim, classes, heads, config["decoder_layers"], config["dropout"])
    else:
        head = LinearHead(dim, classes)
    return Recogniser(encoder, head, dim, PICO["width"] if config["loss"] == "pico" else 0)


def initial_weights(config, encoder):
    """Fill the encoder as --init says; returns a sentence about what was loaded.

    "none" leaves the random start; "imagenet" is torchvision's IMAGENET1K_V1 weights; for the ViT a
    path is a checkpoint of pretrain.py (or its folder), whose positions are interpolated if the
    grid differs; for ResNet-18 it is any checkpoint of that network, whatever prefix its keys have.
    """
    if config["init"] == "none":
        return "encoder: random weights"
    if config["init"] == "imagenet":
        where, weights = "torchvision's IMAGENET1K_V1", imagenet_weights(config["model"])
    elif config["model"] == "resnet18":
        where, weights = resnet_weights(config["init"])
    else:
        where, weights = pretrained_weights(config)
    note = f"encoder: all {len(weights)} tensors from {where}"
    late = {k: v for k, v in encoder.state_dict().items()
            if k.endswith("num_batches_tracked") and k not in weights}     # of old ResNets
    note += f"; {len(late)} counters of batches start at 0" * bool(late)
    if "positions" in weights:
        count = weights["positions"].shape[1] - 1                         # n*n patches
        if math.isqrt(count) ** 2 != count:
            raise InputError(f"{where}: positions of {count} patches, which are no square grid; "
                             "give those of a square image, and one class token's before them")
        weights["positions"] = interpolate_positions(weights["positions"].float(), encoder.grid)
        if count != encoder.grid ** 2:
            note += f"; positions of {count} patches interpolated for {encoder.grid ** 2}"
    load_weights(encoder, {**weights, **late}, where, "give the same --scale and sizes"
                 if config["model"] == "vit" else "give a ResNet-18's")
    return note


def imagenet_weights(model):
    """torchvision's weights under our names, without the classifier; fetched if need be."""
    kind = (torchvision.models.ViT_B_16_Weights if model == "vit" else
            torchvision.models.ResNet18_Weights).IMAGENET1K_V1
    try:
        weights = kind.get_state_dict(weights_only=True, check_hash=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"--init imagenet: the weights cannot be fetched ({error})") from None
    if model == "resnet18":
        return {f"net.{k}": v for k, v in weights.items() if not k.startswith("fc.")}
    return {k: v for k, v in from_torchvision(weights).items() if not k.startswith("head.")}


def pretrained_weights(config):
    """Where the encoder of a pre-training run is, and its weights; its decoder stays (Sec. 3.2)."""
    init = config["init"]
    where = Path(init) if Path(init).is_file() or init.endswith(".pt") else Path(init) / "last.pt"
    if not where.exists() and where.name == "last.pt":
        raise InputError(f"{where}: no pre-training run; make it with: "
                         f"{pretraining_command(config, where.parent)} (or choose --init none)")
    state = load_checkpoint(where, "pretrain")
    if not state["log"]:
        raise InputError(f"{where}: stopped within its first epoch; go on with pretrain.py "
                         "--resume")
    heads = state["config"].get("heads")
    if heads != config["heads"]:                         # no tensor's shape tells
        raise InputError(f"{where}: its config has {heads} heads, this command "
                         f"{config['heads']}; give the same --heads")
    weights = {k.removeprefix("encoder."): v for k, v in state["model"].items()
               if k.startswith("encoder.")}
    return f"{where} (epoch {len(state['log'])})", weights


def pretraining_command(config, out):
    """The command that makes the run `out` of the same faces, for an encoder of the same sizes."""
    column = 0 if config["scale"] == "paper" else 1
    usual = {k: row[column] for k, row in MODEL_SETTINGS.items()}
    usual.update(data_dir=None, labels="argmax", align="points")
    flags = ["--data", config["data"], "--scale", config["scale"]]
    for name, value in usual.items():
        if config[name] != value:
            flags += ["--" + name.replace("_", "-"), str(config[name])]
    flags += ["--partial"] * config["partial"] + ["--target", "pixel"] * ("pixel" in out.name)
    if str(out) not in (f"runs/pretrain-{config['data']}{end}" for end in ("", "-pixel")):
        flags += ["--out", str(out)]
    return shlex.join(["python", "pretrain.py", *flags])


def resnet_weights(path):
    """Where a ResNet-18 is, and its weights; its keys may have any prefix, in any wrapping dict.

    Layers behind its pooling (classifier, features) are left out and named.
    """
    mark, search = "layer1.0.conv1.weight", [load_checkpoint(path, ours=False)]
    for state in search:                                 # grows by the dicts that it holds
        prefix = [k.removesuffix(mark) for k in state if str(k).endswith(mark)]
        if prefix:
            break
        search += [v for v in state.values() if isinstance(v, dict)]
    else:
        raise InputError(f"{path}: not a ResNet-18 (no key ends with {mark})")
    if len(prefix) > 1:
        raise InputError(f"{path}: {len(prefix)} networks (with the prefixes {', '.join(prefix)}); "
                         "keep one of them")
    own = torchvision.models.resnet18(weights=None).state_dict()
    found = {k.removeprefix(prefix[0]): v for k, v in state.items() if k.startswith(prefix[0])}
    ours = {k.split(".")[0] for k in own} - {"fc"}                   # conv1, bn1, layer1 ...
    extra = sorted({k.split(".")[0] for k in found} - ours)
    where = f"{path}" + f", without its {', '.join(extra)}" * bool(extra)
    return where, {f"net.{k}": v for k, v in found.items() if k.split(".")[0] not in extra}


def refuse_without_votes(config):
    """InputError for a setting that needs votes, of data without."""
    for name, value, remedy in (("loss", "soft", "choose another --method"),
                                ("prior", "votes", "leave it out"),
                                ("candidates", "votes", "choose lw1, lw2, lw4 or uniform:Q")):
        if config[name] == value:
            raise InputError(f"--{name} {value}: {config['data']} has no votes; {remedy}")


def make_candidates(config, faces):
    """Y of a training set (n, K) bool: from its votes, or generated where there are none.

    "lw1", "lw2", "lw4" and "uniform:Q" generate sets around the label; "votes" takes the labels
    with votes, and is the default where there are votes.
    """
    classes = len(DATA[config["data"]]["classes"])
    kind = config["candidates"] or ("lw1" if faces.votes is None else "votes")
    if faces.votes is None:
        refuse_without_votes(config)
    generated = kind != "votes"
    if config["min_votes"] > 1 and (generated or faces.votes.max() <= 1):
        raise InputError("--min-votes: these sets are " + ("generated" if generated else "from "
                         "shares of votes") + ", not from counts of votes; leave it out")
    if not generated:
        return candidates_from_votes(faces.votes, config["min_votes"])
    if kind.startswith("uniform:"):
        matrix = uniform_transition(classes, float(kind.removeprefix("uniform:")))
    else:
        matrix = transition(classes, kind)
    return generate_candidates(faces.labels, matrix, config["seed"])


def make_confidence(config, faces, candidates):
    """C before training (n, K): Y / |Y| or vote shares; one-hot for "ce", vote shares for "soft".

    For "lw" its weights, which sum to 1 inside the set and to 1 outside.
    """
    if config["loss"] not in ("pll", "ce", "soft") and (candidates.sum(dim=1) == 1).all():
        raise InputError(f"--loss {config['loss']}: every candidate set has a single label; give "
                         "it sets: --min-votes 1, or --candidates lw1")
    if config["loss"] == "ce":
        return F.one_hot(faces.labels, candidates.shape[1]).float()
    if config["loss"] == "soft":                         # who has a vote is a candidate
        return initial_confidence(faces.votes > 0, faces.votes)
    if config["loss"] == "lw":
        return lw_weights(torch.zeros(candidates.shape), candidates)      # of equal logits
    return initial_confidence(candidates, faces.votes if config["prior"] == "votes" else None)


def share_rows(run, rows):
    """A step's rows from all processes, in their order: (b, ...) -> (B, ...), detached.

    With them every process makes the same change to C (and to PiCO's prototypes and queue).
    """
    rows = rows.detach()                                 # C is data: no step learns through it
    if run.world == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(run.world)]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


@torch.no_grad()
def predict(run, model, faces, batch_size=256):
    """Logits of all faces (n, K) in fp32, on every process; exact for any number of processes.

    Each process computes every world-th batch; no face is padded or counted twice.
    """
    c = run.config
    if run.world > 1:
        for buffer in model.buffers():                   # BatchNorm's: each process has its own
            dist.broadcast(buffer, 0)
    model.eval()
    logits = torch.zeros(len(faces), len(DATA[c["data"]]["classes"]), device=run.device)
    for i in range(run.rank * batch_size, len(faces), run.world * batch_size):
        rows = range(len(faces))[i:i + batch_size]
        images = prepare(faces[rows].to(run.device), c["image_size"], c["data"])
        with autocast(run):
            logits[i:i + batch_size] = model(images)
    if run.world > 1:
        dist.all_reduce(logits)
    return logits


def accuracies(predicted, labels):
    """(accuracy, mean over the classes that occur of their accuracy); both in 0 .. 1."""
    hits = (predicted == labels).float()
    each = [hits[labels == c].mean() for c in labels.unique()]
    return hits.mean().item(), torch.stack(each).mean().item()


def parse(argv):
    """The command line as a dict of resolved settings."""
    parser = make_parser(__doc__, SETTINGS)
    add = parser.add_argument
    add("--method", default="ours", choices=METHODS, help="row of the paper's tables (%(default)s)")
    add("--init", help="encoder's start: PATH, imagenet or none (the pre-training run)")
    add("--revise", action=argparse.BooleanOptionalAction, help="Eq. (4-5), or C as it starts")
    add("--candidates", help="votes, lw1, lw2, lw4 or uniform:Q (votes where there are, else lw1)")
    args = parser.parse_args(argv)
    row = METHODS[args.method]
    if (args.head or row.get("head")) == "linear":
        row = {**row, "uniform_weight": 0.0}             # it has no label queries to spread
    config = resolve(args, SETTINGS, "train", row)
    name, other = config["data"], args.method != "ours"
    config["out"] = config["out"] or f"runs/train-{name}" + f"-{args.method}" * other
    init = row.get("init", "pretrain" if config["model"] == "vit" else "imagenet")
    if init == "imagenet" and config["scale"] == "laptop":
        init = "none"            # there are none of the ViT's size; ResNet-18 starts alike
    config["init"] = args.init or init.replace("pretrain", f"runs/pretrain-{name}")
    if config["revise"] is None:
        config["revise"] = config["loss"] == "pll" and row.get("revise", True)
    refuse_idle(vars(args), config, NEEDS)
    check_combination(config)
    return config


def check_combination(config):
    """Settings that cannot go together, as an InputError with what to do."""
    kind = config["candidates"]
    try:
        known = kind in (None, "votes", "lw1", "lw2", "lw4") or \
            (kind.startswith("uniform:") and 0 <= float(kind.removeprefix("uniform:")) <= 1)
    except ValueError:
        known = False
    if not known:
        raise InputError(f"--candidates {kind}: choose votes, lw1, lw2, lw4 or uniform:Q with Q "
                         "from 0 to 1")
    if config["prior"] == "votes" and kind not in (None, "votes"):
        raise InputError(f"--prior votes: nobody voted for the labels that --candidates {kind} "
                         "draws; leave one of the two out")
    if config["data"].startswith("affectnet"):           # RAF-DB's are seen when its folder is read
        refuse_without_votes(config)
    if config["init"] == "imagenet" and config["model"] == "vit" and any(
            config[k] != MODEL_SETTINGS[k][0] for k in ("patch_size", "dim", "depth", "heads")):
        raise InputError("--init imagenet: these weights are a ViT-B/16's; give --patch-size 16 "
                         "--dim 768 --depth 12 --heads 12, or --init none")
    if config["head"] == "linear" and config["uniform_weight"]:
        raise InputError("--uniform-weight: a linear head has no label queries to spread; choose "
                         "--head decoder or --uniform-weight 0")
    if config["revise"] and config["loss"] != "pll":
        raise InputError("--revise: Eq. (4-5) revise the confidence of --loss pll, not of --loss "
                         f"{config['loss']}")
    if (config["revise"] or config["loss"] == "pico") and \
            config["warmup_revision"] == config["epochs"]:
        raise InputError(f"--warmup-revision {config['warmup_revision']}: the run has no more "
                         "epochs, so it would never act; give less" +
                         ", or --no-revise" * config["revise"])
    pico = config["loss"] == "pico"
    if pico and config["accumulate"] > 1:
        raise InputError("--accumulate: PiCO's queue and momentum model move once a batch; use "
                         "more processes or a smaller --batch-size")
    if pico and config["queue"] < config["batch_size"]:
        raise InputError(f"--queue {config['queue']}: PiCO's queue must hold at least a batch, "
                         f"{config['batch_size']} keys")
    if pico and config["crop_scale"] == 1 and not any(
            config[k] for k in ("degrees", "light", "erase")):
        raise InputError("--loss pico: compares two views of a face, which need augmentation; set "
                         "--crop-scale, --degrees, --light or --erase")


def training_faces(run):
    """The training set, and what accuracy is watched on: a hold-out, the val split, or None."""
    faces = load_split(run, "train")
    if run.config["val"]:
        faces, held = hold_out(faces, run.config["val"], run.config["seed"])
        if not len(held):
            raise InputError(f"--val {run.config['val']}: holds out no face; give a larger share")
        if not len(faces):
            raise InputError(f"--val {run.config['val']}: leaves no face to train on; give less")
        return faces, held
    if "val" in DATA[run.config["data"]]["counts"]:
        return faces, load_split(run, "val")
    return faces, None


def confidence_table(run, faces, saved):
    """What is kept for each training face: Y and C (n, K), a resumed run's from `saved`."""
    if saved:
        candidates, confidence = saved["candidates"], saved["confidence"]
    else:
        candidates = make_candidates(run.config, faces)
        confidence = make_confidence(run.config, faces, candidates)       # Algorithm 1, line 1
    return {"candidates": candidates.to(run.device), "confidence": confidence.to(run.device)}


def trivial_answer(c, faces, candidates):
    """Logits (K,) of a classifier that ignores the image: each label's frequency in the first C.

    In Eq. (2) with that C no constant answer loses less; in CC, in LW and once C has moved, others
    do.
    """
    first = initial_confidence(candidates) if c["loss"] == "lw" else \
        make_confidence(c, faces, candidates.cpu())                       # (n, K)
    return first.mean(dim=0).clamp(min=1e-6).log().to(candidates.device)  # (K,)


def spread(c, head):
    """Eq. (3) of the label queries, or how far they are from positions that are optimal in it."""
    if not c["uniform_weight"]:
        return torch.zeros((), device=next(head.parameters()).device)
    if c["uniform"] == "targets":
        return target_loss(head.queries, simplex(*head.queries.shape).to(head.queries.device))
    return uniform_loss(head.queries, c["tau"])                           # Eq. (3)


def objective(c, logits, confidence, candidates, revising):
    """logits, C, Y, (B, K) each -> loss of the batch, a scalar; C for the next visit, (B, K).

    The method revises C, then computes the loss with it (Algorithm 1); "rc" and "lw" compute the
    loss with the C given and return the next. "ce" and "soft" never change C (the one-hot label,
    the vote shares); "lw" keeps its weights in it. Nothing is changed in place, because
    `algorithm_1` calls this a second time, for the loss of the trivial answer.
    """
    if c["loss"] == "cc":
        return cc_loss(logits, candidates), confidence
    if c["loss"] == "lw":
        return (lw_loss(logits, candidates, confidence, c["lw_beta"], c["lw_loss"]),
                lw_weights(logits, candidates))
    if c["loss"] == "rc":
        return pll_loss(logits, confidence), rc_update(logits, candidates)
    if revising:
        confidence = revise(confidence, logits, c["threshold"])           # Eq. (4), Eq. (5)
    return pll_loss(logits, confidence), confidence                       # Eq. (2)


def augmentation(c):
    """What `augment` asks for beside images and random numbers."""
    return [c[k] for k in ("image_size", "data", "crop_scale", "degrees", "light", "erase")]


def algorithm_1(run, model, faces, table):
    """The body of Algorithm 1's inner loop, as the `step_loss` that `pretrain.fit` asks for."""
    c, confidence, candidates = run.config, table["confidence"], table["candidates"]   # (n, K)
    labels, steps = faces.labels.to(run.device), len(faces) // c["batch_size"]
    frequency = trivial_answer(c, faces, candidates)                      # (K,)

    def iteration(network, images, indices, step):
        with run.timed("target"):
            images = augment(images, uniforms(run, step), *augmentation(c))
        indices = indices.to(run.device)
        with autocast(run):
            logits = network(images)                                      # (b, K)
        logits = logits.float()
        uniform = spread(c, model.head)                                   # Algorithm 1, line 6
        revising = c["revise"] and step // steps >= c["warmup_revision"]
        before, sets = confidence[indices], candidates[indices]           # (b, K)
        pll, after = objective(c, logits, before, sets, revising)         # Algorithm 1, lines 7, 8
        everywhere, rows = share_rows(run, indices), share_rows(run, after)
        finite = rows.isfinite().all(dim=1, keepdim=True)    # fp16's scaler leaves such a step out
        confidence[everywhere] = torch.where(finite, rows, confidence[everywhere])
        loss = pll + c["uniform_weight"] * uniform            # Eq. (2) + weight * Eq. (3)
        used = after if revising else before                              # the C of the loss
        trivial, _ = objective(c, frequency.expand(len(sets), -1), used, sets, False)
        hits = (logits.argmax(dim=1) == labels[indices]).float().mean()
        return loss, {"loss": loss, "pll": pll, "trivial": trivial, "uniform": uniform,
                      "train_accuracy": hits}

    return iteration


def pico_state(run, model, saved):
    """What PiCO keeps beside C: the momentum model, prototypes (K, 128) and the queue (M, 128).

    A resumed run takes them from its checkpoint `saved`.
    """
    c, classes = run.config, len(DATA[run.config["data"]]["classes"])
    generator = torch.Generator().manual_seed(c["seed"])
    queue = F.normalize(torch.randn(c["queue"], PICO["width"], generator=generator), dim=1)
    state = {"key_model": copy.deepcopy(model).requires_grad_(False),
             "prototypes": torch.zeros(classes, PICO["width"], device=run.device),
             "queue": queue.to(run.device), "at": torch.zeros((), dtype=torch.long),
             "queue_labels": torch.full((c["queue"],), -1, device=run.device)}
    if saved:
        state["key_model"].load_state_dict(saved["pico"]["key_model"])
        state.update({k: v.to(state[k].device) for k, v in saved["pico"].items()
                      if k != "key_model"})
    return state


def enqueue(state, keys, labels):
    """Put keys (B, 128) and their labels (B,) in the place of the oldest in PiCO's queue."""
    at = (state["at"] + torch.arange(len(keys))) % len(state["queue"])    # (B,)
    state["queue"][at.to(keys.device)] = keys
    state["queue_labels"][at.to(keys.device)] = labels
    state["at"] = (state["at"] + len(keys)) % len(state["queue"])


def pico(run, model, faces, table, state):
    """PiCO's step (Wang et al. 2022) as the `step_loss` that `pretrain.fit` asks for.

    Two views of each face; the second goes through the momentum model. Every process moves the same
    prototypes and the same queue, with the features of all processes. The bank of keys is the other
    view's batch and the queue.
    """
    c, confidence, candidates = run.config, table["confidence"], table["candidates"]   # (n, K)
    labels, steps = faces.labels.to(run.device), len(faces) // c["batch_size"]
    frequency = trivial_answer(c, faces, candidates)                      # (K,)

    def iteration(network, images, indices, step):
        epoch, u = step // steps, uniforms(run, step, columns=24)         # 12 for each view
        indices = indices.to(run.device)
        with run.timed("target"):
            one, two = (augment(images, v, *augmentation(c)) for v in u.split(12, dim=1))
        with autocast(run):
            logits, q = network(one)                                      # (b, K), (b, 128)
        with torch.no_grad():
            for key, query in zip(state["key_model"].parameters(), model.parameters()):
                key.lerp_(query, 1 - PICO["encoder_momentum"])
            with autocast(run):
                _, k = state["key_model"](two)                            # (b, 128)
            guess = logits.float().masked_fill(~candidates[indices], -torch.inf).argmax(dim=1)
            q_all, k_all = share_rows(run, q), share_rows(run, k)         # (B, 128)
            everywhere, guess_all = share_rows(run, indices), share_rows(run, guess)   # (B,)
            finite = q_all.isfinite().all() and k_all.isfinite().all()   # of all processes alike
            keys = torch.cat([k_all, state["queue"]])                     # (B+M, 128)
            own = everywhere == indices[:, None]                          # the other view, (b, B)
            positive = F.pad(own, (0, len(state["queue"])))               # none queued, (b, B+M)
            if epoch >= c["warmup_revision"] and finite:
                near = prototype_labels(q_all, state["prototypes"], candidates[everywhere])
                share = epoch / max(c["epochs"] - 1, 1)
                first, last = PICO["first_momentum"], PICO["last_momentum"]
                momentum = first + (last - first) * share
                confidence[everywhere] = moving_confidence(confidence[everywhere], near, momentum)
                positive |= guess[:, None] == torch.cat([guess_all, state["queue_labels"]])
            if finite:
                state["prototypes"] = move_prototypes(state["prototypes"], q_all, guess_all)
                enqueue(state, k_all, guess_all)
        uniform = spread(c, model.head)
        target = confidence[indices]                                      # (b, K)
        pll, trivial = pll_loss(logits, target), pll_loss(frequency.expand_as(target), target)
        contrast = contrastive_loss(q, keys, positive)
        hits = (logits.argmax(dim=1) == labels[indices]).float().mean()
        loss = pll + PICO["contrast"] * contrast + c["uniform_weight"] * uniform
        return loss, {"loss": loss, "pll": pll, "trivial": trivial, "contrastive": contrast,
                      "uniform": uniform, "train_accuracy": hits}

    return iteration


def watcher(run, model, faces, held, table):
    """What is logged after an epoch: what C has come to, how rightly, and accuracy on `held`.

    `revised` is the share of training faces that had several candidates and now have one label (for
    RC, LW and PiCO, which reduce no set: that have several candidates); of these, how many have
    the voted label on top, and on the toy the drawn class.
    """
    def end_of_epoch(record):
        c, numbers = run.config, {}
        candidates, confidence = table["candidates"].cpu(), table["confidence"].cpu()  # (n, K)
        if c["revise"] or c["loss"] in MOVING:
            rows = candidates.sum(dim=1) > 1                              # (n,)
            rows = rows & is_one_hot(confidence) if c["revise"] else rows
            first = (confidence * candidates).argmax(dim=1)               # (n,)
            numbers["revised"] = rows.float().mean().item()
            for name, right in (("voted", faces.labels), ("true", faces.truth)):
                if rows.any() and right is not None:
                    numbers[f"revised_as_{name}"] = (first == right)[rows].float().mean().item()
        if held is not None:
            predicted = predict(run, model, held).argmax(dim=1).cpu()
            numbers["val_accuracy"], numbers["val_mean_class"] = accuracies(predicted, held.labels)
        return numbers

    return end_of_epoch


def main(argv=None):
    """Train from the command line."""
    c = parse(argv)
    settle_classes(c)
    run = start(c)
    if c["model"] == "resnet18" and len(run.rows) == 1 and c["image_size"] <= 32:
        raise InputError("--batch-size: ResNet-18's batch statistics need two faces or more in "
                         "each process and part; give more, or a smaller --accumulate")
    saved = saved_state(run, kept=("pico",))
    torch.manual_seed(c["seed"])
    model = build_model(c)
    note = "encoder: resumed" if saved else first_alone(
        run, lambda: initial_weights(c, model.encoder))
    model.to(run.device)
    faces, held = training_faces(run)
    same_faces(run, saved, faces)
    table = confidence_table(run, faces, saved)
    groups = parameter_groups(model, c["weight_decay"], c["depth"], c["layer_decay"])
    optimizer = torch.optim.AdamW(groups, lr=c["lr"], betas=(0.9, 0.999), fused=True)
    sizes = table["candidates"].sum(dim=1).float()                        # |Y|, (n,)
    say(run, "\n".join(faces.notes + [note]))
    say(run, f"{parameters(model):,} parameters; {sizes.mean():.2f} candidates a face, one for "
             f"{(sizes == 1).float().mean():.1%} of them")
    about, state = DATA[c["data"]], {}
    if c["loss"] == "pico":
        state = pico_state(run, model, saved)
        step_loss = pico(run, model, faces, table, state)
    else:
        step_loss = algorithm_1(run, model, faces, table)

    def extra():
        kept = {k: v.state_dict() if k == "key_model" else v for k, v in state.items()}
        return {**table, "pico": kept, "classes": about["classes"], "mean": list(about["mean"]),
                "std": list(about["std"])}

    fit(run, model, optimizer, faces, step_loss, saved, watcher(run, model, faces, held, table),
        extra)
    say(run, f"trained: {run.out / 'last.pt'}")


if __name__ == "__main__":
    command_line(main)
