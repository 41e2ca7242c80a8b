"""The label-query decoder: each class asks the visual tokens whether it is there.

Paper: Sec. 3.3 and the right part of Fig. 2; Carion et al. 2020 (DETR) for the layer, Liu et al.
2021 (Query2Label) for one logit a class from its own output.

    symbol  name     shape         meaning
    K       classes                number of labels
    d       dim                    width of a token
    F       tokens   (B, HW, d)    visual tokens of the encoder
    Q       queries  (K, d)        one learnable embedding a label
            x        (B, K, d)     what the labels have gathered so far; starts at zero
            logits   (B, K)        sigma_logits; softmax in Eq. (2), sigmoid in Eq. (4)

Run:  python -m pytest tests/test_decoder.py
"""
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
        return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)


class DecoderLayer(nn.Module):
    """DETR's decoder layer, post-norm: self-attention, cross-attention, feed-forward.

    The queries act as positions: they are added to x for the queries and keys of the self-attention
    and for the queries of the cross-attention, never to values. The visual tokens already hold
    their positions, so nothing is added to them.
    """

    def __init__(self, dim, heads, mlp_ratio=4.0, dropout=0.1):
        super().__init__()
        self.self_attn, self.cross_attn = Attention(dim, heads), Attention(dim, heads)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, queries, tokens):
        """x (B, K, d), queries (K, d) or (B, K, d), tokens (B, HW, d) -> (B, K, d)."""
        x = self.norm1(x + self.dropout(self.self_attn(x + queries, x + queries, x)))
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
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, dropout=dropout)
                                    for _ in range(layers))
        self.weight = nn.Parameter(torch.randn(classes, dim) * 0.02)      # (K, d)
        self.bias = nn.Parameter(torch.zeros(classes))                    # (K,)
        initialise(self.layers)

    def forward(self, tokens, need_attention=False):
        """Logits (B, K); with `need_attention` also each layer's map (B, layers, heads, K, HW)."""
        x = torch.zeros(len(tokens), *self.queries.shape, dtype=tokens.dtype, device=tokens.device)
        maps = []
        for layer in self.layers:                                         # x (B, K, d)
            if need_attention:
                before = layer.norm1(x + layer.self_attn(x + self.queries, x + self.queries, x))
                maps.append(layer.cross_attn.weights(before + self.queries, tokens))
            x = layer(x, self.queries, tokens)
        logits = (x * self.weight).sum(dim=-1) + self.bias                # (B, K, d) -> (B, K)
        return (logits, torch.stack(maps, dim=1)) if need_attention else logits


# ---------------------------------------------------------------------------------------- pictures

def heat(face, attention, pixels):
    """One attention map (HW,) laid over a PIL face: the redder, the more it is looked at."""
    side = round(len(attention) ** 0.5)
    share = attention.reshape(side, side) / attention.max()              # 0 .. 1
    mask = Image.fromarray((share * 190).byte().numpy())                 # opacity of the red
    grey = face.convert("L").convert("RGB").resize((pixels, pixels), Image.Resampling.BICUBIC)
    grey.paste((215, 30, 20), mask=mask.resize((pixels, pixels), Image.Resampling.BICUBIC))
    return grey


def attention_picture(faces, maps, shares, names, titles, pixels=170):
    """Where each label looks: a row a class, a column a face (Sec. 3.3); PIL RGB.

    faces: list of n PIL images; maps (n, layers, heads, K, HW) of `LabelDecoder`, of which the last
    layer's mean over heads is shown, each map scaled by its own maximum; shares (n, K): the
    softmax, written into each cell; titles: n lists of lines above the faces.
    """
    left, gap, top = 150, 10, 100 + pixels
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
            text = f"{shares[i, k].item():.0%}"
            draw.rectangle((x, y, x + 58, y + 28), "white")
            draw.text((x + 5, y + 3), text, "firebrick" if shares[i, k] == shares[i].max()
                      else "black", small)
            if not i:
                draw.text((left - 12, y + pixels / 2), name, "black", large, anchor="rm")
    return sheet
