"""The C library's allocator, told to keep what is freed."""

import ctypes
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # names of glibc's malloc.h
_LARGEST_ON_HEAP = 32 << 20  # glibc takes no higher threshold
_KEPT = 1 << 30


def keep_freed() -> None:
    """Let this process keep up to 1 GiB of freed memory, and take blocks of up to 32 MiB from it.

    glibc hands large blocks back to the kernel as soon as they are free, so every iteration on a CPU would be given its
    activations anew, as pages that are zeroed one by one: 3 to 7 % of a step of many activations. Other C libraries
    are left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for name, value in ((_MMAP_THRESHOLD, _LARGEST_ON_HEAP), (_TRIM_THRESHOLD, _KEPT), (_TOP_PAD, _LARGEST_ON_HEAP)):
        libc.mallopt(name, value)
