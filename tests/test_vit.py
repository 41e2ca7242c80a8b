"""vit.py: against torchvision's ViT, and the properties that masked pre-training relies on."""
import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import vision_transformer as tv

from decoder import LabelDecoder
from vit import (MLP, Block, ViT, drop_path, from_torchvision, interpolate_positions,
                 patchify, take, unpatchify, wave_positions)

SMALL = dict(image_size=32, patch_size=8, dim=24, depth=3, heads=3)


def torchvision_pair():
    """Our ViT and torchvision's with the same random weights, positions and head included."""
    torch.manual_seed(0)
    theirs = tv.VisionTransformer(image_size=32, patch_size=8, num_layers=3, num_heads=3,
                                  hidden_dim=24, mlp_dim=96, num_classes=5)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    ours = ViT(**SMALL, classes=5)
    ours.load_state_dict(from_torchvision(theirs.state_dict()))
    return ours.eval(), theirs.eval()


def test_logits_and_gradients_equal_torchvision():
    ours, theirs = torchvision_pair()
    images = torch.randn(4, 3, 32, 32)
    ours_x, theirs_x = images.clone().requires_grad_(), images.clone().requires_grad_()
    a, b = ours.classify(ours_x), theirs(theirs_x)
    assert (a - b).abs().max() < 1e-5
    a.square().sum().backward()
    b.square().sum().backward()
    gradients = from_torchvision({n: p.grad for n, p in theirs.named_parameters()})
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours_x.grad, theirs_x.grad, rtol=1e-4, atol=1e-4)


def test_the_names_that_torchvisions_weights_were_saved_with_are_read():
    """IMAGENET1K_V1 has those of before torchvision 0.12, whose own models rename them."""
    state = tv.VisionTransformer(32, 8, 3, 3, 24, 96, num_classes=5).state_dict()
    old = {name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): value
           for name, value in state.items()}
    assert old.keys() != state.keys()
    now, before = from_torchvision(state), from_torchvision(old)
    assert now.keys() == before.keys() and all(now[k].equal(before[k]) for k in now)


def test_vit_b_16_equals_torchvision_and_has_its_parameters():
    torch.manual_seed(0)
    theirs = tv.vit_b_16(weights=None).eval()
    torch.nn.init.normal_(theirs.heads.head.weight, std=0.02)
    ours = ViT(classes=1000).eval()
    ours.load_state_dict(from_torchvision(theirs.state_dict()))
    assert sum(p.numel() for p in ours.parameters()) == 86_567_656
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert (ours.classify(images) - theirs(images)).abs().max() < 1e-5


