"""The paper's equations as plain loops, in the paper's order, each against the fast version of it.

A "slow twin" computes one number after the other, in the paper's symbols; the test below it asks
that the function which training calls gives the same on random input. What holds for any input
(bounds, invariances, extremes) is in the other files.

    paper               slow twin                        fast version
    Sec. 3.1, Eq. (1)   slow_candidates                  pll.candidates_from_votes
    Sec. 4.2, sets      slow_transition, slow_generate   pll.transition, generate_candidates
    C = Y / |Y|         slow_start                       pll.initial_confidence
    Eq. (2)             slow_pll_loss                    pll.pll_loss
    Sec. 3.2, HOG       slow_hog_targets                 hog.hog_targets
    Sec. 3.2, masking   slow_random_mask                 pretrain.random_mask
                        slow_block_mask                  pretrain.block_mask
    attention           slow_attention                   vit.SelfAttention, decoder.Attention
    Eq. (3)             slow_uniform_loss                pll.uniform_loss
    Eq. (4), Eq. (5)    slow_top2, slow_revise           pll.top2, revise
    Algorithm 1         slow_algorithm_1                 train.algorithm_1
    Table 1, RC, CC     slow_rc, slow_cc                 pll.rc_update, cc_loss
    Table 1, LW         slow_lw_weights, slow_lw_loss    pll.lw_weights, lw_loss
    Table 1, PiCO       slow_prototypes, slow_nearest    pll.move_prototypes, prototype_labels
                        slow_average, slow_contrastive   pll.moving_confidence, contrastive_loss

Run:  python -m pytest tests/test_equations.py
"""
import copy
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import exp, log, sqrt

import train
from datasets import Faces, prepare
from decoder import Attention
from hog import hog_targets
from pll import (candidates_from_votes, cc_loss, contrastive_loss, generate_candidates,
                 initial_confidence, is_one_hot, lw_loss, lw_weights, move_prototypes,
                 moving_confidence, pll_loss, prototype_labels, rc_update, revise, top2, transition,
                 uniform_loss)
from pretrain import Run, batches, block_mask, random_mask
from test_hog import slow_hog
from test_pll import random_problem, sphere
from vit import SelfAttention


def dot(a, b):
    """a^T b."""
    return sum(x * y for x, y in zip(a, b))


def softmax(z):
    """zeta: e^z_j / sum over l of e^z_l, for one row of logits."""
    return [exp(z_j) / sum(exp(z_l) for z_l in z) for z_j in z]


# ------------------------------------------------------ Sec. 3.1: candidate sets Y and confidence C

def slow_candidates(votes, min_votes=1):
    """Y of one sample (Sec. 3.1): y_k = 1 if the crowd's result contains class k, else 0."""
    enough = min(min_votes, max(votes))                   # so that no set is empty
    return [1 if v >= enough else 0 for v in votes]


def slow_transition(K, case):
    """LW's chance that class j joins a set of class i; the classes stand in a circle."""
    at_distance = {"lw1": {1: 0.5},                       # the next class alone
                   "lw2": {1: 0.3, K - 1: 0.3},           # K - 1 steps ahead is one step back
                   "lw4": {1: 0.5, 2: 0.3, 3: 0.1, K - 3: 0.1, K - 2: 0.3, K - 1: 0.5}}[case]
    return [[1.0 if j == i else at_distance.get((j - i) % K, 0.0) for j in range(K)]
            for i in range(K)]


def slow_generate(y, T, u):
    """Y of one sample without votes (Sec. 4.2): class j joins where u_j, uniform, is below T[y][j].

    The given label y always joins: that is Eq. (1).
    """
    return [1 if j == y or u[j] < T[y][j] else 0 for j in range(len(T))]


