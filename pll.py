"""Partial-label learning: candidate sets, confidence C, its loss, its revision, and the rivals.

Paper: Sec. 3.1, 3.3.1, 3.3.2, 4.2; then RC, LW and PiCO, its rivals in Table 1, and CC, RC's
companion. Pure functions over a batch or the whole training set; train.py keeps C.

    symbol     name        shape        meaning
    K          classes                  number of labels
    B, n                                rows of a batch, faces of the training set
    Y          candidates  (B, K) bool  labels that may be the true one; never empty
    C          confidence  (B, K)       how far each label is believed: >= 0, a row sums to 1
    sigma      logits      (B, K)       output of the classifier, sigma_logits in Sec. 3.3.2
    zeta                   (B, K)       softmax of the logits, the probabilities in Eq. (2)
    phi                    (B, K)       sigmoid of the logits, the response in Eq. (4)
    Q, t_i     queries     (K, d)       label queries, and their directions on the unit sphere
    tau        tau                      temperature of Eq. (3)
    threshold  threshold   in [0, 1)    what the first label's lead must exceed in Eq. (5)

Run:  python pll.py [--out runs/pll.png]    (a picture: the story of one sample's confidence)
      python -m pytest tests/test_pll.py tests/test_equations.py
"""
import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont


# ---------------------------------------------------------------------------------- candidate sets

def candidates_from_votes(votes, min_votes=1):
    """Y from the crowd (Sec. 3.1): the labels with at least `min_votes` votes, (n, K) bool.

    Eq. (1) assumes that the true label is always among them.

    A row in which no label has that many keeps its most voted labels, so no set is empty. Raises
    ValueError for a row without any vote.
    """
    top = votes.max(dim=1, keepdim=True).values                           # (n, 1)
    if (top <= 0).any():
        row = int((top <= 0).flatten().nonzero()[0])
        raise ValueError(f"row {row} has no votes; leave it out or give it some")
    if min_votes == 1:
        return votes > 0                                                  # votes may be shares
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
        matrix = matrix.maximum(chance * torch.eye(classes).roll(shift, dims=1))   # (i, i + shift)
    return matrix


def generate_candidates(labels, matrix, seed):
    """Y for data without votes (Sec. 4.2, "based on LW"): labels (n,) -> (n, K) bool.

    Each wrong label enters independently with its chance in `matrix`; the given label always does.
    The draw is on the CPU from `seed`: the same in every process.
    """
    u = torch.rand(len(labels), len(matrix), generator=torch.Generator().manual_seed(seed))
    return u < matrix[labels]                                             # (n, K)


def uniform_transition(classes, chance):
    """Every wrong label joins a set with the same chance, (K, K); the diagonal is 1."""
    return torch.eye(classes).clamp(min=chance)


def initial_confidence(candidates, votes=None):
    """C_i = Y_i / |Y_i| (Sec. 3.3.2), or with `votes` the candidates' shares of them: (n, K).

    If each class with a vote is a candidate, these shares are FER+'s soft targets (Barsoum et al.
    2016), `--method soft`.
    """
    weights = candidates.float() if votes is None else candidates * votes
    return weights / weights.sum(dim=1, keepdim=True)                     # a row sums to 1


# --------------------------------------------------------------------------------------- the losses

def pll_loss(logits, confidence):
    """Cross-entropy of the classifier's softmax against C, (B, K) each: the batch's mean, in fp32.

    Eq. (2): sum over classes j of -C_ij log zeta_j(x_i). With one candidate it is cross-entropy.
    """
    log_zeta = F.log_softmax(logits.float(), dim=1)                       # (B, K)
    return -(confidence * log_zeta).sum(dim=1).mean()                     # Eq. (2)


def uniform_loss(queries, tau=0.25):
    """How unevenly the label queries lie on the unit sphere, a scalar in fp32; (K, d).

    Eq. (3): mean over i of log sum over j of exp(t_i . t_j / tau), with t = Q / |Q|. The smallest
    value is `uniform_optimum`, at the regular simplex, if K <= d + 1. tau 0.25 is the exponent
    -2 |t_i - t_j|^2 of the paper's source [46] (Wang and Isola 2020), as that is 4 t_i . t_j - 4.
    """
    with torch.autocast(queries.device.type, enabled=False):
        t = F.normalize(queries.float(), dim=1)                           # (K, d), on the sphere
        return torch.logsumexp(t @ t.T / tau, dim=1).mean()               # Eq. (3)


