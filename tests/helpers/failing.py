"""Making an operation fail in the middle: at the k-th call that Python or its C functions make."""

import sys

# Undoing must not fail as well, and an exception at the end of a block is past the point where it could be undone.
UNDOING = ("randlora/undo.py", "contextlib.py")


class Failure(MemoryError):
    pass


def calls_of(operation, *arguments):
    """How many calls `operation` makes."""
    return _run(operation, arguments, None)


def fail_at(k, operation, *arguments):
    """Runs `operation`, whose k-th call raises :class:`Failure`, and returns its text; None if it makes fewer calls."""
    try:
        _run(operation, arguments, k)
    except Failure as failure:
        return str(failure)
    except RuntimeError as error:  # load_state_dict collects what was raised
        if "has failed" not in str(error):
            raise
        return str(error)
    return None


def _run(operation, arguments, k):
    made = 0

    def watch(frame, event, function):
        nonlocal made
        if function is sys.setprofile:
            return
        if event not in ("call", "c_call") or frame.f_code.co_filename.endswith(UNDOING):
            return
        if event == "call" and frame.f_back is not None and frame.f_back.f_code.co_filename.endswith(UNDOING):
            return
        callers = [f.f_code.co_name for f in (frame, frame.f_back) if f is not None]
        if not {"__enter__", "__exit__"}.isdisjoint([*callers, getattr(function, "__name__", "")]):
            # A mode of torch's would stay for all tests to come. inference_mode makes a guard, which is at work before
            # it is entered: left to the frames of an exception, it restores what was before it whenever they go.
            return
        made += 1
        if made == k:
            sys.setprofile(None)
            raise Failure(f"has failed: {event} {made}: {frame.f_code.co_name} {getattr(function, '__name__', '')}")

    sys.setprofile(watch)
    try:
        operation(*arguments)
    finally:
        sys.setprofile(None)
    return made
