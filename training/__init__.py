"""Training: stages run trainers over rows, on what trains of a model, with experts that stay balanced."""