def uniform_optimum(classes, tau=0.25):
    """Eq. (3) at the regular simplex, where every cosine is -1/(K-1): log(e^(1/tau) + ...)."""
    return 1 / tau + math.log1p((classes - 1) * math.exp(-(1 + 1 / (classes - 1)) / tau))


def simplex(classes, dim):
    """K unit vectors with all cosines -1/(K-1): the optimal positions t_i of Sec. 3.3.1, (K, d).

    They are known in closed form, the centred and normalised corners of the standard simplex, so
    that nothing has to be optimised beforehand. Raises ValueError if K > d + 1.
    """
    if classes > dim + 1:
        raise ValueError(f"{classes} classes have no regular simplex in {dim} dimensions")
    corners = torch.eye(classes, dtype=torch.float64) - 1 / classes       # (K, K), of rank K - 1
    basis = torch.linalg.qr(corners[:, :-1]).Q                            # (K, K-1), orthonormal
    points = F.pad(corners @ basis, (0, dim - classes + 1))               # (K, d)
    return F.normalize(points, dim=1).float()


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


def is_one_hot(confidence):
    """Rows with a single label, from the start or by revision: (B, K) -> (B,) bool."""
    return confidence.max(dim=1).values == 1


# ------------------------------------------------------------------------------ the rivals: RC, CC

def rc_update(logits, candidates):
    """C of RC (Feng et al. 2020) and PRODEN (Lv et al. 2020) for the next visit, (B, K).

    The softmax restricted to the candidates and renormalised: C_j = zeta_j / sum over Y of zeta.
    Their loss is Eq. (2) with this C; no gradient flows through it.
    """
    return logits.detach().float().masked_fill(~candidates, -math.inf).softmax(dim=1)


def cc_loss(logits, candidates):
    """CC (Feng et al. 2020): mean of -log sum over the candidates of zeta_j, a scalar in fp32.

    logits (B, K), candidates (B, K) bool. It only asks that the true label be in the set; 0 if all
    labels are candidates. Its gradient is that of Eq. (2) with C = `rc_update` of the same logits;
    RC's C is of the visit before.
    """
    logits = logits.float()
    inside = logits.masked_fill(~candidates, -math.inf).logsumexp(dim=1)  # (B,)
    return (logits.logsumexp(dim=1) - inside).mean()


# ---------------------------------------------------------------------------------------------- LW

def lw_weights(logits, candidates):
    """Weights of LW (Wen et al. 2021), (B, K): softmax inside the set and outside it, each sum 1.

    A set that holds all labels has no outside, and its weights there are 0.
    """
    return rc_update(logits, candidates) + rc_update(logits, ~candidates).nan_to_num(0.0)


def lw_loss(logits, candidates, weights, beta=1.0, kind="sigmoid"):
    """LW's loss of logits, candidates and weights, (B, K) each: the batch's mean, in fp32.

    Sum over candidates of w_j inside_j, plus beta times the sum over the others of w_j outside_j.
    kind "sigmoid": sigmoid(-g_j) and sigmoid(g_j) of the logits g; "ce" (cross-entropy): -log
    zeta_j and -log(1 - zeta_j).
    """
    g = logits.float()
    if kind == "sigmoid":
        inside, outside = torch.sigmoid(-g), torch.sigmoid(g)             # (B, K) each
    else:
        itself = torch.eye(g.shape[1], dtype=torch.bool, device=g.device)
        others = g[:, None].expand(-1, g.shape[1], -1).masked_fill(itself, -math.inf)   # (B, K, K)
        total = g.logsumexp(dim=1, keepdim=True)                          # (B, 1)
        inside, outside = total - g, total - others.logsumexp(dim=2)      # (B, K) each
    return (weights * torch.where(candidates, inside, beta * outside)).sum(dim=1).mean()


# -------------------------------------------------------------------------------------------- PiCO

def prototype_labels(features, prototypes, candidates):
    """PiCO (Wang et al. 2022): the candidate with the most similar prototype, (B,).

    features (B, d) on the unit sphere; prototypes (K, d), too, or 0 before the first feature of a
    class.
    """
    similarity = features.float() @ prototypes.T                          # (B, K)
    return similarity.masked_fill(~candidates, -math.inf).argmax(dim=1)


def moving_confidence(confidence, labels, momentum):
    """PiCO's C as an average: momentum * C + (1 - momentum) * one-hot of labels; (B, K)."""
    return momentum * confidence + (1 - momentum) * F.one_hot(labels, confidence.shape[1])


