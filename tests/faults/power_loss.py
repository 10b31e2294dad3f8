"""Power loss, replayed: from a trace of system calls, what a disk may hold at any moment, unsynced writes lost or not.

The model is stricter than any journaling file system: bytes of a file are safe after its fsync, a name after the fsync
of its folder, and nothing else is. Of what is not safe, any part may have reached the disk, in any order: a write may
be lost and a later one kept, in blocks of 512 bytes; a name may exist before the bytes. Only a rename is one step: the
old name is never gone before the new one is there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

TRACED = (
    *("openat", "open", "creat", "write", "writev", "pwrite64", "pwritev", "fsync", "fdatasync", "ftruncate"),
    *("rename", "renameat", "renameat2", "mkdir", "mkdirat", "unlink", "unlinkat", "rmdir", "close"),
    *("access", "faccessat", "faccessat2", "link", "linkat", "symlink", "truncate", "copy_file_range", "sendfile"),
)
"""Every call that changes files, and `access`, by which the traced process says what it was told is durable."""

ACKNOWLEDGED = "/acknowledged/"
"""A path below this one, looked for by the traced process, says that it was told that something is done."""

SECTOR = 512

_CALL = re.compile(r"^(?P<pid>\d+) +(?P<name>\w+)\((?P<arguments>.*)\) += (?P<result>-?\d+)")
_UNFINISHED = re.compile(r"^(?P<pid>\d+) +(?P<start>\w+\(.*) <unfinished \.\.\.>$")
_RESUMED = re.compile(r"^(?P<pid>\d+) +<\.\.\. \w+ resumed>(?P<rest>.*)$")
_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')


@dataclass
class Inode:
    """A file: the writes to it in order, and how many of them are safe."""

    writes: list[tuple[int, bytes]] = field(default_factory=list)
    safe: int = 0


@dataclass
class NameChange:
    """A name that appeared in a folder (or went, where `inode` is None); a rename's two changes share `pair`."""

    folder: str
    name: str
    inode: int | None
    pair: int = -1
    safe: bool = False


