"""Ten exercises on the paper: each asks for a change of ONE function, 1 to 15 lines of it.

Paper: Sec. 3, Algorithm 1 and the tables of Sec. 4. A test here fails on the project as it is and
passes with a right solution; how that is written is free. Without --exercises all are skipped.
Work on a branch, an exercise at a time: a solution that departs from the paper makes those tests
red that state the paper. Each exercise names them ("Red afterwards"); if another one turns red,
look for a mistake. Leave the references to the paper, which test_readme.py reads, and add none
behind a line of code. The ten solutions also work together.

Run:  python -m pytest --exercises tests/test_exercises.py -k exercise_1_
      python -m pytest                                        (what else has changed)
"""
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import evaluate
import pll
import train
from conftest import two_processes
from datasets import Faces
from decoder import LabelDecoder
from hog import hog
from pretrain import Run, random_mask
from test_hog import ramp


def test_exercise_1_a_flat_cheek_is_not_an_edge():
    """Edit `hog.cell_histograms`.

    Now every cell that is not perfectly flat gets a histogram of length 1: the noise on a cheek is
    as strong a target as the edge of a lip. Divide the histogram v of a cell and channel by
    sqrt(|v|^2 + 1) instead of |v|, as Dalal and Triggs do with their epsilon, here 1.

    Question: Sec. 3.2 predicts HOG, as "lighting and contrast variations" influence pixels. Is it
    light (a number added to a face) or contrast (a factor) that changes HOG now, and in which cells
    was it no virtue that it did not? What did the squared error of pre-training ask for in a flat
    cell, and what does it ask for there now?
    Hint: what does F.normalize divide by?
    Red afterwards: hard_binning_is_maskfeats_layer, brightness_contrast_and_negation,
    flat_image_gives_zero and linear_binning_splits in test_hog.py; hog_targets in
    test_equations.py; readmes_pictures_are (hog) in test_pictures.py.
    """
    for binning, share in (("hard", 1.0), ("linear", math.hypot(0.75, 0.25))):
        for slope in (1e-4, 1e-3, 1e-2, 1.0):       # of an even ramp; Sobel's gradient is 8 slope
            v = 64 * 8 * slope * share              # at 15 degrees; a cell has 64 pixels
            length = hog(ramp(15) * slope, binning=binning)[0, 0, :, 1, 1].norm().item()
            assert length == pytest.approx(v / math.sqrt(v ** 2 + 1), rel=1e-4)
        torch.manual_seed(0)
        images = torch.rand(2, 3, 16, 24)
        strong, weak = hog(images, binning=binning), hog(images / 200, binning=binning)
        torch.testing.assert_close(F.normalize(weak, dim=2), F.normalize(strong, dim=2),
                                   rtol=1e-3, atol=1e-4)       # the shape of a histogram is kept
        assert strong.norm(dim=2).min() > 0.99 and weak.norm(dim=2).max() < 0.5
        flat = torch.ones(1, 3, 8, 8, requires_grad=True)
        hog(flat, binning=binning).sum().backward()
        assert flat.grad.isfinite().all()


def test_exercise_2_hide_the_mouth():
    """Edit `pretrain.random_mask`.

    Mask the patches of the mouth in every image, and the rest at random as now: those patches that
    the line between the two mouth corners of an aligned face (`datasets.TEMPLATE`, in a picture of
    112 x 112 pixels) passes through. On the paper's grid of 14 x 14 they are columns 5 to 8 of row
    11. The number of masked patches stays `count`; where it is smaller than the mouth, only
    patches of the mouth are masked.

    Question: Sec. 3.2 says that masking forces the ViT to learn local action units, and that the
    encoder sees visible patches only. What does the encoder know about mouths after this
    pre-training? Would `--encoder maskfeat` know more? How do random crops blunt the rule?
    (`random_mask` serves `--mask random`, the toy's default; the paper's is block.)
    Hint: the patches with the smallest noise are masked. TEMPLATE may be imported at the top.
    Red afterwards: random_masking_is_uniform in test_pretrain.py, random_masking in
    test_equations.py.
    """
    for grid, count, mouth in ((14, 79, [159, 160, 161, 162]), (6, 15, [26, 27]),
                               (7, 20, [37, 38, 39])):
        others = torch.ones(grid * grid, dtype=torch.bool)
        others[mouth] = False
        masks = random_mask(4000, grid, count, seed=0)
        assert masks.dtype == torch.bool and masks.sum(dim=1).eq(count).all()
        assert masks[:, mouth].all()
        share = (count - len(mouth)) / (grid * grid - len(mouth))
        assert (masks[:, others].float().mean(dim=0) - share).abs().max() < 0.05
        few = random_mask(50, grid, 1, seed=0)
        assert few.sum(dim=1).eq(1).all() and not few[:, others].any()
        assert masks[:8].equal(random_mask(8, grid, count, seed=0))   # a row is its own whatever
        assert not masks[:8].equal(random_mask(8, grid, count, seed=1))   # the batch, not the seed


