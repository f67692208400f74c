"""Everything that depends on transformers: configuration, blocks, experts, tensor names, forward passes."""
