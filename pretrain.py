"""Stage 1: masked image modelling. A ViT learns faces by predicting the HOG of hidden patches.

Paper: Sec. 3.2 and Fig. 3, settings of Sec. 4.2. The encoder sees the visible patches only (as MAE,
He et al. 2022), a light decoder predicts the HOG of the masked ones (the target of MaskFeat, Wei et
al. 2022) and is discarded afterwards. The middle of the file is what both stages need: settings,
processes, schedule, checkpoints and the loop over epochs.

    name        shape          meaning
    images      (B, 3, H, H)   an augmented batch
    mask        (B, N) bool    True where a patch is masked; the same number in every row
    keep        (B, V)         indices of the V visible patches, ascending
    tokens      (B, 1+V, dim)  class token and visible tokens after the encoder, narrowed to the
                               decoder's width
    target      (B, N, T)      HOG, T = 108, or normalised pixels, T = 3*P*P
    prediction  (B, N, T)      the decoder's output

B: rows of a batch; b: those of them that this process computes now; C, S: channels and side of the
faces as they are stored.

Run:  python pretrain.py                                   (the toy, two minutes on two cores)
      torchrun --nproc_per_node=4 pretrain.py --data raf   (the paper's settings)
"""
import argparse
import hashlib
import json
import math
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets import (InputError, augment, complaint, data_flags, load_faces, prepare,
                      settle_classes, settle_flags, to_picture)
from hog import footnote, from_patches, glyphs, hog_targets
from vit import Block, ViT, initialise, patchify, unpatchify, wave_positions

# setting: (paper, laptop, smallest, largest, meaning), or for a choice: (paper, laptop, choices,
# None, meaning). Every one is a flag of the same name.
MODEL_SETTINGS = {
    "image_size": (224, 48, 8, 1024, "side of an image in pixels"),
    "patch_size": (16, 8, 2, 64, "side of a patch in pixels"),
    "dim": (768, 128, 8, 4096, "width of the encoder's tokens"),
    "depth": (12, 6, 1, 100, "blocks of the encoder"),
    "heads": (12, 4, 1, 64, "attention heads of the encoder"),
}
# The ViT, epochs, batch size, learning rate and mask ratio are the paper's (Sec. 4.2), the decoder
# is MAE's, `picture_every` and `save_every` are ours, all else MaskFeat's.
SETTINGS = {
    **MODEL_SETTINGS,
    "decoder_dim": (512, 96, 4, 4096, "width of the reconstruction decoder"),
    "decoder_depth": (8, 2, 1, 100, "blocks of the reconstruction decoder"),
    "decoder_heads": (16, 4, 1, 64, "attention heads of the reconstruction decoder"),
    "mask_ratio": (0.4, 0.4, 0.01, 0.99, "share of the patches that is masked"),
    "mask": ("block", "random", ("block", "random"), None, "how masked patches are chosen"),
    "epochs": (600, 16, 1, 100_000, "epochs"),
    "batch_size": (192, 32, 1, 1_000_000, "faces a step, all processes together"),
    "lr": (2e-4, 8e-4, 0.0, 10.0, "highest learning rate"),
    "warmup_epochs": (60, 2, 0, 100_000, "epochs of linear warm-up"),
    "weight_decay": (0.05, 0.05, 0.0, 10.0, "weight decay of AdamW (not of norms, biases, tokens, "
                     "positions)"),
    "clip": (0.02, 0.02, 1e-6, 1e9, "largest norm of the gradient"),
    "crop_scale": (0.5, 0.5, 0.01, 1.0, "smallest area of a random crop"),
    "picture_every": (50, 4, 1, 100_000, "epochs from one picture of the predictions to the next"),
    "save_every": (10, 1, 1, 100_000, "epochs from one checkpoint to the next"),
}
# From one seed's streams of random numbers to the next one's: more than the steps of a run (90,000
# on FERPlus with the paper's settings) and the rows of a batch.
SEED_STRIDE = 1_000_003


# ---------------------------------------------------------------------------------------- masking

def masked_count(patches, ratio):
    """How many of `patches` are masked (Sec. 4.2): all but int(N * (1 - ratio)), as MAE; 79 of 196
    at the paper's 0.4."""
    return patches - int(patches * (1 - ratio))


def random_mask(batch, grid, count, seed):
    """Exactly `count` patches of each image, uniformly: (B, N) bool, True is masked."""
    noise = torch.rand(batch, grid * grid, generator=torch.Generator().manual_seed(seed))
    ranks = noise.argsort(dim=1).argsort(dim=1)     # how many of its row are smaller, (B, N)
    return ranks < count


def block_mask(grid, count, rng):
    """Exactly `count` masked patches of one image in rectangles (BEiT, MaskFeat): (N,) bool.

    A rectangle has at least 16 of 196 patches (that share of another grid) before its sides are
    rounded, and an aspect ratio log-uniform in 0.3 .. 1/0.3. It is refused if it does not fit, adds
    nothing or too much; after ten refusals in a row single patches make up the count.
    """
    mask = np.zeros((grid, grid), dtype=bool)
    smallest = 16 / 196 * grid * grid
    missing, tries = count, 10
    while missing > 0 and tries > 0:
        tries -= 1
        area = rng.uniform(smallest, max(missing, smallest))
        aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < height <= grid and 0 < width <= grid):
            continue
        top, left = rng.randint(0, grid - height), rng.randint(0, grid - width)
        block = mask[top:top + height, left:left + width]                # a view of the mask
        added = int((~block).sum())
        if 0 < added <= missing:
            block[:] = True
            missing, tries = missing - added, 10
    mask = mask.reshape(-1)                                              # (N,)
    mask[rng.sample(np.flatnonzero(~mask).tolist(), missing)] = True
    return mask


def draw_masks(kind, rows, grid, count, seed):
    """Masks for `rows` (a range) of a batch drawn from `seed`, (len(rows), N) bool.

    Row i is the same whichever process asks for it.
    """
    if kind == "random":
        return random_mask(rows.stop, grid, count, seed)[rows.start:]
    masks = [block_mask(grid, count, random.Random(seed * SEED_STRIDE + row)) for row in rows]
    return torch.from_numpy(np.stack(masks))