def test_exercise_3_start_from_the_queries():
    """Edit `decoder.LabelDecoder.forward`.

    Sec. 3.3 has the decoder "update" Q "according to visual tokens". DETR, which inspired it and
    which we follow, starts from zero and only adds Q inside attention. Start x from Q; all else
    stays (Q is still added inside attention).

    Question: what speaks for each of the two as the paper's meaning? With zero the first
    self-attention is idle: why, and what can a decoder of one layer not do then? Think of a face
    between fear and surprise: how could their queries use what the other one found?
    Hint: one line.
    Red afterwards: a_logit_is_the_product_with_its_own_weights in test_decoder.py; by chance, as
    they are short and from one seed, algorithm_1 in test_equations.py and
    a_label_is_learned_from_sets in test_train.py.
    """
    for layers in (1, 2):
        torch.manual_seed(0)
        decoder, tokens = LabelDecoder(24, 7, 3, layers).eval(), torch.randn(3, 9, 24)
        torch.nn.init.normal_(decoder.weight)
        x = decoder.queries.expand(3, -1, -1)
        for layer in decoder.layers:
            x = layer(x, decoder.queries, tokens)
        expected = (x * decoder.weight).sum(dim=-1) + decoder.bias
        torch.testing.assert_close(decoder(tokens), expected)
        logits, maps = decoder(tokens, need_attention=True)
        assert logits.equal(decoder(tokens)) and maps.shape == (3, layers, 3, 7, 9)
        gradients = [torch.autograd.grad(logits[:, 0].sum(), decoder.queries)[0]
                     for logits in (decoder(tokens), expected)]
        torch.testing.assert_close(*gradients)
        assert gradients[0][1:].abs().min() > 0     # label 0 hears from every other label


def test_exercise_4_the_greater_part_of_the_crowd():
    """Edit `pll.candidates_from_votes`.

    Give it a third argument, share=None. With a share, the set of a sample is the smallest number
    of most voted labels that together hold at least that share of its votes; labels with as many
    votes as the last of them belong to it too, so that the order of the classes does not matter.
    Without it nothing changes.

    Question: one vote in ten makes a candidate now. For which of the two rules is Eq. (1) more
    nearly true, and which sets are smaller? What does |Y| mean for the threshold of Eq. (5)?
    Hint: sort, cumsum; a label is left out if those with more votes hold the share already.
    Red afterwards: nothing.
    """
    votes = torch.tensor([[6.0, 2, 1, 1, 0], [4, 4, 2, 0, 0], [0, 0, 0, 0, 10], [2, 2, 2, 2, 2]])
    sets = lambda share: pll.candidates_from_votes(votes, share=share).int().tolist()
    assert sets(0.55) == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]]
    assert sets(0.35) == sets(0.55)
    assert sets(0.75)[0] == [1, 1, 0, 0, 0] and sets(0.85)[0] == [1, 1, 1, 1, 0]
    assert pll.candidates_from_votes(torch.tensor([[5.0, 3, 2]]), share=0.5).int().tolist() == [
        [1, 0, 0]]                                  # a half is at least a half
    assert sets(0.99) == pll.candidates_from_votes(votes).int().tolist()
    torch.manual_seed(0)
    votes = F.one_hot(torch.multinomial(torch.rand(300, 7), 10, replacement=True), 7).sum(dim=1)
    for share in (0.15, 0.55, 0.85):
        Y = pll.candidates_from_votes(votes.float(), share=share)
        for row, chosen in zip(votes.tolist(), Y.tolist()):
            least, held = 0, 0                      # the fewest votes that make a candidate
            for v in sorted(row, reverse=True):
                if held < share * 10:
                    least, held = v, held + v
            assert chosen == [v >= least for v in row]
    assert pll.candidates_from_votes(votes, 2).equal(votes >= votes.amax(1, True).clamp(max=2))


