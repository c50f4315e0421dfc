"""Array functions: no parameters, no configuration."""