def visible(mask):
    """Indices of the visible patches, ascending: (B, N) bool -> (B, V)."""
    count = int((~mask[0]).sum())
    return mask.int().argsort(dim=1, stable=True)[:, :count]     # visible is 0, so first; (B, V)


# ---------------------------------------------------------------------------------------- the model

class MaskedModel(nn.Module):
    """Encoder and a light decoder that predicts the target of every patch (Sec. 3.2, Fig. 3).

    kind "visible" (the paper, as MAE): masked patches never enter the encoder; the decoder gets its
    tokens, narrowed, with a learned mask token wherever a patch is masked, and fixed positions.
    kind "maskfeat" (MaskFeat): the mask token replaces masked patches at the encoder's input and a
    linear layer on the encoder's output is the whole decoder.
    """

    def __init__(self, encoder, target_dim, dim=512, depth=8, heads=16, kind="visible"):
        super().__init__()
        self.encoder, self.kind = encoder, kind
        width = dim if kind == "visible" else encoder.dim
        self.mask_token = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))
        if kind == "visible":
            self.narrow = nn.Linear(encoder.dim, dim)
            self.register_buffer("waves", wave_positions(dim, encoder.grid), persistent=False)
            self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
            self.norm = nn.LayerNorm(dim, eps=1e-6)
            initialise(self.narrow)
            initialise(self.blocks)
        self.predict = nn.Linear(width, target_dim)
        nn.init.normal_(self.predict.weight, std=0.02)     # begin near 0: HOG's rms is 1/3
        nn.init.zeros_(self.predict.bias)

    def forward(self, images, mask):
        """images (B, 3, H, H), mask (B, N) bool -> prediction of every patch (B, N, T).

        A mask on the CPU saves time: a card's would have to be awaited to count what is visible.
        """
        if self.kind == "maskfeat":
            positions = self.encoder.positions[:, 1:]                      # (1, N, d)
            hidden = mask.to(images.device).unsqueeze(-1)                  # (B, N, 1)
            tokens = torch.where(hidden, self.mask_token + positions,
                                 self.encoder.embed(images))               # (B, N, d)
            return self.predict(self.encoder.encode(tokens)[:, 1:])        # (B, N, T)
        keep = visible(mask).to(images.device)                             # (B, V)
        tokens = self.narrow(self.encoder(images, keep))                   # (B, 1+V, dim)
        full = self.mask_token.to(tokens.dtype).expand(*mask.shape, -1)    # (B, N, dim)
        full = full.scatter(1, keep.unsqueeze(-1).expand_as(tokens[:, 1:]), tokens[:, 1:])
        x = torch.cat([tokens[:, :1], full], dim=1) + self.waves           # (B, 1+N, dim)
        for block in self.blocks:
            x = block(x)
        return self.predict(self.norm(x)[:, 1:])                           # (B, N, T)


def make_targets(images, kind, patch_size):
    """What is predicted for each patch, (B, N, T) in fp32: its HOG (Sec. 3.2), or its own pixels.

    Pixels (the rival in Table 3) are normalised: a patch loses its mean and is divided by its
    deviation (MAE).
    """
    if kind == "hog":
        return hog_targets(images, patch_size)                             # (B, N, 108)
    patches = patchify(images.float(), patch_size)                         # (B, N, 3*P*P)
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)         # (B, N, 1) each
    return (patches - mean) / (variance + 1e-6).sqrt()                     # (B, N, 3*P*P)


def masked_mse(prediction, target, mask):
    """Mean squared error over the masked patches alone, MaskFeat's (Sec. 3.2 names no loss).

    prediction, target (B, N, T), mask (B, N) bool -> a scalar in fp32.
    """
    error = (prediction.float() - target).square().mean(dim=-1)            # (B, N)
    return (error * mask).sum() / mask.sum()


def build_encoder(config, drop_path_rate=0.0):
    """The ViT of the settings."""
    return ViT(config["image_size"], config["patch_size"], config["dim"], config["depth"],
               config["heads"], drop_path_rate=drop_path_rate)


def build_masked_model(config):
    """Encoder and reconstruction decoder of the settings."""
    target_dim = 108 if config["target"] == "hog" else 3 * config["patch_size"] ** 2
    return MaskedModel(build_encoder(config), target_dim, config["decoder_dim"],
                       config["decoder_depth"], config["decoder_heads"], config["encoder"])


def mean_target(run, faces):
    """The mean target of each position over 1,024 faces at most, (1, N, T): the trivial answer.

    The faces are cropped as in training, so that no other constant has a smaller loss.
    """
    c, total, count = run.config, 0.0, min(len(faces), 1024)
    u = torch.rand(count, 12, generator=torch.Generator().manual_seed(c["seed"])).to(run.device)
    for i in range(0, count, 64):
        images = faces[range(i, min(i + 64, count))].to(run.device)       # uint8 (64, C, S, S)
        images = augment(images, u[i:i + 64], c["image_size"], c["data"], c["crop_scale"])
        total = total + make_targets(images, c["target"], c["patch_size"]).sum(0, keepdim=True)
    return total / count


