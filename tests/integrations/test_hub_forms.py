"""Both forms give back the network that was saved: dtypes, buffers, ties and generation settings included."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hf_runs import same, transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sparsetwin as st
from sparsetwin.errors import StateError, UsageError
from sparsetwin.integrations import hub
from sparsetwin.integrations.transformers import default_targets

TOKENS = torch.arange(300).view(1, -1) * 7 % 64


def llama(**given: Any) -> Any:
    """A Llama whose rotary frequencies stay in float32, as Hugging Face opens it in bfloat16."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, **given,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def sparse(model: Any) -> st.Sparsifier:
    method = st.ACDC(schedule=st.schedules.constant(sparsity=0.8, total_steps=10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = st.Sparsifier(method, model, optimizer, targets=default_targets(model))
    sparsifier.begin_step()
    return sparsifier


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("bitmask", [False, True])
@pytest.mark.parametrize("model_class", [None, "LlamaForCausalLM", "AutoModelForCausalLM"])
def test_a_network_in_bfloat16_computes_the_same_bits_from_either_form(
    tmp_path: Path, bitmask: bool, model_class: str | None
):
    model = llama()
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    hub.save_pretrained(model, tmp_path, view=sparse(model), bitmask=bitmask)
    opened = hub.from_pretrained(tmp_path, model_class and getattr(transformers, model_class))
    assert torch.equal(logits(opened), logits(model))
    assert same(dict(opened.named_buffers()), dict(model.named_buffers()))
    assert opened.dtype == opened.config.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("kept", [torch.float32, torch.float16])
def test_the_sparse_form_keeps_the_dtype_of_each_parameter(tmp_path: Path, kept: torch.dtype):
    model = llama()
    model.model.norm.to(kept)
    with torch.no_grad():
        model.model.norm.weight.add_(1e-3)
    hub.save_pretrained(model, tmp_path, view=sparse(model), bitmask=True)
    assert same(dict(hub.from_pretrained(tmp_path).state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("bitmask", [False, True])
def test_generation_settings_come_back_from_either_form(tmp_path: Path, bitmask: bool):
    model = llama()
    model.generation_config.update(max_new_tokens=7, pad_token_id=5, repetition_penalty=1.3)
    hub.save_pretrained(model, tmp_path, view=sparse(model), bitmask=bitmask)
    opened = hub.from_pretrained(tmp_path)
    found = opened.generation_config
    assert (found.max_new_tokens, found.pad_token_id, found.repetition_penalty) == (7, 5, 1.3)
    ask = TOKENS[:, :20]
    assert torch.equal(opened.generate(ask, do_sample=False), model.generate(ask, do_sample=False))


@pytest.mark.parametrize("bitmask", [False, True])
def test_a_tied_head_in_bfloat16_is_tied_again_and_trains_as_one(tmp_path: Path, bitmask: bool):
    model = llama(tie_word_embeddings=True)
    hub.save_pretrained(model, tmp_path, view=sparse(model), bitmask=bitmask)
    opened = hub.from_pretrained(tmp_path)
    assert opened.lm_head.weight is opened.model.embed_tokens.weight
    assert opened.lm_head.weight.requires_grad
    assert torch.equal(logits(opened), logits(model))


@pytest.mark.parametrize("bitmask", [False, True])
def test_a_head_that_was_untied_by_hand_comes_back_with_its_own_weights(tmp_path: Path, bitmask: bool):
    model = llama(tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    hub.save_pretrained(model, tmp_path, view=sparse(model), bitmask=bitmask)
    assert torch.equal(logits(hub.from_pretrained(tmp_path)), logits(model))


def test_the_sparse_form_opens_on_the_cpu_whatever_the_default_device_is(tmp_path: Path):
    model = llama()
    hub.save_pretrained(model, tmp_path, view=sparse(model), bitmask=True)
    with torch.device("meta"):  # somebody's default device
        opened = hub.from_pretrained(tmp_path)
    assert {tensor.device.type for tensor in (*opened.parameters(), *opened.buffers())} == {"cpu"}
    assert torch.equal(logits(opened), logits(model))


@pytest.mark.parametrize("bitmask", [False, True])
def test_a_pair_is_opened_in_its_own_dtype_whatever_the_given_model_has(tmp_path: Path, bitmask: bool):
    model = llama().float()
    pair = st.Pair(tmp_path / "pair")
    pair.save(model, sparse(model))
    given = llama()
    hub.save_pair(pair, given, folder=tmp_path, bitmask=bitmask)
    opened = hub.from_pretrained(tmp_path / "sparse")
    assert same(dict(opened.state_dict()), dict(model.state_dict()))
    assert opened.config.dtype == torch.float32
    assert given.dtype == torch.bfloat16


def test_a_pair_of_another_architecture_is_refused(tmp_path: Path):
    model = llama()
    pair = st.Pair(tmp_path / "pair")
    pair.save(model, sparse(model))
    config = {**model.config.to_dict(), "num_hidden_layers": 3}
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    with pytest.raises(StateError, match=r"member sparse does not fit LlamaForCausalLM: model\.layers\.2.* missing"):
        hub.save_pair(pair, other)
    assert not (tmp_path / "pair" / "sparse").exists()


def test_only_the_bare_model_that_was_pruned_is_saved(tmp_path: Path):
    model = llama()
    sparsifier = sparse(model)
    pair = st.Pair(tmp_path / "pair")
    pair.save(model, sparsifier)
    wrapped: Any = torch.nn.DataParallel(model)
    with pytest.raises(UsageError, match="bare model of transformers, got DataParallel"):
        hub.save_pretrained(wrapped, tmp_path / "a", view=sparsifier)
    with pytest.raises(UsageError, match="bare model of transformers, got DataParallel"):
        hub.save_pair(pair, wrapped)
    with pytest.raises(UsageError, match=r"no model\.layers\.0\.self_attn\.q_proj\.weight in LlamaModel"):
        hub.save_pretrained(model.model, tmp_path / "a", view=sparsifier)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("bitmask", [False, True])
def test_a_sharded_model_in_bfloat16_is_opened_in_bfloat16(tmp_path: Path, bitmask: bool):
    model = llama()
    sparsifier = sparse(model)
    pair = st.Pair(tmp_path / "pair")
    pair.save(model, sparsifier)
    sparsifier.detach()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        hub.save_pair(pair, model, folder=tmp_path, bitmask=bitmask)
    finally:
        dist.destroy_process_group()
    assert same(dict(hub.from_pretrained(tmp_path / "sparse").state_dict()), weights)
