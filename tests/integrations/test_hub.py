from pathlib import Path
from typing import Any

import pytest
import torch
from hf_runs import Case, bert, gpt2, same, transformers, vit

import sparsetwin as st
from sparsetwin.errors import CheckpointError, StateError
from sparsetwin.integrations import hub
from sparsetwin.integrations.transformers import default_targets


@pytest.fixture(params=["bert", "gpt2", "vit"])
def case(request: pytest.FixtureRequest) -> Case:
    if request.param == "vit":
        return vit(request.getfixturevalue("images"))
    return {"bert": bert, "gpt2": gpt2}[request.param](request.getfixturevalue("tokens"))


def sparse(model: Any) -> st.Sparsifier:
    """Prune a model to 80%."""
    method = st.ACDC(schedule=st.schedules.constant(sparsity=0.8, total_steps=10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = st.Sparsifier(method, model, optimizer, targets=default_targets(model))
    sparsifier.begin_step()
    return sparsifier


def test_a_sparse_half_comes_back_from_either_form_to_the_bit(case: Case, tmp_path: Path):
    model = case.make().eval()
    sparsifier = sparse(model)
    for name, bitmask in (("plain", False), ("packed", True)):
        hub.save_pretrained(model, tmp_path / name, view=sparsifier, bitmask=bitmask)
        for model_class in (None, type(model), getattr(transformers, case.auto)):
            opened = hub.from_pretrained(tmp_path / name, model_class)
            assert same(dict(opened.state_dict()), dict(model.state_dict()))
            assert not opened.training
    assert same(hub.masks_of(tmp_path / "packed"), dict(sparsifier.masks))
    plain, packed = tmp_path / "plain" / "model.safetensors", tmp_path / "packed" / "sparse.safetensors"
    assert packed.stat().st_size < 0.75 * plain.stat().st_size  # embeddings and headers stay as they are


def test_a_tied_head_is_stored_once_and_tied_when_it_comes_back(tokens: torch.Tensor, tmp_path: Path):
    model = gpt2(tokens).make()
    hub.save_pretrained(model, tmp_path, view=sparse(model), bitmask=True)
    opened = hub.from_pretrained(tmp_path)
    assert opened.lm_head.weight is opened.transformer.wte.weight
    assert torch.equal(opened.lm_head.weight, model.lm_head.weight)


def test_opening_draws_no_random_numbers(tokens: torch.Tensor, tmp_path: Path):
    model = bert(tokens).make()
    hub.save_pretrained(model, tmp_path, view=sparse(model), bitmask=True)
    before = torch.get_rng_state()
    hub.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_bfloat16_weights_come_back_as_such(tokens: torch.Tensor, tmp_path: Path):
    model = bert(tokens).make().to(torch.bfloat16)
    hub.save_pretrained(model, tmp_path, view=sparse(model), bitmask=True)
    assert same(dict(hub.from_pretrained(tmp_path).state_dict()), dict(model.state_dict()))


def test_every_member_of_a_pair_becomes_a_folder(tokens: torch.Tensor, tmp_path: Path):
    model = gpt2(tokens).make()
    pair = st.Pair(tmp_path / "pair")
    sparsifier = sparse(model)
    pair.save(model, sparsifier, metrics={"eval_loss": 2.5})
    pair.copy("sparse", "sparse-best")
    folders = hub.save_pair(pair, model, folder=tmp_path / "out", bitmask=True, method=sparsifier.method)
    assert folders == [tmp_path / "out" / "sparse", tmp_path / "out" / "sparse-best"]
    assert same(dict(hub.from_pretrained(folders[0]).state_dict()), dict(model.state_dict()))
    card = (folders[0] / "README.md").read_text()
    assert "| eval_loss | 2.5 |" in card
    assert "| 0 | 10 | 0.8 |" in card
    assert "hub.from_pretrained" in card


def test_equal_networks_give_equal_folders(tokens: torch.Tensor, tmp_path: Path):
    model = gpt2(tokens).make()
    sparsifier = sparse(model)
    for name in ("a", "b"):
        hub.save_pretrained(model, tmp_path / name, view=sparsifier, bitmask=True)
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b"))
    assert first == second


def test_a_folder_is_replaced_whole_or_not_at_all(tokens: torch.Tensor, tmp_path: Path):
    model = gpt2(tokens).make()
    sparsifier = sparse(model)
    folder = tmp_path / "sparse"
    hub.save_pretrained(model, folder, view=sparsifier, bitmask=True)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    name, mask = next(iter(sparsifier.masks.items()))
    with torch.no_grad():
        sparsifier.weights[name][~mask] = 1.0
    with pytest.raises(StateError, match="not zero"):
        hub.save_pretrained(model, folder, view=sparsifier, bitmask=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_sparse_half_whose_pruned_weights_live_is_refused_in_the_plain_form_too(tokens: torch.Tensor, tmp_path: Path):
    model = gpt2(tokens).make()
    sparsifier = sparse(model)
    name, mask = next(iter(sparsifier.masks.items()))
    with torch.no_grad():
        sparsifier.weights[name][~mask] = 1.0
    with pytest.raises(StateError, match="not zero"):
        hub.save_pretrained(model, tmp_path / "sparse", view=sparsifier)


def test_what_is_no_such_folder_is_refused(tokens: torch.Tensor, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        hub.from_pretrained(tmp_path)
    model = gpt2(tokens).make()
    hub.save_pretrained(model, tmp_path / "packed", view=sparse(model), bitmask=True)
    with pytest.raises(StateError, match="does not fit BertForSequenceClassification"):
        _with_class(tmp_path / "packed", bert(tokens).make())
    (tmp_path / "packed" / "sparse.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError):
        hub.from_pretrained(tmp_path / "packed")


def _with_class(folder: Path, other: Any) -> None:
    other.config.save_pretrained(folder)
    hub.from_pretrained(folder, type(other))