def seen_as(values, image, config, pixels):
    """Targets or predictions (N, T) of one face, image (3, H, H), as a picture: PIL RGB.

    HOG as glyphs; pixels with the mean and the deviation of the image's own patches put back.
    """
    patch = config["patch_size"]
    if config["target"] == "hog":
        histograms = from_patches(values[None], 2)[0]                       # (3, 9, h, w)
        picture = glyphs(histograms, pixels // histograms.shape[-1])
    else:
        patches = patchify(image[None], patch)                              # (1, N, 3*P*P)
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        values = values[None] * (variance + 1e-6).sqrt() + mean
        picture = to_picture(unpatchify(values, patch)[0], config["data"])
    return picture.resize((pixels, pixels), Image.Resampling.BICUBIC)


@torch.no_grad()
def reconstruction(run, model, faces, note, pixels=288):
    """Input, mask, target and prediction of the first four faces beside each other: PIL RGB.

    Visible patches, whose prediction is not trained, are white in the last two columns.
    """
    c, grid = run.config, run.config["image_size"] // run.config["patch_size"]
    rows, size, pad, top = range(min(4, len(faces))), (pixels, pixels), 16, 96
    images = prepare(faces[rows].to(run.device), c["image_size"], c["data"])         # (4, 3, H, H)
    mask = draw_masks(c["mask"], rows, grid, masked_count(grid * grid, c["mask_ratio"]), 0)
    model.eval()
    with autocast(run):
        prediction = model(images, mask).float().cpu()                               # (4, N, T)
    images = images.cpu()
    target = make_targets(images, c["target"], c["patch_size"])                      # (4, N, T)
    sheet = Image.new("RGB", (4 * (pixels + pad) + pad, top + len(rows) * (pixels + pad)), "white")
    draw, name = ImageDraw.Draw(sheet), {"hog": "HOG", "pixel": "pixels"}[c["target"]]
    draw.text((pad, 8), note, "black", ImageFont.load_default(26))
    for k, title in enumerate(("input", "what the encoder sees", f"{name} of masked patches",
                               f"predicted {name}")):
        draw.text((pad + k * (pixels + pad), top - 8), title, "black", ImageFont.load_default(23),
                  anchor="ls")
    grey, white = (Image.new("RGB", size, shade) for shade in ((215, 215, 215), "white"))
    for i in rows:
        masked = Image.fromarray(mask[i].reshape(grid, grid).byte().numpy() * 255)
        masked = masked.resize(size, Image.Resampling.NEAREST)              # 255 where masked
        face = to_picture(images[i], c["data"]).resize(size, Image.Resampling.BICUBIC)
        columns = [face, Image.composite(grey, face, masked)] + [
            Image.composite(seen_as(v[i], images[i], c, pixels), white, masked)
            for v in (target, prediction)]
        for k, column in enumerate(columns):
            x, y = pad + k * (pixels + pad), top + i * (pixels + pad)
            sheet.paste(column, (x, y))
            draw.rectangle((x - 1, y - 1, x + pixels, y + pixels), outline="silver")
    strokes = "a stroke: the direction of a cell's edges, the stronger the more votes; "
    return footnote(sheet, strokes * (c["target"] == "hog") + "grey: masked; white: not predicted, "
                    "as the encoder sees it")


# ------------------------------------------------------------------ what both stages need: settings

def make_parser(description, settings):
    """Flags of both stages, and one flag for each setting of the table."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    add = parser.add_argument
    data_flags(parser)
    add("--scale", choices=("paper", "laptop"), help="preset (toy: laptop, others: paper)")
    add("--out", help="run folder (runs/STAGE-DATA)")
    add("--seed", type=int, default=0, help="seed of everything random (%(default)s)")
    add("--workers", type=int, help="loading processes (paper 2, laptop 0)")
    add("--device", help="cpu, cuda or cuda:N (cuda if there is one)")
    add("--deterministic", action="store_true", help="the same bits on CUDA and in more than "
        "two processes too, more slowly")
    add("--resume", action="store_true", help="go on from the run folder's last.pt")
    add("--accumulate", type=int, default=1, help="parts a process's share of a batch is computed "
        "in, for less memory (%(default)s)")
    add("--compile", action="store_true", help="torch.compile the network (needs a C++ compiler)")
    add("--cache", default="runs/cache", help="folder of the memory maps (%(default)s)")
    for name, (paper, laptop, low, _, meaning) in settings.items():
        add("--" + name.replace("_", "-"), type=type(paper),
            choices=low if isinstance(paper, str) else None,
            help=f"{meaning} (paper {paper}, laptop {laptop})")
    return parser


def refuse_idle(given, config, needs):
    """InputError for a flag that changes nothing beside the others.

    given: the flags as they came, None where one was left out; needs: (settings, a function of
    `config` that says whether they have an effect, when that is, in words) each.
    """
    for names, when, words in needs:
        for name in names.split():
            if given[name] is not None and not when(config):
                raise InputError(f"--{name.replace('_', '-')}: has no effect unless {words}; leave "
                                 "it out")


def resolve(args, settings, stage, overrides=None):
    """All settings of a run as a plain dict: the command's, else `overrides`, else the preset's.

    Warm-ups that are not given keep the preset's share of the epochs.
    """
    config = vars(args).copy()
    config["scale"] = args.scale or ("laptop" if args.data == "toy" else "paper")
    config["stage"] = stage
    config["workers"] = 2 * (config["scale"] == "paper") if args.workers is None else args.workers
    given = lambda name: f"--{name.replace('_', '-')} {config[name]}"

    def limit(name, low, high):
        if not low <= config[name] <= high:
            raise InputError(f"{given(name)}: give a number from {low} to {high}")

    for name, low, high in ("seed", 0, 2**32), ("workers", 0, 1000), ("accumulate", 1, 100_000):
        limit(name, low, high)
    settle_flags(config)
    column = 0 if config["scale"] == "paper" else 1
    for name, row in settings.items():
        if config[name] is None:
            config[name] = (overrides or {}).get(name, row[column])
            if name.startswith("warmup"):
                config[name] = round(config[name] * config["epochs"] / settings["epochs"][column])
        if not isinstance(row[0], str):
            limit(name, *row[2:4])
        if name.startswith("warmup") and config[name] > config["epochs"]:
            raise InputError(f"{given(name)}: more than the {config['epochs']} epochs")
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++")
    if config["compile"] and not any(map(shutil.which, compilers)):
        raise InputError("--compile: no C++ compiler is found; install g++ or leave it out")
    sizes = [("dim", "heads"), ("decoder_dim", "decoder_heads")]
    if config.get("model") != "resnet18":                # which has no patches
        sizes.append(("image_size", "patch_size"))
    for a, b in sizes:
        if a in config and config[a] % config[b]:
            raise InputError(f"{given(a)} is not a multiple of {given(b)}")
    for name, unit, reason in (("dim", 4, "the sine waves of the positions"), ("patch_size", 2,
                               "2 x 2 cells of HOG"), ("decoder_dim", 4, "its positions")):
        if name in config and config[name] % unit:
            raise InputError(f"{given(name)} is not a multiple of {unit}, as {reason} need")
    return config


@dataclass
class Run:
    """A run's settings and its place among the processes; `part` is what it computes just now."""
    config: dict
    rank: int
    world: int
    device: torch.device
    parts: int = 1                           # --accumulate: parts of a process's share of a batch
    part: int = 0
    loader: DataLoader = None                # kept from epoch to epoch with its worker processes
    waiting: dist.ProcessGroup = None        # in which the others wait for the first process
    seconds: dict = field(default_factory=lambda: {"data": 0.0, "target": 0.0})

    @property
    def out(self):
        return Path(self.config["out"])

    @property
    def share(self):
        """This process's rows of the global batch."""
        size = self.config["batch_size"] // self.world
        return range(self.rank * size, (self.rank + 1) * size)

    @property
    def rows(self):
        """The rows of the part that is computed now."""
        size = len(self.share) // self.parts
        return self.share[self.part * size:(self.part + 1) * size]

    @contextmanager
    def timed(self, name):
        """Add the time of the block to `seconds`."""
        begin = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begin


def start(config):
    """Join the other processes (torchrun sets RANK and WORLD_SIZE), choose the device: a `Run`."""
    said = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not all(s.isdecimal() for s in said) or not int(said[0]) < int(said[1]) \
            or int(said[1]) > 1 and "RANK" not in os.environ:
        raise InputError(f"RANK {os.environ.get('RANK')}, WORLD_SIZE {said[1]} in the environment: "
                         "not one of torchrun's processes; unset both or start by torchrun")
    rank, world = int(said[0]), int(said[1])
    try:
        device = torch.device(config["device"] or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        if device.type == "cuda":
            if world > 1 and device.index is not None:
                raise RuntimeError("under torchrun each process takes its own card: say cuda")
            device = torch.device("cuda", device.index or int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
        if config["deterministic"]:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"          # cuBLAS asks for it
            torch.use_deterministic_algorithms(True)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {config['device'] or 'cuda'}: cannot be used ({reason})"
                         ) from None
    machines = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    if machines > 1 and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        raise InputError("--max-restarts: torchrun counts them on each machine alone, so the "
                         "processes would not agree; leave it out and go on with --resume")
    if world > 1 and not dist.is_initialized():
        # Without a prefix for each life, processes that torchrun starts again find the addresses of
        # dead ones in its store and wait for them (seen with gloo).
        store, _, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"life {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                                world_size=world)
    # The first process may read a large data set for hours. In all else a process that hangs ends
    # the run when torch loses patience (10 minutes with NCCL, 30 with gloo).
    waiting = dist.new_group(backend="gloo", timeout=timedelta(hours=12)) if world > 1 else None
    return Run(config, rank, world, device, config["accumulate"], waiting=waiting)


def parameters(model):
    """How many numbers a model learns."""
    return sum(p.numel() for p in model.parameters())


def say(run, text):
    """Print from the first process only, at once."""
    if run.rank == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def first_alone(run, work, others=True):
    """The result of `work()`, which the first process does before the others begin.

    With others=False they wait, but do not do it. If it fails there with an InputError, all
    processes end with that error: none waits for ever.
    """
    result, problem = None, [None]
    if run.rank == 0:
        try:
            result = work()
        except InputError as error:
            problem = [str(error)]
    if run.world > 1:
        dist.broadcast_object_list(problem, group=run.waiting)
    if problem[0]:
        raise InputError(problem[0])
    return work() if run.rank > 0 and others else result


def load_split(run, split):
    """A split as `Faces`; the first process builds the memory map, the others wait for it."""
    c = run.config
    return first_alone(run, lambda: load_faces(
        c["data"], c["data_dir"], split, c["image_size"], convention=c["labels"],
        partial=c["partial"], cache=c["cache"], align_by=c["align"]))


class Stopped(Exception):
    """Training cannot or must not go on; the message says why, `status` is the exit status."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


@contextmanager
def caught_signals():
    """A list that SIGTERM and the first Ctrl-C fill with their numbers; the second ends at once."""
    caught = []

    def note(number, frame):
        caught.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {n: signal.signal(n, note) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def command_line(main):
    """Run a script's main; a wrong input is one line on stderr and exit status 2.

    `Stopped` is one line too, with its own status; Ctrl-C is 130 as in a shell.
    """
    status, message = 0, None
    sys.stdout.reconfigure(errors="backslashreplace")    # of names that the terminal cannot show
    try:
        main()
        sys.stdout.flush()
    except Stopped as error:
        status, message = error.status, f"stopped: {error}"
    except KeyboardInterrupt:
        status, message = 128 + signal.SIGINT, ("interrupted at once; what was saved before is "
                                                "whole")
    except torch.cuda.OutOfMemoryError:
        status, message = 1, ("stopped: the card's memory is full; try --accumulate 4, more "
                              "processes or a smaller --batch-size, in evaluate.py --device cpu")
    except BrokenPipeError:                              # as in `... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    except Exception as error:
        if complaint(error):
            status, message = 2, complaint(error)
        elif not dist.is_initialized():
            raise
        else:
            status, message = 1, traceback.format_exc()
    if message:
        print(message, file=sys.stderr, flush=True)
    if dist.is_initialized():
        if status:           # the others may be waiting for this process; NCCL would wait for them
            sys.stdout.flush()                           # which leaving in this way does not do
            os._exit(status)                             # torchrun ends them
        dist.destroy_process_group()
    if status:
        sys.exit(status)


# -------------------------------------------------------------- what both stages need: optimisation

def parameter_groups(model, weight_decay, depth, layer_decay=1.0):
    """Groups for AdamW, one for each layer and kind; `scale` multiplies the group's learning rate.

    With layer-wise decay (BEiT, MaskFeat), block i of the encoder has the scale
    layer_decay^(depth - i), the embeddings layer_decay^(depth + 1), and what comes after the blocks
    1; so does everything of an encoder without `blocks` (ResNet-18). No weight decay on 1-D
    parameters (norms, biases), tokens and positions.
    """
    groups = {}
    for name, p in model.named_parameters():
        layer = depth + 1
        if name.startswith("encoder.blocks."):
            layer = int(name.split(".")[2]) + 1
        elif name.startswith(("encoder.patch_embed", "encoder.class_token", "encoder.positions")):
            layer = 0
        plain = p.ndim == 1 or name.endswith(("class_token", "positions", "mask_token"))
        decay = 0.0 if plain else weight_decay
        group = groups.setdefault((layer, decay), {
            "params": [], "weight_decay": decay, "scale": layer_decay ** (depth + 1 - layer)})
        group["params"].append(p)
    return list(groups.values())


def learning_rate(step, steps, warmup, peak, floor=1e-6):
    """Linear warm-up from `floor` to `peak` in `warmup` steps, then a cosine back to `floor`."""
    floor = min(floor, peak)
    if step < warmup:
        return floor + (peak - floor) * step / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))


def precision(device):
    """Autocast's dtype: bf16 on a CUDA device that has it, else fp16; None (off) on a CPU.

    Older cards (V100, T4) emulate bf16 slowly, which torch counts as support: they are given fp16.
    """
    if device.type != "cuda":
        return None
    has_bf16 = torch.version.hip or torch.cuda.get_device_capability(device)[0] >= 8
    return torch.bfloat16 if has_bf16 else torch.float16


def autocast(run):
    """The context in which a network is called; all else (HOG, losses, crops) stays in fp32."""
    dtype = precision(run.device)
    return torch.autocast(run.device.type, dtype, enabled=dtype is not None)


# --------------------------------------------------------------- what both stages need: checkpoints

def save_checkpoint(path, state):
    """Write a checkpoint; at any moment `path` is a whole one, the old or the new."""
    replace_file(path, lambda file: torch.save(state, file))


def replace_file(path, write):
    """Let `write` fill a file beside, flush it to the disk, then rename it to `path`."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")    # of another process is another
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:             # torch.save's writer raises RuntimeError
        if isinstance(error.__context__, KeyboardInterrupt):     # torch.save's writer hides Ctrl-C
            raise KeyboardInterrupt from None
        raise InputError(f"{path}: cannot be written ({str(error).splitlines()[0]}); is the disk "
                         "full? What was there before is still there") from None
    finally:
        with suppress(OSError):                          # renamed, or a read-only disk forbids this
            beside.unlink()


def load_checkpoint(path, stage=None, ours=True):
    """Read a checkpoint (weights only: no code in it can run) of a stage of ours, or of others."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except Exception as error:                           # of other files torch.load says anything
        raise InputError(f"{path}: not a readable checkpoint ({type(error).__name__}); it is "
                         "truncated or not ours") from None
    if not isinstance(state, dict) or (ours and "stage" not in state):
        raise InputError(f"{path}: not a checkpoint of pretrain.py or train.py")
    if stage and state["stage"] != stage:
        raise InputError(f"{path}: a checkpoint of {state['stage']}.py; {stage}.py's is needed")
    if not ours:
        return state
    kinds = {"log": list, "config": dict, "model": dict}
    if state["stage"] == "train":
        kinds.update(classes=list, mean=list, std=list, step=int, faces=str,
                     candidates=torch.Tensor, confidence=torch.Tensor)
    missing = [k for k in kinds if k not in state]
    if missing:
        raise InputError(f"{path}: has no {', '.join(missing)}; a checkpoint of "
                         f"{state['stage']}.py holds stage, {', '.join(kinds)}")
    wrong = [k for k, kind in kinds.items() if not isinstance(state[k], kind)]
    if wrong or not all(isinstance(v, torch.Tensor) for v in state["model"].values()):
        raise InputError(f"{path}: its {(wrong or ['model'])[0]} is not what {state['stage']}.py "
                         "writes; take another checkpoint")
    return state


def load_weights(model, weights, where, remedy="the network's code has changed since: take that "
                 "of the run's commit (config.json)"):
    """Load every weight, or an InputError that counts what is missing, superfluous, misshapen."""
    own = model.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [f"{k} is {tuple(weights[k].shape)}, the model's {tuple(own[k].shape)}"
              for k in own if k in weights and own[k].shape != weights[k].shape]
    if missing or extra or shapes:
        first = (shapes + missing + extra)[0]
        raise InputError(f"{where}: weights of another model ({len(missing)} missing, {len(extra)} "
                         f"superfluous, {len(shapes)} of other shape; first: {first}); {remedy}")
    broken = [k for k, v in weights.items() if v.is_floating_point() and not v.isfinite().all()]
    if broken:
        raise InputError(f"{where}: {len(broken)} tensors hold NaN or infinity (first: "
                         f"{broken[0]}); take another checkpoint")
    model.load_state_dict(weights)


# Settings that may differ when a run is resumed: they do not change what is asked for.
FREE = ("resume", "workers", "device", "out", "data_dir", "cache", "picture_every", "save_every")


def saved_state(run, kept=()):
    """The run folder's checkpoint with --resume, else None; InputError if it is of other settings.

    kept: what the stage has in it beside what `fit` saves. Read once, before anything is taken from
    it. A run that torchrun starts again resumes by itself (--max-restarts): the checkpoint is then
    its own, as each run saves before its first step; if it died before that, it may be an earlier
    run's of the same settings.
    """
    path = run.out / "last.pt"
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if not (run.config["resume"] or again and path.exists()):
        return None
    if not path.exists():
        raise InputError(f"{path}: nothing to resume; leave --resume out to start")
    state = load_checkpoint(path, run.config["stage"])
    missing = [k for k in ("faces", "step", "sums", "optimizer", "scaler", *kept) if k not in state]
    if missing:
        raise InputError(f"{path}: has no {', '.join(missing)}; it cannot be resumed")
    old, new = state["config"], run.config
    newer = [k for k in new if k not in old and k not in FREE]
    if newer:
        raise InputError(f"{path}: is older than the setting {', '.join(newer)}; go on with the "
                         "code of its commit (config.json)")
    changed = [f"{k} was {old.get(k)}, is {new.get(k)}" for k in sorted(old.keys() | new.keys())
               if k not in FREE and old.get(k) != new.get(k)]
    if changed:
        raise InputError(f"{path}: other settings than this command's: {'; '.join(changed)}")
    return state


def digest(faces):
    """What tells training sets apart: SHA-256 of the names in their order."""
    return hashlib.sha256("\n".join(faces.names).encode()).hexdigest()


def same_faces(run, saved, faces):
    """InputError if a checkpoint (or None) is of other training faces than these."""
    if saved and saved["faces"] != digest(faces):
        raise InputError(f"{run.out / 'last.pt'}: its training faces are not those of this data "
                         "set; give the same --data-dir")


def restore(run, saved, model, optimizer, scaler):
    """Put a checkpoint, if there is one, into model, optimizer and scaler.

    Returns what the loop has done: steps, log, and sums of the scalars of the epoch so far.
    """
    if not saved:
        return {"step": 0, "log": [], "sums": {}}
    load_weights(model, saved.pop("model"), run.out / "last.pt")     # and let go of the file's copy
    optimizer.load_state_dict(saved.pop("optimizer"))
    if saved["scaler"]:                                  # empty where there was no fp16
        scaler.load_state_dict(saved["scaler"])
    sums = {k: torch.tensor(v, dtype=torch.float64, device=run.device)
            for k, v in saved["sums"].items()}
    return {"step": saved["step"], "log": saved["log"], "sums": sums}


def write_config(run, saved=None):
    """config.json: the settings, the command, versions, the commit ("-dirty": and changes to it).

    The settings are also printed. Returns, for the checkpoint, what is said of each start of the
    run beside the settings; config.json has it of the earlier ones under "earlier".
    """
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True,
                                text=True).stdout.strip()
    except OSError:
        commit = None                                    # git is not installed
    about = {"command": shlex.join(sys.argv), "commit": commit or None,
             "processes": run.world, "threads": torch.get_num_threads(),
             "device": str(run.device), "python": sys.version.split()[0],
             "torch": str(torch.__version__), "torchvision": torchvision.__version__}
    earlier = (saved or {}).get("starts", [])
    text = json.dumps({**run.config, **about, "earlier": earlier}, indent=1) + "\n"

    def write():
        try:                                             # here, so that the error names the switch
            run.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {run.out}: cannot be written ({error.strerror})") from None
        replace_file(run.out / "config.json", lambda file: file.write(text.encode()))

    first_alone(run, write, others=False)
    say(run, "settings: " + "  ".join(f"{k}={v}" for k, v in run.config.items() if v is not None))
    size = run.config["batch_size"]
    parts = f" x {run.parts} parts" * (run.parts > 1)
    say(run, f"global batch {size} = {run.world}{parts} x {len(run.rows)}, {run.device}")
    return [*earlier, {"step": saved["step"] if saved else 0, **about}]


# ------------------------------------------------------------------ what both stages need: the loop

def batches(run, faces, epoch, first):
    """The local part of each global batch of an epoch from step `first` on: (images, indices).

    The order is a permutation drawn from seed and epoch; what does not fill a batch waits for the
    next epoch's order. So no face is seen twice in an epoch, by any number of processes.
    """
    size = run.config["batch_size"]
    generator = torch.Generator().manual_seed(run.config["seed"] * SEED_STRIDE + epoch)
    order = torch.randperm(len(faces), generator=generator)                # Algorithm 1, line 3
    steps = len(faces) // size
    local = order[:steps * size].reshape(steps, size)[first:, run.share.start:run.share.stop]
    if run.loader is None:
        workers = run.config["workers"]
        # Forked on Linux. Python 3.14 has a server do it there, which dies of a SIGTERM to the
        # group of processes, and the loading processes with it, before the run has saved.
        how = "fork" if workers and sys.platform == "linux" else None
        run.loader = DataLoader(faces, sampler=[], batch_size=None, num_workers=workers,
                                persistent_workers=workers > 0, worker_init_fn=outlive,
                                pin_memory=run.device.type == "cuda", multiprocessing_context=how)
    run.loader.sampler[:] = local.tolist()               # what its processes read next
    loaded = iter(run.loader)
    for indices in local:
        with run.timed("data"):
            images = next(loaded).to(run.device, non_blocking=True)        # uint8 (., C, S, S)
        yield images, indices                                              # Algorithm 1, line 5


def outlive(worker):
    """A loading process outlives Ctrl-C, and SIGTERM by 60 s: the step until all is saved needs it.

    A terminal and torchrun send them to the whole group of processes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(60))


