"""Pipeline parallelism: the decoder cut into stages by the family's plan, run by torch.distributed.pipelining."""
