"""Masks of weights that live and die in groups: N:M, blocks and channels. `sparsetwin.select_masks` comes here."""

from sparsetwin.grouped_selection._budgets import check_groups, kept_by
from sparsetwin.grouped_selection._reference import reference_grouped_masks
from sparsetwin.grouped_selection._selection import select_grouped_masks
from sparsetwin.grouped_selection._structure import is_nm

__all__ = ["check_groups", "is_nm", "kept_by", "reference_grouped_masks", "select_grouped_masks"]
