"""The Vision Transformer: the encoder of both stages.

Paper: Sec. 3.2 and 4.2 (ViT-B/16 at 224 x 224, "the same structure with ViT [11]"); Dosovitskiy et
al. 2021, with the layer layout of torchvision's `vit_b_16`, whose weights this file reads.

    symbol  name      shape         meaning
    x       images    (B, 3, H, H)  normalised RGB images, H = image_size
    P       patch_size              side of a patch in pixels; the grid has H/P x H/P patches
    N       grid ** 2               number of patches, (H/P)^2
    d       dim                     width of a token
            tokens    (B, 1+N, d)   the output: the class token first, then the visual tokens
            keep      (B, V)        indices of the V visible patches, when only those are encoded

Run:  python -m pytest tests/test_vit.py
"""
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def patchify(images, patch_size):
    """Cut images into patches, row by row.

    images (B, C, H, W), C channels, H and W multiples of patch_size -> (B, N, C*P*P), a patch's
    numbers in the order channel, row, column. The inverse is `unpatchify`. Raises ValueError if a
    side does not divide.
    """
    batch, channels, height, width = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"an image of {height} x {width} pixels cannot be cut into patches of "
                         f"{patch_size}: make both sides multiples of {patch_size}")
    rows, columns = height // patch_size, width // patch_size
    x = images.reshape(batch, channels, rows, patch_size, columns, patch_size)   # each side in two
    x = x.permute(0, 2, 4, 1, 3, 5)                       # (B, rows, columns, C, P, P)
    return x.reshape(batch, rows * columns, -1)           # (B, N, C*P*P)


def unpatchify(patches, patch_size):
    """Inverse of `patchify` for square images: (B, N, C*P*P) -> (B, C, H, H)."""
    batch, count, _ = patches.shape
    side = round(count ** 0.5)
    x = patches.reshape(batch, side, side, -1, patch_size, patch_size)   # (B, side, side, C, P, P)
    x = x.permute(0, 3, 1, 4, 2, 5)                       # (B, C, side, P, side, P)
    return x.reshape(batch, -1, side * patch_size, side * patch_size)     # (B, C, H, H)


