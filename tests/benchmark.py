"""How fast and how lean the project is: beside other libraries, and beside what the machine allows.

Every figure is measured in this run, unless it says counted or computed. The sides of a row take
turns, so that whatever else the machine does hits all of them; a ratio is ours / theirs, the median
over the rounds, with its range. Weights are random and nothing is downloaded. timm, transformers
and scikit-image are peers that the project does not need: what is not installed is said so.
Needs Linux, where a process can read its own memory.

Run:  python tests/benchmark.py --data-dir DIR      (FERPlus; a quarter of an hour on two cores)
      python tests/benchmark.py --only vit hog
      python tests/benchmark.py --quick             (tiny sizes: shows that it runs, no more)
"""
import argparse
import ctypes
import importlib
import importlib.util
import math
import multiprocessing
import operator
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import decoder  # noqa: E402
import pretrain  # noqa: E402
import train  # noqa: E402
from datasets import DATA, Faces, augment, load_faces, prepare  # noqa: E402
from hog import BINS, hog, hog_targets  # noqa: E402
from vit import ViT  # noqa: E402

PAPER = dict(image_size=224, patch_size=16, dim=768, depth=12, heads=12)
TINY = dict(image_size=32, patch_size=16, dim=24, depth=2, heads=2)
LAPTOP = ["--data", "ferplus", "--scale", "laptop"]
# New processes start from one that has imported this and computed nothing, so they start at once.
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["torchvision"])


# -------------------------------------------------------------------------------------- measuring

def take_turns(sides, repeats):
    """Seconds of the rounds, {name: list}: each side once a round, after a warm-up of each."""
    seconds = {name: [] for name in sides}
    for step in sides.values():
        step()
    for _ in range(repeats):
        for name, step in sides.items():
            begin = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def process_memory(key):
    """An entry of /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024 / 1e6


def peak(whole, make, *args):
    """How far memory rises in one step of `make(*args)` above what it was before, in MB.

    Before the step, or if `whole` is true before `make`: its weights and tables then count, too.
    The C library is told to hand each block above 64 KB back at once (-3 is M_MMAP_THRESHOLD): the
    process then holds what the tensors need, without gaps that depend on the order of requests.
    Mapped files (code, faces) are left out: the system takes their pages back when it needs them.
    """
    ctypes.CDLL(None).mallopt(-3, 65_536)
    empty = process_memory("RssAnon")
    step = make(*args)
    before = empty if whole else process_memory("RssAnon")
    Path("/proc/self/clear_refs").write_text("5")            # the peak is counted from here
    step()
    return process_memory("VmHWM") - process_memory("RssFile") - before


def memory(args, make, *details, whole=False):
    """`peak` in a fresh process for each round: a list of MB."""
    found = []
    for _ in range(args.repeats):
        with ProcessPoolExecutor(1, FRESH) as pool:
            found.append(pool.submit(peak, whole, make, *details).result())
    return found


def operations(step):
    """Operations of the matrix products in one step (a multiply-add is two), attention included."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def ms(seconds, items):
    """Seconds of rounds of so many items -> milliseconds an item."""
    return [1e3 * s / items for s in seconds]


def rate(seconds, items):
    """Seconds of rounds of so many items -> items a second."""
    return [items / s for s in seconds]


def number(value):
    """Three significant digits at least, thousands separated."""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{digits}f}"


def row(what, against, unit, ours, theirs, goal="", reason="not installed, or --quick"):
    """Print a row. ours, theirs: numbers of the rounds, in `unit`; goal such as "<= 1.1" or "".

    Without one of them the row gives the reason instead.
    """
    cells, met = [reason, "-", "-"], "-"
    if ours and theirs:
        ratios = [a / b for a, b in zip(ours, theirs)]
        cells = [number(statistics.median(values)) for values in (ratios, ours, theirs)]
        if len(ratios) > 1:
            cells[0] += f" ({number(min(ratios))} to {number(max(ratios))})"
        cells[1:] = [f"{cell} {unit}" for cell in cells[1:]]
    if ours and theirs and goal:
        sign, limit = goal.split()
        holds = {"<": operator.lt, "<=": operator.le, ">=": operator.ge}[sign]
        met = "yes" if holds(statistics.median(ratios), float(limit)) else "no"
    print("|", " | ".join([what, against, *cells, goal or "-", met]), "|", flush=True)


