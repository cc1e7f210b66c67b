"""A limit on the memory that a process may ask for."""

import contextlib
import resource


@contextlib.contextmanager
def little_memory(limit=300 << 20):
    """Allocations beyond this fail here, so that a test sees them."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)
