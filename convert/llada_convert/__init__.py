"""Converts LLaDA2 checkpoints between the Hugging Face layouts and llada_jax's Orbax layout."""
