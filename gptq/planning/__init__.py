"""Everything that is decided from headers and config.json, before a weight is read."""