def steps_per_epoch(run, faces):
    """Whole batches in the training set; InputError if the batch is larger or cannot be split."""
    size, unit = run.config["batch_size"], run.world * run.parts
    if size % unit:
        parts = f" of {run.parts} parts" * (run.parts > 1)
        raise InputError(f"--batch-size {size} cannot be divided among {run.world} processes{parts}"
                         f"; the nearest that can is {max(round(size / unit), 1) * unit}")
    if size > len(faces):
        raise InputError(f"--batch-size {size} is more than the {len(faces)} faces")
    return len(faces) // size


def update(model, optimizer, scaler, loss, clip):
    """One step down the gradient of the loss, its norm clipped."""
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)                                   # Algorithm 1, line 9
    scaler.update()
    optimizer.zero_grad()


def not_finite(run, loss, step, lr, faces, indices):
    """The error of a loss that is NaN or infinite in some process; all processes say the same."""
    mine = None if loss.isfinite() else (
        f"loss {loss.item()} in process {run.rank} of {run.world} at step {step}, learning rate "
        f"{lr:.3g}, faces {', '.join(faces.names[i] for i in indices)}; {run.out / 'last.pt'} is "
        "the last good checkpoint: look at these faces, or try a smaller --lr")
    found = [mine] * run.world
    if run.world > 1:            # whichever is ended first by torchrun, the cause has been printed
        dist.all_gather_object(found, mine)
    return Stopped(next(text for text in found if text))


