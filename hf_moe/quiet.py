"""The lines of libraries' logs that say nothing to a user of hf_moe: importing this leaves them out, and no others."""

import logging

# Logger -> how the line begins.
LEFT_OUT = {
    # PEFT imports bitsandbytes wherever that is installed, and Transformers' trainers import PEFT; on some CPUs
    # bitsandbytes then warns that a kernel of the Hub is missing, in runs that have no 4-bit weight at all.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # Without a GPU: kernels of torchao's that no recipe runs; and what torch has given up and torchao still calls.
    "torchao": "Failed to load",
    "torch.utils._pytree": "%s is an Enum subclass",
}


def wanted(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(LEFT_OUT[record.name])


for _name in LEFT_OUT:
    logging.getLogger(_name).addFilter(wanted)
