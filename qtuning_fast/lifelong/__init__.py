"""Streams of tasks, the trainer that runs them, and what it reports."""
