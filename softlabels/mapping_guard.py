"""Guard of mapped files: a file that is truncated or written to under a mapping is noticed by its reader.

Reading a mapping past the end of its file raises the signal SIGBUS, which ends the process without a word: `cp` over a
store is enough. A handler puts a page of zeros in the place of the missing one and clears the marks of all chunks in
that file; the reader sees that it has read zeros, and raises an error. Files that are written to are reported by
inotify. docs/integrity.md says what each of the two detects; docs/adr/0025 why it is done in this way.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import mmap
import os
import platform
import select
import signal
import struct
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Protocol, TypeVar

from softlabels.errors import ChecksumError

MAX_ATTEMPTS = 16
"""Times that a read is repeated because a file was written to meanwhile; more is a file that never rests."""

RETRY_S = 0.002
"""Pause after an attempt, times the number of those before it: a quarter of a second in all."""

MAP_FIXED = 0x10
# mmap reports an error as MAP_FAILED, (void *) -1, which ctypes returns as an unsigned integer.
MAP_FAILED = ctypes.c_void_p(-1).value

_IS_LINUX = sys.platform == "linux" and sys.maxsize > 1 << 32 and platform.machine() in ("x86_64", "aarch64")

# Linux's values on x86-64 and arm64; Python has no names for them.
_SA_SIGINFO = 0x4
_ADDRESS_OFFSET, _CODE_OFFSET, _PID_OFFSET = 16, 8, 16
"""Of `si_addr`, `si_code` and `si_pid` in siginfo_t, which is a union: a fault has an address, a sent signal a pid."""

_IN_MODIFY, _IN_Q_OVERFLOW, _IN_IGNORED = 0x2, 0x4000, 0x8000
_EVENT = struct.Struct("iIII")
"""inotify_event: watch, mask, cookie, and the length of a name, which events of files do not have."""

libc = ctypes.CDLL(None, use_errno=True)
# Types are declared, since ctypes takes others for C ints: addresses and offsets would be cut to 32 bits.
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

_HANDLER_TYPE = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _Action(ctypes.Structure):
    """struct sigaction of glibc and musl."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


class MappingChanges:
    """All changes of mapped files in this process: what was read while one happened may not be what was verified.

    Attributes:
        count: grows whenever marks are cleared.
        replacing: an entry for each mapping that is being replaced right now.
    """

    def __init__(self) -> None:
        self.count = 0
        self.replacing: list[int] = []


changes = MappingChanges()
_T = TypeVar("_T")


def stable_read(read: Callable[[], _T]) -> _T:
    """Return what `read` returns, once no mapped file changed while it ran.

    Raises:
        ChecksumError: one changes every time; and whatever `read` raises.
    """
    for attempt in range(MAX_ATTEMPTS):
        before = changes.count
        found = read()
        file_watch.look()
        # In this order: a mapping that is replaced after the first question is counted by the second.
        if not changes.replacing and changes.count == before:
            return found
        time.sleep(RETRY_S * attempt)
    raise ChecksumError(
        "files of the store are written to all the time, but what is committed never changes: find out what writes "
        "there, then run `softlabels verify`"
    )


class Guarded(Protocol):
    """Mapped files, with marks of what was verified: the address space of a store's array, or one mapped file."""

    def replace_lost_page(self, address: int) -> bool:
        """Map zeros over the page at an address and clear its marks; return False where none of these files is."""
        ...

    def invalidate(self, slot: int) -> None:
        """Clear the marks of a file."""

    def invalidate_all(self) -> None:
        """Clear the marks of every file, in a child process that was forked."""


def map_zeros(address: int) -> bool:
    """Map zeros over the page of this address; return whether the system could."""
    page, flags = address - address % mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
    # Writable: the file may have been mapped so, and a write into a read-only page is the next signal (SIGSEGV).
    mapped: bool = libc.mmap(page, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) != MAP_FAILED
    return mapped


class GuardedRange:
    """The addresses of one mapped file, guarded while this object lives.

    Args:
        address, size_bytes: of the mapping.
    Attributes:
        lost_pages: number of pages that were read as zeros, because the file had become shorter. What was read while it
            changed is not what was written; the file has to be mapped again, whole.
    """

    def __init__(self, address: int, size_bytes: int) -> None:
        self._address, self._size_bytes = address, size_bytes
        self.lost_pages = 0
        bus_errors.install()
        bus_errors.register(self)

    def replace_lost_page(self, address: int) -> bool:
        """Do as `Guarded.replace_lost_page`."""
        if not self._address <= address < self._address + self._size_bytes:
            return False
        # Before the page can be read by other threads, which look at the number when they are done.
        self.lost_pages += 1
        return map_zeros(address)

    def invalidate(self, slot: int) -> None:
        """Do nothing: the range has no marks."""

    def invalidate_all(self) -> None:
        """Do nothing: the range has no marks."""


