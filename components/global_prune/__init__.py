from .component import global_prune

__all__ = ["global_prune"]
