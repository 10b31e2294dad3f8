"""The error tree: every class with a stable code and an HTTP status.

SoftLabelsError            everything that softlabels raises on purpose
├── RequestError           the call asks for something impossible: change the call
│       EmptyBatchError, BatchTooLargeError, UnknownFieldError, BadIdsError, TemperatureError, UnauthorizedError,
│       TemperatureLockedError, ShapeMismatchError
├── NotFoundError          the call names something that does not exist: change the name
│       UnknownStoreError, UnknownIdError
├── ConflictError          both sides are valid but do not belong together: find out which is right
│       FingerprintMismatchError, ClassListMismatchError, ViewReplayError, StoreChangedError, RowsNotCommittedError,
│       StoreExistsError, ShardClaimedError, CheckpointMismatchError, ShardConflictError
├── DamageError            bytes are not what was written: verify, repair, resume
│       ChecksumError, TruncatedError, ManifestError, WireError
├── JobError               a job that cannot run as written: correct the job file
│       ReferenceLoadError, DataUnavailableError, UnreadableSampleError, TransferSetChangedError
├── TeacherError           a teacher with invalid outputs: correct the teacher
│       TeacherShapeError, NonFiniteLogitsError
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

    def __init__(self, message: str, **context: Any) -> None:
        super().__init__(message)
        self.message = message
        self.context: dict[str, Any] = context

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions cross process borders (DataLoader workers), and the default would lose the keyword context.
        return (rebuild_error, (type(self), self.message, self.context))


class RequestError(SoftLabelsError, ValueError):
    """The call asks for something impossible: change the call."""

    code = "bad-request"
    status = 422
    title = "The request cannot be met as it stands"


class EmptyBatchError(RequestError):
    """A batch of no ids."""

    code = "empty-batch"
    title = "A batch needs at least one id"


class BatchTooLargeError(RequestError):
    """More ids than one reply may hold."""

    code = "batch-too-large"
    status = 413
    title = "The batch is larger than this server replies with at once"


class UnknownFieldError(RequestError):
    """A field that the store does not have."""

    code = "unknown-field"
    title = "The store keeps no such field"


class BadIdsError(RequestError):
    """Ids of the wrong kind, shape or type."""

    code = "bad-ids"
    title = "These are not sample ids of this store's kind"


class UnauthorizedError(RequestError):
    """The server needs a token, and the request has none or a wrong one."""

    code = "unauthorized"
    status = 401
    title = "This server asks for a token"


class TemperatureError(RequestError):
    """A temperature that is not a finite positive number."""

    code = "bad-temperature"
    title = "A temperature is a finite positive number"


class TemperatureLockedError(RequestError):
    """These targets exist only at the temperature they were captured at."""

    code = "temperature-locked"
    status = 409
    title = "The targets are locked to the temperature they were captured at"


class ShapeMismatchError(RequestError):
    """Two arrays that must agree in shape do not."""

    code = "shape-mismatch"
    title = "Shapes differ that must agree"


class NotFoundError(SoftLabelsError, LookupError):
    """The call names something that does not exist: change the name."""

    code = "not-found"
    status = 404
    title = "Not found"


class UnknownStoreError(NotFoundError):
    """No store of that name or at that path."""

    code = "unknown-store"
    title = "There is no such store"


class UnknownIdError(NotFoundError):
    """A sample id that is not in the store."""

    code = "unknown-id"
    title = "The store holds no such sample"


class ConflictError(SoftLabelsError, ValueError):
    """Both sides are valid but do not belong together: find out which is right."""

    code = "conflict"
    status = 409
    title = "These do not belong together"


class FingerprintMismatchError(ConflictError):
    """The targets were computed for other data: row i there is not your row i."""

    code = "fingerprint-mismatch"
    title = "The targets were computed for other data"


class ClassListMismatchError(ConflictError):
    """The classes have other names, or another order: column j there is not your class j."""

    code = "class-list-mismatch"
    title = "The classes are not the same, or not in the same order"


class ViewReplayError(ConflictError):
    """A view cannot be replayed as the teacher saw it: another transform, other libraries, or other parameters."""

    code = "view-replay"
    title = "The view cannot be made again as the teacher saw it"


class StoreChangedError(ConflictError):
    """The store is not the version that the caller holds."""

    code = "store-changed"
    status = 412
    title = "The store changed since it was opened"


class RowsNotCommittedError(ConflictError):
    """The store is unfinished and these rows are not there yet."""

    code = "rows-not-committed"
    title = "The store is unfinished and these rows are not there yet"


class StoreExistsError(ConflictError, FileExistsError):
    """A store exists there already."""

    code = "store-exists"
    title = "A store stands there already"


class ShardClaimedError(ConflictError):
    """Another writer holds this shard."""

    code = "shard-claimed"
    title = "Another writer holds this shard"


class ShardConflictError(ConflictError):
    """A shard was committed before with other contents."""

    code = "shard-conflict"
    title = "This shard was committed before with other contents"


class CheckpointMismatchError(ConflictError):
    """Checkpoints that belong to another training: other settings, targets, data or another student."""

    code = "checkpoint-mismatch"
    title = "These checkpoints are of another training"


class DamageError(SoftLabelsError, OSError):
    """Bytes are not what was written: verify, repair, resume."""

    code = "damage"
    title = "Stored bytes are not what was written"


class ChecksumError(DamageError):
    """A chunk's checksum fails."""

    code = "checksum-mismatch"
    title = "A checksum fails"


