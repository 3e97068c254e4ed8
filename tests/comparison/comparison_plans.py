"""Plans of comparisons on the digits."""

from sparsetwin.comparison import Plan, find_contender
from sparsetwin.recipes import find_recipe

DIGITS = find_recipe("digits")


def plan(*labels: str, **fields) -> Plan:
    usual = {"sparsities": (0.9, 0.95), "seeds": (0, 1), "recipe": DIGITS, "reference": "acdc"}
    return Plan(contenders=tuple(map(find_contender, labels)), **{**usual, **fields})
