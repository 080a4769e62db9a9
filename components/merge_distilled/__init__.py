from .component import merge_distilled

__all__ = ["merge_distilled"]
