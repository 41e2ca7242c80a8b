"""The command lines: what a run leaves behind, resume, two processes against one, wrong input."""
import contextlib
import json
import math
import os
import pickle
import shutil
import subprocess

import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader

import datasets
import decoder
import evaluate
import pretrain
import train
from conftest import (CPU, DECODER, ROOT, TINY, TORCHRUN, error_of, read_log, read_state,
                      run_script, two_processes)
from datasets import DATA, InputError, load_faces
from pll import initial_confidence, is_one_hot
from pretrain import Run

OTHER_FACES = "its training faces are not those of this data set"


def same(a, b, tolerance=0.0):
    """Two nested states are equal, floating-point values within the tolerance."""
    if isinstance(a, torch.Tensor) and a.is_floating_point():
        return a.shape == b.shape and (a - b).abs().max().item() <= tolerance if a.numel() else True
    if isinstance(a, torch.Tensor):
        return a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k], tolerance) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b))
    if isinstance(a, float):
        return abs(a - b) <= tolerance
    return a == b


def test_a_run_leaves_checkpoint_config_and_log(pretrained, trained):
    for folder in (pretrained, trained):
        assert {"last.pt", "config.json", "log.jsonl"} <= {p.name for p in folder.iterdir()}
        config = json.loads((folder / "config.json").read_text())
        assert config.keys() >= {"command", "commit", "torch", "seed", "lr", "batch_size",
                                 "processes", "threads"}
        assert [r["epoch"] for r in read_log(folder)] == [1, 2]
    log = read_log(pretrained)
    assert all(r["skill"] == pytest.approx(1 - r["loss"] / r["trivial"]) for r in log)
    assert log[1]["loss"] < log[0]["loss"]
    log = read_log(trained)
    assert all(r["loss"] == pytest.approx(r["pll"] + r["uniform"], rel=1e-5) for r in log)
    assert {"val_accuracy", "train_accuracy", "trivial", "revised"} <= log[0].keys()


def test_confidence_after_training_is_a_revision_of_the_start(trained):
    state, log = read_state(trained), read_log(trained)
    candidates, confidence = state["candidates"], state["confidence"]
    several = candidates.sum(1) > 1
    revised = is_one_hot(confidence) & several
    share = revised.float().mean().item()
    assert log[0]["revised"] == 0 < log[1]["revised"] == pytest.approx(share)
    torch.testing.assert_close(confidence.sum(1), torch.ones(2000))
    assert (confidence[~candidates] == 0).all()
    start = initial_confidence(candidates)
    assert confidence[~revised].equal(start[~revised])


def test_the_encoder_starts_from_pre_training(pretrained, trained, tmp_path, cache):
    train.main([*TINY, "--init", str(pretrained), "--out", str(tmp_path), "--cache", str(cache),
                "--epochs", "1", "--lr", "0", "--warmup-epochs", "0"])
    before, after = read_state(pretrained)["model"], read_state(tmp_path)["model"]
    for name, value in after.items():
        if name.startswith("encoder."):
            torch.testing.assert_close(value, before[name], rtol=1e-3, atol=1e-4)
    assert not same(read_state(trained)["model"], after, 1e-3)


def test_a_vit_of_other_code_is_read_from_the_four_entries_that_the_readme_names(tmp_path):
    config = train.parse([*TINY, "--init", str(tmp_path / "vit.pt")])
    tensors = train.build_model(config).encoder.state_dict()
    foreign = {"stage": "pretrain", "log": [{}], "config": {"heads": 2},
               "model": {f"encoder.{k}": v for k, v in tensors.items()}}
    encoder = train.build_model(config).encoder
    torch.save(foreign, tmp_path / "vit.pt")
    assert "vit.pt" in train.initial_weights(config, encoder)
    assert same(encoder.state_dict(), tensors, 0)
    for key in ("log", "config", "model"):
        torch.save({k: v for k, v in foreign.items() if k != key}, tmp_path / "vit.pt")
        with pytest.raises(InputError, match=f"vit.pt: has no {key}; a checkpoint of pretrai"):
            train.initial_weights(config, encoder)
    torch.save({**foreign, "config": {}}, tmp_path / "vit.pt")
    with pytest.raises(InputError, match="vit.pt: its config has None heads, this command 2"):
        train.initial_weights(config, encoder)
    model = {k.replace("positions", "pos_embed"): v for k, v in foreign["model"].items()}
    torch.save({**foreign, "model": model}, tmp_path / "vit.pt")
    with pytest.raises(InputError, match="1 missing, 1 superfluous.*positions"):
        train.initial_weights(config, encoder)


def test_no_gradient_goes_through_the_table():
    """Between processes none can; a single one must not differ."""
    rows = torch.rand(2, 3, requires_grad=True)
    run = Run({"batch_size": 2}, 0, 1, CPU)
    assert not train.share_rows(run, rows * 2).requires_grad


