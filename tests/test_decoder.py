"""decoder.py: against torch.nn's decoder layer, and what a label query may and may not do."""
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import decoder as cost
import pretrain
import train
from decoder import Attention, DecoderLayer, LabelDecoder


def copy_attention(ours, theirs):
    """Our attention with the weights of torch.nn.MultiheadAttention."""
    for layer, weight, bias in zip((ours.q, ours.k, ours.v), theirs.in_proj_weight.chunk(3),
                                   theirs.in_proj_bias.chunk(3)):
        layer.weight.data, layer.bias.data = weight.clone(), bias.clone()
    ours.proj.load_state_dict(theirs.out_proj.state_dict())


def layer_pair():
    """Our layer and torch.nn.TransformerDecoderLayer with the same random weights."""
    torch.manual_seed(0)
    theirs = nn.TransformerDecoderLayer(24, 3, 96, dropout=0.0, activation="gelu", batch_first=True)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.3)
    ours = DecoderLayer(24, 3, dropout=0.0)
    copy_attention(ours.self_attn, theirs.self_attn)
    copy_attention(ours.cross_attn, theirs.multihead_attn)
    for mine, other in ((ours.mlp.fc1, theirs.linear1), (ours.mlp.fc2, theirs.linear2),
                        (ours.norm1, theirs.norm1), (ours.norm2, theirs.norm2),
                        (ours.norm3, theirs.norm3)):
        mine.load_state_dict(other.state_dict())
    return ours, theirs


def test_layer_equals_torchs():
    ours, theirs = layer_pair()
    x, tokens = torch.randn(2, 5, 24, requires_grad=True), torch.randn(2, 9, 24, requires_grad=True)
    a, b = ours(x, torch.zeros(5, 24), tokens), theirs(x, tokens)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for mine, other in zip(torch.autograd.grad(a.sin().sum(), (x, tokens)),
                           torch.autograd.grad(b.sin().sum(), (x, tokens))):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


def test_queries_are_added_to_queries_and_keys_but_not_to_values():
    """DETR's rule, by torch.nn.MultiheadAttention."""
    ours, theirs = layer_pair()
    x, queries, tokens = torch.randn(2, 5, 24), torch.randn(5, 24), torch.randn(2, 9, 24)
    y = theirs.norm1(x + theirs.self_attn(x + queries, x + queries, x)[0])
    y = theirs.norm2(y + theirs.multihead_attn(y + queries, tokens, tokens)[0])
    y = theirs.norm3(y + theirs.linear2(torch.nn.functional.gelu(theirs.linear1(y))))
    torch.testing.assert_close(ours(x, queries, tokens), y, rtol=1e-4, atol=1e-5)


def make_decoder(layers=2):
    torch.manual_seed(0)
    decoder = LabelDecoder(24, 7, 3, layers, dropout=0.1).eval()
    nn.init.normal_(decoder.weight)
    return decoder


def test_permuting_the_labels_permutes_the_logits():
    decoder, tokens, order = make_decoder(), torch.randn(3, 9, 24), torch.randperm(7)
    before = decoder(tokens)
    for p in (decoder.queries, decoder.weight, decoder.bias):
        p.data = p.data[order]
    torch.testing.assert_close(decoder(tokens), before[:, order], rtol=1e-4, atol=1e-5)


def test_the_order_of_the_tokens_does_not_matter():
    decoder, tokens = make_decoder(), torch.randn(3, 9, 24)
    torch.testing.assert_close(decoder(tokens[:, torch.randperm(9)]), decoder(tokens),
                               rtol=1e-4, atol=1e-5)


def test_a_logit_reads_its_own_output_only():
    decoder, tokens = make_decoder(), torch.randn(3, 9, 24)
    before = decoder(tokens)
    decoder.weight.data[2] += torch.randn(24)
    changed = (decoder(tokens) - before).abs().max(dim=0).values > 1e-6
    assert changed.nonzero().flatten().tolist() == [2]


@torch.no_grad()
def test_a_logit_is_the_product_with_its_own_weights_and_bias():
    decoder, tokens = make_decoder(), torch.randn(2, 9, 24)
    x = torch.zeros(2, 7, 24)
    for layer in decoder.layers:
        x = layer(x, decoder.queries, tokens)
    decoder.bias.data = torch.randn(7)
    for face in range(2):
        for k, logit in enumerate(decoder(tokens)[face].tolist()):
            products = [float(a * b) for a, b in zip(x[face, k], decoder.weight[k])]
            assert logit == pytest.approx(sum(products) + float(decoder.bias[k]), abs=1e-5)


def test_the_first_logits_are_small_and_the_first_queries_unit_normal():
    torch.manual_seed(0)
    decoder = LabelDecoder(64, 50, 4)
    assert decoder.weight.std().item() == pytest.approx(0.02, rel=0.03) and not decoder.bias.any()
    assert decoder.queries.std().item() == pytest.approx(1, rel=0.03)


