"""Stage 2: Algorithm 1. The pre-trained encoder and the label decoder learn from candidate sets.

Paper: Sec. 3.3 and Algorithm 1, settings of Sec. 4.2; what the paper leaves to MaskFeat's protocol
(layer-wise decay, warm-up, drop path) is taken from there.

    symbol   name        shape         meaning
    x_i      images      (B, 3, H, H)  an augmented batch
    Y_i      candidates  (n, K) bool   candidate sets of the whole training set
    C_i      confidence  (n, K)        one row a training face, kept and revised during the run
    Q        queries     (K, d)        label embeddings of the decoder
             logits      (B, K)        sigma_logits, one a label
    T_max    epochs                    outer loop, in `pretrain.fit`
    I_max    steps                     inner loop; its body is `iteration` below

Run:  python train.py                                      (the toy, after python pretrain.py)
      torchrun --nproc_per_node=2 train.py --data raf      (the paper's settings)
"""
import hashlib
import math
from pathlib import Path
from urllib.error import URLError

import torch
import torch.distributed as dist
import torchvision
from torch import nn

from datasets import DATA, InputError, augment, hold_out, prepare
from decoder import LabelDecoder
from pll import (candidates_from_votes, generate_candidates, initial_confidence, is_revised,
                 pll_loss, revise, transition, uniform_loss)
from pretrain import (MODEL_SETTINGS, build_encoder, command_line, fit, load_checkpoint, load_split,
                      load_weights, make_parser, parameter_groups, parameters, precision, resolve,
                      say, start, uniforms)
from vit import from_torchvision, interpolate_positions

# setting: (paper, laptop, smallest, largest, meaning). Every one is a flag of the same name.
SETTINGS = {
    **MODEL_SETTINGS,
    "decoder_layers": (2, 2, 1, 12, "layers of the label decoder"),
    "epochs": (100, 15, 1, 100_000, "epochs"),
    "batch_size": (320, 32, 1, 1_000_000, "faces a step, all processes together"),
    "lr": (1e-4, 3e-4, 0.0, 10.0, "highest learning rate, that of the head"),
    "layer_decay": (0.65, 1.0, 0.01, 1.0, "factor of the learning rate for each deeper block"),
    "warmup_epochs": (20, 2, 0, 100_000, "epochs of linear warm-up"),
    "weight_decay": (0.05, 0.05, 0.0, 10.0, "weight decay of AdamW (none on 1-D parameters)"),
    "clip": (1.0, 1.0, 0.0, 1e9, "largest norm of the gradient"),
    "drop_path": (0.1, 0.0, 0.0, 0.9, "how often the last block's branches are dropped"),
    "dropout": (0.1, 0.0, 0.0, 0.9, "dropout in the label decoder"),
    "crop_scale": (0.5, 0.8, 0.01, 1.0, "smallest area of a random crop"),
    "degrees": (15.0, 5.0, 0.0, 180.0, "largest rotation"),
    "light": (0.3, 0.2, 0.0, 1.0, "largest change of brightness and contrast"),
    "erase": (0.25, 0.0, 0.0, 1.0, "how often a rectangle is erased"),
    "min_votes": (1, 1, 1, 1000, "votes that make a label a candidate"),
    "uniform_weight": (1.0, 1.0, 0.0, 1000.0, "weight of Eq. (3) beside Eq. (2)"),
    "tau": (0.25, 0.25, 0.001, 100.0, "temperature of Eq. (3)"),
    "threshold": (0.1, 0.1, 0.0, 0.9999, "lead of the first label that makes it the only one"),
    "warmup_revision": (20, 5, 0, 100_000, "epochs before the first revision"),
    "val": (0.0, 0.0, 0.0, 0.9, "share of the training set that is held out for validation"),
}


class LinearHead(nn.Module):
    """The usual head, without label queries: mean of the visual tokens (B, HW, d) -> (B, K)."""

    def __init__(self, dim, classes):
        super().__init__()
        self.linear = nn.Linear(dim, classes)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens):
        return self.linear(tokens.mean(dim=1))                            # (B, HW, d) -> (B, K)


class Recogniser(nn.Module):
    """Fig. 2: encoder, then a head that reads the visual tokens; (B, 3, H, H) -> logits (B, K)."""

    def __init__(self, encoder, head):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images):
        return self.head(self.encoder(images)[:, 1:])                     # (B, HW, d) -> (B, K)


def build_model(config):
    """The recogniser of the settings, with random weights."""
    encoder = build_encoder(config, config["drop_path"])
    classes = len(DATA[config["data"]]["classes"])
    if config["head"] == "linear":
        return Recogniser(encoder, LinearHead(config["dim"], classes))
    return Recogniser(encoder, LabelDecoder(config["dim"], classes, config["heads"],
                                            config["decoder_layers"], config["dropout"]))