class TruncatedError(DamageError):
    """A file or reply ends too early or is missing."""

    code = "truncated"
    title = "A file or reply ends too early"


class ManifestError(DamageError):
    """A manifest or receipt that is unreadable or contradicts itself."""

    code = "bad-manifest"
    title = "The manifest cannot be believed"


class WireError(DamageError):
    """A reply that is not what the wire format says."""

    code = "bad-reply"
    status = 502
    title = "The reply is not what the wire format says"


class FormatVersionError(SoftLabelsError):
    """Written by a newer softlabels: upgrade."""

    code = "format-version"
    status = 501
    title = "Written in a format that this softlabels does not know"


class JobError(SoftLabelsError, ValueError):
    """A job that cannot run as written: correct the job file."""

    code = "bad-job"
    status = 422
    title = "The job cannot run as written"


class ReferenceLoadError(JobError):
    """A `module:name` reference that cannot be loaded."""

    code = "bad-reference"
    title = "A Python reference cannot be loaded"


class DataUnavailableError(JobError):
    """A data set that cannot be had here."""

    code = "data-unavailable"
    title = "A data set cannot be had here"


class UnreadableSampleError(JobError):
    """A sample of the transfer set that cannot be read: a corrupt image, a truncated file."""

    code = "unreadable-sample"
    title = "A sample of the transfer set cannot be read"


class TransferSetChangedError(JobError):
    """The transfer set is not the one that the job began with: files were added, removed or changed."""

    code = "transfer-set-changed"
    title = "The transfer set changed under the job"


class TeacherError(SoftLabelsError, ValueError):
    """A teacher with invalid outputs: correct the teacher."""

    code = "bad-teacher"
    status = 422
    title = "A teacher gives no sound targets"


class TeacherShapeError(TeacherError):
    """A teacher's output has the wrong shape."""

    code = "teacher-shape"
    title = "A teacher's output has the wrong shape"


class NonFiniteLogitsError(TeacherError):
    """A teacher's output holds NaN or Inf."""

    code = "non-finite-logits"
    title = "A teacher's output holds NaN or Inf"


class EncodingError(SoftLabelsError, ValueError):
    """A distribution that this encoding cannot represent within its bound."""

    code = "encoding-range"
    status = 422
    title = "The encoding cannot hold this distribution"


class UnknownEncodingError(SoftLabelsError, LookupError):
    """No encoding of that name."""

    code = "unknown-encoding"
    status = 422
    title = "There is no such encoding"


class MissingExtraError(SoftLabelsError, ImportError):
    """An optional dependency is not installed: pip install it."""

    code = "missing-extra"
    status = 501
    title = "An optional dependency is not installed"


class DivergenceError(SoftLabelsError, ArithmeticError):
    """A training's loss is no longer a finite number: lower the learning rate."""

    code = "training-diverged"
    status = 422
    title = "The training diverged"


class PortInUseError(SoftLabelsError, OSError):
    """Another process listens on this port: choose another."""

    code = "port-in-use"
    status = 409
    title = "The port is in use"


class WorkerDiedError(SoftLabelsError, RuntimeError):
    """A worker process, of the server or of a data loader, ended before its work was done."""

    code = "worker-died"
    title = "A worker process ended unexpectedly"


class ServerUnreachableError(SoftLabelsError, ConnectionError):
    """No usable answer from the server after every retry."""

    code = "unreachable"
    status = 503
    title = "The server gives no usable answer"


def rebuild_error(cls: type[SoftLabelsError], message: str, context: Mapping[str, Any]) -> SoftLabelsError:
    """Return an error of this class as it was in another process."""
    error = cls(message)
    error.context = dict(context)
    return error
