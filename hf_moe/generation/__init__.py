"""What helps `generate`: grammars that a text follows, and choices among several texts."""