def peers(args, *names):
    """Those of the libraries that are measured: the installed ones, none with --quick."""
    return [name for name in names if not args.quick and importlib.util.find_spec(name)]


# -------------------------------------------------------------------------------------------- vit

def encoder(name, s):
    """Our ViT of the sizes `s`, or a library's ViT-B/16 at 224, without a classifier."""
    if name == "ours":
        return ViT(**s)
    library = importlib.import_module(name)
    if name == "transformers":
        return library.ViTModel(library.ViTConfig(), add_pooling_layer=False)
    if name == "timm":
        return library.create_model("vit_base_patch16_224", num_classes=0, global_pool="")
    model = library.models.vit_b_16()
    model.heads = nn.Identity()
    return model


def encoder_step(name, s, batch):
    """A step: images (batch, 3, H, H) forward, the mean square of the output backward."""
    model, images = encoder(name, s), torch.randn(batch, 3, s["image_size"], s["image_size"])

    def step():
        model.zero_grad(set_to_none=True)
        output = model(images)
        tokens = output if torch.is_tensor(output) else output.last_hidden_state
        tokens.square().mean().backward()

    return step


def vit_rows(args):
    """The encoder against three libraries, and against the machine's matrix products."""
    s, batch, libraries = args.sizes, args.batch, ("torchvision", "timm", "transformers")
    side = 256 if args.quick else 4096
    a, b = torch.randn(side, side), torch.randn(side, side)
    sides = {n: encoder_step(n, s, batch) for n in ["ours", *peers(args, *libraries)]}
    work = operations(sides["ours"])
    seconds = take_turns({**sides, "product": lambda: torch.mm(a, b)}, args.repeats)
    held = {name: memory(args, encoder_step, name, s, batch) for name in sides}
    for name in libraries:
        row(f"ViT of {s['depth']} x {s['dim']}, {s['image_size']} pixels, forward + backward", name,
            "ms an image", ms(seconds["ours"], batch), ms(seconds.get(name, []), batch), "<= 1.0")
    for name in libraries:
        row(f"its peak memory, {batch} images", name, "MB", held["ours"], held.get(name), "< 1.0")
    row("its rate", f"products of {side} x {side} matrices", "GFLOP/s",
        rate(seconds["ours"], work / 1e9), rate(seconds["product"], 2 * side ** 3 / 1e9), ">= 0.8")


# --------------------------------------------------------------------------------------- pretrain

def masked_step(kind, s, batch, narrow):
    """A step of stage 1 with 40% masked, without the optimiser, which is alike on all sides.

    kind "visible" and "maskfeat" are ours, "transformers" is ViTMAE; narrow: the decoder's sizes.
    """
    images, grid = torch.rand(batch, 3, s["image_size"], s["image_size"]), s["image_size"] // 16
    count = pretrain.masked_count(grid * grid, 0.4)
    mask = pretrain.draw_masks("block", range(batch), grid, count, seed=0)
    if kind == "transformers":                           # its decoder has 8 blocks of 512 as well
        from transformers import ViTMAEConfig, ViTMAEForPreTraining
        model = ViTMAEForPreTraining(ViTMAEConfig(mask_ratio=0.4))
        loss = lambda: model(images).loss
    else:
        model = pretrain.MaskedModel(ViT(**s), 108, **narrow, kind=kind)
        loss = lambda: pretrain.masked_mse(model(images, mask), hog_targets(images), mask)

    def step():
        model.zero_grad(set_to_none=True)
        loss().backward()

    return step


