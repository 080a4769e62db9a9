from .component import cluster

__all__ = ["cluster"]
