"""How large the metadata of a routing are, before anything is known of it but how many slots and experts it has."""


def routing_sizes(slots: int, num_experts: int) -> list[tuple[int, ...]]:
    """Of slot_of_row, row_of_slot, offsets and tiles, whatever the rows of a tile (16 to 128)."""
    return [(slots + 128 * num_experts,), (slots,), (2, num_experts + 1), (slots // 16 + num_experts, 2)]
