"""What can be wrong with what a user gave us. Each message says what was wrong, where, and what to do."""


class MoepruneError(Exception):
    """Base of every error that is the caller's to mend; the command line prints it as one sentence, no traceback."""


class InputError(MoepruneError):
    """A model, data set, option or artifact cannot be used as it is."""


class ServiceError(MoepruneError):
    """A service that was asked for (MLflow, S3, the Hugging Face hub) cannot be reached or refuses."""


def in_one_line(error: BaseException) -> str:
    """What an error of another library says, to be part of a sentence of ours."""
    return " ".join(str(error).split()) or type(error).__name__