def test_exercise_5_one_response_for_loss_and_revision():
    """Edit `pll.pll_loss`.

    Eq. (2) reads the logits through a softmax, Eq. (4) through phi = sigmoid. Let the loss use phi
    too: binary cross-entropy, the mean over the batch of the sum over classes j of
    -C_ij log phi_ij - (1 - C_ij) log(1 - phi_ij), in fp32 and finite for logits of +-300.

    Question: add the same number to all logits of a face. What happens to Eq. (2), to phi and to
    the lead v1 - v2 of Eq. (4)? With this loss, what is the lead where phi has become C = Y / |Y|?
    Does the softmax fare better where it has become C? What, then, makes a revision possible?
    Hint: torch has the stable form.
    Red afterwards: eq2_with_one_candidate_is_cross_entropy, eq2_is_least_where and
    ccs_gradient_is_that_of_eq2 in test_pll.py; eq2 and algorithm_1 in test_equations.py. (The log's
    `trivial` stays the best constant answer of the softmax, so do not compare this loss with it.)
    """
    torch.manual_seed(0)
    logits = (torch.randn(50, 7) * 3).requires_grad_()
    Y = torch.rand(50, 7) < 0.4
    Y[:, 3] = True
    C, total = pll.initial_confidence(Y), 0.0
    for z, c in zip(logits.tolist(), C.tolist()):
        for j in range(7):
            phi = 1 / (1 + math.exp(-z[j]))
            total += -c[j] * math.log(phi) - (1 - c[j]) * math.log(1 - phi)
    loss = pll.pll_loss(logits, C)
    assert loss.item() == pytest.approx(total / 50, rel=1e-5)
    loss.backward()
    torch.testing.assert_close(logits.grad, (logits.detach().sigmoid() - C) / 50)
    extreme = torch.tensor([[300.0, -300, 300]])
    assert pll.pll_loss(extreme, torch.tensor([[0.5, 0.5, 0]])).item() == pytest.approx(600)
    half = logits.detach().bfloat16()               # as under autocast
    assert pll.pll_loss(half, C).equal(pll.pll_loss(half.float(), C))


