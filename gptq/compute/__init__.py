"""Machine-level building blocks: matrix products, threads, SIMD, memory allocation, process groups."""
