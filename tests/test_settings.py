"""What a command line asks for is what happens: each setting reaches the place where it acts."""
import pytest
import torch

import datasets
import pretrain
import train
from conftest import CPU, TINY, faces_with, flags_for
from datasets import load_faces
from pll import candidates_from_votes
from pretrain import Run, batches, learning_rate, uniforms


def test_accuracy_is_watched_on_faces_that_are_not_trained_on(cache):
    held = []
    for seed in ("3", "4"):
        c = train.parse([*TINY, "--init", "none", "--val", "0.2", "--seed", seed, "--cache",
                         str(cache)])
        faces, watched = train.training_faces(Run(c, 0, 1, CPU))
        assert len(watched) == 400 and set(watched.names).isdisjoint(faces.names)
        held.append(watched.names)
    assert held[0] != held[1]


def test_another_seed_is_another_order_other_crops_and_other_sets(cache):
    faces, seen = load_faces("toy", None, "val", 16, cache=cache), []
    for seed in (0, 1):
        run = Run(dict(seed=seed, batch_size=250, workers=0), 0, 1, CPU)
        order = torch.cat([indices for _, indices in batches(run, faces, 0, 0)])
        config = dict(candidates="lw1", min_votes=1, data="toy", seed=seed)
        sets = train.make_candidates(config, faces)
        seen.append((order, uniforms(run, 0), sets))
    assert not any(a.equal(b) for a, b in zip(*seen))


def test_each_steps_rate_is_the_schedules_and_its_clip_the_settings(tmp_path, cache, monkeypatch):
    steps, update = [], pretrain.update

    def watch(model, optimizer, scaler, loss, clip):
        steps.append((optimizer.param_groups[-1]["lr"], clip))
        update(model, optimizer, scaler, loss, clip)

    monkeypatch.setattr(pretrain, "update", watch)
    train.main([*TINY, *"--init none --epochs 3 --warmup-epochs 1 --lr 1e-3 --clip 0.5".split(),
                "--out", str(tmp_path), "--cache", str(cache)])
    assert steps == [(learning_rate(s, 24, 8, 1e-3), 0.5) for s in range(24)]


def test_augmentation_is_the_one_asked_for_and_new_in_each_step(tmp_path, cache, monkeypatch):
    seen = []

    def watch(images, u, *how):
        seen.append((u, how))
        return datasets.augment(images, u, *how)

    monkeypatch.setattr(train, "augment", watch)
    how = "--epochs 1 --crop-scale 0.7 --degrees 3 --light 0.1 --erase 0.2".split()
    train.main(flags_for("decoder", tmp_path, cache, *how))
    assert {how for _, how in seen} == {(16, "toy", 0.7, 3.0, 0.1, 0.2)}
    assert len(torch.cat([u for u, _ in seen]).unique(dim=0)) == 2000


def test_masks_and_crops_of_pre_training_are_those_asked_for(tmp_path, cache, monkeypatch):
    masks, crops, draw = [], [], pretrain.draw_masks

    def watch_masks(kind, rows, grid, count, seed):
        masks.append((kind, count, seed))
        return draw(kind, rows, grid, count, seed)

    def watch_crops(images, u, *how):
        crops.append(how)
        return datasets.augment(images, u, *how)

    monkeypatch.setattr(pretrain, "draw_masks", watch_masks)
    monkeypatch.setattr(pretrain, "augment", watch_crops)
    flags = "--epochs 1 --decoder-dim 8 --decoder-heads 2 --mask block --mask-ratio 0.5".split()
    pretrain.main([*TINY, *flags, "--crop-scale", "0.7", "--out", str(tmp_path), "--cache",
                   str(cache)])
    assert set(masks) == {("block", 8, step) for step in range(8)}      # other masks in each step
    assert set(crops) == {(16, "toy", 0.7)}


def test_settings_reach_the_model_the_optimizer_and_the_sets(tmp_path, cache, monkeypatch):
    caught = []
    monkeypatch.setattr(train, "fit", lambda *args: caught.append(args))
    flags = "--init none --drop-path 0.2 --decoder-layers 3 --weight-decay 0.1 --min-votes 2"
    for seed in "01":
        train.main([*TINY, *flags.split(), "--seed", seed, "--out", str(tmp_path), "--cache",
                    str(cache)])
    _, model, optimizer, faces, _, _, extra, _ = caught[1]
    assert type(optimizer) is torch.optim.AdamW
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0, 0.1}
    assert [b.drop_path_rate for b in model.encoder.blocks] == [0.0, 0.2]
    assert len(model.head.layers) == 3
    assert extra()["candidates"].equal(candidates_from_votes(faces.votes, 2))
    assert not model.head.queries.equal(caught[0][1].head.queries)         # of another seed


def test_a_split_is_loaded_as_the_flags_say(monkeypatch):
    monkeypatch.setattr(pretrain, "load_faces", lambda *args: args)
    read = lambda flags: pretrain.load_split(Run(train.parse(flags.split()), 0, 1, CPU), "test")
    flags = "--data-dir D --partial --cache C"
    assert read(f"{flags} --data raf --align given") == ("raf", "D", "test", 224, "argmax", True,
                                                         "C", "given")
    assert read(f"{flags} --data ferplus --labels majority") == ("ferplus", "D", "test", 224,
                                                                 "majority", True, "C", "points")


def test_sets_that_have_no_votes_are_those_of_lw1():
    sets = train.make_candidates(dict(candidates=None, min_votes=1, data="raf", seed=0),
                                 faces_with([0] * 500))
    assert sets[:, 0].all() and sets[:, 1].any() and not sets[:, 2:].any()


@pytest.mark.parametrize("method, expected", [
    ("baseline", ["vit", "linear", "ce", False, "imagenet"]),
    ("mim-pixel", ["vit", "linear", "ce", False, "runs/pretrain-raf-pixel"]),
    ("mim-hog", ["vit", "linear", "ce", False, "runs/pretrain-raf"]),
    ("mim-pixel-pll", ["vit", "linear", "pll", False, "runs/pretrain-raf-pixel"]),
    ("mim-hog-pll", ["vit", "linear", "pll", False, "runs/pretrain-raf"]),
    ("ours", ["vit", "decoder", "pll", True, "runs/pretrain-raf"])])
def test_what_the_rows_of_table_3_are(method, expected):
    config = train.parse(["--method", method, "--data", "raf"])
    assert [config[k] for k in ("model", "head", "loss", "revise", "init")] == expected
