"""The exception tree is the one that its module draws."""

import re

from sparsetwin import errors
from sparsetwin.errors import SparsetwinError, nearest


def test_the_drawn_tree_lists_every_error_with_its_built_in_base():
    drawn = dict(re.findall(r"(\w+Error) .*\(also an? (\w+)\)", errors.__doc__))
    raised = {
        name: kind.__bases__ for name, kind in vars(errors).items() if isinstance(kind, type) and kind.__name__ == name
    }
    raised = {name: bases for name, bases in raised.items() if SparsetwinError in bases}
    assert {name: bases[1].__name__ for name, bases in raised.items()} == drawn
    assert all(bases[0] is SparsetwinError for bases in raised.values())


def test_the_nearest_known_name_is_suggested_if_there_is_one():
    assert nearest("cifr10", ["cifar10", "imagenet"]) == "; did you mean 'cifar10'?"
    assert nearest("x", ["cifar10", "imagenet"]) == ""
    assert nearest("x", []) == ""
