"""The label-query decoder: each class asks the visual tokens whether it is there.

Paper: Sec. 3.3 and the right part of Fig. 2; Carion et al. 2020 (DETR) for the layer, Liu et al.
2021 (Query2Label) for one logit a class from its own output.

    symbol  name     shape         meaning
    K       classes                number of labels
    d       dim                    width of a token
    F       tokens   (B, HW, d)    visual tokens of the encoder; HW, the paper's, is N of vit.py
    Q       queries  (K, d)        one learnable embedding a label
            x        (B, K, d)     what the labels have gathered so far; starts at zero
            logits   (B, K)        sigma_logits; softmax in Eq. (2), sigmoid in Eq. (4)

Run:  python decoder.py                  (what both stages cost, from the shapes alone)
      python -m pytest tests/test_decoder.py
"""
import argparse
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from vit import MLP, initialise


class Attention(nn.Module):
    """Multi-head attention of queries (B, K, d) to keys and values (B, M, d)."""

    def __init__(self, dim, heads):
        super().__init__()
        if dim % heads:
            raise ValueError(f"a width of {dim} cannot be split among {heads} heads")
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def split(self, x):
        """(B, M, d) -> (B, heads, M, d/heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, query, key, value):
        """Attended values (B, K, d): softmax(q k^T / sqrt(d/heads)) v, head by head."""
        q, k, v = self.split(self.q(query)), self.split(self.k(key)), self.split(self.v(value))
        x = F.scaled_dot_product_attention(q, k, v)                       # (B, heads, K, d/heads)
        return self.proj(x.transpose(1, 2).flatten(2))                    # (B, K, d)

    def weights(self, query, key):
        """The attention itself, (B, heads, K, M); each row is positive and sums to 1."""
        q, k = self.split(self.q(query)), self.split(self.k(key))
        return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)   # (B, heads, K, M)


class DecoderLayer(nn.Module):
    """A decoder layer as DETR's, post-norm: self-attention, cross-attention, feed-forward.

    Unlike DETR's: GELU, a hidden width of 4 d, dropout on the branches alone, and no further norm
    behind the last layer. The queries act as positions: they are added to x for the queries and
    keys of the self-attention and for the queries of the cross-attention, never to values. The
    visual tokens already hold their positions, so nothing is added to them.
    """

    def __init__(self, dim, heads, dropout=0.1):
        super().__init__()
        self.self_attn, self.cross_attn = Attention(dim, heads), Attention(dim, heads)
        self.mlp = MLP(dim, 4 * dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def among_labels(self, x, queries):
        """Self-attention, in which a label sees the others: (B, K, d) -> (B, K, d)."""
        return self.norm1(x + self.dropout(self.self_attn(x + queries, x + queries, x)))

    def attention(self, x, queries, tokens):
        """The map of the cross-attention in `forward`, (B, heads, K, HW)."""
        return self.cross_attn.weights(self.among_labels(x, queries) + queries, tokens)

    def forward(self, x, queries, tokens):
        """x (B, K, d), queries (K, d), tokens (B, HW, d) -> (B, K, d)."""
        x = self.among_labels(x, queries)
        x = self.norm2(x + self.dropout(self.cross_attn(x + queries, tokens, tokens)))
        return self.norm3(x + self.dropout(self.mlp(x)))


class LabelDecoder(nn.Module):
    """Visual tokens (B, HW, d) -> logits (B, K), the response of each label query (Sec. 3.3).

    Logit k is the product of class k's own weight vector with its own output, plus its own bias
    (Query2Label): no class reads another's output. Permuting the classes permutes the logits.
    """

    def __init__(self, dim, classes, heads, layers=2, dropout=0.1):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(classes, dim))            # Q (K, d)
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, dropout)
                                    for _ in range(layers))
        self.weight = nn.Parameter(torch.randn(classes, dim) * 0.02)      # (K, d)
        self.bias = nn.Parameter(torch.zeros(classes))                    # (K,)
        initialise(self.layers)

    def forward(self, tokens, need_attention=False):
        """Logits (B, K); with `need_attention` also each layer's map (B, layers, heads, K, HW).

        Ask for maps in `eval()` mode: in training their dropout is not that of the logits.
        """
        x = tokens.new_zeros(len(tokens), *self.queries.shape)            # (B, K, d)
        maps = []
        for layer in self.layers:                                         # x (B, K, d)
            if need_attention:
                maps.append(layer.attention(x, self.queries, tokens))
            x = layer(x, self.queries, tokens)
        logits = (x * self.weight).sum(dim=-1) + self.bias                # (B, K, d) -> (B, K)
        return (logits, torch.stack(maps, dim=1)) if need_attention else logits


# -------------------------------------------------------------------------------------------- cost

@dataclass
class Cost:
    """Of one image forward: operations (a multiply-add is two), parameters, kept numbers.

    Kept are the activations that the backward pass needs; attention keeps no K x M matrix.
    """
    operations: int
    parameters: int
    kept: int

    def __add__(self, other):
        return Cost(self.operations + other.operations, self.parameters + other.parameters,
                    self.kept + other.kept)

    def __mul__(self, times):
        return Cost(self.operations * times, self.parameters * times, self.kept * times)


def linear_cost(tokens, inputs, outputs):
    """A linear layer with bias on some tokens; it keeps its input."""
    return Cost(2 * tokens * inputs * outputs, (inputs + 1) * outputs, tokens * inputs)


def attention_cost(queries, keys, dim, heads):
    """softmax(q k^T) v without its projections; keeps q, k, v, the result and its normalisers."""
    return Cost(4 * queries * keys * dim, 0, (queries + 2 * keys) * dim + queries * (dim + heads))


def norm_cost(tokens, dim):
    """LayerNorm, whose operations are not counted; keeps its input, means and deviations."""
    return Cost(0, 2 * dim, tokens * (dim + 2))


def block_cost(tokens, dim, heads):
    """The ViT's block: 24 N d^2 + 4 N^2 d operations, 12 d^2 + 13 d parameters."""
    hidden = 4 * dim
    # GELU's input is kept; its output, which the layer behind it reads, is computed again.
    mlp = linear_cost(tokens, dim, hidden) + linear_cost(tokens, hidden, dim)
    # What attention gives is kept once, for itself and for the projection behind it.
    project = Cost(2 * tokens * dim ** 2, dim * (dim + 1), 0)
    return norm_cost(tokens, dim) * 2 + linear_cost(tokens, dim, 3 * dim) + project + mlp \
        + attention_cost(tokens, tokens, dim, heads)


