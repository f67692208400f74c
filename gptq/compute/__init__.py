"""What the machine can do: products, threads, SIMD, memory, processes."""
