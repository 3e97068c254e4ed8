"""The page on several processes shows its example from top to bottom, and the example runs as copies and as shards."""

import re
from pathlib import Path

from launches import Server

import sparsetwin as st

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "distributed_digits.py"


def test_the_code_of_the_page_is_its_example():
    page = (ROOT / "docs" / "guides" / "distributed.md").read_text()
    shown = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    assert [line for line in shown.splitlines() if line.strip()] == [
        line for line in EXAMPLE.read_text().splitlines() if line.strip()
    ]


def test_the_example_trains_the_same_pair_as_copies_and_as_shards(server: Server, tmp_path: Path):
    told = []
    for kind, flags in (("copies", ()), ("shards", ("--fsdp",))):
        done = server.run(tmp_path, EXAMPLE, "--out", kind, *flags)
        assert done.codes == [0, 0], done.err
        told.append(done.out)
    found = [st.Pair(tmp_path / kind / "pair").members for kind in ("copies", "shards")]
    assert found[0] == found[1]
    assert found[0].keys() == {"dense", "sparse"}
    sparse = found[0]["sparse"]
    assert sparse.kept == sparse.targets - round(0.8 * sparse.targets)
    assert sparse.metrics["test_accuracy"] > 0.8
    assert f"sparse: {sparse.kept:,} of {sparse.targets:,} weights kept" in told[0]
    assert told[0] == told[1]
