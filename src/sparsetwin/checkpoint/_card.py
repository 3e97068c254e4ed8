"""``README.md`` of a pair: what the networks are, what was measured, and whose data they learnt from."""

from collections.abc import Iterable, Mapping

from sparsetwin.checkpoint._pair_file import About, Member
from sparsetwin.checkpoint._plain import JSON

CARD_FILE = "README.md"


def pair_card(members: Mapping[str, Member], about: About) -> str:
    """Return the text of a card; equal pairs get equal cards."""
    title = f"# {about.architecture}: a dense network and its sparse twin" if about.architecture else "# A pair"
    rows = [
        (member.name, f"`{member.file}`", f"{member.sparsity:.4%}", f"{member.kept:,}", f"{member.targets:,}",
         f"{member.step:,}")
        for _, member in sorted(members.items())
    ]  # fmt: skip
    parts = [
        "---\nlibrary_name: sparsetwin\ntags:\n- sparsetwin\n- sparse\n---",
        title,
        "Networks of one training run. In the sparse ones every pruned weight is exactly zero, and the file holds one "
        "bit a weight and the kept values.",
        table(("network", "file", "sparsity", "weights kept", "weights that may be pruned", "steps"), rows),
    ]
    measured = [
        (member.name, metric, shown(value))
        for _, member in sorted(members.items())
        for metric, value in _flat(member.metrics)
    ]
    if measured:
        parts += ["## Evaluation", table(("network", "metric", "value"), measured)]
    told = f"{about.notice}. These are the data's terms." if about.notice else _NOT_TOLD
    parts += ["## Data and licence", f"{told} The weights have no licence until their owner states one here."]
    parts += ["## Use", _USE]
    return "\n\n".join(parts) + "\n"


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a table in Markdown."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def shown(value: JSON) -> str:
    """Return a measured value as a card shows it."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _flat(metrics: Mapping[str, JSON], prefix: str = "") -> Iterable[tuple[str, JSON]]:
    for name, value in sorted(metrics.items()):
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", value


_NOT_TOLD = "Origin and licence of the training data were not recorded."
_USE = """```python
import sparsetwin as st

pair = st.Pair("path/to/this/folder")
model = pair.sparse(my_model)  # a deep copy of a model of the same architecture, with these weights
```"""
