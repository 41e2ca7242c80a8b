"""Steps of both stages on a CUDA card that is not there: PyTorch's fake tensors stand in for it.

A fake tensor has a shape, a dtype and a device, but no numbers. So the code runs on "cuda" without
a card, as far as the loss. That finds a tensor left on the CPU and a dtype that does not fit
autocast's 16 bits; not wrong numbers, nor faults of the backward pass.
"""
import contextlib

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import pretrain
import train
from conftest import DECODER, flags_for, given_to_fit

CARD = torch.device("cuda", 0)


class Blank:
    """Training faces without faces: 500 grey images of the toy's seven classes."""
    labels, notes = torch.arange(500) % 7, []

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, rows):
        return torch.full((len(rows), 3, 16, 16), 128, dtype=torch.uint8)


def onto_the_card(module, device=CARD):
    """`Module.to` for fake tensors, which cannot be moved in place."""
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            fake = torch.empty(p.shape, dtype=p.dtype, device=device)
            setattr(part, name, nn.Parameter(fake, p.requires_grad))
        for name, b in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(b.shape, dtype=b.dtype, device=device))
    return module


@contextlib.contextmanager
def autocast_to(dtype):
    """torch.autocast("cuda", dtype), which does nothing where there is no card."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def card(request, monkeypatch):
    """Within it tensors are fake, and may be on the card; yields autocast's dtype."""
    for module in (pretrain, train):
        monkeypatch.setattr(module, "autocast", lambda run: autocast_to(request.param))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield request.param


def checked_step(run, model, step_loss, dtype):
    """One step on the card: layers compute in `dtype`; logits, loss and scalars are fp32."""
    model.train()
    head = getattr(model, "head", None)                  # pre-training has none
    last, outputs, logits = getattr(head, "linear", None), [], []
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and layer is not last:
            layer.register_forward_hook(lambda layer, given, output: outputs.append(output))
        if layer is head:
            layer.register_forward_hook(lambda layer, given, output: logits.append(output))
    images, rows = Blank()[run.rows].to(CARD), torch.arange(len(run.rows))
    loss, scalars = step_loss(model, images, rows, 1000)
    assert len(outputs) > 3 and {(x.device, x.dtype) for x in outputs} == {(CARD, dtype)}
    assert {(x.device, x.dtype) for x in (loss, *scalars.values(), *logits)} \
        == {(CARD, torch.float32)} and len(logits) == (head is not None)


@pytest.mark.parametrize("method", train.METHODS)
def test_a_step_of_each_method_on_a_card(method, card, tmp_path, cache, monkeypatch):
    config = train.parse(flags_for(method, tmp_path, cache))
    run, faces = pretrain.Run(config, 0, 1, CARD), Blank()
    C = torch.full((500, 7), 1 / 7)
    monkeypatch.setattr(train, "make_confidence", lambda *args: C)
    monkeypatch.setattr(FakeTensor, "__bool__", lambda finite: True, raising=False)   # PiCO asks
    model, another = (onto_the_card(train.build_model(config)) for _ in range(2))
    table = train.confidence_table(run, faces, {"candidates": C > 0, "confidence": C})
    if config["loss"] == "pico":
        monkeypatch.setattr(train.copy, "deepcopy", lambda model: another)       # of fakes fails
        step_loss = train.pico(run, model, faces, table, train.pico_state(run, model, None))
    else:
        step_loss = train.algorithm_1(run, model, faces, table)
    checked_step(run, model, step_loss, card)
    logits = train.predict(run, model, faces)
    assert (logits.device, logits.dtype, logits.shape) == (CARD, torch.float32, (500, 7))


@pytest.mark.parametrize("flags", [DECODER, [*DECODER, "--target", "pixel"],
                                   ["--encoder", "maskfeat"]], ids=["hog", "pixel", "maskfeat"])
def test_a_step_of_pre_training_on_a_card(flags, card, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(pretrain, "start", lambda config: pretrain.Run(config, 0, 1, CARD))
    monkeypatch.setattr(pretrain, "load_split", lambda run, split: Blank())
    monkeypatch.setattr(nn.Module, "to", onto_the_card)
    monkeypatch.setattr(FakeTensor, "__int__", lambda count: 10, raising=False)      # of `visible`,
    # whose mask is on the CPU, but as fake as all else
    run, model, _, _, step_loss, _ = given_to_fit(pretrain, flags, tmp_path, cache, monkeypatch)
    assert {p.device for p in model.parameters()} == {CARD}
    checked_step(run, model, step_loss, card)


def test_a_tensor_left_on_the_cpu_is_an_error_here_too():
    """Without which the tests above would find nothing."""
    with FakeTensorMode(), pytest.raises(RuntimeError, match="device"):
        torch.zeros(2, device=CARD) + torch.zeros(2)
