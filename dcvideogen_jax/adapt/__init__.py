"""AE-Adapt-V: a video diffusion model moves to another latent space."""
