"""AE-Adapt-V: adapts a video diffusion model to another latent space."""
