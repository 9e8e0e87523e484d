"""The tiny family: a captioned world, models of it, and how they are made.

  synthetic   generated motion: shapes, textures, pans over photographs
  world       the captioned world: scenes, captions, clips; what is held out
  scorer      asks for held-out scenes and reads what a clip shows
  evaluators  of a training: held-out scenes, or samples to look at
  evaluation  how often a whole model is right
  download    real clips and photographs, out of ordinary packages
  clips       clips cut out of whole videos and photographs
  chain       runs programs of which each reads what earlier ones made
  family      the stages from real clips to the weights that ship

`dcvideogen_jax.data` draws clips from `synthetic` and `world`, which lie below
it; all else lies above training and sampling.
"""
