"""pll.py: what must hold of each equation and of Algorithm 1 for any input: bounds, invariances.

Paper: Sec. 3.1, 3.3. Each equation as plain loops is in test_equations.py.

Run:  python -m pytest tests/test_pll.py tests/test_equations.py
"""
import pytest
import torch
import torch.nn.functional as F

from pll import (candidates_from_votes, cc_loss, generate_candidates, initial_confidence,
                 is_one_hot, largest_lead, lw_loss, lw_weights, moving_confidence, pll_loss,
                 prototype_labels, rc_update, revise, simplex, target_loss, transition,
                 uniform_loss, uniform_optimum, uniform_transition)


def random_problem(n=200, classes=7, seed=0):
    """Random candidate sets, their uniform confidence and logits: (n, K) each."""
    torch.manual_seed(seed)
    candidates = torch.rand(n, classes) < 0.4
    candidates[torch.arange(n), torch.randint(classes, (n,))] = True
    return candidates, initial_confidence(candidates), torch.randn(n, classes) * 3


def test_eq2_with_one_candidate_is_cross_entropy():
    labels, logits = torch.randint(7, (50,)), torch.randn(50, 7)
    one = F.one_hot(labels, 7).float()
    torch.testing.assert_close(pll_loss(logits, one), F.cross_entropy(logits, labels))


def test_eq2_is_least_where_the_softmax_is_the_confidence():
    _, confidence, logits = random_problem()
    best = pll_loss(confidence.clamp(min=1e-30).log(), confidence)
    entropy = -(confidence * confidence.clamp(min=1e-30).log()).sum(1).mean()
    torch.testing.assert_close(best, entropy)
    assert best < pll_loss(logits, confidence)


def test_eq3_does_not_depend_on_lengths_rotation_or_order():
    torch.manual_seed(0)
    queries = torch.randn(7, 12)
    rotation = torch.linalg.qr(torch.randn(12, 12)).Q
    for other in (queries * torch.rand(7, 1).add(0.1), queries @ rotation,
                  queries[torch.randperm(7)]):
        torch.testing.assert_close(uniform_loss(other, 0.25), uniform_loss(queries, 0.25))


@pytest.mark.parametrize("classes, dim", [(7, 6), (8, 64)])
def test_eq3_is_least_at_the_simplex(classes, dim):
    points = simplex(classes, dim)
    cosines = points @ points.T
    assert points.shape == (classes, dim)
    expected = torch.full((classes, classes), -1 / (classes - 1)).fill_diagonal_(1.0)
    torch.testing.assert_close(cosines, expected, rtol=1e-4, atol=1e-5)
    for tau in (0.07, 0.25):
        optimum = uniform_optimum(classes, tau)
        assert uniform_loss(points, tau).item() == pytest.approx(optimum, rel=1e-5)
        torch.manual_seed(0)
        assert all(uniform_loss(torch.randn(classes, dim), tau) > optimum for _ in range(20))


