from .component import merge_stats

__all__ = ["merge_stats"]
