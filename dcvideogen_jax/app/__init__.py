"""The page of `dcvideogen app`: what it asks, makes and shows.

Everything that it makes comes from `sample` and `eval`, which write the same
files as the programs do.
"""