def pretrain_rows(args):
    """A step that encodes visible patches only, against ViTMAE's and against all tokens."""
    what, batch = "pre-training step, 40% masked", args.batch
    sides = {kind: masked_step(kind, args.sizes, batch, args.narrow)
             for kind in ["visible", "maskfeat", *peers(args, "transformers")]}
    work = [[operations(sides[kind]) / batch / 1e9] for kind in ("visible", "maskfeat")]
    seconds = take_turns(sides, args.repeats)
    row(what, "ViTMAE of transformers", "ms an image", ms(seconds["visible"], batch),
        ms(seconds.get("transformers", []), batch), "< 1.0")
    row(what, "all tokens (maskfeat)", "ms an image", ms(seconds["visible"], batch),
        ms(seconds["maskfeat"], batch), "<= 0.667")
    row("its operations (counted)", "all tokens (maskfeat)", "GFLOP an image", *work)
    cost = decoder.stage_costs()["pre-training"]
    held = memory(args, masked_step, "visible", args.sizes, batch, args.narrow, whole=True)
    computed = (8 * cost.parameters + 4 * cost.kept * batch) / 1e6
    row(f"its memory, {batch} images, with weights and gradients", "computed, at most: 8 bytes a "
        "weight, 4 a number kept", "MB", held, [computed] * len(held))


# -------------------------------------------------------------------------------------------- hog

def published_hog(images):
    """HOG as MaskFeat's layer arranges it: each pixel's vote in one of nine planes, then cells.

    images (B, C, H, W) -> (B, C, 9, H/8, W/8).
    """
    batch, channels, height, width = images.shape
    sobel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    gx, gy = (F.conv2d(padded, kernel.repeat(channels, 1, 1, 1), groups=channels)
              for kernel in (sobel, sobel.T))
    magnitude = torch.stack([gx, gy], dim=-1).norm(dim=-1)                # (B, C, H, W)
    bins = (torch.atan2(gx, gy) / math.pi * BINS).floor().long() % BINS
    planes = torch.zeros(batch, channels, BINS, height, width)
    planes.scatter_add_(2, bins.unsqueeze(2), magnitude.unsqueeze(2))
    cells = planes.unfold(3, 8, 8).unfold(4, 8, 8).sum(dim=(-1, -2))      # (B, C, 9, H/8, W/8)
    return F.normalize(cells, dim=2)


def targets_step(function, count, side):
    """A step that computes the HOG of random images (count, 3, side, side)."""
    images = torch.rand(count, 3, side, side)
    return lambda: function(images)


def hog_rows(args):
    """HOG of a batch, against MaskFeat's arrangement, scikit-image and the step it is made for."""
    count, side = (4, 32) if args.quick else (192, 224)
    what, theirs = f"HOG of {count} images, {side} pixels", "MaskFeat's arrangement"
    few = torch.rand(8, 3, side, side)
    assert (hog(few) - published_hog(few)).abs().mean() < 1e-5            # the same numbers
    seconds = take_turns({"ours": targets_step(hog_targets, count, side),
                          "theirs": targets_step(published_hog, count, side),
                          "step": masked_step("visible", args.sizes, args.batch, args.narrow)},
                         args.repeats)
    row(what, theirs, "ms an image", ms(seconds["ours"], count), ms(seconds["theirs"], count),
        "<= 0.333")
    row("its peak memory", theirs, "MB", *(memory(args, targets_step, function, count, side) for
                                           function in (hog_targets, published_hog)), "<= 0.25")
    row(what, f"their pre-training step ({args.batch} measured, x {count // args.batch})", "s",
        seconds["ours"], [s * count / args.batch for s in seconds["step"]], "<= 0.03")
    sides = {"ours": lambda: hog(few)}
    if peers(args, "skimage"):
        from skimage.feature import hog as other
        channels = few.flatten(0, 1).numpy()             # each channel by itself, as ours
        sides["skimage"] = lambda: [other(x, BINS, (8, 8), (1, 1), "L2") for x in channels]
    seconds = take_turns(sides, args.repeats)
    row(f"HOG of {len(few)} images", "scikit-image (it uses one core)", "ms an image",
        ms(seconds["ours"], len(few)), ms(seconds.get("skimage", []), len(few)), "<= 0.05")


# ------------------------------------------------------------------------ training steps and faces

def synthetic(data, count, folder):
    """Random pixels and votes in the place of `count` faces, in a memory map in the folder."""
    about, random = DATA[data], np.random.default_rng(0)
    classes, path = len(about["classes"]), Path(folder) / f"{data}-{count}-{os.getpid()}.npy"
    shape = (count, about["channels"], about["side"], about["side"])
    np.save(path, random.integers(0, 256, shape, dtype=np.uint8))
    votes = torch.from_numpy(random.multinomial(10, [1 / classes] * classes, count)).float()
    names = [str(i) for i in range(count)]
    return Faces("train", np.load(path, mmap_mode="r"), votes.argmax(dim=1), names, votes)


