"""Why a request got no image, and the HTTP status that says so."""

from __future__ import annotations


class RequestError(Exception):
    """Base: `status` is the HTTP status, `code` a word for programs, the text one line for people."""

    status = 500
    code = "internal"
    retry_after_s: int | None = None


class BadRequestError(RequestError):
    """What was asked for cannot be; asking again will not help."""

    status = 422
    code = "invalid_input"


class MalformedError(RequestError):
    """Not JSON at all."""

    status = 400
    code = "malformed"


class TooLargeError(RequestError):
    """More bytes than a request may have."""

    status = 413
    code = "too_large"


class TooSlowError(RequestError):
    """The client did not send its request in time."""

    status = 408
    code = "request_timeout"


class BusyError(RequestError):
    """The queue is full."""

    status = 429
    code = "busy"

    def __init__(self, text: str, retry_after_s: int) -> None:
        super().__init__(text)
        self.retry_after_s = retry_after_s


class DrainingError(RequestError):
    """The service is about to end."""

    status = 503
    code = "draining"
    retry_after_s = 1


class DeadlineError(RequestError):
    """The images were not ready in time."""

    status = 504
    code = "deadline"


class BrokenError(RequestError):
    """A graph failed on inputs that it should take."""

    status = 500
    code = "failed"


class InterruptedDrawingError(RequestError):
    """What drew it ended more than once before the images were there."""

    status = 503
    code = "interrupted"
    retry_after_s = 1
