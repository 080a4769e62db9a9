from .component import calibrate

__all__ = ["calibrate"]
