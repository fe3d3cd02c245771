"""The composed backend's prefix part on a CPU."""