@pytest.mark.parametrize("min_votes", [1, 2, 5])
def test_eq1_the_voted_label_is_in_the_set(min_votes):
    """Eq. (1) assumes p(y in Y) = 1: no rule that makes sets may lose the label itself."""
    torch.manual_seed(0)
    draws = torch.multinomial(torch.rand(200, 7), 10, replacement=True)   # ten people, n samples
    votes = F.one_hot(draws, 7).sum(dim=1)                                # (n, K)
    Y = candidates_from_votes(votes, min_votes)
    assert Y.int().tolist() == [slow_candidates(row, min_votes) for row in votes.tolist()]
    assert Y[range(200), votes.argmax(dim=1)].all()


@pytest.mark.parametrize("case", ["lw1", "lw2", "lw4"])
def test_eq1_the_given_label_is_in_a_generated_set(case):
    T, y = slow_transition(8, case), torch.arange(200) % 8
    torch.testing.assert_close(transition(8, case), torch.tensor(T))
    Y = generate_candidates(y, transition(8, case), seed=3)
    u = torch.rand(200, 8, generator=torch.Generator().manual_seed(3))
    assert Y.int().tolist() == [slow_generate(y[i].item(), T, u[i].tolist()) for i in range(200)]
    assert Y[range(200), y].all() and not Y.all()


def slow_start(Y):
    """C of one sample: C_i = Y_i / |Y_i|."""
    return [y / sum(Y) for y in Y]


def test_the_start_of_confidence_equals_its_slow_twin():
    Y, _, _ = random_problem()
    assert Y.sum(dim=1).unique().numel() > 3                              # sets of many sizes
    torch.testing.assert_close(initial_confidence(Y), torch.tensor(
        [slow_start(row) for row in Y.int().tolist()]))


def slow_pll_loss(logits, C):
    """Eq. (2), a sample i and a class j at a time; the mean over the batch."""
    loss = 0.0
    for i in range(len(logits)):
        zeta = softmax(logits[i])
        for j in range(len(zeta)):
            loss += -C[i][j] * log(zeta[j])
    return loss / len(logits)


def test_eq2_equals_its_slow_twin():
    _, C, logits = random_problem()
    slow = slow_pll_loss(logits.double(), C).item()
    assert pll_loss(logits, C).item() == pytest.approx(slow, rel=1e-5)


# -------------------------------------------------- Sec. 3.2: what is predicted, and what is hidden

