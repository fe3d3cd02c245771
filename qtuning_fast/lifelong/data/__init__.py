"""User data: read files, folders and data sets into tasks, and encode tasks as tensors."""