def test_minimising_eq3_reaches_the_simplex():
    torch.manual_seed(0)
    queries = torch.randn(7, 16, requires_grad=True)
    optimizer = torch.optim.Adam([queries], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        uniform_loss(queries, 0.25).backward()
        optimizer.step()
    assert uniform_loss(queries, 0.25).item() == pytest.approx(uniform_optimum(7, 0.25), abs=1e-4)
    cosines = F.normalize(queries.detach(), dim=1) @ F.normalize(queries.detach(), dim=1).T
    assert (cosines.fill_diagonal_(-1 / 6) + 1 / 6).abs().max() < 0.02


def test_eq3_has_by_default_the_exponent_of_its_source():
    """Wang and Isola 2020: -2 |t_i - t_j|^2; over the pairs (i, i) as well, as Eq. 3 has it."""
    queries = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    t = F.normalize(queries, dim=1)
    potential = torch.cdist(t, t).square().mul(-2).exp().sum(dim=1)        # (7,)
    assert uniform_loss(queries).item() == pytest.approx(4 + potential.log().mean().item())


def test_target_loss_is_zero_only_at_the_targets():
    points = simplex(7, 16)
    assert target_loss(points * 3, points).item() == pytest.approx(0, abs=1e-6)
    assert target_loss(points.roll(1, 0), points).item() == pytest.approx(1 + 1 / 6, rel=1e-5)


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.2, 0.4])
def test_confidence_stays_on_the_simplex_and_in_the_set_and_a_revision_lasts(threshold):
    candidates, confidence, _ = random_problem()
    for step in range(20):
        torch.manual_seed(step)
        logits = torch.randn(200, 7) * 10
        logits[::7] -= 300                       # sigmoids that underflow to 0
        after = revise(confidence, logits, threshold)
        torch.testing.assert_close(after.sum(1), torch.ones(200))
        assert (after >= 0).all() and (after[~candidates] == 0).all()
        lasting = is_one_hot(confidence)
        assert after[lasting].equal(confidence[lasting])
        confidence = after


def test_a_threshold_of_half_or_more_never_fires_from_the_uniform_start():
    candidates, confidence, _ = random_problem()
    several = candidates.sum(1) >= 2
    extreme = torch.where(candidates & (candidates.cumsum(1) == 1), 50.0, -50.0)   # phi is 1 or 0
    assert not is_one_hot(revise(confidence, extreme, 0.5))[several].any()
    assert is_one_hot(revise(confidence, extreme, 0.499))[candidates.sum(1) == 2].all()
    assert largest_lead(confidence).equal(1 / candidates.sum(1))


def test_revise_leaves_its_argument_alone_and_has_no_gradient():
    _, confidence, logits = random_problem()
    before, logits = confidence.clone(), logits.requires_grad_()
    assert not revise(confidence, logits, 0.0).requires_grad and confidence.equal(before)


def test_permuting_the_classes_permutes_everything():
    _, confidence, logits = random_problem()
    order = torch.randperm(7)
    torch.testing.assert_close(pll_loss(logits[:, order], confidence[:, order]),
                               pll_loss(logits, confidence))
    assert revise(confidence[:, order], logits[:, order], 0.1).equal(
        revise(confidence, logits, 0.1)[:, order])


def test_candidates_from_votes():
    votes = torch.tensor([[5.0, 1, 0, 4], [1, 1, 0, 1], [9, 0, 0, 0]])
    one, two = candidates_from_votes(votes), candidates_from_votes(votes, 2)
    assert one.int().tolist() == [[1, 1, 0, 1], [1, 1, 0, 1], [1, 0, 0, 0]]
    assert two.int().tolist() == [[1, 0, 0, 1], [1, 1, 0, 1], [1, 0, 0, 0]]
    shares = torch.tensor([[0.7, 0.2, 0.1, 0.0]])                  # a distribution, not counts
    assert candidates_from_votes(shares).int().tolist() == [[1, 1, 1, 0]]
    with pytest.raises(ValueError, match="row 1 has no votes"):
        candidates_from_votes(torch.tensor([[1.0, 0], [0, 0]]))


def test_initial_confidence_is_uniform_or_the_vote_share():
    votes = torch.tensor([[6.0, 1, 0, 3]])
    candidates = candidates_from_votes(votes)
    torch.testing.assert_close(initial_confidence(candidates),
                               torch.tensor([[1 / 3, 1 / 3, 0, 1 / 3]]))
    torch.testing.assert_close(initial_confidence(candidates_from_votes(votes, 2), votes),
                               torch.tensor([[6 / 9, 0, 0, 3 / 9]]))


