"""Names of DC-AE-V's weights, from DC-Gen `dc_videogen`, commit cae2205."""

from dcvideogen_jax.convert.engine import CONV3D, DENSE, Rule

_ATTENTION = ("q", "k", "v", "out")


def _conv(torch: str, jax: str) -> list[Rule]:
  return [
    Rule(f"{torch}.weight", f"{jax}/kernel", CONV3D),
    Rule(f"{torch}.bias", f"{jax}/bias"),
  ]


def _dense(torch: str, jax: str) -> list[Rule]:
  return [
    Rule(f"{torch}.weight", f"{jax}/kernel", DENSE),
    Rule(f"{torch}.bias", f"{jax}/bias"),
  ]


def _norm(torch: str, jax: str) -> list[Rule]:
  return [
    Rule(f"{torch}.weight", f"{jax}/scale"),
    Rule(f"{torch}.bias", f"{jax}/bias"),
  ]


def _stages(half: str) -> list[Rule]:
  torch = half + ".stages.{s}.op_list.{j}.main"
  jax = half + "/stages_{s}/op_list_{j}"
  return [
    *_conv(f"{torch}.conv1.conv", f"{jax}/conv1"),
    *_conv(f"{torch}.conv2.conv", f"{jax}/conv2")[:1],
    *_norm(f"{torch}.conv2.norm", f"{jax}/conv2/norm"),
    *_conv(f"{torch}.conv.conv", f"{jax}/conv"),
    # Attention is ours: no official weights have it.
    *_norm(f"{torch}.norm", f"{jax}/norm"),
    *[
      rule for x in _ATTENTION for rule in _dense(f"{torch}.{x}", f"{jax}/{x}")
    ],
  ]


RULES = [
  *_conv("encoder.project_in.conv.conv", "encoder/project_in/conv"),
  *_stages("encoder"),
  *_conv("encoder.project_out.conv", "encoder/project_out"),
  *_conv("decoder.project_in.conv", "decoder/project_in"),
  *_stages("decoder"),
  *_norm("decoder.project_out.op_list.0", "decoder/norm_out"),
  *_conv("decoder.project_out.op_list.2.conv.conv", "decoder/project_out/conv"),
]
