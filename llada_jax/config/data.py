"""What a training run reads: token stores, how they are mixed, and how documents fill rows."""

import dataclasses
import pathlib
from typing import Self

EOS_FILLS = ("block", "length", "longest", "none")
LONG_DOCUMENTS = ("split", "truncate", "drop")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One token store in the mixture.

    Attributes:
      path: directory that `llada-data` wrote.
      weight: share of the stream's tokens, relative to the other sources' weights.
    """

    path: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(
                f"source {self.path}: weight {self.weight} must be > 0; leave out a source that "
                "is not to be read"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """How documents fill rows.

    Attributes:
      row_length: tokens of a row.
      block_length: documents start at its multiples. With a schedule of block sizes, the largest
        of them below the row's length, so that each divides it.
      eos_fill: what follows a document.
        "block": EOS up to the next multiple of block_length, then the next document (LLaDA2).
        "length": one document in a row, EOS up to the row's end (dFactory).
        "longest": one document in a row, EOS up to the longest document of the batch, rounded up
          to block_length; padding after it (LLaDA's fine-tuning).
        "none": padding up to the next multiple of block_length, then the next document.
      is_fill_target: whether the EOS that fill up are learnt like a document's own tokens. They
        are not, whatever this says, after a document that was cut or whose end is no target.
      long_documents: what becomes of a document longer than a row. "split": pieces of a row's
        length, each a document of its own, whose positions and blocks start anew. "truncate": its
        beginning. "drop": nothing.
      window_documents: documents that are packed together. More pack tighter and cost memory; it
        decides which rows come out, so it may not change in the middle of a run.
    """

    row_length: int
    block_length: int = 32
    eos_fill: str = "block"
    is_fill_target: bool = True
    long_documents: str = "split"
    window_documents: int = 8192

    def __post_init__(self) -> None:
        for name in ("row_length", "block_length", "window_documents"):
            if getattr(self, name) < 1:
                raise ValueError(f"packing.{name}: {getattr(self, name)} must be >= 1")
        if self.row_length % self.block_length:
            raise ValueError(
                f"packing.row_length: {self.row_length} is no multiple of block_length "
                f"{self.block_length}, so a row would end inside a block"
            )
        for name, known in (("eos_fill", EOS_FILLS), ("long_documents", LONG_DOCUMENTS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"packing.{name}: {getattr(self, name)!r} is not one of {', '.join(known)}"
                )

    @property
    def is_packed(self) -> bool:
        """Whether several documents may share a row."""
        return self.eos_fill in ("block", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The stream of rows.

    Attributes:
      sources: the token stores.
      packing: how documents fill rows.
      seed: of the order of documents and rows.
      shuffle: whether documents come in a random order, another one in each epoch. Without it they
        come in their stores' order.
      num_epochs: how often every document of every source comes; weights must then be equal. None
        repeats each source as often as the mixture's weights need it, without an end.
      eos_id: token that fills up; None takes the one that the stores name.
      prefetch_batches: batches made ahead, in a thread; 0 makes each when it is asked for.
    """

    sources: tuple[SourceConfig, ...]
    packing: PackingConfig
    seed: int = 0
    shuffle: bool = True
    num_epochs: int | None = None
    eos_id: int | None = None
    prefetch_batches: int = 4

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("data.sources is empty; name a directory that llada-data wrote")
        if self.seed < 0 or self.prefetch_batches < 0:
            raise ValueError("data.seed and data.prefetch_batches must be >= 0")
        if self.num_epochs is not None:
            if self.num_epochs < 1:
                raise ValueError(f"data.num_epochs: {self.num_epochs} must be >= 1, or None")
            weights = sorted({source.weight for source in self.sources})
            if len(weights) > 1:
                raise ValueError(
                    f"data.num_epochs: {self.num_epochs} reads every document as often, which "
                    f"contradicts the sources' weights {weights}; give one of the two"
                )

    def heldout(self) -> Self:
        """The documents that `llada-data --holdout` set aside, each once and in their order."""
        sources = tuple(
            SourceConfig(path=str(pathlib.Path(source.path) / "heldout")) for source in self.sources
        )
        return dataclasses.replace(self, sources=sources, shuffle=False, num_epochs=1)
