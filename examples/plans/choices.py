"""What is compiled for the page of plans: a program, a slice, a mesh, and why this mesh."""

import dataclasses
import itertools

from llada_jax import config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One call of `llada-compile`.

    Attributes:
      name: of the plan, unique.
      what: the program, in words.
      words: the command line after the command's name.
      why: the reason for the mesh.
    """

    name: str
    what: str
    words: tuple[str, ...]
    why: str

    @property
    def trains(self) -> bool:
        """Whether it is a training step."""
        return "--phase" in self.words


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """A slice and how a model lies on it.

    Attributes:
      topology: as `--topology` takes it.
      mesh: data, fsdp, expert, tensor.
      rows: of a batch.
      why: the reason for the mesh.
    """

    topology: str
    mesh: str
    rows: int
    why: str

    @property
    def chip(self) -> str:
        """The generation."""
        return self.topology.partition(":")[0]


_ROWS = "rows and cache split over the ranks of `expert`, so that no chip holds another's cache"
SAMPLING = {
    "mini": (
        Place(topology="v5p:2x2x1", mesh="1,1,4,1", rows=16, why=_ROWS),
        Place(topology="v5e:2x4", mesh="1,1,8,1", rows=16, why=_ROWS),
        Place(topology="v6e:2x4", mesh="1,1,8,1", rows=16, why=_ROWS),
    ),
    "flash": (
        Place(topology="v5p:2x2x4", mesh="1,1,16,1", rows=16, why=_ROWS),
        Place(topology="v6e:4x8", mesh="1,1,32,1", rows=32, why=f"{_ROWS}; a row per chip"),
        Place(topology="v5e:4x8", mesh="1,1,32,1", rows=32, why=f"{_ROWS}; a row per chip"),
    ),
}
# What is read from HBM, and what is sent, grows with the experts of a chip; both ask for a large
# `expert`, as far as groups of experts go.
_GROUPS = "a chip has the experts of one group, to which a token is sent once; a row per chip"
_HALF = "a chip has the experts of half a group; a row per chip"
TRAINING = {
    "mini": (
        Place(topology="v5p:2x4x4", mesh="1,4,8,1", rows=32, why=_GROUPS),
        Place(topology="v6e:8x8", mesh="1,8,8,1", rows=64, why=_GROUPS),
        Place(topology="v5e:8x16", mesh="1,16,8,1", rows=128, why=_GROUPS),
    ),
    "flash": (
        Place(topology="v5p:4x4x8", mesh="1,8,16,1", rows=128, why=_HALF),
        Place(topology="v6e:16x16", mesh="1,16,16,1", rows=256, why=_HALF),
    ),
}
# Phases of the pod configs, by objective; the stable one predicts masks in the whole row.
PHASES = {"block": "decay_32", "masked": "stable"}
LENGTHS = {"4k": 4096, "8k": 8192, "32k": 32768}
# From this length on, the ranks of `expert` share rows.
SHARED_LENGTH = 32768


def plans() -> list[Plan]:
    """All of the page, in its order."""
    return [*_sampling(), *_training()]


def _sampling() -> list[Plan]:
    found = []
    programs = (
        ("denoise_4k", "denoising, cache of 4k", ("--cache-tokens", "4096")),
        ("denoise_32k", "denoising, cache of 32k", ("--cache-tokens", "32768")),
        (
            "prefill_32k",
            "prefill of 512 positions, cache of 32k",
            ("--cache-tokens", "32768", "--program", "prefill"),
        ),
    )
    for (model, places), (short, what, words) in itertools.product(SAMPLING.items(), programs):
        for place in places:
            where = ("--topology", place.topology, "--mesh", place.mesh)
            how = ("--batch", str(place.rows), "--dispatch", "all_gather")
            found.append(
                Plan(
                    name=f"{model}_{place.chip}_{short}",
                    what=f"{model}, {what}",
                    words=(model, *where, *how, *words),
                    why=place.why,
                )
            )
    return found


def _training() -> list[Plan]:
    found = []
    for (model, places), (kind, phase), (short, length) in itertools.product(
        TRAINING.items(), PHASES.items(), LENGTHS.items()
    ):
        is_shared = length >= SHARED_LENGTH
        for place in places:
            rows = place.rows
            if is_shared:
                rows //= config.MeshConfig.parse(place.mesh).expert
            found.append(
                Plan(
                    name=f"{model}_{place.chip}_{kind}_{short}",
                    what=f"{model}, {kind} diffusion, {short}" + ", shared rows" * is_shared,
                    words=(
                        f"configs/{model}_cpt_v5p.py",
                        *("--topology", place.topology, "--model", model, "--mesh", place.mesh),
                        *("--batch", str(rows), "--config.accumulation=1"),
                        f"--config.data.packing.row_length={length}",
                        *("--phase", phase),
                        *(("--config.compute.context_parallel=True",) if is_shared else ()),
                    ),
                    why=place.why,
                )
            )
    return found
