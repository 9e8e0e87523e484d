"""Names of DC-AE-V's weights, from DC-Gen `dc_videogen`, commit cae2205."""

from dcvideogen_jax.convert.naming import CONV3D, Rule, linear, norm


def _stages(half: str) -> list[Rule]:
  torch = half + ".stages.{s}.op_list.{j}.main"
  jax = half + "/stages_{s}/op_list_{j}"
  rules = [
    *linear(f"{torch}.conv1.conv", f"{jax}/conv1", CONV3D),
    *linear(f"{torch}.conv2.conv", f"{jax}/conv2", CONV3D)[:1],
    *norm(f"{torch}.conv2.norm", f"{jax}/conv2/norm"),
    *linear(f"{torch}.conv.conv", f"{jax}/conv", CONV3D),
    # Attention is an addition of this package; no official weights have it.
    *norm(f"{torch}.norm", f"{jax}/norm"),
  ]
  for x in ("q", "k", "v", "out"):
    rules += linear(f"{torch}.{x}", f"{jax}/{x}")
  return rules


_UP = "decoder.project_out.op_list"
DECODER_RULES = [
  *linear("decoder.project_in.conv", "decoder/project_in", CONV3D),
  *_stages("decoder"),
  *norm(f"{_UP}.0", "decoder/norm_out"),
  *linear(f"{_UP}.2.conv.conv", "decoder/project_out/conv", CONV3D),
]
RULES = [
  *linear("encoder.project_in.conv.conv", "encoder/project_in/conv", CONV3D),
  *_stages("encoder"),
  *linear("encoder.project_out.conv", "encoder/project_out", CONV3D),
  *DECODER_RULES,
]