@dataclass
class Disk:
    """A disk as a trace left it so far."""

    inodes: dict[int, Inode] = field(default_factory=dict)
    changes: list[NameChange] = field(default_factory=list)
    acknowledged: tuple[str, ...] = ()
    names: dict[str, int] = field(default_factory=dict)  # as the running process sees them: folders have inode -1
    open_files: dict[tuple[int, int], tuple[int, int, str]] = field(default_factory=dict)  # inode, offset, path

    @classmethod
    def of(cls, root: Path) -> Disk:
        """Return a disk on which everything below a folder is safe."""
        disk = cls()
        for path in sorted(root.rglob("*")):
            number = -1
            if path.is_file():
                number = disk._new_inode()
                disk.inodes[number] = Inode([(0, path.read_bytes())], safe=1)
            disk._change(str(path), number, safe=True)
        return disk

    def _new_inode(self) -> int:
        number = len(self.inodes)
        self.inodes[number] = Inode()
        return number

    def _change(self, path: str, inode: int | None, *, pair: int = -1, safe: bool = False) -> None:
        folder, _, name = path.rpartition("/")
        self.changes.append(NameChange(folder, name, inode, pair, safe))
        if inode is None:
            self.names.pop(path, None)
        else:
            self.names[path] = inode

    def apply(self, call: Call) -> bool:
        """Take a call into account; return whether a crash after it can differ from one before."""
        handler = getattr(self, f"_do_{call.name}", None)
        return bool(handler(call)) if handler is not None else False

    def _do_openat(self, call: Call) -> bool:
        path, flags = call.strings[0], call.arguments
        path = path if path.startswith("/") else f"{call.paths[0]}/{path}"
        made = False
        if path not in self.names and "O_CREAT" in flags:
            self._change(path, self._new_inode())
            made = True
        if path in self.names:
            inode = self.names[path]
            if "O_TRUNC" in flags and inode >= 0 and self.inodes[inode].writes:
                self.inodes[inode].writes.append((-1, b""))
                made = True
            self.open_files[call.pid, call.result] = inode, 0, path
        else:
            # Outside what was traced: a folder that existed before, or a file that is only read.
            self.open_files[call.pid, call.result] = -1, 0, path
        return made

    def _do_close(self, call: Call) -> bool:
        self.open_files.pop((call.pid, call.descriptor), None)
        return False

    def _do_write(self, call: Call) -> bool:
        opened = self.open_files.get((call.pid, call.descriptor))
        if opened is None:
            return False
        inode, offset, path = opened
        if inode < 0:
            return False
        raw = b"".join(s.encode("latin-1") for s in call.strings)[: call.result]
        assert len(raw) == call.result, "strace cut the bytes of a write"
        self.inodes[inode].writes.append((offset, raw))
        self.open_files[call.pid, call.descriptor] = inode, offset + len(raw), path
        return True

    _do_writev = _do_write

    def _do_fsync(self, call: Call) -> bool:
        opened = self.open_files.get((call.pid, call.descriptor))
        if opened is None:
            return False
        inode, _, path = opened
        if inode >= 0:
            self.inodes[inode].safe = len(self.inodes[inode].writes)
        else:
            for change in self.changes:
                change.safe |= change.folder == path
        return True

    _do_fdatasync = _do_fsync

    def _do_rename(self, call: Call) -> bool:
        old, new = call.strings[:2]
        inode = self.names.get(old)
        if inode is None:
            return False
        pair = len(self.changes)
        self._change(new, inode, pair=pair)
        self._change(old, None, pair=pair)
        assert inode >= 0 or not any(name.startswith(f"{old}/") for name in self.names), "a full folder is renamed"
        return True

    _do_renameat = _do_renameat2 = _do_rename

    def _do_mkdir(self, call: Call) -> bool:
        self._change(call.strings[0], -1)
        return True

    def _do_unlink(self, call: Call) -> bool:
        if call.strings[0] not in self.names:
            return False
        self._change(call.strings[0], None)
        return True

    _do_rmdir = _do_unlink

    def _do_access(self, call: Call) -> bool:
        if ACKNOWLEDGED not in call.strings[0]:
            return False
        self.acknowledged += (call.strings[0].partition(ACKNOWLEDGED)[2],)
        return True

    _do_faccessat = _do_faccessat2 = _do_access

    def _do_pwrite64(self, call: Call) -> bool:
        opened = self.open_files.get((call.pid, call.descriptor))
        if opened is None or opened[0] < 0:
            return False
        raw = b"".join(s.encode("latin-1") for s in call.strings)[: call.result]
        self.inodes[opened[0]].writes.append((int(call.arguments.rpartition(",")[2]), raw))
        return True

    def _do_ftruncate(self, call: Call) -> bool:
        opened = self.open_files.get((call.pid, call.descriptor))
        if opened is None or opened[0] < 0:
            return False
        # A negative offset is a change of length: to −1 − offset bytes.
        self.inodes[opened[0]].writes.append((-1 - int(call.arguments.rpartition(",")[2]), b""))
        return True

    def _do_truncate(self, call: Call) -> bool:
        raise AssertionError(f"this call is not modelled yet: {call.name}({call.arguments[:80]})")

    _do_pwritev = _do_link = _do_linkat = _do_symlink = _do_copy_file_range = _do_truncate
    _do_sendfile = _do_mkdirat = _do_unlinkat = _do_creat = _do_open = _do_truncate

    def crashes(self, rng: np.random.Generator, count: int) -> Iterator[dict[str, bytes | None]]:
        """Yield what the disk may hold after a power loss now: contents by path, None for folders."""
        chances = (0.0, 1.0, *rng.choice([0.1, 0.5, 0.9], size=max(0, count - 2)).tolist())
        for chance in chances:
            # Bytes and names may fare differently.
            yield self._crash(rng, chance, 0.0 if chance == 1.0 and rng.random() < 0.5 else chance)

    def _crash(self, rng: np.random.Generator, name_chance: float, byte_chance: float) -> dict[str, bytes | None]:
        kept_pairs = {change.pair: rng.random() < name_chance for change in self.changes}
        names: dict[str, int] = {}
        for change in self.changes:
            path = f"{change.folder}/{change.name}"
            if not change.safe:
                kept = kept_pairs[change.pair] if change.pair >= 0 else rng.random() < name_chance
                # The new name of a rename may be safe and the old one's end not yet.
                if not kept and not (change.inode is None and self._is_safe_pair(change.pair) and rng.random() < 0.5):
                    continue
            if change.inode is None:
                names.pop(path, None)
            else:
                names[path] = change.inode
        bytes_of: dict[int, bytes] = {}
        found: dict[str, bytes | None] = {}
        for path in sorted(names):
            folder = path.rpartition("/")[0]
            # A name is reached only through folders that exist; those above the traced ones always do.
            if any(change.folder + "/" + change.name == folder for change in self.changes) and folder not in names:
                continue
            inode = names[path]
            if inode >= 0 and inode not in bytes_of:
                bytes_of[inode] = self._bytes(rng, self.inodes[inode], byte_chance)
            found[path] = bytes_of[inode] if inode >= 0 else None
        return {path: raw for path, raw in found.items() if _is_reached(path, found, self.changes)}

    def _is_safe_pair(self, pair: int) -> bool:
        return pair >= 0 and any(c.safe and c.pair == pair and c.inode is not None for c in self.changes)

    @staticmethod
    def _bytes(rng: np.random.Generator, inode: Inode, chance: float) -> bytes:
        raw = bytearray()
        for number, (offset, written) in enumerate(inode.writes):
            if offset < 0:
                if number < inode.safe or rng.random() < chance:
                    size = -1 - offset
                    raw[size:] = bytes(max(0, size - len(raw)))
                continue
            for begin in range(0, len(written), SECTOR) if number >= inode.safe else (0,):
                piece = written[begin : begin + SECTOR] if number >= inode.safe else written
                if number >= inode.safe and rng.random() >= chance:
                    continue
                end = offset + begin + len(piece)
                raw += bytes(max(0, end - len(raw)))
                raw[offset + begin : end] = piece
        return bytes(raw)


