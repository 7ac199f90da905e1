"""Transformers' and TRL's trainers with routing that is right in training."""
