from .component import bring

__all__ = ["bring"]