def training_step(flags, faces, rank=0, world=1):
    """Stage 2 as train.py does it, the optimiser's update included: (run, model, step).

    step(images, indices) is an iteration of Algorithm 1, late enough for C to be revised.
    """
    config = train.parse(["--init", "none", *flags])
    run = pretrain.Run(config, rank, world, torch.device("cpu"))
    model = train.build_model(config).train()
    groups = pretrain.parameter_groups(model, config["weight_decay"], config["depth"])
    optimizer = torch.optim.AdamW(groups, lr=1e-5, fused=True)
    step_loss = train.algorithm_1(run, model, faces, train.confidence_table(run, faces, None))
    network = model if world == 1 else DistributedDataParallel(model, gradient_as_bucket_view=True)
    network = torch.compile(network) if config["compile"] else network
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def step(images, indices):
        loss, _ = step_loss(network, images, indices, 1_000_000)
        pretrain.update(model, optimizer, scaler, loss, config["clip"])

    return run, model, step


def reading_rows(args):
    """Faces a second of one core, from files to augmented tensors, and what training asks for."""
    what, usual = "reading + augmenting real faces, one core", "torchvision, file by file"
    folder = next((args.data_dir / place for place in ("FER2013Valid", "data/FER2013Valid")
                   if (args.data_dir / place).is_dir()), None)
    if folder is None:
        return row(what, usual, "", [], [], reason="no FER2013Valid in --data-dir")
    faces = load_faces("ferplus", args.data_dir, "val", 48, cache=args.folder)
    rows, cores = torch.randperm(64 if args.quick else 1024).split(32), torch.get_num_threads()
    count, u, files = 32 * len(rows), torch.rand(32, 12), [folder / name for name in faces.names]
    way = {side: transforms.Compose([
        transforms.RandomResizedCrop(side, (0.5, 1)), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize(DATA["ferplus"]["mean"],
                                                    DATA["ferplus"]["std"])]) for side in (48, 224)}
    ours = lambda side: [augment(faces[r], u, side, "ferplus") for r in rows]
    theirs = lambda side: [torch.stack([way[side](Image.open(files[i]).convert("RGB")) for i in r])
                           for r in rows]
    large, (run, _, step) = synthetic("raf", count, args.folder), training_step(LAPTOP, faces)
    usual_ones = [run.config[k] for k in ("crop_scale", "degrees", "light", "erase")]
    laptop = lambda: [augment(faces[r], u, 48, "ferplus", *usual_ones) for r in rows]
    torch.set_num_threads(1)
    seconds = take_turns({"48": lambda: ours(48), "224": lambda: ours(224),
                          "48 theirs": lambda: theirs(48), "224 theirs": lambda: theirs(224),
                          "laptop": laptop, "step": lambda: step(faces[rows[0]], rows[0]),
                          "reading": lambda: [large[r] for r in rows]}, args.repeats)
    torch.set_num_threads(cores)
    for side in ("48", "224"):
        row(f"{what}, {side} pixels", usual, "faces/s", rate(seconds[side], count),
            rate(seconds[f"{side} theirs"], count), ">= 3")
    row("ours at 48, augmented as at laptop scale, 32 faces", "a laptop-scale training step", "ms",
        ms(seconds["laptop"], len(rows)), ms(seconds["step"], 1), "<= 0.05")
    work = 3 * decoder.stage_costs()["pre-training"].operations           # forward and backward
    row("reading 224 x 224 RGB in one process, from the system's cache", "need of 4 H100 at 35% "
        "(computed)", "faces/s", rate(seconds["reading"], count),
        [4 * 0.35 * decoder.CARDS["H100"] / work] * args.repeats, ">= 1.0")


def whole_step(flags, batch, folder):
    """Stage 2's step on one batch of its own, the second one: AdamW's moments are there."""
    faces, indices = synthetic("raf", batch, folder), torch.arange(batch)
    step = training_step(flags, faces)[2]
    step(faces[indices], indices)
    return lambda: step(faces[indices], indices)


