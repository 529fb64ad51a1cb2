"""A model as a folder of two files, config.json and model.safetensors, as users of Hugging Face's libraries expect.

A checkpoint of a run is such a folder too, and what is written here can be given wherever a checkpoint can.
"""

import shutil
import uuid
from pathlib import Path
from typing import Self

import safetensors
import safetensors.torch

from unit_fast.config import ModelConfig, RunConfig, load_config, to_json
from unit_fast.digest import DIGEST, digest
from unit_fast.errors import UserError, printable

CONFIG, WEIGHTS = "config.json", "model.safetensors"
ALONG = ("labels.json", "vocab.txt", "thresholds.json")
"""Files beside a model that say what its outputs are called and how its texts are cut."""


class Folder:
    """``save_pretrained`` and ``from_pretrained`` of a model with a ``config``."""

    config: ModelConfig
    run_config: RunConfig | None = None
    """The configuration beside the weights that ``from_pretrained`` read, image sizes included."""
    pretrained_from: Path | None = None
    """The folder that ``from_pretrained`` read."""

    def save_pretrained(self, folder: str | Path, *, labels: str | Path | None = None) -> Path:
        """Write the model to the new ``folder``, whole or not at all; returns it.

        labels: a run folder, or any with ``labels.json`` (and ``vocab.txt``), which then goes along; by default that of
        the folder the model came from. ``unit_fast.load(folder)`` needs it to predict. ``UserError`` where the folder
        has something in it, or cannot be written.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: is there already; give a new or an empty folder")
        source = _along(labels if labels is not None else self.pretrained_from)
        if labels is not None and source is None:
            raise UserError(f"labels: {labels} has no {ALONG[0]}; give a run folder")
        config = self.run_config or RunConfig()
        config = RunConfig(model=self.config, data=config.data, precision=config.precision)
        tensors = {name: value.detach().to("cpu").contiguous() for name, value in self.state_dict().items()}
        aside = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
        try:
            aside.mkdir(parents=True)
            (aside / CONFIG).write_text(to_json(config), encoding="utf-8")
            safetensors.torch.save_file(tensors, aside / WEIGHTS, metadata={"format": "pt", DIGEST: digest(tensors)})
            for name in ALONG:
                if source is not None and (source / name).is_file():
                    shutil.copyfile(source / name, aside / name)
            if folder.exists():
                folder.rmdir()
            aside.rename(folder)
        except (OSError, safetensors.SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{folder}: cannot be written ({reason}); give another place") from None
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device="cpu") -> Self:
        """The model in ``folder`` (a local one: nothing is downloaded), in evaluation mode.

        ``UserError`` where the two files are not there, do not belong together or are damaged.
        """
        folder = Path(folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                best = folder / "checkpoints" / "best"
                remedy = (
                    f"give {best}" if best.is_dir() else "give what save_pretrained wrote, or a checkpoint's folder"
                )
                raise UserError(f"{folder}: has no {name}; {remedy} (nothing is downloaded)")
        config = load_config(folder / CONFIG)
        model = cls(config.model)
        try:
            with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
                kept = (file.metadata() or {}).get(DIGEST)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{folder / WEIGHTS}: not a whole safetensors file ({printable(error)})") from None
        if kept is not None and kept != digest(tensors):
            raise UserError(f"{folder / WEIGHTS}: its tensors differ from the checksum inside it; take another file")
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            first = printable(" ".join(str(error).split()), 300)
            raise UserError(f"{folder / WEIGHTS}: does not fit {CONFIG} beside it ({first})") from None
        model.run_config, model.pretrained_from = config, folder
        return model.to(device).eval()


def _along(folder: str | Path | None) -> Path | None:
    """The folder with the names that belong to ``folder``: itself, or the run it is in."""
    if folder is None:
        return None
    folder = Path(folder).resolve()
    return next((f for f in [folder, *list(folder.parents)[:4]] if (f / ALONG[0]).is_file()), None)