def keep_losses(stage, flags, folder):
    """Run a stage, and write the loss of each step of this process."""
    update, losses = pretrain.update, []

    def watch(network, optimizer, scaler, loss, clip):
        losses.append(loss.item())
        update(network, optimizer, scaler, loss, clip)

    pretrain.update = watch
    try:
        {"pretrain": pretrain, "train": train}[stage].main(flags)
    finally:
        pretrain.update = update
    torch.save(torch.tensor(losses), folder / f"losses-{os.environ.get('RANK', 'alone')}.pt")


@pytest.mark.parametrize("script, flags", [
    (pretrain, DECODER),
    (train, ["--init", "none", "--warmup-revision", "1", "--threshold", "0.01", "--lr", "1e-3"])])
def test_two_processes_equal_one(script, flags, tmp_path, cache):
    """24 steps of each stage."""
    flags = [*TINY, "--epochs", "3", *flags, "--cache", str(cache)]
    keep_losses(script.__name__, [*flags, "--out", str(tmp_path / "one")], tmp_path)
    two_processes(keep_losses, script.__name__, [*flags, "--out", str(tmp_path / "two")], tmp_path)
    alone, zero, one = (torch.load(tmp_path / f"losses-{who}.pt", weights_only=True)
                        for who in ("alone", 0, 1))
    assert len(alone) == 24
    torch.testing.assert_close((zero + one) / 2, alone, rtol=0, atol=1e-4)
    assert same(read_log(tmp_path / "one"), read_log(tmp_path / "two"), 1e-4)
    one, two = read_state(tmp_path / "one"), read_state(tmp_path / "two")
    assert same(one["model"], two["model"], 1e-3)
    if script is train:
        assert one["candidates"].equal(two["candidates"])
        differing = (one["confidence"] != two["confidence"]).any(1).float().mean()
        several = two["candidates"].sum(1) > 1
        assert differing < 0.002 and is_one_hot(two["confidence"])[several].float().mean() > 0.2


@pytest.mark.parametrize("script, flags", [
    (pretrain, DECODER),
    (train, ["--init", "none", "--warmup-revision", "1", "--threshold", "0.01", "--lr", "1e-3"])])
def test_a_batch_in_parts_equals_a_whole_one(script, flags, tmp_path, cache):
    """16 steps of each stage, each in five parts: less memory, the same run but for rounding."""
    flags = [*TINY, *flags, "--cache", str(cache)]
    script.main([*flags, "--out", str(tmp_path / "whole")])
    script.main([*flags, "--out", str(tmp_path / "parts"), "--accumulate", "5"])
    assert same(read_log(tmp_path / "whole"), read_log(tmp_path / "parts"), 1e-4)
    assert same(read_state(tmp_path / "whole")["model"], read_state(tmp_path / "parts")["model"],
                1e-3)


def printed_into(path, main, flags):
    """main(flags), what it prints written into a file that all processes add to."""
    with open(path, "a") as file, contextlib.redirect_stdout(file):
        main(flags)


def test_two_processes_in_parts_equal_one(tmp_path, cache):
    """The gradients of the parts are summed in each process and exchanged once."""
    flags = [*TINY, "--init", "none", "--lr", "1e-3", "--cache", str(cache), "--epochs", "1",
             "--warmup-epochs", "0"]
    train.main([*flags, "--out", str(tmp_path / "one")])
    two_processes(printed_into, tmp_path / "printed", train.main,
                  [*flags, "--out", str(tmp_path / "two"), "--accumulate", "5"])
    printed = (tmp_path / "printed").read_text()
    assert printed.count("global batch 250 = 2 x 5 parts x 25, cpu\n") == 1
    assert same(read_log(tmp_path / "one"), read_log(tmp_path / "two"), 1e-4)
    assert read_state(tmp_path / "one")["confidence"].equal(
        read_state(tmp_path / "two")["confidence"])


def test_a_loss_that_is_not_finite_in_an_early_part_stops_the_run(tmp_path, cache, monkeypatch):
    losses, whole = [], train.pll_loss

    def broken(*args):                          # twice a part: the loss, and the trivial answer
        losses.append(1)
        return whole(*args) * (float("nan") if len(losses) == 1 else 1.0)
    monkeypatch.setattr(train, "pll_loss", broken)
    with pytest.raises(pretrain.Stopped, match="loss nan .* at step 0"):
        train.main([*TINY, "--init", "none", "--accumulate", "2", "--out", str(tmp_path), "--cache",
                    str(cache)])


def test_a_compiled_network_is_the_same_network(tmp_path, cache, monkeypatch):
    """Compiled by a backend that needs no C++ compiler: its checkpoint has the plain names."""
    compiled, plain = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda network: (
        compiled.append(network), plain(network, backend="aot_eager"))[1])
    flags = [*TINY, "--init", "none", "--epochs", "1", "--cache", str(cache), "--out"]
    train.main([*flags, str(tmp_path / "plain")])
    train.main([*flags, str(tmp_path / "compiled"), "--compile"])
    assert len(compiled) == 1
    a, b = read_state(tmp_path / "plain")["model"], read_state(tmp_path / "compiled")["model"]
    assert same(a, b, 1e-6)


