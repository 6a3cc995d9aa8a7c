"""Kernels for Hopper in Gluon: loads by warps of their own, products left in flight while others are computed."""
