"""Why a family keeps its quality when its weights lose bits: where the error arises, and what becomes of it.

- `subject`, `streams`: a model as this room sees it, and what flows between its blocks
- `middle`: error of middle representations, per call and block, on the same inputs and when both play freely
- `estimate`: a figure with its bootstrap resamples over images; everything below is told with intervals
- `flips`, `draws`: errors before a token is drawn, and what the draw makes of them
- `codebook`, `rediscretise`: the control: a denoiser whose clean latents are put onto a codebook
- `kinds`: sensitivity per kind of layer
- `moderators`: guidance and filters

`benchmarks/scaling_analysis.py` runs all of it; `docs/scaling-analysis.md` tells what came out.
"""
