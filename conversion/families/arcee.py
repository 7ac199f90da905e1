"""AFM (Arcee): Llama with an MLP of two matrices, down(relu(up(x))^2) (Primer, arXiv 2109.08668)."""

from .family import Family
from .llama import LLAMA

ARCEE = Family(model_type="arcee", fields=LLAMA.fields, constants={"gated_mlp": False})
