"""What a command line asks for is what happens: each setting reaches the place where it acts."""
import inspect
import shutil

import pytest
import torch

import datasets
import pretrain
import train
from conftest import CPU, DECODER, TINY, faces_with, flags_for, given_to_fit, read_state
from datasets import InputError, load_faces
from pll import candidates_from_votes, uniform_loss
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


@pytest.mark.parametrize("method, views", [("decoder", 1), ("pico-vit", 2)])
def test_augmentation_is_the_one_asked_for_and_new_in_each_step(method, views, tmp_path, cache,
                                                                monkeypatch):
    seen = []

    def watch(images, u, *how):
        seen.append((u, how))
        return datasets.augment(images, u, *how)

    monkeypatch.setattr(train, "augment", watch)
    how = "--crop-scale 0.7 --degrees 3 --light 0.1 --erase 0.2".split()
    train.main(flags_for(method, tmp_path, cache, *how))
    assert {how for _, how in seen} == {(16, "toy", 0.7, 3.0, 0.1, 0.2)}
    assert len(torch.cat([u for u, _ in seen]).unique(dim=0)) == 2 * 2000 * views   # two epochs


def test_masks_and_crops_of_pre_training_are_those_asked_for(tmp_path, cache, monkeypatch):
    masks, crops, draw = [], [], pretrain.draw_masks

    def watch_masks(kind, rows, grid, count, seed):
        masks.append((kind, count, seed))
        return draw(kind, rows, grid, count, seed)

    def watch_crops(images, u, *how):
        crops.append((u, how))
        return datasets.augment(images, u, *how)

    monkeypatch.setattr(pretrain, "draw_masks", watch_masks)
    monkeypatch.setattr(pretrain, "augment", watch_crops)
    flags = "--mask block --mask-ratio 0.5 --crop-scale 0.7".split()
    pretrain.main([*TINY, *DECODER, *flags, "--out", str(tmp_path), "--cache", str(cache)])
    assert set(masks) == {("block", 8, step) for step in range(16)}     # other masks in each step
    assert {how for _, how in crops} == {(16, "toy", 0.7)}
    of_batches = torch.cat([u for u, _ in crops if len(u) == 250])
    assert len(of_batches.unique(dim=0)) == 2 * 2000                    # and other crops


def test_settings_reach_the_model_the_optimizer_and_the_sets(tmp_path, cache, monkeypatch):
    flags = ("--init none --drop-path 0.2 --decoder-layers 3 --heads 4 --weight-decay 0.1 "
             "--min-votes 2")
    caught = [given_to_fit(train, [*flags.split(), "--seed", seed], tmp_path, cache, monkeypatch)
              for seed in "01"]
    _, model, optimizer, faces, _, _, _, extra = caught[1]
    assert type(optimizer) is torch.optim.AdamW
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0, 0.1}
    assert {g["betas"] for g in optimizer.param_groups} == {(0.9, 0.999)}
    assert [b.drop_path_rate for b in model.encoder.blocks] == [0.0, 0.2]
    assert len(model.head.layers) == 3
    assert {m.heads for m in model.modules() if hasattr(m, "heads")} == {4}    # in no shape
    assert extra()["candidates"].equal(candidates_from_votes(faces.votes, 2))
    assert not model.head.queries.equal(caught[0][1].head.queries)         # of another seed


def test_tau_reaches_eq_3():
    head, c = train.LabelDecoder(24, 7, 3), dict(uniform="queries", uniform_weight=1.0, tau=0.07)
    assert train.spread(c, head) == uniform_loss(head.queries, 0.07)


@pytest.mark.parametrize("flags, method, out", [
    ([], "mim-hog", "runs/pretrain-toy"),
    (["--target", "pixel"], "mim-pixel", "runs/pretrain-toy-pixel")])
def test_pre_training_writes_where_training_reads(flags, method, out, cache, monkeypatch):
    runs = []
    monkeypatch.setattr(pretrain, "fit", lambda run, *rest, **how: runs.append(run))
    monkeypatch.setattr(pretrain, "mean_target", lambda run, faces: None)       # takes seconds
    pretrain.main([*TINY, *DECODER, *flags, "--cache", str(cache)])
    assert str(runs[0].out) == out == train.parse(["--method", method])["init"]


def test_a_split_is_loaded_as_the_flags_say(monkeypatch):
    whole = inspect.signature(pretrain.load_faces)
    monkeypatch.setattr(pretrain, "load_faces", lambda *args, **named: whole.bind(
        *args, **named).arguments)
    read = lambda flags: pretrain.load_split(Run(train.parse(flags.split()), 0, 1, CPU), "test")
    flags = "--data-dir D --partial --cache C"
    same = dict(data_dir="D", split="test", image_size=224, partial=True, cache="C")
    assert read(f"{flags} --data raf --align given") == dict(
        same, data="raf", convention="argmax", align_by="given")
    assert read(f"{flags} --data ferplus --labels majority") == dict(
        same, data="ferplus", convention="majority", align_by="points")


