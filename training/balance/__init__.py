"""What routing needs in each step: counts of the whole step, losses, selection bias, metrics."""
