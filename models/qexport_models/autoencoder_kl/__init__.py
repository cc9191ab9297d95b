"""The KL autoencoder of latent diffusion (arXiv:2112.10752) in diffusers' `AutoencoderKL` layout (Apache-2.0)."""
