"""Every row of the paper's tables is one command; what is measured of it; how rows are compared."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

import evaluate
import pretrain
import train
from conftest import (CPU, TINY, error_of, faces_with, flags_for, random_crowd, read_log,
                      read_state)
from datasets import DATA, Faces, InputError, load_faces
from evaluate import BECAME, became, comparison, not_in, vote_metrics
from pll import (cc_loss, contrastive_loss, initial_confidence, lw_loss, lw_weights,
                 move_prototypes, moving_confidence, pll_loss, prototype_labels, rc_update, revise)
from pretrain import Run
from test_pll import random_problem


@pytest.mark.parametrize("method", train.METHODS)
def test_every_row_of_the_tables_is_one_command(method, method_run):
    log, state = read_log(method_run(method)), read_state(method_run(method))
    assert log[1]["pll"] < log[0]["pll"] or method.startswith(("lw", "pico"))
    confidence, candidates = state["confidence"], state["candidates"]
    if not method.startswith("lw"):
        torch.testing.assert_close(confidence.sum(1), torch.ones(len(candidates)))
    if state["config"]["loss"] not in ("ce", "soft", "lw"):
        assert (confidence[~candidates] == 0).all()
    faces, _ = train.training_faces(Run(state["config"], 0, 1, CPU))
    moved = not confidence.equal(train.make_confidence(state["config"], faces, candidates))
    assert moved == ("revised" in log[1]), "train.MOVING names the losses that change C"
    wanted = {"decoder": (True, False, False), "decoder-uniform": (True, True, False),
              "decoder-revision": (True, False, True), "ours": (True, True, True),
              "resnet18-pll": (False, False, False), "mim-hog-pll": (False, False, False)}
    config = state["config"]
    if method in wanted:
        assert wanted[method] == (config["head"] == "decoder", config["uniform_weight"] > 0,
                                  config["revise"])


def test_each_row_of_the_tables_has_a_folder_of_its_own():
    folders = {train.parse(["--method", method])["out"] for method in train.METHODS}
    assert len(folders) == len(train.METHODS) and "runs/train-toy" in folders


@pytest.mark.parametrize("flags, message", [
    (["--method", "rc-vit", "--revise"], "--revise: Eq. (4-5) revise the confidence of --loss pll"),
    (["--head", "linear", "--uniform-weight", "1"], "a linear head has no label queries to spread"),
    (["--loss", "lw", "--candidates", "uniform:0"], "every candidate set has a single label"),
    (["--method", "pico-vit", "--crop-scale", "1", "--degrees", "0", "--light", "0",
      "--erase", "0"],
     "compares two views of a face, which need augmentation"),
    (["--method", "pico-vit", "--queue", "100"],
     "--queue 100: PiCO's queue must hold at least a batch, 250 keys"),
    (["--method", "rc-vit", "--threshold", "0.2"],
     "--threshold: has no effect unless revise is True; leave it out"),
    (["--method", "baseline", "--tau", "0.1"], "--tau: has no effect unless head is decoder"),
    (["--model", "resnet18"], "--patch-size: has no effect unless model is vit; leave it out"),
    (["--tau", "0.1", "--uniform-weight", "0"], "--tau: has no effect unless uniform_weight is ab"),
    (["--tau", "0.1", "--uniform", "targets"], "--tau: has no effect unless uniform is queries"),
    (["--warmup-revision", "1", "--no-revise"], "--warmup-revision: has no effect unless revise "),
    (["--method", "soft", "--candidates", "lw1"], "--candidates: has no effect unless the loss"),
    (["--method", "mim-hog", "--min-votes", "2"], "--min-votes: has no effect unless the loss is "),
    (["--method", "cc-vit", "--prior", "votes"], "--prior: has no effect unless loss is pll, rc"),
    (["--candidates", "lw1", "--prior", "votes"], "--prior votes: nobody voted for the labels that "
     "--candidates lw1 draws; leave one of the two out"),
    (["--candidates", "lw1", "--min-votes", "2"], "--min-votes: these sets are generated, not "),
    (["--lw-beta", "2"], "--lw-beta: has no effect unless loss is lw; leave it out"),
    (["--queue", "2048"], "--queue: has no effect unless loss is pico; leave it out"),
    (["--labels", "majority"], "--labels: has no effect unless data is ferplus; leave it out"),
    (["--align", "given"], "--align: has no effect unless data is raf; leave it out"),
    (["--warmup-revision", "2"],
     "--warmup-revision 2: the run has no more epochs, so it would never act; give less, or --no-"),
    (["--method", "pico-vit", "--warmup-revision", "2"],
     "--warmup-revision 2: the run has no more epochs, so it would never act; give less\n"),
    (["--val", "0.0001"], "--val 0.0001: holds out no face; give a larger share"),
    (["--method", "pico-vit", "--accumulate", "2"],
     "--accumulate: PiCO's queue and momentum model move once a batch"),
    (["--accumulate", "0"], "--accumulate 0: give a number from 1"),
    (["--accumulate", "3"], "cannot be divided among 1 processes of 3 parts; the nearest that can "
     "is 249"),
    (["--candidates", "uniform:2"], "--candidates uniform:2: choose votes, lw1"),
    (["--candidates", "lw3"], "--candidates lw3: choose votes, lw1"),
    (["--method", "mim-pixel"], "make it with: python "
     "pretrain.py --data toy --scale laptop --image-size 16 --patch-size 4 --dim 16 --depth 2 "
     "--heads 2 --target pixel")
])
def test_settings_that_do_not_go_together(flags, message, tmp_path, cache, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "mim-pixel" not in flags:
        flags = [*flags, "--init", "none"]
    assert message in error_of(train, [*TINY, "--cache", cache, *flags], capsys)


def test_a_linear_head_alone_turns_eq3_off():
    assert train.parse(["--head", "linear", "--init", "none"])["uniform_weight"] == 0


def test_a_resnet_has_no_patches_to_fill_an_image():
    assert train.parse(["--method", "resnet18-pll", "--image-size", "50"])["image_size"] == 50
    with pytest.raises(InputError, match="--layer-decay: has no effect unless model is vit"):
        train.parse(["--method", "resnet18-pll", "--layer-decay", "0.5"])


@pytest.mark.parametrize("prefix, wrap", [("", "state_dict"), ("module.", "state_dict"),
                                          ("module.backbone.", None), ("net.", "model_state_dict")])
def test_resnet_checkpoints_of_any_prefix_are_read(prefix, wrap, tmp_path):
    source = torchvision.models.resnet18(weights=None).state_dict()
    weights = {prefix + k: v for k, v in source.items() if "num_batches" not in k}
    weights[prefix + "feature.weight"] = torch.zeros(2, 512)         # as a face model may have
    torch.save({"epoch": torch.tensor(3), "best": {"accuracy": 0.9}, wrap: weights} if wrap else
               weights, tmp_path / "ms.pth")
    encoder = train.ResNet18()
    note = train.initial_weights(dict(init=str(tmp_path / "ms.pth"), model="resnet18"), encoder)
    assert note.startswith("encoder: all 100 tensors from")
    assert note.endswith("ms.pth, without its fc, feature; 20 counters of batches start at 0")
    assert encoder.net.layer4[1].conv2.weight.equal(source["layer4.1.conv2.weight"])
    torch.save({"w": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="not a ResNet-18"):
        train.resnet_weights(tmp_path / "other.pth")
    torch.save({f"{name}.{k}": v for name in ("query", "key") for k, v in source.items()},
               tmp_path / "two.pth")
    with pytest.raises(InputError, match="2 networks .with the prefixes query., key..; keep one"):
        train.resnet_weights(tmp_path / "two.pth")


def test_resnet_tokens_are_torchvisions_features():
    net = torchvision.models.resnet18(weights=None).eval()
    encoder = train.ResNet18().eval()
    weights = {k: v for k, v in net.state_dict().items() if not k.startswith("fc.")}
    encoder.net.load_state_dict(weights)
    images = torch.randn(2, 3, 64, 64)
    tokens = encoder(images)
    assert tokens.shape == (2, 5, 512)
    torch.testing.assert_close(net.fc(tokens[:, 0]), net(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind, other", [("queries", "targets"), ("targets", "queries")])
def test_queries_are_spread_or_pulled_to_the_simplex(kind, other):
    torch.manual_seed(0)
    head = train.LabelDecoder(24, 7, 3)
    c, optimizer = dict(uniform=kind, uniform_weight=1.0, tau=0.25), torch.optim.Adam(
        [head.queries], 0.05)
    first = train.spread({**c, "uniform": other}, head)
    for _ in range(300):
        optimizer.zero_grad()
        train.spread(c, head).backward()
        optimizer.step()
    t = torch.nn.functional.normalize(head.queries, dim=1)
    cosines = (t @ t.T)[~torch.eye(7, dtype=torch.bool)]
    torch.testing.assert_close(cosines, torch.full((42,), -1 / 6), rtol=0, atol=0.01)
    fixed = torch.allclose(t, train.simplex(7, 24), atol=0.05)       # one simplex of many
    assert fixed == (kind == "targets") and train.spread({**c, "uniform": other}, head) != first
    assert train.spread({**c, "uniform_weight": 0.0}, head) == 0


def test_the_start_of_confidence():
    votes = torch.tensor([[6.0, 3, 1, 0, 0, 0, 0]])
    faces, candidates = faces_with([0], votes), votes >= 2
    start = lambda loss, prior="uniform", sets=candidates: train.make_confidence(
        dict(loss=loss, prior=prior, data="toy"), faces, sets)[0].tolist()
    assert start("pll") == [0.5, 0.5, 0, 0, 0, 0, 0]
    assert start("pll", "votes") == pytest.approx([6 / 9, 3 / 9, 0, 0, 0, 0, 0])
    assert start("ce") == [1, 0, 0, 0, 0, 0, 0]
    assert start("soft") == pytest.approx([0.6, 0.3, 0.1, 0, 0, 0, 0])
    assert start("soft") == start("pll", "votes", votes >= 1)        # Eq. 2, if one vote is enough
    assert start("lw") == pytest.approx([0.5, 0.5, 0.2, 0.2, 0.2, 0.2, 0.2])
    for flag, loss, prior in (("loss soft", "soft", "uniform"), ("prior votes", "pll", "votes")):
        with pytest.raises(InputError, match=f"--{flag}: raf has no votes"):
            train.make_candidates(dict(loss=loss, prior=prior, candidates=None, data="raf"),
                                  faces_with([0]))


def test_generated_sets_replace_votes_when_asked():
    votes = torch.tensor([[6.0, 3, 1, 0, 0, 0, 0]] * 500)
    config = dict(data="toy", min_votes=1, seed=0, loss="pll", prior="uniform")
    faces = faces_with([0] * 500, votes)
    sets = lambda kind: train.make_candidates({**config, "candidates": kind}, faces)
    assert sets(None).equal(votes >= 1) and sets("votes").equal(votes >= 1)
    assert 0.4 < sets("lw1")[:, 1].float().mean() < 0.6 and not sets("lw1")[:, 2:].any()
    assert sets("lw2")[:, 6].any() and sets("lw4")[:, 3].any()
    assert 0.2 < sets("uniform:0.3")[:, 1:].float().mean() < 0.4
    with pytest.raises(InputError, match="raf has no votes"):
        train.make_candidates({**config, "data": "raf", "candidates": "votes"}, faces_with([0]))
    with pytest.raises(InputError, match="from shares of votes"):
        train.make_candidates({**config, "candidates": None, "min_votes": 2},
                              faces_with([0], votes[:1] / 10))


def test_vote_metrics_equal_their_slow_twin():
    torch.manual_seed(0)
    logits, votes = torch.randn(300, 5) * 2, torch.randint(0, 6, (300, 5)).float()
    votes[:, 0] += 1
    nll, bins = 0.0, {}
    for z, v in zip(logits.tolist(), votes.tolist()):
        zeta = [math.exp(a) / sum(math.exp(b) for b in z) for a in z]
        shares = [a / sum(v) for a in v]
        nll -= sum(s * math.log(p) for s, p in zip(shares, zeta))
        best = max(range(5), key=lambda j: zeta[j])
        bins.setdefault(min(int(zeta[best] * 15), 14), []).append((zeta[best], shares[best]))
    ece = sum(abs(sum(p - s for p, s in rows)) for rows in bins.values()) / 300
    assert vote_metrics(logits, votes) == pytest.approx((nll / 300, ece), rel=1e-4)


def test_predicting_the_vote_shares_is_calibrated():
    votes = torch.tensor([[7.0, 2, 1], [5, 3, 2], [4, 4, 2]])
    nll, ece = vote_metrics((votes / 10).log(), votes)
    assert ece == pytest.approx(0, abs=1e-6)
    assert nll < vote_metrics(torch.zeros(3, 3), votes)[0]
    sure = vote_metrics(torch.tensor([[99.0, 0, 0]]), torch.tensor([[10.0, 0, 0]]))
    assert sure == (0, 0)                                  # a probability of 1 is in the last bin


def test_duplicates_are_found_by_their_pixels():
    images = np.random.default_rng(0).integers(0, 255, (6, 1, 4, 4)).astype(np.uint8)
    make = lambda rows: Faces("test", images[rows], torch.zeros(len(rows), dtype=torch.long),
                              [str(r) for r in rows])
    assert not_in(make([0, 1, 2, 3]), make([3, 4, 1, 5])).tolist() == [True, False, True, False]


def test_what_became_of_the_candidate_sets_counted_face_by_face():
    """`became` again as a plain loop over faces, on random votes, sets and answers."""
    faces, draw, generator = random_crowd()
    votes, labels, truth, predicted = faces.votes, faces.labels, faces.truth, draw(300)
    candidates = votes > 0
    start = candidates / candidates.sum(dim=1, keepdim=True)
    one_hot = F.one_hot((start * torch.rand(300, 5, generator=generator)).argmax(dim=1), 5)
    confidence = torch.where(draw(300, 1) > 1, one_hot, start)
    weight = [sum(row[k] for row in start.tolist()) for k in range(5)]     # of each label
    locked, reduced, voted, true, network, network_true, trivial = [[] for _ in range(7)]
    errors = [0] * 5
    for i in range(300):
        if candidates[i].sum() == 1:
            continue
        few, sure = votes[i].max() / votes[i].sum() < 0.5, confidence[i].max() == 1
        label = int(confidence[i].argmax())
        if sure:
            usual = max(candidates[i].nonzero().flatten().tolist(), key=lambda k: weight[k])
            trivial.append(usual == labels[i])
        if sure and label != labels[i]:
            locked.append(predicted[i] == labels[i])
            errors[label] += 1
        if few:
            reduced.append(sure)
        if few and sure:
            voted.append(label == labels[i])
            true.append(label == truth[i])
            network.append(predicted[i] == labels[i])
            network_true.append(predicted[i] == truth[i])
    expected = {"trivial_as_voted": trivial, "locked_in": locked, "disputed_revised": reduced,
                "disputed_as_voted": voted, "disputed_as_true": true,
                "disputed_network_as_voted": network, "disputed_network_as_true": network_true}
    found = became(faces, candidates, confidence, predicted)
    assert found.pop("disputed_faces") == len(reduced) > 50
    usual = {key: found.pop(key) for key in ("usual_error", "usual_error_share")}
    assert errors[usual["usual_error"]] == max(errors) > min(errors)
    assert usual["usual_error_share"] == max(errors) / len(locked)
    assert found == {k: pytest.approx(sum(map(int, v)) / len(v)) for k, v in expected.items()}
    assert len(locked) > 20 and len(voted) > 20
    faces.votes = None                                     # RAF-DB: generated sets
    kept = {key: found[key] for key in ("trivial_as_voted", "locked_in")}
    assert became(faces, candidates, confidence, predicted) == {**kept, **usual}


def test_the_trivial_revision_takes_the_label_that_the_first_c_has_most_of():
    """Label 1 stands in more sets than label 0, but with a third of each: 1.5 against 2.5."""
    candidates = torch.tensor([[1, 0, 0, 0]] * 2 + [[0, 1, 1, 1]] * 3 + [[1, 1, 0, 0]]).bool()
    confidence = initial_confidence(candidates)
    confidence[5] = torch.tensor([0.0, 1, 0, 0])
    for label, share in ((0, 1), (1, 0)):
        faces = faces_with([0, 0, 1, 2, 3, label])
        found = became(faces, candidates, confidence, faces.labels)
        assert found["trivial_as_voted"] == share


def test_a_rival_that_reduces_no_set_is_not_said_to_revise(method_run):
    folder = method_run("rc-vit")
    last = read_log(folder)[-1]
    numbers, config, _, _ = evaluate.evaluate(folder, "val", {})
    lines = evaluate.as_text(numbers, DATA["toy"]["classes"], config["revise"]).splitlines()
    told = [line for line in lines if line.startswith(("revised", "several", "trivial", "locked"))]
    assert told == [f"several candidates   {last['revised']:7.2%}   of the training faces, "
                    f"{last['revised_as_voted']:.2%} with the voted label first in C, "
                    f"{last['revised_as_true']:.2%} with the drawn one"]


def result(accuracy, seed, *flags):
    config = train.parse(["--data", "raf", "--seed", str(seed), "--out", f"runs/{seed}", *flags])
    return {"accuracy": accuracy, "mean_class_accuracy": 0.5, "split": "test"}, config


def test_runs_that_differ_in_the_seed_are_one_row_with_mean_and_spread():
    lines = comparison([result(0.7, 0, "--method", "baseline"), result(0.80, 0),
                        result(0.84, 1)], True)           # the order of the paper's tables
    assert lines[2:] == ["| ours | raf test | 2 | 82.0 ± 2.8 | 50.0 ± 0.0 | 92.05 |",
                         "| baseline | raf test | 1 | 70.0 | 50.0 | 88.36 |"]
    assert lines[0].endswith("accuracy in the paper |")
    with pytest.raises(InputError, match="a second run of seed 0"):
        comparison([result(0.80, 0), result(0.80, 0)], True)


def test_what_became_of_the_sets_is_a_table_of_the_runs_that_have_it():
    with_sets, without = result(0.8, 0), result(0.7, 0, "--method", "baseline")
    with_sets[0].update(revised=0.5, locked_in=0.25)
    lines = comparison([with_sets, without], True, BECAME)
    assert lines[0] == "| method | data | seeds | revised | locked in |"
    assert lines[2:] == ["| ours | raf test | 1 | 50.0 | 25.0 |"]
    assert comparison([without], True, BECAME) == []


def test_runs_that_differ_in_more_than_the_seed_are_rows_that_say_so():
    laptop, val = result(0.7, 0, "--scale", "laptop"), result(0.7, 0)
    val[0]["split"] = "val"                    # neither stands beside the paper's figure
    for run, name in ((laptop, "| ours, scale laptop"), (val, "| ours")):
        line = comparison([run, result(0.8, 0, "--method", "decoder")], True)[2]
        assert line.split(" | ")[0] == name and line.endswith("| - |")
    longer = [result(0.7, seed, "--init", f"runs/pretrain-raf-{epochs}-epochs")
              for seed, epochs in ((0, 100), (1, 600), (1, 100))]
    assert [line.split(" | ")[2] for line in comparison(longer, True)[2:]] == ["2", "1"]
    own = [result(0.7, seed, "--init", f"runs/{name}") for seed, name in (
        (0, "hog-seed0"), (1, "hog-seed1"), (0, "mask-0.6"), (1, "mask-0.6"), (6, "mask-0.6"))]
    assert [line.split(" | ")[:3:2] for line in comparison(own, True)[2:]] == [
        ["| ours, init runs/hog", "2"], ["| ours, init runs/mask-0.6", "3"]]
    lines = comparison([result(0.8, 0, "--init", "runs/pretrain-raf"),
                        result(0.9, 1, "--init", "runs/pretrain-raf-seed1"),
                        result(0.5, 0, "--init", "none"), result(0.6, 0, "--lr", "1.0"),
                        result(0.6, 0, "--epochs", "10", "--no-revise")], True)
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| ours", "| ours, init none", "| ours, lr 1.0",
        "| ours, epochs 10, revise False"]               # warm-ups keep their share
    assert lines[2].split(" | ")[2:] == ["2", "85.0 ± 7.1", "50.0 ± 0.0", "92.05 |"]
    assert all(line.endswith("| - |") for line in lines[3:])       # not the paper's row
    rounding = [result(0.8, 0), result(0.9, 1), result(0.7, 2, "--accumulate", "2")]
    rounding[1][1]["compile"] = True                     # the flag itself needs a C++ compiler
    assert [line.split(" | ")[2] for line in comparison(rounding, True)[2:]] == ["3"]
    assert comparison([result(0.8, 0, "--partial")], True)[2].startswith("| ours, partial True |")
    mine = [result(0.8, 0, "--data", "own"), result(0.7, 0, "--data", "own", "--lr", "1.0")]
    for (_, config), classes in zip(mine, (["joy", "calm"], ["joy", "grief"])):
        config["classes"] = classes                      # as the data name them, not the command
    assert [line.split(" | ")[0] for line in comparison(mine, True)[2:]] == [
        "| ours", "| ours, lr 1.0"]


def test_a_setting_that_one_side_does_not_know_makes_no_row_of_its_own_by_silence():
    """Runs of older code lack a setting: it is at its default. One that we lack is said."""
    old, new, fork = result(0.7, 0), result(0.8, 1), result(0.9, 2)
    del old[1]["layer_decay"]
    fork[1]["mixup"] = 0.8
    lines = comparison([old, new, fork], True)
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| ours", "| ours, mixup 0.8"]
    assert lines[2].split(" | ")[2] == "2"
    toy = [(dict(accuracy=0.5, split="test"), train.parse(["--seed", str(seed), "--scale", scale]))
           for seed, scale in enumerate(("laptop", "paper"))]
    assert [line.split(" | ")[0] for line in comparison(toy, True)[2:]] == [
        "| ours", "| ours, scale paper"]


@pytest.mark.parametrize("key", ["method", "data"])
def test_a_kept_run_of_a_row_that_is_not_known_here_is_an_error(key, tmp_path):
    for name, text in (("config.json", json.dumps({"method": "ours", "data": "toy", key: "other"})),
                       ("log.jsonl", "{}\n"), ("test.json", "{}")):
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match="'other'.*: this code has no such row or data set"):
        evaluate.evaluate(tmp_path, "test", {})


def test_a_hold_out_that_leaves_no_face_is_refused(monkeypatch):
    monkeypatch.setattr(train, "load_split", lambda run, split: faces_with([0, 1, 2]))
    run = SimpleNamespace(config=dict(val=0.9, seed=0, data="toy"))      # 0.9 of one face is one
    with pytest.raises(InputError, match="--val 0.9: leaves no face to train on; give less"):
        train.training_faces(run)


def test_a_row_of_the_tables_holds_settings_that_exist():
    for name, row in train.METHODS.items():
        assert row.keys() <= {*train.SETTINGS, "init", "revise"}, name
        for key, value in row.items():
            if isinstance(train.SETTINGS.get(key, (0,))[0], str):
                assert value in train.SETTINGS[key][2], (name, key)


def test_what_all_rows_depart_in_stands_once_above_them():
    flags = "--scale", "laptop", "--epochs", "4", "--warmup-epochs", "3"
    runs = [result(0.8, 0, *flags), result(0.6, 1, *flags),
            result(0.7, 0, *flags, "--method", "decoder", "--val", "0.1")]
    lines = comparison(runs, True, title="runs")
    assert lines[:2] == ["runs; every row: scale laptop, epochs 4, warmup_epochs 3", ""]
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| ours", "| decoder, val 0.1"]
    assert all("92.05" not in line for line in lines)              # still not the paper's row
    assert comparison(runs[:2], True)[2].startswith("| ours, scale laptop, epochs 4")   # one row
    assert comparison([result(0.8, 0), runs[2]], False, title="runs")[:2] == ["runs", ""]


def test_what_most_rows_depart_in_stands_above_them_if_the_others_name_their_own():
    init = lambda method, *path: result(0.8, 0, "--method", method, *path)
    most = [init("ours", "--init", "runs/a"), init("decoder", "--init", "runs/a")]
    lines = comparison([*most, init("mim-pixel", "--init", "runs/b")], True)
    assert lines[:2] == ["where no other is named: init runs/a", ""]
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| ours", "| mim-pixel, init runs/b",
                                                            "| decoder"]
    for runs in ([*most, init("mim-pixel")], [most[0], init("mim-pixel", "--init", "runs/b")]):
        lines = comparison(runs, True)               # one names none; one of two is not most
        assert lines[0].startswith("| method") and lines[2].startswith("| ours, init runs/a |")


def test_the_papers_figures_are_the_papers():
    for method in evaluate.PAPER:
        assert method in train.METHODS
    ours, baseline = evaluate.PAPER["ours"], evaluate.PAPER["baseline"]
    gains = [round(ours[data] - baseline[data], 2) for data in ours]
    assert gains == [3.69, 2.93, 2.5, 2.78]                            # as Sec. 4.3 states them
    text = lambda method: [f"{v:.2f}" for v in evaluate.PAPER[method].values()]
    assert [text(m) for m in ("ours", "rc", "lw", "pico", "baseline", "resnet18-pll")] == [
        ["92.05", "91.11", "67.11", "64.12"], ["88.92", "88.53", "64.87", "61.63"],
        ["88.70", "88.10", "64.53", "61.46"], ["88.53", "87.93", "64.35", "61.38"],
        ["88.36", "88.18", "64.61", "61.34"], ["89.67", "89.80", "62.89"]]
    assert [" ".join(text(m)) for m in ("mim-pixel", "mim-hog", "mim-pixel-pll", "mim-hog-pll",
                                        "decoder", "decoder-uniform", "decoder-revision")] == [
        "89.64 65.25", "89.85 65.31", "90.09 65.97", "90.35 66.12", "91.29 66.67", "91.64 66.90",
        "91.89 66.93"]                                                 # RAF-DB, AffectNet-7


def test_several_runs_are_compared_and_json_is_one_object_a_run(trained, cache, tmp_path, capsys):
    train.main(flags_for("rc-vit", tmp_path, cache))    # C moves, nothing is revised
    capsys.readouterr()
    evaluate.main([str(trained), str(tmp_path), "--markdown"])
    text = capsys.readouterr().out
    shared, table, title, sets = (part.splitlines() for part in text.split("\n\n"))
    assert shared[0].startswith("every row: ") and "epochs" in shared[0]
    assert table[0].startswith("| method | data | seeds | accuracy |") and len(table) == 4
    assert title == ["training faces, what became of their candidate sets"]
    assert sets[0].startswith("| method | data | seeds | revised | as voted |") and len(sets) == 3
    evaluate.main([str(trained), str(tmp_path), "--json"])
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [o["run"] for o in objects] == [str(trained), str(tmp_path)]
    assert f"{objects[1]['accuracy'] * 100:.1f}" in table[3]


def test_what_was_held_out_has_a_column_of_its_own(tmp_path, cache, capsys):
    train.main(flags_for("decoder", tmp_path, cache, "--val", "0.2"))
    state = read_state(tmp_path)
    state["log"][0]["val_accuracy"] = 1.0                # the last epoch counts, not the best
    torch.save(state, tmp_path / "last.pt")
    capsys.readouterr()
    evaluate.main([str(tmp_path), "--markdown"])
    head, _, row = (line.split(" | ") for line in capsys.readouterr().out.splitlines())
    held = read_log(tmp_path)[-1]["val_accuracy"]
    assert head[3:5] == ["held out", "accuracy"] and row[3] == f"{held * 100:.1f}"


@pytest.mark.parametrize("revising", [True, False])
def test_algorithm_1_revises_before_it_computes_the_loss(revising):
    torch.manual_seed(0)
    logits, candidates = torch.randn(50, 7) * 5, torch.rand(50, 7) < 0.5
    candidates[:, 0] = True
    start = initial_confidence(candidates)
    c = dict(loss="pll", threshold=0.05)
    loss, after = train.objective(c, logits, start, candidates, revising)
    revised = revise(start, logits, 0.05)
    assert not revised.equal(start)
    assert after.equal(revised if revising else start)
    assert loss == pll_loss(logits, after)
    assert loss != pll_loss(logits, start if revising else revised)


def test_what_the_rivals_minimise_and_what_they_keep_for_the_next_visit():
    candidates, C, logits = random_problem()
    loss, after = train.objective(dict(loss="rc"), logits, C, candidates, False)
    assert loss == pll_loss(logits, C) and after.equal(rc_update(logits, candidates))
    loss, after = train.objective(dict(loss="cc"), logits, C, candidates, False)
    assert loss == cc_loss(logits, candidates) and after is C
    weights = train.make_confidence(dict(loss="lw", prior="uniform", data="toy"),
                                    faces_with([0] * len(C)), candidates)
    for kind in ("sigmoid", "ce"):
        c = dict(loss="lw", lw_beta=2.0, lw_loss=kind)
        loss, after = train.objective(c, logits, weights, candidates, False)
        assert loss == lw_loss(logits, candidates, weights, 2.0, kind)
    assert after.equal(lw_weights(logits, candidates))


def pico_before_its_first_step(cache, flags):
    """What `train.pico` is given, on the toy's val: run, model, faces, table, state."""
    torch.manual_seed(0)
    flags = f"--method pico-vit --init none --batch-size 500 {flags}"
    c = train.parse([*TINY, *flags.split(), "--cache", str(cache)])
    run, faces = Run(c, 0, 1, CPU), load_faces("toy", None, "val", 16, cache=cache)
    model, table = train.build_model(c), train.confidence_table(run, faces, None)
    return run, model, faces, table, train.pico_state(run, model, None)


