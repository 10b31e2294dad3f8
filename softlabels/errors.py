"""The error tree: every class with a stable code and an HTTP status.

SoftLabelsError            everything that softlabels raises on purpose
├── RequestError           the call asks for something impossible: change the call
│       EmptyBatchError, BatchTooLargeError, UnknownFieldError, BadIdsError, TemperatureError, UnauthorizedError,
│       TemperatureLockedError, ShapeMismatchError
├── NotFoundError          the call names something that does not exist: change the name
│       UnknownStoreError, UnknownIdError
├── ConflictError          both sides are valid but do not belong together: find out which is right
│       FingerprintMismatchError, ClassListMismatchError, ViewReplayError, StoreChangedError, RowsNotCommittedError,
│       StoreExistsError, ShardClaimedError, CheckpointMismatchError, ShardConflictError, StoreLockedError
├── DamageError            bytes are not what was written: verify, repair, resume
│       ChecksumError, TruncatedError, ManifestError, WireError
├── JobError               a job that cannot run as written: correct the job file
│       ReferenceLoadError, DataUnavailableError, UnreadableSampleError, TransferSetChangedError
├── TeacherError           a teacher with invalid outputs: correct the teacher
│       TeacherShapeError, NonFiniteLogitsError, TeacherChangedError
└── FormatVersionError, EncodingError, UnknownEncodingError, MissingExtraError, DivergenceError, PortInUseError,
        WorkerDiedError, ServerUnreachableError
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class SoftLabelsError(Exception):
    """Everything that softlabels raises on purpose.

    Args:
        message: what is wrong, why it matters and what to do.
        context: JSON-able values for programs (ids, temperatures, paths); sent with the error over HTTP.
    """

    code: ClassVar[str] = "error"  # append-only: clients match on codes
    status: ClassVar[int] = 500
    title: ClassVar[str] = "softlabels failed"

    def __init_subclass__(cls, *, code: str = "", status: int = 0, **others: Any) -> None:
        """Set code, status and title; a title is the docstring's first line, up to a colon."""
        super().__init_subclass__(**others)
        if status:
            cls.status = status
        if code:
            cls.code = code
            # `python -OO` has no docstrings.
            cls.title = (cls.__doc__ or code).partition(":")[0].removesuffix(".")

    def __init__(self, message: str, **context: Any) -> None:
        super().__init__(message)
        self.message = message
        self.context: dict[str, Any] = context

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions cross process borders (DataLoader workers), and the default would lose the keyword context.
        return (rebuild_error, (type(self), self.message, self.context))


class RequestError(SoftLabelsError, ValueError, code="bad-request", status=422):
    """The request cannot be met as it stands: change the call."""


class EmptyBatchError(RequestError, code="empty-batch"):
    """A batch needs at least one id."""


class BatchTooLargeError(RequestError, code="batch-too-large", status=413):
    """The batch is larger than this server replies with at once."""


class UnknownFieldError(RequestError, code="unknown-field"):
    """The store keeps no such field."""


class BadIdsError(RequestError, code="bad-ids"):
    """These are not sample ids of this store's kind."""


class UnauthorizedError(RequestError, code="unauthorized", status=401):
    """This server asks for a token."""


class TemperatureError(RequestError, code="bad-temperature"):
    """A temperature is a finite positive number."""


class TemperatureLockedError(RequestError, code="temperature-locked", status=409):
    """The targets are locked to the temperature they were captured at."""


class ShapeMismatchError(RequestError, code="shape-mismatch"):
    """Shapes differ that must agree."""


class NotFoundError(SoftLabelsError, LookupError, code="not-found", status=404):
    """Not found: change the name."""


class UnknownStoreError(NotFoundError, code="unknown-store"):
    """There is no such store."""


class UnknownIdError(NotFoundError, code="unknown-id"):
    """The store holds no such sample."""


class ConflictError(SoftLabelsError, ValueError, code="conflict", status=409):
    """These do not belong together: find out which is right."""


class FingerprintMismatchError(ConflictError, code="fingerprint-mismatch"):
    """The targets were computed for other data: row i there is not your row i."""


