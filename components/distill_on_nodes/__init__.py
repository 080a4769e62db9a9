from .component import distill_on_nodes

__all__ = ["distill_on_nodes"]