def as_json(capsys, *flags):
    """What evaluate.py --json prints."""
    capsys.readouterr()
    evaluate.main([*map(str, flags), "--json"])
    return json.loads(capsys.readouterr().out)


def test_evaluation_prints_text_and_json_and_is_exact_with_two_processes(trained, cache, capsys):
    evaluate.main([str(trained)])
    text, result = capsys.readouterr().out, as_json(capsys, trained)
    assert f"accuracy             {result['accuracy']:7.2%}   of 1000 faces" in text
    confusion = torch.tensor(result["confusion"])
    assert confusion.sum() == 1000
    assert result["accuracy"] == pytest.approx(confusion.diag().sum().item() / 1000)
    recalls = [row["recall"] for row in result["per_class"].values()]
    assert result["mean_class_accuracy"] == pytest.approx(sum(recalls) / 7)
    last = read_log(trained)[-1]
    assert f"revised in training  {last['revised']:7.2%}   of its faces, " in text
    assert (f"{last['revised_as_voted']:.2%} as voted, {last['revised_as_true']:.2%} as drawn"
            in text)
    assert result["revised_as_true"] == last["revised_as_true"]
    assert f"trivial revision     {result['trivial_as_voted']:7.2%}   as voted, had each of" in text
    assert f"locked in            {result['locked_in']:7.2%}   of those not as voted" in text
    assert f"{result['usual_error_share']:7.2%}   of those not as voted, more than any" in text
    state, faces = read_state(trained), load_faces("toy", None, "train", 96, cache=str(cache))
    few = faces.votes.max(dim=1).values < 5                              # of ten votes
    revised = is_one_hot(state["confidence"]) & (state["candidates"].sum(dim=1) > 1)
    assert result["disputed_faces"] == few.sum() > 100
    assert result["disputed_revised"] == pytest.approx(revised[few].float().mean().item())
    assert f"disputed in training {result['disputed_revised']:7.2%}   of {few.sum()} are" in text
    assert f"on disputed faces    {result['disputed_accuracy']:7.2%}   " in text
    assert result["majority_class_rate"] == confusion.sum(1).max().item() / 1000
    two = json.loads(run_script("evaluate.py", trained, "--json", before=TORCHRUN).stdout)
    assert two["confusion"] == result["confusion"]
    val = as_json(capsys, trained, "--split", "val")
    assert val["accuracy"] == pytest.approx(read_log(trained)[-1]["val_accuracy"])


def test_mean_class_accuracy_leaves_out_classes_that_do_not_occur():
    labels, predicted = torch.tensor([0, 0, 0, 2]), torch.tensor([0, 0, 1, 2])
    assert train.accuracies(predicted, labels) == pytest.approx((0.75, (2 / 3 + 1) / 2))


def test_a_held_out_share_is_not_trained_on(tmp_path, cache):
    train.main([*TINY, "--init", "none", "--out", str(tmp_path), "--cache", str(cache),
                "--epochs", "1", "--val", "0.2"])
    assert read_state(tmp_path)["confidence"].shape == (1600, 7)


def test_an_earlier_runs_checkpoint_is_kept(trained, cache, tmp_path):
    """A run begun without --resume in the folder of another one does not destroy it."""
    shutil.copytree(trained, tmp_path / "run")
    train.main([*TINY, "--init", "none", "--epochs", "1", "--warmup-epochs", "0", "--out",
                str(tmp_path / "run"), "--cache", str(cache)])
    kept = torch.load(tmp_path / "run/previous.pt", weights_only=True)
    assert same(kept["model"], read_state(trained)["model"])
    assert not same(kept["model"], read_state(tmp_path / "run")["model"])


def test_what_cannot_be_read_as_a_checkpoint_is_kept_too(cache, tmp_path):
    (tmp_path / "last.pt").write_text("perhaps of another version")
    pretrain.main([*TINY, *DECODER, "--epochs", "1", "--warmup-epochs", "0", "--out", str(tmp_path),
                   "--cache", str(cache)])
    assert (tmp_path / "previous.pt").read_text() == "perhaps of another version"
    assert len(read_state(tmp_path)["log"]) == 1


def test_faces_without_an_edge_do_not_end_a_pre_training(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "black.png")
    (tmp_path / "train.csv").write_text("image,joy,grief\nblack.png,3,1\n")
    pretrain.main(["--data", "own", "--data-dir", str(tmp_path), "--cache", str(tmp_path / "c"),
                   "--out", str(tmp_path / "run"), *TINY, "--batch-size", "1", *DECODER])
    assert all(math.isfinite(record["skill"]) for record in read_log(tmp_path / "run"))


@pytest.mark.parametrize("state, said", [
    ("clean", ""), ("changed", "-dirty"), ("tagged", ""), ("no repository", None)])
