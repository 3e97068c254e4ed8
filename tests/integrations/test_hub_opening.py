"""What `hub.from_pretrained` opens, and what it refuses instead of filling in."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_runs import same, transformers
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import sparsetwin as st
from sparsetwin.errors import CheckpointError, StateError
from sparsetwin.integrations import hub
from sparsetwin.integrations.transformers import default_targets

BOTH = pytest.mark.parametrize("bitmask", [False, True])


class OwnConfig(transformers.PreTrainedConfig):
    model_type = "sparsetwin-own"

    def __init__(self, width: int = 8, **given: Any) -> None:
        self.width = width
        super().__init__(**given)


class OwnModel(transformers.PreTrainedModel):
    """A class that transformers has never heard of."""

    config_class = OwnConfig

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.layer = nn.Linear(config.width, config.width)
        self.post_init()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def sparse(model: Any) -> st.Sparsifier:
    method = st.ACDC(schedule=st.schedules.constant(sparsity=0.8, total_steps=10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = st.Sparsifier(method, model, optimizer, targets=default_targets(model))
    sparsifier.begin_step()
    return sparsifier


def bert(folder: Path, *, bitmask: bool) -> Any:
    """Save a BERT with a head."""
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    hub.save_pretrained(model, folder, view=sparse(model), bitmask=bitmask)
    return model


@BOTH
def test_a_class_of_ones_own_opens_when_it_is_given(tmp_path: Path, bitmask: bool):
    model = OwnModel(OwnConfig())
    hub.save_pretrained(model, tmp_path, view=sparse(model), bitmask=bitmask)
    assert same(dict(hub.from_pretrained(tmp_path, OwnModel).state_dict()), dict(model.state_dict()))
    with pytest.raises(CheckpointError, match="model_class="):
        hub.from_pretrained(tmp_path)


@BOTH
def test_code_that_lies_in_a_folder_is_neither_run_nor_asked_for(tmp_path: Path, bitmask: bool):
    bert(tmp_path, bitmask=bitmask)
    path = tmp_path / "config.json"
    auto_map = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": auto_map, "model_type": "evil"}))
    with pytest.raises(CheckpointError, match="model_class="):
        hub.from_pretrained(tmp_path)


@BOTH
@pytest.mark.parametrize("architectures", [["logging"], ["pipeline"], ["AutoTokenizer"], ["BertConfig"], [], None])
def test_a_name_that_is_no_model_is_refused(tmp_path: Path, bitmask: bool, architectures: list[str] | None):
    bert(tmp_path, bitmask=bitmask)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": architectures}))
    with pytest.raises(CheckpointError, match="pass model_class="):
        hub.from_pretrained(tmp_path)


@BOTH
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("BertForMaskedLM", "does not fit BertForMaskedLM: "),  # its head would be random
        ("BertModel", "does not fit BertModel: "),  # the head would be left out
    ],
)
def test_no_weight_is_made_up_or_left_out(tmp_path: Path, bitmask: bool, name: str, words: str):
    bert(tmp_path, bitmask=bitmask)
    with pytest.raises(StateError, match=words):
        hub.from_pretrained(tmp_path, getattr(transformers, name))


@BOTH
def test_a_tensor_of_another_shape_is_refused(tmp_path: Path, bitmask: bool):
    bert(tmp_path, bitmask=bitmask)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 96}))
    with pytest.raises(StateError, match=r"does not fit BertForSequenceClassification: .*intermediate"):
        hub.from_pretrained(tmp_path)


@BOTH
def test_weights_that_are_damaged_or_gone_are_a_checkpoint_error(tmp_path: Path, bitmask: bool):
    bert(tmp_path, bitmask=bitmask)
    path = tmp_path / ("sparse.safetensors" if bitmask else "model.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        hub.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        hub.from_pretrained(tmp_path)


def test_weights_of_which_a_part_is_gone_are_a_checkpoint_error(tmp_path: Path):
    model = bert(tmp_path, bitmask=False)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert same(dict(hub.from_pretrained(tmp_path).state_dict()), dict(model.state_dict()))
    sorted(tmp_path.glob("model-*.safetensors"))[0].unlink()
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        hub.from_pretrained(tmp_path)


@BOTH
def test_a_configuration_that_is_damaged_is_a_checkpoint_error(tmp_path: Path, bitmask: bool):
    bert(tmp_path, bitmask=bitmask)
    for text in ("{", "[]", "{}", '{"model_type": "evil"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=str(tmp_path)):
            hub.from_pretrained(tmp_path)


@BOTH
def test_the_code_of_a_card_opens_the_whole_network(tmp_path: Path, bitmask: bool):
    for name, model in (("bert", bert(tmp_path / "bert", bitmask=bitmask)), ("own", OwnModel(OwnConfig()))):
        folder = tmp_path / name
        hub.save_pretrained(model, folder, view=sparse(model), bitmask=bitmask)
        (code,) = re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE)
        found: dict[str, Any] = {}
        exec(code.replace("path/to/this/folder", str(folder)), found)
        assert type(found["model"]) is type(model)
        assert same(dict(found["model"].state_dict()), dict(model.state_dict()))


def test_a_card_that_is_written_anew_names_the_class_without_fsdp(tmp_path: Path):
    model = bert(tmp_path, bitmask=False)
    card = (tmp_path / "README.md").read_text()
    pair = st.Pair(tmp_path / "pair")
    member = pair.save(model, sparse(model))
    model.__class__ = type(f"FSDP{type(model).__name__}", (FSDPModule, type(model)), {})  # as fully_shard does
    hub.write_card(tmp_path, member, model=model, method=None)
    assert (tmp_path / "README.md").read_text() == card