def test_picos_step_is_its_parts_in_their_order(cache, monkeypatch):
    given = pico_before_its_first_step(cache, "--epochs 3 --warmup-revision 1 --head decoder "
                                              "--uniform-weight 0.25")
    _, model, faces, table, state = given
    assert state["queue_labels"].eq(-1).all()              # what the queue starts with is no face's
    sets, start, views = table["candidates"], table["confidence"].clone(), []
    old = state["prototypes"] = F.normalize(torch.randn(7, 128), dim=1)
    for key in state["key_model"].parameters():
        key.data.zero_()

    def watch(*how):
        views.append(augment(*how))
        return views[-1]

    augment, indices = train.augment, torch.arange(500)
    monkeypatch.setattr(train, "augment", watch)
    loss, numbers = train.pico(*given)(model, faces[indices], indices, 1)
    parts = numbers["pll"] + 0.5 * numbers["contrastive"] + 0.25 * numbers["uniform"]
    assert loss.item() == pytest.approx(parts.item()) and numbers["uniform"] > 1
    assert not views[0].equal(views[1])
    for key, query in zip(state["key_model"].parameters(), model.parameters()):
        torch.testing.assert_close(key, 0.001 * query.detach())
    logits, q = model(views[0])
    near = prototype_labels(q, old, sets)                  # by the prototypes before this step
    torch.testing.assert_close(table["confidence"],        # epoch 1 of 0, 1, 2: half way to 0.8
                               moving_confidence(start, near, 0.875))
    guess = logits.masked_fill(~sets, -torch.inf).argmax(dim=1)
    assert state["queue_labels"][:500].equal(guess) and state["at"] == 500
    torch.testing.assert_close(state["queue"][:500], state["key_model"](views[1])[1])
    torch.testing.assert_close(state["prototypes"], move_prototypes(old, q.detach(), guess, 0.99))


