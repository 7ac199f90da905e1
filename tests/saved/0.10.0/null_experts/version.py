"""The release that this code is of; saved beside the weights, it tells how old a folder's code is."""

__version__ = "0.10.0"