def take(tokens, index):
    """Pick tokens by index, a list for each image: (B, N, d) and (B, V) -> (B, V, d)."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def interpolate_positions(positions, grid):
    """Learned positions for another grid (2-D interpolation, as Dosovitskiy et al.).

    positions (1, 1+n*n, d), the class token's first -> (1, 1+grid*grid, d). The class token's
    position stays as it is; the same grid returns the argument itself.
    """
    side = round((positions.shape[1] - 1) ** 0.5)
    if side == grid:
        return positions
    first, rest = positions[:, :1], positions[:, 1:]
    rest = rest.reshape(1, side, side, -1).permute(0, 3, 1, 2)           # (1, d, n, n)
    rest = F.interpolate(rest, (grid, grid), mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([first, rest.flatten(2).transpose(1, 2)], dim=1)    # (1, 1+grid*grid, d)


def wave_positions(dim, grid):
    """2-D sine and cosine waves (MAE's), (1, 1+N, d): the ViT's positions begin as these.

    A quarter of the width each: sine of the column, its cosine, sine of the row, its cosine, with
    wavelengths from 2 pi to nearly 10,000 * 2 pi patches; the class token's position is 0.
    """
    if dim % 4:
        raise ValueError(f"a width of {dim} is not a multiple of 4, as positions need")
    frequency = 10_000.0 ** (-torch.arange(dim // 4) / (dim / 4))         # (d/4,)
    angle = torch.arange(float(grid))[:, None] * frequency                # (grid, d/4)
    row = angle[:, None].expand(-1, grid, -1)                             # (grid, grid, d/4)
    column = angle[None].expand(grid, -1, -1)
    waves = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=-1)
    return torch.cat([torch.zeros(1, dim), waves.reshape(-1, dim)])[None]   # (1, 1+N, d)


def drop_path(x, rate, training):
    """Stochastic depth (Huang et al. 2016): drop a residual branch for whole samples, x (B, N, d).

    A kept branch is divided by the probability of being kept, so that the expectation stays.
    """
    if rate == 0.0 or not training:
        return x
    chance = 1.0 - rate                                   # of being kept
    kept = torch.rand(x.shape[0], 1, 1, device=x.device) < chance        # (B, 1, 1)
    return x * kept / chance


class MLP(nn.Module):
    """Two linear layers with an exact GELU between: (..., d) -> (..., d)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        # The backward pass computes gelu(x) again. To keep it would be a quarter of all the numbers
        # that a block keeps. (The product after it is not computed again.)
        return checkpoint(lambda x: self.fc2(F.gelu(x)), self.fc1(x), use_reentrant=False,
                          preserve_rng_state=False)       # (..., d) -> (..., hidden) -> (..., d)


class SelfAttention(nn.Module):
    """Multi-head self-attention softmax(q k^T / sqrt(d/heads)) v: (B, N, d) -> (B, N, d).

    One product for q, k and v.
    """

    def __init__(self, dim, heads):
        super().__init__()
        if dim % heads:
            raise ValueError(f"a width of {dim} cannot be split among {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))   # (B, N, 3, heads, d/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)              # (B, heads, N, d/heads) each
        x = F.scaled_dot_product_attention(q, k, v)       # (B, heads, N, d/heads)
        return self.proj(x.transpose(1, 2).flatten(2))    # (B, N, d)


class Block(nn.Module):
    """Pre-norm Transformer block: x + attention(norm(x)), then x + mlp(norm(x)); (B, N, d)."""

    def __init__(self, dim, heads, drop_path_rate=0.0):
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, 4 * dim)

    def forward(self, x):
        x = x + drop_path(self.attn(self.norm1(x)), self.drop_path_rate, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path_rate, self.training)


class ViT(nn.Module):
    """Vision Transformer (Sec. 3.2: "the same structure with ViT") that returns all its tokens.

    The defaults are ViT-B/16 at 224. Drop path grows linearly from 0 at the first block to
    `drop_path_rate` at the last. With `classes` > 0 there is the linear head of the ImageNet model
    (on the class token), used by `classify` alone.
    """

    def __init__(self, image_size=224, patch_size=16, dim=768, depth=12, heads=12,
                 drop_path_rate=0.0, classes=0):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image size {image_size} is not a multiple of patch size "
                             f"{patch_size}")
        self.patch_size, self.dim, self.grid = patch_size, dim, image_size // patch_size
        self.patch_embed = nn.Linear(3 * patch_size ** 2, dim)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(wave_positions(dim, self.grid))     # (1, 1+N, d)
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, classes) if classes else None
        initialise(self)

    def embed(self, images, keep=None):
        """Images (B, 3, H, H) -> patch tokens with their positions, (B, N, d) or (B, V, d).

        With `keep` (B, V) the other patches are left out before anything is computed from them.
        Images of another size than the model's are given interpolated positions. Raises ValueError
        for images that are not square, or that patches do not divide.
        """
        if images.shape[-2] != images.shape[-1]:
            raise ValueError(f"images are square, not of {images.shape[-2]} x {images.shape[-1]}")
        patches = patchify(images, self.patch_size)                       # (B, N, 3*P*P)
        grid = images.shape[-1] // self.patch_size
        positions = interpolate_positions(self.positions, grid)[:, 1:]    # (1, N, d)
        if keep is not None:
            patches = take(patches, keep)                                 # (B, V, 3*P*P)
            positions = take(positions.expand(len(images), -1, -1), keep)   # (B, V, d)
        return self.patch_embed(patches) + positions                      # (B, V or N, d)

    def encode(self, tokens):
        """Patch tokens (B, V, d) -> class token and visual tokens after all blocks (B, 1+V, d)."""
        first = (self.class_token + self.positions[:, :1]).expand(len(tokens), -1, -1)
        x = torch.cat([first, tokens], dim=1)             # (B, 1+V, d)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, images, keep=None):
        """Images (B, 3, H, H) -> tokens (B, 1+N, d), or (B, 1+V, d) of the patches in `keep`."""
        return self.encode(self.embed(images, keep))

    def classify(self, images):
        """ImageNet logits (B, classes) from the class token; needs `classes` > 0."""
        return self.head(self(images)[:, 0])              # (B, 1+N, d) -> (B, classes)


def initialise(module):
    """Xavier-uniform weights and zero biases for all linear layers (He et al. 2022, MAE)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


def from_torchvision(state):
    """Rename a state dict of torchvision's `vit_b_16` (any size of it) to the names of `ViT`.

    The patch convolution (d, 3, P, P) becomes the weight (d, 3*P*P) of the linear layer on
    patches. Raises ValueError if the dict is not such a model's.
    """
    names = [("conv_proj", "patch_embed"), ("encoder.pos_embedding", "positions"),
             ("encoder.layers.encoder_layer_", "blocks."), ("encoder.ln.", "norm."),
             ("heads.head", "head"), ("ln_1", "norm1"), ("ln_2", "norm2"),
             ("self_attention.in_proj_", "attn.qkv."), ("self_attention.out_proj", "attn.proj"),
             ("mlp.linear_1", "mlp.fc1"), ("mlp.linear_2", "mlp.fc2"),     # before torchvision 0.12
             ("mlp.0", "mlp.fc1"), ("mlp.3", "mlp.fc2")]
    if "conv_proj.weight" not in state:
        raise ValueError("not a state dict of torchvision's vision transformer: it has no "
                         "conv_proj.weight")
    renamed = {}
    for name, value in state.items():
        for theirs, ours in names:
            name = name.replace(theirs, ours)
        renamed[name] = value.flatten(1) if name == "patch_embed.weight" else value
    return renamed
