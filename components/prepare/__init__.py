from .component import prepare

__all__ = ["prepare"]
