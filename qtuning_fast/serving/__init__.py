"""Serve a run over HTTP: batches that mix tasks, adapters that come and go, on one machine or a Ray cluster."""
