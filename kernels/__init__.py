"""Triton kernels and their launchers; no autograd. Installed as `realm_fast.kernels`."""
