"""The end of a process that is one of several."""

import os
import sys

import torch


def leave() -> None:
    """End it without what Python and libraries do at exit, and once the others are here.

    There a thread of gloo that still holds a tensor may abort the process, its work done (pytorch#179291).
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