def test_picos_queue_holds_the_newest_keys(cache):
    """Of 1024 places three batches of 500 fill the first 1000, then the last 24 and 476 more."""
    given = pico_before_its_first_step(cache, "--epochs 3")
    _, model, faces, _, state = given
    step, indices = train.pico(*given), torch.arange(500)
    for n in range(3):
        old, labels = state["queue"].clone(), state["queue_labels"].clone()
        step(model, faces[indices], indices, n)
        kept = torch.ones(1024, dtype=torch.bool)
        kept[torch.arange(500 * n, 500 * n + 500) % 1024] = False
        assert state["queue"][kept].equal(old[kept]) and state["queue_labels"][kept].equal(
            labels[kept])
        assert not state["queue"][~kept].isclose(old[~kept]).all(dim=1).any()


@pytest.mark.parametrize("epoch", [0, 1])
def test_picos_losses_and_when_its_prototypes_begin_to_act(epoch, cache):
    """Before the warm-up's end a face's only positive is its other view, and C stays."""
    given = pico_before_its_first_step(cache, "--epochs 3 --warmup-revision 1")
    _, model, faces, table, state = given
    start, made = table["confidence"].clone(), []
    state["queue_labels"] = torch.arange(1024) % 7
    queue, queue_labels = state["queue"].clone(), state["queue_labels"].clone()
    rows = torch.arange(500)
    _, numbers = train.pico(*given)(
        lambda images: (made.append(model(images)), made[-1])[1], faces[rows], rows, epoch)
    logits, q = made[0]
    torch.testing.assert_close(q.norm(dim=1), torch.ones(500))
    guess = logits.masked_fill(~table["candidates"], -torch.inf).argmax(dim=1)
    positive = torch.eye(500, 1524, dtype=torch.bool)
    if epoch == 1:
        positive |= guess[:, None] == torch.cat([guess, queue_labels])
    contrast = contrastive_loss(q, torch.cat([state["queue"][:500], queue]), positive)
    assert numbers["contrastive"].item() == pytest.approx(contrast.item(), rel=1e-5)
    assert table["confidence"].equal(start) == (epoch == 0)
    loss = pll_loss(logits, table["confidence"])
    assert numbers["pll"].item() == pytest.approx(loss.item(), rel=1e-5)


