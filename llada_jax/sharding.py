"""The device mesh, and which of its axes each logical dimension of the model is split over."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax import P
from jax.sharding import AxisType
from jaxtyping import Array

from llada_jax import config

MESH_AXES = ("data", "fsdp", "expert", "tensor")

MeshAxes = tuple[str, ...] | str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxisRules:
    """Mesh axes of each logical axis; None keeps a dimension whole on every device.

    Attributes:
      batch: rows of a batch.
      embed: the residual stream's dimension of a parameter. Activations keep it whole.
      heads: query heads.
      kv_heads: key and value heads.
      mlp: inner dimension of MLPs and experts.
      expert: routed experts.
      vocab: rows of the embedding and of the head.
    """

    batch: MeshAxes = ("data", "fsdp")
    embed: MeshAxes = None
    heads: MeshAxes = "tensor"
    kv_heads: MeshAxes = "tensor"
    mlp: MeshAxes = "tensor"
    expert: MeshAxes = "expert"
    vocab: MeshAxes = "tensor"

    def spec(self, *logical_axes: str | None) -> P:
        """The partition of an array whose dimensions have these logical axes.

        Names without a rule (`layers`, `length`, `head_dim`) and None stay whole.
        """
        ruled = {f.name for f in dataclasses.fields(self)}
        whole = {"layers", "length", "head_dim", None}
        for name in logical_axes:
            if name not in ruled and name not in whole:
                raise ValueError(f"logical axis {name!r} is not one of {sorted(ruled)}")
        return P(*(getattr(self, name) if name in ruled else None for name in logical_axes))


# Sampling keeps every parameter whole along `embed`: gathering weights at each denoising step
# would cost more than they take. Training shares them, and their optimizer state, over `fsdp`.
SERVE_RULES = AxisRules()
TRAIN_RULES = AxisRules(embed="fsdp")


def make_mesh(
    mesh: config.MeshConfig | None = None, devices: Sequence[Any] | None = None
) -> jax.sharding.Mesh:
    """A mesh with explicit axes over the first devices.

    Args:
      mesh: sizes of the axes; by default one device.
      devices: `jax.Device`s to take from; by default all of this process group.

    Raises:
      ValueError: there are fewer devices than the mesh takes.
    """
    mesh = mesh or config.MeshConfig()
    devices = list(jax.devices() if devices is None else devices)
    if len(devices) < mesh.num_devices:
        raise ValueError(
            f"mesh {mesh.shape} takes {mesh.num_devices} devices and {len(devices)} are present; "
            "choose a smaller mesh (to simulate devices on a CPU, set "
            "XLA_FLAGS=--xla_force_host_platform_device_count=8)"
        )
    return jax.make_mesh(
        mesh.shape,
        MESH_AXES,
        axis_types=(AxisType.Explicit,) * len(MESH_AXES),
        devices=devices[: mesh.num_devices],
    )


def axis_names(axes: MeshAxes) -> tuple[str, ...]:
    """The mesh axes of a rule, as collectives take them; none for a dimension kept whole."""
    return (axes,) if isinstance(axes, str) else axes or ()


def axis_index(axes: MeshAxes) -> Array | int:
    """Which shard along these axes a device holds, within `jax.shard_map`."""
    names = axis_names(axes)
    return jax.lax.axis_index(names) if names else 0


def axis_size(axes: MeshAxes) -> int:
    """Number of shards along these axes of the current mesh."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    total = 1
    for name in axis_names(axes):
        total *= sizes[name]
    return total
