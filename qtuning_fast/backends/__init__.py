"""What computes the operator: one module a backend."""
