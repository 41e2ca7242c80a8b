"""Runs that are interrupted, killed, restarted or given wrong numbers; nothing is lost."""
import contextlib
import functools
import itertools
import json
import os
import pathlib
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from PIL import Image

import evaluate
import pretrain
import train
from conftest import (CPU, DECODER, FORKED, ONE_THREAD, ROOT, TINY, TORCHRUN, flags_for, processes,
                      read_log, read_state, run_script, two_processes)
from datasets import InputError, load_faces
from pll import (cc_loss, contrastive_loss, lw_loss, lw_weights, pll_loss, rc_update, revise,
                 simplex, target_loss, top2, uniform_loss)
from test_train import same


def flags_of(flags, out, cache, *more):
    return [*TINY, "--epochs", "4", *flags, "--out", str(out), "--cache", str(cache), *more]


def at_step(n, act):
    """`pretrain.update` that calls act() before the update of step n (0 is the first)."""
    update, calls = pretrain.update, []

    def counted(*args):
        if len(calls) == n:
            act()
        calls.append(1)
        update(*args)
    return counted


def stop_and_resume(script, flags, step, monkeypatch):
    """SIGTERM while `step` is computed ends the run after the next one; then resume it."""
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "update",
                      at_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        with pytest.raises(pretrain.Stopped, match=f"after step {step + 2} .* --resume") as stop:
            script.main(flags)
    assert stop.value.status == 143 and signal.getsignal(signal.SIGTERM) is before
    state = read_state(flags[flags.index("--out") + 1])
    assert state["step"] == step + 2 and state["sums"]["loss"] != 0
    script.main([*flags, "--resume"])


def assert_same_run(a, b):
    """Two run folders hold the same bits."""
    assert read_log(a) == read_log(b)
    a, b = read_state(a), read_state(b)
    for key in a.keys() - {"config", "starts"}:
        assert key == "log" or same(a[key], b[key]), key


RANDOM = ("--init none --warmup-revision 1 --threshold 0.02 --dropout 0.1 --drop-path 0.1 --erase "
          "0.2 --val 0.1").split()


@pytest.mark.parametrize("script, flags", [(pretrain, DECODER), (train, RANDOM)])
def test_a_stage_stopped_in_mid_epoch_and_resumed_is_the_same(script, flags, tmp_path, cache,
                                                             monkeypatch):
    """In the third of four epochs; with all that is random."""
    script.main(flags_of(flags, tmp_path / "whole", cache))
    stop_and_resume(script, flags_of(flags, tmp_path / "parts", cache), 18, monkeypatch)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    starts = read_state(tmp_path / "parts")["starts"]
    config = json.loads((tmp_path / "parts/config.json").read_text())
    assert [s["step"] for s in starts] == [0, 20] and config["earlier"] == starts[:1]
    assert starts[1].items() <= {**config, "step": 20}.items() and starts[1]["command"]


@pytest.mark.parametrize("method", [m for m in train.METHODS if m not in ("rc", "cc", "lw")])
def test_a_method_stopped_in_mid_epoch_and_resumed_is_the_same(method, method_run, tmp_path, cache,
                                                              monkeypatch):
    """The three are slow: their losses are here on the ViT, ResNet-18 with pico, resnet18-pll."""
    stop_and_resume(train, flags_for(method, tmp_path / "parts", cache), 9, monkeypatch)
    assert_same_run(tmp_path / "parts", method_run(method))


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "nothing happened"
        time.sleep(0.05)


def start_script(script, flags, before=(), **how):
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    return subprocess.Popen([sys.executable, *before, str(ROOT / script), *flags], text=True,
                            env={**os.environ, **ONE_THREAD}, **how)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_end_with_one_line(number, status, tmp_path, cache):
    run = start_script("pretrain.py", flags_of(DECODER, tmp_path, cache, "--epochs", "5000"))
    wait_for(lambda: (tmp_path / "log.jsonl").exists() and read_log(tmp_path))
    run.send_signal(number)
    _, error = run.communicate(timeout=60)
    assert run.returncode == status
    assert error.startswith("stopped: after step ") and error.count("\n") == 1
    assert read_state(tmp_path)["step"] >= 8


def test_sigterm_to_torchrun_saves_at_one_step_in_all_processes(tmp_path, cache):
    flags = flags_of(DECODER, tmp_path, cache, "--epochs", "5000")
    run = start_script("pretrain.py", flags, before=TORCHRUN)
    wait_for(lambda: (tmp_path / "log.jsonl").exists() and read_log(tmp_path))
    run.send_signal(signal.SIGTERM)
    _, error = run.communicate(timeout=60)
    step = read_state(tmp_path)["step"]
    assert step >= 8 and error.count(f"stopped: after step {step} by a signal, all is saved") == 2


