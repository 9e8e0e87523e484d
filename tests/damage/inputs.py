"""All that is damaged."""

from tests.damage import (
  clips,
  media,
  models,
  pipelines,
  quantised,
  texts,
  updates,
)

INPUTS = (
  *models.INPUTS,
  *updates.INPUTS,
  *pipelines.INPUTS,
  *media.INPUTS,
  *texts.INPUTS,
  *clips.INPUTS,
  *quantised.INPUTS,
)
