"""What a user brings: files, folders and data sets, as tasks and as tensors."""
