"""Commands on a damaged store: verify, repair, merge, convert, resume; nothing wrong is published or left unsaid."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from softlabels.documents import canonical_json
from softlabels.progress import Progress
from softlabels.store.copies import convert_store, merge
from softlabels.store.repair import repair
from softlabels.store.store_reader import LocalRows
from softlabels.store.verify import verify
from softlabels.target_store import TargetStore
from tests.faults.fork_server import Kind
from tests.faults.generator.judging import Questions, Verdict, WrongError
from tests.faults.generator.readers import Place
from tests.faults.generator.stores import Stores, Tree, read_tree, write_tree

Damage = Callable[[], None]

HARMLESS_FILES = {
    "job.json": "only `resume` reads it, and refuses a job whose plan is not the store's",
    "transfer_set.tsv.gz": "names, sizes and times of files for a person to read: not part of the store",
}
"""Files whose change need not be noticed, with the reason."""


class _Interruption(Progress):
    """Progress that does damage after its first step."""

    def __init__(self, damage: Damage | None) -> None:
        self._damage = damage

    def advance(self, amount: int = 1) -> None:
        """Do the damage, once."""
        damage, self._damage = self._damage, None
        if damage is not None:
            damage()


def show_with(damage: Damage | None) -> Any:
    """Return a progress display that does damage in the middle of what it shows."""

    @contextlib.contextmanager
    def show(total: int, title: str, unit: str = "") -> Iterator[Progress]:
        yield _Interruption(damage)

    return show


class Commands:
    """The commands, over one damaged store.

    Args:
        place: where it lies.
        stores: what it was, and its other versions.
        questions: what is asked of what the command made.
        late: damage to do in the middle of the command; None where it was done before.
    """

    def __init__(self, place: Place, stores: Stores, questions: Questions, late: Damage | None) -> None:
        self.place, self.stores, self.questions, self._late = place, stores, questions, late

    def verify(self, verdict: Verdict) -> None:
        """Whatever differs is reported, unless it is harmless; a change in the middle by the next verification."""
        with verdict.part("verify"):
            report = verify(self.place.root, every_fault=True, show=show_with(self._late))
            if self._late is not None:
                report = verify(self.place.root, every_fault=True)
            if report.sound:
                self._accept_unreported(verdict)
            else:
                verdict.codes.append("reported")

    def repair(self, verdict: Verdict) -> None:
        """Repaired, nothing wrong is read; resumed, the store is what it was, byte by byte, or the writer refuses."""
        mixed = False
        with verdict.part("repair"):
            mixed = repair(self.place.root, show=show_with(self._late)).mixed
        if self._late is not None:
            with verdict.part("repair again"):
                mixed = repair(self.place.root).mixed
        self._judge_reading(self.place.root, verdict, "read after repair")
        with verdict.part("resume after repair"):
            self.kind.write(self.place.root)
            if mixed:  # which of its parts is the foreign one cannot be told, and the command says so
                verdict.codes.append("reported")
            else:
                self._judge_made(verdict, self.place.root, "resumed after repair")
        self._judge_reading(self.place.root, verdict, "read after resume")

    def resume(self, verdict: Verdict) -> None:
        """Continued, the store returns nothing wrong."""
        with verdict.part("resume"):
            writer = self.kind.writer(self.place.root)
            for shard in writer.missing_shards():
                self.kind.commit(writer, shard)
                self._do_late()
            self._do_late()
            writer.finish()
        self._judge_reading(self.place.root, verdict, "read after resume")

    def merge(self, verdict: Verdict) -> None:
        """United with an undamaged part, the new store returns nothing wrong."""
        target = self.place.aside / "merged"
        part = write_tree(self.place.aside / "part", self.stores.trees["begun"])
        with verdict.part("merge"):
            done = merge([self.place.root, part], target, show=show_with(self._late))
            verdict.codes += ["reported"] if done.damaged or done.missing else []
        if target.exists():
            self._judge_reading(target, verdict, "read after merge")

    def convert(self, verdict: Verdict) -> None:
        """Copied into the other container, the new store returns nothing wrong."""
        target = self.place.aside / "converted"
        container = "hdf5" if self.stores.name.startswith("zarr") else "zarr"
        late = _Interruption(self._late)
        with verdict.part("convert"):
            convert_store(self.place.root, target, container=container, advance=lambda rows: late.advance())  # type: ignore[arg-type]
        if target.exists():
            self._judge_reading(target, verdict, "read after convert")

    @property
    def kind(self) -> Kind:
        """What the store is made of."""
        return self.stores.kind

    def _do_late(self) -> None:
        damage, self._late = self._late, None
        if damage is not None:
            damage()

    def _judge_reading(self, root: Path, verdict: Verdict, what: str) -> None:
        """Read everything; a store of another digest must hold what `current` holds."""
        with verdict.part(what):
            store = TargetStore(LocalRows(root), where=str(root))
            current = self.stores.models[self.stores.digests["current"]]
            models = {store.digest: current, **self.stores.models}
            inner = Verdict()
            self.questions.everything(store, models, inner)
            store.close()
            verdict.rows += inner.rows
            verdict.codes += inner.codes
            verdict.wrong += [f"{what}: {text}" for text in inner.wrong]

    def _judge_made(self, verdict: Verdict, root: Path, what: str) -> None:
        expected, found = self.stores.trees["current"], read_tree(root)
        differing = [path for path in sorted(expected.keys() | found.keys()) if expected.get(path) != found.get(path)]
        differing = [path for path in differing if not _same_meaning(expected, found, path)]
        # Only a run of the job restores these, and no row depends on them.
        differing = [path for path in differing if path not in HARMLESS_FILES]
        if differing:
            raise WrongError(f"{what}: {len(differing)} files are not as before: {differing[:4]}")

    def _accept_unreported(self, verdict: Verdict) -> None:
        expected, found = self.stores.trees["current"], read_tree(self.place.root)
        for path in sorted(expected.keys() | found.keys()):
            if expected.get(path) == found.get(path) or _same_meaning(expected, found, path):
                continue
            if path not in HARMLESS_FILES:
                if any(found == tree for tree in self.stores.trees.values()):
                    verdict.harmless = "it is another store now, whole"
                    return
                raise WrongError(f"a changed {path} is not reported")
            verdict.harmless = HARMLESS_FILES[path]
        verdict.harmless = verdict.harmless or "the documents say the very same"


def _same_meaning(expected: Tree, found: Tree, path: str) -> bool:
    """Return whether a document says the same in other bytes; only files whose seal covers their meaning."""
    if path.endswith("zarr.json") or not path.endswith(".json") or path not in expected or path not in found:
        return False
    try:
        return canonical_json(json.loads(expected[path])) == canonical_json(json.loads(found[path]))
    except (ValueError, RecursionError):
        return False


COMMANDS: dict[str, Callable[[Commands, Verdict], None]] = {
    "verify": Commands.verify,
    "repair": Commands.repair,
    "merge": Commands.merge,
    "convert": Commands.convert,
    "resume": Commands.resume,
}
