"""Read and write checkpoints one tensor at a time; local folders and the Hub."""
