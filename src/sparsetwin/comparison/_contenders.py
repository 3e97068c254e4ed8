"""What is compared: a method with its settings, as changes to a recipe."""

import ast
import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsetwin.comparison._aim import Aim
from sparsetwin.errors import ConfigError, nearest
from sparsetwin.methods import BATCHES_AFTER_CUT, METHODS
from sparsetwin.recipes import Recipe

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]*")

HAM = (200.0, 1e-3)
"""Alpha and beta of the contenders with the hyperbolic mirror step, before any tuning."""

PRETRAINED = "pretrained"
"""Name of the dense runs that contenders begin from which need a trained network."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One row of the table."""

    label: str
    changes: Mapping[str, Any] = field(default_factory=dict)  # field of the recipe, such as optimizer.lr -> value
    shrinks: str | None = None  # "parameters" or "flops": a narrower dense network, equal in these to the sparse one
    starts: str | None = None  # PRETRAINED where training begins from the weights of a dense run
    aim: Aim | None = None  # what its trials set to reach the sparsity, where that cannot be asked for
    whole_rounds: bool = False  # whether each round of training and pruning takes the recipe's epochs

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.changes.get("method.name", "acdc"))

    @property
    def is_dense(self) -> bool:
        """Whether it has no sparsity, so that one set of runs serves all sparsities."""
        return self.method == "dense" and self.shrinks is None


def _plain(name: str) -> Contender:
    return Contender(label=name, changes={"method.name": name})


_SPECIAL = {
    contender.label: contender
    for contender in (
        Contender(label="acdc+ham", changes={"method.name": "acdc", "method.ham": HAM}),
        Contender(label="gmp+ham", changes={"method.name": "gmp", "method.ham": HAM}),
        Contender(
            label="acdc++",
            changes={
                "method.name": "acdc",
                "schedule.unit": "fractions",
                "schedule.paper": None,
                "schedule.warmup": 0.1,
                "schedule.sparse": 0.05,
                "schedule.dense": 0.05,
                "schedule.final_dense": 0.1,
                "schedule.final_sparse": 0.15,
            },
        ),
        Contender(label="acdc-uniform", changes={"method.name": "acdc", "method.distribution": "uniform"}),
        Contender(label="small-dense-parameters", changes={"method.name": "dense"}, shrinks="parameters"),
        Contender(label="small-dense-flops", changes={"method.name": "dense"}, shrinks="flops"),
        Contender(
            label="oneshot-pretrained",
            changes={"method.name": "oneshot", "schedule.kind": "oneshot", "schedule.start": 0.0},
            starts=PRETRAINED,
        ),
        Contender(label="gmp-pretrained", changes={"method.name": "gmp", "schedule.start": 0.0}, starts=PRETRAINED),
        Contender(label="woodfisher", changes={"method.name": "woodfisher"}, starts=PRETRAINED),
        Contender(label="cram", changes={"method.name": "cram", "train.recalibrate_batches": BATCHES_AFTER_CUT}),
        Contender(label="imp-whole", changes={"method.name": "imp"}, whole_rounds=True),
        Contender(
            label="str",
            changes={"method.name": "str", "method.options.exact_final": True},
            aim=Aim(path="method.options.initial", first=-4.0, changes={"method.options.exact_final": False}),
        ),
        Contender(
            label="str-learned",
            changes={"method.name": "str"},
            aim=Aim(path="method.options.initial", first=-4.0),
        ),
    )
}


def known_labels() -> tuple[str, ...]:
    """Return the labels that `find_contender` knows."""
    return tuple(dict.fromkeys([*METHODS, *_SPECIAL]))


def find_contender(text: str) -> Contender:
    """Return a contender by its label, or by a label of its own with changes.

    >>> find_contender("rigl-slow=rigl,schedule.every=10,method.options.drop_fraction=0.5").changes
    {'method.name': 'rigl', 'schedule.every': 10, 'method.options.drop_fraction': 0.5}

    Args:
        text: ``LABEL``, or ``LABEL=KNOWN,FIELD=VALUE,...`` with fields of the recipe.

    Raises:
        ConfigError: If the label is unknown, or a change is none.
    """
    label, _, rest = text.partition("=")
    if not _LABEL.fullmatch(label) or label == PRETRAINED:
        raise ConfigError(
            f"a label is the name of a folder, of letters, digits and .+_- beginning with a letter or digit, and not "
            f"{PRETRAINED!r}; got {label!r}"
        )
    base, *changes = re.split(r",(?![^(\[{]*[)\]}])", rest) if rest else [label]  # commas outside brackets
    if base not in known_labels():
        raise ConfigError(
            f"unknown contender {base!r}; known: {', '.join(known_labels())}, or LABEL=KNOWN,FIELD=VALUE,..."
            f"{nearest(base, known_labels())}"
        )
    found = _SPECIAL.get(base) or _plain(base)
    own = dict(map(_change, changes))
    aim = None if found.aim is None or found.aim.path in own else found.aim  # what is given is not looked for
    return dataclasses.replace(found, label=label, aim=aim, changes={**found.changes, **own})


def _change(text: str) -> tuple[str, Any]:
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise ConfigError(
            f"a change is FIELD=VALUE with a field of the recipe, such as optimizer.lr=0.05, got {text!r}"
        )
    try:
        return path, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return path, value


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return a recipe with fields replaced.

    Args:
        recipe: The configuration to begin from.
        changes: Field -> value; dots lead into nested settings and into dicts such as ``method.options``.

    Raises:
        ConfigError: If there is no such field, or it cannot have the value.
    """
    for path, value in changes.items():
        recipe = _replaced(recipe, path.split("."), value, path)
    return recipe


def _replaced(settings: Any, path: list[str], value: Any, whole: str) -> Any:
    name, *rest = path
    if isinstance(settings, dict):
        return {**settings, name: _replaced(settings[name], rest, value, whole) if rest else value}
    fields = {f.name for f in dataclasses.fields(settings)} if dataclasses.is_dataclass(settings) else set()
    if name not in fields:
        raise ConfigError(f"a recipe has no field {whole!r}{nearest(name, fields)}")
    new = _replaced(getattr(settings, name), rest, value, whole) if rest else value
    try:
        return dataclasses.replace(settings, **{name: new})
    except TypeError as error:  # such as of a word where a number is compared
        raise ConfigError(f"{whole} cannot be {value!r}: {error}") from error
