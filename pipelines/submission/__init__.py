"""A compiled pipeline on its way to Kubeflow Pipelines: checked, uploaded once, started, followed."""
