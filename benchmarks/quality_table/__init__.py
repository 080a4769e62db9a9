"""The table of `benchmarks/quality.py`: what every method keeps of a model, at every size."""