def test_a_runs_commit_says_whether_its_code_was_changed(state, said, tmp_path, monkeypatch):
    git = lambda *words: subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True,
        capture_output=True, text=True)
    (tmp_path / "pretrain.py").write_text("1")
    commit = None
    if said is not None:
        git("init"), git("add", "."), git("commit", "-m", "a")
        commit = git("rev-parse", "HEAD").stdout.strip() + said
    (tmp_path / "pretrain.py").write_text("2" if state == "changed" else "1")
    if state == "tagged":
        git("tag", "-a", "v1", "-m", "a")
    monkeypatch.setattr(pretrain, "__file__", str(tmp_path / "pretrain.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    config = train.parse(["--out", str(tmp_path / "run")])
    pretrain.write_config(pretrain.Run(config, 0, 1, CPU))
    kept = json.loads((tmp_path / "run/config.json").read_text())
    assert kept["commit"] == commit and kept["threads"] == torch.get_num_threads()


def own_faces(folder, split, count):
    """Faces of three classes, each of its own colour, with the votes of five people."""
    colours = {"joy": (220, 60, 60), "grief": (60, 60, 220), "calm": (60, 220, 60)}
    rows = ["image,joy,grief,calm"]
    for i in range(count):
        name, colour = list(colours.items())[i % 3]
        Image.new("RGB", (20, 24), colour).save(folder / f"{split}-{i}.png")
        rows.append(f"{split}-{i}.png," + ",".join(str(4 if n == name else i % 2) for n in colours))
    (folder / f"{split}.csv").write_text("\n".join(rows) + "\n")


def test_faces_of_ones_own_go_through_both_stages_and_the_evaluation(tmp_path, capsys):
    own_faces(tmp_path, "train", 60), own_faces(tmp_path, "test", 12)
    data = ["--data", "own", "--data-dir", str(tmp_path), "--cache", str(tmp_path / "c")]
    flags = [*data, *TINY, "--batch-size", "20", "--workers", "0", "--out"]
    pretrain.main([*flags, str(tmp_path / "mim"), *DECODER])
    more = [str(tmp_path / "run"), "--init", str(tmp_path / "mim"), "--epochs", "20", "--lr",
            "0.01", "--warmup-revision", "2", "--dropout", "0"]
    capsys.readouterr()
    train.main([*flags, *more])
    assert "; 2.00 candidates a face, one for 50.0% of them" in capsys.readouterr().out
    state = read_state(tmp_path / "run")
    assert state["classes"] == state["config"]["classes"] == ["joy", "grief", "calm"]
    assert state["candidates"].sum(dim=1).tolist() == [1, 3] * 30
    DATA["own"]["classes"] = None                          # as in a new process
    result, *_ = evaluate.evaluate(tmp_path / "run", "test", {"device": "cpu"})
    assert result["accuracy"] == 1 and list(result["per_class"]) == ["joy", "grief", "calm"]
    evaluate.main([str(tmp_path / "run"), "--image", str(tmp_path / "test-1.png")])
    assert capsys.readouterr().out.splitlines()[-5].split()[0] == "grief"
    table = tmp_path / "train.csv"                         # the same votes in another order
    table.write_text(table.read_text().replace("joy,grief", "grief,joy"))
    with pytest.raises(InputError, match=r"classes was \['joy', .*, is \['grief', "):
        train.main([*flags, *more, "--resume"])


def test_a_data_set_of_ones_own_is_checked(tmp_path, monkeypatch, capsys):
    own_faces(tmp_path, "train", 6), own_faces(tmp_path, "test", 3)
    monkeypatch.setitem(DATA["own"], "classes", None)      # as in a new process
    datasets.main(["--data", "own", "--data-dir", str(tmp_path), "--out", str(tmp_path / "s.png")])
    assert "  joy 2  grief 2  calm 2" in capsys.readouterr().out


def test_more_classes_than_a_simplex_has_room_for(tmp_path, capsys):
    """Twenty, in 16 dimensions: no picture of the simplex, no pull to it; a face gets a label."""
    names = [f"c{k:02d}" for k in range(20)]
    for name in names:
        Image.new("RGB", (16, 16), (12 * int(name[1:]), 99, 200)).save(tmp_path / f"{name}.png")
    rows = [",".join([f"{name}.png", *(str(3 * (name == other)) for other in names)])
            for name in names]
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("\n".join([f"image,{','.join(names)}", *rows]))
    flags = ["--data", "own", "--data-dir", str(tmp_path), "--cache", str(tmp_path / "c"), *TINY,
             "--batch-size", "20", "--init", "none", "--no-revise"]
    train.main([*flags, "--out", str(tmp_path / "run")])
    evaluate.main([str(tmp_path / "run")])
    assert (tmp_path / "run/pictures/queries.png").is_file()
    evaluate.main([str(tmp_path / "run"), "--image", str(tmp_path / "c03.png")])
    assert "  candidate set: c" in capsys.readouterr().out     # though none has a tenth
    with pytest.raises(InputError, match="--uniform targets: 20 classes have no .* in 16 dimensio"):
        train.main([*flags, "--uniform", "targets", "--out", str(tmp_path / "other")])


def changed(run, path, **what):
    """A copy of a run whose last.pt holds other things; its folder, as text."""
    shutil.copytree(run, path)
    torch.save({**read_state(path), **what}, path / "last.pt")
    return str(path)


def test_going_on_with_or_judging_by_other_faces_is_refused(pretrained, trained, cache, tmp_path):
    faces = load_faces("toy", None, "train", 16, cache=cache)
    run, state = pretrain.Run({"out": str(trained)}, 0, 1, CPU), read_state(trained)
    pretrain.same_faces(run, state, faces)
    faces.names.reverse()                        # C has a row for each place in the list
    with pytest.raises(InputError, match=OTHER_FACES):
        pretrain.same_faces(run, state, faces)
    faces.names.reverse()
    faces.names[0] = "another"
    with pytest.raises(InputError, match=OTHER_FACES):
        pretrain.same_faces(run, state, faces)
    for script, run, flags in ((pretrain, pretrained, DECODER),
                               (train, trained, ["--init", str(pretrained), "--warmup-revision",
                                                 "1", "--threshold", "0.02"])):
        folder = changed(run, tmp_path / script.__name__, faces="others")
        with pytest.raises(InputError, match=OTHER_FACES):
            script.main([*TINY, *flags, "--cache", str(cache), "--out", folder, "--resume"])
    with pytest.raises(InputError, match=f"{tmp_path}/train/last.pt: {OTHER_FACES}"):
        evaluate.evaluate(tmp_path / "train", "test", {"device": "cpu"})


def test_a_run_of_other_classes_is_not_judged(trained, tmp_path):
    folder = changed(trained, tmp_path / "run", classes=list("abcdefg"))
    with pytest.raises(InputError, match="trained on the classes a, b"):
        evaluate.load_run(folder, {"device": "cpu"})


def test_a_run_of_other_code_is_not_judged_and_says_where_its_own_is(trained, tmp_path):
    config = read_state(trained)["config"]
    forked = changed(trained, tmp_path / "forked", config={**config, "method": "mine"})
    with pytest.raises(InputError, match="'mine'.*no such row.*take the code that trained it"):
        evaluate.load_run(forked, {"device": "cpu"})
    older = {k: v for k, v in config.items() if k != "decoder_layers"}
    with pytest.raises(InputError, match="older than the setting 'decoder_layers'; .* its commit"):
        evaluate.load_run(changed(trained, tmp_path / "older", config=older), {"device": "cpu"})
    deeper = {**config, "decoder_layers": config["decoder_layers"] + 1}
    with pytest.raises(InputError, match="weights of another model .* code has changed since"):
        evaluate.load_run(changed(trained, tmp_path / "deeper", config=deeper), {"device": "cpu"})


def test_resuming_with_other_settings_is_refused_with_the_differences(trained, cache, tmp_path,
                                                                      capsys):
    shutil.copytree(trained, tmp_path / "run")
    error = error_of(train, [*TINY, "--out", tmp_path / "run", "--cache", cache, "--resume",
                             "--warmup-revision", 1, "--threshold", 0.1, "--seed", 1], capsys)
    assert "init was " in error and "threshold was 0.02, is 0.1" in error
    assert "seed was 0, is 1" in error
    assert "Traceback" not in error


def test_a_checkpoint_without_what_a_resumed_run_needs_is_refused(pretrained, trained, cache,
                                                                  tmp_path, capsys):
    flags = [*TINY, "--out", tmp_path / "run", "--cache", cache, "--resume"]
    for script, folder, more, lost in (
            (pretrain, pretrained, DECODER, ("faces", "optimizer")),
            (train, trained, ["--init", pretrained, "--warmup-revision", 1, "--threshold", 0.02],
             ("scaler", "pico"))):
        shutil.copytree(folder, tmp_path / "run")
        kept = {k: v for k, v in read_state(folder).items() if k not in lost}
        torch.save(kept, tmp_path / "run/last.pt")
        assert error_of(script, [*flags, *more], capsys) == (
            f"error: {tmp_path / 'run/last.pt'}: has no {', '.join(lost)}; it cannot be resumed\n")
        shutil.rmtree(tmp_path / "run")


def test_a_run_older_than_a_setting_is_not_resumed(trained, cache, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    state = read_state(trained)
    del state["config"]["lw_loss"]
    torch.save(state, tmp_path / "run/last.pt")
    assert error_of(train, [*TINY, "--out", tmp_path / "run", "--cache", cache, "--resume"],
                    capsys) == (f"error: {tmp_path / 'run/last.pt'}: is older than the setting "
                                "lw_loss; go on with the code of its commit (config.json)\n")


@pytest.mark.parametrize("script, flags, message", [
    (train, [], "runs/pretrain-toy/last.pt: no pre-training run; make it with: python pretrain.py"),
    (train, ["--init", "nowhere"], "nowhere/last.pt: no pre-training run; make it with: python "
     "pretrain.py --data toy --scale laptop --out nowhere (or choose --init none)"),
    (train, ["--data", "raf", "--data-dir", "my data", "--partial", "--align", "given", "--dim",
             "64", "--heads", "4"], "runs/pretrain-raf/last.pt: no pre-training run; make it with: "
     "python pretrain.py --data raf --scale paper --dim 64 --heads 4 --data-dir 'my data' --align "
     "given --partial (or choose --init none)"),
    (train, ["--init", "imagenet"], "--init imagenet: these weights are a ViT-B/16's; give --patch-"
     "size 16 --dim 768 --depth 12 --heads 12, or --init none"),
    (train, ["--data", "affectnet7", "--method", "soft"],
     "--loss soft: affectnet7 has no votes; choose another --method"),
    (train, ["--data", "affectnet8", "--prior", "votes"],
     "--prior votes: affectnet8 has no votes; leave it out"),
    (train, ["--method", "mim-pixel"], "pretrain.py --data toy --scale laptop --target pixel (or"),
    (train, ["--init", "nowhere.pt"], "nowhere.pt: no such checkpoint"),
    (train, ["--data", "ferplus", "--labels", "majority"],
     "make it with: python pretrain.py --data ferplus --scale paper --labels majority (or"),
    (train, ["--threshold", "1"], "--threshold 1.0: give a number from 0.0 to 0.9999"),
    (train, ["--data", "raf", "--init", "none", *TINY],
     "data/raf: there is no such folder (--data-dir)"),
    (pretrain, ["--resume"], "runs/pretrain-toy/last.pt: nothing to resume"),
    (pretrain, ["--seed", "-1"], "--seed -1: give a number from 0"),
    (pretrain, ["--clip", "0"], "--clip 0.0: give a number from 1e-06"),
    (pretrain, ["--epochs", "0"], "--epochs 0: give a number from 1"),
    (pretrain, ["--image-size", "50"], "--image-size 50 is not a multiple of --patch-size 8"),
    (pretrain, ["--dim", "30", "--heads", "4"], "--dim 30 is not a multiple of --heads 4"),
    (pretrain, [*TINY, "--batch-size", "5000"], "--batch-size 5000 is more than the 2000 faces"),
    (pretrain, ["--encoder", "maskfeat", "--decoder-dim", "8"],
     "--decoder-dim: has no effect unless encoder is visible; leave it out"),
    (pretrain, ["--device", "quantum"], "--device quantum: cannot be used"),
    (pretrain, ["--device", "meta"], "--device meta: cannot be used (only cpu and cuda"),
    (pretrain, [*TINY, "--mask-ratio", "0.99"], "--mask-ratio 0.99: hides all 16 patches"),
    (train, "--method resnet18-pll --image-size 32 --batch-size 4 --accumulate 4".split(),
     "--batch-size: ResNet-18's batch statistics need two faces or more"),
    (pretrain, [*TINY, "--out", "/dev/null/x"], "--out /dev/null/x: cannot be written"),
    (pretrain, [*TINY, "--out", "x" * 300], f"{'x' * 300}/last.pt: File name too long\n"),
    (train, [*TINY, "--init", "x" * 300], "x: File name too long\n"),
    (evaluate, ["x" * 300], "/test.json: File name too long\n"),
    (datasets, ["--data", "own", "--data-dir", "x" * 300], "File name too long\n"),
    (evaluate, [], "runs/train-toy: no such run; make it with: python train.py"),
    (evaluate, [__file__], "test_train.py: not a readable checkpoint"),
    (evaluate, ["--csv", "x.csv"], "--csv and --landmarks go with them"),
    *((evaluate, flags.split(), "--image or --folder takes one run") for flags in (
        "a b --image x.png", "--image x.png --folder .", "--landmarks x.csv",
        "--image x.png --markdown")),
    (evaluate, ["--json", "--markdown"], "--json: one object a run, no table; leave it or --mark"),
    (evaluate, ["--image", "x.png", "--json"], "--split, --json and --markdown do not"),
    (evaluate, ["--folder", ".", "--split", "val"], "--split, --json and --markdown do not")])
def test_wrong_input_is_one_line_and_status_2(script, flags, message, tmp_path, cache, monkeypatch,
                                              capsys):
    monkeypatch.chdir(tmp_path)
    if script in (pretrain, train):
        flags = [*flags, "--cache", cache]
    error = error_of(script, flags, capsys)
    assert error.startswith("error: ") and message in error and "Traceback" not in error


def test_a_batch_that_does_not_divide_names_the_nearest_that_does():
    with pytest.raises(InputError, match="--batch-size 251 cannot be divided among 2 processes; "
                                         "the nearest that can is 252"):
        pretrain.steps_per_epoch(Run({"batch_size": 251}, 0, 2, CPU), range(2000))


def test_an_error_of_the_first_process_ends_all_of_them_at_once(tmp_path, cache):
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = run_script("pretrain.py", *TINY, "--out", blocked / "run", "--cache", cache,
                      before=TORCHRUN, status=1)
    assert f"error: --out {blocked}/run: cannot be written" in done.stderr    # by one or by both
    assert str(ROOT / "pretrain.py") + '", line' not in done.stderr     # torchrun's own aside


def test_loading_processes_change_nothing(pretrained, tmp_path, cache):
    run_script("pretrain.py", *TINY, *DECODER, "--out", tmp_path, "--cache", cache, "--workers", 2)
    assert read_log(tmp_path) == read_log(pretrained)


def test_a_memory_map_survives_the_way_to_a_spawned_worker(cache):
    faces = load_faces("toy", None, "val", 16, cache=cache)
    loader = DataLoader(faces, sampler=[[3, 4], [0, 499]], batch_size=None, num_workers=1,
                        multiprocessing_context="spawn")
    for batch, rows in zip(loader, ([3, 4], [0, 499])):
        assert batch.equal(faces[rows])
    assert len(pickle.dumps(faces)) < 100_000                # the file's name, not the images


def test_blocks_learn_at_their_own_rates(tmp_path, cache, monkeypatch):
    rates = []
    update = pretrain.update

    def watch(model, optimizer, *rest):
        rates.append({g["scale"]: g["lr"] for g in optimizer.param_groups})
        update(model, optimizer, *rest)

    monkeypatch.setattr(pretrain, "update", watch)
    train.main([*TINY, "--init", "none", "--layer-decay", "0.5", "--lr", "1e-3", "--epochs", "1",
                "--warmup-epochs", "0", "--out", str(tmp_path), "--cache", str(cache)])
    assert rates[0] == pytest.approx({1.0: 1e-3, 0.5: 5e-4, 0.25: 2.5e-4, 0.125: 1.25e-4})
    assert rates[-1][1.0] < rates[0][1.0] and read_log(tmp_path)[0]["lr"] == rates[-1][1.0]


@pytest.mark.parametrize("flags", [
    ["--target", "pixel", "--mask", "random", *DECODER],
    ["--encoder", "maskfeat"]])
def test_the_other_ways_of_pre_training_learn_too(flags, tmp_path, cache):
    pretrain.main([*TINY, *flags, "--lr", "3e-3", "--out", str(tmp_path), "--cache", str(cache)])
    log = read_log(tmp_path)
    assert log[1]["loss"] < log[0]["loss"]


def test_another_number_of_heads_is_no_secret(pretrained):
    """It is in no tensor's shape, so that the weights alone would fit."""
    config = {**train.parse(["--init", str(pretrained), *TINY]), "heads": 4}
    with pytest.raises(InputError, match="its config has 2 heads, this command 4; give the same"):
        train.initial_weights(config, pretrain.build_encoder(config))


def test_imagenet_weights_are_torchvisions(monkeypatch):
    weights = torchvision.models.vit_b_16(weights=None).state_dict()
    monkeypatch.setattr(torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1.__class__,
                        "get_state_dict", lambda self, **_: weights)
    config = dict(init="imagenet", model="vit", data="raf", image_size=224, patch_size=16,
                  dim=768, depth=12, heads=12)
    encoder = pretrain.build_encoder(config)
    note = train.initial_weights(config, encoder)
    assert "all 150 tensors from torchvision's IMAGENET1K_V1" in note
    assert encoder.blocks[11].attn.qkv.weight.equal(
        weights["encoder.layers.encoder_layer_11.self_attention.in_proj_weight"])
    smaller = pretrain.build_encoder({**config, "image_size": 112})
    note = train.initial_weights(config, smaller)
    assert note.endswith("IMAGENET1K_V1; positions of 196 patches interpolated for 49")
    assert smaller.positions.shape == (1, 50, 768)
    weights["encoder.pos_embedding"] = weights["encoder.pos_embedding"].half()   # as some are saved
    assert train.initial_weights(config, smaller) == note
    with pytest.raises(InputError, match="weights of another model .*; first: class_token is "):
        train.initial_weights(config, pretrain.build_encoder({**config, "dim": 192}))
    weights["encoder.pos_embedding"] = torch.zeros(1, 198, 768)      # with a second special token
    with pytest.raises(InputError, match="positions of 197 patches, which are no square grid"):
        train.initial_weights(config, smaller)


def test_imagenet_weights_of_resnet18_are_torchvisions(monkeypatch):
    weights = torchvision.models.resnet18(weights=None).state_dict()
    kind = type(torchvision.models.ResNet18_Weights.IMAGENET1K_V1)
    monkeypatch.setattr(kind, "get_state_dict", lambda self, **_: dict(weights))
    encoder = train.ResNet18()
    train.initial_weights(dict(init="imagenet", model="resnet18"), encoder)
    for name, value in weights.items():
        assert name.startswith("fc.") or encoder.net.state_dict()[name].equal(value), name


def test_a_label_is_learned_from_sets_that_are_never_single():
    """Sets of two in which the true label alone is constant: the recogniser finds it."""
    torch.manual_seed(0)
    config = dict(image_size=8, patch_size=4, dim=16, depth=1, heads=2)
    model = train.Recogniser(pretrain.build_encoder(config), train.LabelDecoder(16, 4, 2, 2, 0.0))
    truth = torch.arange(64) % 4
    images = torch.randn(4, 3, 8, 8)[truth] + 0.1 * torch.randn(64, 3, 8, 8)
    other = (truth + torch.randint(1, 4, (64,))) % 4
    candidates = torch.zeros(64, 4, dtype=torch.bool)
    candidates[range(64), truth], candidates[range(64), other] = True, True
    confidence = initial_confidence(candidates)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(120):
        logits = model(images)
        uniform = train.uniform_loss(model.head.queries, 0.25)
        if step >= 30:              # later it has learned both labels of more and more sets
            confidence = train.revise(confidence, logits, 0.1)
        loss = train.pll_loss(logits, confidence) + uniform
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (confidence.argmax(1) == truth).float().mean() > 0.95
    assert is_one_hot(confidence).float().mean() > 0.9


def test_warm_ups_keep_their_share_of_the_epochs():
    c = train.parse(["--epochs", "30", "--init", "none"])
    assert (c["warmup_epochs"], c["warmup_revision"]) == (4, 10)
    c = train.parse(["--scale", "paper", "--epochs", "10", "--warmup-revision", "9"])
    assert (c["warmup_epochs"], c["warmup_revision"]) == (2, 9)
    with pytest.raises(InputError, match="--warmup-epochs 3: more than the 2 epochs"):
        train.parse(["--epochs", "2", "--warmup-epochs", "3"])


def test_the_papers_settings_are_the_defaults_of_real_data():
    c = train.parse(["--data", "raf"])
    assert (c["batch_size"], c["lr"], c["weight_decay"], c["min_votes"]) == (320, 1e-4, 5e-2, 1)
    size = [c[k] for k in ("image_size", "patch_size", "dim", "depth", "heads")]
    assert size == [224, 16, 768, 12, 12]
    assert c["layer_decay"] == 0.65 and c["drop_path"] == 0.1 and c["init"] == "runs/pretrain-raf"
    assert (c["head"], c["loss"], c["revise"], c["uniform_weight"]) == ("decoder", "pll", True, 1.0)
    s = pretrain.SETTINGS
    assert [s[k][0] for k in ("epochs", "batch_size", "lr", "mask_ratio")] == [600, 192, 2e-4, 0.4]
    costed = [tuple(settings[k][0] for k in ("epochs", "batch_size"))
              for settings in (pretrain.SETTINGS, train.SETTINGS)]
    assert [row[:2] for row in decoder.PAPER.values()] == costed     # what the cost table assumes
    assert [row[2] for row in decoder.PAPER.values()] == [4, 2]      # V100s, Sec. 4.2


def test_both_stages_at_the_papers_size():
    """One step each at ViT-B/16 and 224: shapes, 79 of 196 patches masked, a finite gradient."""
    defaults = lambda settings: {name: row[0] for name, row in settings.items()}
    c = {**defaults(pretrain.SETTINGS), "target": "hog", "encoder": "visible"}
    model, images = pretrain.build_masked_model(c), torch.rand(1, 3, 224, 224)
    mask = pretrain.draw_masks("block", range(1), 14, pretrain.masked_count(196, 0.4), seed=0)
    target, prediction = pretrain.make_targets(images, "hog", 16), model(images, mask)
    assert mask.sum() == 79 and prediction.shape == target.shape == (1, 196, 108)
    pretrain.masked_mse(prediction, target, mask).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    recogniser = train.build_model({**defaults(train.SETTINGS), "data": "ferplus"})
    recogniser.encoder = model.encoder
    logits = recogniser(images)
    assert logits.shape == (1, 8)
    train.pll_loss(logits, torch.full((1, 8), 1 / 8)).backward()
    assert recogniser.head.queries.grad.isfinite().all()


@pytest.mark.parametrize("lost, said", [
    ("classes", "has no classes; a checkpoint of train.py holds stage, log, config, model, "),
    ("step", "has no step; a checkpoint of train.py holds stage, "),
    ("faces", "has no faces; a checkpoint of train.py holds stage, "),
    ("confidence", "has no confidence; a checkpoint of train.py holds stage, ")])
def test_a_trained_checkpoint_without_its_tables_is_not_judged(lost, said, trained, tmp_path,
                                                               capsys):
    state = read_state(trained)
    torch.save({k: v for k, v in state.items() if k != lost}, tmp_path / "last.pt")
    assert f"{tmp_path / 'last.pt'}: {said}" in error_of(evaluate, [tmp_path], capsys)
