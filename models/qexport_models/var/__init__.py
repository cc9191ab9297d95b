"""VAR: visual autoregressive modelling by next-scale prediction (Tian et al. 2024, arXiv 2404.02905)."""