def move_prototypes(prototypes, features, labels, momentum=0.99):
    """Prototypes (K, d) after moving averages over the rows of features (B, d), in their order.

    For each row p_c <- momentum * p_c + (1 - momentum) * feature, c its label; normalised at the
    end. In closed form: p_c keeps momentum^(rows of c), and a feature that r rows of its class
    follow has the weight (1 - momentum) * momentum^r.
    """
    chosen = F.one_hot(labels, len(prototypes))                           # (B, K)
    count = chosen.sum(dim=0)                                             # (K,)
    later = count - chosen.cumsum(dim=0)                                  # (B, K), r above
    weights = (1 - momentum) * chosen * momentum ** later                 # (B, K)
    kept = momentum ** count.unsqueeze(1)                                 # (K, 1)
    return F.normalize(kept * prototypes + weights.T @ features.float(), dim=1)


def contrastive_loss(queries, keys, positive, tau=0.07):
    """Supervised contrastive loss of PiCO: queries (B, d), keys (M, d), positive (B, M) bool.

    Queries are features of faces here, tau is PiCO's own. Mean over queries of the mean over their
    positives of -log softmax(q . k / tau), in fp32. A query without any positive adds 0 (PiCO has
    none: a face's own other view is positive).
    """
    with torch.autocast(queries.device.type, enabled=False):
        log_share = (queries.float() @ keys.float().T / tau).log_softmax(dim=1)   # (B, M)
    count = positive.sum(dim=1).clamp(min=1)                              # (B,)
    return -((log_share * positive).sum(dim=1) / count).mean()


# ---------------------------------------------------------------------------------------- pictures

BLUE, GREY, RED = (60, 110, 180), (175, 175, 175), (200, 50, 40)


def bars(draw, x, y, title, values, names, chosen, note):
    """A small chart of one row, values (K,) in 0 .. 1, in 440 x 420 pixels from (x, y)."""
    small, large = ImageFont.load_default(21), ImageFont.load_default(25)
    draw.text((x, y), title, "black", large)
    for j, (name, value) in enumerate(zip(names, values)):
        top = y + 50 + 40 * j
        draw.text((x + 100, top + 13), name, "black", small, anchor="rm")
        draw.rectangle((x + 110, top, x + 110 + 220 * value, top + 26),
                       RED if j in chosen else BLUE if value else GREY)
        draw.text((x + 118 + 220 * value, top + 13), f"{round(value, 2):g}", "black", small,
                  anchor="lm")
    draw.multiline_text((x, y + 60 + 40 * len(names)), note, "black", small, spacing=8)


def story(threshold=0.1):
    """One sample from its votes to a single label, then the bound of the threshold: PIL RGB."""
    names = ["surprise", "fear", "neutral", "anger", "sadness", "happiness", "disgust"]
    votes = torch.tensor([[4.0, 5, 1, 0, 0, 0, 0]])
    candidates = candidates_from_votes(votes)
    start = initial_confidence(candidates)
    early = torch.tensor([[0.2, 0.5, -0.4, 0.3, -1, -2, -1]])           # logits of two visits
    late = torch.tensor([[-0.4, 2.2, -2.0, 0.6, -1, -4, -2]])
    sheet = Image.new("RGB", (1920, 1420), "white")
    draw, small = ImageDraw.Draw(sheet), ImageFont.load_default(21)
    bars(draw, 40, 40, "Ten people vote", (votes / 10)[0].tolist(), names, (),
         "fear has the most votes;\nvoting would keep it alone")
    bars(draw, 500, 40, "Candidate set Y (Sec. 3.1)", candidates[0].float().tolist(), names, (),
         "every label with a vote may be the\ntrue one")
    bars(draw, 960, 40, "Start: C = Y / |Y|", start[0].tolist(), names, (),
         "each of the three is believed alike")
    for k, (when, logits) in enumerate((("An early visit", early), ("A later visit", late))):
        v1, v2, id1 = (v.item() for v in top2(start, logits))           # Eq. (4)
        after = revise(start, logits, threshold)                        # Eq. (5)
        if is_one_hot(after).item():
            verdict, chosen = f"more than {threshold}: revise", (id1,)
            note = "one label for good: a one-hot row\ncan only become itself"
        else:
            verdict, chosen, note = f"not more than {threshold}: keep", (), "as it was"
        phi, x, y = torch.sigmoid(logits), 40, 500 + 450 * k
        bars(draw, x, y, f"{when}: phi = sigmoid(logits)", phi[0].tolist(), names, (),
             "the response of each label query")
        bars(draw, x + 460, y, "phi * C, Eq. (4)", (phi * start)[0].tolist(), names, (id1,),
             f"v1 - v2 = {v1:.3f} - {v2:.3f} = {v1 - v2:.3f}\n{verdict}")
        bars(draw, x + 920, y, "C afterwards, Eq. (5)", after[0].tolist(), names, chosen, note)
    draw.text((1440, 40), "At each visit", "black", ImageFont.load_default(25))
    draw.multiline_text((1440, 100), "Eq. (4) takes the two largest of phi * C.\nEq. (5) makes the "
                        "first the only label if it\nleads by more than the threshold.\n\nanger, "
                        "outside the set, has C = 0:\nhowever large its phi, it cannot win.",
                        "black", small, spacing=10)
    bound(draw, 1440, 500, threshold)
    return sheet


