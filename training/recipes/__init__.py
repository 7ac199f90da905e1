"""The recipes that come along, and what reads them."""
