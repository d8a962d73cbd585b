"""The part of a device's memory that a run may take."""

# The part of a device's memory that JAX takes for arrays, unless XLA_CLIENT_MEM_FRACTION says otherwise.
DEFAULT_MEMORY_FRACTION = 0.75
# The most that it makes sense to ask for: the CUDA context, machine code, and what NCCL and cuBLAS allocate
# for themselves need room beside the arrays, and every pool has gaps.
LARGEST_MEMORY_FRACTION = 0.95


def check_memory_fraction(value: float | int) -> None:
    """ValueError unless a run can sensibly ask for this part of a device's memory."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= LARGEST_MEMORY_FRACTION:
        raise ValueError(
            f"memory_fraction must be a number in (0, {LARGEST_MEMORY_FRACTION}], not {value!r}: "
            "the rest of the memory is for the CUDA context, machine code and libraries"
        )
