"""The videos of a list of prompts, under the names that `sample` gives them."""

from collections.abc import Sequence

from dcvideogen_jax.sample import request_list, vbench


class Video(vbench.Video):
  """A video to make, named by its number, prompt and seed."""

  def name(self, index: int = 0) -> str:
    """Returns the file name without suffix."""
    del index
    return request_list.Request(*self[:5]).name(self.row)


def of(requests: Sequence[request_list.Request]) -> list[Video]:
  """Returns the videos that requests ask for, in the same order.

  Args:
    requests: as `request_list.gather` returns them.
  """
  return [
    Video(*request, original=request.prompt, sample=0, row=i)
    for i, request in enumerate(requests)
  ]