def test_a_second_ctrl_c_stops_at_once():
    with pytest.raises(KeyboardInterrupt):
        with pretrain.caught_signals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signals == [signal.SIGINT]
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("how", ["fork", "forkserver"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_loading_processes_outlive_the_signal_that_stops_a_run(number, how, tmp_path, cache):
    """The whole group of processes gets it, as from a terminal or from torchrun; all eight batches
    come, whichever way of starting processes is Python's own (fork, from 3.14 on forkserver)."""
    program = """if True:
        import multiprocessing, subprocess, sys, pretrain, train
        multiprocessing.set_start_method(sys.argv[1])
        def main(run):
            faces = pretrain.load_split(run, "train")
            with pretrain.caught_signals() as signals:
                for k, _ in enumerate(pretrain.batches(run, faces, 0, 0)):
                    if k == 1:
                        subprocess.run(f"kill -{sys.argv[2]} 0", shell=True)
            print(k + 1, *map(int, signals))
        main(pretrain.start(train.parse(sys.argv[3:])))"""
    flags = [how, str(int(number)), *flags_of([], tmp_path, cache), "--workers", "1"]
    done = subprocess.run([sys.executable, "-c", program, *flags], cwd=ROOT, text=True, timeout=120,
                          env={**os.environ, **ONE_THREAD}, capture_output=True,
                          start_new_session=True)
    assert done.stdout.splitlines()[-1:] == [f"8 {int(number)}"], done.stderr


def test_what_was_stopped_at_once_has_a_shells_status_and_one_line(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        pretrain.command_line(interrupted)
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted at once; what was saved before is whole\n"


def save_for_ever(path):
    """Do nothing but save checkpoints of 20 MB, each filled with its number."""
    for step in itertools.count():
        pretrain.save_checkpoint(path, {"stage": "pretrain", "log": [], "config": {}, "step": step,
                                        "model": {"x": torch.full((5_000_000,), float(step))}})


def test_kill_9_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    path, step = tmp_path / "last.pt", -1
    generator = torch.Generator().manual_seed(0)
    for _ in range(16):
        path.unlink(missing_ok=True)
        run = FORKED.Process(target=save_for_ever, args=(path,))
        run.start()
        wait_for(path.exists)
        time.sleep(torch.rand(1, generator=generator).item() * 0.4)
        run.kill()
        run.join()
        state = pretrain.load_checkpoint(path, "pretrain")
        assert (state["model"]["x"] == state["step"]).all()
        step = max(step, state["step"])
    assert step > 0                                      # one at least was replaced


def test_a_killed_rank_comes_back_and_the_result_is_the_same(tmp_path, cache):
    """torchrun --max-restarts: rank 1 is killed in the second epoch of its first life."""
    flags = flags_of(["--init", "none", "--warmup-revision", "1", "--threshold", "0.02"],
                     tmp_path / "killed", cache)
    script = tmp_path / "killed.py"
    script.write_text(
        f"import os, signal, sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import pretrain, train; from test_trust import at_step\n"
        "if os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "    pretrain.update = at_step(13, lambda: os.kill(os.getpid(), signal.SIGKILL))\n"
        f"pretrain.command_line(lambda: train.main({flags!r}))\n")
    done = run_script(script, before=[*TORCHRUN, "--max-restarts=3"])
    assert done.stdout.count("epoch 1/4") == 1 and done.stdout.count("epoch 2/4") == 1
    two_processes(train.main, [*flags, "--out", str(tmp_path / "whole")])
    assert same(read_log(tmp_path / "killed"), read_log(tmp_path / "whole"), 1e-6)
    a, b = read_state(tmp_path / "killed"), read_state(tmp_path / "whole")
    assert same(a["model"], b["model"], 1e-6) and a["confidence"].equal(b["confidence"])


def stopped_by_the_second(flags, stage="pretrain"):
    """A stage of which process 1 gets SIGTERM in the fifth step."""
    if os.environ["RANK"] == "1":
        pretrain.update = at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(pretrain.Stopped, match="by a signal, all is saved"):
        {"pretrain": pretrain, "train": train}[stage].main(flags)


def test_two_processes_stopped_in_mid_epoch_and_resumed_log_the_same(tmp_path, cache):
    """What each process has summed up since the epoch began is not lost, nor is what it draws."""
    flags = flags_of(DECODER, tmp_path / "parts", cache, "--epochs", "2")
    two_processes(stopped_by_the_second, flags)
    assert 4 < read_state(tmp_path / "parts")["step"] < 8
    two_processes(pretrain.main, [*flags, "--resume"])
    two_processes(pretrain.main, [*flags, "--out", str(tmp_path / "whole")])
    assert same(read_log(tmp_path / "parts"), read_log(tmp_path / "whole"), 1e-6)
    flags = flags_of(RANDOM, tmp_path / "train", cache, "--epochs", "2")
    two_processes(stopped_by_the_second, flags, "train")
    two_processes(train.main, [*flags, "--resume"])
    two_processes(train.main, [*flags, "--out", str(tmp_path / "at-once")])
    assert_same_run(tmp_path / "train", tmp_path / "at-once")


@pytest.mark.parametrize("stage, flags", [("pretrain", DECODER), ("train", RANDOM)])
def test_three_processes_stopped_and_resumed_are_the_same_if_deterministic(stage, flags, tmp_path,
                                                                           cache):
    """Of three addends the order counts: it must be that of an uninterrupted run at each step.

    What the epoch's means have summed up so far is divided by three to be saved, which rounds.
    """
    main = {"pretrain": pretrain, "train": train}[stage].main
    flags = [*flags, "--batch-size", "249", "--deterministic"]
    parts, whole = (flags_of(flags, tmp_path / name, cache, "--epochs", "2")
                    for name in ("parts", "whole"))
    processes(3, stopped_by_the_second, parts, stage)
    processes(3, main, [*parts, "--resume"])
    processes(3, main, whole)
    assert same(read_log(tmp_path / "parts"), read_log(tmp_path / "whole"), 1e-12)
    a, b = read_state(tmp_path / "parts"), read_state(tmp_path / "whole")
    assert all(same(a[key], b[key]) for key in a.keys() - {"config", "starts", "log"})


def test_a_checkpoint_is_written_every_so_many_epochs_at_the_end_and_when_stopped(
        tmp_path, cache, monkeypatch):
    saved, logged, save, write = [], [], pretrain.save_run, pretrain.write_log
    monkeypatch.setattr(pretrain, "save_run", lambda run, state: (
        saved.append(state["step"]), save(run, state)))
    monkeypatch.setattr(pretrain, "write_log", lambda run, log: (
        logged.append(len(log)), write(run, log)))
    flags = flags_of(DECODER, tmp_path / "run", cache, "--epochs", "5", "--save-every", "2")
    stop_and_resume(pretrain, flags, 18, monkeypatch)                # in the third epoch, of eight
    assert saved == [0, 16, 20, 20, 32, 40]
    assert logged == [0, 1, 2, 2, 2, 3, 4, 5]                        # the log has every epoch


def predict_into(path, flags):
    """Write the logits of an untrained network whose BatchNorm differs in each process."""
    run = pretrain.start(train.parse(flags))
    torch.manual_seed(0)
    model = train.build_model(run.config)
    for buffer in model.buffers():
        buffer += run.rank
    logits = train.predict(run, model, pretrain.load_split(run, "val"), batch_size=100)
    if run.rank == 0:
        torch.save(logits, path)


def test_all_processes_predict_with_what_the_first_one_saves(tmp_path, cache):
    """BatchNorm's averages are of a process's own faces; those of the first one are saved."""
    flags = flags_for("resnet18-pll", tmp_path, cache)
    predict_into(tmp_path / "one.pt", flags)
    two_processes(predict_into, tmp_path / "two.pt", flags)
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("one", "two"))
    assert one.shape == (500, 7)
    torch.testing.assert_close(one, two)


def keep_every_table(folder, flags):
    """Train, and write this process's table C after each step and what PiCO keeps at the end."""
    make, begin, update = train.confidence_table, train.pico_state, pretrain.update
    tables, kept, pico = [], [], [{}]

    def keep(*args):
        tables.append(make(*args))
        return tables[-1]

    def keep_pico(*args):
        pico.append(begin(*args))
        return pico[-1]

    def watch(*args):
        update(*args)
        kept.append(torch.stack([tables[0]["confidence"], tables[0]["candidates"].float()]))

    train.confidence_table, train.pico_state, pretrain.update = keep, keep_pico, watch
    train.main(flags)
    state = {**pico[-1]}
    if state:
        state["key_model"] = state["key_model"].state_dict()
    torch.save((kept, state), folder / f"rank-{os.environ['RANK']}.pt")


@pytest.mark.parametrize("method, more", [("ours", []), ("ours", ["--candidates", "lw1"]),
                                          ("pico-vit", [])], ids=["ours", "lw1", "pico-vit"])
def test_every_process_holds_the_same_confidence_after_every_step(method, more, tmp_path, cache):
    two_processes(keep_every_table, tmp_path, [*flags_for(method, tmp_path / "run", cache), *more])
    (zero, pico), (one, other) = (
        torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert same(pico, other) and len(pico) == (5 if method == "pico-vit" else 0)
    assert len(zero) == len(one) == 16 and all(a.equal(b) for a, b in zip(zero, one))
    assert len({c.numpy().tobytes() for c in zero}) > 5  # it did change from step to step


def test_picos_two_processes_equal_one(tmp_path, cache):
    """Which key is a face's own other view depends on its place among those of all processes."""
    flags = flags_for("pico-vit", tmp_path / "one", cache)
    train.main(flags)
    two_processes(train.main, [*flags, "--out", str(tmp_path / "two")])
    assert same(read_log(tmp_path / "one"), read_log(tmp_path / "two"), 1e-4)


def test_more_processes_than_faces_is_an_error(tmp_path):
    Image.new("RGB", (32, 32), "teal").save(tmp_path / "a.png")
    (tmp_path / "train.csv").write_text("image,joy,grief\na.png,3,1\n")
    done = run_script("pretrain.py", "--data", "own", "--data-dir", tmp_path, "--cache",
                      tmp_path / "c", "--out", tmp_path / "run", *TINY, "--batch-size", 2,
                      before=TORCHRUN, status=1)           # torchrun's own status
    assert "\nerror: --batch-size 2 is more than the 1 faces\n" in f"\n{done.stderr}"
    assert re.search(r"exitcode *: 2 ", done.stderr)
    assert str(ROOT / "pretrain.py") + '", line' not in done.stderr    # a traceback, but torchrun's


def test_a_full_disk_is_an_error_before_training(tmp_path, cache, pretrained):
    """Files of at most 20 kB: the first checkpoint does not fit (the memory map is there)."""
    import resource
    flags = flags_of(DECODER, tmp_path / "run", cache)
    run = start_script("pretrain.py", flags, preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (20_000, 20_000)))
    out, error = run.communicate(timeout=120)
    assert run.returncode == 2 and "epoch 1/4" not in out
    assert error.startswith(f"error: {tmp_path / 'run/last.pt'}: cannot be written (")
    assert "is the disk full? What was there before is still there" in error
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.json"}


def test_two_processes_that_write_one_file_leave_a_whole_one(tmp_path, monkeypatch):
    """Each writes beside under its own name: the later one's file stays, whole."""
    path = tmp_path / "last.pt"

    def write(file):
        file.write(b"mine, ")
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)       # another process, while this one writes
            pretrain.replace_file(path, lambda other: other.write(b"the other's"))
        assert path.read_bytes() == b"the other's"
        file.write(b"whole")
    pretrain.replace_file(path, write)
    assert path.read_bytes() == b"mine, whole"
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_ctrl_c_while_a_checkpoint_is_written_is_not_a_full_disk(tmp_path):
    def interrupted(file):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise RuntimeError("unexpected pos 64 vs 0")         # as torch.save's writer does

    pretrain.save_checkpoint(tmp_path / "last.pt", {"x": 1})
    with pytest.raises(KeyboardInterrupt):
        pretrain.replace_file(tmp_path / "last.pt", interrupted)
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
    assert torch.load(tmp_path / "last.pt", weights_only=True) == {"x": 1}


@pytest.mark.parametrize("said", [dict(RANK="1"), dict(RANK="x", WORLD_SIZE="2"),
                                  dict(WORLD_SIZE="2"), dict(RANK="2", WORLD_SIZE="2")])
def test_half_of_torchruns_environment_is_refused(said, trained, monkeypatch):
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"RANK {said.get('RANK')}, .*not one of torchrun's proce"):
        evaluate.main([str(trained)])


