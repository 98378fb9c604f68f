"""State of the call that a thread is in the middle of: threads that use one model must not see each other's."""

import threading
from typing import Any


class PerThread(threading.local):
    """Attributes that every thread has for itself, starting from the class's own; so has every copy."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()
