"""Which positions may attend to which: block-causal attention, as a predicate and as an array."""

from jaxtyping import Array, Bool, Int


def block_causal(
    query_positions: Int[Array, "B T"], key_positions: Int[Array, "B S"], block_length: int
) -> Bool[Array, "B T S"]:
    """True where the key's block is the query's own or an earlier one.

    Blocks are counted from position 0 of each text, its prompt included; inside a block attention
    goes both ways (LLaDA2.0, arXiv:2512.15745, section 4).
    """
    query_blocks = query_positions[:, :, None] // block_length
    return key_positions[:, None, :] // block_length <= query_blocks