def finetune_rows(args):
    """A step of Algorithm 1 at the paper's size, against a linear head with cross-entropy."""
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in args.sizes.items()]
    flags += ["--data", "raf", "--batch-size", str(args.batch)]
    faces, indices = synthetic("raf", 16, args.folder), torch.arange(args.batch)
    images, labels, u = faces[indices], faces.labels[indices], torch.rand(args.batch, 12)
    run, _, ours = training_step(flags, faces)
    simple = train.parse(["--method", "baseline", "--init", "none", *flags])
    model = train.build_model(simple).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    scaler, c = torch.amp.GradScaler("cpu", enabled=False), run.config

    def plain():
        x = augment(images, u, c["image_size"], "raf", c["crop_scale"], c["degrees"], c["light"],
                    c["erase"])
        pretrain.update(model, optimizer, scaler, F.cross_entropy(model(x), labels), c["clip"])

    seconds = take_turns({"ours": lambda: ours(images, indices), "plain": plain}, args.repeats)
    row("fine-tuning step: label decoder, Eq. 2-5, C", "linear head, cross-entropy", "ms an image",
        ms(seconds["ours"], args.batch), ms(seconds["plain"], args.batch), "<= 1.08")
    cost = decoder.stage_costs()["training"]
    held = memory(args, whole_step, flags, args.batch, args.folder, whole=True)
    computed = (16 * cost.parameters + 4 * cost.kept * args.batch) / 1e6
    row(f"its memory, {args.batch} images, with weights and AdamW", "computed, at most: 16 bytes a "
        "weight, 4 a number kept", "MB", held, [computed] * len(held))


def compile_rows(args):
    """What --compile gains: a step of Algorithm 1 at both scales, compiled once before."""
    large = [f"--{k.replace('_', '-')}={v}" for k, v in args.sizes.items()] + ["--data", "raf"]
    for name, data, flags, batch in (("laptop", "ferplus", LAPTOP, 32),
                                     ("paper", "raf", large, args.batch)):
        faces, indices = synthetic(data, batch, args.folder), torch.arange(batch)
        sides = {"plain": training_step([*flags, f"--batch-size={batch}"], faces)[2]}
        if not args.quick and any(map(shutil.which, ("c++", "g++", "clang++"))):
            flags = [*flags, f"--batch-size={batch}", "--compile"]
            sides["compiled"] = training_step(flags, faces)[2]
        seconds = take_turns({name: lambda step=step: step(faces[indices], indices)
                              for name, step in sides.items()}, args.repeats)
        row(f"training step, {name} scale, with --compile", "without", "ms an image",
            ms(seconds.get("compiled", []), batch), ms(seconds["plain"], batch),
            reason="no C++ compiler, or --quick")


def evaluate_rows(args):
    """`train.predict` on as many faces as FERPlus's Valid has."""
    count, few = (128, range(16)) if args.quick else (3579, range(128))
    faces = synthetic("ferplus", count, args.folder)
    run, model, _ = training_step(LAPTOP, faces)
    ready = prepare(faces[range(count)], 48, "ferplus").split(256)
    with torch.no_grad():                                # predict turns the model to evaluation
        seconds = take_turns({
            "predict": lambda: train.predict(run, model, faces),
            "bare": lambda: [model(images) for images in ready],
            "single": lambda: [model(prepare(faces[[i]], 48, "ferplus")) for i in few]},
            args.repeats)
    row(f"evaluation of {count:,} faces, laptop scale", "the bare network", "faces/s",
        rate(seconds["predict"], count), rate(seconds["bare"], count), ">= 0.9")
    row("the same", "one face at a time", "faces/s", rate(seconds["predict"], count),
        rate(seconds["single"], len(few)))


# --------------------------------------------------------------------------- processes and growth

