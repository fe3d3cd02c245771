"""The study of few examples on frozen language models that bench/language.md declares."""
