from .component import combine

__all__ = ["combine"]
