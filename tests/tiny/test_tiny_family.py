"""The shipped tiny models show what held-out prompts ask for."""

import pytest

from configs import sample
from dcvideogen_jax.sample import model_names, pipeline
from dcvideogen_jax.tiny import evaluation


# docs/results.md has 400 prompts; fewer may fall a little below its figures by
# chance.
@pytest.mark.parametrize(("config", "count"), [("tiny", 48), ("tiny-i2v", 12)])
def test_shipped_models_follow_held_out_prompts(config, count):
  c = sample.get_config(config)
  made = pipeline.DCVideoGen.from_pretrained(
    model_names.pipeline(c.model), task=c.task
  )
  found = evaluation.score(
    made,
    count,
    24,
    0,
    (c.frames, 64, 64),
    steps=c.steps,
    guidance_scale=c.guidance_scale,
  )
  assert found.tokens == 16
  assert found.accuracy["all"] >= 0.8
