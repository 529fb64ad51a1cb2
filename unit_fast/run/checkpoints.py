"""The checkpoints of a run: found, restored and saved."""

import logging
from collections.abc import Sequence
from pathlib import Path

from unit_fast.config import RunConfig
from unit_fast.config_check import check_resumable
from unit_fast.data.store.digests import check_same_data
from unit_fast.errors import UserError
from unit_fast.run.log import RunLog
from unit_fast.run.state import State
from unit_fast.weights import checkpoint
from unit_fast.weights.checkpoint import SaveError

_log = logging.getLogger("unit_fast.train")


def find(parent: Path, resume: str | Path | None) -> Path | None:
    """The checkpoint to go on from, found intact: the newest in ``parent`` for ``"auto"``, if there is any; else of the
    path ``resume``. ``UserError`` where none is intact."""
    if resume is None:
        return None
    if str(resume) != "auto":
        found = checkpoint.find(resume, ("last",)).resolve()
        checkpoint.verify(found)
        return found
    last = [(parent / "last").resolve()] if (parent / "last").exists() else []
    candidates = last + [folder for folder in checkpoint.numbered(parent) if folder.resolve() not in last]
    for found in candidates:
        try:
            checkpoint.verify(found)
            return found
        except UserError as error:
            _log.warning("a checkpoint is left out: %s", error)
    if candidates:
        raise UserError(f"{parent}: no checkpoint is intact; start again with another --out")
    return None


class Checkpoints:
    """The checkpoints in the folder ``parent``, of which the newest ``keep`` and those pointed to are kept.

    What a killed save has left there goes.
    """

    def __init__(self, parent: Path, keep: int):
        checkpoint.sweep(parent)
        self.parent, self.keep = parent, keep
        self.saved_at: int | None = None
        """Updates of the newest one that was saved here."""

    def find(self, resume: str | Path | None) -> Path | None:
        """See ``find``, in this run."""
        return find(self.parent, resume)

    @staticmethod
    def restore(
        source: Path, state: State, saved: RunConfig, config: RunConfig, allow_changed: Sequence[str], log: RunLog
    ) -> dict[str, tuple]:
        """Put ``state`` where checkpoint ``source`` was, whose configuration is ``saved``; ``UserError`` where anything
        of it does not fit. Returns what of the configuration changed: dotted name -> (then, now)."""
        changed = check_resumable(source, saved, config, allow_changed)
        if changed:
            log.line("changed since the checkpoint: " + ", ".join(f"{k} {a} -> {b}" for k, (a, b) in changed.items()))
        if any(name == "graph" or name.startswith("buckets.") for name in changed):
            log.line(
                "captured steps are padded to buckets, others are not: from here on padding, and with it dropout and "
                "the last bits, may differ from what they would have been"
            )
        content = checkpoint.load_state(source)
        for line in check_same_data(content.get("data"), state.data):
            _log.warning("%s", line)
        own = state.model.state_dict()
        checkpoint.fill(state.model, checkpoint.load_weights(source / checkpoint.WEIGHTS, expected=own))
        if state.ema:
            weights = checkpoint.load_weights(source / checkpoint.EMA, expected=own)
            checkpoint.fill(state.ema.model, weights)
        try:
            state.load_dict(content)
        except KeyError as error:
            raise UserError(f"{source / checkpoint.STATE_JSON}: lacks {error}; take another checkpoint") from None
        if state.step > config.steps:
            raise UserError(f"{source}: is at step {state.step}, beyond --steps {config.steps}; give more steps")
        return changed

    def save(self, state: State, config: RunConfig, *, final: bool = False) -> None:
        """Checkpoint ``step_N``; then ``last``, and ``best`` if this step is it; then older ones go.

        A disk that refuses is reported and tried again at the next save; where this is the ``final`` one, it is a
        ``SaveError``.
        """
        name = f"step_{state.step:06d}"
        average = state.ema.model.state_dict() if state.ema else None
        try:
            checkpoint.save(self.parent, name, state.model.state_dict(), config, state.to_dict(), average)
            checkpoint.point(self.parent, "last", name)
            for link, best in state.best.items():
                if best["step"] == state.step:
                    checkpoint.point(self.parent, link, name)
            self.saved_at = state.step
            checkpoint.prune(self.parent, self.keep)
        except (SaveError, OSError) as error:  # OSError: of a link, or of what is deleted
            if final:
                raise SaveError(str(error)) from error
            _log.error("%s; training goes on and tries again at the next save", error)