def initial_weights(config, encoder):
    """Fill the encoder as --init says; returns a sentence about what was loaded.

    A path is a checkpoint of pretrain.py (or its folder), "imagenet" torchvision's
    IMAGENET1K_V1 weights of ViT-B/16, "none" leaves the random start. Positions are interpolated
    if the grid differs; everything else must fit.
    """
    if config["init"] == "none":
        return "encoder starts from random weights"
    if config["init"] == "imagenet":
        try:
            weights = torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1.get_state_dict()
        except (URLError, OSError) as error:
            raise InputError(f"--init imagenet: the weights cannot be fetched ({error})") from None
        weights = {k: v for k, v in from_torchvision(weights).items() if not k.startswith("head.")}
        where = "torchvision's IMAGENET1K_V1"
    else:
        where = Path(config["init"])
        where = where / "last.pt" if where.is_dir() else where
        if not where.exists() and config["init"] == f"runs/pretrain-{config['data']}":
            raise InputError(f"{where}/last.pt: no pre-training run; make it with: python "
                             f"pretrain.py --data {config['data']} (or choose --init imagenet or "
                             "--init none)")
        state = load_checkpoint(where, "pretrain")
        weights = {k.removeprefix("encoder."): v for k, v in state["model"].items()
                   if k.startswith("encoder.")}
        where = f"{where} (epoch {len(state['log'])})"
    weights["positions"] = interpolate_positions(weights["positions"], encoder.grid)
    load_weights(encoder, weights, where)
    return f"encoder: all {len(weights)} tensors from {where}"


def make_candidates(config, faces):
    """Y of a training set (n, K) bool: from its votes, or generated as LW where there are none."""
    if faces.votes is not None:
        return candidates_from_votes(faces.votes, config["min_votes"])
    matrix = transition(len(DATA[config["data"]]["classes"]), config["candidates"])
    return generate_candidates(faces.labels, matrix, config["seed"])


def share_rows(run, indices, rows):
    """All processes' rows of the table C: indices (b,), rows (b, K) -> (B,), (B, K).

    A face's confidence is one truth: after this, every process writes every row of the step.
    """
    if run.world == 1:
        return indices, rows
    all_indices = [torch.empty_like(indices) for _ in range(run.world)]
    all_rows = [torch.empty_like(rows) for _ in range(run.world)]
    dist.all_gather(all_indices, indices.contiguous())
    dist.all_gather(all_rows, rows.contiguous())
    return torch.cat(all_indices), torch.cat(all_rows)


@torch.no_grad()
def predict(run, model, faces, batch_size=256):
    """Logits of all faces (n, K) in fp32, on every process; exact for any number of processes.

    Each process computes every world-th batch; no face is padded or counted twice.
    """
    c, dtype = run.config, precision(run.device)
    model.eval()
    logits = torch.zeros(len(faces), len(DATA[c["data"]]["classes"]), device=run.device)
    for i in range(run.rank * batch_size, len(faces), run.world * batch_size):
        rows = range(i, min(i + batch_size, len(faces)))
        images = prepare(faces[rows].to(run.device), c["image_size"], c["data"])
        with torch.autocast(run.device.type, dtype, enabled=dtype is not None):
            logits[rows.start:rows.stop] = model(images).float()
    if run.world > 1:
        dist.all_reduce(logits)
    return logits


def accuracies(predicted, labels, classes):
    """(accuracy, mean over the classes that occur of their accuracy); both in 0 .. 1."""
    hits = (predicted == labels).float()
    each = [hits[labels == c].mean() for c in range(classes) if (labels == c).any()]
    return hits.mean().item(), torch.stack(each).mean().item()


def parse(argv):
    """The command line as a dict of resolved settings."""
    parser = make_parser(__doc__, SETTINGS)
    add = parser.add_argument
    add("--init", help="encoder's start: PATH, imagenet or none (the pre-training run)")
    add("--head", default="decoder", choices=("decoder", "linear"), help="Sec. 3.3 (%(default)s)")
    add("--no-revise", action="store_true", help="leave Eq. (4-5) out: C stays as it starts")
    add("--candidates", default="lw1", choices=("lw1", "lw2", "lw4"),
        help="how candidate sets are made where there are no votes (%(default)s)")
    config = resolve(parser.parse_args(argv), SETTINGS, "train")
    config["init"] = config["init"] or f"runs/pretrain-{config['data']}"
    if config["head"] == "linear":
        config["uniform_weight"] = 0.0                   # there are no queries to spread
    return config


def training_faces(run):
    """The training set, and what accuracy is watched on: a hold-out, the val split, or None."""
    faces = load_split(run, "train")
    if run.config["val"]:
        return hold_out(faces, run.config["val"], run.config["seed"])
    if "val" in DATA[run.config["data"]]["counts"]:
        return faces, load_split(run, "val")
    return faces, None