def encoder_cost(seen, patches, patch_size, dim, depth, heads):
    """The ViT on `seen` of its patches and the class token."""
    embed = linear_cost(seen, 3 * patch_size ** 2, dim) + Cost(0, (patches + 2) * dim, 0)
    return embed + block_cost(seen + 1, dim, heads) * depth + norm_cost(seen + 1, dim)


def label_decoder_cost(classes, tokens, dim, heads, layers):
    """`LabelDecoder`: most of it is the keys and values of the visual tokens, 4 HW d^2 a layer."""
    project = linear_cost(classes, dim, dim)
    inside = project * 4 + attention_cost(classes, classes, dim, heads)
    across = project * 2 + linear_cost(tokens, dim, dim) * 2 \
        + attention_cost(classes, tokens, dim, heads)
    mlp = linear_cost(classes, dim, 4 * dim) + linear_cost(classes, 4 * dim, dim)
    layer = inside + across + mlp + norm_cost(classes, dim) * 3
    return layer * layers + Cost(2 * classes * dim, classes * (2 * dim + 1), classes * dim)


def stage_costs(classes=7, image=224, patch=16, dim=768, depth=12, heads=12, mask_ratio=0.4,
                decoder_dim=512, decoder_depth=8, decoder_heads=16, layers=2):
    """Both stages, by default the paper's: {name: Cost of an image}."""
    patches = (image // patch) ** 2
    seen = int(patches * (1 - mask_ratio))
    rebuild = linear_cost(seen + 1, dim, decoder_dim) \
        + block_cost(patches + 1, decoder_dim, decoder_heads) * decoder_depth \
        + norm_cost(patches + 1, decoder_dim) + linear_cost(patches, decoder_dim, 108) \
        + Cost(0, decoder_dim, 0)                                         # the mask token
    return {"pre-training": encoder_cost(seen, patches, patch, dim, depth, heads) + rebuild,
            "training": encoder_cost(patches, patches, patch, dim, depth, heads)
            + label_decoder_cost(classes, patches, dim, heads, layers)}


# Cards: dense 16-bit operations a second as their makers state them.
CARDS = {"V100": 125e12, "A100": 312e12, "H100": 989e12}
# stage: epochs, global batch, cards (Sec. 4.2 and, for the epochs of training, MaskFeat's protocol)
PAPER = {"pre-training": (600, 192, 4), "training": (100, 320, 2)}


def cost_table(faces, utilisation=0.35):
    """Markdown lines: what the paper's settings cost for a training set of so many faces.

    Computed, not measured: forward and backward are three times forward, a card reaches
    `utilisation` of its stated rate. Memory a card: 16 bytes a parameter (weight, gradient, AdamW's
    two) and 2 bytes (16-bit autocast) for each number that is kept of its share of the batch; it
    is really more: autocast keeps LayerNorm's inputs in fp32, and 16-bit copies of the weights.
    The paper trains on two cards; that stage is also shown on four.
    """
    lines = ["| stage | parameters | GFLOP an image | cards | GB a card | "
             + " | ".join(f"hours on {card}" for card in CARDS) + " |",
             "|---" * (5 + len(CARDS)) + "|"]
    costs = stage_costs()
    rows = [(stage, cards) for stage, (_, _, cards) in PAPER.items()] + [("training", 4)]
    for stage, cards in rows:
        cost, (epochs, batch, _) = costs[stage], PAPER[stage]
        work = 3 * cost.operations * faces * epochs
        memory = (16 * cost.parameters + 2 * cost.kept * batch / cards) / 1e9
        hours = [work / (cards * rate * utilisation) / 3600 for rate in CARDS.values()]
        lines.append(f"| {stage}, {epochs} epochs | {cost.parameters / 1e6:.1f} M | "
                     f"{3 * cost.operations / 1e9:.1f} | {cards} | {memory:.1f} | "
                     + " | ".join(f"{h:.2f}" for h in hours) + " |")
    return lines


# ---------------------------------------------------------------------------------------- pictures

def heat(face, attention, pixels):
    """One attention map (HW,) laid over a PIL face: the redder, the more it is looked at."""
    side = round(len(attention) ** 0.5)
    share = attention.reshape(side, side) / attention.max()              # 0 .. 1
    mask = Image.fromarray((share * 190).byte().numpy())                 # opacity of the red
    grey = face.convert("L").convert("RGB").resize((pixels, pixels), Image.Resampling.BICUBIC)
    grey.paste((215, 30, 20), mask=mask.resize((pixels, pixels), Image.Resampling.BICUBIC))
    return grey


def attention_picture(faces, maps, zeta, names, titles):
    """Where each label looks: a row a class, a column a face (Sec. 3.3); PIL RGB.

    faces: list of n PIL images; maps (n, layers, heads, K, HW) of `LabelDecoder`, of which the last
    layer's mean over heads is shown, each map scaled by its own maximum; zeta (n, K): the
    softmax of the logits, written into each cell; titles: n lists of lines above the faces.
    """
    pixels, left, gap = 170, 150, 10
    top = 100 + pixels
    small, large = ImageFont.load_default(20), ImageFont.load_default(22)
    size = (left + len(faces) * (pixels + gap), top + len(names) * (pixels + gap))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    maps = maps[:, -1].mean(dim=1).float().cpu()                         # (n, K, HW)
    for i, face in enumerate(faces):
        x = left + i * (pixels + gap)
        draw.multiline_text((x, 8), "\n".join(titles[i]), "black", small, spacing=6)
        sheet.paste(face.convert("RGB").resize((pixels, pixels), Image.Resampling.BICUBIC), (x, 85))
        for k, name in enumerate(names):
            y = top + k * (pixels + gap)
            sheet.paste(heat(face, maps[i, k], pixels), (x, y))
            ink = "firebrick" if zeta[i, k] == zeta[i].max() else "black"
            draw.rectangle((x, y, x + 58, y + 28), "white")
            draw.text((x + 5, y + 3), f"{zeta[i, k].item():.0%}", ink, small)
            if not i:
                draw.text((left - 12, y + pixels / 2), name, "black", large, anchor="rm")
    return sheet


def main(argv=None):
    """Print the cost table."""
    parser = argparse.ArgumentParser(description="What both stages cost at the paper's settings.")
    parser.add_argument("--faces", type=int, default=12_271, help="training faces (RAF-DB's)")
    parser.add_argument("--utilisation", type=float, default=0.35, help="share of the stated rate")
    args = parser.parse_args(argv)
    if args.faces < 1 or not 0 < args.utilisation <= 1:
        parser.error("give --faces from 1 and --utilisation above 0, at most 1")
    print("\n".join(cost_table(args.faces, args.utilisation)))
    print(f"computed, not measured: {args.faces:,} faces, {args.utilisation:.0%} of the cards' "
          "rates as their makers state them")


if __name__ == "__main__":
    main()
