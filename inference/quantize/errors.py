"""The two ways a run can end badly, each with its exit code. Knows nothing else."""


class InputError(Exception):
    """What the user gave cannot be worked with: one line, what is wrong and what to do. Exit code 2."""

    exit_code = 2


class WorkError(Exception):
    """The work itself failed (disk full, damaged shard, no memory): one line. Exit code 1."""

    exit_code = 1


class FinalError(WorkError):
    """A failure that the same command would meet again: nothing is kept for it to go on from."""
