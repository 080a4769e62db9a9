"""The Kubeflow interface of each step, and nothing else: typed inputs and outputs, what they mean, one call into
`steps`.

Kubeflow takes the source text of each function and runs it alone in the image, hence the imports inside. The launch
form of its UI shows the docstrings.
"""
