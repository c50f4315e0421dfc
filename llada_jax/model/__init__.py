"""The LLaDA2 network as Flax NNX modules."""
