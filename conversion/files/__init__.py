"""Checkpoints as files: read and written tensor by tensor, in the formats that they are stored in."""
