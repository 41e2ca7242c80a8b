"""pretrain.py: masks, what the prediction may depend on, loss, schedule, checkpoints."""
import math

import pytest
import torch

import pretrain
from conftest import DECODER, given_to_fit
from datasets import InputError
from hog import hog_targets
from pretrain import (MaskedModel, draw_masks, learning_rate, load_checkpoint, load_weights,
                      make_targets, masked_count, masked_mse, parameter_groups, random_mask,
                      save_checkpoint, visible)
from vit import ViT, patchify, unpatchify

SMALL = dict(image_size=32, patch_size=8, dim=24, depth=2, heads=3)


def make_model(kind="visible"):
    torch.manual_seed(0)
    return MaskedModel(ViT(**SMALL), 108, dim=12, depth=1, heads=2, kind=kind).eval()


def test_the_paper_masks_79_of_196_patches():
    assert masked_count(196, 0.4) == 79
    assert masked_count(36, 0.4) == 15 and masked_count(16, 0.5) == 8


@pytest.mark.parametrize("grid, count", [(14, 79), (6, 15), (4, 6), (14, 1), (14, 195)])
def test_masks_have_the_exact_count(grid, count):
    for kind in ("block", "random"):
        masks = draw_masks(kind, range(0, 50), grid, count, seed=1)
        assert masks.shape == (50, grid * grid) and masks.dtype == torch.bool
        assert masks.sum(1).eq(count).all()
        assert len({tuple(m.tolist()) for m in masks}) > 1


def test_a_row_has_the_same_mask_however_the_batch_is_divided():
    for kind in ("block", "random"):
        whole = draw_masks(kind, range(0, 8), 14, 79, seed=5)
        parts = [draw_masks(kind, range(i, i + 4), 14, 79, seed=5) for i in (0, 4)]
        assert torch.cat(parts).equal(whole)
        assert not draw_masks(kind, range(0, 8), 14, 79, seed=6).equal(whole)


def test_random_masking_is_uniform_and_block_masking_comes_in_blocks():
    frequency = random_mask(4000, 6, 15, seed=0).float().mean(0)
    assert (frequency - 15 / 36).abs().max() < 0.05

    def neighbours(mask):                        # how often the patch to the right is masked too
        m = mask.reshape(14, 14)
        return (m[:, :-1] & m[:, 1:]).sum() / m[:, :-1].sum()
    blocks, scattered = ([neighbours(m) for m in draw_masks(kind, range(50), 14, 79, seed=0)]
                         for kind in ("block", "random"))
    assert sum(blocks) / 50 > 0.7 > 0.5 > sum(scattered) / 50


def test_visible_is_the_rest_in_order():
    mask = random_mask(5, 4, 6, seed=3)
    keep = visible(mask)
    for row in range(5):
        assert keep[row].tolist() == [n for n in range(16) if not mask[row, n]]


@pytest.mark.parametrize("kind", ["visible", "maskfeat"])
def test_masked_pixels_cannot_change_the_prediction(kind):
    model, mask = make_model(kind), random_mask(3, 4, 6, seed=0)
    images = torch.randn(3, 3, 32, 32)
    before = model(images, mask)
    assert before.shape == (3, 16, 108)
    patches = patchify(images, 8)
    patches[mask] = torch.randn_like(patches[mask]) * 50
    assert model(unpatchify(patches, 8), mask).equal(before)
    patches[0, visible(mask)[0, 0]] += 1.0                      # a visible one does change it
    assert not model(unpatchify(patches, 8), mask)[0].equal(before[0])


