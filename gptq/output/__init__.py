"""A finished folder: results, record, model card, verification, conversion."""
