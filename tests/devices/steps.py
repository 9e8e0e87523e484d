"""Steps of training that are compiled for devices that are not there."""

from configs import adapt, dc_ae_v, tiny

# Alike in everything but size: each phase of AE-Adapt-V in half precision, as
# released models train, with the odd number of keys that CLIP gives, and
# autoencoders.
SMALL = (
  *(f"adapt:tiny_i2v,phase={phase}" for phase in adapt.PHASES),
  "adapt:tiny_i2v,phase=lora,causal=teacher",
  "adapt:tiny_t2v,phase=lora",
  "dc_ae_v:f32t4c32,runlocal",
  "dc_ae_v:f32t4c32,phase=adversarial,runlocal",
  "tiny:autoencoder",
  "tiny:wan_autoencoder",
)
_FILES = {"adapt": adapt, "dc_ae_v": dc_ae_v, "tiny": tiny}


def config(name):
  """The config of a name such as "tiny:autoencoder"."""
  file, _, arg = name.partition(":")
  found = _FILES[file].get_config(arg)
  if file == "adapt":
    found.dtype = found.frozen_dtype = "bfloat16"
  return found.to_dict()