def test_generated_candidates_follow_the_transition_matrix():
    assert transition(5, "lw1")[4].tolist() == [0.5, 0, 0, 0, 1.0]
    assert transition(5, "lw2")[0].tolist() == pytest.approx([1, 0.3, 0, 0, 0.3])
    assert transition(8, "lw4")[0].tolist() == pytest.approx([1, 0.5, 0.3, 0.1, 0, 0.1, 0.3, 0.5])
    for classes in range(2, 11):                           # the nearest way round the circle
        for i, row in enumerate(transition(classes, "lw4").tolist()):
            away = [min((i - j) % classes, (j - i) % classes) for j in range(classes)]
            assert row == pytest.approx([{0: 1, 1: 0.5, 2: 0.3, 3: 0.1}.get(d, 0) for d in away])
    labels = torch.arange(40_000) % 8
    sets = generate_candidates(labels, transition(8, "lw4"), seed=0)
    assert sets[torch.arange(40_000), labels].all()
    for i in range(8):
        torch.testing.assert_close(sets[labels == i].float().mean(0), transition(8, "lw4")[i],
                                   atol=0.03, rtol=0)
    assert sets.equal(generate_candidates(labels, transition(8, "lw4"), seed=0))
    assert not sets.equal(generate_candidates(labels, transition(8, "lw4"), seed=1))


# ------------------------------------------------------------------------- the rivals of Table 1

def test_cc_is_cross_entropy_for_one_candidate_and_zero_for_all():
    labels, logits = torch.randint(7, (50,)), torch.randn(50, 7)
    torch.testing.assert_close(cc_loss(logits, F.one_hot(labels, 7).bool()),
                               F.cross_entropy(logits, labels))
    assert cc_loss(logits, torch.ones(50, 7, dtype=torch.bool)).item() == 0


def test_ccs_gradient_is_that_of_eq2_with_rcs_confidence_of_the_same_logits():
    candidates, _, logits = random_problem()
    logits.requires_grad_()
    cc, = torch.autograd.grad(cc_loss(logits, candidates), logits)
    eq2, = torch.autograd.grad(pll_loss(logits, rc_update(logits, candidates)), logits)
    torch.testing.assert_close(cc, eq2)
    assert cc.abs().max() > 0


def test_lw_weights_of_a_full_set_are_finite():
    weights = lw_weights(torch.randn(3, 7), torch.ones(3, 7, dtype=torch.bool))
    torch.testing.assert_close(weights.sum(1), torch.ones(3))


def test_lw_with_cross_entropy_has_a_gradient_where_the_sigmoid_has_none():
    """Of a label that the network is sure not to be, as of one that it is sure to be."""
    candidates = torch.tensor([[True, False, False], [True, False, False]])
    for kind, least in (("sigmoid", 0.0), ("ce", 0.9)):
        logits = torch.tensor([[-200.0, 0.0, 0.0], [0.0, 200.0, 0.0]], requires_grad=True)
        loss = lw_loss(logits, candidates, lw_weights(logits, candidates), kind=kind)
        gradient, = torch.autograd.grad(loss, logits)
        assert loss.isfinite() and gradient.isfinite().all()
        wrong = torch.stack([-gradient[0, 0], gradient[1, 1]])
        assert (wrong * len(logits) >= least).all() and (wrong.sum() > 0) == (kind == "ce")


def sphere(n, d=5):
    return F.normalize(torch.randn(n, d), dim=1)


def test_pico_confidence_stays_on_the_simplex_and_in_the_set():
    torch.manual_seed(0)
    candidates, confidence, _ = random_problem()
    labels = prototype_labels(sphere(200), sphere(7), candidates)
    moved = moving_confidence(confidence, labels, 0.9)
    torch.testing.assert_close(moved.sum(1), torch.ones(200))
    assert (moved[~candidates] == 0).all()
    rows = torch.arange(200)
    torch.testing.assert_close(moved[rows, labels], 0.9 * confidence[rows, labels] + 0.1)


def test_uniform_transition():
    assert uniform_transition(3, 0.2).tolist() == [pytest.approx(row) for row in (
        [1, 0.2, 0.2], [0.2, 1, 0.2], [0.2, 0.2, 1])]
