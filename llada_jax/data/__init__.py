"""Tokenizers and chat templates: text in and out of token ids."""