def _is_reached(path: str, found: dict[str, bytes | None], changes: list[NameChange]) -> bool:
    made = {f"{change.folder}/{change.name}" for change in changes}
    folder = path.rpartition("/")[0]
    while folder:
        if folder in made and folder not in found:
            return False
        folder = folder.rpartition("/")[0]
    return True


@dataclass(frozen=True, kw_only=True)
class Call:
    """A system call of a trace, with its strings decoded and the paths of its descriptors."""

    pid: int
    name: str
    arguments: str
    result: int
    strings: tuple[str, ...]

    @property
    def descriptor(self) -> int:
        """The first argument."""
        return int(re.match(r"\d+", self.arguments)[0])  # type: ignore[index]

    @property
    def paths(self) -> list[str]:
        """Paths of descriptors, which strace shows in angle brackets."""
        return [_decoded(text) for text in re.findall(r"<([^>]*)>", self.arguments)]


def _decoded(text: str) -> str:
    return re.sub(r"\\x([0-9a-f]{2})", lambda m: chr(int(m[1], 16)), text)


def parse_trace(log: str) -> list[Call]:
    """Return the calls of an strace log that succeeded, and every `access`, in the order in which they ended."""
    found: list[Call] = []
    pending: dict[str, str] = {}
    leader: dict[str, int] = {}
    for text in log.splitlines():
        line = text
        if begun := _UNFINISHED.match(line):
            pending[begun["pid"]] = f"{begun['pid']} {begun['start']}"
            continue
        if resumed := _RESUMED.match(line):
            line = pending.pop(resumed["pid"]) + resumed["rest"]
        parsed = _CALL.match(line)
        if parsed is None:
            continue
        result = int(parsed["result"])
        if result < 0 and "access" not in parsed["name"]:
            continue
        strings = _STRING.findall(parsed["arguments"])
        assert not any(cut for _, cut in strings), "strace cut a string"
        # Threads share their descriptors: all of a trace are taken for one process.
        pid = leader.setdefault("first", int(parsed["pid"]))
        found.append(
            Call(
                pid=pid,
                name=parsed["name"],
                arguments=parsed["arguments"],
                result=result,
                strings=tuple(_decoded(raw) for raw, _ in strings),
            )
        )
    return found


def materialize(state: dict[str, bytes | None], root: Path, at: Path) -> None:
    """Write a state of the disk, as it was below `root`, into the folder `at`."""
    at.mkdir(parents=True, exist_ok=True)
    for path, raw in state.items():
        inner = os.path.relpath(path, root)
        if inner.startswith(".."):
            continue
        target = at / inner
        if raw is None:
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(raw)