def weak_scaling(rank, port, rounds, steps, folder):
    """One of two processes: (seconds of the first alone and of both together, parameters)."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
    torch.set_num_threads(1)
    faces = synthetic("ferplus", 256, folder)
    run, model, alone = training_step(LAPTOP, faces)
    pretrain.start(run.config)                           # joins the other process
    _, _, together = training_step([*LAPTOP, "--batch-size", "64"], faces, rank, 2)
    images, indices = faces[range(32)], torch.arange(32)

    def work(step, count):
        for _ in range(count):
            step(images, indices)
        dist.barrier()

    seconds = take_turns({"alone": lambda: work(alone, 0 if rank else steps),
                          "together": lambda: work(together, steps)}, rounds)
    dist.destroy_process_group()
    return seconds, pretrain.parameters(model)


def processes_rows(args):
    """Two processes of one thread each, against one; what the shared table C adds to it."""
    steps = 1 if args.quick else 20
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    with ProcessPoolExecutor(2, FRESH) as pool:
        both = [pool.submit(weak_scaling, rank, port, args.repeats, steps, args.folder)
                for rank in (0, 1)]
        seconds, parameters = both[0].result()
    row("two processes (gloo), 32 faces each a step", "twice one process", "faces/s",
        rate(seconds["together"], 64 * steps), rate(seconds["alone"], 64 * steps), ">= 0.85")
    row("C in a step: 32 indices, 32 x 8 numbers (computed)", "the gradients", "KB a process",
        [32 * (8 + 4 * 8) / 1e3], [4 * parameters / 1e3])


def reading_and_training(count, steps, folder):
    """A step that reads the first batches of an epoch of `count` faces and trains on them."""
    faces = synthetic("ferplus", count, folder)
    run, _, step = training_step(LAPTOP, faces)

    def begin_epoch():
        for images, indices in islice(pretrain.batches(run, faces, 0, 0), steps):
            step(images, indices)

    return begin_epoch


def growth_rows(args):
    """Four and sixteen times the faces or the tokens: time and memory that each one costs."""
    steps, least, tokens = (1, 64, 576) if args.quick else (20, 1750, 2304)
    sides = {n: reading_and_training(n, steps, args.folder) for n in (least, 4 * least, 16 * least)}
    seconds = take_turns(sides, args.repeats)
    held = {n: memory(args, reading_and_training, n, steps, args.folder, whole=True) for n in sides}
    for n in (4 * least, 16 * least):
        row(f"laptop-scale training from {n:,} faces", f"from {least:,}", "faces/s",
            rate(seconds[n], 32 * steps), rate(seconds[least], 32 * steps), ">= 0.95")
    for n in (4 * least, 16 * least):
        row(f"its memory, {n:,} faces, tables and weights included", f"{least:,} faces", "MB",
            held[n], held[least], "<= 1.05")
    sides = {grid ** 2: encoder_step("ours", {**args.sizes, "depth": 2, "image_size": 16 * grid},
                                     tokens // grid ** 2) for grid in (6, 12, 14, 24)}
    seconds = {n: ms(s, tokens // n * n) for n, s in take_turns(sides, args.repeats).items()}
    work = {n: operations(step) / (tokens // n * n) for n, step in sides.items()}
    for n in (144, 196, 576):
        more = work[n] / work[36]
        row(f"two blocks on {n} tokens an image", f"on 36 ({more:.2f} times the operations)",
            "ms a token", seconds[n], seconds[36], f"<= {1.1 * more:.2f}")


GROUPS = {"vit": vit_rows, "pretrain": pretrain_rows, "hog": hog_rows, "reading": reading_rows,
          "finetune": finetune_rows, "compile": compile_rows, "evaluate": evaluate_rows,
          "processes": processes_rows, "growth": growth_rows}


def main(argv=None):
    """Measure the groups that are asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of rows (all)")
    add("--repeats", type=int, default=5, help="rounds of a row (%(default)s)")
    add("--data-dir", type=Path, default=ROOT / "data/ferplus", help="FERPlus (data/ferplus)")
    add("--quick", action="store_true", help="tiny sizes, one round, without peers")
    args = parser.parse_args(argv)
    args.sizes, args.batch, args.narrow = PAPER, 4, dict(dim=512, depth=8, heads=16)
    if args.quick:
        args.sizes, args.batch, args.narrow = TINY, 2, dict(dim=16, depth=1, heads=2)
        args.repeats = 1
    torch.manual_seed(0)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    print(f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, fp32, torch "
          f"{torch.__version__}\n\n| what | against | ratio | ours | theirs | goal | met |\n"
          + "|---" * 7 + "|", flush=True)
    with tempfile.TemporaryDirectory() as args.folder:
        for group in args.only:
            GROUPS[group](args)


if __name__ == "__main__":
    main()