def test_the_decoder_puts_visible_tokens_where_they_came_from():
    """Hiding other patches moves the visible tokens' rows, but each keeps its own position."""
    model, images = make_model(), torch.randn(1, 3, 32, 32)
    seen = {}
    model.blocks[0].register_forward_hook(lambda m, inputs, out: seen.update(x=inputs[0]))
    mask = random_mask(1, 4, 6, seed=0)
    model(images, mask)
    tokens = model.narrow(model.encoder(images, visible(mask)))
    x = (seen["x"] - model.waves)[0, 1:]
    for row, n in enumerate(visible(mask)[0].tolist()):
        torch.testing.assert_close(x[n], tokens[0, 1 + row], rtol=1e-4, atol=1e-5)
    for n in mask[0].nonzero().flatten().tolist():
        torch.testing.assert_close(x[n], model.mask_token[0, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["visible", "maskfeat"])
def test_the_start_of_what_follows_the_encoder(kind):
    """Xavier-uniform linear layers, but small weights in the last one: it starts near 0, as HOG's
    entries are small and the mean of normalised pixels is 0."""
    torch.manual_seed(0)
    model = MaskedModel(ViT(32, 8, dim=64, depth=1, heads=2), 108, dim=128, depth=1, heads=2,
                        kind=kind)
    for small in (model.predict.weight, model.mask_token):
        assert small.std().item() == pytest.approx(0.02, rel=0.2)
    assert (model.predict.bias == 0).all()
    if kind == "visible":
        for layer in (model.narrow, model.blocks[0].mlp.fc1):
            bound = (6 / sum(layer.weight.shape)) ** 0.5
            assert layer.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
            assert (layer.bias == 0).all()


def test_the_loss_is_the_mean_over_masked_patches_alone():
    torch.manual_seed(0)
    prediction, target = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    mask = random_mask(2, 2, 2, seed=0)
    total, count = 0.0, 0
    for b in range(2):
        for n in range(4):
            if mask[b, n]:
                error = prediction[b, n] - target[b, n]
                total += sum(error[t].item() ** 2 for t in range(3)) / 3
                count += 1
    assert masked_mse(prediction, target, mask).item() == pytest.approx(total / count, rel=1e-5)
    prediction[~mask] += 100
    assert masked_mse(prediction, target, mask).item() == pytest.approx(total / count, rel=1e-5)


def test_pixel_target_is_normalised_a_patch_at_a_time():
    images = torch.rand(2, 3, 32, 32)
    target = make_targets(images, "pixel", 8)
    patch = images[1, :, 8:16, 0:8].flatten()                    # patch 4: row 1, column 0
    expected = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
    assert target.shape == (2, 16, 192)
    torch.testing.assert_close(target[1, 4], expected)
    assert make_targets(images, "hog", 8).equal(hog_targets(images, 8))


def test_one_batch_can_be_learned_by_heart():
    torch.manual_seed(0)
    model = MaskedModel(ViT(**SMALL), 108, dim=24, depth=1, heads=2)
    images, mask = torch.rand(4, 3, 32, 32), random_mask(4, 4, 6, seed=0)
    target = hog_targets(images, 8)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(400):
        loss = masked_mse(model(images, mask), target, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trivial = masked_mse(target.mean((0, 1), keepdim=True), target, mask)
    assert loss < trivial / 50


def test_schedule_rises_and_falls_as_a_cosine():
    rates = [learning_rate(s, 100, 10, 1.0, floor=0.0) for s in range(101)]
    assert rates[0] == 0 and rates[5] == 0.5 and rates[10] == 1 and rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0, abs=1e-9)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(0, 100, 0, 1.0) == 1.0


def test_every_parameter_is_in_one_group_with_its_layers_rate():
    model = make_model()
    groups = parameter_groups(model, 0.05, depth=2, layer_decay=0.5)
    found = {id(p): g for g in groups for p in g["params"]}
    assert len(found) == len(list(model.parameters())) == sum(len(g["params"]) for g in groups)
    of = lambda name: found[id(model.get_parameter(name))]
    assert of("encoder.patch_embed.weight")["scale"] == 0.125
    assert [of(f"encoder.blocks.{i}.mlp.fc1.weight")["scale"] for i in (0, 1)] == [0.25, 0.5]
    assert of("encoder.norm.weight")["scale"] == of("predict.weight")["scale"] == 1.0
    assert of("predict.weight")["weight_decay"] == 0.05
    for name in ("predict.bias", "encoder.norm.weight", "encoder.positions", "encoder.class_token",
                 "mask_token"):
        assert of(name)["weight_decay"] == 0


def test_checkpoints_are_whole_or_refused(tmp_path):
    path = tmp_path / "last.pt"
    whole = {"stage": "pretrain", "log": [], "config": {}, "model": {"x": torch.arange(3)}}
    save_checkpoint(path, whole)
    assert load_checkpoint(path, "pretrain")["model"]["x"].tolist() == [0, 1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
    with pytest.raises(InputError, match="a checkpoint of pretrain.py; train.py's is needed"):
        load_checkpoint(path, "train")
    for key in ("log", "config", "model"):
        torch.save({k: v for k, v in whole.items() if k != key}, path)
        with pytest.raises(InputError, match=f"has no {key}; a checkpoint of pretrain.py holds"):
            load_checkpoint(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="not a readable checkpoint"):
        load_checkpoint(path)
    torch.save({"weights": 1}, path)
    with pytest.raises(InputError, match="not a checkpoint of pretrain.py or train.py"):
        load_checkpoint(path)


def test_weights_of_another_model_are_counted_and_refused():
    model, weights = ViT(**SMALL), ViT(**SMALL).state_dict()
    load_weights(model, weights, "x.pt")
    assert model.positions.equal(weights["positions"])
    weights["norm.weight"] = torch.zeros(3)
    del weights["norm.bias"]
    with pytest.raises(InputError,
                       match=r"1 missing, 0 superfluous, 1 of other shape; first: norm.w"):
        load_weights(model, weights, "x.pt")


def test_the_floor_is_never_undercut_unless_the_peak_is():
    assert {learning_rate(s, 50, 5, 0.0) for s in range(51)} == {0.0}
    assert min(learning_rate(s, 50, 5, 1e-3) for s in range(51)) == pytest.approx(1e-6)
    assert math.isclose(max(learning_rate(s, 50, 5, 1e-3) for s in range(51)), 1e-3)


def test_masked_tokens_have_their_positions_at_maskfeats_encoder_too():
    with torch.no_grad():
        said = make_model("maskfeat")(torch.randn(1, 3, 32, 32), torch.ones(1, 16).bool())[0]
    assert len(said.mul(1e4).round().unique(dim=0)) == 16


@pytest.mark.parametrize("kind", ["visible", "maskfeat"])
def test_row_n_of_the_prediction_is_read_from_patch_n(kind):
    model, seen = make_model(kind), []
    last = model.norm if kind == "visible" else model.encoder.norm
    last.register_forward_hook(lambda module, given, out: seen.append(out))
    said = model(torch.randn(3, 3, 32, 32), random_mask(3, 4, 6, seed=0))
    assert said.equal(model.predict(seen[-1][:, 1:]))                # behind the class token


def test_neighbouring_steps_share_no_masks_of_blocks():
    now, before = (draw_masks("block", range(8), 14, 79, seed=seed) for seed in (6, 5))
    assert not now[:-1].equal(before[1:])


def test_a_step_of_pre_training_predicts_what_it_hides(tmp_path, cache, monkeypatch):
    flags = [*DECODER, "--seed", "3", "--weight-decay", "0.1"]
    run, model, optimizer, faces, step_loss, _ = given_to_fit(pretrain, flags, tmp_path, cache,
                                                              monkeypatch)
    asked, rows = [], torch.arange(250)
    loss, numbers = step_loss(lambda *x: (asked.append(x), model(*x))[1], faces[rows], rows, 5)
    images, mask = asked[0]
    assert mask.equal(draw_masks("random", range(250), 4, 7, 3 * 1_000_003 + 5))
    target = make_targets(images, "hog", 4)
    assert loss == masked_mse(model(images, mask), target, mask)
    assert numbers["trivial"] == masked_mse(pretrain.mean_target(run, faces), target, mask)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}


def test_the_encoder_and_the_seed_reach_the_masked_model(tmp_path, cache, monkeypatch):
    one, two = (given_to_fit(pretrain, ["--encoder", "maskfeat", "--seed", seed], tmp_path, cache,
                             monkeypatch)[1] for seed in "01")
    assert one.kind == "maskfeat" and not one.predict.weight.equal(two.predict.weight)
