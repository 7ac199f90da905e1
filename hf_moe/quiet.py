"""The one line of a library's log that says nothing to a user of hf_moe."""

import logging

# PEFT imports bitsandbytes wherever that is installed, and Transformers' trainers import PEFT; on some CPUs
# bitsandbytes then warns that a kernel of the Hub is missing, in runs that have no 4-bit weight at all.
CPU_KERNELS = "bitsandbytes.backends.cpu.ops"
MISSING = "Failed to load CPU gemm_4bit_forward"


def wanted(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(MISSING)


def quieten() -> None:
    """Leave that line out; everything else that bitsandbytes has to say is still said."""
    logging.getLogger(CPU_KERNELS).addFilter(wanted)  # a filter is added once, however often
