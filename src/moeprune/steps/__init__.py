"""The steps of the pipeline: each brings its inputs here, calls the library, tells MLflow, puts its output in place.

The command line and the components call these functions and nothing else. Each has a module of its own, to be
imported as such: what a step needs takes seconds to load, and a process mostly is one step.
"""
