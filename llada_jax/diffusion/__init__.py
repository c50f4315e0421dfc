"""Masks, unmasking strategies and the sampling loop, for any denoiser."""
