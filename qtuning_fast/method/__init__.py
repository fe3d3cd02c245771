"""Q-tuning and NoRGa in plain PyTorch."""
