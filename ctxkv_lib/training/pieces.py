"""What a training does when memory is exhausted: the same batches, in pieces."""

from ..errors import is_out_of_memory
from ..progress import say


class Pieces:
    """In how many pieces batches are worked through: more and more once memory is exhausted.

    Args:
        what: the work, in a word or two.
    """

    def __init__(self, what: str) -> None:
        self.what, self.count = what, 1

    def double(self, error: Exception, most: int) -> None:
        """Twice as many from now on.

        Args:
            error: what the last attempt ended with; raised unless it is that memory is exhausted.
            most: rows of a batch; where they are one by one already, the error is raised, too.
        """
        if self.count >= most or not is_out_of_memory(error):
            raise error
        if self.count == 1:
            say(
                f"Memory is exhausted: {self.what} goes on in pieces of a batch, slower, to the same numbers."
            )
        self.count *= 2