def bound(draw, x, y, threshold):
    """Chart of the largest possible lead 1/|Y| against the size of the set, in 450 x 760 pixels."""
    small, large, height = ImageFont.load_default(21), ImageFont.load_default(25), 540
    draw.text((x, y), "The largest lead there can be", "black", large)
    place = lambda size, value: (x + 20 + 48 * (size - 2), y + 70 + height * (1 - value / 0.55))
    for size in range(2, 9):
        lead = largest_lead(initial_confidence(torch.ones(1, size))).item()     # 1/|Y|
        a, b = place(size, lead)
        draw.rectangle((a - 14, b, a + 14, y + 70 + height), BLUE)
        draw.text((a, b - 14), f"1/{size}", "black", small, anchor="mm")
        draw.text((a, y + 90 + height), str(size), "black", small, anchor="mm")
    for value in (0.5, threshold):
        draw.line((*place(1.6, value), *place(8.4, value)), RED, 3)
        draw.multiline_text((place(8.5, value)[0], place(8, value)[1]), f"threshold\n{value:g}",
                            RED, small, anchor="lm")
    draw.multiline_text((x, y + 125 + height), "candidates |Y|\n\nAs phi <= 1, v1 - v2 <= 1/|Y|: a "
                        "threshold\nof 1/2 or more never fires from this start.", "black", small,
                        spacing=8)


def draw_matrix(draw, x, y, shades, values, names, form, cell=62):
    """A (K, K) matrix from (x, y) on: shades from -1, red, to 1, blue; values written as `form`."""
    font = ImageFont.load_default
    for i, name in enumerate(names):
        draw.text((x - 10, y + cell * (i + 0.5)), name, "black", font(22), "rm")
        draw.text((x + cell * (i + 0.5), y - 14), name[:5], "black", font(18), "mm")
        for j, shade in enumerate(shades[i]):
            left, top, fade = x + cell * j, y + cell * i, int(255 * (1 - min(abs(shade), 1)))
            draw.rectangle((left, top, left + cell - 2, top + cell - 2),
                           (fade, fade, 255) if shade > 0 else (255, fade, fade))
            draw.text((left + cell / 2, top + cell / 2), form.format(values[i][j]),
                      "white" if abs(shade) > 0.5 else "black", font(19), "mm")


def cosines(pairs, names, tau=0.25):
    """Cosine matrices of label queries beside each other: [(title, (K, d))] -> PIL RGB.

    Blue is -1, white 0 and red 1; Eq. (3) is least where all are -1/(K-1) off the diagonal.
    """
    cell, left, top = 76, 140, 90
    width = left + len(names) * cell
    sheet = Image.new("RGB", (len(pairs) * width + 40, top + len(names) * cell + 60), "white")
    draw = ImageDraw.Draw(sheet)
    for k, (title, queries) in enumerate(pairs):
        t = F.normalize(queries.float(), dim=1)                           # (K, d)
        cosine = t @ t.T                                                  # (K, K)
        draw.text((left + k * width, 20), f"{title}: Eq. (3) = "
                  f"{uniform_loss(queries, tau).item():.3f}", "black", ImageFont.load_default(25))
        draw_matrix(draw, left + k * width, top, (-cosine).tolist(), cosine.tolist(), names,
                    "{:.2f}", cell)
    return sheet


def main(argv=None):
    """Draw the story of one sample's confidence."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="runs/pll.png", help="the picture (%(default)s)")
    args = parser.parse_args(argv)
    try:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        story().save(args.out)
    except (OSError, ValueError) as error:
        print(f"error: --out: {error}; give a path ending in .png", file=sys.stderr)
        sys.exit(2)
    print(f"the story of one sample's confidence: {args.out}")


if __name__ == "__main__":
    main()
