"""Command lines: flags in, one call out."""
