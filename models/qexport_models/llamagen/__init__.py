"""LlamaGen: image generation by next-token prediction, class-conditional (Sun et al. 2024, arXiv 2406.06525)."""