def test_names_that_the_terminal_cannot_show_do_not_end_a_run():
    done = subprocess.run([sys.executable, "-c", "import pretrain\n"
                           "pretrain.command_line(lambda: print('\u60b2'))"], cwd=ROOT,
                          capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONIOENCODING": "latin-1"})
    assert (done.returncode, done.stdout) == (0, "\\u60b2\n"), done.stderr


@pytest.mark.parametrize("raised, status, said", [
    (KeyboardInterrupt(), 130, ""),
    (PermissionError(13, "Permission denied", "closed"), 2, "error: closed: Permission denied\n")])
def test_datasets_alone_ends_as_the_others_do(raised, status, said, monkeypatch, capsys):
    def parse(self, argv):
        raise raised
    monkeypatch.setattr("argparse.ArgumentParser.parse_args", parse)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "datasets.py"), run_name="__main__")
    assert (end.value.code, capsys.readouterr().err) == (status, said)


def test_a_new_run_that_cannot_save_leaves_the_trained_one(trained, tmp_path, cache, monkeypatch):
    """Nor do two that were given up before they learned anything put it away."""
    out, was = tmp_path / "run", (trained / "last.pt").read_bytes()
    shutil.copytree(trained, out)
    flags = flags_of(["--init", "none"], out, cache)
    with monkeypatch.context() as patch:
        def full(path, state):
            raise InputError(f"{path}: cannot be written")
        patch.setattr(pretrain, "save_checkpoint", full)
        with pytest.raises(InputError, match="cannot be written"):
            train.main(flags)
    assert (out / "last.pt").read_bytes() == (out / "previous.pt").read_bytes() == was
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(pretrain, "train_epoch", lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                train.main(flags)
        assert read_state(out)["step"] == 0 and (out / "previous.pt").read_bytes() == was


def test_weights_that_are_not_finite_are_not_saved(tmp_path, cache, monkeypatch):
    """A gradient may be infinite though the loss is not: here in the last step of an epoch."""
    seen, build = [], train.build_model

    def infinite(gradient):
        seen.append(1)
        return gradient * torch.inf if len(seen) == 16 else gradient

    def model_with_hook(config):
        model = build(config)
        model.head.queries.register_hook(infinite)
        return model

    monkeypatch.setattr(train, "build_model", model_with_hook)
    with pytest.raises(pretrain.Stopped, match=r"NaN or infinity after step 16; .*last.pt is the "):
        train.main(flags_of(["--init", "none"], tmp_path, cache))
    kept = read_state(tmp_path)
    assert kept["step"] == 8 and all(v.isfinite().all() for v in kept["model"].values())


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    pretrain.save_checkpoint(path, {"stage": "pretrain", "log": [], "config": {}, "model": {},
                                    "step": 1})

    def fail(state, file):
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(InputError, match="cannot be written .*No space left"):
        pretrain.save_checkpoint(path, {"stage": "pretrain", "step": 2})
    assert pretrain.load_checkpoint(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def no_space(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_an_evaluation_that_cannot_be_kept_leaves_the_old_one(tmp_path, monkeypatch):
    evaluate.keep_result(tmp_path, {"split": "test", "accuracy": 0.5})
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(InputError, match="test.json: cannot be written .*No space left"):
        evaluate.keep_result(tmp_path, {"split": "test", "accuracy": 0.75})
    assert json.loads((tmp_path / "test.json").read_text())["accuracy"] == 0.5
    assert [p.name for p in tmp_path.iterdir()] == ["test.json"]
    monkeypatch.setattr(pathlib.Path, "unlink", no_space)        # as on a disk that is read only
    with pytest.raises(InputError, match="test.json: cannot be written .*No space left"):
        evaluate.keep_result(tmp_path, {"split": "test", "accuracy": 0.75})


def test_settings_that_cannot_be_kept_leave_the_old_ones(tmp_path, monkeypatch):
    def write(seed):
        config = dict(out=str(tmp_path), batch_size=8, seed=seed)
        pretrain.write_config(pretrain.Run(config, 0, 1, torch.device("cpu")))

    write(seed=1)
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(InputError, match="config.json: cannot be written .*No space left"):
        write(seed=2)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def broken_at(step, value=float("nan"), rank=None):
    """`train.pll_loss` that is not finite at one of its calls (once for the loss and once for the
    trivial answer in each step), in one process or in all."""
    whole, calls = train.pll_loss, []

    def loss(*args):
        calls.append(1)
        wrong = len(calls) == 2 * step + 1 and rank in (None, int(os.environ.get("RANK", 0)))
        return whole(*args) * (value if wrong else 1.0)
    return loss


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(value, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(train, "pll_loss", broken_at(10, value))
    with pytest.raises(pretrain.Stopped) as stop:
        train.main(flags_of(["--init", "none"], tmp_path, cache))
    text, state = str(stop.value), read_state(tmp_path)
    assert text.startswith(f"loss {value} in process 0 of 1 at step 10, learning rate ")
    faces = load_faces("toy", None, "train", 16, cache=cache)
    c = train.parse(flags_of(["--init", "none"], tmp_path, cache))
    _, rows = next(pretrain.batches(pretrain.Run(c, 0, 1, CPU), faces, 1, 2))
    named = ", ".join(faces.names[i] for i in rows)        # of the third step of the second epoch
    assert f", faces {named}; {tmp_path / 'last.pt'} is the last good" in text
    assert stop.value.status == 1 and state["step"] == 8
    assert all(v.isfinite().all() for v in state["model"].values())


def broken_in_the_second(flags):
    train.pll_loss = broken_at(3, rank=1)
    with pytest.raises(pretrain.Stopped, match="^loss nan in process 1 of 2 at step 3") as stop:
        train.main(flags)
    assert stop.value.status == 1


def test_a_loss_that_is_not_finite_in_one_process_stops_both(tmp_path, cache):
    two_processes(broken_in_the_second, flags_of(["--init", "none"], tmp_path / "run", cache))
    assert read_state(tmp_path / "run")["step"] == 0


def test_with_fp16_the_scaler_leaves_the_step_out(tmp_path, cache, monkeypatch):
    """fp16's scaler on the CPU: a loss that is not finite changes no weight, halves the scale."""
    monkeypatch.setattr(pretrain, "precision", lambda device: torch.float16)
    monkeypatch.setattr(train, "autocast", lambda run: torch.autocast("cpu", enabled=False))
    monkeypatch.setattr(train, "pll_loss", broken_at(10))
    seen, update, losses, in_parts = [], pretrain.update, [], pretrain.loss_in_parts

    def count(*args):
        losses.append(in_parts(*args))
        return losses[-1]

    def watch(model, optimizer, scaler, loss, clip):
        before = model.head.weight.detach().clone()
        update(model, optimizer, scaler, loss, clip)
        seen.append((model.head.weight.equal(before), scaler.get_scale()))

    monkeypatch.setattr(pretrain, "update", watch)
    monkeypatch.setattr(pretrain, "loss_in_parts", count)
    train.main(flags_of(["--init", "none", "--warmup-epochs", "0"], tmp_path, cache))
    second = [total.item() for _, total, _ in losses[8:16] if total.isfinite()]
    assert len(second) == 7          # the mean of the log is that of the steps that were made
    assert read_log(tmp_path)[1]["loss"] == pytest.approx(sum(second) / 7, rel=1e-6)
    assert [i for i, (still, _) in enumerate(seen) if still] == [10]
    assert seen[10][1] == seen[9][1] / 2
    assert read_state(tmp_path)["scaler"]["scale"] == seen[-1][1]


def test_with_fp16_a_loss_that_stays_not_finite_stops_the_run(tmp_path, cache, monkeypatch):
    """Each skipped step halves the scale, 65,536 at first; below 1 that is no remedy."""
    monkeypatch.setattr(pretrain, "precision", lambda device: torch.float16)
    monkeypatch.setattr(train, "autocast", lambda run: torch.autocast("cpu", enabled=False))
    monkeypatch.setattr(train, "pll_loss", lambda logits, target: logits.sum() * float("nan"))
    with pytest.raises(pretrain.Stopped, match="^loss nan in process 0 of 1 at step 17, "):
        train.main(flags_of(["--init", "none"], tmp_path, cache))


def test_a_step_that_the_scaler_leaves_out_does_not_spoil_c(tmp_path, cache, monkeypatch):
    """With fp16, rows of C that are not finite are never written into the table."""
    whole, calls = train.rc_update, []

    def broken(*args):
        calls.append(1)
        return whole(*args) * (float("nan") if len(calls) == 3 else 1.0)
    monkeypatch.setattr(train, "rc_update", broken)
    train.main(flags_of(["--method", "rc-vit", "--init", "none", "--epochs", "1",
                         "--warmup-epochs", "0"], tmp_path, cache))
    C = read_state(tmp_path)["confidence"]
    assert len(calls) >= 8 and C.isfinite().all()
    torch.testing.assert_close(C.sum(1), torch.ones(len(C)))


def test_losses_are_fp32_under_autocast_and_of_16_bit_logits():
    torch.manual_seed(0)
    logits, sets = torch.randn(6, 5), torch.eye(5, dtype=torch.bool)[[0, 1, 2, 3, 4, 0]]
    sets[:, 2] = True
    soft = sets / sets.sum(1, keepdim=True)
    values = {
        "Eq. 2": lambda x: pll_loss(x, soft), "Eq. 3": lambda x: uniform_loss(x, 0.07),
        "targets": lambda x: target_loss(x[:5], simplex(5, 5)),
        "Eq. 4": lambda x: top2(soft, x)[0], "Eq. 5": lambda x: revise(soft, x, 0.1),
        "rc": lambda x: rc_update(x, sets), "cc": lambda x: cc_loss(x, sets),
        "lw": lambda x: lw_loss(x, sets, lw_weights(x, sets)),
        "lw, ce": lambda x: lw_loss(x, sets, lw_weights(x, sets), kind="ce"),
        "pico": lambda x: contrastive_loss(x, x, torch.eye(6, dtype=torch.bool))}
    rounded = logits.bfloat16()
    for name, value in values.items():
        outside, of_rounded = value(logits), value(rounded.float())
        assert outside.dtype == torch.float32 and value(rounded).equal(of_rounded), name
        with torch.autocast("cpu", torch.bfloat16):
            assert value(logits).equal(outside) and value(rounded).equal(of_rounded), name


def test_a_signal_in_the_last_step_finds_the_run_finished(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(pretrain, "update", at_step(30, lambda: os.kill(os.getpid(),
                                                                        signal.SIGTERM)))
    train.main(flags_of(["--init", "none"], tmp_path, cache))        # `Stopped` is not raised
    assert read_state(tmp_path)["step"] == 32 and len(read_log(tmp_path)) == 4


def test_a_resumed_run_keeps_the_scale_of_fp16():
    model, scaler = torch.nn.Linear(2, 1), torch.amp.GradScaler("cpu", 8.0)
    optimizer, fresh = torch.optim.AdamW(model.parameters()), torch.amp.GradScaler("cpu")
    saved = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=3, log=[],
                 scaler=scaler.state_dict(), sums={})
    pretrain.restore(pretrain.Run(dict(out="x"), 0, 1, CPU), saved, model, optimizer, fresh)
    assert fresh.get_scale() == 8


def test_deterministic_asks_torch_for_it(tmp_path, cache, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    train.main(flags_of(["--init", "none", "--epochs", "1"], tmp_path / "a", cache))
    assert asked == []
    train.main(flags_of(["--init", "none", "--epochs", "1", "--deterministic"], tmp_path / "b",
                        cache))
    assert asked == [True] and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert read_log(tmp_path / "a") == read_log(tmp_path / "b")


@pytest.mark.parametrize("method", ["ours", "pico-vit", "resnet18-pll"])
def test_every_operation_has_a_deterministic_form(method, tmp_path, cache):
    """Under the strict switch an operation without one would raise, as far as the CPU can tell."""
    try:
        train.main(flags_for(method, tmp_path, cache, "--init", "none", "--deterministic"))
        assert torch.are_deterministic_algorithms_enabled() and read_state(tmp_path)["step"] == 16
    finally:
        torch.use_deterministic_algorithms(False)


def test_memory_is_flat_over_200_steps(tmp_path, cache, monkeypatch):
    used, update = [], pretrain.update

    def watch(*args):
        update(*args)
        pages = int(open("/proc/self/statm").read().split()[1])
        used.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)

    monkeypatch.setattr(pretrain, "update", watch)
    train.main([*TINY, "--epochs", "7", "--batch-size", "50", "--init", "none", "--out",
                str(tmp_path), "--cache", str(cache)])
    assert len(used) == 280 and max(used[80:]) - used[79] < 10    # megabytes


def test_a_checkpoint_is_on_the_disk_before_it_takes_the_old_ones_place(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *how, n=name, f=real: (done.append(n), f(*how))[1])
    pretrain.save_checkpoint(tmp_path / "last.pt", {"stage": "pretrain"})
    assert done == ["fsync", "replace"]


def hang(busy, told):
    """The first of two processes is busy with its reading, or never comes; the second tells."""
    join = dist.init_process_group
    dist.init_process_group = functools.partial(join, timeout=timedelta(seconds=2))
    run = pretrain.start({"device": "cpu", "deterministic": False, "accumulate": 1})
    if busy:
        pretrain.first_alone(run, lambda: time.sleep(5 * (1 - run.rank)))
    elif run.rank == 0:
        return time.sleep(10)                            # alive, but not there
    try:
        found = str(pretrain.anywhere(run, run.rank == 1))
    except RuntimeError as error:
        found = str(error)
    if run.rank == 1:
        told.write_text(found)


@pytest.mark.parametrize("busy, found", [(True, r"\[True\]$"), (False, ".*[Tt]imed out")])
def test_the_others_wait_for_the_first_ones_reading_not_for_one_that_hangs(busy, found, tmp_path):
    """Torch's patience is 2 seconds here."""
    two_processes(hang, busy, tmp_path / "told")
    assert re.match(found, (tmp_path / "told").read_text())


@pytest.mark.parametrize("error, status, said", [
    (InputError("a wrong flag"), 2, "error: a wrong flag\n"),
    (pretrain.Stopped("by a signal", 143), 143, "stopped: by a signal\n"),
    (torch.cuda.OutOfMemoryError("full"), 1, "stopped: the card's memory is full; try"),
    (RuntimeError("one process alone"), 1, "Traceback (most recent call last):\n"),
    (None, 0, "")])
def test_a_process_that_fails_does_not_wait_for_the_others(error, status, said, monkeypatch,
                                                           capfd):
    """They may wait for it; NCCL would let it wait for them when the group is destroyed."""
    done = []

    def main():
        if error:
            raise error

    def leave(status):
        raise SystemExit(f"at once, {status}")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("destroyed"))
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit, match=f"at once, {status}") if error else (
            contextlib.nullcontext()):
        pretrain.command_line(main)
    assert done == ([] if error else ["destroyed"])
    assert capfd.readouterr().err.startswith(said)


def test_what_a_failing_process_printed_before_is_not_lost():
    """A pipe is written to when its buffer is full or flushed, and leaving at once does not."""
    done = subprocess.run([sys.executable, "-c", (
        "import pretrain, torch.distributed as dist\n"
        "def main():\n"
        "    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "    print('so far')\n"
        "    raise pretrain.InputError('a wrong flag')\n"
        "pretrain.command_line(main)")], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONUNBUFFERED": ""})                  # buffered, as by default
    assert (done.returncode, done.stdout) == (2, "so far\n")
    assert done.stderr.endswith("error: a wrong flag\n")


def test_restarts_on_several_machines_are_refused(monkeypatch):
    """Each machine's torchrun counts its own: they would resume from different states."""
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(InputError, match="--max-restarts: .* go on with --resume"):
        pretrain.start({"device": "cpu", "deterministic": False, "accumulate": 1})


def test_a_card_is_not_named_for_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("cuda:0", "cuda:1"):
        with pytest.raises(InputError, match=f"{name}: cannot be used .*its own card: say cuda"):
            pretrain.start({"device": name, "deterministic": False, "accumulate": 1})


def test_a_card_that_is_not_there_is_an_error_though_nobody_named_it(monkeypatch):
    def no_such_card(device):
        raise RuntimeError("invalid device ordinal")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", no_such_card)
    with pytest.raises(InputError, match="--device cuda: cannot be used .invalid device ordinal"):
        pretrain.start({"device": None, "deterministic": False, "accumulate": 1})


def test_pace_counts_the_faces_of_all_processes():
    run = pretrain.Run({"batch_size": 250}, 0, 2, CPU, parts=5)
    told = pretrain.pace(run, time.perf_counter() - 10, done=4, left=4)
    assert told["images_per_second"] == pytest.approx(100, rel=0.01) and told["seconds_left"] == 10


@pytest.mark.parametrize("record, warned", [
    (dict(epoch=2, loss=0.5, trivial=0.5), True), (dict(epoch=2, loss=0.4, trivial=0.5), False),
    (dict(epoch=1, loss=0.5, trivial=0.5), False),                    # not the last one
    (dict(epoch=2, loss=6.0, pll=1.9, trivial=2.0), False),           # with Eq. 3 beside it
    (dict(epoch=2, loss=6.0, pll=2.1, trivial=2.0), True)])
def test_the_last_epoch_says_if_nothing_was_learned(record, warned, capsys):
    state = {"log": [], "sums": {"loss": 1}}
    pretrain.close_epoch(pretrain.Run({"epochs": 2}, 0, 1, CPU), state, record, dict)
    assert ("warning: nothing was learned" in capsys.readouterr().out) == warned
    assert state == {"log": [record], "sums": {}}


def test_an_epoch_tells_how_long_is_left_and_where_time_goes(trained):
    for line, left in zip((trained / "log.jsonl").read_text().splitlines(), (True, False)):
        record = json.loads(line)
        assert record["images_per_second"] > 0 and (record["seconds_left"] > 0) <= left
        assert 0 < record["data_share"] and 0 < record["target_share"]
        shares = [record[f"{what}_share"] for what in ("data", "target", "model")]
        assert record["model_share"] > 0 and sum(shares) == pytest.approx(1)


def test_on_a_terminal_a_bar_is_drawn_and_wiped_before_the_epochs_line(tmp_path, cache, capfd):
    pty, fcntl, termios = map(pytest.importorskip, ("pty", "fcntl", "termios"))   # Unix alone
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, 120, 0, 0))     # rows, columns
    run = start_script("train.py", flags_for("ours", tmp_path, cache), stdout=theirs, stderr=theirs)
    os.close(theirs)
    written = b""
    with contextlib.suppress(OSError):                   # how Linux says that all of it was read
        while part := os.read(ours, 65_536):
            written += part
    os.close(ours)
    assert run.wait(timeout=60) == 0
    lines = written.decode().replace("\r\n", "\n").split("\n")
    for epoch in (1, 2):
        line = next(line for line in lines if f"\repoch {epoch}/2  loss" in line)
        bar, blank, record = line.rsplit("\r", 2)         # each drawn over the one before
        assert f"epoch {epoch}/2: " in bar and "it/s" in bar
        assert not blank.strip() and len(blank) >= len(bar.split("\r")[-1])
        assert "it/s" not in record
    capfd.readouterr()
    train.main(flags_for("ours", tmp_path / "piped", cache))
    out, error = capfd.readouterr()                      # no terminal
    assert not error and "epoch 2/2  loss" in out and "it/s" not in out and "\r" not in out
