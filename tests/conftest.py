"""What the tests share: the project's files on the path, and runs of its command lines."""
import functools
import json
import multiprocessing
import os
import pathlib
import re
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import ImageDraw

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from datasets import Faces  # noqa: E402
from pretrain import command_line  # noqa: E402

CPU = torch.device("cpu")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}    # of a process of its own

# Processes from a server that has imported torch once and run nothing: no seconds of import each.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["torchvision", "pytest"])

# Tiny networks gain nothing from a second thread, and lose much where other work shares the cores.
torch.set_num_threads(1)

# A run of seconds: small pictures, a small model, few steps (counts of the toy: 2000, 500, 1000).
# ResNet-18, which is never small, has a quarter of the faces in as many steps.
SHORT = "--image-size 16 --batch-size 250 --epochs 2 --warmup-epochs 1".split()
TINY = [*SHORT, *"--patch-size 4 --dim 16 --depth 2 --heads 2".split()]
DECODER = ["--decoder-dim", "8", "--decoder-heads", "2"]         # of pre-training, as small
RESNET = [*SHORT, *"--val 0.75 --batch-size 62 --lr 3e-4".split()]


def pytest_addoption(parser):
    parser.addoption("--exercises", action="store_true",
                     help="run tests/test_exercises.py too: each test fails until it is solved")


def pytest_collection_modifyitems(config, items):
    """Exercises are skipped unless they are asked for."""
    if not config.getoption("--exercises"):
        for item in items:
            if item.path.name == "test_exercises.py":
                item.add_marker(pytest.mark.skip(reason="an exercise: pytest --exercises"))


def run_script(script, *flags, before=(), status=0):
    """Run a script as a user does and return the finished process; the exit status is checked."""
    done = subprocess.run([sys.executable, *before, str(ROOT / script), *map(str, flags)],
                          capture_output=True, text=True, env={**os.environ, **ONE_THREAD},
                          timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def error_of(script, flags, capsys):
    """What the script prints on stderr before it ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        command_line(lambda: script.main([str(flag) for flag in flags]))
    assert stop.value.code == 2
    return capsys.readouterr().err


def as_rank(rank, count, port, work, args):
    """work(*args) as process `rank` of `count`, with what torchrun would have set."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    work(*args)
    if dist.is_initialized():
        dist.destroy_process_group()


def processes(count, work, *args):
    """work(*args) in `count` processes of one group, FORKED instead of started by torchrun.

    Raises torch's ProcessRaisedException, with the traceback, for what one of them raises.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(as_rank, (count, port, work, args), nprocs=count,
                                          start_method="forkserver")


two_processes = functools.partial(processes, 2)


def read_log(folder):
    """The epochs of log.jsonl, without what depends on the clock."""
    lines = (pathlib.Path(folder) / "log.jsonl").read_text().splitlines()
    clock = ("images_per_second", "seconds_left", "data_share", "target_share", "model_share")
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def flags_for(method, out, cache, *more):
    """The command line of a tiny run of a method; those that need pre-training start without."""
    row = train.METHODS[method]
    revises = row.get("revise", row.get("loss", "pll") == "pll")
    size = RESNET if row.get("model") == "resnet18" else [*TINY, "--lr", "3e-3"]
    return ["--method", method, *size, "--out", str(out), "--cache", str(cache),
            *(["--warmup-revision", "1"] if revises or row.get("loss") == "pico" else []),
            *(["--threshold", "0.02"] if revises else []),
            *([] if row.get("init") == "imagenet" else ["--init", "none"]), *map(str, more)]


def given_to_fit(script, flags, out, cache, monkeypatch):
    """What the command line of a stage, pretrain or train, gives to `fit`."""
    calls = []
    monkeypatch.setattr(script, "fit", lambda *args, **how: calls.append(args))
    script.main([*TINY, *flags, "--out", str(out), "--cache", str(cache)])
    return calls[0]


def shown_accuracy():
    """What the README shows of the first command: the toy's accuracy, 0 .. 1."""
    shown = re.search(r"accuracy +(\d+\.\d+)% +of 1000 faces", (ROOT / "README.md").read_text())
    return float(shown[1]) / 100


def read_state(folder):
    """last.pt as a dict."""
    return torch.load(pathlib.Path(folder) / "last.pt", weights_only=True)


def faces_with(labels, votes=None):
    """Faces of the toy with these labels, whose images nobody looks at."""
    labels = torch.tensor(labels)
    return Faces("train", np.zeros((len(labels), 3, 2, 2), np.uint8), labels,
                 [str(i) for i in range(len(labels))], votes)


def random_crowd(n=300, classes=5):
    """Faces with random votes (at least one each) and truth, and a source of more that is random.

    Returns faces, draw(*size) of whole numbers 0 .. 3, and the generator behind both.
    """
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randint(0, 4, size, generator=generator)
    votes = draw(n, classes).float() + F.one_hot(draw(n), classes)
    faces = Faces("train", None, votes.argmax(dim=1), [str(i) for i in range(n)], votes,
                  draw(n))
    return faces, draw, generator


@pytest.fixture
def said(monkeypatch):
    """What is written into pictures from now on: (text, place, ink) each."""
    told, whole = [], ImageDraw.ImageDraw.text

    def text(self, at, text, ink, *how, **more):
        told.append((text, at, ink))
        whole(self, at, text, ink, *how, **more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return told


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """One folder for the memory maps of all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory, cache):
    """A tiny pre-training run of the toy."""
    out = tmp_path_factory.mktemp("runs") / "pretrain"
    run_script("pretrain.py", *TINY, *DECODER, "--out", out, "--cache", cache)
    return out


@pytest.fixture(scope="session")
def trained(tmp_path_factory, cache, pretrained):
    """A tiny training run on it, revising from the second epoch."""
    out = tmp_path_factory.mktemp("runs") / "train"
    run_script("train.py", *TINY, "--init", pretrained, "--out", out, "--cache", cache,
               "--warmup-revision", 1, "--threshold", 0.02)
    return out


@pytest.fixture(scope="session")
def method_run(tmp_path_factory, cache):
    """method_run(name): a tiny run of a row of the tables, made when it is first asked for."""
    runs = {}

    def run(method):
        if method not in runs:
            runs[method] = tmp_path_factory.mktemp("runs") / method
            train.main(flags_for(method, runs[method], cache))
        return runs[method]

    return run