class BusErrorGuard:
    """Handler of SIGBUS for the addresses of registered files; all others go to the handler that was there before.

    The signal is synchronous: it interrupts our own copy of rows, never malloc or the interpreter's own code, so Python
    may run in the handler.
    """

    def __init__(self) -> None:
        self._spaces: list[weakref.ref[Guarded]] = []
        self._lock = threading.Lock()
        self._previous = _Action()
        # Kept for as long as the process runs: the kernel holds its address.
        self._callback = _HANDLER_TYPE(self._handle)
        self._own_address = ctypes.cast(self._callback, ctypes.c_void_p).value

    def install(self) -> bool:
        """Install the handler, unless it is already; return whether the guard works on this system.

        Called whenever a file is mapped, since a library that installs its own later (faulthandler) replaces this one.
        """
        if not _IS_LINUX:
            return False
        current = _Action()
        libc.sigaction(signal.SIGBUS, None, ctypes.byref(current))
        if current.handler != self._own_address:
            self._previous = current
            # Without SA_ONSTACK: the alternate stack that faulthandler sets up is too small for the interpreter.
            own = _Action(handler=self._own_address, flags=_SA_SIGINFO)
            libc.sigaction(signal.SIGBUS, ctypes.byref(own), None)
        return True

    def uninstall(self) -> None:
        """Put the previous handler back, if ours is still the current one."""
        current = _Action()
        libc.sigaction(signal.SIGBUS, None, ctypes.byref(current))
        if current.handler == self._own_address:
            libc.sigaction(signal.SIGBUS, ctypes.byref(self._previous), None)

    def register(self, space: Guarded) -> None:
        """Guard the addresses of this space while it lives."""
        with self._lock:
            # A new list, since the handler may be going through the old one in another thread.
            self._spaces = [*(ref for ref in self._spaces if ref() is not None), weakref.ref(space)]

    def after_fork(self) -> None:
        """Clear the marks of all mappings in a child process: it opens and watches the files itself."""
        self._lock = threading.Lock()
        for ref in self._spaces:
            space = ref()
            if space is not None:
                space.invalidate_all()

    def _handle(self, number: int, info: int, context: int) -> None:
        # An exception must not leave a handler: the faulting instruction would run again, and so for ever.
        is_fault = True
        try:
            address = ctypes.c_uint64.from_address(info + _ADDRESS_OFFSET).value
            is_fault = ctypes.c_int.from_address(info + _CODE_OFFSET).value > 0
            for ref in self._spaces if is_fault else ():
                space = ref()
                if space is not None and space.replace_lost_page(address):
                    return
            sender = ctypes.c_int.from_address(info + _PID_OFFSET).value
            if not is_fault and sender == os.getpid() and faulthandler.is_enabled():
                # faulthandler was installed after this handler: it printed the stack, put this handler back, and sends
                # the signal again. When both return, the instruction faults again, and is handled above.
                return
        except BaseException as error:  # noqa: BLE001
            os.write(2, f"softlabels: {error!r} in the handler of SIGBUS\n".encode())
        # Not ours: the fault happens again under the previous handler, or the default, which ends the process.
        self.uninstall()
        if not is_fault:
            signal.raise_signal(signal.SIGBUS)


class FileWatch:
    """Watch of mapped files for writes, by inotify: one instance a process, since a user may have 128 of them.

    Attributes:
        is_complete: whether every file that was added is watched.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._descriptor, self.is_complete = -1, True
        self._epoll: select.epoll | None = None
        self._slots: dict[int, list[tuple[weakref.ref[Guarded], int]]] = {}
        self._purge_at = 64
        self._lock = threading.Lock()

    def add(self, descriptor: int, space: Guarded, slot: int) -> None:
        """Watch an open file that is mapped into a slot of a space."""
        with self._lock:
            if self._descriptor < 0 and _IS_LINUX:
                self._descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
                if self._descriptor >= 0:
                    self._epoll = select.epoll()
                    self._epoll.register(self._descriptor, select.EPOLLIN)
            number = -1
            if self._descriptor >= 0:
                # By the open file itself: its path may lead to another one by now.
                path = f"/proc/self/fd/{descriptor}".encode()
                number = libc.inotify_add_watch(self._descriptor, path, _IN_MODIFY)
            if number < 0:
                self.is_complete = False
                return
            watched = self._slots.setdefault(number, [])
            watched[:] = [(ref, at) for ref, at in watched if ref() not in (None, space)] + [(weakref.ref(space), slot)]
            if len(self._slots) >= self._purge_at:
                self._purge()

    def look(self) -> None:
        """Clear the marks of all mapped files that were written to since the last look."""
        # Locked: another thread has taken the events out of the queue, and may not have cleared the marks yet.
        # epoll is the cheapest question that threads may ask at the same time: it adds 1 µs to a gather of 115 µs.
        # FIONREAD, which takes the lock of the queue, adds 6.
        if self._epoll is not None and (self._lock.locked() or self._epoll.poll(0)):
            with self._lock, contextlib.suppress(BlockingIOError):
                while events := os.read(self._descriptor, 1 << 16):
                    self._clear(events)

    def after_fork(self) -> None:
        """Start anew in a child process, which shares the queue of its parent and would take events from it."""
        if self._epoll is not None:
            self._epoll.close()
            os.close(self._descriptor)
        self._reset()

    def _clear(self, events: bytes) -> None:
        for number, mask, _, _ in _EVENT.iter_unpack(events):
            if mask & _IN_IGNORED:  # the file is gone: removed, and no longer mapped
                self._slots.pop(number, None)
            lost = mask & _IN_Q_OVERFLOW
            for watched in list(self._slots.values()) if lost else [self._slots.get(number, [])]:
                for ref, slot in watched:
                    space = ref()
                    if space is not None:
                        space.invalidate(slot)

    def _purge(self) -> None:
        for number, watched in list(self._slots.items()):
            if all(ref() is None for ref, _ in watched):
                libc.inotify_rm_watch(self._descriptor, number)
                del self._slots[number]
        self._purge_at = 2 * len(self._slots) + 64


bus_errors = BusErrorGuard()
file_watch = FileWatch()


def _after_fork_in_child() -> None:
    file_watch.after_fork()
    bus_errors.after_fork()
    changes.replacing.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
# The interpreter is gone when late threads of a process that ends touch a mapping.
atexit.register(bus_errors.uninstall)
