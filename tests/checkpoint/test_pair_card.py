"""The card of a pair: what the networks are, what was measured, whose data they learnt from."""

import json

import pytest

from sparsetwin.checkpoint import Pair, read_card
from sparsetwin.errors import CheckpointError

NOTICE = "Handwritten digits, E. Alpaydin and C. Kaynak, CC BY 4.0"


@pytest.fixture
def saved(tmp_path, network, pruned, dense_view, sparse_view):
    pair = Pair(tmp_path / "pair", notice=NOTICE)
    pair.save(network, dense_view)
    pair.save(pruned, sparse_view, metrics={"test": {"accuracy": 0.875}})
    return pair


def text_of(pair):
    return (pair.folder / "README.md").read_text()


def test_the_card_tells_networks_measurements_and_the_datas_licence(saved, sparse_view):
    text = text_of(saved)
    member = saved.members["sparse"]
    assert "# Network: a dense network and its sparse twin" in text
    assert (
        f"| sparse | `sparse.safetensors` | {member.sparsity:.4%} | {member.kept:,} | {member.targets:,} | 20 |" in text
    )
    assert "| dense | `dense.safetensors` | 0.0000% |" in text
    assert "| sparse | test accuracy | 0.875 |" in text
    assert f"{NOTICE}. These are the data's terms." in text
    assert "The weights have no licence until their owner states one" in text
    assert "pair.sparse(my_model)" in text


def test_every_half_carries_the_notice_itself(saved):
    for member in saved.members.values():
        assert read_card(saved.folder / member.file)["data_notice"] == NOTICE


def test_the_card_follows_every_change(saved, network):
    saved.annotate("dense", {"hold-out": 0.5})
    assert "| dense | hold-out | 0.5 |" in text_of(saved)
    saved.rename("sparse", "sparse-0.75")
    saved.copy("dense", "dense-best")
    assert "`sparse-0.75.safetensors`" in text_of(saved)
    assert "`sparse.safetensors`" not in text_of(saved)
    assert "`dense-best.safetensors`" in text_of(saved)


def test_what_was_told_once_stays_when_another_process_goes_on(saved, network, dense_view):
    later = Pair(saved.folder)
    assert later.notice == NOTICE
    later.save(network, dense_view, name="dense-2")
    later.annotate("dense", {})
    assert NOTICE in text_of(later)
    assert read_card(later.folder / "dense-2.safetensors")["data_notice"] == NOTICE


def test_a_pair_without_a_notice_says_so(tmp_path, network, dense_view):
    pair = Pair(tmp_path)
    pair.save(network, dense_view)
    assert "Origin and licence of the training data were not recorded." in text_of(pair)
    assert "data_notice" not in read_card(tmp_path / "dense.safetensors")
    assert pair.notice == ""


def test_equal_pairs_have_equal_cards(tmp_path, network, pruned, dense_view, sparse_view):
    files = []
    for name in ("a", "b"):
        pair = Pair(tmp_path / name, notice=NOTICE)
        pair.save(network, dense_view, metrics={"loss": 0.1, "accuracy": 0.2})
        pair.save(pruned, sparse_view)
        files.append({path.name: path.read_bytes() for path in pair.folder.iterdir()})
    assert files[0] == files[1]
    assert len(files[0]) == 4


def test_pairs_of_earlier_releases_have_no_about_and_are_read(saved, network):
    path = saved.folder / "pair.json"
    content = json.loads(path.read_text())
    assert content.pop("about") == {"architecture": "Network", "notice": NOTICE}
    path.write_text(json.dumps(content))
    old = Pair(saved.folder)
    assert list(old.members) == ["dense", "sparse"]
    assert old.notice == ""


@pytest.mark.parametrize("about", [3, {"owner": "me"}, {"notice": 3}])
def test_a_malformed_about_is_refused(saved, about):
    path = saved.folder / "pair.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "about": about}))
    with pytest.raises(CheckpointError, match=r"pair.json: 'about' (has|holds)"):
        _ = Pair(saved.folder).members
