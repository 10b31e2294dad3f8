"""What does a student minimise? Losses over a batch of soft targets that knows its own temperature, one file a family.

Every loss here has the form `loss(student_logits_BC, targets, *, weights...)`: T comes with the targets and can never
be passed beside them, so T² can be applied neither twice nor for another T. Those with a name (`make_loss`) give
`LossParts`: Hinton's objective (`plain`), decoupled distillation (`decoupled`), correlations (`relations`); the first
two compare z-scores instead of logits where `standardise` asks for it (`standardised`). Logits themselves are matched
in `matching`. A further family is one more file of that form, made of `terms`, and a line in `named`.

Shapes: B rows, C classes. p is the target's distribution, q the student's, T the targets' temperature, z the student's
logits, v the teacher's. Arithmetic is float32, or float64 for a float64 student; half-precision students are raised.
"""

from __future__ import annotations

from softlabels.losses.correlation import relation_loss
from softlabels.losses.decoupled import decoupled_loss
from softlabels.losses.distillation import distillation_loss, hard_loss, logit_matching_loss, soft_loss
from softlabels.losses.loss_registry import (
    LOSS_NAMES,
    DecoupledLoss,
    DistillationLoss,
    NamedLoss,
    RelationLoss,
    make_loss,
)
from softlabels.losses.standardisation import Deviation, standardise_logits
from softlabels.losses.target_batch import SoftTargetBatch
from softlabels.losses.terms import LossParts

__all__ = [
    "LOSS_NAMES",
    "DecoupledLoss",
    "Deviation",
    "DistillationLoss",
    "LossParts",
    "NamedLoss",
    "RelationLoss",
    "SoftTargetBatch",
    "decoupled_loss",
    "distillation_loss",
    "hard_loss",
    "logit_matching_loss",
    "make_loss",
    "relation_loss",
    "soft_loss",
    "standardise_logits",
]
