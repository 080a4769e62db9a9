from .component import compare

__all__ = ["compare"]
