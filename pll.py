"""Partial-label learning: candidate sets, the confidence C, its loss and its revision.

Paper: Sec. 3.1, 3.3.1, 3.3.2 and Algorithm 1. Pure functions over a batch; train.py keeps C.

    symbol     name        shape        meaning
    K          classes                  number of labels
    Y          candidates  (B, K) bool  labels that may be the true one; never empty
    C          confidence  (B, K)       how far each label is believed: >= 0, a row sums to 1
    zeta       softmax of the logits    the classifier's probabilities in Eq. (2)
    phi        sigmoid of the logits    the response in Eq. (4)
    Q, t_i     queries     (K, d)       label queries, and their directions on the unit sphere
    tau        tau                      temperature of Eq. (3)
    threshold  threshold   in [0, 1)    smallest lead of the first label over the second in Eq. (5)

Run:  python -m pytest tests/test_pll.py
"""
import math

import torch
import torch.nn.functional as F


# ---------------------------------------------------------------------------------- candidate sets

def candidates_from_votes(votes, min_votes=1):
    """Y from the crowd (Sec. 3.1): the labels with at least `min_votes` votes, (n, K) bool.

    A row in which no label has that many keeps its most voted labels, so no set is empty. Raises
    ValueError for a row without any vote.
    """
    top = votes.max(dim=1, keepdim=True).values                           # (n, 1)
    if (top <= 0).any():
        row = int((top <= 0).flatten().nonzero()[0])
        raise ValueError(f"row {row} has no votes; leave it out or give it some")
    return votes >= top.clamp(max=min_votes)


def transition(classes, case):
    """Chance that wrong label j joins the set of a sample of class i (Wen et al. 2021, LW), (K, K).

    Labels are neighbours in class order, a circle. "lw1": the next one with 0.5; "lw2": both
    neighbours with 0.3; "lw4": those at distance 1, 2, 3 with 0.5, 0.3, 0.1. The diagonal is 1.
    """
    chances = {"lw1": {1: 0.5}, "lw2": {1: 0.3, -1: 0.3},
               "lw4": {1: 0.5, -1: 0.5, 2: 0.3, -2: 0.3, 3: 0.1, -3: 0.1}}[case]
    matrix = torch.eye(classes)
    for shift, chance in chances.items():
        matrix += chance * torch.eye(classes).roll(shift, dims=1)         # (i, i + shift)
    return matrix.clamp(max=1.0)


def generate_candidates(labels, matrix, seed):
    """Y for data without votes (Sec. 4.2, "based on LW"): labels (n,) -> (n, K) bool.

    Each wrong label enters independently with its chance in `matrix`; the given label always does.
    The draw is on the CPU from `seed`: the same in every process.
    """
    u = torch.rand(len(labels), len(matrix), generator=torch.Generator().manual_seed(seed))
    return u < matrix[labels]                                             # (n, K)


def initial_confidence(candidates, votes=None):
    """C_i = Y_i / |Y_i| (Algorithm 1), or with `votes` the candidates' shares of them: (n, K)."""
    weights = candidates.float() if votes is None else candidates * votes
    return weights / weights.sum(dim=1, keepdim=True)


# --------------------------------------------------------------------------------------- the losses

def pll_loss(logits, confidence):
    """Cross-entropy of the classifier's softmax against C, the mean over the batch, in fp32.

    Eq. (2): sum over classes j of -C_ij log zeta_j(x_i). With one candidate it is cross-entropy.
    """
    log_zeta = F.log_softmax(logits.float(), dim=1)                       # (B, K)
    return -(confidence * log_zeta).sum(dim=1).mean()                     # Eq. (2)


def uniform_loss(queries, tau=0.07):
    """How unevenly the label queries lie on the unit sphere, a scalar in fp32; (K, d).

    Eq. (3): mean over i of log sum over j of exp(t_i . t_j / tau), with t = Q / |Q|. The smallest
    value is `uniform_optimum`, at the regular simplex, if K <= d + 1.
    """
    with torch.autocast(queries.device.type, enabled=False):
        t = F.normalize(queries.float(), dim=1)                           # (K, d), on the sphere
        return torch.logsumexp(t @ t.T / tau, dim=1).mean()               # Eq. (3)


def uniform_optimum(classes, tau=0.07):
    """Eq. (3) at the regular simplex, where every cosine is -1/(K-1): log(e^(1/tau) + ...)."""
    return 1 / tau + math.log1p((classes - 1) * math.exp(-(1 + 1 / (classes - 1)) / tau))


def simplex(classes, dim):
    """K unit vectors with all cosines -1/(K-1): the optimal positions t_i of Sec. 3.3.1, (K, d).

    They are known in closed form, the centred and normalised corners of the standard simplex, so
    that nothing has to be optimised beforehand. Raises ValueError if K > d + 1.
    """
    if classes > dim + 1:
        raise ValueError(f"{classes} classes have no regular simplex in {dim} dimensions")
    corners = torch.eye(classes) - 1 / classes                            # (K, K), of rank K - 1
    basis = torch.linalg.svd(corners).Vh[:classes - 1]                    # (K-1, K), orthonormal
    points = F.pad(corners @ basis.T, (0, dim - classes + 1))             # (K, d)
    return F.normalize(points, dim=1)


def target_loss(queries, targets):
    """Pull the queries to fixed positions t_i: the mean of 1 - cosine, a scalar; both (K, d).

    The other reading of Sec. 3.3.1, in which Eq. (3) only chose the positions before training.
    """
    return 1 - F.cosine_similarity(queries.float(), targets, dim=1).mean()


# ------------------------------------------------------------------------------------- the revision

def top2(confidence, logits):
    """The two largest values of phi * C and the first one's label: v1 (B,), v2 (B,), id1 (B,).

    Eq. (4), with phi = sigmoid(logits) in fp32.
    """
    phi = torch.sigmoid(logits.float())                                   # (B, K)
    v, ids = (phi * confidence).topk(2, dim=1)                            # Eq. (4), (B, 2)
    return v[:, 0], v[:, 1], ids[:, 0]


def revise(confidence, logits, threshold):
    """C after one revision, (B, K); the argument is left alone, and no gradient flows.

    Eq. (5): where v1 - v2 > threshold, C becomes one-hot at id1, elsewhere it stays. The paper sets
    C[id1] = 1 and is silent on the rest; it must become 0 for a row to sum to 1. As C is 0 outside
    the candidates, no other label can win; a one-hot row can only become itself. As phi <= 1, the
    lead is at most max C: with the uniform start a threshold >= 1/|Y| never fires (`largest_lead`).
    """
    with torch.no_grad():
        v1, v2, id1 = top2(confidence, logits)
        sure = (v1 - v2 > threshold).unsqueeze(1)                         # Eq. (5), (B, 1)
        one_hot = F.one_hot(id1, confidence.shape[1]).to(confidence.dtype)   # (B, K)
        return torch.where(sure, one_hot, confidence)


def largest_lead(confidence):
    """Bound of v1 - v2 for any logits, (B,): max C. A larger threshold cannot fire on that row."""
    return confidence.max(dim=1).values


def is_revised(confidence):
    """Rows that are one-hot: (B, K) -> (B,) bool."""
    return confidence.max(dim=1).values == 1
