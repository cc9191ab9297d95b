"""DiT: diffusion transformers on latents (Peebles & Xie, arXiv:2212.09748).

Written from the paper and from recorded behaviour, not from the original code, which is CC-BY-NC 4.0; the published
weights are under that licence too, and so is what is made from them.
"""