def test_exercise_6_no_label_is_its_own_neighbour():
    """Edit `pll.uniform_loss`.

    The sum over j in Eq. (3) has the term j = i, which is always e^(1/tau). At targeted contrast's
    tau = 0.07 it outweighs all others: queries at random feel almost no force. Leave it out.

    Question: Sec. 3.3.1 motivates the loss by unbalanced classes. Where do class frequencies enter
    Eq. (3), and what would you weight to give rare classes more room? Is the regular simplex still
    the optimum after your change, and after that one?
    Hint: logsumexp ignores minus infinity.
    Red afterwards: eq3 and algorithm_1 in test_equations.py; in test_pll.py eq3_has_by_default and,
    as they compare with `uniform_optimum`, eq3_is_least_at_the_simplex and
    minimising_eq3_reaches_the_simplex.
    """
    torch.manual_seed(0)
    queries = torch.randn(7, 12)
    t, total = F.normalize(queries, dim=1), 0.0
    for i in range(7):
        total += math.log(sum(math.exp((t[i] @ t[j]).item() / 0.25) for j in range(7) if j != i))
    assert pll.uniform_loss(queries, 0.25).item() == pytest.approx(total / 7, rel=1e-5)
    at_simplex = math.log(6) - 1 / (6 * 0.07)
    assert pll.uniform_loss(pll.simplex(7, 12), 0.07).item() == pytest.approx(at_simplex, rel=1e-4)
    queries.requires_grad_()
    optimizer = torch.optim.SGD([queries], lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        pll.uniform_loss(queries, 0.07).backward()
        optimizer.step()
    t = F.normalize(queries.detach(), dim=1)
    cosines = (t @ t.T)[~torch.eye(7, dtype=torch.bool)]
    assert (cosines + 1 / 6).abs().max() < 0.05     # spread to the simplex, at a tau of 0.07


def visit(confidence, logits, times):
    """C after so many visits with the same logits, at the threshold 0.1."""
    for _ in range(times):
        confidence = pll.revise(confidence, logits, 0.1)
    return confidence


def test_exercise_7_a_revision_that_can_be_undone():
    """Edit `pll.revise`.

    After Eq. (5) a row is one-hot for good: an error of an early network stays. Make revisions
    that can be undone, by C itself, which is all that is kept (the set Y is where C > 0):
    - a row whose first label leads by more than the threshold at each of its visits comes to hold
      C >= 0.9 for that label, but no candidate falls to 0;
    - if from then on another candidate responds clearly and the first one does not, the row comes
      to hold C >= 0.9 for that other;
    - a row that was never sure stays as it started, Y / |Y| (one that was, but is not at a later
      visit, may return to that);
    - rows sum to 1 and are 0 outside the set.

    Question: after the first revision the other candidate has a small C, hence a small v in
    Eq. (4). How large a lead can it get, and does Eq. (5) fire for it? Which early errors does the
    paper's rule keep, and how does our warm-up before the first revision soften that?
    Hint: what should become of a row, no longer one-hot, whose lead is not above the threshold?
    Red afterwards: what expects one-hot rows. eq4_and_eq5 and algorithm_1 in test_equations.py;
    a_threshold_of_half in test_pll.py; in test_train.py confidence_after_training, two_processes,
    evaluation_prints and a_label_is_learned_from_sets; in test_pictures.py the_story_of_a_sample,
    readmes_pictures_are (pll), labels_that_were_given_up and evaluation_draws. (`is_one_hot`, and
    so the log, counts one-hot rows alone.)
    """
    torch.manual_seed(0)
    Y = torch.zeros(60, 7, dtype=torch.bool)
    order = torch.stack([torch.randperm(7) for _ in range(60)])
    for i in range(60):
        Y[i, order[i, :2 + i % 3]] = True           # 2, 3 or 4 candidates
    start, rows = pll.initial_confidence(Y), torch.arange(60)
    clear = lambda label: torch.where(F.one_hot(label, 7).bool(), 8.0, -8.0)
    first, other, outside = order[:, 0], order[:, 1], order[:, 6]
    once = visit(start, clear(first), 30)
    assert (once[rows, first] >= 0.9).all() and (once[Y] > 0).all()
    twice = visit(once, clear(other), 30)
    assert (twice[rows, other] >= 0.9).all()
    assert (visit(twice, clear(first), 30)[rows, first] >= 0.9).all()
    hesitant = torch.where(F.one_hot(first, 7).bool(), 0.6, 0.0)   # phi leads by 0.15, Eq. 4 less
    for unsure in (torch.zeros(60, 7), clear(outside), hesitant):
        torch.testing.assert_close(visit(start, unsure, 5), start)
    for C in (once, twice, visit(once, clear(other), 1), visit(once, clear(outside), 3)):
        torch.testing.assert_close(C.sum(dim=1), torch.ones(60))
        assert (C >= 0).all() and (C[~Y] == 0).all()


def test_exercise_8_a_threshold_for_sets_of_every_size():
    """Edit `pll.revise`.

    As phi <= 1, the lead v1 - v2 is at most max C: with Y / |Y| a threshold of 0.5 can never fire,
    and 0.3 only for two or three candidates, though the paper allows all of [0, 1). Let the
    threshold be the share of the largest possible lead of the row (`pll.largest_lead`) that the
    lead must exceed.

    Question: sets of the crowd have one to eight candidates. Which part of [0, 1) has an effect on
    a set of two, of three, of five, in the paper's rule and in yours? Which faces does the paper's
    rule disambiguate first, whatever the network has learned, and is that good?
    Hint: a threshold a row.
    Red afterwards: eq4_and_eq5 (but for threshold 0) and algorithm_1 in test_equations.py;
    a_threshold_of_half in test_pll.py; the_story_of_a_sample in test_pictures.py.
    """
    for C, phi in (([0.6, 0.4, 0], [0.45, 1e-6, 0.9]),         # the lead is 0.27 of 0.6
                   ([0.5, 0.5, 0], [0.95, 0.6, 0.9])):         # 0.175 of 0.5
        C = torch.tensor([C])
        assert pll.revise(C, torch.logit(torch.tensor([phi])), 0.5).equal(C)
    label = torch.tensor([0, 1, 1, 0])
    for size in range(2, 8):
        Y = (torch.arange(7) < size).expand(4, 7)
        start = pll.initial_confidence(Y)
        for threshold, phi, fires in ((0.9, 0.95, True), (0.9, 0.85, False), (0.0, 0.01, True),
                                      (0.5, 0.52, True), (0.5, 0.48, False), (0.1, 0.08, False)):
            response = torch.full((4, 7), 1e-6)     # phi of the other labels
            response[range(4), label] = phi
            after = pll.revise(start, torch.logit(response), threshold)
            if fires:
                assert (after[range(4), label] > 0.9).all()
            else:
                torch.testing.assert_close(after, start)


def share_in_two_processes(folder):
    """One of two processes shares rows, more here and fewer there, and writes what it gets."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    run, results = Run({"batch_size": 2}, rank, 2, torch.device("cpu")), []
    for lengths in ((3, 2), (1, 4), (2, 2), (0, 2)):
        indices = torch.arange(lengths[rank]) + 10 * rank
        for rows in (indices[:, None] + torch.rand(1, 4), indices % 7):   # of C; labels, as PiCO's
            results.append((train.share_rows(run, indices), train.share_rows(run, rows)))
    torch.save(results, folder / f"{rank}.pt")


def test_exercise_9_the_last_batch_is_smaller(tmp_path):
    """Edit `train.share_rows`.

    What does not fill a batch is left out of an epoch, because all processes must have the same
    number of rows. Let processes share rows of C of different numbers, even none: the rows of
    process 0 first, then those of process 1, and so on; `rows` may be (b, K) or (b,), of any type.

    Question: gradients are averaged over the processes anyway. Why must every process also know
    every row of C (think of the next epoch's shuffle)? Let share_rows return its own argument:
    which tests fail? And how much would a face count that is alone in its process, when the
    gradients of the processes are averaged?
    Hint: all_gather wants equal shapes; tell each other the lengths first.
    Red afterwards: nothing.
    """
    two_processes(share_in_two_processes, tmp_path)
    zero, one = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for (indices, rows), (indices_1, rows_1) in zip(zero, one):
        assert indices.equal(indices_1) and rows.equal(rows_1) and rows.dtype == rows_1.dtype
    expected = [[0, 1, 2, 10, 11], [0, 10, 11, 12, 13], [0, 1, 10, 11], [10, 11]]
    assert [indices.tolist() for indices, _ in zero[::2]] == expected
    for (indices, rows), (_, labels) in zip(zero[::2], zero[1::2]):
        assert rows.floor().equal(indices[:, None].expand(-1, 4).float())
        assert labels.equal(indices % 7) and labels.dtype == torch.int64


def test_exercise_10_who_gains_from_candidate_sets():
    """Edit `evaluate.measure`.

    The paper's case is ambiguity, its tables are one accuracy for all faces. Where there are votes,
    add the key "accuracy_by_candidates": a dict from the size |Y| of a face's candidate set (an
    int; only sizes that occur) to the accuracy on the faces with sets of that size.

    Question: on which faces should learning from sets beat learning from the voted label, if the
    paper is right? What can the best recogniser reach there, when a second crowd would vote
    otherwise? Compare `--method ours` with `--method baseline` on the toy: what do you see?
    Hint: `candidates` is there already.
    Red afterwards: nothing.
    """
    votes = torch.tensor([[9.0, 0, 0], [0, 9, 0], [5, 4, 0], [0, 4, 5], [6, 3, 0], [4, 3, 2]])
    labels, predicted = votes.argmax(dim=1), torch.tensor([0, 1, 0, 0, 1, 0])
    faces = Faces("test", np.zeros((6, 3, 2, 2), np.uint8), labels, list("abcdef"), votes)
    result = evaluate.measure(F.one_hot(predicted, 3) * 2.0, faces, ["a", "b", "c"])
    assert result["accuracy_by_candidates"] == pytest.approx({1: 1.0, 2: 1 / 3, 3: 1.0})
    assert all(type(size) is int for size in result["accuracy_by_candidates"])
    some = evaluate.measure(F.one_hot(predicted[2:5], 3) * 2.0, faces.subset(torch.arange(2, 5)),
                            ["a", "b", "c"])
    assert some["accuracy_by_candidates"] == pytest.approx({2: 1 / 3})
    faces.votes = None                              # RAF-DB and AffectNet: nothing to divide by
    assert "accuracy_by_candidates" not in evaluate.measure(F.one_hot(predicted, 3) * 2.0, faces,
                                                            ["a", "b", "c"])