def loss_in_parts(run, network, scaler, images, indices, step_loss, step):
    """This process's loss of a batch, part by part: (the last part's, all parts', their scalars).

    The gradients of all parts but the last are taken here, and add up; the last one's is left to
    `update`, for which all processes meet.
    """
    total, scalars = 0.0, {}
    for part, (x, rows) in enumerate(zip(images.chunk(run.parts), indices.chunk(run.parts))):
        run.part, last = part, part == run.parts - 1
        with nullcontext() if last or run.world == 1 else network.no_sync():
            loss, numbers = step_loss(network, x, rows, step)
            loss = loss / run.parts
            if not last:
                scaler.scale(loss).backward()
        total = total + loss.detach()
        for name, value in numbers.items():
            scalars[name] = scalars.get(name, 0) + value.detach().double() / run.parts
    return loss, total, scalars


def train_epoch(run, network, optimizer, scaler, faces, step_loss, state, signals):
    """The steps of the epoch that are left; True if a signal to any process asks to stop."""
    c, steps = run.config, steps_per_epoch(run, faces)
    epoch, first = divmod(state["step"], steps)
    network.train()
    bar = tqdm(batches(run, faces, epoch, first), f"epoch {epoch + 1}/{c['epochs']}", steps,
               initial=first, leave=False, disable=run.rank > 0 or None)
    for images, indices in bar:                              # Algorithm 1, line 4
        step = state["step"]
        lr = learning_rate(step, steps * c["epochs"], steps * c["warmup_epochs"], c["lr"])
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        # Of dropout and drop path:
        torch.manual_seed((c["seed"] * SEED_STRIDE + step) * run.world + run.rank)
        loss, total, scalars = loss_in_parts(run, network, scaler, images, indices, step_loss,
                                             step)
        wrong, stop = anywhere(run, total.isfinite().logical_not(), len(signals) > 0)
        if wrong and not (scaler.is_enabled() and scaler.get_scale() >= 1):   # fp16: scale halves
            raise not_finite(run, total, step, lr, faces, indices)
        scalars["steps"] = torch.ones_like(total, dtype=torch.float64)   # what divides the sums
        for name, value in scalars.items():
            value = torch.zeros_like(value) if wrong else value          # a skipped step: none
            state["sums"][name] = state["sums"].get(name, 0) + value
        update(network, optimizer, scaler, loss, c["clip"])
        state["step"] += 1
        if stop:
            return True
    return False


