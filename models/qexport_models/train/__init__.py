"""Training of the reference models: VQVAE, VAR, KL autoencoder, DiT and FeatureNet. `docs/training.md` is the guide.

    python -m qexport_models.train var --data cifar_train.npz --depth 3 --out var-c10-d3.safetensors

One file a concept: `recipe` (what decides the result), `data` (images, their order and mirroring), `initial` (weights
to start from), one file for each objective, `trainer` (steps, averages, checkpoints), `weights` (files), `command`.
"""