def test_sets_that_have_no_votes_are_those_of_lw1():
    config = dict(candidates=None, min_votes=1, data="raf", seed=0, loss="pll", prior="uniform")
    sets = train.make_candidates(config, faces_with([0] * 500))
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


def test_the_paper_column_of_the_settings():
    """Sec. 4.2, and what MaskFeat, MAE, DETR and the README's table of choices have."""
    column = lambda module: {name: row[0] for name, row in module.SETTINGS.items()}
    size = dict(image_size=224, patch_size=16, dim=768, depth=12, heads=12)
    assert column(pretrain) == dict(
        size, decoder_dim=512, decoder_depth=8, decoder_heads=16, mask_ratio=0.4, mask="block",
        epochs=600, batch_size=192, lr=2e-4, warmup_epochs=60, weight_decay=0.05, clip=0.02,
        crop_scale=0.5, picture_every=50, save_every=10)
    assert column(train) == dict(
        size, model="vit", head="decoder", loss="pll", prior="uniform", decoder_layers=2,
        epochs=100, batch_size=320, lr=1e-4, layer_decay=0.65, warmup_epochs=20, weight_decay=0.05,
        clip=1.0, drop_path=0.1, dropout=0.1, crop_scale=0.5, degrees=15.0, light=0.3, erase=0.25,
        min_votes=1, uniform="queries", uniform_weight=1.0, tau=0.25, threshold=0.1,
        warmup_revision=20, lw_loss="sigmoid", lw_beta=1.0, queue=8192, val=0.0,
        save_every=10)
    assert train.PICO == dict(width=128, encoder_momentum=0.999, first_momentum=0.95,
                              last_momentum=0.8, contrast=0.5)


def test_dropout_reaches_the_head_which_reads_the_visual_tokens(cache):
    config = train.parse([*TINY, "--init", "none", "--dropout", "0.3"])
    model = train.build_model(config).eval()
    assert {m.p for m in model.head.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}
    images = torch.randn(2, 3, 16, 16)
    assert model(images).equal(model.head(model.encoder(images)[:, 1:]))
    run, faces = Run(config, 0, 1, CPU), load_faces("toy", None, "val", 16, cache=cache)
    once, again = (train.predict(run, model.train(), faces) for _ in range(2))
    assert once.equal(again)                                         # nothing is dropped there


def test_what_is_dropped_is_another_in_each_step_and_for_each_seed(tmp_path, cache, monkeypatch):
    seeds, update = [], pretrain.update

    def watch(*args):
        seeds.append(torch.initial_seed())
        update(*args)

    monkeypatch.setattr(pretrain, "update", watch)
    for seed in "01":
        train.main([*TINY, "--init", "none", "--epochs", "1", "--seed", seed, "--out",
                    str(tmp_path / seed), "--cache", str(cache)])
    assert len(seeds) == len(set(seeds)) == 16


def test_what_is_dropped_is_another_in_each_process(cache, monkeypatch):
    c = train.parse([*TINY, "--init", "none", "--warmup-epochs", "0"])
    faces, model = load_faces("toy", None, "val", 16, cache=cache), torch.nn.Linear(1, 1)
    scaler, seeds = torch.amp.GradScaler("cpu", enabled=False), []

    def step_loss(network, images, indices, step):
        seeds.append(torch.initial_seed())
        return network.weight.sum(), {}

    monkeypatch.setattr(pretrain, "anywhere", lambda run, *flags: (False, True))   # one step
    for rank in (0, 1):
        optimizer = torch.optim.SGD([{"params": model.parameters(), "scale": 1.0}], 0.1)
        pretrain.train_epoch(Run(c, rank, 2, CPU), model, optimizer, scaler, faces, step_loss,
                             {"step": 0, "sums": {}}, [])
    assert len(seeds) == len(set(seeds)) == 2


@pytest.mark.parametrize("stage", ["pretrained", "trained"])
def test_a_run_goes_on_from_another_place_and_with_other_workers_alone(stage, tmp_path, request,
                                                                       monkeypatch):
    earlier = request.getfixturevalue(stage)
    shutil.copytree(earlier, tmp_path / "run")
    config = read_state(earlier)["config"]
    place = {"resume": True, "out": str(tmp_path / "run"), "workers": 2, "device": "cpu",
             "data_dir": "D", "cache": "C", "save_every": 7, "picture_every": 9}
    place = {k: v for k, v in place.items() if k in config}
    config.update(place)
    state = pretrain.saved_state(Run(config, 0, 1, CPU))
    assert state["step"] == 16 and len(place) == (8 if stage == "pretrained" else 7)
    monkeypatch.setattr(pretrain, "load_checkpoint", lambda path, stage: state)
    for name in config.keys() - place.keys() - {"stage"}:
        with pytest.raises(InputError, match=f" {name} was .*, is another"):
            pretrain.saved_state(Run({**config, name: "another"}, 0, 1, CPU))
