"""The collectives of a compiled program: kind, mesh axes, how often, and how many bytes they move.

Bytes are what one device sends along a ring, the fewest that a collective over `n` devices needs:

    all-reduce                             2 (n - 1) / n of its operand
    reduce-scatter, all-to-all             (n - 1) / n of its operand
    all-gather                             (n - 1) of its operand, which is 1 / n of its result
    collective-permute                     its operand
    ragged-all-to-all                      (n - 1) / n of its buffer, an upper bound: data decide
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from llada_jax.plan import hlo

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective instruction.

    Attributes:
      kind: one of `KINDS`.
      axes: mesh axes that it runs along, joined by "+"; "?" where its groups are no product of
        axes.
      num_devices: devices of a group.
      count: executions per run of the program, loops of unknown length counted once.
      operand_bytes: bytes of its operands on a device, at each execution.
      sent_bytes: what a device sends at each execution, see the module.
      shape: type of its result.
      unknown_loops: names of the loops of unknown length around it.
      is_conditional: whether a branch that may not be taken leads to it.
      op_name: where in the traced program it comes from.
    """

    kind: str
    axes: str
    num_devices: int
    count: int
    operand_bytes: int
    sent_bytes: float
    shape: str
    unknown_loops: tuple[str, ...]
    is_conditional: bool
    op_name: str


def collectives(module: hlo.Module, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """The collectives that are executed, over groups of more than one device.

    Args:
      module: the compiled program.
      mesh_shape: sizes of the mesh's axes, in the order that its devices are numbered in.
    """
    found: list[Collective] = []
    seen: set[tuple] = set()
    for computation, i, context in module.walk():
        kind = i.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        channel = re.search(r"channel_id=(\d+)", i.attributes)
        # A collective that is spread over several fusions stands in each of them.
        key = (channel and channel.group(1), i.shape, context)
        if channel and key in seen:
            continue
        seen.add(key)
        groups = _groups(i, int(np.prod(list(mesh_shape.values()))))
        if kind == "all-reduce" and _is_scattered(module, computation, i):
            kind = "reduce-scatter"
        size = 2 if kind == "collective-permute" else max(len(group) for group in groups)
        if size < 2:
            continue
        operands = [module.computations[computation].get(name) for name in i.operands]
        # The offsets and sizes of a ragged exchange are no payload.
        payload = operands[:1] if kind == "ragged-all-to-all" else operands
        operand_bytes = sum(hlo.array_bytes(o.shape) for o in payload if o is not None)
        found.append(
            Collective(
                kind=kind,
                axes=axes_of(groups, mesh_shape),
                num_devices=size,
                count=context.times,
                operand_bytes=operand_bytes,
                sent_bytes=operand_bytes * _share(kind, size),
                shape=re.sub(r"\{[^{}]*\}", "", i.shape),
                unknown_loops=context.unknown_loops,
                is_conditional=context.is_conditional,
                op_name=i.op_name,
            )
        )
    return found


def axes_of(groups: Sequence[Sequence[int]], mesh_shape: Mapping[str, int]) -> str:
    """The mesh axes that groups of devices run along.

    Args:
      groups: positions of the devices in the mesh, groups or (source, target) pairs.
      mesh_shape: sizes of the mesh's axes.

    Returns:
      Axes joined by "+", or "?" where a group is neither whole along its axes nor a pair.
    """
    sizes = tuple(mesh_shape.values())
    varying: set[str] = set()
    is_whole = True
    for group in groups:
        places = np.stack(np.unravel_index(np.asarray(group), sizes), axis=-1)
        own = {
            name
            for name, column in zip(mesh_shape, places.T, strict=True)
            if len(set(column.tolist())) > 1
        }
        is_whole &= len(group) == int(np.prod([mesh_shape[name] for name in own])) or (
            len(group) == 2 and len(own) == 1
        )
        varying |= own
    return "+".join(name for name in mesh_shape if name in varying) if is_whole else "?"


def _share(kind: str, size: int) -> float:
    """What a device sends, as a multiple of its operand."""
    if kind == "all-reduce":
        return 2 * (size - 1) / size
    if kind == "all-gather":
        return size - 1
    return 1.0 if kind == "collective-permute" else (size - 1) / size


def _is_scattered(module: hlo.Module, computation: str, reduce: hlo.Instruction) -> bool:
    """Whether all that is used of a sum is a slice: TPUs fuse a reduce-scatter in this form."""
    if not computation.startswith("all-reduce-scatter"):
        return False
    users = [i for i in module.computations[computation].values() if reduce.name in i.operands]
    return bool(users) and all(i.opcode == "dynamic-slice" for i in users)


def _groups(i: hlo.Instruction, num_devices: int) -> list[list[int]]:
    """Groups of positions, or pairs of a permutation without those that stay."""
    if "source_target_pairs=" in i.attributes:
        pairs = _lists(i.attributes, "source_target_pairs")
        return [pair for pair in pairs if pair[0] != pair[1]] or [[0]]
    iota = re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", i.attributes
    )
    if iota:
        shape, dimensions, order = (
            [int(n) for n in part.split(",")] if part else None for part in iota.groups()
        )
        assert shape is not None
        assert dimensions is not None
        ids = np.arange(int(np.prod(dimensions))).reshape(dimensions)
        if order is not None:
            ids = ids.transpose(order)
        return ids.reshape(shape).tolist()
    if "replica_groups={{" in i.attributes:
        return _lists(i.attributes, "replica_groups")
    # None written: all devices together.
    return [list(range(num_devices))]


def _lists(attributes: str, name: str) -> list[list[int]]:
    found = re.search(rf"{name}=\{{((?:\{{[\d,]*\}},?)*)\}}", attributes)
    inner = re.findall(r"\{([\d,]+)\}", found.group(1)) if found else []
    return [[int(n) for n in group.split(",")] for group in inner]
