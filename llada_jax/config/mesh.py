"""How many devices lie along each axis of the mesh."""

import dataclasses
from typing import Self

from llada_jax.config import model as model_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis, outermost first.

    Attributes:
      data: copies of the model that see different rows.
      fsdp: ranks that see different rows and share the parameters between them when training.
      expert: ranks that hold different experts.
      tensor: ranks that hold different heads, MLP channels and vocabulary rows.
    """

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(
                    f"mesh axis {field.name}: {getattr(self, field.name)} must be >= 1"
                )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Axis sizes in mesh order."""
        return (self.data, self.fsdp, self.expert, self.tensor)

    @property
    def num_devices(self) -> int:
        """Devices that the mesh takes."""
        return self.data * self.fsdp * self.expert * self.tensor

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads "data,fsdp,expert,tensor", for example "2,1,2,2"."""
        parts = text.replace("x", ",").strip("()").split(",")
        try:
            sizes = [int(p) for p in parts]
        except ValueError:
            sizes = []
        if len(sizes) != 4:
            raise ValueError(
                f"mesh {text!r}: give four sizes, data,fsdp,expert,tensor, for example 1,1,8,1"
            )
        return cls(**dict(zip(("data", "fsdp", "expert", "tensor"), sizes, strict=True)))

    def validate(self, model: model_config.ModelConfig) -> None:
        """Checks that every sharded dimension of the model divides.

        Raises:
          ValueError: names the field, its size, and the axis that does not divide it.
        """
        sizes = [
            ("num_attention_heads", model.num_attention_heads, "tensor"),
            ("num_key_value_heads", model.num_key_value_heads, "tensor"),
            ("vocab_size", model.vocab_size, "tensor"),
            ("hidden_size", model.hidden_size, "fsdp"),
        ]
        if model.first_k_dense_replace:
            sizes.append(("intermediate_size", model.intermediate_size, "tensor"))
        if model.num_moe_layers:
            sizes += [
                ("num_experts", model.num_experts, "expert"),
                ("moe_intermediate_size", model.moe_intermediate_size, "tensor"),
            ]
        for name, size, axis in sizes:
            if size % getattr(self, axis):
                raise ValueError(
                    f"{name}: {size} is not divisible by the {getattr(self, axis)} devices of mesh "
                    f"axis {axis!r}; choose a mesh whose {axis} size divides it"
                )
