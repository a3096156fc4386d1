"""What ends an evaluation."""


class UsageError(Exception):
    """Bad usage or input; the message is one line and names the value. Exit code 2."""


class EvalError(Exception):
    """The evaluation failed on the way; what is finished stays. Exit code 1."""
