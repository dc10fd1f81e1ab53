"""The catalogue of benchmarks/architectures.py: what people train, each small enough for a few seconds."""
