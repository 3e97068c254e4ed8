"""A model card with measured numbers."""

from collections.abc import Iterable

from sparsetwin.checkpoint import Member
from sparsetwin.methods import Method
from sparsetwin.schedules import Schedule


def model_card(member: Member, *, model_class: type, method: Method | None, is_packed: bool) -> str:
    """Return the text of a card; equal networks get equal cards.

    Args:
        member: The network and what was measured of it.
        model_class: Its class, which opens all of its weights; Auto classes leave heads out.
        method: How it was trained.
        is_packed: Its weights are in the sparse form.
    """
    kind = "sparse" if member.kept < member.targets else "dense"
    tags = ["sparsetwin", kind] + ([type(method).__name__.lower()] if method else [])
    numbers = [
        ("member of the pair", member.name),
        ("optimizer steps", f"{member.step:,}"),
        ("weights that may be pruned", f"{member.targets:,}"),
        ("of these kept", f"{member.kept:,}"),
        ("sparsity of these", f"{member.sparsity:.4%}"),
    ]
    parts = [
        "\n".join(["---", "library_name: transformers", "tags:", *(f"- {tag}" for tag in tags), "---"]),
        f"# {model_class.__name__}, {member.name}",
        _INTRODUCTION[kind],
        _table(("what", "measured"), numbers),
    ]
    if member.metrics:
        rows = [(name, _shown(value)) for name, value in sorted(member.metrics.items())]
        parts += ["## Evaluation", "At the end of this network's own phase:", _table(("metric", "value"), rows)]
    if method is not None:
        parts += ["## Training", f"Method: {type(method).__name__}.", _schedule(method.schedule)]
    parts += ["## Use", _use(model_class, is_packed=is_packed)]
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = {
    "sparse": "The sparse half of a pair that one training run gave: its pruned weights are exactly zero.",
    "dense": "The dense half of a pair that one training run gave.",
}


def _use(model_class: type, *, is_packed: bool) -> str:
    name, module = model_class.__name__, model_class.__module__
    is_known = module.startswith("transformers.")
    own = f"from {'transformers' if is_known else module} import {name}"
    if not is_packed:
        return _USE.format(imports=own, opens=f'{name}.from_pretrained("path/to/this/folder")')
    hub = "from sparsetwin.integrations import hub"
    given = "" if is_known else f", {name}"
    code = _USE.format(
        imports=hub if is_known else f"{hub}\n{own}", opens=f'hub.from_pretrained("path/to/this/folder"{given})'
    )
    return f"The weights are stored as one bit a weight and the kept values:\n\n{code}"


_USE = """```python
{imports}

model = {opens}
```"""


def _schedule(schedule: Schedule) -> str:
    rows = [(str(p.start), str(p.stop), f"{p.sparsity:g}" if p.is_sparse else "dense") for p in schedule.phases]
    return _table(("from step", "to step", "sparsity"), rows)


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
