"""What disks and networks do to bytes: flip, lose, repeat, exchange and cut."""

import math

import numpy as np

Random = np.random.Generator

# Where the first or last bytes are aimed at, as long as headers often are.
_EDGE = 512


def choice(random: Random, choices):
  """One of the choices, as it is: numpy would make an array of them."""
  choices = list(choices)
  return choices[int(random.integers(len(choices)))]


def change(content: bytes, random: Random) -> tuple[bytes, str]:
  change = choice(random, _CHANGES)
  at = _position(len(content), random)
  length = int(2 ** random.uniform(0, math.log2(max(2, len(content)))))
  return (
    change(content, at, length, random),
    f"{change.__name__.strip('_')} at {at} of {len(content)} ({length})",
  )


def _position(size: int, random: Random) -> int:
  """Anywhere, or near one of the ends, where structure often is."""
  first, last = choice(
    random, [(0, size), (0, size), (0, _EDGE), (size - _EDGE, size)]
  )
  return int(random.integers(max(0, first), max(1, min(last, size))))


def _flip(content, at, length, random):
  del length
  changed = bytearray(content or b"\0")
  changed[at] ^= 1 << int(random.integers(8))
  return bytes(changed)


def _flips(content, at, length, random):
  for _ in range(min(length, 64)):
    content = _flip(content, at, length, random)
    at = int(random.integers(len(content)))
  return content


def _zeros(content, at, length, random):
  del random
  length = len(content[at : at + length])
  return content[:at] + bytes(length) + content[at + length :]


def _noise(content, at, length, random):
  length = len(content[at : at + length])
  return content[:at] + random.bytes(length) + content[at + length :]


def _cut(content, at, length, random):
  del length, random
  return content[:at]


def _cut_a_little(content, at, length, random):
  del at, length
  return content[: -int(random.integers(1, 64))]


def _empty(content, at, length, random):
  del content, at, length, random
  return b""


def _lose(content, at, length, random):
  del random
  return content[:at] + content[at + length :]


def _repeat(content, at, length, random):
  del random
  return content[: at + length] + content[at:]


def _insert(content, at, length, random):
  return content[:at] + random.bytes(min(length, 4096)) + content[at:]


def _append(content, at, length, random):
  del at
  return content + random.bytes(min(length, 4096))


def _exchange(content, at, length, random):
  """Two blocks change places, as when packets come in another order."""
  length = min(length, len(content) // 2)
  first, second = sorted(
    (at, int(random.integers(max(1, len(content) - length + 1))))
  )
  if first + length > second:
    return content[::-1]
  one = content[first : first + length]
  other = content[second : second + length]
  between = content[first + length : second]
  return content[:first] + other + between + one + content[second + length :]


_CHANGES = (
  *(_flip, _flip, _flips, _zeros, _noise, _cut, _cut, _cut_a_little, _empty),
  *(_lose, _repeat, _insert, _append, _exchange),
)
