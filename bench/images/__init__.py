"""The study of class-incremental learning of images that bench/images.md declares."""
