"""The stages of training, what they share, and what each does before and after its trainer."""
