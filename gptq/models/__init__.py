"""The only room that knows transformers: configuration, blocks, experts, tensor names, forward."""
