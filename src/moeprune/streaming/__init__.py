"""Models that do not fit: weights are brought in part by part, and activations go to disk when they must.

paging    a model on the meta device, whose parts are brought in from the checkpoint's files and dropped again
lanes     many forward passes side by side, each stopped at the doors of the parts
holding   what a stopped pass holds: its large tensors, put on disk and taken back
room      how a memory limit is shared out
streamed  the pass that calibration rides on: every part is brought in once, for all batches
"""