def trainable(run, model):
    """The network whose gradients are the mean over all processes', compiled if asked for."""
    if run.world > 1:
        # After its first step DDP arranges its buckets of gradients anew; three or more processes'
        # are then added in another order, so that a resumed run would differ. It does not where it
        # looks for unused parameters. A view of the buckets saves a second copy.
        model = DistributedDataParallel(model, gradient_as_bucket_view=True,
                                        find_unused_parameters=run.config["deterministic"])
    return torch.compile(model) if run.config["compile"] else model


def fit(run, model, optimizer, faces, step_loss, saved, end_of_epoch, extra=dict, draw=None):
    """Train for the epochs of the settings, from the start or from the checkpoint `saved`.

    step_loss(network, images, indices, step) -> (loss, {name: scalar tensor}) is one step's
    computation; end_of_epoch(record) -> {name: number} is logged beside the means of the step's
    scalars; extra() is more state for the checkpoint; draw(note), if given, makes a PIL picture for
    the run folder at the start, every `picture_every` epochs and at the end. All that is random is
    a function of the seed, the step and (dropout, drop path) the process, so a run that is resumed
    by as many processes draws what an uninterrupted one draws.
    Raises `Stopped` after a signal, when all is saved, or for a loss or weights that are not
    finite.
    """
    c, steps = run.config, steps_per_epoch(run, faces)
    total = steps * c["epochs"]
    scaler = torch.amp.GradScaler(run.device.type, enabled=precision(run.device) == torch.float16)
    state = restore(run, saved, model, optimizer, scaler)

    def save():
        save_run(run, {"stage": c["stage"], "config": c, "starts": starts, **state,
                       "faces": digest(faces),
                       "sums": means(run, state["sums"], 1), "model": model.state_dict(),
                       "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                       **extra()})

    if not saved:
        first_alone(run, lambda: set_aside(run.out / "last.pt"), others=False)
    starts = write_config(run, saved)
    save()                       # a disk that cannot hold it is an error now, not after an epoch
    if draw and not saved:
        save_picture(run, draw, 0, "before training")
    network = trainable(run, model)
    with caught_signals() as signals:
        while state["step"] < total:                         # Algorithm 1, line 2
            first, begin = state["step"], time.perf_counter()
            stop = train_epoch(run, network, optimizer, scaler, faces, step_loss, state, signals)
            done, within = divmod(state["step"], steps)      # epochs, and steps of the next one
            if not within:
                counted = state["sums"].pop("steps")
                record = {"epoch": done, **means(run, state["sums"], counted),
                          "lr": optimizer.param_groups[-1]["lr"],
                          **pace(run, begin, state["step"] - first, total - state["step"])}
                close_epoch(run, state, record, end_of_epoch)
            due = lambda every: not within and (done == c["epochs"] or done % c[every] == 0)
            if stop or due("save_every"):
                save()
            elif run.rank == 0:                          # the log at least
                write_log(run, state["log"])
            if draw and due("picture_every"):
                save_picture(run, draw, done, f"loss {record['loss']:.4f}")
            if stop and done < c["epochs"]:
                raise Stopped(f"after step {state['step']} by a signal, all is saved; go on with "
                              "the same command and --resume", 128 + (signals or [15])[0])


def set_aside(last):
    """Copy an earlier run's checkpoint to previous.pt, so that it is not lost.

    One from before the first step holds nothing, and does not take the place of one that does;
    what cannot be read as a checkpoint is kept all the same.
    """
    if not last.exists():
        return
    with suppress(InputError):
        if load_checkpoint(last).get("step") == 0:
            return
    with open(last, "rb") as file:
        replace_file(last.with_name("previous.pt"), lambda copy: shutil.copyfileobj(file, copy))


def close_epoch(run, state, record, end_of_epoch):
    """Complete an epoch's record, put it into the log and print it."""
    record.update(end_of_epoch(record))
    state["log"].append(record)
    state["sums"] = {}
    say(run, f"epoch {record['epoch']}/{run.config['epochs']}  " + "  ".join(
        f"{k} {v:.4g}" for k, v in record.items() if k != "epoch"))
    if record["epoch"] == run.config["epochs"] and \
            record.get("pll", record["loss"]) >= record["trivial"]:
        say(run, "warning: nothing was learned, the loss is not below a constant answer's (trivial)"
                 "; try more epochs, or half or double --lr")


def pace(run, begin, done, left):
    """Of `done` steps since `begin`: images a second, seconds for the `left` ones, and shares.

    Shares of the time, 0 .. 1, of reading faces, of augmenting them and making targets, and of the
    rest, the model's. On CUDA the first copy to the device, in `target`, awaits the step before.
    """
    seconds = time.perf_counter() - begin
    shares = {f"{name}_share": round(run.seconds[name] / seconds, 4) for name in run.seconds}
    shares["model_share"] = round(1 - sum(shares.values()), 4)
    run.seconds.update(data=0.0, target=0.0)
    return {"images_per_second": round(done * run.config["batch_size"] / seconds, 1),
            "seconds_left": round(seconds / done * left), **shares}


def anywhere(run, *flags):
    """For each flag, whether it is set in any process: all decide alike."""
    flags = torch.stack([torch.as_tensor(flag, device=run.device).float() for flag in flags])
    if run.world > 1:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags.bool().tolist()


def means(run, sums, steps):
    """Sums over steps of this process -> means over steps and processes, as numbers."""
    if not sums:
        return {}
    values = torch.stack(list(sums.values())) / steps                      # (scalars,)
    if run.world > 1:
        dist.all_reduce(values)
        values = values / run.world
    return dict(zip(sums, values.tolist()))


def save_run(run, state):
    """last.pt and log.jsonl of the run folder, by the first process; the others wait for it."""
    if not all(v.isfinite().all() for v in state["model"].values()):   # a gradient was not finite
        raise Stopped(f"the weights hold NaN or infinity after step {state['step']}; "
                      f"{run.out / 'last.pt'} is the last good checkpoint: try a smaller --lr")

    def save():
        save_checkpoint(run.out / "last.pt", state)
        write_log(run, state["log"])

    first_alone(run, save, others=False)


def write_log(run, log):
    """log.jsonl of the run folder."""
    lines = "".join(json.dumps(record) + "\n" for record in log)
    replace_file(run.out / "log.jsonl", lambda file: file.write(lines.encode()))


def save_picture(run, draw, epoch, note):
    """pictures/epoch-N.png of the run folder, drawn by the first process."""
    path = run.out / "pictures" / f"epoch-{epoch:04d}.png"

    def save():
        picture = draw(f"epoch {epoch}, {note}")
        replace_file(path, lambda file: picture.save(file, "png"))

    first_alone(run, save, others=False)


def uniforms(run, step, columns=12):
    """This process's rows of the step's random numbers, (b, columns) in [0, 1)."""
    generator = torch.Generator().manual_seed((run.config["seed"] * SEED_STRIDE + step) * 2 + 1)
    u = torch.rand(run.config["batch_size"], columns, generator=generator)
    return u[run.rows.start:run.rows.stop].to(run.device)


# ---------------------------------------------------------------------------------------- stage 1

def main(argv=None):
    """Pre-train from the command line."""
    parser = make_parser(__doc__, SETTINGS)
    add = parser.add_argument
    add("--target", default="hog", choices=("hog", "pixel"), help="what is predicted (%(default)s)")
    add("--encoder", default="visible", choices=("visible", "maskfeat"),
        help="sees visible patches only, or mask tokens too as MaskFeat's does (%(default)s)")
    args = parser.parse_args(argv)
    c = resolve(args, SETTINGS, "pretrain")
    refuse_idle(vars(args), c, [("decoder_dim decoder_depth decoder_heads",
                                 lambda c: c["encoder"] == "visible", "encoder is visible")])
    c["out"] = c["out"] or f"runs/pretrain-{c['data']}" + "-pixel" * (c["target"] == "pixel")
    settle_classes(c)
    run = start(c)
    saved = saved_state(run)
    faces = load_split(run, "train")
    same_faces(run, saved, faces)
    torch.manual_seed(c["seed"])
    model = build_masked_model(c).to(run.device)
    optimizer = torch.optim.AdamW(parameter_groups(model, c["weight_decay"], c["depth"]),
                                  lr=c["lr"], betas=(0.9, 0.95), fused=True)
    grid = c["image_size"] // c["patch_size"]
    count = masked_count(grid * grid, c["mask_ratio"])
    if count == grid * grid:
        raise InputError(f"--mask-ratio {c['mask_ratio']}: hides all {count} patches; give less, "
                         "or a smaller --patch-size")
    trivial = mean_target(run, faces)                                      # (1, N, T)
    say(run, "\n".join(faces.notes))
    say(run, f"{parameters(model.encoder):,} parameters in the encoder, {parameters(model):,} in "
             f"all; {count} of {grid * grid} patches masked")

    def step_loss(network, images, indices, step):
        with run.timed("target"):
            # The mask comes first: it is drawn while the card is busy with the step before.
            seed = c["seed"] * SEED_STRIDE + step
            mask = draw_masks(c["mask"], run.rows, grid, count, seed)              # (b, N)
            images = augment(images, uniforms(run, step), c["image_size"], c["data"],
                             c["crop_scale"])
            target = make_targets(images, c["target"], c["patch_size"])            # (b, N, T)
        with autocast(run):
            prediction = network(images, mask)                                     # (b, N, T)
        mask = mask.to(run.device)
        loss = masked_mse(prediction, target, mask)
        return loss, {"loss": loss, "trivial": masked_mse(trivial, target, mask)}

    def skill(record):
        return {"skill": 1 - record["loss"] / max(record["trivial"], 1e-12)}   # faces may be blank

    fit(run, model, optimizer, faces, step_loss, saved, end_of_epoch=skill,
        draw=lambda note: reconstruction(run, model, faces, note))
    say(run, f"pre-trained: {run.out / 'last.pt'}; what it predicts: {run.out / 'pictures'}")


if __name__ == "__main__":
    command_line(main)
