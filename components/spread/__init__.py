from .component import spread

__all__ = ["spread"]