def slow_hog_targets(image, P):
    """HOG of one image (3, H, W), a patch at a time; `slow_hog` of test_hog.py makes it by pixels.

    A patch of P x P pixels holds 2 x 2 cells, a cell of each channel nine bins.
    """
    _, H, W = image.shape
    h = [slow_hog(channel, P // 2) for channel in image]                  # 3 x (9, 2H/P, 2W/P)
    targets = []
    for row in range(H // P):
        for column in range(W // P):
            targets.append([h[c][b, 2 * row + y, 2 * column + x].item()
                            for c in range(3) for b in range(9) for y in (0, 1) for x in (0, 1)])
    return targets                                                        # N lists of 108 numbers


def test_hog_targets_equal_their_slow_twin():
    torch.manual_seed(0)
    images = torch.rand(1, 3, 16, 24)
    slow = torch.tensor([slow_hog_targets(images[0], 8)])
    torch.testing.assert_close(hog_targets(images, 8), slow, rtol=1e-4, atol=1e-5)


def slow_random_mask(noise, count):
    """Random masking (MAE) of one image: the `count` patches with the smallest noise."""
    order = sorted(range(len(noise)), key=lambda n: noise[n])
    return [n in order[:count] for n in range(len(noise))]


def test_random_masking_equals_its_slow_twin():
    noise = torch.rand(20, 196, generator=torch.Generator().manual_seed(5))
    slow = [slow_random_mask(row, 79) for row in noise.tolist()]
    assert random_mask(20, 14, 79, seed=5).tolist() == slow


def slow_block_mask(grid, count, rng):
    """Block-wise masking (BEiT, MaskFeat) of one image: rectangles until `count` are masked."""
    masked, smallest = set(), 16 * grid * grid / 196        # 16 of the 14 x 14 patches at least
    while len(masked) < count:
        left = count - len(masked)
        for attempt in range(10):
            s = rng.uniform(smallest, max(smallest, left))                # size of the block
            r = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))   # its aspect ratio
            a, b = round(math.sqrt(s * r)), round(math.sqrt(s / r))       # its height and width
            if not (1 <= a <= grid and 1 <= b <= grid):
                continue
            t, l = rng.randint(0, grid - a), rng.randint(0, grid - b)     # its top left corner
            block = {(t + i, l + j) for i in range(a) for j in range(b)}
            if 1 <= len(block - masked) <= left:            # blocks may overlap
                masked |= block
                break
        else:                                               # no block fits: single patches
            free = [(i, j) for i in range(grid) for j in range(grid) if (i, j) not in masked]
            masked |= set(rng.sample(free, left))
    return [(i, j) in masked for i in range(grid) for j in range(grid)]


@pytest.mark.parametrize("grid, count", [(14, 79), (6, 15), (14, 3), (14, 190)])
def test_block_masking_equals_its_slow_twin(grid, count):
    for seed in range(50):
        fast = block_mask(grid, count, random.Random(seed))
        assert fast.tolist() == slow_block_mask(grid, count, random.Random(seed))


# ------------------------------------------------------------ Sec. 3.2 and 3.3: what attention does

def slow_attention(q, k, v, heads):
    """softmax(q k^T / sqrt(d/heads)) v, a head and a token i at a time; q (n, d), k, v (m, d)."""
    size = q.shape[1] // heads
    out = torch.zeros_like(q)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for i in range(len(q)):
            a = softmax([dot(q[i, part], k[j, part]) / size ** 0.5 for j in range(len(k))])
            for j in range(len(k)):
                out[i, part] += a[j] * v[j, part]
    return out


def test_self_attention_equals_its_slow_twin():
    """In the encoder every token asks every token."""
    torch.manual_seed(0)
    layer, x = SelfAttention(12, 3), torch.randn(1, 5, 12)
    q, k, v = (layer.qkv(x[0])[:, i * 12:(i + 1) * 12] for i in range(3))
    slow = layer.proj(slow_attention(q, k, v, 3))
    torch.testing.assert_close(layer(x)[0], slow, rtol=1e-4, atol=1e-5)


def test_cross_attention_equals_its_slow_twin():
    """In the label decoder (Sec. 3.3) K label queries Q ask the HW visual tokens F."""
    torch.manual_seed(0)
    layer, Q, tokens = Attention(12, 3), torch.randn(1, 7, 12), torch.randn(1, 9, 12)
    slow = layer.proj(slow_attention(layer.q(Q[0]), layer.k(tokens[0]), layer.v(tokens[0]), 3))
    torch.testing.assert_close(layer(Q, tokens, tokens)[0], slow, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------- Sec. 3.3.1: label embedding regularization

def slow_uniform_loss(Q, tau):
    """Eq. (3), a pair of labels i, j at a time; t_i = Q_i / |Q_i| lies on the hypersphere."""
    t = [q / sqrt(dot(q, q)) for q in Q]
    K, loss = len(t), 0.0
    for i in range(K):
        loss += log(sum(exp(dot(t[i], t[j]) / tau) for j in range(K)))
    return loss / K


def test_eq3_equals_its_slow_twin():
    torch.manual_seed(0)
    Q = torch.randn(7, 12)
    for tau in (0.07, 0.25, 1.0):
        slow = slow_uniform_loss(Q.double(), tau).item()
        assert uniform_loss(Q, tau).item() == pytest.approx(slow, rel=1e-5)


# ------------------------------------------------------------------ Sec. 3.3.2: revision confidence

def slow_top2(C, logits):
    """Eq. (4) for one sample: id1, v1, id2, v2 of phi * C, with phi = sigmoid(logits)."""
    v = [c / (1 + exp(-z)).item() for c, z in zip(C, logits)]             # phi * C
    id1 = max(range(len(v)), key=lambda j: v[j])
    id2 = max((j for j in range(len(v)) if j != id1), key=lambda j: v[j])
    return id1, v[id1], id2, v[id2]


def slow_revise(C, logits, threshold):
    """Eq. (5) for one sample: C as it was, or 1 at id1 and 0 elsewhere, so that it sums to 1."""
    id1, v1, _, v2 = slow_top2(C, logits)
    if abs(v1 - v2) > threshold:
        return [1.0 if j == id1 else 0.0 for j in range(len(C))]
    return C


def test_eq4_equals_its_slow_twin():
    _, C, logits = random_problem()
    v1, v2, id1 = top2(C, logits)
    slow = [slow_top2(row, z) for row, z in zip(C.tolist(), logits.double())]
    assert id1.tolist() == [row[0] for row in slow]
    torch.testing.assert_close(v1, torch.tensor([row[1] for row in slow]))
    torch.testing.assert_close(v2, torch.tensor([row[3] for row in slow]))


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3])
def test_eq4_and_eq5_equal_their_slow_twin(threshold):
    _, C, logits = random_problem()
    fast = revise(C, logits, threshold)
    slow = [slow_revise(row, z, threshold) for row, z in zip(C.tolist(), logits.double())]
    torch.testing.assert_close(fast, torch.tensor(slow))
    assert 0 < is_one_hot(fast).sum() and not fast.equal(C)


# -------------------------------------------------------------------------------------- Algorithm 1

def slow_algorithm_1(f, x, Y, labels, orders, c, lr):
    """Algorithm 1, line by line: model f, images x (n, 3, H, H), candidate sets Y, settings c.

    orders[i] is epoch i's shuffle, labels are the voted ones. Returns Eq. (3), Eq. (2), their sum,
    Eq. (2) of always answering how frequent each label is, and the accuracy in each step; and C.
    """
    C, steps = [slow_start(Y_i) for Y_i in Y], []           # Ensure: C_i = Y_i / |Y_i|
    frequent = torch.tensor([sum(C_i[k] for C_i in C) / len(C) for k in range(7)])
    T_max, I_max = c["epochs"], len(orders[0]) // c["batch_size"]
    for i in range(T_max):
        D = orders[i]                                       # shuffle D
        for j in range(I_max):
            batch = D[j * c["batch_size"]:(j + 1) * c["batch_size"]]      # fetch mini-batch D_j
            logits = f(x[batch])                                          # sigma_logits (b, K)
            uniform = slow_uniform_loss(f.head.queries, c["tau"])         # Eq. (3)
            if i >= c["warmup_revision"]:                   # 0 in the paper
                for row, n in enumerate(batch):
                    C[n] = slow_revise(C[n], logits[row].detach(), c["threshold"])   # Eq. (4), (5)
            pll = slow_pll_loss(logits, [C[n] for n in batch])            # Eq. (2)
            # The paper updates "by Eq. (2)"; Eq. (3) would then move nothing, so the sum it is.
            loss = pll + c["uniform_weight"] * uniform
            f.zero_grad()
            loss.backward()
            for parameter in f.parameters():                # update the parameters of f
                parameter.data -= lr * parameter.grad
            trivial = slow_pll_loss([log(frequent)] * len(batch), [C[n] for n in batch])
            right = sum(logits[row].argmax() == labels[n] for row, n in enumerate(batch))
            steps.append([uniform.item(), pll.item(), loss.item(), trivial.item(),
                          right.item() / len(batch)])
    return steps, C


def fast_algorithm_1(run, f, faces, lr):
    """What `pretrain.fit` does with `train.algorithm_1`, but with SGD: steps, C and shuffles."""
    table = train.confidence_table(run, faces, None)
    iteration, steps, orders = train.algorithm_1(run, f, faces, table), [], []
    optimizer = torch.optim.SGD(f.parameters(), lr)
    for epoch in range(run.config["epochs"]):
        orders.append([])
        for images, indices in batches(run, faces, epoch, 0):
            loss, numbers = iteration(f, images, indices, len(steps))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append([numbers[k].item() for k in ("uniform", "pll", "loss", "trivial",
                                                      "train_accuracy")])
            orders[-1] += indices.tolist()
    return steps, table["confidence"], orders


@pytest.mark.parametrize("warmup", [0, 1])
def test_algorithm_1_equals_its_slow_twin(warmup, monkeypatch):
    """Three epochs of three steps on 13 faces; the face left over waits for the next shuffle."""
    c = train.parse(f"--init none --image-size 8 --patch-size 4 --dim 8 --depth 1 --heads 2 "
                    f"--epochs 3 --batch-size 4 --threshold 0.05 --uniform-weight 0.5 "
                    f"--warmup-revision {warmup}".split())
    torch.manual_seed(0)
    f = train.build_model(c)
    torch.nn.init.normal_(f.head.weight, std=0.3)           # some labels lead from the start
    g = copy.deepcopy(f)
    votes = F.one_hot(torch.randint(7, (13, 3)), 7).sum(dim=1)            # three people, 7 classes
    images = np.random.default_rng(0).integers(0, 256, (13, 3, 8, 8), dtype=np.uint8)
    faces = Faces("train", images, votes.argmax(dim=1), [str(n) for n in range(13)], votes)
    # Augmentation is not in the pseudo-code: every visit shows the same picture.
    monkeypatch.setattr(train, "augment", lambda x, u, size, data, *rest: prepare(x, size, data))

    fast, C_fast, orders = fast_algorithm_1(Run(c, 0, 1, torch.device("cpu")), f, faces, lr=0.1)
    Y = [slow_candidates(row) for row in votes.tolist()]
    x = prepare(torch.from_numpy(images), 8, "toy")
    slow, C = slow_algorithm_1(g, x, Y, faces.labels, orders, c, lr=0.1)

    assert len(fast) == 9 and all(len(set(D)) == 12 for D in orders) and orders[0] != orders[1]
    torch.testing.assert_close(torch.tensor(fast), torch.tensor(slow), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(C_fast, torch.tensor(C))
    for mine, other in zip(f.parameters(), g.parameters()):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
    several = torch.tensor(Y).sum(dim=1) > 1
    assert 0 < is_one_hot(C_fast)[several].sum() < several.sum()          # some, not all


# ----------------------------------------------------------------- the rivals of Table 1: RC and CC

def slow_rc(logits, Y):
    """RC and PRODEN, one sample: C_j = zeta_j / sum over the candidates of zeta, 0 outside."""
    zeta = softmax(logits)
    inside = sum(zeta[j] for j in range(len(Y)) if Y[j])
    return [(zeta[j] / inside).item() if Y[j] else 0.0 for j in range(len(Y))]


def test_rc_equals_its_slow_twin():
    Y, _, logits = random_problem()
    slow = torch.tensor([slow_rc(z, y) for z, y in zip(logits.double(), Y)])
    torch.testing.assert_close(rc_update(logits, Y), slow)
    assert not rc_update(logits.requires_grad_(), Y).requires_grad


def slow_cc(logits, Y):
    """CC, one sample: -log of the sum over the candidates of zeta."""
    zeta = softmax(logits)
    return -log(sum(zeta[j] for j in range(len(Y)) if Y[j])).item()


def test_cc_equals_its_slow_twin():
    Y, _, logits = random_problem()
    slow = sum(slow_cc(z, y) for z, y in zip(logits.double(), Y)) / len(Y)
    assert cc_loss(logits, Y).item() == pytest.approx(slow, rel=1e-5)


# ------------------------------------------------------------------------------------ LW of Table 1

def slow_lw_weights(logits, Y):
    """LW, one sample: w_j = zeta_j / sum of zeta over the labels on the same side of the set."""
    zeta = softmax(logits)
    return [(zeta[j] / sum(zeta[l] for l in range(len(Y)) if Y[l] == Y[j])).item()
            for j in range(len(Y))]


def slow_lw_loss(g, Y, w, beta, kind):
    """LW, one sample: sum over Y of w_j inside_j + beta * sum over the others of w_j outside_j."""
    if kind == "sigmoid":
        inside, outside = [[(1 / (1 + exp(s * z))).item() for z in g] for s in (1, -1)]
    else:                                                   # cross-entropy with and without j
        zeta = softmax(g)
        inside, outside = [-log(z).item() for z in zeta], [-log(1 - z).item() for z in zeta]
    return sum(w[j] * inside[j] if Y[j] else beta * w[j] * outside[j] for j in range(len(Y)))


@pytest.mark.parametrize("kind", ["sigmoid", "ce"])
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_lw_equals_its_slow_twin(beta, kind):
    Y, _, logits = random_problem()
    w = [slow_lw_weights(z, y) for z, y in zip(logits.double(), Y)]
    slow = sum(slow_lw_loss(*row, beta, kind) for row in zip(logits.double(), Y, w)) / len(Y)
    torch.testing.assert_close(lw_weights(logits, Y), torch.tensor(w))
    loss = lw_loss(logits, Y, lw_weights(logits, Y), beta, kind)
    assert loss.item() == pytest.approx(slow, rel=1e-5)


# ---------------------------------------------------------------------------------- PiCO of Table 1

def slow_prototypes(p, q, labels, m):
    """PiCO's prototypes p (K, d): p_c <- m p_c + (1 - m) q_i, a sample at a time, then length 1."""
    p = p.clone()
    for i in range(len(q)):
        c = labels[i]
        p[c] = m * p[c] + (1 - m) * q[i]
    return torch.stack([row / sqrt(dot(row, row)) for row in p])


def test_pico_prototypes_move_one_feature_at_a_time():
    torch.manual_seed(0)
    prototypes, features, labels = sphere(4), sphere(30), torch.randint(3, (30,))
    moved = move_prototypes(prototypes, features, labels, 0.9)
    torch.testing.assert_close(moved, slow_prototypes(prototypes, features, labels, 0.9))
    torch.testing.assert_close(moved[3], prototypes[3])           # no feature of its class


def slow_nearest(q, p, Y):
    """PiCO, one sample: the candidate j whose prototype p_j is most similar to the feature q."""
    return max((j for j in range(len(Y)) if Y[j]), key=lambda j: dot(q, p[j]).item())


def slow_average(C, z, m):
    """PiCO, one sample: C_j <- m C_j + (1 - m) [j = z]."""
    return [m * C[j] + (1 - m) * (1 if j == z else 0) for j in range(len(C))]


def test_pico_confidence_moves_to_the_nearest_prototype_inside_the_set():
    torch.manual_seed(0)
    Y, C, _ = random_problem()
    features, prototypes = sphere(200), sphere(7)
    labels = prototype_labels(features, prototypes, Y)
    assert labels.tolist() == [slow_nearest(q, prototypes, y) for q, y in zip(features, Y)]
    slow = [slow_average(C[i].tolist(), labels[i].item(), 0.9) for i in range(200)]
    torch.testing.assert_close(moving_confidence(C, labels, 0.9), torch.tensor(slow))


def slow_contrastive(q, k, positive, tau):
    """PiCO, one query q and the keys k: mean over its positives P of -log softmax(q . k / tau)."""
    share = softmax([dot(q, k_j) / tau for k_j in k])
    P = [j for j in range(len(k)) if positive[j]]
    return -sum(log(share[j]).item() for j in P) / len(P) if P else 0.0


def test_contrastive_loss_equals_its_slow_twin_and_survives_a_row_without_positives():
    torch.manual_seed(0)
    queries, keys, positive = sphere(6), sphere(9), torch.rand(6, 9) < 0.4
    positive[2] = False
    slow = sum(slow_contrastive(queries[i], keys, positive[i], 0.07) for i in range(6)) / 6
    assert contrastive_loss(queries, keys, positive).item() == pytest.approx(slow, rel=1e-4)
