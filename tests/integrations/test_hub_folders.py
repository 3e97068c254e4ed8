"""What `hub` may replace on disk, and what it must never delete."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_runs import callback, gpt2, trainer

import sparsetwin as st
from sparsetwin.errors import UsageError
from sparsetwin.integrations import hub
from sparsetwin.integrations.transformers import default_targets

CASE = gpt2(torch.arange(64 * 24) % 256)


class Processor:
    """What `hub` uses of a tokenizer: it writes a file and a folder."""

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")
        (Path(folder) / "additional_chat_templates").mkdir()


def sparse() -> tuple[Any, st.Sparsifier]:
    model = CASE.make()
    method = st.ACDC(schedule=st.schedules.constant(sparsity=0.8, total_steps=10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = st.Sparsifier(method, model, optimizer, targets=default_targets(model))
    sparsifier.begin_step()
    return model, sparsifier


def entries(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder of somebody's, as a Trainer's ``output_dir``."""
    (tmp_path / "out" / "checkpoint-100").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-100" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "out" / "precious.txt").write_text("precious")
    return tmp_path / "out"


@pytest.mark.parametrize("bitmask", [False, True])
def test_a_folder_with_other_things_is_refused_by_their_names_and_stays_as_it_was(out: Path, bitmask: bool):
    model, sparsifier = sparse()
    before = entries(out)
    with pytest.raises(UsageError, match=r"out holds checkpoint-100, precious\.txt, .* folder of its own"):
        hub.save_pretrained(model, out, view=sparsifier, bitmask=bitmask)
    assert entries(out) == before
    assert list(out.parent.iterdir()) == [out]


def test_many_other_things_are_counted(out: Path):
    model, sparsifier = sparse()
    for index in range(9):
        (out / f"a{index}").touch()
    with pytest.raises(UsageError, match=r"out holds a0, a1, a2, a3, a4 and 6 more, "):
        hub.save_pretrained(model, out, view=sparsifier)


def test_a_pair_is_refused_before_its_first_folder_is_written(tmp_path: Path):
    model, sparsifier = sparse()
    pair = st.Pair(tmp_path / "pair")
    pair.save(model, sparsifier)
    pair.copy("sparse", "sparse-best")
    (pair.folder / "sparse-best").mkdir()
    (pair.folder / "sparse-best" / "notes.txt").touch()
    before = entries(pair.folder)
    with pytest.raises(UsageError, match=r"sparse-best holds notes\.txt"):
        hub.save_pair(pair, model)
    assert entries(pair.folder) == before


@pytest.mark.parametrize("name", ["model.bin", ".git", "model-1.safetensors", "config.json.orig"])
def test_what_only_looks_like_ours_is_refused(tmp_path: Path, name: str):
    model, sparsifier = sparse()
    (tmp_path / name).touch()
    with pytest.raises(UsageError, match=f"holds {name}, "):
        hub.save_pretrained(model, tmp_path, view=sparsifier)


def test_a_card_that_somebody_wrote_is_refused(tmp_path: Path):
    model, sparsifier = sparse()
    (tmp_path / "README.md").write_text("# My model\n")
    with pytest.raises(UsageError, match=r"holds README\.md, "):
        hub.save_pretrained(model, tmp_path, view=sparsifier)


def test_what_an_earlier_call_wrote_is_replaced_by_either_form(tmp_path: Path):
    model, sparsifier = sparse()
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    (tmp_path / "model.safetensors.index.json").touch()
    for bitmask, weights in ((False, "model.safetensors"), (True, "sparse.safetensors"), (False, "model.safetensors")):
        hub.save_pretrained(model, tmp_path, view=sparsifier, bitmask=bitmask)
        assert set(entries(tmp_path)) == {"README.md", "config.json", "generation_config.json", weights}


def test_a_processor_is_replaced_and_never_lost(tmp_path: Path):
    model, sparsifier = sparse()
    for _ in range(2):
        hub.save_pretrained(model, tmp_path, view=sparsifier, processor=Processor())
    with pytest.raises(UsageError, match=r"additional_chat_templates, tokenizer\.json, .* processor="):
        hub.save_pretrained(model, tmp_path, view=sparsifier)
    assert (tmp_path / "tokenizer.json").exists()


def test_a_file_is_no_folder_to_write(tmp_path: Path):
    model, sparsifier = sparse()
    path = tmp_path / "model"
    path.write_text("precious")
    with pytest.raises(UsageError, match="model is a file"):
        hub.save_pretrained(model, path, view=sparsifier)
    assert path.read_text() == "precious"


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path):
    model, sparsifier = sparse()
    (tmp_path / "disk" / "real").mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "real")
    hub.save_pretrained(model, link, view=sparsifier)
    assert link.is_symlink()
    assert (tmp_path / "disk" / "real" / "model.safetensors").is_file()


def test_a_stop_between_the_renames_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, sparsifier = sparse()
    folder = tmp_path / "sparse"
    hub.save_pretrained(model, folder, view=sparsifier)
    before = entries(folder)
    rename = Path.rename

    def stop(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        hub.save_pretrained(model, folder, view=sparsifier, bitmask=True)
    assert entries(folder) == before
    assert list(tmp_path.iterdir()) == [folder]


def test_the_trainer_refuses_such_a_folder_before_it_trains(tmp_path: Path):
    (tmp_path / "pair" / "sparse").mkdir(parents=True)
    (tmp_path / "pair" / "sparse" / "precious.txt").touch()
    run = trainer(CASE, tmp_path, callbacks=[callback()])
    with pytest.raises(UsageError, match=r"sparse holds precious\.txt"):
        run.train()
    assert run.state.global_step == 0
