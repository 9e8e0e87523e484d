"""Videos, images and texts as the diffusion model sees them, and back."""
