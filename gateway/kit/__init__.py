"""Batteries for plugin authors: what two plugins need. Public and kept stable."""

from gateway.kit.keys import hash_key, is_hash, is_well_formed, new_key
from gateway.kit.ledger import Admission, Rule, State
from gateway.kit.subjects import By, choices, input_bound, input_estimate, output_cap, subjects

__all__ = [
    "Admission",
    "By",
    "Rule",
    "State",
    "choices",
    "hash_key",
    "input_bound",
    "input_estimate",
    "is_hash",
    "is_well_formed",
    "new_key",
    "output_cap",
    "subjects",
]