def plain_mlp(mlp, x):
    """`MLP` as autograd would keep it."""
    return mlp.fc2(F.gelu(mlp.fc1(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])    # as on a CPU, and on a card
def test_the_mlp_that_computes_gelu_again_is_the_plain_one(dtype):
    torch.manual_seed(0)
    mlp, found = MLP(5, 20), []
    for function in (mlp, lambda x: plain_mlp(mlp, x)):
        x = torch.linspace(-2, 2, 30).reshape(2, 3, 5).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = function(x)
        y.float().square().sum().backward()
        found.append([y, x.grad, *(p.grad.clone() for p in mlp.parameters())])
        mlp.zero_grad()
    for ours, plain in zip(*found):
        assert ours.equal(plain) and ours.dtype == plain.dtype


def test_the_mlp_does_not_keep_what_it_computes_again():
    mlp, x = MLP(5, 20), torch.randn(2, 3, 5)
    for function, keeps in ((mlp, False), (lambda x: plain_mlp(mlp, x), True)):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            function(x)
        assert any(t.equal(F.gelu(mlp.fc1(x)).reshape(t.shape)) for t in kept
                   if t.numel() == 2 * 3 * 20) == keeps


def test_an_image_that_is_not_square_is_an_error_with_and_without_keep():
    for keep in (None, torch.zeros(1, 2, dtype=torch.long)):
        with pytest.raises(ValueError, match="images are square, not of 32 x 48"):
            ViT(**SMALL)(torch.rand(1, 3, 32, 48), keep)


def test_patchify_order_and_round_trip():
    images = torch.arange(2 * 3 * 8 * 8.0).reshape(2, 3, 8, 8)
    patches = patchify(images, 4)
    assert patches.shape == (2, 4, 48)
    for n, (row, column) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        assert patches[1, n].equal(images[1, :, row:row + 4, column:column + 4].flatten())
    assert unpatchify(patches, 4).equal(images)


def test_keep_all_patches_in_any_order_is_the_whole_image():
    torch.manual_seed(0)
    model, images = ViT(**SMALL).eval(), torch.randn(2, 3, 32, 32)
    order = torch.stack([torch.randperm(16) for _ in range(2)])
    whole, shuffled = model(images), model(images, order)
    torch.testing.assert_close(shuffled[:, 0], whole[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shuffled[:, 1:], take(whole[:, 1:], order), rtol=1e-4, atol=1e-5)


def test_hidden_patches_do_not_matter():
    torch.manual_seed(0)
    model, images = ViT(**SMALL).eval(), torch.randn(1, 3, 32, 32)
    keep = torch.tensor([[0, 3, 7, 12]])
    before = model(images, keep)
    patches = patchify(images, 8)
    hidden = [n for n in range(16) if n not in keep[0].tolist()]
    patches[:, hidden] += torch.randn(1, len(hidden), 192) * 100
    assert model(unpatchify(patches, 8), keep).equal(before)
    assert before.shape == (1, 5, 24)


def test_positions_interpolate_to_another_grid():
    positions = torch.randn(1, 1 + 16, 24)
    assert interpolate_positions(positions, 4) is positions
    larger = interpolate_positions(positions, 8)
    assert larger.shape == (1, 65, 24) and larger[:, 0].equal(positions[:, 0])
    ramp = torch.zeros(1, 17, 2)                       # column and row of each patch's centre
    ramp[0, 1:, 0] = torch.arange(16) % 4 + 0.5
    ramp[0, 1:, 1] = torch.arange(16) // 4 + 0.5
    finer = interpolate_positions(ramp, 8)[0, 1:].reshape(8, 8, 2)[2:6, 2:6]    # inside the border
    centres = torch.arange(2, 6) / 2 + 0.25            # centres of a grid twice as fine
    torch.testing.assert_close(finer[..., 0], centres.expand(4, 4), rtol=0, atol=0.05)
    torch.testing.assert_close(finer[..., 1], centres[:, None].expand(4, 4), rtol=0, atol=0.05)
    assert ViT(**SMALL)(torch.randn(2, 3, 48, 48)).shape == (2, 37, 24)


def test_drop_path_keeps_the_mean_and_is_off_in_evaluation():
    torch.manual_seed(0)
    x = torch.ones(20_000, 1, 1)
    dropped = drop_path(x, 0.25, training=True)
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs(dropped.mean().item() - 1) < 0.02
    assert drop_path(x, 0.25, training=False) is x
    rates = [block.drop_path_rate for block in ViT(**SMALL, drop_path_rate=0.1).blocks]
    assert rates == [0.0, 0.05, 0.1]


@pytest.mark.parametrize("call, message", [
    (lambda: patchify(torch.zeros(1, 3, 30, 32), 8), "multiples of 8"),
    (lambda: ViT(image_size=30, patch_size=8), "not a multiple of patch size 8"),
    (lambda: ViT(dim=100, heads=3), "cannot be split among 3 heads"),
    (lambda: from_torchvision({"a": torch.zeros(1)}), "no conv_proj.weight")])
def test_errors_name_the_cause(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_drop_path_drops_each_branch_by_itself():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 8).expand(400, -1, -1)
    kinds = Block(8, 2, drop_path_rate=0.5)(x).detach().mul(1e3).round().unique(dim=0)
    assert len(kinds) == 4                                 # with both, either and neither branch


def test_a_block_drops_nothing_in_evaluation():
    torch.manual_seed(0)
    block, x = Block(8, 2, drop_path_rate=0.5).eval(), torch.randn(50, 3, 8)
    y = x + block.attn(block.norm1(x))
    assert block(x).equal(y + block.mlp(block.norm2(y)))


def test_waves_of_the_positions_one_number_at_a_time():
    """For patch (row, column): sine, cosine of column / 10,000^(i/2), then of the row's."""
    waves = wave_positions(8, 3)[0]
    assert waves[0].eq(0).all()                                      # the class token has no place
    for n in range(9):
        for i in range(2):
            row, column = n // 3 / 10_000 ** (i / 2), n % 3 / 10_000 ** (i / 2)
            assert waves[1 + n, i::2].tolist() == pytest.approx(
                [math.sin(column), math.cos(column), math.sin(row), math.cos(row)], abs=1e-6)


def test_linear_layers_start_as_glorot_and_bengio_have_it():
    torch.manual_seed(0)
    for model in (ViT(**SMALL), LabelDecoder(24, 7, 3)):
        for layer in (m for m in model.modules() if isinstance(m, torch.nn.Linear)):
            bound = math.sqrt(6 / sum(layer.weight.shape))
            assert 0.9 * bound < layer.weight.abs().max() <= bound and layer.bias.eq(0).all()
