"""Serving: one accelerated pipeline behind an HTTP server, a batch job or a Triton model repository."""
