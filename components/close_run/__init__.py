from .component import close_run

__all__ = ["close_run"]
