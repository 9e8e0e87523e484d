"""DC-VideoGen in JAX: deep compression video autoencoders and their use.

Dimension letters, one legend for annotations, einsum and einops alike:

  b  batch                    n  tokens
  t  frames                   s  text tokens
  h  height, w  width         d  model width
  c  channels                 k  heads, e  head width, f  feed-forward width

`t h w` count pixels or latents; each docstring says which. Arrays are channels
last, `b t h w c`, everywhere; only `convert/` and the tests know PyTorch's
`B C T H W`.
"""

__version__ = "0.1.0"