def test_attention_maps_are_those_that_were_used():
    decoder, tokens = make_decoder(), torch.randn(3, 9, 24)
    logits, maps = decoder(tokens, need_attention=True)
    assert maps.shape == (3, 2, 3, 7, 9) and logits.equal(decoder(tokens))
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, 2, 3, 7))
    for i, layer in enumerate(decoder.layers):         # what its attention really was given
        given = []
        hook = layer.cross_attn.register_forward_pre_hook(lambda _, args: given.append(args))
        decoder(tokens)
        hook.remove()
        query, key, value = given[0]
        torch.testing.assert_close(maps[:, i], layer.cross_attn.weights(query, key))
        assert key is tokens and value is tokens
    attention = Attention(24, 3)
    query = torch.randn(3, 7, 24)
    weights, value = attention.weights(query, tokens), attention.split(attention.v(tokens))
    by_hand = attention.proj((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(query, tokens, tokens), by_hand, rtol=1e-4, atol=1e-5)


def test_every_parameter_learns():
    decoder = make_decoder().train()
    decoder(torch.randn(3, 9, 24)).square().sum().backward()
    still = [n for n, p in decoder.named_parameters()
             if p.grad is None or not p.grad.abs().sum() > 0]
    # The softmax removes a bias of the keys. As x starts at zero, the first self-attention has one
    # value for all labels, and nothing of it or of the norm behind it is learned.
    first = ("layers.0.self_attn.", "layers.0.norm1.")
    assert all(n.endswith(".k.bias") or n.startswith(first) for n in still), still


def test_a_width_that_heads_do_not_divide_is_an_error():
    with pytest.raises(ValueError, match="cannot be split among 5 heads"):
        LabelDecoder(24, 7, 5)


def kept_numbers(model, forward):
    """How many floating-point numbers autograd keeps for the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    sizes = {}

    def note(x):
        storage = x.untyped_storage()
        if x.is_floating_point() and storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes() // x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        result = forward()                       # alive until the sizes are read
    assert result.requires_grad
    return sum(sizes.values())


def test_costs_from_shapes_are_what_torch_counts():
    """Operations, parameters and kept numbers of both stages, for a model of other proportions."""
    sizes = dict(image_size=48, patch_size=8, dim=64, depth=3, heads=4)
    first = {**{k: row[1] for k, row in pretrain.SETTINGS.items()}, **sizes, "decoder_dim": 32,
             "decoder_depth": 2, "decoder_heads": 4, "target": "hog", "encoder": "visible"}
    second = {**{k: row[1] for k, row in train.SETTINGS.items()}, **sizes, "data": "toy"}
    masked, recogniser = pretrain.build_masked_model(first), train.build_model(second)
    images, mask = torch.rand(4, 3, 48, 48), pretrain.random_mask(4, 6, 15, 0)
    costs = cost.stage_costs(7, 48, 8, 64, 3, 4, 0.4, 32, 2, 4, second["decoder_layers"])
    for stage, model, forward in (("pre-training", masked, lambda: masked(images, mask)),
                                  ("training", recogniser, lambda: recogniser(images))):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            forward()
        assert costs[stage].parameters == sum(p.numel() for p in model.parameters())
        counted = counter.get_total_flops() / 4
        assert costs[stage].operations == pytest.approx(counted, rel=1e-3)    # not the logits' sum
        assert costs[stage].kept == pytest.approx(kept_numbers(model, forward) / 4, rel=0.02)


def test_the_papers_costs():
    costs = cost.stage_costs()
    assert costs["training"].parameters == sum(p.numel() for p in train.build_model(
        {**{k: row[0] for k, row in train.SETTINGS.items()}, "data": "raf"}).parameters())
    rows = [[cell.strip() for cell in line.split("|")] for line in cost.cost_table(12_271)[2:]]
    assert [(row[1].split(",")[0], row[4]) for row in rows] == [
        ("pre-training", "4"), ("training", "2"), ("training", "4")]
    for stage, row in zip(("pre-training", "training", "training"), rows):
        (epochs, batch, _), cards = cost.PAPER[stage], int(row[4])
        hours = 3 * costs[stage].operations * 12_271 * epochs / (cards * 125e12 * 0.35) / 3600
        gigabytes = (16 * costs[stage].parameters + 2 * costs[stage].kept * batch / cards) / 1e9
        assert (row[5], row[6]) == (f"{gigabytes:.1f}", f"{hours:.2f}")


def test_the_costs_are_of_the_faces_and_the_utilisation_asked_for(capsys):
    cost.main(["--faces", "1000", "--utilisation", "0.7"])
    assert capsys.readouterr().out.splitlines()[:-1] == cost.cost_table(1000, 0.7)


@pytest.mark.parametrize("flags", [["--faces", "0"], ["--utilisation", "0"]])
def test_costs_of_nothing_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        cost.main(flags)
    assert stop.value.code == 2 and "give --faces from 1" in capsys.readouterr().err


def test_one_map_of_attention_costs_what_its_formula_says():
    """N queries and M keys of width d: N M d products for the scores, as many for the values."""
    assert cost.attention_cost(3, 5, 8, 2).operations == 2 * (3 * 5 * 8 + 3 * 5 * 8)
    block = cost.block_cost(10, 8, 2)
    assert block.operations == 24 * 10 * 8 ** 2 + 4 * 10 ** 2 * 8
    assert block.parameters == 12 * 8 ** 2 + 13 * 8


def test_dropout_acts_in_training_alone():
    torch.manual_seed(0)
    decoder, tokens = LabelDecoder(24, 7, 3, dropout=0.5), torch.randn(3, 9, 24)
    assert not decoder(tokens).equal(decoder(tokens))
    assert decoder.eval()(tokens).equal(decoder(tokens))


def test_the_picture_is_of_the_last_layers_attention(monkeypatch, said):
    shown = []
    monkeypatch.setattr(cost, "heat", lambda face, attention, pixels: (
        shown.append(attention), face.resize((pixels, pixels)))[1])
    maps, zeta, face = torch.rand(2, 2, 3, 7, 9), torch.rand(2, 7), Image.new("RGB", (8, 8))
    cost.attention_picture([face] * 2, maps, zeta, list("abcdefg"), [["one"]] * 2)
    torch.testing.assert_close(torch.stack(shown), maps[:, 1].mean(dim=1).flatten(0, 1))   # heads'
    assert [(text, ink) for text, _, ink in said if "%" in text] == [
        (f"{v:.0%}", "firebrick" if v == row.max() else "black") for row in zeta for v in row]
