"""What is reported of a run, counted again face by face."""
import pytest
import torch
import torch.nn.functional as F

import evaluate
import pretrain
import train
from conftest import CPU, faces_with, random_crowd
from datasets import augment, load_faces
from pretrain import Run
from test_pll import random_problem


TOLD = dict(
    accuracy=.11, faces=9, held_out_accuracy=.10, mean_class_accuracy=.22, majority_class_rate=.33,
    inside_candidate_set=.44, vote_nll=.55, vote_calibration_error=.66,
    accuracy_without_duplicates=.77, duplicates=8, accuracy_on_truth=.88, crowd_on_truth=.99,
    per_class={"a": dict(faces=1, recall=.12, precision=.34),
               "b": dict(faces=2, recall=None, precision=.56)}, confusion=[[3, 4], [5, 6]])


def test_each_line_of_the_text_has_its_own_number():
    text = evaluate.as_text(TOLD, "ab", False)
    assert [" ".join(line.split()) for line in text.splitlines() if line] == [
        "accuracy 11.00% of 9 faces", "mean class accuracy 22.00%",
        "majority class rate 33.00% (the trivial answer)",
        "held-out faces 10.00% (kept out of training by --val)", "inside candidate set 44.00%",
        "votes: NLL 0.550 ECE 66.00%",
        "without duplicates 77.00% (8 faces also stand in the training set)",
        "accuracy on truth 88.00% (the crowd's label: 99.00%)",
        "class faces recall precision", "a 1 12.0% 34.0%", "b 2 - 56.0%",
        "voted / predicted a b", "a 3 4", "b 5 6"]
    sets = dict(usual_error=1, usual_error_share=.18, disputed_faces=7, disputed_revised=.19,
                disputed_as_voted=.21, disputed_network_as_voted=.23)
    text = evaluate.as_text({**TOLD, **sets}, "ab", True)
    assert "made b                18.00%   of those not as voted" in text
    assert "disputed in training  19.00%   of 7 are revised, 21.00% of these as voted" in text


def test_what_is_measured_of_a_split():
    faces, draw, generator = random_crowd()
    votes, labels, truth, rows = faces.votes, faces.labels, faces.truth, range(300)
    new, logits = draw(300) > 0, torch.randn(300, 5, generator=generator)
    found, said = evaluate.measure(logits, faces, list("abcde"), new), logits.argmax(1).tolist()
    share = lambda hits: pytest.approx(sum(map(bool, hits)) / len(hits))
    assert found["accuracy"] == share([said[i] == labels[i] for i in rows])
    assert found["majority_class_rate"] == max(labels.tolist().count(k) for k in range(5)) / 300
    assert found["confusion"][1][2] == sum(labels[i] == 1 and said[i] == 2 for i in rows)
    b = found["per_class"]["b"]
    assert b["precision"] == share([labels[i] == 1 for i in rows if said[i] == 1])
    assert b["recall"] == share([said[i] == 1 for i in rows if labels[i] == 1])
    assert found["inside_candidate_set"] == share([votes[i, said[i]] > 0 for i in rows])
    few = [i for i in rows if votes[i].max() < votes[i].sum() / 2]
    assert found["disputed_accuracy"] == share([said[i] == labels[i] for i in few])
    assert found["duplicates"] == (~new).sum()
    seen_once = [said[i] == labels[i] for i in rows if new[i]]
    assert found["accuracy_without_duplicates"] == share(seen_once)
    assert found["accuracy_on_truth"] == share([said[i] == truth[i] for i in rows])
    assert found["crowd_on_truth"] == share([labels[i] == truth[i] for i in rows])
    numbers = lambda found: (found["vote_nll"], found["vote_calibration_error"])
    assert numbers(found) == evaluate.vote_metrics(logits, votes)
    faces.votes = None                                     # then the label has the only one
    found = evaluate.measure(logits, faces, list("abcde"), None)
    assert numbers(found) == evaluate.vote_metrics(logits, F.one_hot(labels, 5).float())
    assert "inside_candidate_set" not in found and "disputed_accuracy" not in found
    assert f"label: NLL           {found['vote_nll']:7.3f}   ECE" in evaluate.as_text(
        found, list("abcde"), False)


@pytest.mark.parametrize("loss", ["pll", "lw"])
def test_what_the_log_says_of_the_candidate_sets(loss):
    faces = faces_with([2, 0, 1, 2])
    faces.truth = torch.tensor([2, 0, 2, 0])
    candidates = torch.tensor([[0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]]).bool()
    confidence = torch.tensor([[0.0, 0, 1],                # single from the start: does not count
                               [1, 0, 0], [0, 0, 1],       # reduced to 0 and to 2
                               [0.5, 0, 0.5]])             # not reduced; LW's argmax is 0
    expected = dict(revised=0.5, revised_as_voted=0.5, revised_as_true=1.0)
    if loss == "lw":                                       # weights outside the set do not count
        confidence = torch.where(candidates, confidence * 0.6, 1.0)
        expected = dict(revised=0.75, revised_as_voted=pytest.approx(1 / 3), revised_as_true=1.0)
    run = Run(dict(revise=loss == "pll", loss=loss), 0, 1, CPU)
    table = dict(candidates=candidates, confidence=confidence)
    assert train.watcher(run, None, faces, None, table)({}) == expected


def test_the_trivial_answer_of_pre_training_is_the_mean_target(cache):
    c = dict(seed=0, image_size=16, patch_size=4, data="toy", crop_scale=0.5, target="hog")
    faces = load_faces("toy", None, "train", 16, cache=cache)          # 2,000, of which 1,024
    u = torch.rand(1024, 12, generator=torch.Generator().manual_seed(0))
    targets = pretrain.make_targets(augment(faces[range(1024)], u, 16, "toy", 0.5), "hog", 4)
    torch.testing.assert_close(pretrain.mean_target(Run(c, 0, 1, CPU), faces),
                               targets.mean(dim=0, keepdim=True))


@pytest.mark.parametrize("loss", ["pll", "lw"])
def test_the_trivial_answer_of_training_is_how_frequent_each_label_is(loss):
    candidates, confidence, _ = random_problem()
    c = dict(loss=loss, prior="uniform", data="toy")
    answer = train.trivial_answer(c, faces_with([0] * len(candidates)), candidates)
    torch.testing.assert_close(answer.softmax(dim=0), confidence.mean(dim=0))


def test_a_loaded_run_answers_without_dropout_and_drop_path(trained):
    model, _, _ = evaluate.load_run(trained, {"device": "cpu"})
    assert not any(module.training for module in model.modules())