class ClassListMismatchError(ConflictError, code="class-list-mismatch"):
    """The classes are not the same, or not in the same order: column j there is not your class j."""


class ViewReplayError(ConflictError, code="view-replay"):
    """The view cannot be made again as the teacher saw it: another transform, other libraries, or other parameters."""


class StoreChangedError(ConflictError, code="store-changed", status=412):
    """The store changed since it was opened."""


class RowsNotCommittedError(ConflictError, code="rows-not-committed"):
    """The store is unfinished and these rows are not there yet."""


class StoreExistsError(ConflictError, FileExistsError, code="store-exists"):
    """A store stands there already."""


class ShardClaimedError(ConflictError, code="shard-claimed"):
    """Another writer holds this shard."""


class ShardConflictError(ConflictError, code="shard-conflict"):
    """This shard was committed before with other contents."""


class StoreLockedError(ConflictError, TimeoutError, code="store-locked"):
    """Another process holds the store's lock: wait for it, or end it."""


class CheckpointMismatchError(ConflictError, code="checkpoint-mismatch"):
    """These checkpoints are of another training: other settings, targets, data or another student."""


class DamageError(SoftLabelsError, OSError, code="damage"):
    """Stored bytes are not what was written: verify, repair, resume."""


class ChecksumError(DamageError, code="checksum-mismatch"):
    """A checksum fails."""


class TruncatedError(DamageError, code="truncated"):
    """A file or reply ends too early."""


class ManifestError(DamageError, code="bad-manifest"):
    """The manifest cannot be believed."""


class WireError(DamageError, code="bad-reply", status=502):
    """The reply is not what the wire format says."""


class FormatVersionError(SoftLabelsError, code="format-version", status=501):
    """Written in a format that this softlabels does not know: upgrade."""


class JobError(SoftLabelsError, ValueError, code="bad-job", status=422):
    """The job cannot run as written: correct the job file."""


class ReferenceLoadError(JobError, code="bad-reference"):
    """A Python reference cannot be loaded."""


class DataUnavailableError(JobError, code="data-unavailable"):
    """A data set cannot be had here."""


class UnreadableSampleError(JobError, code="unreadable-sample"):
    """A sample of the transfer set cannot be read: a corrupt image, a truncated file."""


class TransferSetChangedError(JobError, code="transfer-set-changed"):
    """The transfer set changed under the job: files were added, removed or changed."""


class TeacherError(SoftLabelsError, ValueError, code="bad-teacher", status=422):
    """A teacher gives no sound targets: correct the teacher."""


class TeacherShapeError(TeacherError, code="teacher-shape"):
    """A teacher's output has the wrong shape."""


class NonFiniteLogitsError(TeacherError, code="non-finite-logits"):
    """A teacher's output holds NaN or Inf."""


class TeacherChangedError(TeacherError, code="teacher-changed"):
    """The teachers are not those of the committed shards: restore them, or start another store."""


class EncodingError(SoftLabelsError, ValueError, code="encoding-range", status=422):
    """The encoding cannot hold this distribution."""


class UnknownEncodingError(SoftLabelsError, LookupError, code="unknown-encoding", status=422):
    """There is no such encoding."""


class MissingExtraError(SoftLabelsError, ImportError, code="missing-extra", status=501):
    """An optional dependency is not installed: pip install it."""


class DivergenceError(SoftLabelsError, ArithmeticError, code="training-diverged", status=422):
    """The training diverged: lower the learning rate."""


class PortInUseError(SoftLabelsError, OSError, code="port-in-use", status=409):
    """The port is in use: choose another."""


class WorkerDiedError(SoftLabelsError, RuntimeError, code="worker-died"):
    """A worker process ended unexpectedly."""


class ServerUnreachableError(SoftLabelsError, ConnectionError, code="unreachable", status=503):
    """The server gives no usable answer."""


def rebuild_error(cls: type[SoftLabelsError], message: str, context: Mapping[str, Any]) -> SoftLabelsError:
    """Return an error of this class as it was in another process."""
    error = cls(message)
    error.context = dict(context)
    return error
