"""Batteries for plugin authors: what two plugins need. Public and kept stable."""

from gateway.kit.keys import hash_key, is_hash, is_well_formed, new_key

__all__ = ["hash_key", "is_hash", "is_well_formed", "new_key"]
