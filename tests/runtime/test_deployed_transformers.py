"""Networks of transformers: traced with their linears on planes, or layer by layer where a cache makes shapes grow."""

import pytest
import torch

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")
pytest.importorskip("transformers")

import transformers
from runtime_cases import FP32, pruned, relative_error

from sparsetwin.runtime import Deployed, deploy, load
from sparsetwin.runtime._calls import Caller
from sparsetwin.runtime._fuse import fuse
from sparsetwin.runtime._graph import Linear
from sparsetwin.runtime._swapped import FastLinear, swapped_linears
from sparsetwin.runtime._trace import trace

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 50, shape, generator=torch.Generator().manual_seed(seed))


def by_program(deployed: Deployed, *arguments, **named):
    """The fastest program's result, even where the model itself was faster still."""
    call = deployed._caller.call(arguments, named)
    return deployed._entries[call.key].program.run(call)


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    return pruned(transformers.BertModel(transformers.BertConfig(vocab_size=50, **SIZES)), 0.2)


@torch.no_grad()
def test_bert_equals_itself_for_masks_given_in_any_order(bert, tmp_path):
    ids, mask = tokens(2, 13), torch.ones(2, 13, dtype=torch.int64)
    mask[1, 9:] = 0
    deployed = deploy(bert, {"input_ids": ids, "attention_mask": mask}, rivals=())
    expected = bert(input_ids=ids, attention_mask=mask)
    for found in (
        by_program(deployed, input_ids=ids, attention_mask=mask),
        deployed(attention_mask=mask, input_ids=ids),
        deployed(ids, mask),
    ):
        assert type(found) is type(expected)
        assert relative_error(found.last_hidden_state, expected.last_hidden_state) <= FP32
        assert relative_error(found.pooler_output, expected.pooler_output) <= FP32
    assert len(deployed.plans) == 1
    linears = sum(isinstance(module, torch.nn.Linear) for module in bert.modules())
    assert len(deployed.plan.layers) == linears
    found = deployed(ids[:, :6], mask[:, :6])  # another length
    assert relative_error(found.last_hidden_state, bert(ids[:, :6], mask[:, :6]).last_hidden_state) <= FP32
    deployed.save(tmp_path / "bert.safetensors")
    found = load(tmp_path / "bert.safetensors")(attention_mask=mask, input_ids=ids)
    assert relative_error(found.last_hidden_state, expected.last_hidden_state) <= FP32


@torch.no_grad()
def test_vit_equals_itself():
    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=32, patch_size=8, **SIZES)
    model, images = pruned(transformers.ViTForImageClassification(config), 0.3), torch.randn(3, 3, 32, 32)
    deployed = deploy(model, images, rivals=())
    for found in (deployed(images), by_program(deployed, images)):
        assert relative_error(found.logits, model(images).logits) <= FP32


@pytest.fixture(scope="module")
def gpt():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return pruned(transformers.GPT2LMHeadModel(config), 0.2)


@torch.no_grad()
def test_gpt2_without_a_cache_is_traced_with_its_transposed_linears(gpt):
    ids = tokens(2, 9)
    call = Caller(deploy(gpt, {"input_ids": ids, "use_cache": False}, rivals=())._caller.signature).call(
        (ids,), {"use_cache": False}
    )
    graph = fuse(trace(gpt, call.arguments, call.named))
    assert sum(isinstance(node.operation, Linear) for node in graph.nodes) == 4 * 2 + 1
    deployed = deploy(gpt, {"input_ids": ids, "use_cache": False}, rivals=())
    found = by_program(deployed, ids, use_cache=False)
    assert relative_error(found.logits, gpt(ids).logits) <= FP32


def forced(model: torch.nn.Module) -> torch.nn.Module:
    """Every fast layer sparse for any number of tokens, whatever was measured."""
    for module in model.modules():
        if isinstance(module, FastLinear):
            module.sparse_for = dict.fromkeys(module.sparse_for, True)
    return model


@torch.no_grad()
def test_decoding_with_a_cache_gives_the_tokens_of_the_model(gpt):
    ids = tokens(2, 6)
    deployed = deploy(gpt, ids, rivals=())
    layers = forced(deployed.layers)
    assert type(layers) is type(gpt)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(layers.generate(ids, **settings), gpt.generate(ids, **settings))
    expected, found = gpt(ids), deployed(ids)
    for _ in range(3):  # one token at a time, by hand
        following = expected.logits[:, -1:].argmax(-1)
        found = deployed(following, past_key_values=found.past_key_values)
        expected = gpt(following, past_key_values=expected.past_key_values)
        assert relative_error(found.logits, expected.logits) <= FP32


@torch.no_grad()
@pytest.mark.parametrize("reduced", [False, True])
def test_exchanged_linears_equal_those_they_stand_for(reduced):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(512, 600), torch.nn.GELU(), torch.nn.Linear(600, 40, bias=False))
    pruned(model, 0.02)
    weights = [parameter.clone() for parameter in model.parameters()]
    fast = forced(swapped_linears(model, threads=2, reduced=reduced))
    for count in (0, 1, 8, 9, 200):
        x = torch.randn(count, 512, generator=torch.Generator().manual_seed(count))
        assert fast(x).shape == (count, 40)
        if count:
            assert relative_error(fast(x), model(x)) <= (2e-2 if reduced else FP32)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_dense_models_are_left_alone():
    model = torch.nn.Sequential(torch.nn.Linear(20, 20))
    assert swapped_linears(model, threads=1, reduced=False) is model


class Reading(torch.nn.Module):
    """A model that calls a layer and computes with its weight and bias, too."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) @ self.layer.weight * 2 + self.layer.bias


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_a_layer_that_was_exchanged_still_shows_its_weight_and_bias(monkeypatch, kind):
    monkeypatch.setattr(FastLinear, "_is_faster", lambda self, tokens: True)
    layer = torch.nn.Linear(16, 16) if kind == "Linear" else transformers.pytorch_utils.Conv1D(16, 16)
    layer.weight.mul_(torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) < 0.1)
    model = Reading(layer)
    swapped = swapped_linears(model, threads=1, reduced=False)
    assert isinstance(swapped.layer, FastLinear)
    x = torch.rand(3, 16)
    torch.testing.assert_close(swapped(x), model(x))
    assert not list(swapped.parameters())