def confidence_table(run, faces):
    """What is kept for each training face: Y and C (n, K), and a digest of the faces' names.

    A resumed run takes them from its checkpoint, which must be of the same faces.
    """
    digest = hashlib.sha256("\n".join(faces.names).encode()).hexdigest()
    path = run.out / "last.pt"
    if run.config["resume"] and path.exists():
        state = load_checkpoint(path, "train")
        if state["faces"] != digest:
            raise InputError(f"{path}: its training faces are not those of this data set; give the "
                             "same --data-dir")
        candidates, confidence = state["candidates"], state["confidence"]
    else:
        candidates = make_candidates(run.config, faces)
        confidence = initial_confidence(candidates)                       # Algorithm 1, "Ensure"
    return {"candidates": candidates.to(run.device), "confidence": confidence.to(run.device),
            "faces": digest}


def algorithm_1(run, model, faces, table):
    """The body of Algorithm 1's inner loop, as the `step_loss` that `pretrain.fit` asks for."""
    c, confidence = run.config, table["confidence"]                       # C (n, K)
    labels, steps = faces.labels.to(run.device), len(faces) // c["batch_size"]
    frequency = initial_confidence(table["candidates"]).mean(dim=0)       # (K,), the trivial answer

    def iteration(network, images, indices, step):
        images = augment(images, uniforms(run, step), c["image_size"], c["data"], c["crop_scale"],
                         c["degrees"], c["light"], c["erase"])
        indices = indices.to(run.device)
        logits = network(images)                                          # (b, K)
        uniform = logits.new_zeros(())
        if c["uniform_weight"]:
            uniform = uniform_loss(model.head.queries, c["tau"])          # Eq. (3)
        if not c["no_revise"] and step // steps >= c["warmup_revision"]:
            revised = revise(confidence[indices], logits, c["threshold"])   # Eq. (4), Eq. (5)
            everywhere, rows = share_rows(run, indices, revised)
            confidence[everywhere] = rows
        target = confidence[indices]                                      # (b, K)
        pll = pll_loss(logits, target)                                    # Eq. (2)
        loss = pll + c["uniform_weight"] * uniform
        trivial = pll_loss(frequency.log().expand(len(target), -1), target)
        hits = (logits.argmax(dim=1) == labels[indices]).float().mean()
        return loss, {"loss": loss, "pll": pll, "trivial": trivial, "uniform": uniform,
                      "train_accuracy": hits}

    return iteration


def watcher(run, model, faces, held, table):
    """What is logged after an epoch: how far C is revised and how well, accuracy on `held`."""
    def end_of_epoch(epoch, record):
        confidence = table["confidence"].cpu()
        rows = is_revised(confidence) & (table["candidates"].cpu().sum(dim=1) > 1)    # (n,)
        numbers = {"revised": rows.float().mean().item()}
        if rows.any():
            chosen = confidence[rows].argmax(dim=1)
            numbers["revised_as_voted"] = (chosen == faces.labels[rows]).float().mean().item()
            if faces.truth is not None:
                numbers["revised_as_true"] = (chosen == faces.truth[rows]).float().mean().item()
        if held is not None:
            predicted = predict(run, model, held).argmax(dim=1).cpu()
            numbers["val_accuracy"], numbers["val_mean_class"] = accuracies(
                predicted, held.labels, confidence.shape[1])
        return numbers

    return end_of_epoch


def main(argv=None):
    """Train from the command line."""
    c = parse(argv)
    run = start(c)
    torch.manual_seed(c["seed"])
    model = build_model(c)
    note = "encoder: resumed" if c["resume"] else initial_weights(c, model.encoder)
    model.to(run.device)
    faces, held = training_faces(run)
    table = confidence_table(run, faces)
    groups = parameter_groups(model, c["weight_decay"], c["depth"], c["layer_decay"])
    optimizer = torch.optim.AdamW(groups, lr=c["lr"], betas=(0.9, 0.999), fused=True)
    sizes = table["candidates"].sum(dim=1).float()                        # |Y|, (n,)
    say(run, "\n".join(faces.notes + [note]))
    say(run, f"{parameters(model):,} parameters; {sizes.mean():.2f} candidates a face, one for "
             f"{(sizes == 1).float().mean():.1%} of them")
    about = DATA[c["data"]]
    extra = {"classes": about["classes"], "mean": list(about["mean"]), "std": list(about["std"])}
    fit(run, model, optimizer, faces, algorithm_1(run, model, faces, table),
        lambda: {**table, **extra}, watcher(run, model, faces, held, table))
    say(run, f"trained: {run.out / 'last.pt'}")


if __name__ == "__main__":
    command_line(main)