def test_a_step_whose_features_are_not_finite_leaves_picos_memory_alone(cache, monkeypatch):
    """As one in fp16 may be, which the scaler leaves out."""
    given = pico_before_its_first_step(cache, "--warmup-revision 0")
    _, model, faces, table, state = given
    monkeypatch.setattr(train, "share_rows", lambda run, rows: (
        rows * float("inf") if rows.is_floating_point() else rows))
    names = ("prototypes", "queue", "queue_labels")
    before = [table["confidence"].clone(), *(state[name].clone() for name in names)]
    train.pico(*given)(model, faces[torch.arange(500)], torch.arange(500), 0)
    for old, new in zip(before, [table["confidence"], *(state[name] for name in names)]):
        assert new.equal(old)


def test_the_linear_head_reads_the_mean_visual_token():
    head, tokens = train.LinearHead(24, 7), torch.randn(3, 9, 24)
    torch.testing.assert_close(head(tokens), head.linear(tokens.mean(dim=1)))


@pytest.mark.parametrize("capability, dtype", [((7, 0), torch.float16), ((8, 0), torch.bfloat16)])
def test_cards_without_bf16_are_given_fp16(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert pretrain.precision(torch.device("cuda")) == dtype
    assert pretrain.precision(torch.device("cpu")) is None


@pytest.mark.parametrize("scaling", [False, True])                # as without and with fp16
def test_a_clipped_gradient_has_at_most_the_norm_asked_for(scaling):
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=scaling)
    before = [p.detach().clone() for p in model.parameters()]
    pretrain.update(model, optimizer, scaler, model(torch.full((1, 4), 100.0)).sum(), 0.02)
    moved = torch.cat([(p - b).flatten() for p, b in zip(model.parameters(), before)]).norm()
    assert moved.item() == pytest.approx(0.02, rel=1e-3)


def test_resuming_a_run_of_another_method_is_refused(tmp_path, cache):
    train.main(flags_for("decoder", tmp_path, cache))
    with pytest.raises(InputError, match="other settings.*method was decoder, is pico-vit"):
        train.main(flags_for("pico-vit", tmp_path, cache, "--resume"))
