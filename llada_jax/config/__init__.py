"""Frozen dataclasses that say what is built and run: the model, the mesh, the training run."""

from llada_jax.config.data import DataConfig, PackingConfig, SourceConfig
from llada_jax.config.mesh import MeshConfig
from llada_jax.config.model import DTYPES, SPECIAL_ID_FIELDS, ModelConfig
from llada_jax.config.presets import PRESETS
from llada_jax.config.rope import RopeScaling

__all__ = [
    "DTYPES",
    "PRESETS",
    "SPECIAL_ID_FIELDS",
    "DataConfig",
    "MeshConfig",
    "ModelConfig",
    "PackingConfig",
    "RopeScaling",
    "SourceConfig",
]
