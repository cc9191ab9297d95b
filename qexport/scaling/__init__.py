"""Bit-level scaling: which size of model at how many bits. Sweeps, a store of runs, the law, recommendations."""
