"""CUDA kernels of our own, for what graphs launch in hundreds of pieces: sources (`*.cu`), compiling and keeping them
(`compiler`), launching them (`draw`). No backend is imported: a backend hands in its device."""
