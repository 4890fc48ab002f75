"""The errors that this package raises on purpose."""


class PaceError(ValueError):
    """Base of every error that this package raises on purpose."""


class UnsupportedModelError(PaceError):
    """The model is none that can be accelerated, or not in the way that was asked for."""


class WeightsError(PaceError):
    """A pace weight file is missing, broken, or belongs to another backbone."""


class ClipError(PaceError):
    """A clip (images, cameras or depth) can't be read."""


def first_line(error: BaseException) -> str:
    """What an error says, in short."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
